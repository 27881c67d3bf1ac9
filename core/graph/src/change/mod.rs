//! A change of the graph: edits on a copy, checked as a whole, applied while what it touches is drained, or not
//! at all.
//!
//! ```text
//!   edits (copy of the topology; new nodes are opened)      give_up = nothing happened
//!      │ commit
//!      ▼
//!   check permissions ─▶ drain the roots above what changes ─▶ run actions (bitmaps, sizes, headers)
//!                                                                 │ each with its undo; an error undoes all
//!      ┌──────────────────────────────────────────────────────────┘
//!      ▼
//!   take permissions (locks) ─▶ swap the wiring ─▶ open the gates ─▶ close nodes that are gone
//! ```

mod children;
mod commit;
mod give_up;
mod internal;
mod open;
pub(crate) mod reopen;
mod shape;
mod snapshot;
mod state;

pub use commit::Made;
pub(crate) use give_up::Opened;
pub use internal::Internal;

use crate::{
    definition::check_name,
    driver::{BoxFuture, OpenChild, OpenNode},
    error::{Error, Kind, Result},
    graph::{Graph, State, attach, find_bitmap},
    node::NodeId,
    owed::Owed,
    root::{Root, RootOptions},
    topology::{Attached, Attachment, Topology},
    wiring::Wired,
};
use driveline_bitmap::{Bitmap, BitmapId};
use driveline_op::Edge;
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

/// A change in the making. Nothing of it is seen by anyone until [`Change::commit`]; given up, it never was.
///
/// A driver may write when it opens, and take that back when it is closed, so nodes that were opened are closed, whatever
/// becomes of the change: [`Change::commit_if`] and [`Change::give_up`] do so at once. Of a change that is just dropped, by an
/// error on the way or because whoever made it was cancelled, they stay open until the next change begins or the graph is
/// closed, and are closed then.
pub struct Change {
    pub(crate) graph: Graph,
    pub(crate) topology: Topology,
    pub(crate) before: State,
    actions: Vec<Action>,
    /// Nodes that actions touch: the roots above them are drained.
    pub(crate) touched: BTreeSet<NodeId>,
    /// Nodes that were opened for it.
    opened: Opened,
    /// Nodes that become read-only; not those that keep their data for them.
    settling: Vec<NodeId>,
    /// Nodes that become read-only afterwards, when what was written to them is durable.
    keeping: Vec<NodeId>,
    /// What was written to them, once others may go on.
    owed: Vec<Arc<Owed>>,
    /// Instances that others have replaced, to be closed when nothing can fail any more.
    pub(crate) replaced: Replaced,
    directory: PathBuf,
    /// Images whose backing is being opened just now, from the top down.
    images: Vec<PathBuf>,
    /// Nobody else changes the graph. There until the change is made.
    turn: Option<async_lock::MutexGuardArc<()>>,
}

/// Instances of nodes, with the children that they had.
pub(crate) type Replaced = Arc<Mutex<Opened>>;

/// What an action sees: the new topology, and the wiring as it was.
pub(crate) struct Staged {
    pub(crate) topology: Topology,
    pub(crate) before: Arc<Topology>,
    pub(crate) wired: BTreeMap<NodeId, Wired>,
    pub(crate) parked: BTreeMap<BitmapId, NodeId>,
}

/// One step that is done while drained.
pub(crate) type Action = Box<dyn for<'a> FnOnce(&'a mut Staged) -> BoxFuture<'a, Result<Undo>> + Send>;
/// What takes a step back.
pub(crate) type Undo = Box<dyn FnOnce() -> BoxFuture<'static, ()> + Send>;

/// An undo that does not wait.
pub(crate) fn undo(f: impl FnOnce() + Send + 'static) -> Undo {
    Box::new(move || {
        f();
        Box::pin(async {})
    })
}

impl fmt::Debug for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Change").field("actions", &self.actions.len()).finish_non_exhaustive()
    }
}

impl Change {
    pub(crate) fn new(graph: Graph, turn: async_lock::MutexGuardArc<()>) -> Self {
        let before = graph.0.state.lock().clone();
        let topology = (*before.topology).clone();
        Self {
            graph,
            topology,
            before,
            actions: Vec::new(),
            touched: BTreeSet::new(),
            opened: Opened::new(),
            settling: Vec::new(),
            keeping: Vec::new(),
            owed: Vec::new(),
            replaced: Replaced::default(),
            directory: PathBuf::new(),
            images: Vec::new(),
            turn: Some(turn),
        }
    }

    /// Relative paths of definitions start here; without it, in the current directory.
    pub fn set_directory(&mut self, directory: &Path) {
        self.directory = directory.to_owned();
    }

    // ---- drives and roots

    /// Makes a drive of that name lead to a node: a new drive, or another root for one that is there.
    pub fn set_drive(&mut self, name: &str, node: &str) -> Result<()> {
        check_name(name)?;
        let id = self.topology.id(node)?;
        if self.topology.names.contains_key(name) {
            return Err(Error::new(Kind::Exists, format_args!("there is a node '{name}' already")));
        }
        self.topology.drives.insert(name.into(), id);
        Ok(())
    }

    /// Removes a drive. One with roots is refused.
    pub fn remove_drive(&mut self, name: &str) -> Result<()> {
        self.topology.drive(name)?;
        let on_it = |attached: &&Attached| attached.to == Attachment::Drive(name.into());
        if let Some(attached) = self.topology.roots.values().find(on_it) {
            let message = format_args!("drive '{name}' is in use by {}", attached.root.user());
            return Err(Error::new(Kind::Busy, message));
        }
        self.topology.drives.remove(name);
        Ok(())
    }

    /// Opens a root as part of this change. It works once the change is committed.
    pub fn attach(&mut self, name: &str, options: &RootOptions) -> Result<Root> {
        let root = attach(&mut self.topology, &self.graph, name, options, false)?;
        Ok(Root::new(root, self.graph.clone()))
    }

    /// As [`Change::attach`], but on a node the root keeps its place in the graph, see [`Graph::open_following_root`].
    pub fn attach_following(&mut self, name: &str, options: &RootOptions) -> Result<Root> {
        let root = attach(&mut self.topology, &self.graph, name, options, true)?;
        Ok(Root::new(root, self.graph.clone()))
    }

    /// On an inactive node the root needs nothing for as long as that is so, and its writes fail. Others that need to write are refused
    /// there.
    pub fn let_be_inactive(&mut self, root: &Root) {
        if let Some(attached) = self.topology.roots.get_mut(&root.id()) {
            attached.may_be_inactive = true;
        }
    }

    /// As [`Change::attach`], but always to the node: on a drive's name too it stays at the node that the drive
    /// leads to now. Jobs do this.
    pub fn attach_to_node(&mut self, name: &str, options: &RootOptions) -> Result<Root> {
        let id = self.topology.node_or_drive(name)?;
        let name = self.topology.name(id);
        self.attach(&name, options)
    }

    pub(crate) fn detach(&mut self, root: u64) {
        self.topology.roots.remove(&root);
    }

    /// Detaches a root as part of this change.
    pub fn detach_root(&mut self, root: &Root) {
        self.detach(root.id());
    }

    /// Detaches all roots of a user as part of this change: to try what will be possible once it is gone.
    pub fn detach_user(&mut self, user: &str) {
        self.topology.roots.retain(|_, attached| attached.root.user() != user);
    }

    /// The first node that is no filter, from a node or drive down, as it will be after this change.
    pub fn first_format(&self, name: &str) -> Result<NodeId> {
        Ok(self.topology.skip_filters(self.topology.node_or_drive(name)?))
    }

    /// Is there a node of that name, as this change would have it so far?
    pub fn has_node(&self, name: &str) -> bool {
        self.topology.names.contains_key(name)
    }

    /// Is there a drive of that name, as this change would have it so far?
    pub fn has_drive(&self, name: &str) -> bool {
        self.topology.drives.contains_key(name)
    }

    /// Reads a node definition from a JSON object. Nodes that this change adds count as there.
    pub fn parse(&self, object: crate::Options) -> Result<crate::Definition> {
        self.graph.parse_in(&self.topology, object)
    }

    pub(crate) fn clear(&mut self) {
        self.topology = Topology::default();
    }

    // ---- the rest

    /// Runs `work` while everything that this change touches is drained, before its other steps and before the
    /// wiring is swapped. `nodes` are drained; `work` gets their edges as they were, in that order.
    pub fn while_drained_first<F>(&mut self, nodes: &[&str], work: F) -> Result<()>
    where
        F: FnOnce(Vec<Edge>) -> BoxFuture<'static, Result<()>> + Send + 'static,
    {
        let ids = nodes.iter().map(|name| self.topology.id(name)).collect::<Result<Vec<_>>>()?;
        self.touched.extend(ids.iter().copied());
        let action: Action = Box::new(move |staged| {
            let edges = ids.iter().map(|id| staged.wired[id].edge_of_locker.clone()).collect();
            Box::pin(async move {
                work(edges).await?;
                Ok(undo(|| {}))
            })
        });
        self.actions.insert(0, action);
        Ok(())
    }

    /// Does something with a node outside the data path, while nothing is in flight in it: `work` gets the node and its
    /// children. It comes in its turn among the other steps, and has no undo.
    pub fn visit<F>(&mut self, node: &str, work: F) -> Result<()>
    where
        F: FnOnce(Arc<dyn OpenNode>, Vec<OpenChild>) -> BoxFuture<'static, Result<()>> + Send + 'static,
    {
        self.visit_or_back(node, work, |_, _| Box::pin(async { Ok(()) }))
    }

    /// The same with an undo: `back` gets the same node and children, if `work` was done and this change is not made after all.
    /// Its error is logged.
    pub fn visit_or_back<F, B>(&mut self, node: &str, work: F, back: B) -> Result<()>
    where
        F: FnOnce(Arc<dyn OpenNode>, Vec<OpenChild>) -> BoxFuture<'static, Result<()>> + Send + 'static,
        B: FnOnce(Arc<dyn OpenNode>, Vec<OpenChild>) -> BoxFuture<'static, Result<()>> + Send + 'static,
    {
        let id = self.topology.id(node)?;
        self.action([id], move |staged| {
            // It may be taken out by the same change.
            let node = staged.any_node(id);
            let children = staged.wired.get(&id).map(|wired| wired.children.clone()).unwrap_or_default();
            Box::pin(async move {
                let node = node?;
                work(node.open.clone(), children.clone()).await.map_err(|error| error.at(&node.name))?;
                let undo: Undo = Box::new(move || {
                    Box::pin(async move {
                        if let Err(error) = back(node.open.clone(), children).await {
                            tracing::error!(node = node.name(), "undo of a graph change: {error}");
                        }
                    })
                });
                Ok(undo)
            })
        });
        Ok(())
    }

    /// A node and its children as they are before this change, to ask it something outside the data path that changes nothing.
    /// Nobody else changes the graph as long as the change is there; requests come and go.
    pub fn look_at(&self, node: &str) -> Result<(Arc<dyn OpenNode>, Vec<OpenChild>)> {
        let id = self.before.topology.id(node)?;
        let children = self.before.wired.get(&id).map(|wired| wired.children.clone()).unwrap_or_default();
        Ok((self.before.topology.at(id).node.open.clone(), children))
    }

    pub(crate) fn action(
        &mut self,
        touches: impl IntoIterator<Item = NodeId>,
        action: impl for<'a> FnOnce(&'a mut Staged) -> BoxFuture<'a, Result<Undo>> + Send + 'static,
    ) {
        self.touched.extend(touches);
        self.actions.push(Box::new(action));
    }

    /// A bitmap as it will be found after this change's edits (not its actions).
    pub(crate) fn find_bitmap(&self, target: &str, name: &str) -> Result<(NodeId, Arc<Bitmap>)> {
        find_bitmap(&self.topology, &self.before.parked, target, name)
    }

    pub(crate) fn parked_home(&self, id: BitmapId) -> Option<NodeId> {
        self.before.parked.get(&id).copied()
    }
}

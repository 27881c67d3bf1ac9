//! A change of the graph: edits on a copy, checked as a whole, applied while what it touches is drained, or not
//! at all.
//!
//! ```text
//!   edits (copy of the topology; new nodes are opened)      drop = nothing happened
//!      │ commit
//!      ▼
//!   check permissions ─▶ drain the roots above what changes ─▶ run actions (bitmaps, sizes, headers)
//!                                                                 │ each with its undo; an error undoes all
//!      ┌──────────────────────────────────────────────────────────┘
//!      ▼
//!   take permissions (locks) ─▶ swap the wiring ─▶ open the gates ─▶ close nodes that are gone
//! ```

use crate::{
    definition::{ChildDefinition, Definition, check_name, in_order},
    driver::{BoxFuture, ChildSpec, Driver, OpenArgs, OpenChild, Options, Permissions, Role},
    error::{Error, Kind, Result},
    event::Event,
    graph::{Graph, State, attach, find_bitmap},
    node::{Node, NodeId},
    permission::Granted,
    root::{Root, RootOptions, RootShared},
    topology::{Attached, Attachment, ChildEdge, Parent, Placed, Topology},
    wiring::{Wired, wire},
};
use driveline_bitmap::{Bitmap, BitmapId};
use driveline_op::Edge;
use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

/// A change in the making. Nothing of it is seen by anyone until [`Change::commit`]; dropped, it never was.
pub struct Change {
    pub(crate) graph: Graph,
    pub(crate) topology: Topology,
    before: State,
    actions: Vec<Action>,
    /// Nodes that actions touch: the roots above them are drained.
    pub(crate) touched: BTreeSet<NodeId>,
    opened: Vec<NodeId>,
    directory: PathBuf,
    _turn: async_lock::MutexGuardArc<()>,
}

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
            opened: Vec::new(),
            directory: PathBuf::new(),
            _turn: turn,
        }
    }

    /// Relative paths of definitions start here; without it, in the current directory.
    pub fn set_directory(&mut self, directory: &Path) {
        self.directory = directory.to_owned();
    }

    // ---- nodes

    /// Opens nodes. Those that refer to each other may come in any order. Returns them in the order of opening.
    pub async fn add_nodes(&mut self, definitions: Vec<Definition>) -> Result<Vec<Arc<Node>>> {
        let mut nodes = Vec::new();
        for definition in in_order(definitions)? {
            let name = definition.name.clone();
            let id = self.open(definition, false, None).await.map_err(|error| match &name {
                Some(name) => error.at(name),
                None => error,
            })?;
            nodes.push(self.topology.at(id).node.clone());
        }
        Ok(nodes)
    }

    /// Opens a node.
    pub async fn add_node(&mut self, definition: Definition) -> Result<Arc<Node>> {
        Ok(self.add_nodes(vec![definition]).await?.remove(0))
    }

    fn open(
        &mut self,
        definition: Definition,
        implicit: bool,
        inherited_read_only: Option<bool>,
    ) -> BoxFuture<'_, Result<NodeId>> {
        Box::pin(async move {
            let driver = self.graph.driver(&definition.driver)?;
            // An error of a node without a name of its own is told by the node around it, see `within_child`.
            let given = definition.name.clone();
            let at = |error: Error| given.as_deref().map_or(error.clone(), |name| error.at(name));
            let name: Arc<str> = match definition.name {
                Some(name) => name.into(),
                None => self.graph.new_name(&definition.driver),
            };
            if self.topology.names.contains_key(&name) || self.topology.drives.contains_key(&name) {
                return Err(Error::new(Kind::Exists, format_args!("the name '{name}' is taken")));
            }
            driver.check(&definition.options).map_err(at)?;
            let read_only = definition.read_only.or(inherited_read_only).unwrap_or(false);
            let mut children = Vec::new();
            let mut said = BTreeSet::new();
            for (spec, child) in definition.children {
                said.insert(spec.name.clone());
                children.extend(self.open_child(spec, child, read_only).await?);
            }
            self.open_implied(&driver, &definition.options, &said, &mut children).await?;
            let id = NodeId::new();
            let open_children = self.open_children(&children)?;
            let args = OpenArgs {
                node_name: &name,
                cookie: id.0,
                options: &definition.options,
                children: open_children,
                read_only,
                directory: &self.directory,
            };
            let open = driver.open(args).await.map_err(at)?;
            let node = Arc::new(Node {
                id,
                name: name.clone(),
                driver,
                open,
                options: definition.options,
                bitmaps: Default::default(),
                ranges: Default::default(),
                info: Default::default(),
                failed: Default::default(),
            });
            self.topology.names.insert(name, id);
            self.topology.nodes.insert(id, Placed { node, children, read_only, implicit });
            self.opened.push(id);
            Ok(id)
        })
    }

    async fn open_child(
        &mut self,
        spec: ChildSpec,
        child: ChildDefinition,
        read_only: bool,
    ) -> Result<Option<ChildEdge>> {
        let node = match child {
            ChildDefinition::Null => return Ok(None),
            ChildDefinition::Node(name) => self.topology.id(&name).map_err(|error| error.key(&spec.name))?,
            ChildDefinition::Inline(inner) => {
                let read_only = read_only || spec.role == Role::Backing;
                self.open(*inner, true, Some(read_only)).await.map_err(|e| within_child(e, &spec.name))?
            }
        };
        Ok(Some(ChildEdge { name: spec.name, role: spec.role, node }))
    }

    /// Opens the children that the image names, and puts all into the order of the description.
    async fn open_implied(
        &mut self,
        driver: &Arc<dyn Driver>,
        options: &Options,
        said: &BTreeSet<Cow<'static, str>>,
        children: &mut Vec<ChildEdge>,
    ) -> Result<()> {
        let specs = driver.description().children.clone();
        // What the image names does not matter then, not even if it is not there any more.
        if specs.iter().all(|spec| said.contains(&spec.name)) {
            return Ok(());
        }
        let given = self.open_children(children)?;
        for implied in driver.implied_children(options, &given).await? {
            let Some(spec) = specs.iter().find(|spec| spec.name == implied.name) else { continue };
            if said.contains(&spec.name) {
                continue;
            }
            let definition = self.graph.parse(implied.definition, &[])?;
            self.check_image_cycle(&definition, children)?;
            let node = self.open(definition, true, Some(spec.role == Role::Backing)).await;
            let node = node.map_err(|error| within_child(error, &spec.name))?;
            children.push(ChildEdge { name: spec.name.clone(), role: spec.role, node });
        }
        children.sort_by_key(|child| specs.iter().position(|spec| spec.name == child.name));
        Ok(())
    }

    /// A chain of images that leads back to itself would be opened for ever. Depth is limited, and the files on
    /// the way are named.
    fn check_image_cycle(&self, definition: &Definition, children: &[ChildEdge]) -> Result<()> {
        const DEPTH_MAX: usize = 200;
        let _ = children;
        let implied = self.opened.iter().rev().filter(|id| self.topology.at(**id).implicit).count();
        if implied < DEPTH_MAX {
            return Ok(());
        }
        let message = format_args!(
            "its backing chain is longer than {DEPTH_MAX} images, or leads back to itself (last: driver '{}')",
            definition.driver
        );
        Err(Error::new(Kind::Invalid, message))
    }

    fn open_children(&self, children: &[ChildEdge]) -> Result<Vec<OpenChild>> {
        if children.is_empty() {
            return Ok(Vec::new());
        }
        let wired = wire(&self.topology, self.graph.0.trace);
        let open = |child: &ChildEdge| OpenChild {
            name: child.name.clone(),
            edge: wired[&child.node].edge.clone(),
            node: self.topology.at(child.node).node.open.clone(),
            node_name: self.topology.name(child.node),
        };
        Ok(children.iter().map(open).collect())
    }

    /// Takes a node out and closes it. One that is in use is refused, by the names of its users.
    pub fn remove_node(&mut self, name: &str) -> Result<()> {
        let id = self.topology.id(name)?;
        let users: Vec<_> = self.topology.parents(id).iter().map(|p| self.topology.describe(p)).collect();
        if !users.is_empty() {
            let message = format_args!("it is in use by {}", users.join(", "));
            return Err(Error::new(Kind::Busy, message).at(name));
        }
        self.refuse_with_bitmaps(id)?;
        self.topology.names.remove(name);
        self.topology.nodes.remove(&id);
        Ok(())
    }

    fn refuse_with_bitmaps(&self, id: NodeId) -> Result<()> {
        let node = &self.topology.at(id).node;
        let names: Vec<_> =
            node.bitmaps.lock().iter().map(|bitmap| format!("'{}'", bitmap.name().as_str())).collect();
        if names.is_empty() {
            return Ok(());
        }
        let message = format_args!("it has bitmaps ({}); move or remove them first", names.join(", "));
        Err(Error::new(Kind::Busy, message).at(&node.name))
    }

    /// Makes `node` the child of that name of `parent` (`None`: no child).
    pub fn set_child(&mut self, parent: &str, child: &str, node: Option<&str>) -> Result<()> {
        let parent_id = self.topology.id(parent)?;
        let description = self.topology.at(parent_id).node.driver.description().clone();
        let Some(spec) = description.children.iter().find(|spec| spec.name == child) else {
            let names: Vec<_> = description.children.iter().map(|spec| format!("'{}'", spec.name)).collect();
            let message = format_args!("it has no child '{child}'; it can have {}", names.join(", "));
            return Err(Error::new(Kind::NotFound, message).at(parent));
        };
        let node = match node {
            None if spec.required => {
                return Err(
                    Error::new(Kind::Invalid, format_args!("it needs its child '{child}'")).at(parent)
                );
            }
            None => None,
            Some(node) => Some(self.topology.id(node)?),
        };
        if let Some(node) = node {
            self.topology.check_acyclic(parent_id, node)?;
        }
        let placed = self.topology.nodes.get_mut(&parent_id).expect("looked up above");
        placed.children.retain(|edge| edge.name != spec.name);
        if let Some(node) = node {
            placed.children.push(ChildEdge { name: spec.name.clone(), role: spec.role, node });
        }
        placed
            .children
            .sort_by_key(|edge| description.children.iter().position(|spec| spec.name == edge.name));
        Ok(())
    }

    /// Puts `node` in the place of `old` under all of its parents, except roots that stay at their node, and
    /// except where that would make a cycle (parents at or below `node`).
    pub fn replace_node(&mut self, old: &str, node: &str) -> Result<()> {
        let (old, new) = (self.topology.id(old)?, self.topology.id(node)?);
        self.move_parents(old, new);
        Ok(())
    }

    fn move_parents(&mut self, old: NodeId, new: NodeId) {
        let below_new = self.topology.reach(new);
        for parent in self.topology.parents(old) {
            match parent {
                Parent::Node(id, child) if !below_new.contains(&id) => {
                    let placed = self.topology.nodes.get_mut(&id).expect("a parent is a node");
                    placed
                        .children
                        .iter_mut()
                        .filter(|edge| edge.name == child)
                        .for_each(|edge| edge.node = new);
                }
                Parent::Drive(name) => drop(self.topology.drives.insert(name, new)),
                Parent::Node(..) | Parent::Root(_) => {}
            }
        }
    }

    /// Opens a filter above a node, in the place that the node had under its parents:
    ///
    /// ```text
    ///   parent ─▶ node      parent ─▶ filter ─▶ node
    /// ```
    ///
    /// With the name of a drive it goes between the drive and its root, and other parents stay where they are.
    /// Roots of jobs stay at their node. `definition` leaves its filtered child out.
    pub async fn insert_filter(&mut self, mut definition: Options, above: &str) -> Result<Arc<Node>> {
        let drive = (!self.topology.names.contains_key(above)).then_some(above);
        let below = self.topology.node_or_drive(above)?;
        let driver_name = definition.get("driver").and_then(|d| d.as_str()).unwrap_or_default().to_owned();
        let driver = self.graph.driver(&driver_name)?;
        let Some(spec) = driver.description().children.iter().find(|spec| spec.role == Role::Filtered) else {
            let message = format_args!("driver '{driver_name}' is no filter");
            return Err(Error::new(Kind::Invalid, message));
        };
        if driver.description().effects & driveline_op::effect::NOT_LIVE != 0
            && !self.topology.parents(below).is_empty()
        {
            let message =
                format_args!("filter '{driver_name}' says that it cannot be inserted above a node in use");
            return Err(Error::new(Kind::NotSupported, message));
        }
        definition.insert(spec.name.to_string(), self.topology.name(below).to_string().into());
        let definition = self.graph.parse_in(&self.topology, definition)?;
        let parents = self.topology.parents(below);
        let name = definition.name.clone();
        let filter = self.open(definition, false, Some(self.topology.at(below).read_only)).await;
        let filter = filter.map_err(|error| name.map_or(error.clone(), |name| error.at(&name)))?;
        for parent in parents {
            match parent {
                Parent::Drive(name) if drive.is_none_or(|drive| *drive == *name) => {
                    self.topology.drives.insert(name, filter);
                }
                Parent::Node(id, child) if drive.is_none() => {
                    let placed = self.topology.nodes.get_mut(&id).expect("a parent is a node");
                    placed
                        .children
                        .iter_mut()
                        .filter(|edge| edge.name == child)
                        .for_each(|edge| edge.node = filter);
                }
                _ => {}
            }
        }
        Ok(self.topology.at(filter).node.clone())
    }

    /// Takes a filter out: its parents get its child, and it is closed. One that holds bitmaps is refused, unless
    /// the same change moves them away first (then use [`Change::remove_emptied_filter`]).
    pub fn remove_filter(&mut self, name: &str) -> Result<()> {
        let id = self.topology.id(name)?;
        self.refuse_with_bitmaps(id)?;
        self.bypass(id, name)
    }

    /// As [`Change::remove_filter`], for a filter whose bitmaps an earlier action of this change moves away. If
    /// any is left when the change is made, the change is refused.
    pub fn remove_emptied_filter(&mut self, name: &str) -> Result<()> {
        let id = self.topology.id(name)?;
        let node = self.topology.at(id).node.clone();
        self.bypass(id, name)?;
        self.action([id], move |_| {
            Box::pin(async move {
                if node.bitmaps.lock().is_empty() {
                    return Ok(undo(|| {}));
                }
                Err(Error::new(Kind::Busy, "it still has bitmaps").at(&node.name))
            })
        });
        Ok(())
    }

    fn bypass(&mut self, id: NodeId, name: &str) -> Result<()> {
        let Some(below) = self.topology.filtered(id) else {
            return Err(Error::new(Kind::Invalid, "it is no filter").at(name));
        };
        let stay: Vec<_> = self
            .topology
            .roots
            .values()
            .filter(|root| root.to == Attachment::Node(id))
            .map(|root| root.root.user().to_owned())
            .collect();
        if !stay.is_empty() {
            return Err(Error::new(Kind::Busy, format_args!("it is in use by {}", stay.join(", "))).at(name));
        }
        for parent in self.topology.parents(id) {
            match parent {
                Parent::Node(parent, child) => {
                    let placed = self.topology.nodes.get_mut(&parent).expect("a parent is a node");
                    placed
                        .children
                        .iter_mut()
                        .filter(|edge| edge.name == child)
                        .for_each(|edge| edge.node = below);
                }
                Parent::Drive(drive) => drop(self.topology.drives.insert(drive, below)),
                Parent::Root(_) => {}
            }
        }
        self.topology.names.remove(name);
        self.topology.nodes.remove(&id);
        Ok(())
    }

    /// Makes a node read-only or writable (with the file that it keeps its data in, if that was made for it).
    pub fn set_read_only(&mut self, name: &str, read_only: bool) -> Result<()> {
        let id = self.topology.id(name)?;
        let mut order = vec![id];
        let below = |id| {
            let children = &self.topology.at(id).children;
            children.iter().filter(|c| c.role != Role::Backing).map(|c| c.node).collect::<Vec<_>>()
        };
        let mut at = 0;
        while at < order.len() {
            order.extend(below(order[at]));
            at += 1;
        }
        order.retain(|id| self.topology.at(*id).read_only != read_only);
        // Writable from the leaf up, read-only from the top down: a node never writes to a read-only child.
        if !read_only {
            order.reverse();
        }
        for id in order {
            self.topology.nodes.get_mut(&id).expect("it is there").read_only = read_only;
            self.action([id], move |staged| {
                Box::pin(async move {
                    let open = staged.topology.at(id).node.open.clone();
                    let children =
                        staged.wired.get(&id).map(|wired| wired.children.clone()).unwrap_or_default();
                    let name = staged.topology.name(id);
                    open.set_read_only(&children, read_only).await.map_err(|error| error.at(&name))?;
                    let back: Undo = Box::new(move || {
                        Box::pin(async move {
                            if let Err(error) = open.set_read_only(&children, !read_only).await {
                                tracing::error!("undo of a graph change: {error}");
                            }
                        })
                    });
                    Ok(back)
                })
            });
        }
        Ok(())
    }

    /// Writes another backing file into the header of an image, and makes that node its backing.
    pub fn set_backing(
        &mut self,
        node: &str,
        backing: Option<&str>,
        file_in_header: Option<(&str, &str)>,
    ) -> Result<()> {
        let id = self.topology.id(node)?;
        self.set_child(node, "backing", backing)?;
        let header = file_in_header.map(|(file, format)| (file.to_owned(), format.to_owned()));
        self.action([id], move |staged| {
            Box::pin(async move {
                let open = staged.topology.at(id).node.open.clone();
                let children = staged.wired.get(&id).map(|wired| wired.children.clone()).unwrap_or_default();
                let header = header.as_ref().map(|(file, format)| (file.as_str(), format.as_str()));
                let name = staged.topology.name(id);
                let before = open.backing_file();
                open.set_backing_file(&children, header).await.map_err(|error| error.at(&name))?;
                let back: Undo = Box::new(move || {
                    Box::pin(async move {
                        let before = before.as_ref().map(|(file, format)| (file.as_str(), format.as_str()));
                        if let Err(error) = open.set_backing_file(&children, before).await {
                            tracing::error!("undo of a graph change: {error}");
                        }
                    })
                });
                Ok(back)
            })
        });
        Ok(())
    }

    /// Gives up all that an image has allocated (after a commit, say).
    pub fn make_empty(&mut self, node: &str) -> Result<()> {
        let id = self.topology.id(node)?;
        self.action([id], move |staged| {
            Box::pin(async move {
                let placed = staged.topology.at(id);
                let children = staged.wired.get(&id).map(|wired| wired.children.clone()).unwrap_or_default();
                placed.node.open.make_empty(&children).await.map_err(|error| error.at(&placed.node.name))?;
                Ok(undo(|| {}))
            })
        });
        Ok(())
    }

    /// Changes the size of a node. All nodes above take the new size with it, and all bitmaps on the way: what a
    /// drive has grown by counts as dirty for its bitmaps.
    pub fn resize(&mut self, name: &str, size_bytes: u64) -> Result<()> {
        self.resize_overruling(name, size_bytes, &[])
    }

    /// As [`Change::resize`], but the claims of some parents on the node do not count: a commit grows the image
    /// below those that it is about to take away.
    pub fn resize_overruling(&mut self, name: &str, size_bytes: u64, overruled: &[String]) -> Result<()> {
        let id = self.topology.node_or_drive(name)?;
        let id = self.topology.skip_filters(id);
        let name = self.topology.name(id);
        if self.topology.at(id).read_only {
            return Err(Error::new(Kind::NotPermitted, "it is read-only").at(&name));
        }
        for parent in self.topology.parents(id) {
            let shares = match &parent {
                Parent::Root(root) => self.topology.roots[root].shares,
                Parent::Node(parent, child) => {
                    let role =
                        self.topology.at(*parent).children.iter().find(|c| c.name == *child).map(|c| c.role);
                    let named = overruled.iter().any(|name| **name == *self.topology.name(*parent));
                    if named || role == Some(Role::Filtered) || role == Some(Role::Data) {
                        continue;
                    }
                    Permissions::NONE
                }
                Parent::Drive(_) => continue,
            };
            if !shares.contains(Permissions::RESIZE) {
                let user = self.topology.describe(&parent);
                return Err(Error::new(Kind::Busy, format_args!("{user} does not share 'resize'")).at(&name));
            }
        }
        self.check_resize_of_roots(id)?;
        self.action([id], move |staged| {
            Box::pin(async move {
                let placed = staged.topology.at(id);
                let (open, wired) = (placed.node.open.clone(), &staged.wired[&id]);
                let (children, before) = (wired.children.clone(), wired.info.size_bytes);
                open.resize(&children, size_bytes).await.map_err(|error| error.at(&name))?;
                let back: Undo = Box::new(move || {
                    Box::pin(async move {
                        if let Err(error) = open.resize(&children, before).await {
                            tracing::error!("undo of a resize: {error}");
                        }
                    })
                });
                Ok(back)
            })
        });
        Ok(())
    }

    /// Roots above through filters and drives must share the resize too.
    fn check_resize_of_roots(&self, id: NodeId) -> Result<()> {
        for attached in self.topology.roots.values() {
            let top = self.topology.root_node(attached);
            let above = self.topology.skip_filters(top) == id || self.topology.reach(id).contains(&top);
            if above && !attached.shares.contains(Permissions::RESIZE) {
                let message = format_args!("{} does not share 'resize'", attached.root.user());
                return Err(Error::new(Kind::Busy, message).at(&self.topology.name(id)));
            }
        }
        Ok(())
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
        let root = attach(&mut self.topology, &self.graph, name, options)?;
        Ok(Root::new(root, self.graph.clone()))
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

    /// Makes the change, or nothing of it.
    pub async fn commit(mut self) -> Result<()> {
        let mut gone: Vec<NodeId> = self.topology.collect_unused();
        let kept = |id: &&NodeId| !self.topology.nodes.contains_key(id) && !gone.contains(id);
        let removed: Vec<NodeId> = self.before.topology.top_down().iter().filter(kept).copied().collect();
        gone = removed.into_iter().chain(gone).collect();
        let planned = self.graph.plan(&self.topology);
        let (granted, _) = match planned {
            Ok(planned) => planned,
            Err(error) => return Err(self.abandon(error).await),
        };
        let drained = Drained::begin(&self.affected()).await;
        let mut staged = Staged {
            topology: std::mem::take(&mut self.topology),
            before: self.before.topology.clone(),
            wired: (*self.before.wired).clone(),
            parked: self.before.parked.clone(),
        };
        staged.wire_new(&self.graph);
        let mut undos = Vec::new();
        let result = self.apply(&mut staged, &granted, &mut undos).await;
        if let Err(error) = result {
            for undo in undos.into_iter().rev() {
                undo().await;
            }
            drop(drained);
            self.topology = staged.topology;
            return Err(self.abandon(error).await);
        }
        self.publish(staged, granted);
        drop(drained);
        let result = self.close_nodes(&gone).await;
        self.graph.emit(&Event::Changed);
        result
    }

    /// Runs the actions, and takes the permissions last.
    async fn apply(
        &mut self,
        staged: &mut Staged,
        granted: &BTreeMap<NodeId, Granted>,
        undos: &mut Vec<Undo>,
    ) -> Result<()> {
        for action in std::mem::take(&mut self.actions) {
            undos.push(action(staged).await?);
        }
        for (id, now) in granted {
            let before = self.before.granted.get(id).copied();
            if before == Some(*now) {
                continue;
            }
            let node = staged.topology.at(*id).node.clone();
            node.open.set_permissions(now.needs, now.shares).map_err(|error| error.at(&node.name))?;
            undos.push(undo(move || {
                if let Some(before) = before
                    && let Err(error) = node.open.set_permissions(before.needs, before.shares)
                {
                    tracing::error!(node = node.name(), "undo of a graph change: {error}");
                }
            }));
        }
        Ok(())
    }

    /// Wires the new topology and puts it in place of the old one.
    fn publish(&mut self, staged: Staged, granted: BTreeMap<NodeId, Granted>) {
        let Staged { mut topology, parked, .. } = staged;
        topology.roots.retain(|_, attached| !attached.root.gone.load(std::sync::atomic::Ordering::Relaxed));
        self.take_sizes(&topology);
        let wired = wire(&topology, self.graph.0.trace);
        for (id, wired) in &wired {
            *topology.at(*id).node.info.write() = wired.info;
        }
        for attached in topology.roots.values() {
            let at = topology.root_node(attached);
            let edge = if attached.locks { &wired[&at].edge_of_locker } else { &wired[&at].edge };
            attached.root.rewire(edge.clone(), topology.at(at).node.ranges.clone());
        }
        let here: BTreeSet<BitmapId> = topology
            .nodes
            .values()
            .flat_map(|p| p.node.bitmaps.lock().iter().map(|b| b.id()).collect::<Vec<_>>())
            .collect();
        let parked = parked.into_iter().filter(|(id, _)| here.contains(id)).collect();
        let mut state = self.graph.0.state.lock();
        // A root that went away meanwhile was taken out of the old topology only.
        topology.roots.retain(|_, attached| !attached.root.gone.load(std::sync::atomic::Ordering::Relaxed));
        *state = State { topology: Arc::new(topology), wired: Arc::new(wired), granted, parked };
    }

    /// Bitmaps take the size of their node. Whether what it has grown by is dirty is the bitmap's own rule.
    fn take_sizes(&self, topology: &Topology) {
        for (id, wired) in wire(topology, false) {
            for bitmap in topology.at(id).node.bitmaps.lock().iter() {
                if bitmap.length() != wired.info.size_bytes {
                    bitmap.resize(wired.info.size_bytes);
                }
            }
        }
    }

    /// The roots above anything that differs or is touched, before or after.
    fn affected(&self) -> Vec<Arc<RootShared>> {
        let (before, after) = (&*self.before.topology, &self.topology);
        let differs = |id: &NodeId| match (before.nodes.get(id), after.nodes.get(id)) {
            (Some(a), Some(b)) => {
                a.children != b.children || a.read_only != b.read_only || self.touched.contains(id)
            }
            _ => true,
        };
        let reaches = |topology: &Topology, root: &Attached| {
            topology.reach(topology.root_node(root)).iter().any(differs)
        };
        let mut roots = Vec::new();
        for (id, attached) in &before.roots {
            let moved = match after.roots.get(id) {
                Some(now) => before.root_node(attached) != after.root_node(now) || reaches(after, now),
                None => true,
            };
            let locked = after.roots.iter().any(|(id, root)| root.locks && !before.roots.contains_key(id));
            if moved || locked || reaches(before, attached) {
                roots.push(attached.root.clone());
            }
        }
        roots
    }

    /// Closes what was opened for a change that is not made. Returns the error that is the reason.
    async fn abandon(&mut self, reason: Error) -> Error {
        let opened = std::mem::take(&mut self.opened);
        let wired = wire(&self.topology, false);
        for id in opened.into_iter().rev() {
            if let Some(placed) = self.topology.nodes.get(&id) {
                let children = wired.get(&id).map(|wired| wired.children.clone()).unwrap_or_default();
                if let Err(error) = placed.node.open.close(&children).await {
                    tracing::warn!(node = placed.node.name(), "closing after a failed change: {error}");
                }
            }
        }
        reason
    }

    /// Closes nodes, parents first. Goes on after an error, and returns the first.
    async fn close_nodes(&mut self, gone: &[NodeId]) -> Result<()> {
        let mut first = Ok(());
        for id in gone {
            let Some(placed) = self.before.topology.nodes.get(id) else { continue };
            let children = self.before.wired.get(id).map(|wired| wired.children.clone()).unwrap_or_default();
            if let Err(error) = placed.node.open.close(&children).await {
                let error = error.at(placed.node.name());
                tracing::error!("{error}");
                first = first.and(Err(error));
            }
        }
        first
    }
}

impl Drop for Change {
    fn drop(&mut self) {
        // A change that is dropped half-way has opened nodes that nobody will close in order. They are dropped;
        // a driver releases what it holds then.
        self.opened.clear();
    }
}

impl Staged {
    /// A bitmap, looked for in the new topology, and then on nodes that this change takes out: what they hold can
    /// still be moved away.
    pub(crate) fn find_bitmap(&self, target: &str, name: &str) -> Result<(NodeId, Arc<Bitmap>)> {
        find_bitmap(&self.topology, &self.parked, target, name).or_else(|error| {
            let before = find_bitmap(&self.before, &self.parked, target, name).map_err(|_| error.clone());
            before.and_then(|(id, found)| {
                if self.any_node(id)?.bitmaps.lock().get_id(found.id()).is_some() {
                    Ok((id, found))
                } else {
                    Err(error)
                }
            })
        })
    }

    /// A node of the new topology, or one that this change takes out.
    pub(crate) fn any_node(&self, id: NodeId) -> Result<Arc<Node>> {
        let placed = self.topology.nodes.get(&id).or_else(|| self.before.nodes.get(&id));
        let missing = || Error::new(Kind::NotFound, "the bitmap's node is not there any more");
        placed.map(|placed| placed.node.clone()).ok_or_else(missing)
    }

    /// Nodes that are new have no wiring in the old graph; actions may need theirs.
    fn wire_new(&mut self, graph: &Graph) {
        for (id, wired) in wire(&self.topology, graph.0.trace) {
            self.wired.entry(id).or_insert(wired);
        }
    }
}

/// Roots that are drained; their gates open when it is dropped.
struct Drained(Vec<Arc<RootShared>>);

impl Drained {
    /// Closes all gates first, so that nobody waits longer than for what is in flight now.
    async fn begin(roots: &[Arc<RootShared>]) -> Self {
        let drained = Self(roots.to_vec());
        drained.0.iter().for_each(|root| root.gate.close());
        for root in &drained.0 {
            root.gate.empty().await;
        }
        drained
    }
}

impl Drop for Drained {
    fn drop(&mut self) {
        self.0.iter().for_each(|root| root.gate.open());
    }
}

/// An error of a child that has no name of its own is one of its parent's option: `file.path`.
fn within_child(error: Error, child: &str) -> Error {
    if error.node().is_some() {
        return error;
    }
    let key = match error.option() {
        Some(key) => format!("{child}.{key}"),
        None => child.to_owned(),
    };
    error.key(&key)
}

//! How a change is made: drained, step by step with a way back, and then seen by everyone at once.

use super::{Change, Staged, Undo, give_up::close_all};
use crate::{
    driver::DriverKind,
    error::{Error, Kind, Result},
    event::Event,
    graph::{Graph, State, find_bitmap},
    keeper::Batch,
    layout::Layout,
    node::{Node, NodeId},
    owed::{Owed, flush_all},
    permission::Granted,
    root::RootShared,
    topology::{Attached, Topology},
    wiring::{Wired, wire, wire_one},
};
use driveline_bitmap::{Bitmap, BitmapId};
use driveline_op::Edge;
use futures::future::join_all;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// A change that was made.
#[derive(Debug)]
#[must_use = "a node that was closed may have failed to write what it held back"]
pub struct Made {
    /// The first error of a node that was closed afterwards. It has been logged.
    pub closed: Result<()>,
}

impl Change {
    /// Makes the change, or nothing of it; but an error of a node that is closed after it was made is an error, too.
    pub async fn commit(self) -> Result<()> {
        self.make().await?.closed
    }

    /// Makes the change, or nothing of it.
    pub async fn make(mut self) -> Result<Made> {
        let made = self.make_once().await?;
        self.keep_snapshots().await;
        Ok(made)
    }

    /// What snapshots keep becomes read-only once it is durable. If it cannot be, nobody writes to it all the same, and
    /// whoever flushes is told.
    async fn keep_snapshots(&mut self) {
        let Some(turn) = self.turn.take_if(|_| !self.keeping.is_empty()) else { return };
        let (graph, mut keeping) = (self.graph.clone(), self.keeping.clone());
        let pay = |owed: Arc<Owed>| async move { (owed.pay().await, owed) };
        for (paid, owed) in join_all(self.owed.drain(..).map(pay)).await {
            match paid {
                // What others owe, on a disk that fails perhaps, is no matter of these.
                Ok(()) => {
                    let topology = graph.topology();
                    topology.roots.values().for_each(|attached| attached.root.debts.paid(&owed));
                }
                Err(error) => {
                    keeping.retain(|node| *node != owed.node());
                    stays_writable(&error);
                }
            }
        }
        let mut turn = Some(turn);
        let mut retired = Self::retire_all(&graph, &keeping, &mut turn).await;
        if retired.is_err() && keeping.len() > 1 {
            // One of them is in the way: each for itself.
            retired = Ok(());
            for node in keeping {
                let alone = Self::retire_all(&graph, &[node], &mut turn).await;
                alone.unwrap_or_else(|error| stays_writable(&error));
            }
        }
        retired.unwrap_or_else(|error| stays_writable(&error));
    }

    /// Makes nodes read-only in a change of their own, or none of them.
    async fn retire_all(
        graph: &Graph,
        nodes: &[NodeId],
        turn: &mut Option<async_lock::MutexGuardArc<()>>,
    ) -> Result<()> {
        let Some(taken) = turn.take().filter(|_| !nodes.is_empty()) else { return Ok(()) };
        let mut next = Change::new(graph.clone(), taken);
        let retired = match next.retire(nodes) {
            Ok(()) => next.make_once().await.map(drop),
            Err(error) => Err(error),
        };
        *turn = next.turn.take();
        retired
    }

    /// Makes nodes read-only, as far as they are there still.
    fn retire(&mut self, nodes: &[NodeId]) -> Result<()> {
        for id in nodes {
            if let Some(name) = self.topology.nodes.get(id).map(|placed| placed.node.name.clone()) {
                self.set_read_only(&name, true)?;
            }
        }
        Ok(())
    }

    async fn make_once(&mut self) -> Result<Made> {
        let mut gone: Vec<NodeId> = self.topology.collect_unused();
        let kept = |id: &&NodeId| !self.topology.nodes.contains_key(id) && !gone.contains(id);
        let removed: Vec<NodeId> = self.before.topology.top_down().iter().filter(kept).copied().collect();
        gone = removed.into_iter().chain(gone).collect();
        let planned = self.graph.plan(&self.topology);
        // Written back once while requests come and go, so that little is left of it for the time when they wait.
        let written_back = match planned {
            Ok(planned) => {
                let nodes: Vec<NodeId> = self.settling.iter().chain(&self.keeping).copied().collect();
                self.write_back(&nodes).await.map(|()| planned)
            }
            Err(error) => Err(error),
        };
        let (granted, wired_new) = match written_back {
            Ok(planned) => planned,
            Err(error) => {
                self.close_opened().await;
                return Err(error);
            }
        };
        let drained = Drained::begin(self.affected(), &self.before.topology).await;
        self.own_work_ends().await;
        let mut staged = Staged {
            topology: std::mem::take(&mut self.topology),
            before: self.before.topology.clone(),
            wired: (*self.before.wired).clone(),
            parked: self.before.parked.clone(),
        };
        // Nodes that are new have no wiring in the old graph; actions may need theirs.
        for (id, wired) in wired_new {
            staged.wired.entry(id).or_insert(wired);
        }
        let mut undos = Vec::new();
        self.settle_filters(&gone, &staged.topology, &mut undos).await;
        let batch = Batch::begin(&self.graph);
        let result = self.apply(&mut staged, &granted, &mut undos).await;
        if let Err(error) = result.and_then(|()| batch.settle()) {
            for undo in undos.into_iter().rev() {
                undo().await;
            }
            drop(batch);
            drop(drained);
            self.topology = staged.topology;
            self.close_opened().await;
            return Err(error);
        }
        self.tell_moves(&staged, &granted);
        let in_vain = self.opened_in_vain(&staged.topology);
        self.publish(staged, granted, &drained);
        drop(batch);
        drop(drained);
        let closed = self.close_nodes(&gone).await.and(close_all(in_vain).await);
        let replaced = std::mem::take(&mut *self.replaced.lock());
        let closed = closed.and(close_all(replaced).await);
        self.graph.emit(&Event::Changed);
        Ok(Made { closed })
    }

    /// Tells who keeps things beyond the life of the process of drives that will show other nodes.
    fn tell_moves(&self, staged: &Staged, granted: &BTreeMap<NodeId, Granted>) {
        let (before, after) = (&self.before.topology, &staged.topology);
        let moves = |(name, root): (&Arc<str>, &NodeId)| {
            let was = before.drives.get(name).map(|root| before.skip_filters(*root));
            was.is_some_and(|was| was != after.skip_filters(*root))
        };
        if let Some(keeper) = self.graph.keeper().filter(|_| after.drives.iter().any(moves)) {
            let topology = Arc::new(after.clone());
            let (wired, parked) = (Arc::new(staged.wired.clone()), staged.parked.clone());
            let after = State { topology, wired, granted: Arc::new(granted.clone()), parked };
            keeper.drives_move(&self.before.clone().into(), &Layout::from(after));
        }
    }

    /// Filters that go, and whose children stay, leave those as they shall be found while nobody writes to them: when they are
    /// closed, what were their parents may do so. (An error is told by their close.)
    async fn settle_filters(&mut self, gone: &[NodeId], after: &Topology, undos: &mut Vec<Undo>) {
        for id in gone {
            let Some(placed) = self.before.topology.nodes.get(id) else { continue };
            let is_filter = placed.node.driver.description().kind == DriverKind::Filter;
            let stays = placed.children.iter().any(|child| after.nodes.contains_key(&child.node));
            if !is_filter || !stays || placed.takes_no_writes() {
                continue;
            }
            let node = placed.node.clone();
            let children = self.before.wired.get(id).map(|wired| wired.children.clone()).unwrap_or_default();
            if let Err(error) = node.open.set_read_only(&children, true).await {
                tracing::warn!(node = node.name(), "before a filter is taken out: {error}");
                continue;
            }
            let back: Undo = Box::new(move || {
                Box::pin(async move {
                    if let Err(error) = node.open.set_read_only(&children, false).await {
                        tracing::error!(node = node.name(), "undo of a graph change: {error}");
                    }
                })
            });
            undos.push(back);
        }
    }

    /// Makes durable what was written to nodes that become read-only.
    fn write_back(&self, nodes: &[NodeId]) -> impl Future<Output = Result<()>> + Send + use<> {
        flush_all(nodes.iter().filter_map(|id| self.flushable(*id)).collect())
    }

    /// A node to which something may have been written, and the edge that it had before.
    fn flushable(&self, id: NodeId) -> Option<(Arc<Node>, Edge)> {
        let placed = self.before.topology.nodes.get(&id).filter(|placed| !placed.read_only)?;
        Some((placed.node.clone(), self.before.wired.get(&id)?.edge.clone()))
    }

    /// Runs the actions, and takes the permissions last.
    async fn apply(
        &mut self,
        staged: &mut Staged,
        granted: &BTreeMap<NodeId, Granted>,
        undos: &mut Vec<Undo>,
    ) -> Result<()> {
        self.write_back(&self.settling).await?;
        for action in std::mem::take(&mut self.actions) {
            undos.push(action(staged).await?);
        }
        for (id, now) in granted {
            let before = self.before.granted.get(id).copied();
            let placed = staged.topology.at(*id);
            let node = placed.node.clone();
            // Another instance of the node has not been told yet; one that has become writable has a lock for that, which is
            // only given back if nobody writes.
            let told = staged.before.nodes.get(id).is_some_and(|was| {
                Arc::ptr_eq(&was.node.open, &node.open) && was.takes_no_writes() == placed.takes_no_writes()
            });
            if before == Some(*now) && told {
                continue;
            }
            node.open.set_permissions(now.needs, now.shares).await.map_err(|error| error.at(&node.name))?;
            undos.push(Box::new(move || {
                Box::pin(async move {
                    if let Some(before) = before
                        && let Err(error) = node.open.set_permissions(before.needs, before.shares).await
                    {
                        tracing::error!(node = node.name(), "undo of a graph change: {error}");
                    }
                })
            }));
        }
        Ok(())
    }

    /// Wires the new topology and puts it in place of the old one.
    fn publish(&mut self, staged: Staged, granted: BTreeMap<NodeId, Granted>, drained: &Drained) {
        let Staged { mut topology, parked, .. } = staged;
        topology.roots.retain(|_, attached| !attached.root.gone.load(std::sync::atomic::Ordering::Relaxed));
        let wired = wire(&topology, self.graph.0.trace);
        self.take_sizes(&topology, &wired, drained);
        for (id, wired) in &wired {
            let node = &topology.at(*id).node;
            *node.info.write() = wired.info;
            node.open.wired(&wired.children);
        }
        for attached in topology.roots.values() {
            let at = topology.root_node(attached);
            let edge = match attached {
                Attached { past: true, .. } => &wired[&at].edge_of_past,
                Attached { locks: true, .. } => &wired[&at].edge_of_locker,
                _ => &wired[&at].edge,
            };
            attached.root.rewire(edge.clone(), topology.at(at).node.ranges.clone());
        }
        let here: BTreeSet<BitmapId> = topology
            .nodes
            .values()
            .flat_map(|p| p.node.bitmaps.lock().iter().map(|b| b.id()).collect::<Vec<_>>())
            .collect();
        let parked = parked.into_iter().filter(|(id, _)| here.contains(id)).collect();
        self.owe(&topology, drained);
        let mut state = self.graph.0.state.lock();
        // A root that went away meanwhile was taken out of the old topology only.
        topology.roots.retain(|_, attached| !attached.root.gone.load(std::sync::atomic::Ordering::Relaxed));
        *state = State {
            topology: Arc::new(topology),
            wired: Arc::new(wired),
            granted: Arc::new(granted),
            parked,
        };
    }

    /// Whoever wrote to what a snapshot keeps has that to flush, too.
    fn owe(&mut self, topology: &Topology, drained: &Drained) {
        let kept = self.keeping.iter().filter_map(|id| self.flushable(*id));
        let owed: Vec<_> = kept.map(|(node, edge)| Owed::new(node, edge)).collect();
        for root in &drained.roots {
            let Some(attached) = topology.roots.get(&root.id) else { continue };
            let reached = topology.reach(topology.root_node(attached));
            if root.debts.any() {
                root.debts.keep(&reached);
            }
            owed.iter().filter(|owed| owed.is_for(&reached)).for_each(|owed| root.debts.add(owed.clone()));
        }
        self.owed = owed;
    }

    /// Bitmaps take the size of their node. Whether what it has grown by is dirty is the bitmap's own rule.
    ///
    /// What grows by itself and is not drained may have writes in flight that make it longer. Its bitmaps have grown and recorded them
    /// before (see `Marks`), so they are ahead of it, and must not be cut.
    fn take_sizes(&self, topology: &Topology, wired: &BTreeMap<NodeId, Wired>, drained: &Drained) {
        let works = |(id, attached): &(&u64, &Attached)| {
            self.before.topology.roots.contains_key(id)
                && !drained.roots.iter().any(|root| Arc::ptr_eq(root, &attached.root))
        };
        let busy: BTreeSet<NodeId> = topology
            .roots
            .iter()
            .filter(works)
            .flat_map(|(_, attached)| topology.reach(topology.root_node(attached)))
            .collect();
        for (id, wired) in wired {
            if topology.grows(*id) && busy.contains(id) {
                continue;
            }
            for bitmap in topology.at(*id).node.bitmaps.lock().iter() {
                // A filter that panics about its size shows an empty node: that is nothing to cut what was recorded to.
                let failed = || {
                    let reach = topology.reach(*id);
                    reach.iter().any(|below| topology.at(*below).node.failed.lock().is_some())
                };
                let size_bytes = wired.info.size_bytes;
                if bitmap.length() != size_bytes && !(size_bytes == 0 && failed()) {
                    bitmap.resize(wired.info.size_bytes);
                }
            }
        }
    }

    /// Waits for what nodes above anything that differs, or in it, do by themselves. Nothing of it begins any more: it begins
    /// with requests.
    fn own_work_ends(&self) -> impl Future<Output = ()> + Send + use<> {
        let before = &self.before.topology;
        let differs = self.differing();
        let of_node = |id: &NodeId| {
            let work = before.at(*id).node.open.own_work()?;
            before.reach(*id).iter().any(&differs).then_some(work)
        };
        let all = join_all(before.nodes.keys().filter_map(of_node).collect::<Vec<_>>());
        async move { drop(all.await) }
    }

    /// Is a node not what it was, or touched?
    fn differing(&self) -> impl Fn(&NodeId) -> bool {
        let (before, after) = (&*self.before.topology, &self.topology);
        // Changes of a node hold their ranges once somebody may lock some, so none may be half-way through it then.
        let lockers = after.roots.iter().filter(|(id, root)| root.locks && !before.roots.contains_key(id));
        let locked: BTreeSet<NodeId> = lockers.map(|(_, root)| after.root_node(root)).collect();
        move |id| match (before.nodes.get(id), after.nodes.get(id)) {
            (Some(a), Some(b)) => {
                a.children != b.children
                    || a.read_only != b.read_only
                    || a.common != b.common
                    || !Arc::ptr_eq(&a.node, &b.node)
                    || self.touched.contains(id)
                    || locked.contains(id)
            }
            _ => true,
        }
    }

    /// The roots above anything that differs or is touched, before or after.
    fn affected(&self) -> Vec<Arc<RootShared>> {
        let (before, after) = (&*self.before.topology, &self.topology);
        let differs = self.differing();
        let reaches = |topology: &Topology, root: &Attached| {
            topology.reach(topology.root_node(root)).iter().any(&differs)
        };
        let mut roots = Vec::new();
        for (id, attached) in &before.roots {
            let moved = match after.roots.get(id) {
                Some(now) => before.root_node(attached) != after.root_node(now) || reaches(after, now),
                None => true,
            };
            if moved || reaches(before, attached) {
                roots.push(attached.root.clone());
            }
        }
        roots
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

    /// A node of the new topology.
    pub(crate) fn node(&self, id: NodeId) -> Result<Arc<Node>> {
        let missing = || Error::new(Kind::Busy, "the node is taken out by the same change");
        self.topology.nodes.get(&id).map(|placed| placed.node.clone()).ok_or_else(missing)
    }

    /// How a node is wired by now.
    pub(crate) fn wire(&self, id: NodeId) -> Result<Wired> {
        self.node(id)?;
        Ok(wire_one(&self.topology, id, false))
    }
}

/// What a snapshot keeps could not be made read-only.
fn stays_writable(error: &Error) {
    tracing::error!("after a snapshot, an image stays open for writing: {error}");
}

/// Roots that are drained, and the nodes below, which know it; their gates open when it is dropped.
struct Drained {
    roots: Vec<Arc<RootShared>>,
    nodes: Vec<Arc<Node>>,
}

impl Drained {
    /// Closes all gates first, so that nobody waits longer than for what is in flight now.
    async fn begin(roots: Vec<Arc<RootShared>>, topology: &Topology) -> Self {
        let attached = |root: &Arc<RootShared>| Some(topology.root_node(topology.roots.get(&root.id)?));
        let below: BTreeSet<NodeId> =
            roots.iter().filter_map(attached).flat_map(|node| topology.reach(node)).collect();
        let nodes = below.into_iter().map(|id| topology.at(id).node.clone()).collect();
        let drained = Self { roots, nodes };
        drained.roots.iter().for_each(|root| root.gate.close());
        drained.nodes.iter().for_each(|node| node.open.set_drained(true));
        for root in &drained.roots {
            root.gate.empty().await;
        }
        drained
    }
}

impl Drop for Drained {
    fn drop(&mut self) {
        self.nodes.iter().for_each(|node| node.open.set_drained(false));
        self.roots.iter().for_each(|root| root.gate.open());
    }
}

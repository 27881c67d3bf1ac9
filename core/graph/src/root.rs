//! Roots: the users of a graph from outside. An export has one, a job has some.

use crate::{
    driver::Permissions,
    error::{Error, Result},
    gate::Gate,
    graph::Graph,
    io,
    owed::Debts,
    ranges::{Hold, Ranges},
    stats::Stats,
};
use arc_swap::ArcSwap;
use driveline_op::{Answer, Ask, BlockStatus, Buffer, Edge, Info, op};
use parking_lot::Mutex;
use std::{
    borrow::Borrow,
    fmt,
    ops::Range,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

/// What a root is opened with.
#[derive(Clone, Debug)]
pub struct RootOptions {
    /// Who it is, for people: `export 'vda'`.
    pub user: String,
    /// What it needs.
    pub needs: Permissions,
    /// What it lets others do at the same time.
    pub shares: Permissions,
    /// It will lock ranges (see [`Unit::lock`]).
    pub locks: bool,
    /// Names of nodes whose claims on the root's node it may overrule, and which may overrule its own: a commit writes into
    /// a backing file, below the very nodes that it takes away; a mirror writes into its target beside its own filter.
    pub overrules: Vec<String>,
}

impl RootOptions {
    /// A root that reads.
    pub fn reader(user: impl Into<String>) -> Self {
        let (needs, shares) = (Permissions::CONSISTENT_READ, Permissions::ALL);
        Self { user: user.into(), needs, shares, locks: false, overrules: Vec::new() }
    }

    /// A root that reads and writes.
    pub fn writer(user: impl Into<String>) -> Self {
        let needs = Permissions::CONSISTENT_READ.or(Permissions::WRITE);
        Self { needs, ..Self::reader(user) }
    }
}

pub(crate) struct RootShared {
    pub(crate) id: u64,
    user: String,
    needs: Permissions,
    pub(crate) gate: Gate,
    edge: ArcSwap<Edge>,
    /// Of the node that it is attached to now.
    ranges: Mutex<Arc<Ranges>>,
    /// The last handle is gone.
    pub(crate) gone: AtomicBool,
    /// Every write is to be on stable storage when it is reported.
    write_through: AtomicBool,
    /// What is to be made durable before a flush is answered.
    pub(crate) debts: Debts,
    /// Where its requests are counted, if they are.
    stats: OnceLock<Arc<Stats>>,
}

impl RootShared {
    pub(crate) fn new(id: u64, options: &RootOptions, edge: Edge, ranges: Arc<Ranges>) -> Arc<Self> {
        Arc::new(Self {
            id,
            user: options.user.clone(),
            needs: options.needs,
            gate: Gate::default(),
            edge: ArcSwap::from_pointee(edge),
            ranges: Mutex::new(ranges),
            gone: AtomicBool::new(false),
            write_through: AtomicBool::new(false),
            debts: Debts::default(),
            stats: OnceLock::new(),
        })
    }

    #[inline]
    pub(crate) fn writes_through(&self) -> bool {
        self.write_through.load(Relaxed)
    }

    #[inline]
    pub(crate) fn stats(&self) -> Option<&Stats> {
        self.stats.get().map(|stats| &**stats)
    }

    /// Counts here from now on. It counts in one place for its life.
    pub(crate) fn count_in(&self, stats: Arc<Stats>) {
        let _ = self.stats.set(stats);
    }

    pub(crate) fn user(&self) -> &str {
        &self.user
    }

    #[inline]
    pub(crate) fn size_bytes(&self) -> u64 {
        self.edge.load().info().size_bytes
    }

    #[inline]
    pub(crate) fn may_write(&self, unchanged: bool) -> bool {
        let unchanged = if unchanged { Permissions::WRITE_UNCHANGED } else { Permissions::NONE };
        self.needs.intersects(Permissions::WRITE.or(unchanged))
    }

    pub(crate) fn rewire(&self, edge: Edge, ranges: Arc<Ranges>) {
        self.edge.store(Arc::new(edge));
        *self.ranges.lock() = ranges;
    }
}

/// A request, or a unit of a job, that is in flight: it holds the wiring, and a drain waits for it.
pub(crate) struct InFlight {
    root: Arc<RootShared>,
    edge: Arc<Edge>,
}

impl InFlight {
    pub(crate) async fn enter(root: &Arc<RootShared>) -> Self {
        if !root.gate.try_enter() {
            root.gate.enter().await;
        }
        Self { root: root.clone(), edge: root.edge.load_full() }
    }

    fn try_enter(root: &Arc<RootShared>) -> Option<Self> {
        root.gate.try_enter().then(|| Self { root: root.clone(), edge: root.edge.load_full() })
    }

    pub(crate) fn root(&self) -> &Arc<RootShared> {
        &self.root
    }

    pub(crate) fn edge_info(&self) -> &Info {
        self.edge.info()
    }

    /// One more on the same wiring. The gate is not asked: who is inside may go on while it is closed.
    pub(crate) fn again(&self) -> Self {
        // Counted without a look at `closed`; the drain that closed the gate waits for this one too.
        self.root.gate.enter_again();
        Self { root: self.root.clone(), edge: self.edge.clone() }
    }
}

impl Borrow<Edge> for InFlight {
    #[inline]
    fn borrow(&self) -> &Edge {
        &self.edge
    }
}

impl Drop for InFlight {
    #[inline]
    fn drop(&mut self) {
        self.root.gate.leave();
    }
}

/// A user's handle on a drive or node. It counts requests, so that the graph can be drained, and follows the
/// drive when the nodes below change. Cheap to clone; the last one gone detaches.
#[derive(Clone)]
pub struct Root(Arc<Handle>);

struct Handle {
    shared: Arc<RootShared>,
    graph: Graph,
}

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Root").field("user", &self.0.shared.user).finish_non_exhaustive()
    }
}

impl Root {
    pub(crate) fn new(shared: Arc<RootShared>, graph: Graph) -> Self {
        Self(Arc::new(Handle { shared, graph }))
    }

    pub(crate) fn id(&self) -> u64 {
        self.0.shared.id
    }

    /// Who it is.
    pub fn user(&self) -> &str {
        &self.0.shared.user
    }

    /// The graph.
    pub fn graph(&self) -> &Graph {
        &self.0.graph
    }

    /// Size and limits of the drive or node.
    pub fn info(&self) -> Info {
        *self.0.shared.edge.load().info()
    }

    /// The name of the node that it leads to now.
    pub fn node_name(&self) -> Arc<str> {
        self.0.graph.root_node_name(self.id())
    }

    /// Tells where it leads to, without keeping it open.
    pub fn place(&self) -> RootPlace {
        RootPlace { graph: self.0.graph.clone(), id: self.id() }
    }

    /// From now on every write of this root is on stable storage when it is reported, as if each had `FUA`.
    pub fn write_through(&self) {
        self.0.shared.write_through.store(true, Relaxed);
    }

    /// Sends a request. `buffer` is what a write stores, or what a read fills (its whole length); other operations
    /// take an empty one. The request waits while the graph below is being changed.
    ///
    /// Shape: any alignment. Order: none among requests in flight; with `FUA` the data is on stable storage when
    /// this returns. Effect: a change marks the recording bitmaps of every node it passes, unless `UNCHANGED`.
    /// Errors: `EINVAL` and `ENOSPC` out of range, `EPERM` without permission, or the node's own.
    pub async fn submit(&self, ask: Ask, buffer: Buffer) -> Answer {
        io::submit(&self.0.shared, ask, buffer).await
    }

    /// Goes inside for several requests that belong together. A drain waits for the whole unit, so it must not
    /// wait for a graph change itself.
    pub async fn enter(&self) -> Unit {
        Unit { flight: InFlight::enter(&self.0.shared).await }
    }

    /// Goes inside two roots for requests that belong together. One is never held while the other is waited for: a
    /// drain of both would wait for ever.
    pub async fn enter_both(&self, other: &Root) -> (Unit, Unit) {
        loop {
            let unit = self.enter().await;
            if let Some(flight) = InFlight::try_enter(&other.0.shared) {
                return (unit, Unit { flight });
            }
            drop(unit);
            drop(other.enter().await);
        }
    }

    /// The same for any number of roots.
    pub(crate) async fn enter_all<'a>(roots: impl Iterator<Item = &'a Root> + Clone) -> Vec<Unit> {
        loop {
            let mut closed = None;
            let mut units = Vec::new();
            for root in roots.clone() {
                match InFlight::try_enter(&root.0.shared) {
                    Some(flight) => units.push(Unit { flight }),
                    None => {
                        closed = Some(root);
                        break;
                    }
                }
            }
            let Some(root) = closed else { return units };
            drop(units);
            drop(root.enter().await);
        }
    }

    /// Reads.
    pub async fn read(&self, range: Range<u64>) -> Result<Buffer> {
        let buffer = Buffer::new((range.end - range.start) as usize);
        let answer = self.submit(Ask { op: op::READ, offset: range.start, ..Ask::default() }, buffer).await;
        answer.result.map(|()| answer.buffer).map_err(Error::from)
    }

    /// Writes.
    pub async fn write(&self, offset: u64, data: &[u8], flags: u32) -> Result<()> {
        let ask = Ask { op: op::WRITE, offset, flags, ..Ask::default() };
        Ok(self.submit(ask, Buffer::from(data)).await.result?)
    }

    /// Makes a range read as zeroes.
    pub async fn write_zeroes(&self, range: Range<u64>, flags: u32) -> Result<()> {
        self.ranged(op::WRITE_ZEROES, range, flags).await
    }

    /// Gives a range up.
    pub async fn discard(&self, range: Range<u64>, flags: u32) -> Result<()> {
        self.ranged(op::DISCARD, range, flags).await
    }

    /// Makes completed writes durable.
    pub async fn flush(&self) -> Result<()> {
        self.ranged(op::FLUSH, 0..0, 0).await
    }

    /// Describes the first extent of a range.
    pub async fn block_status(&self, range: Range<u64>) -> Result<BlockStatus> {
        let (offset, length) = (range.start, range.end - range.start);
        let ask = Ask { op: op::BLOCK_STATUS, offset, length, ..Ask::default() };
        let answer = self.submit(ask, Buffer::default()).await;
        answer.result.map(|()| answer.status).map_err(Error::from)
    }

    async fn ranged(&self, op: u32, range: Range<u64>, flags: u32) -> Result<()> {
        let ask = Ask { op, flags, offset: range.start, length: range.end - range.start, ..Ask::default() };
        Ok(self.submit(ask, Buffer::default()).await.result?)
    }

    /// Detaches, after its requests have ended. (Without this, dropping the last handle detaches too, but what
    /// others may do then changes with the next change of the graph only.)
    pub async fn close(self) -> Result<()> {
        let mut change = self.0.graph.change().await;
        change.detach(self.id());
        change.commit().await
    }

    /// How many requests and units are in flight.
    pub fn in_flight(&self) -> usize {
        self.0.shared.gate.inside()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.gone.store(true, Relaxed);
        self.graph.forget_root(self.shared.id);
    }
}

/// Where a root leads to, for one who does not keep it open.
#[derive(Clone, Debug)]
pub struct RootPlace {
    graph: Graph,
    id: u64,
}

impl RootPlace {
    /// The name of the node that the root leads to now; `None` once the root is gone.
    pub fn node_name(&self) -> Option<Arc<str>> {
        let name = self.graph.root_node_name(self.id);
        (!name.is_empty()).then_some(name)
    }
}

/// Several requests that count as one: a drain waits for all of it.
pub struct Unit {
    flight: InFlight,
}

impl fmt::Debug for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unit").field("user", &self.flight.root.user).finish_non_exhaustive()
    }
}

/// A locked range (see [`Unit::lock`]), until it is dropped.
#[derive(Debug)]
pub struct RangeLock {
    _hold: Hold,
}

impl Unit {
    /// As [`Root::submit`].
    pub async fn submit(&self, ask: Ask, buffer: Buffer) -> Answer {
        io::submit_in(&self.flight, ask, buffer).await
    }

    /// Locks a range of the node: waits for changes of it that are in flight, and keeps later ones waiting. The
    /// root must have been opened with `locks`; its own requests are not kept waiting. Drop it before the unit.
    pub async fn lock(&self, range: Range<u64>) -> RangeLock {
        let ranges = self.flight.root.ranges.lock().clone();
        RangeLock { _hold: ranges.hold(range, true).await }
    }

    /// Size and limits.
    pub fn info(&self) -> Info {
        *self.flight.edge_info()
    }

    /// The wiring that it runs on.
    pub(crate) fn edge(&self) -> &Edge {
        self.flight.borrow()
    }
}

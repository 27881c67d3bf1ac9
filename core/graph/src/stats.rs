//! What the users of a drive did: how many requests, of how many bytes, in what time.
//!
//! A root counts if it was told to ([`Root::count`]); all that count on one drive, or on one node, count together. A request adds
//! to counters of its own thread, so that threads do not wait for each other's cache lines.

use crate::{
    Graph, Root,
    topology::{Attachment, Topology},
};
use driveline_op::{Answer, Ask, op};
use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// Threads share counters when there are more.
const SHARDS: usize = 16;

/// Kinds of requests that are counted apart. Zeroes are written; a question (`block_status`, `cache`) is not counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Counted {
    Read,
    Write,
    Flush,
    Discard,
}

impl Counted {
    fn of(op: u32) -> Option<Self> {
        match op {
            op::READ => Some(Counted::Read),
            op::WRITE | op::WRITE_ZEROES => Some(Counted::Write),
            op::FLUSH => Some(Counted::Flush),
            op::DISCARD => Some(Counted::Discard),
            _ => None,
        }
    }
}

/// What was counted of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Requests that succeeded.
    pub operations: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Their time together.
    pub time: Duration,
    /// Requests that failed.
    pub failed: u64,
    /// Requests that could not be: beyond the end, or not permitted.
    pub invalid: u64,
}

/// What was counted on a drive or node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Reads.
    pub reads: Count,
    /// Writes, of data and of zeroes.
    pub writes: Count,
    /// Flushes.
    pub flushes: Count,
    /// Discards.
    pub discards: Count,
    /// Where the write ended that went farthest.
    pub highest_write: u64,
    /// How long ago the last request ended; `None`: there was none.
    pub idle: Option<Duration>,
}

#[derive(Debug, Default)]
struct Cell {
    operations: AtomicU64,
    bytes: AtomicU64,
    time_ns: AtomicU64,
    failed: AtomicU64,
    invalid: AtomicU64,
}

/// Counters that one thread writes; alone in their cache lines.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Shard {
    kinds: [Cell; 4],
    highest_write: AtomicU64,
    /// Since the counters were made.
    last_ns: AtomicU64,
}

/// Counters of a drive or node.
#[derive(Debug)]
pub(crate) struct Stats {
    made: Instant,
    shards: [Shard; SHARDS],
}

/// All counters of a graph.
pub(crate) type AllStats = BTreeMap<Attachment, Arc<Stats>>;

impl Stats {
    fn new() -> Self {
        Self { made: Instant::now(), shards: Default::default() }
    }

    fn shard(&self) -> &Shard {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        thread_local! {
            static MINE: usize = NEXT.fetch_add(1, Relaxed) % SHARDS;
        }
        &self.shards[MINE.with(|mine| *mine)]
    }

    /// A request has ended.
    pub(crate) fn ended(&self, ask: &Ask, answer: &Answer, began: Instant) {
        let Some(kind) = Counted::of(ask.op) else { return };
        let now = Instant::now();
        let shard = self.shard();
        let cell = &shard.kinds[kind as usize];
        shard.last_ns.store(nanos(now - self.made), Relaxed);
        if answer.result.is_err() {
            cell.failed.fetch_add(1, Relaxed);
            return;
        }
        let bytes =
            if matches!(ask.op, op::READ | op::WRITE) { answer.buffer.len() as u64 } else { ask.length };
        cell.operations.fetch_add(1, Relaxed);
        cell.bytes.fetch_add(bytes, Relaxed);
        cell.time_ns.fetch_add(nanos(now - began), Relaxed);
        if kind == Counted::Write {
            shard.highest_write.fetch_max(ask.offset + bytes, Relaxed);
        }
    }

    /// A request could not be.
    pub(crate) fn refused(&self, ask: &Ask) {
        if let Some(kind) = Counted::of(ask.op) {
            self.shard().kinds[kind as usize].invalid.fetch_add(1, Relaxed);
        }
    }

    fn total(&self) -> Statistics {
        let count = |kind: Counted| {
            let mut count = Count::default();
            for cell in self.shards.iter().map(|shard| &shard.kinds[kind as usize]) {
                count.operations += cell.operations.load(Relaxed);
                count.bytes += cell.bytes.load(Relaxed);
                count.time += Duration::from_nanos(cell.time_ns.load(Relaxed));
                count.failed += cell.failed.load(Relaxed);
                count.invalid += cell.invalid.load(Relaxed);
            }
            count
        };
        let most =
            |of: fn(&Shard) -> &AtomicU64| self.shards.iter().map(|shard| of(shard).load(Relaxed)).max();
        let last = most(|shard| &shard.last_ns).filter(|last| *last > 0).map(Duration::from_nanos);
        Statistics {
            reads: count(Counted::Read),
            writes: count(Counted::Write),
            flushes: count(Counted::Flush),
            discards: count(Counted::Discard),
            highest_write: most(|shard| &shard.highest_write).unwrap_or(0),
            idle: last.map(|last| self.made.elapsed().saturating_sub(last)),
        }
    }
}

fn nanos(time: Duration) -> u64 {
    time.as_nanos().try_into().unwrap_or(u64::MAX)
}

impl Root {
    /// Counts the requests of this root from now on, for the drive or node that it was opened on. It costs two looks at the
    /// clock a request.
    pub fn count(&self) {
        let graph = self.graph();
        let topology = graph.topology();
        let Some(attached) = topology.roots.get(&self.id()) else { return };
        let mut all = graph.0.stats.lock();
        all.retain(|at, _| is_there(&topology, at));
        let stats = all.entry(attached.to.clone()).or_insert_with(|| Arc::new(Stats::new()));
        attached.root.count_in(stats.clone());
    }
}

fn is_there(topology: &Topology, at: &Attachment) -> bool {
    match at {
        Attachment::Drive(name) => topology.drives.contains_key(name),
        Attachment::Node(id) | Attachment::Place(id) => topology.nodes.contains_key(id),
    }
}

impl Graph {
    /// What was counted on the drive of that name.
    pub fn drive_statistics(&self, drive: &str) -> Statistics {
        self.statistics(&Attachment::Drive(drive.into()))
    }

    /// What was counted by users of the node itself, without those of drives.
    pub fn node_statistics(&self, node: &str) -> Statistics {
        let topology = self.topology();
        let Ok(id) = topology.id(node) else { return Statistics::default() };
        let here = [Attachment::Place(id), Attachment::Node(id)];
        // A user that came here from another node brings what it counted there.
        let users = topology.roots.values().filter(|attached| here.contains(&attached.to));
        let counted = users.filter_map(|attached| attached.root.stats()).next();
        let all = self.0.stats.lock();
        let counted = counted.or_else(|| here.iter().find_map(|at| all.get(at)).map(|stats| &**stats));
        counted.map(Stats::total).unwrap_or_default()
    }

    fn statistics(&self, at: &Attachment) -> Statistics {
        self.0.stats.lock().get(at).map(|stats| stats.total()).unwrap_or_default()
    }
}

//! What has been copied, what belongs to the point in time, and who copies what just now.

use super::safe::{MakeSafe, Safe};
use async_lock::Semaphore;
use driveline_bitmap::{Bits, Granularity};
use driveline_graph::{BoxFuture, Hold, Ranges};
use driveline_op::{Buffer, Error, Next};
use event_listener::Event;
use futures::future::{Either, select};
use parking_lot::Mutex;
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    fmt,
    ops::Range,
    pin::pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

/// The smallest cluster.
pub(super) const CLUSTER_BYTES: u64 = 64 << 10;

/// How much is copied at once: more does not stay in the processor's cache between its read and its write.
const PIECE_BYTES: u64 = 256 << 10;
/// How much memory copies in flight have, unless a single one needs more.
const ROOM_BYTES: u64 = 128 << 20;
/// How many buffers are kept for the next copies, and the longest of them.
const KEPT_MAX: usize = 64;
const KEPT_BYTES: u64 = ROOM_BYTES / KEPT_MAX as u64;

/// The longest piece of data, for clusters of that size.
pub(super) fn piece_bytes(cluster_bytes: u64) -> u64 {
    PIECE_BYTES.max(cluster_bytes)
}

/// The children: what has the present, and what has the past that is not there any more.
pub(super) const SOURCE: usize = 0;
pub(super) const TARGET: usize = 1;

/// Reading what is not, or not any more, part of the point in time: `EACCES`.
pub(super) const NOT_IN_IT: Error = Error::errno(13);

/// Reading a point in time that is lost: `EIO`. Nobody is refused what he could get otherwise: it is gone.
pub(super) const LOST: Error = Error::IO;

/// What becomes of a write when what it overwrites cannot be copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnCopyError {
    /// It fails.
    #[default]
    BreakGuestWrite,
    /// It goes on, and the point in time is lost for good.
    BreakSnapshot,
}

/// Which end of a copy failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The old data cannot be read.
    Source,
    /// It cannot be written.
    Target,
}

/// Writes one cluster of the target compressed: where, and what.
pub type Compress =
    Arc<dyn Fn(u64, Buffer) -> BoxFuture<'static, driveline_graph::Result<Buffer>> + Send + Sync>;

/// How copies are made.
#[derive(Clone, Default)]
pub struct Settings {
    /// What becomes of a write when a copy fails.
    pub on_error: OnCopyError,
    /// How long a write waits for its copy; zero: as long as it takes.
    pub timeout: Duration,
    /// The smallest cluster, a power of two; 0: none is asked for.
    pub cluster_bytes_min: u64,
    /// Copies are compressed.
    pub compress: Option<Compress>,
    /// What is copied is given up in the source.
    pub discard_source: bool,
    /// Somebody asks which end of an ordered copy failed: see [`CopyBeforeWrite::take_failure`].
    pub tells_failures: bool,
    /// The state outlives the process.
    pub safe: Option<MakeSafe>,
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings").field("on_error", &self.on_error).finish_non_exhaustive()
    }
}

/// How much was copied, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Before writes that would have overwritten it.
    pub by_writes: u64,
    /// Because somebody asked for it: a job, or a hint on the point in time that a range will be read.
    pub by_order: u64,
}

/// The state of a `copy-before-write` node, shared by the node, what reads its point in time, and a job.
///
/// ```text
///   finished  ─ no   a write has to copy first;    the past is read from the source
///             └ yes  a write has nothing to do;    the past is read from the target, unless denied
///   denied      is not part of the past: outside of the bitmap, or discarded (it is finished then, too)
/// ```
///
/// Both only grow, so marking them needs no lock, and a write that sees `finished` may go on at once: it was set
/// by one who held the range alone, after every reader of the source had left.
pub struct CopyBeforeWrite {
    pub(super) settings: Settings,
    pub(super) target_cluster: u64,
    pub(super) finished: Bits,
    pub(super) denied: Bits,
    /// Copies hold their clusters alone; who reads the past from the source shares them.
    pub(super) safe: Option<Safe>,
    pub(super) claims: Arc<Ranges>,
    pub(super) broken: AtomicBool,
    /// Why it is.
    pub(super) why_lost: OnceLock<String>,
    /// Tells of it.
    pub(super) lost: Event,
    /// The node's, to tell of it.
    pub(super) cookie: u64,
    /// The target could not be flushed once. What it had answered until then may be lost, whatever later flushes say.
    pub(super) unflushed: AtomicBool,
    /// One permit for each copy that has a buffer.
    pub(super) room: Semaphore,
    pub(super) buffers: Mutex<Vec<Buffer>>,
    pub(super) by_writes: AtomicU64,
    pub(super) by_order: AtomicU64,
    /// Which end failed of copies that were ordered, by where they began.
    pub(super) failures: Mutex<BTreeMap<u64, Side>>,
}

impl fmt::Debug for CopyBeforeWrite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CopyBeforeWrite").field("copied", &self.copied()).finish_non_exhaustive()
    }
}

impl CopyBeforeWrite {
    pub(super) fn new(
        cookie: u64,
        settings: Settings,
        cluster: Granularity,
        size_bytes: u64,
        target_cluster: u64,
        safe: Option<Safe>,
    ) -> Self {
        let safe = safe.map(|safe| if settings.discard_source { safe.giving_up() } else { safe });
        let (finished, denied) = (Bits::new(cluster, size_bytes), Bits::new(cluster, size_bytes));
        if let Some(safe) = &safe {
            safe.left_out().iter_dirty().for_each(|range| denied.mark(range));
            let copied = safe.copied().iter_dirty().chain(safe.left_out().iter_dirty());
            copied.for_each(|range| finished.mark(range));
        }
        Self {
            settings,
            target_cluster,
            finished,
            denied,
            safe,
            claims: Arc::default(),
            broken: AtomicBool::new(false),
            unflushed: AtomicBool::new(false),
            room: Semaphore::new((ROOM_BYTES / piece_bytes(cluster.bytes())).max(1) as usize),
            lost: Event::new(),
            why_lost: OnceLock::new(),
            cookie,
            buffers: Mutex::default(),
            by_writes: AtomicU64::new(0),
            by_order: AtomicU64::new(0),
            failures: Mutex::default(),
        }
    }

    /// The unit of copies.
    pub fn cluster_bytes(&self) -> u64 {
        self.finished.granularity().bytes()
    }

    /// The size that the node had at the point in time.
    pub fn size_bytes(&self) -> u64 {
        self.finished.length()
    }

    /// Only what is dirty in `wanted` belongs to the point in time. To be called before the node gets requests, or while it is
    /// drained and nothing has been copied.
    ///
    /// Errors: `wanted` is of another length.
    pub fn restrict(&self, wanted: &Bits) -> driveline_graph::Result<()> {
        let clusters = Bits::new(self.finished.granularity(), self.size_bytes());
        clusters.merge_from(wanted)?;
        for clean in clusters.extents(0..self.size_bytes()).filter(|extent| !extent.dirty) {
            self.leave_out(clean.range);
        }
        Ok(())
    }

    /// Clusters of `range` do not belong to the point in time: nothing is copied there. The range is of whole clusters.
    pub fn leave_out(&self, range: Range<u64>) {
        self.denied.mark(range.clone());
        self.finished.mark(range.clone());
        if let Some(safe) = &self.safe {
            safe.leave_out(range);
        }
    }

    /// The first run in `range` that belongs to the point in time, copied or not.
    pub fn next_wanted(&self, range: Range<u64>) -> Option<Range<u64>> {
        self.denied.extents(range).find(|extent| !extent.dirty).map(|extent| extent.range)
    }

    /// What is still to be copied, as far as it lies in `range`: the first run of it.
    pub fn next_left(&self, range: Range<u64>) -> Option<Range<u64>> {
        self.finished.extents(range).find(|extent| !extent.dirty).map(|extent| extent.range)
    }

    /// How many bytes of `range` belong to the point in time, copied or not.
    pub fn wanted_bytes(&self, range: Range<u64>) -> u64 {
        range.end.saturating_sub(range.start) - self.denied.dirty_bytes_in(range)
    }

    /// How much was copied.
    pub fn copied(&self) -> Copied {
        Copied { by_writes: self.by_writes.load(Relaxed), by_order: self.by_order.load(Relaxed) }
    }

    /// Is the point in time lost?
    pub fn is_broken(&self) -> bool {
        self.broken.load(Relaxed)
    }

    /// Has a flush of the target failed? Then what was copied may be lost there.
    pub fn has_unflushed(&self) -> bool {
        self.unflushed.load(Relaxed)
    }

    /// Flushes the target.
    pub(super) async fn flush_target(&self, next: &mut Next<'_>) -> driveline_op::Result<()> {
        let flushed = next.flush_at(TARGET).await;
        if flushed.is_err() {
            self.unflushed.store(true, Relaxed);
        }
        flushed
    }

    /// Shares a range of the source with others who read it; nobody overwrites it meanwhile.
    ///
    /// Errors: the point in time is lost. Who holds the range then may be a copy that never ends.
    pub(super) async fn share(&self, range: Range<u64>) -> driveline_op::Result<Hold> {
        match select(pin!(self.claims.hold(range, false)), pin!(self.lost())).await {
            Either::Left((hold, _)) => Ok(hold),
            Either::Right(_) => Err(LOST),
        }
    }

    /// Which end of an ordered copy failed that began at `offset`. It is told once.
    pub fn take_failure(&self, offset: u64) -> Option<Side> {
        self.failures.lock().remove(&offset)
    }

    /// Has a write of `range` nothing to wait for?
    #[inline]
    pub(super) fn may_overwrite(&self, range: &Range<u64>) -> bool {
        match &self.safe {
            None => self.is_finished(range),
            Some(safe) => self.covers(safe.free(), range),
        }
    }

    /// Is all of `range` copied or left out?
    #[inline]
    pub(super) fn is_finished(&self, range: &Range<u64>) -> bool {
        self.covers(&self.finished, range)
    }

    #[inline]
    fn covers(&self, bits: &Bits, range: &Range<u64>) -> bool {
        let cluster = self.cluster_bytes();
        if range.end - range.start > 32 * cluster {
            return bits.extents(range.clone()).all(|extent| extent.dirty);
        }
        let mut at = range.start & !(cluster - 1);
        while at < range.end {
            if !bits.is_dirty(at) && at < self.size_bytes() {
                return false;
            }
            at += cluster;
        }
        true
    }

    /// The clusters that a range touches.
    pub(super) fn whole(&self, range: &Range<u64>) -> Range<u64> {
        let cluster = self.cluster_bytes();
        range.start & !(cluster - 1)..range.end.next_multiple_of(cluster).min(self.size_bytes())
    }

    pub(super) fn take_buffer(&self, length: u64) -> Buffer {
        let kept = (length <= KEPT_BYTES).then(|| self.buffers.lock().pop()).flatten();
        let mut buffer = kept.unwrap_or_default();
        buffer.set_len(length as usize);
        buffer
    }

    pub(super) fn give_buffer(&self, buffer: Buffer) {
        let mut buffers = self.buffers.lock();
        if buffers.len() < KEPT_MAX && buffer.len() as u64 <= KEPT_BYTES {
            buffers.push(buffer);
        }
    }
}

//! What of a job's progress may be found again after the program was killed.
//!
//! ```text
//!   bitmap in memory   dirty ─▶ clean, and being copied ─▶ clean ─────────────────────▶ clean
//!   bitmap on disk     dirty ─────────────────────────────▶ dirty ─▶ (both flushed) ──▶ clean
//! ```
//!
//! A driver may hold back what is not flushed: a qcow2 image's tables are written by a flush, of the source as of the target.
//! Killed before it, the target lacks what was copied, or the source lacks what a guest wrote and the target has. So what was
//! copied is clean on disk only when it was copied before a flush of both, and has not been copied or written again since.

use driveline_bitmap::{Bitmap, Bits};
use driveline_graph::{Layout, Result, Role, Root};
use parking_lot::Mutex;
use std::{ops::Range, sync::Arc, time::Duration};

/// The shortest time between two savings.
const PAUSE: Duration = Duration::from_millis(200);
/// And so many times as long as the last one took.
const PAUSE_FACTOR: u32 = 10;

/// So much is kept from guests at once, for as long as it takes to change some words.
const LOCKED_BYTES_MAX: u64 = 16 << 20;

/// Drivers that hold nothing back: what they have answered is the kernel's, or another program's, or what is below has it.
const IMMEDIATE: [&str; 11] = [
    "file",
    "host_device",
    "raw",
    "nbd",
    "null",
    "null-co",
    "null-aio",
    "memory",
    "bitmap-holder",
    "copy-before-write",
    "mirror_top",
];

/// May a node, or what it stores its data in, hold back what it has answered until a flush?
pub(crate) fn holds_back(layout: &Layout, node: &str) -> bool {
    let Ok(view) = layout.view_node(node) else { return true };
    let immediate = IMMEDIATE.contains(&view.node.driver_name());
    let below =
        |child: &driveline_graph::ChildView| child.role != Role::Backing && holds_back(layout, &child.node);
    !immediate || view.children.iter().any(below)
}

/// When to save: not all the time, and less often where it takes long.
#[derive(Debug, Default)]
pub(crate) struct Pace(Mutex<Duration>);

impl Pace {
    /// How long it is until the next saving.
    pub(crate) fn pause(&self, now: Duration) -> Duration {
        self.0.lock().saturating_sub(now)
    }

    /// Saves, and looks how long that takes. `now` tells the time.
    pub(crate) async fn keep<T>(&self, now: impl Fn() -> Duration, saving: impl Future<Output = T>) -> T {
        let began = now();
        let saved = saving.await;
        let now = now();
        *self.0.lock() = now + PAUSE.max((now - began) * PAUSE_FACTOR);
        saved
    }
}

/// What was copied since the last saving, and whom to flush.
pub(crate) struct Copied {
    dirty: Arc<Bitmap>,
    news: Mutex<News>,
    flushes_source: bool,
    flushes_target: bool,
    pace: Pace,
    /// One at a time.
    saving: async_lock::Mutex<()>,
}

/// What is clean in memory, and not to be on disk yet.
struct News {
    /// It is being copied.
    flying: Bits,
    /// It was copied since the last flush began.
    fresh: Bits,
}

impl News {
    fn of(dirty: &Bitmap) -> Mutex<Self> {
        let none = || Bits::new(dirty.granularity(), dirty.length());
        Mutex::new(Self { flying: none(), fresh: none() })
    }
}

impl Copied {
    /// Of a job whose progress `dirty` is kept.
    pub(crate) fn new(dirty: &Arc<Bitmap>, layout: &Layout, source: &str, target: &str) -> Option<Arc<Self>> {
        dirty.ledger()?;
        Some(Arc::new(Self {
            dirty: dirty.clone(),
            news: News::of(dirty),
            flushes_source: holds_back(layout, source),
            flushes_target: holds_back(layout, target),
            pace: Pace::default(),
            saving: async_lock::Mutex::new(()),
        }))
    }

    /// A range of whole granules is going to be copied. To be told while nobody writes there, before it is clean.
    pub(crate) fn begin(&self, range: Range<u64>) {
        self.news.lock().flying.mark(range);
    }

    /// And it is over. What was not copied is marked again before.
    pub(crate) fn end(&self, range: Range<u64>, is_copied: bool) {
        let news = self.news.lock();
        news.flying.clear_range(range.clone());
        if is_copied {
            news.fresh.mark(range);
        }
    }

    /// A range was copied. To be told before it is clean.
    pub(crate) fn add(&self, range: Range<u64>) {
        self.news.lock().fresh.mark(range);
    }

    /// What was copied since this was asked the last time.
    fn take_fresh(&self) -> Bits {
        let none = Bits::new(self.dirty.granularity(), self.dirty.length());
        std::mem::replace(&mut self.news.lock().fresh, none)
    }

    /// How long it is until the next saving.
    pub(crate) fn pause(&self, now: Duration) -> Duration {
        self.pace.pause(now)
    }

    /// Saves what was copied before this was called. `now` tells the time.
    ///
    /// Errors: the images could not be flushed. What was copied until then is copied again after a restart: a later flush that succeeds
    /// does not say that they have it.
    pub(crate) async fn save(&self, from: &Root, to: &Root, now: impl Fn() -> Duration) -> Result<()> {
        let _turn = self.saving.lock().await;
        let copied = self.take_fresh();
        if copied.is_clean() {
            return Ok(());
        }
        self.pace.keep(now, self.settle(&copied, from, to)).await
    }

    /// What was flushed becomes clean on disk. What was copied once more meanwhile, or is being or is to be, waits for its own
    /// flush. Nobody writes in `range`, or begins to copy.
    fn settle_range(&self, range: Range<u64>) {
        let news = self.news.lock();
        let known =
            |bits: &Bits, range| bits.extents(range).filter(|extent| !extent.dirty).collect::<Vec<_>>();
        for extent in known(&news.fresh, range) {
            let landed = known(&news.flying, extent.range);
            landed.into_iter().for_each(|extent| self.dirty.settle_clean(extent.range));
        }
    }

    async fn settle(&self, copied: &Bits, from: &Root, to: &Root) -> Result<()> {
        if self.flushes_source {
            from.flush().await?;
        }
        if self.flushes_target {
            to.flush().await?;
        }
        let parts = |range: Range<u64>| {
            let starts = (range.start..range.end).step_by(LOCKED_BYTES_MAX as usize);
            starts.map(move |start| start..range.end.min(start + LOCKED_BYTES_MAX))
        };
        for range in copied.iter_dirty().flat_map(parts) {
            let unit = from.enter().await;
            let _lock = unit.lock(range.clone()).await;
            self.settle_range(range);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use driveline_bitmap::{BitmapName, Durability, Granularity, Half, Ledger, Record, StoreBinding};
    use std::{
        collections::BTreeSet,
        task::{Poll, Waker},
    };

    /// What is found after a kill.
    #[derive(Debug, Default)]
    struct Disk(Mutex<BTreeSet<u64>>);

    impl Ledger for Disk {
        fn mark(&self, _: Half, granules: Range<u64>) {
            self.0.lock().extend(granules);
        }
        fn unmark(&self, _: Half, granules: Range<u64>) {
            self.0.lock().retain(|granule| !granules.contains(granule));
        }
        fn wipe(&self, _: Half) {}
        fn cut(&self, _: u64) {}
        fn counts(&self, half: Half) -> bool {
            half == Half::First
        }
        fn durability(&self) -> Durability {
            Durability::Process
        }
        fn waits(&self) -> bool {
            false
        }
        fn poll_safe(&self, _: Range<u64>, _: &Waker) -> Poll<driveline_bitmap::Result<()>> {
            Poll::Ready(Ok(()))
        }
        fn take_down(&self, _: &Record) -> driveline_bitmap::Result<()> {
            Ok(())
        }
        fn reserve(&self, _: u64) -> driveline_bitmap::Result<()> {
            Ok(())
        }
        fn forget(&self) -> driveline_bitmap::Result<()> {
            Ok(())
        }
        fn binding(&self) -> StoreBinding {
            StoreBinding::Sidecar { path: "vda.job.dljob".into() }
        }
    }

    /// During the flush a guest writes again to one granule, which is copied again before the flush is done; to another, whose copy
    /// is on its way then; and to a third, which is not copied. None was flushed.
    #[test]
    fn what_is_copied_again_during_a_flush_is_found_dirty_until_the_next_one() {
        const GRANULE: u64 = 65536;
        let name = BitmapName::new("#mirror-job").unwrap();
        let dirty = Arc::new(Bitmap::new(name, Granularity::default(), 4 * GRANULE));
        let disk = Arc::new(Disk::default());
        dirty.keep_in(disk.clone()).unwrap();
        dirty.mark_unconditionally(0..4 * GRANULE);
        let copied = Copied {
            dirty: dirty.clone(),
            news: News::of(&dirty),
            flushes_source: true,
            flushes_target: true,
            pace: Pace::default(),
            saving: async_lock::Mutex::new(()),
        };
        let copy = |granule: u64| {
            let range = granule * GRANULE..(granule + 1) * GRANULE;
            dirty.bits().clear_range(range.clone());
            copied.add(range);
        };
        let found = || disk.0.lock().iter().copied().collect::<Vec<_>>();
        (0..4).for_each(copy);
        assert_eq!(found(), [0, 1, 2, 3], "nothing is flushed");
        let flushed = copied.take_fresh();
        dirty.mark_unconditionally(GRANULE..2 * GRANULE);
        copy(1);
        dirty.mark_unconditionally(2 * GRANULE..2 * GRANULE + 1);
        dirty.mark_unconditionally(3 * GRANULE..4 * GRANULE);
        copied.begin(3 * GRANULE..4 * GRANULE);
        dirty.bits().clear_range(3 * GRANULE..4 * GRANULE);
        flushed.iter_dirty().for_each(|range| copied.settle_range(range));
        assert_eq!(found(), [1, 2, 3]);
        copied.end(3 * GRANULE..4 * GRANULE, true);
        let flushed = copied.take_fresh();
        flushed.iter_dirty().for_each(|range| copied.settle_range(range));
        assert_eq!(found(), [2]);
    }
}

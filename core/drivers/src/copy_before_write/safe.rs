//! What is known to be copied after the program was killed.
//!
//! ```text
//!   finished ─▶ (the target is flushed, if it holds back what it has answered) ─▶ safe ─▶ a write may go on
//! ```
//!
//! A point in time that outlives its process needs one step more than one that does not: the source must not lose what the
//! target could lose. A qcow2 image's tables are written by a flush, so that a cluster which was copied there is not to be
//! found again without one.
//!
//! For the same reason the source gives up only what is safe (`discard-source`), and a write waits until it has: a discard that came
//! later would take away what was written.

use super::{copy::Failure, state::CopyBeforeWrite, state::Side};
use driveline_bitmap::{Bitmap, Bits};
use driveline_op::{DiscardRequest, Next};
use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
};

/// Makes what keeps the state of a node, for clusters of so many bytes and a node of so many.
pub type MakeSafe = Arc<dyn Fn(u64, u64) -> driveline_graph::Result<Safe> + Send + Sync>;

/// What keeps the state of a node beyond the life of the process.
#[derive(Debug)]
pub struct Safe {
    /// What is copied, or left out.
    copied: Arc<Bitmap>,
    /// What is left out.
    left_out: Arc<Bitmap>,
    /// The target may hold back what it has answered until a flush.
    flushes: bool,
    /// How many flushes have begun.
    begun: AtomicU64,
    /// The last flush that has ended well.
    ended: async_lock::Mutex<u64>,
    /// Something was copied since the last saving.
    fresh: AtomicBool,
    /// What the source has given up, or is not to give up. `None`: it keeps all.
    given_up: Option<Bits>,
}

impl Safe {
    /// Two bitmaps that are kept, of one granularity: what is copied or left out, and what of that is left out. They begin as
    /// they were found. `flushes`: what was copied is not safe before a flush of the target.
    pub fn new(copied: Arc<Bitmap>, left_out: Arc<Bitmap>, flushes: bool) -> Self {
        let (begun, ended, fresh, given_up) = Default::default();
        Self { copied, left_out, flushes, begun, ended, fresh, given_up }
    }

    /// The source is to give up what is safe. What was safe before may have been written since, and stays.
    pub(super) fn giving_up(self) -> Self {
        let given_up = self.copied().clone();
        Self { given_up: Some(given_up), ..self }
    }

    pub(super) fn copied(&self) -> &Bits {
        self.copied.bits()
    }

    pub(super) fn left_out(&self) -> &Bits {
        self.left_out.bits()
    }

    /// What a write may overwrite.
    pub(super) fn free(&self) -> &Bits {
        self.given_up.as_ref().unwrap_or(self.copied())
    }

    /// It is safe at once: nothing was copied.
    pub(super) fn leave_out(&self, range: Range<u64>) {
        if let Some(given_up) = &self.given_up {
            given_up.mark(range.clone());
        }
        self.left_out.mark_unconditionally(range.clone());
        self.copied.mark_unconditionally(range);
    }

    pub(super) fn note(&self) {
        self.fresh.store(true, SeqCst);
    }
}

impl CopyBeforeWrite {
    /// Clusters that are copied become safe: then they may be overwritten.
    pub(super) async fn make_safe(&self, next: &mut Next<'_>, range: Range<u64>) -> Result<(), Failure> {
        let Some(safe) = &self.safe else { return Ok(()) };
        if safe.flushes {
            let before = safe.begun.load(SeqCst);
            let mut ended = safe.ended.lock().await;
            // One flush is for all that were copied before it began.
            if *ended <= before {
                let number = safe.begun.fetch_add(1, SeqCst) + 1;
                self.flush_target(next).await.map_err(|error| Failure(Side::Target, error))?;
                *ended = number;
            }
        }
        safe.copied.mark_unconditionally(range);
        Ok(())
    }

    /// Makes all safe that is copied by now; `flush` flushes the target.
    ///
    /// Errors: those of `flush`.
    pub async fn save<F>(&self, flush: impl FnOnce() -> F) -> driveline_graph::Result<()>
    where
        F: Future<Output = driveline_graph::Result<()>>,
    {
        let Some(safe) = self.safe.as_ref().filter(|safe| safe.fresh.swap(false, SeqCst)) else {
            return Ok(());
        };
        let finished = self.finished.clone();
        if safe.flushes
            && let Err(error) = flush().await
        {
            safe.note();
            return Err(error);
        }
        finished.iter_dirty().for_each(|range| safe.copied.mark_unconditionally(range));
        Ok(())
    }
    /// The first run in `range` that is safe, and that the source has not given up yet.
    pub fn next_to_give_up(&self, range: Range<u64>) -> Option<Range<u64>> {
        let safe = self.safe.as_ref()?;
        let kept = safe.given_up.as_ref()?.extents(range).filter(|extent| !extent.dirty);
        let mut safe_runs = kept.flat_map(|kept| safe.copied().extents(kept.range));
        safe_runs.find(|extent| extent.dirty).map(|extent| extent.range)
    }

    /// The source gives up what is safe of `range`. From then on it may be overwritten.
    pub(super) async fn give_up(&self, next: &mut Next<'_>, range: Range<u64>) {
        let Some(given_up) = self.safe.as_ref().and_then(|safe| safe.given_up.as_ref()) else { return };
        while let Some(run) = self.next_to_give_up(range.clone()) {
            let _claim = self.claims.hold(run.clone(), true).await;
            // Whoever held it before may have done it, and a write that waited for that may have gone on.
            while let Some(run) = self.next_to_give_up(run.clone()) {
                // It is a hint, and the copy is made.
                let _ = next.discard(&DiscardRequest::new(run.clone(), 0)).await;
                given_up.mark(run);
            }
        }
    }
}

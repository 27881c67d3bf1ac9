//! What is known to be copied after the program was killed.
//!
//! ```text
//!   finished ─▶ (the target is flushed, if it holds back what it has answered) ─▶ safe ─▶ a write may go on
//! ```
//!
//! A point in time that outlives its process needs one step more than one that does not: the source must not lose what the
//! target could lose. A qcow2 image's tables are written by a flush, so that a cluster which was copied there is not to be
//! found again without one.

use super::{copy::Failure, state::CopyBeforeWrite, state::Side};
use driveline_bitmap::Bitmap;
use driveline_op::Next;
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
}

impl Safe {
    /// Two bitmaps that are kept, of one granularity: what is copied or left out, and what of that is left out. They begin as
    /// they were found. `flushes`: what was copied is not safe before a flush of the target.
    pub fn new(copied: Arc<Bitmap>, left_out: Arc<Bitmap>, flushes: bool) -> Self {
        let (begun, ended, fresh) = Default::default();
        Self { copied, left_out, flushes, begun, ended, fresh }
    }

    pub(super) fn copied(&self) -> &driveline_bitmap::Bits {
        self.copied.bits()
    }

    pub(super) fn left_out(&self) -> &driveline_bitmap::Bits {
        self.left_out.bits()
    }

    /// It is safe at once: nothing was copied.
    pub(super) fn leave_out(&self, range: Range<u64>) {
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
                next.flush_at(1).await.map_err(|error| Failure(Side::Target, error))?;
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
}

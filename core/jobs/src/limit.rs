//! A speed limit.

use crate::{job::Job, manager::Runtime};
use futures::future::select;
use std::{pin::pin, sync::Arc, time::Duration};

/// The speed limit is kept over slices of this length.
pub(crate) const SLICE: Duration = Duration::from_millis(100);

/// A speed limit: so many bytes in each slice of time.
#[derive(Default)]
pub(crate) struct RateLimit {
    slice_end: Duration,
    spent: u64,
}

impl RateLimit {
    /// Waits until so many bytes may be copied. `false`: the user wants the job to pause or to end instead.
    pub(crate) async fn wait(&mut self, job: &Job, runtime: &Arc<dyn Runtime>, bytes: u64) -> bool {
        loop {
            if job.is_cancelled() || job.wants_pause() {
                return false;
            }
            let speed = job.speed();
            if speed == 0 {
                return true;
            }
            let quota = (speed / 10).max(1);
            let now = runtime.now();
            if now >= self.slice_end {
                // Debt of a piece longer than a slice's quota is paid off in the slices that follow.
                let slices = 1 + (now - self.slice_end).as_millis() as u64 / SLICE.as_millis() as u64;
                self.spent = self.spent.saturating_sub(quota.saturating_mul(slices));
                self.slice_end = now + SLICE;
            }
            if self.spent < quota {
                self.spent += bytes;
                return true;
            }
            let sleep = runtime.sleep(self.slice_end - now);
            select(pin!(job.user_acted()), sleep).await;
        }
    }
}

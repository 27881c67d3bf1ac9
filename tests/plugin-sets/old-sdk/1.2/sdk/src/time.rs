//! Waiting, by the host's clock.

use crate::export::{host, started};
use driveline_abi::Status;
use driveline_op::with_handle;
use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

/// The time since some moment before the filter was opened. It never goes back.
pub fn now() -> Duration {
    Duration::from_nanos((host().now_ns())())
}

/// Waits. (A plugin cannot use the timers of tokio and the like: the host's threads do not run them.)
pub fn sleep(duration: Duration) -> Sleep {
    sleep_until(now().saturating_add(duration))
}

/// Waits until [`now`] says `deadline`.
pub fn sleep_until(deadline: Duration) -> Sleep {
    Sleep { deadline_ns: u64::try_from(deadline.as_nanos()).unwrap_or(u64::MAX), timer: 0, done: false }
}

/// The future of [`sleep`].
#[derive(Debug)]
pub struct Sleep {
    deadline_ns: u64,
    /// The host's timer; 0 before the first poll.
    timer: u64,
    done: bool,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.done {
            return Poll::Ready(());
        }
        let pending = if self.timer == 0 {
            let deadline_ns = self.deadline_ns;
            // SAFETY: the handle is valid for the call, which is all that the host needs.
            self.timer = with_handle(cx, |waker| unsafe { (host().timer_start())(deadline_ns, waker) });
            self.timer != 0
        } else {
            // SAFETY: as above, and the timer is ours.
            with_handle(cx, |waker| unsafe { (host().timer_poll())(self.timer, waker) }) == Status::PENDING
        };
        self.done = !pending;
        if pending { Poll::Pending } else { Poll::Ready(()) }
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if self.timer != 0 && started() {
            // SAFETY: the timer is ours, and given back once.
            unsafe { (host().timer_drop())(self.timer) };
        }
    }
}

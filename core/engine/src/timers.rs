//! Timers of one thread, and the future that waits for one.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crate::executor::{self, Mail, Worker};

/// Names one timer of one thread: its deadline orders it, the number tells equal deadlines apart.
pub(crate) type TimerKey = (Instant, u64);

/// The timers of a thread, soonest first.
///
/// A tree, not a wheel: the engine has few timers at once (throttles, handshake limits), and a tree cancels exactly.
#[derive(Debug, Default)]
pub(crate) struct Timers {
    waiting: BTreeMap<TimerKey, Waker>,
    next_number: u64,
}

impl Timers {
    pub(crate) fn insert(&mut self, deadline: Instant, waker: Waker) -> TimerKey {
        self.next_number += 1;
        let key = (deadline, self.next_number);
        self.waiting.insert(key, waker);
        key
    }

    /// The waker is handed back so that it is dropped outside the borrow.
    pub(crate) fn remove(&mut self, key: TimerKey) -> Option<Waker> {
        self.waiting.remove(&key)
    }

    /// Gives a timer that has not fired another waker. The one before is handed back, to be dropped outside the borrow.
    fn renew(&mut self, key: TimerKey, waker: &Waker) -> Result<Option<Waker>, Fired> {
        let known = self.waiting.get_mut(&key).ok_or(Fired)?;
        Ok((!known.will_wake(waker)).then(|| std::mem::replace(known, waker.clone())))
    }

    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.waiting.first_key_value().map(|((deadline, _), _)| *deadline)
    }

    /// Takes one timer that is due; called until there is none.
    pub(crate) fn pop_due(&mut self, now: Instant) -> Option<Waker> {
        let first = self.waiting.first_entry()?;
        (first.key().0 <= now).then(|| first.remove())
    }
}

/// The timer is not waiting any more.
struct Fired;

/// The time now. It is the clock that [`sleep_until`] goes by.
pub fn now() -> Instant {
    Instant::now()
}

/// Waits for `duration`. See [`Sleep`].
pub fn sleep(duration: Duration) -> Sleep {
    // A deadline beyond the clock's end is never: some centuries do for it.
    let far = Duration::from_secs(u64::from(u32::MAX));
    sleep_until(Instant::now() + duration.min(far))
}

/// Waits until `deadline`. See [`Sleep`].
pub fn sleep_until(deadline: Instant) -> Sleep {
    Sleep { deadline, registered: None }
}

/// Completes at its deadline, never before it. Dropping it cancels the timer.
///
/// It may be created anywhere and polled on any engine thread, also first on one and then on another.
///
/// # Panics
///
/// When polled on a thread that is no engine thread.
#[derive(Debug)]
#[must_use = "a future does nothing unless it is awaited"]
pub struct Sleep {
    deadline: Instant,
    /// The thread and the timer there.
    registered: Option<(u64, TimerKey)>,
}

impl Sleep {
    /// When it completes.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Moves the deadline. The next poll counts.
    pub fn reset(&mut self, deadline: Instant) {
        self.cancel();
        self.deadline = deadline;
    }

    fn cancel(&mut self) {
        let Some((thread, key)) = self.registered.take() else { return };
        executor::with_current(|worker| match worker {
            Some(worker) if worker.id() == thread => drop(worker.cancel_timer(key)),
            // Elsewhere the timer is left to a message; should its thread be gone, so is the timer.
            _ => executor::post_to(thread, Mail::CancelTimer(key)),
        });
    }

    fn register(&mut self, worker: &Worker, cx: &mut Context<'_>) {
        if let Some((thread, key)) = self.registered
            && thread == worker.id()
        {
            let renewed = worker.timers.borrow_mut().renew(key, cx.waker());
            if renewed.is_ok() {
                return;
            }
        }
        let key = worker.timers.borrow_mut().insert(self.deadline, cx.waker().clone());
        self.cancel();
        self.registered = Some((worker.id(), key));
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.deadline {
            self.cancel();
            return Poll::Ready(());
        }
        executor::with_current(|worker| {
            let worker = worker.expect("a Sleep is polled on an engine thread");
            self.register(worker, cx);
        });
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.cancel();
    }
}

//! The blocking pool: threads for what has no non-blocking form, shared by all engines of the process.
//!
//! Threads start when work waits and none is idle, up to a limit, and end after some idle time.

use std::cell::UnsafeCell;
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// More would only queue up in the kernel instead of here.
const THREADS_MAX: usize = 32;
const IDLE: Duration = Duration::from_secs(5);

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Pool {
    jobs: VecDeque<Job>,
    idle: usize,
    threads: usize,
}

static POOL: Mutex<Pool> = Mutex::new(Pool { jobs: VecDeque::new(), idle: 0, threads: 0 });
static WORK: Condvar = Condvar::new();

/// Queues a job. It fails only when no thread runs and none can be started.
fn execute(job: Job) -> io::Result<()> {
    let mut pool = POOL.lock();
    pool.jobs.push_back(job);
    if pool.idle >= pool.jobs.len() {
        WORK.notify_one();
        return Ok(());
    }
    if pool.threads < THREADS_MAX {
        match thread::Builder::new().name("driveline-blocking".to_owned()).spawn(work) {
            Ok(_) => pool.threads += 1,
            Err(error) if pool.threads == 0 => {
                pool.jobs.pop_back();
                return Err(error);
            }
            Err(error) => tracing::warn!(target: "driveline::engine", %error, "no new blocking thread"),
        }
    }
    WORK.notify_one();
    Ok(())
}

fn work() {
    let mut pool = POOL.lock();
    loop {
        if let Some(job) = pool.jobs.pop_front() {
            drop(pool);
            // Jobs catch their own panics; a waker that panics must not end the thread uncounted.
            let _ = catch_unwind(AssertUnwindSafe(job));
            pool = POOL.lock();
            continue;
        }
        pool.idle += 1;
        let timed_out = WORK.wait_for(&mut pool, IDLE).timed_out();
        pool.idle -= 1;
        if timed_out && pool.jobs.is_empty() {
            pool.threads -= 1;
            return;
        }
    }
}

/// Runs `f` on the blocking pool. Works on any thread and with any executor.
///
/// Dropping the future does not stop `f` once it runs.
///
/// # Panics
///
/// With the panic of `f`; and when not a single thread can be started.
pub async fn unblock<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    let cell = Arc::new(Mutex::new(Unblock { result: None, waker: None }));
    let theirs = Arc::clone(&cell);
    execute(Box::new(move || {
        let result = catch_unwind(AssertUnwindSafe(f));
        let waker = {
            let mut cell = theirs.lock();
            cell.result = Some(result);
            cell.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }))
    .expect("a thread for blocking work can be started");
    let result = std::future::poll_fn(|cx| {
        let mut cell = cell.lock();
        match cell.result.take() {
            Some(result) => Poll::Ready(result),
            None => {
                cell.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    })
    .await;
    result.unwrap_or_else(|payload| resume_unwind(payload))
}

struct Unblock<T> {
    result: Option<thread::Result<T>>,
    waker: Option<Waker>,
}

/// A blocking call that uses memory lent by whoever holds this: dropping it withdraws the call, or waits for its end.
pub(crate) struct Lent {
    shared: Arc<LentShared>,
}

struct LentShared {
    state: Mutex<LentState>,
    ended: Condvar,
    call: UnsafeCell<Option<Box<dyn FnOnce() -> i32>>>,
}

enum LentState {
    Queued(Option<Waker>),
    Running(Option<Waker>),
    Done(i32),
    Withdrawn,
}

// SAFETY: `call` is taken by the one pool thread that moves the state from Queued to Running; the caller of `Lent::start`
// promised that it may run there. Everything else is behind the mutex.
unsafe impl Send for LentShared {}
// SAFETY: as above.
unsafe impl Sync for LentShared {}

impl Lent {
    /// Queues `call`, which returns a count or a negative errno.
    ///
    /// # Safety
    ///
    /// `call` may run on another thread, and what it uses stays valid until the `Lent` is complete or dropped. `call` is
    /// freed wherever it ends, so it owns nothing that is bound to a thread.
    pub(crate) unsafe fn start(call: impl FnOnce() -> i32 + 'static) -> io::Result<Lent> {
        let shared = Arc::new(LentShared {
            state: Mutex::new(LentState::Queued(None)),
            ended: Condvar::new(),
            call: UnsafeCell::new(Some(Box::new(call))),
        });
        let theirs = Arc::clone(&shared);
        execute(Box::new(move || theirs.run()))?;
        Ok(Lent { shared })
    }
}

impl LentShared {
    fn run(&self) {
        {
            let mut state = self.state.lock();
            let LentState::Queued(waker) = &mut *state else { return };
            *state = LentState::Running(waker.take());
        }
        // SAFETY: only one thread gets past the change from Queued to Running.
        let call = unsafe { (*self.call.get()).take() }.expect("a call runs once");
        let result = call();
        let before = std::mem::replace(&mut *self.state.lock(), LentState::Done(result));
        self.ended.notify_all();
        if let LentState::Running(Some(waker)) = before {
            waker.wake();
        }
    }
}

impl Future for Lent {
    type Output = i32;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<i32> {
        match &mut *self.shared.state.lock() {
            LentState::Queued(waker) | LentState::Running(waker) => {
                *waker = Some(cx.waker().clone());
                Poll::Pending
            }
            LentState::Done(result) => Poll::Ready(*result),
            LentState::Withdrawn => unreachable!("only dropping withdraws"),
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        if let LentState::Queued(_) = *state {
            *state = LentState::Withdrawn;
            return;
        }
        while !matches!(*state, LentState::Done(_)) {
            self.shared.ended.wait(&mut state);
        }
    }
}

impl std::fmt::Debug for Lent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Lent")
    }
}

//! Tasks: futures that live on one engine thread, and the handles that wait for them.

use std::any::Any;
use std::fmt;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use async_task::{FallibleTask, Runnable};

use super::{Mail, Shared, with_current};

type Caught<T> = Result<T, Box<dyn Any + Send>>;

/// Why a task has no result.
pub enum JoinError {
    /// It was aborted, or its engine was shut down before it ended.
    Aborted,
    /// It panicked, with this payload.
    Panicked(Box<dyn Any + Send>),
}

impl JoinError {
    /// The panic's text, if it was a panic with text.
    pub fn panic_message(&self) -> Option<&str> {
        match self {
            JoinError::Aborted => None,
            JoinError::Panicked(payload) => panic_message(&**payload),
        }
    }
}

impl fmt::Display for JoinError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            JoinError::Aborted => f.write_str("the task was aborted"),
            JoinError::Panicked(_) => match self.panic_message() {
                Some(message) => write!(f, "the task panicked: {message}"),
                None => f.write_str("the task panicked"),
            },
        }
    }
}

impl fmt::Debug for JoinError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for JoinError {}

fn panic_message(payload: &(dyn Any + Send)) -> Option<&str> {
    payload.downcast_ref::<&str>().copied().or_else(|| payload.downcast_ref::<String>().map(String::as_str))
}

/// Waits for a task from any thread, with any waker. Dropping it lets the task run on unobserved.
#[must_use = "dropping the handle detaches the task; say so with `detach`"]
pub struct JoinHandle<T> {
    state: State<T>,
}

enum State<T> {
    Running(FallibleTask<Caught<T>>),
    Aborting(Pin<Box<Cancel<T>>>),
    Taken,
}

/// The future that a cancelled task is waited for with; boxed, as only aborting pays for it.
struct Cancel<T>(Pin<Box<dyn Future<Output = Option<Caught<T>>>>>);

// SAFETY: the boxed future is `FallibleTask::cancel`, which holds nothing but the `FallibleTask<Caught<T>>`. That one is
// `Send` when `T` is.
unsafe impl<T: Send> Send for Cancel<T> {}
// SAFETY: nothing can be done with a `&Cancel`.
unsafe impl<T: Send> Sync for Cancel<T> {}

impl<T> JoinHandle<T> {
    fn new(task: FallibleTask<Caught<T>>) -> Self {
        JoinHandle { state: State::Running(task) }
    }

    /// Cancels the task: its future is dropped on its own thread, unless it has ended before. Awaiting the handle
    /// afterwards waits until that has happened; it yields the result if the task had one in time.
    pub fn abort(&mut self)
    where
        T: 'static,
    {
        match std::mem::replace(&mut self.state, State::Taken) {
            State::Running(task) => {
                let mut cancel = Box::pin(Cancel(Box::pin(task.cancel())));
                // The first poll is what cancels.
                match cancel.0.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                    Poll::Pending => self.state = State::Aborting(cancel),
                    Poll::Ready(result) => {
                        self.state = State::Aborting(Box::pin(Cancel(Box::pin(std::future::ready(result)))));
                    }
                }
            }
            other => self.state = other,
        }
    }

    /// Lets the task run on by itself.
    pub fn detach(self) {}

    /// Whether the task has ended or was aborted.
    pub fn is_finished(&self) -> bool {
        match &self.state {
            State::Running(task) => task.is_finished(),
            State::Aborting(_) | State::Taken => true,
        }
    }
}

impl<T> Future for JoinHandle<T> {
    type Output = Result<T, JoinError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let polled = match &mut self.state {
            State::Running(task) => Pin::new(task).poll(cx),
            State::Aborting(cancel) => cancel.0.as_mut().poll(cx),
            State::Taken => panic!("a JoinHandle is polled after it gave its result"),
        };
        let Poll::Ready(output) = polled else { return Poll::Pending };
        self.state = State::Taken;
        Poll::Ready(match output {
            Some(Ok(value)) => Ok(value),
            Some(Err(payload)) => Err(JoinError::Panicked(payload)),
            None => Err(JoinError::Aborted),
        })
    }
}

impl<T> Drop for JoinHandle<T> {
    fn drop(&mut self) {
        if let State::Running(task) = std::mem::replace(&mut self.state, State::Taken) {
            task.detach();
        }
    }
}

impl<T> fmt::Debug for JoinHandle<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinHandle").field("finished", &self.is_finished()).finish()
    }
}

/// Makes a task of `future` for the thread of `shared`, without queueing it yet.
///
/// # Safety
///
/// Either this is that thread, or `future` is safe to move to it and to drop here for as long as it was not polled. What
/// `future` and its output borrow outlives the task: the caller waits for the handle before it ends.
pub(crate) unsafe fn prepare<F: Future>(shared: Arc<Shared>, future: F) -> (Runnable, JoinHandle<F::Output>) {
    let future = Tracked { future: Some(future), registered: None };
    let schedule = move |runnable| schedule(&shared, runnable);
    // SAFETY: the runnable is run only by the thread of `shared` (`schedule` sends it nowhere else), and a polled future is
    // dropped there too: on completion, on cancellation, and at the latest when the thread ends, which drops every task that
    // it has polled (`Tracked` registers them). What happens before the first poll is the caller's promise. The schedule
    // function is Send, Sync and 'static.
    let (runnable, task) = unsafe { async_task::spawn_unchecked(future, schedule) };
    (runnable, JoinHandle::new(task.fallible()))
}

fn schedule(shared: &Arc<Shared>, runnable: Runnable) {
    with_current(|worker| match worker {
        Some(worker) if worker.id() == shared.id => worker.push(runnable),
        _ => shared.post(Mail::Run(runnable)),
    });
}

/// A task's future: catches panics, and registers itself with its thread when it first waits.
struct Tracked<F> {
    future: Option<F>,
    registered: Option<usize>,
}

impl<F: Future> Future for Tracked<F> {
    type Output = Caught<F::Output>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        // SAFETY: `future` is pinned with `self`: it is only ever replaced by `None`, which drops it in place.
        let this = unsafe { self.get_unchecked_mut() };
        let future = this.future.as_mut().expect("a task is polled after its end");
        // SAFETY: as above.
        let future = unsafe { Pin::new_unchecked(future) };
        match catch_unwind(AssertUnwindSafe(|| future.poll(cx))) {
            Ok(Poll::Ready(output)) => Poll::Ready(Ok(output)),
            Ok(Poll::Pending) => {
                if this.registered.is_none() {
                    this.registered =
                        with_current(|worker| worker.map(|worker| worker.register(cx.waker().clone())));
                }
                Poll::Pending
            }
            Err(payload) => {
                let message = panic_message(&*payload).unwrap_or("(no text)");
                tracing::error!(target: "driveline::engine", panic = message, "a task panicked");
                Poll::Ready(Err(payload))
            }
        }
    }
}

impl<F> Drop for Tracked<F> {
    fn drop(&mut self) {
        if let Some(slot) = self.registered.take() {
            // Only the thread that polled can drop, see `prepare`.
            drop(with_current(|worker| worker.map(|worker| worker.unregister(slot))));
        }
        // In place, as it is pinned. A destructor that panics must not unwind into the thread's loop.
        if catch_unwind(AssertUnwindSafe(|| self.future = None)).is_err() {
            tracing::error!(target: "driveline::engine", "a task's destructor panicked");
        }
    }
}

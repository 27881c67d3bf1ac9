//! A link: one connection, the one after it, and the requests that go over both.
//!
//! ```text
//!               connect                lost, reconnect-delay > 0
//!   Idle ──▶ Starting ──▶ Connected ───────────────────────────▶ Waiting
//!                             ▲ │ lost, reconnect-delay = 0          │ reconnect-delay is over
//!                   connected │ └──────────────▶ Failing ◀───────────┘
//!                             └──────────────────── ┴ (from both)
//!   Broken: the server broke the protocol. Closed: the node is closed. Both for good.
//! ```
//!
//! While it is Waiting, requests wait; while it is Failing, they fail at once; in both it goes on connecting, with growing
//! pauses. So nothing waits for a server longer than reconnect-delay, a drain neither.
//!
//! One task on one engine thread is its life: it alone uses the connection, and requests of any thread reach it through the
//! lock. There is one link for each engine thread, if the server lets several connections count as one; else one for all.

use super::{
    calls::{Asked, CallId, Calls, Reply},
    connect::{Connected, Target, connect},
    session,
    terms::Terms,
};
use driveline_engine::{now, sleep, sleep_until};
use driveline_op::Buffer;
use driveline_wire::Errno;
use futures::channel::oneshot;
use parking_lot::{Mutex, MutexGuard};
use std::{
    future::{Future, poll_fn},
    io,
    pin::{Pin, pin},
    sync::{Arc, OnceLock},
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

/// The first pause between two attempts to connect. QEMU waits a second; a server that was only started anew is back sooner.
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// The longest. Source: QEMU nbd/client-connection.c.
const PAUSE_MAX: Duration = Duration::from_secs(16);

pub(super) struct Link {
    pub(super) target: Arc<Target>,
    /// What the node was opened with; the same for all links.
    pub(super) terms: Arc<OnceLock<Terms>>,
    state: Mutex<State>,
}

struct State {
    phase: Phase,
    /// When requests that wait give up. It is put off only by a server that has answered something since.
    give_up: Option<Instant>,
    calls: Calls,
    /// Somebody has cut the connection, and the task has not heard of it yet.
    cut: bool,
    /// The link's task.
    task: Option<Waker>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Idle,
    Starting,
    Connected,
    Waiting,
    Failing,
    Broken,
    Closed,
}

/// How a connection ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// The node was closed.
    Closed,
    /// The world failed.
    Lost(io::Error),
    /// The server broke the protocol.
    Violated(String),
}

impl Link {
    pub(super) fn new(target: Arc<Target>, terms: Arc<OnceLock<Terms>>) -> Arc<Link> {
        let state =
            State { phase: Phase::Idle, give_up: None, calls: Calls::default(), cut: false, task: None };
        Arc::new(Link { target, terms, state: Mutex::new(state) })
    }

    pub(super) fn phase(&self) -> Phase {
        self.state.lock().phase
    }

    /// From Idle to Starting; `false` if it was begun before.
    pub(super) fn begin(&self) -> bool {
        let mut state = self.state.lock();
        let idle = state.phase == Phase::Idle;
        if idle {
            state.phase = Phase::Starting;
        }
        idle
    }

    /// A buffer of `length` bytes with anything in it.
    pub(super) fn buffer(&self, length: usize) -> Buffer {
        self.state.lock().calls.buffer(length)
    }

    /// Takes a buffer back.
    pub(super) fn give(&self, buffer: Buffer) {
        self.state.lock().calls.give(buffer);
    }

    /// Begins a request. `None`: the link is in no state for it.
    pub(super) fn submit(&self, asked: Asked, payload: Option<Arc<Buffer>>) -> Option<Pending<'_>> {
        let mut state = self.state.lock();
        if !matches!(state.phase, Phase::Connected | Phase::Waiting) {
            return None;
        }
        let (id, first) = state.calls.push(asked, payload);
        // The task takes all that there is, so that it needs to hear of the first only.
        let task = if first { state.task.clone() } else { None };
        drop(state);
        if let Some(task) = task {
            task.wake();
        }
        Some(Pending { link: self, id, taken: false })
    }

    /// The node is closed: what waits fails, and the task ends.
    pub(super) fn close(&self) {
        self.stop(Phase::Closed);
    }

    fn stop(&self, phase: Phase) {
        let mut state = self.state.lock();
        if state.phase != Phase::Closed {
            state.phase = phase;
        }
        let waiting = state.calls.fail_all();
        let task = state.task.take();
        drop(state);
        waiting.into_iter().chain(task).for_each(Waker::wake);
    }

    /// Cuts the connection: all that was asked fails. It is connected to again as after a loss.
    pub(super) fn cut(&self) {
        let mut state = self.state.lock();
        let wakers: Vec<Waker> = match state.phase {
            // The task may be reading an answer just now, so it does the rest itself.
            Phase::Connected => {
                state.cut = true;
                state.task.take().into_iter().collect()
            }
            Phase::Waiting => state.calls.fail_all(),
            Phase::Idle | Phase::Starting | Phase::Failing | Phase::Broken | Phase::Closed => return,
        };
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Is the connection to end because somebody has cut it?
    pub(super) fn is_cut(&self) -> bool {
        self.state.lock().cut
    }

    /// How many answers have come by now, if a request waits for one.
    pub(super) fn awaited(&self) -> Option<u64> {
        self.state.lock().calls.awaited()
    }

    /// Whether the node is closed; if not, the task is woken when it is.
    pub(super) fn is_closed(&self, cx: &Context<'_>) -> bool {
        let mut state = self.state.lock();
        let known = state.task.as_ref().is_some_and(|known| known.will_wake(cx.waker()));
        let old = if known { None } else { state.task.replace(cx.waker().clone()) };
        let closed = state.phase == Phase::Closed;
        drop(state);
        // Outside of the lock: it may run anything.
        drop(old);
        closed
    }

    /// The calls, for the task.
    pub(super) fn calls(&self) -> impl std::ops::DerefMut<Target = Calls> + '_ {
        MutexGuard::map(self.state.lock(), |state| &mut state.calls)
    }

    /// The server has answered something: it is worth waiting for once more.
    pub(super) fn answered(&self) {
        self.state.lock().give_up = None;
    }

    fn connected(&self) {
        let mut state = self.state.lock();
        if state.phase != Phase::Closed {
            state.phase = Phase::Connected;
            // With nothing to ask, nothing will be answered; a connection is as good then.
            if !state.calls.any_open() {
                state.give_up = None;
            }
        }
    }

    /// The connection is gone.
    fn lost(&self) {
        let mut state = self.state.lock();
        let cut = std::mem::take(&mut state.cut);
        if state.phase != Phase::Connected {
            return;
        }
        let given_up = if cut { state.calls.fail_all() } else { Vec::new() };
        let delay = self.target.reconnect_delay;
        let give_up = *state.give_up.get_or_insert_with(|| now() + delay);
        let wakers = if delay.is_zero() || now() >= give_up {
            state.phase = Phase::Failing;
            state.calls.fail_all()
        } else {
            state.phase = Phase::Waiting;
            state.calls.lost()
        };
        drop(state);
        given_up.into_iter().chain(wakers).for_each(Waker::wake);
    }

    /// Requests have waited long enough.
    fn give_up(&self) {
        let mut state = self.state.lock();
        if state.phase != Phase::Waiting {
            return;
        }
        state.phase = Phase::Failing;
        let wakers = state.calls.fail_all();
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
    }

    fn deadline(&self) -> Option<Instant> {
        let state = self.state.lock();
        if state.phase == Phase::Waiting { state.give_up } else { None }
    }

    /// The task. `ready` hears of the first connection: the terms, or why there is none. A further link, for which nobody waits, has no
    /// `ready`.
    pub(super) async fn live(self: Arc<Self>, ready: Option<oneshot::Sender<io::Result<Terms>>>) {
        let Some(mut connected) = self.start(ready).await else { return };
        loop {
            self.connected();
            match session::run(&self, &mut connected).await {
                Ended::Closed => return,
                Ended::Lost(error) => {
                    tracing::warn!(target: "driveline::nbd", server = %self.target.address, %error, "connection lost");
                    self.lost();
                }
                Ended::Violated(why) => {
                    tracing::error!(target: "driveline::nbd", server = %self.target.address, why, "the server broke the protocol");
                    return self.stop(Phase::Broken);
                }
            }
            drop(connected);
            let Some(next) = self.reconnect().await else { return };
            connected = next;
        }
    }

    /// The first connection. Nothing is in flight yet.
    async fn start(&self, ready: Option<oneshot::Sender<io::Result<Terms>>>) -> Option<Connected> {
        let Some(ready) = ready else {
            let connected = match self.unless_closed(self.attempt()).await? {
                Ok(connected) => connected,
                Err(error) => {
                    tracing::debug!(target: "driveline::nbd", server = %self.target.address, %error, "no further connection");
                    // The first link does it all.
                    self.stop(Phase::Broken);
                    return None;
                }
            };
            return Some(connected);
        };
        let until = now() + self.target.open_timeout;
        let mut pause = PAUSE_MIN;
        let attempts = async {
            loop {
                let limit =
                    (!self.target.open_timeout.is_zero()).then(|| until.saturating_duration_since(now()));
                let attempt = connect(&self.target);
                let outcome = match limit {
                    None => attempt.await,
                    Some(limit) => {
                        within(limit, attempt).await.unwrap_or_else(|| Err(io::ErrorKind::TimedOut.into()))
                    }
                };
                match outcome {
                    Err(error) if now() + pause < until => {
                        tracing::info!(target: "driveline::nbd", server = %self.target.address, %error, "not yet connected");
                    }
                    outcome => return outcome,
                }
                sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
        };
        let outcome = self.unless_closed(attempts).await?;
        let (told, connected) = match outcome {
            Ok(connected) => {
                let terms = connected.terms.clone();
                let _ = self.terms.set(terms.clone());
                // Whoever hears that it is open sends requests.
                self.connected();
                (Ok(terms), Some(connected))
            }
            Err(error) => (Err(error), None),
        };
        // Whoever opens may have gone; then the node will never be.
        if ready.send(told).is_err() { None } else { connected }
    }

    /// One attempt, and whether the server is still the one that it was.
    async fn attempt(&self) -> io::Result<Connected> {
        let connected = connect(&self.target).await?;
        if let Some(before) = self.terms.get() {
            let refused = |why| io::Error::new(io::ErrorKind::InvalidData, why);
            before.goes_on_with(&connected.terms).map_err(refused)?;
        }
        Ok(connected)
    }

    /// Connects again, however long it takes. `None`: the node was closed.
    async fn reconnect(&self) -> Option<Connected> {
        let mut pause = PAUSE_MIN;
        let attempts = async {
            loop {
                match self.attempt().await {
                    Ok(connected) => return connected,
                    Err(error) => {
                        tracing::warn!(target: "driveline::nbd", server = %self.target.address, %error, "cannot reconnect");
                    }
                }
                sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
        };
        let limit = async {
            if let Some(deadline) = self.deadline() {
                sleep_until(deadline).await;
                self.give_up();
            }
            std::future::pending::<()>().await;
        };
        let (mut attempts, mut limit) = (pin!(attempts), pin!(limit));
        let either = poll_fn(|cx| {
            let _ = limit.as_mut().poll(cx);
            attempts.as_mut().poll(cx)
        });
        self.unless_closed(either).await
    }

    async fn unless_closed<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        let mut future = pin!(future);
        poll_fn(|cx| {
            if self.is_closed(cx) {
                return Poll::Ready(None);
            }
            future.as_mut().poll(cx).map(Some)
        })
        .await
    }
}

/// The output of `future`, if it comes in time.
pub(super) async fn within<T>(limit: Duration, future: impl Future<Output = T>) -> Option<T> {
    let (mut future, mut limit) = (pin!(future), pin!(sleep(limit)));
    poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(output) => Poll::Ready(Some(output)),
        Poll::Pending => limit.as_mut().poll(cx).map(|()| None),
    })
    .await
}

/// A request on its way. Dropping it gives it up: it may be done or not.
pub(super) struct Pending<'a> {
    link: &'a Link,
    id: CallId,
    taken: bool,
}

impl Future for Pending<'_> {
    type Output = Result<Reply, Errno>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut old = None;
        let answer = self.link.state.lock().calls.poll(self.id, cx.waker(), &mut old);
        match answer {
            Some(answer) => {
                self.taken = true;
                Poll::Ready(answer)
            }
            None => Poll::Pending,
        }
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if !self.taken {
            let waker = self.link.state.lock().calls.abandon(self.id);
            drop(waker);
        }
    }
}

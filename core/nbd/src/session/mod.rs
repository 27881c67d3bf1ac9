//! The second phase of a connection: requests in, replies out.
//!
//! ```text
//!   connection ─▶ wire::parse ─▶ submit ─▶ storage ─▶ reply ─▶ batch ─▶ connection
//!                                   └─▶ in flight ─▶┘
//! ```
//!
//! One task does it all. It reads as many requests as have come; each is begun where it is read, and those that storage
//! completes at once (a page cache hit, say) are answered there: no queue, no task, no allocation. Only a request that
//! has to wait is kept. When there is nothing more to read, all answers go out in one write.

mod batch;
mod in_flight;
mod judge;
mod pool;
mod reply;
mod status;
mod submit;

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::task::Poll;

use crate::contexts::Selected;
use crate::export::{Stage, Storage};
use crate::fault::Fault;
use crate::handshake::Negotiated;
use crate::limits::{BATCH_BYTES, BATCH_REPLIES, PAYLOAD_BYTES_MAX, REQUESTS_MAX};
use batch::Batch;
use driveline_transport::Receive;
use driveline_transport::Transport;
use in_flight::InFlight;
pub(crate) use judge::Terms;
use pool::Pool;

/// A session of one client with one export.
pub(crate) struct Session<'a, T, S> {
    transport: &'a T,
    storage: &'a S,
    terms: Terms,
    contexts: &'a [Selected],
    state: RefCell<State>,
    /// Grows with every step that another part of the session may be waiting for.
    steps: Cell<u64>,
}

/// What the parts of a session share.
#[derive(Debug, Default)]
struct State {
    pool: Pool,
    /// Replies to be sent next.
    batch: Batch,
    /// An empty batch for the replies after those.
    spare: Batch,
    /// Requests that are not answered, or whose answer is not sent.
    requests: usize,
    /// The payload of those.
    payload_bytes: usize,
    /// A batch is on its way.
    sending: bool,
    /// Nobody takes answers any more.
    deaf: bool,
}

impl State {
    fn all_sent(&self) -> bool {
        self.batch.is_empty() && !self.sending
    }
}

/// Serves a client until it leaves or is told to stop. Requests that began run to their end.
pub(crate) async fn run<T: Transport, S: Storage>(
    transport: &T,
    receive: &mut Receive,
    negotiated: &Negotiated<S>,
) -> Result<(), Fault> {
    let stop = &negotiated.attached.stop;
    let session = Session {
        transport,
        storage: &negotiated.attached.entry.export.storage,
        terms: negotiated.terms,
        contexts: &negotiated.contexts,
        state: RefCell::default(),
        steps: Cell::new(0),
    };
    let in_flight = RefCell::new(InFlight::new());
    let start = |job| {
        let done = in_flight.borrow_mut().start(session.execute(job));
        if let Some(done) = done {
            session.reply(done);
        }
    };
    let mut reader = pin!(session.read_requests(receive, start));
    let mut writer = pin!(session.send_replies());
    let mut reading = true;
    let mut outcome = Ok(());
    poll_fn(|cx| {
        in_flight.borrow().register(cx.waker());
        stop.register(cx.waker());
        loop {
            let steps = session.steps.get();
            loop {
                let done = in_flight.borrow_mut().next();
                let Some(done) = done else { break };
                session.reply(done);
            }
            match stop.stage() {
                Stage::Run => {}
                Stage::Finish => reading = false,
                Stage::Cut => {
                    reading = false;
                    session.state.borrow_mut().deaf = true;
                }
            }
            if reading && let Poll::Ready(end) = reader.as_mut().poll(cx) {
                reading = false;
                outcome = end;
            }
            if !session.state.borrow().deaf
                && let Poll::Ready(Err(error)) = writer.as_mut().poll(cx)
            {
                // Who does not take answers gets no further requests done, either.
                reading = false;
                session.state.borrow_mut().deaf = true;
                if outcome.is_ok() {
                    outcome = Err(error.into());
                }
            }
            let mut state = session.state.borrow_mut();
            // Who breaks the rules gets the answers that fit on the way, and is not waited for.
            state.deaf |= outcome.is_err();
            if !reading && in_flight.borrow().is_empty() && (state.deaf || state.all_sent()) {
                return Poll::Ready(());
            }
            drop(state);
            if steps == session.steps.get() {
                return Poll::Pending;
            }
        }
    })
    .await;
    outcome
}

impl<T: Transport, S: Storage> Session<'_, T, S> {
    /// Notes that something happened that another part of this session may wait for.
    fn step(&self) {
        self.steps.set(self.steps.get() + 1);
    }

    /// Lets the other parts of the session go on before this one does.
    async fn yield_turn(&self) {
        let mut yielded = false;
        poll_fn(|_| {
            if std::mem::replace(&mut yielded, true) {
                return Poll::Ready(());
            }
            self.step();
            Poll::Pending
        })
        .await;
    }

    /// Waits until a request with that much payload may be begun. This is where a client is held back: as long as this waits,
    /// nothing is read from it.
    async fn admit(&self, payload_bytes: usize) {
        // The parts of a session run in turns for as long as one of them makes a step, so nobody needs to be woken.
        poll_fn(|_| {
            let state = self.state.borrow();
            let fits = state.payload_bytes == 0 || state.payload_bytes + payload_bytes <= PAYLOAD_BYTES_MAX;
            let batch_open = state.batch.replies() < BATCH_REPLIES && state.batch.length() < BATCH_BYTES;
            if fits && batch_open && state.requests < REQUESTS_MAX { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        let mut state = self.state.borrow_mut();
        state.requests += 1;
        state.payload_bytes += payload_bytes;
    }

    /// Sends what is ready, again and again.
    async fn send_replies(&self) -> io::Result<()> {
        loop {
            poll_fn(|_| if self.state.borrow().batch.is_empty() { Poll::Pending } else { Poll::Ready(()) })
                .await;
            let mut batch = {
                let state = &mut *self.state.borrow_mut();
                state.sending = true;
                std::mem::replace(&mut state.batch, std::mem::take(&mut state.spare))
            };
            batch.send(self.transport).await?;
            let state = &mut *self.state.borrow_mut();
            state.requests -= batch.replies();
            state.payload_bytes -= batch.admitted_bytes();
            batch.clear(&mut state.pool);
            state.spare = batch;
            state.sending = false;
            self.step();
        }
    }
}

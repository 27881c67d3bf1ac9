//! What a monitor is to be sent: replies in their order, and events in between.

use event_listener::Event;
use parking_lot::Mutex;
use serde::Serialize;
use serde_json::{Serializer, Value, ser::PrettyFormatter};

/// A monitor that leaves more than this unread gets no new command done.
const FULL_BYTES: usize = 1 << 20;
/// A monitor that leaves more events than this unread is hung up on: they are not held back for anybody for ever.
const DEAD_BYTES: usize = 16 << 20;

/// Messages on their way out.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    /// Messages have line breaks.
    pretty: bool,
    state: Mutex<State>,
    changed: Event,
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<u8>,
    /// As many of them are events.
    event_bytes: usize,
    /// Bytes that are being written now.
    writing: usize,
    /// Nothing more will be put in.
    closed: bool,
    /// Nothing more can be sent.
    dead: bool,
}

impl Outbox {
    /// Nothing yet; `pretty`: with line breaks, for people.
    pub(crate) fn new(pretty: bool) -> Self {
        Self { pretty, ..Self::default() }
    }

    /// Puts a reply in, however long: the next command waits until it is read, so there are not many. Says whether it can still
    /// be sent.
    pub(crate) fn put_reply(&self, reply: &Value) -> bool {
        self.put(reply, |_, _| {})
    }

    /// Puts an event in. Says whether the other side still reads.
    pub(crate) fn put_event(&self, event: &Value) -> bool {
        self.put(event, |state, bytes| {
            state.event_bytes += bytes;
            if state.event_bytes > DEAD_BYTES {
                state.kill();
            }
        })
    }

    fn put(&self, message: &Value, count: impl FnOnce(&mut State, usize)) -> bool {
        let mut state = self.state.lock();
        // Nobody waits for more than there is in it.
        if state.closed {
            return !state.dead;
        }
        let before = state.waiting.len();
        let written = match self.pretty {
            true => {
                let four = PrettyFormatter::with_indent(b"    ");
                message.serialize(&mut Serializer::with_formatter(&mut state.waiting, four))
            }
            false => serde_json::to_writer(&mut state.waiting, message),
        };
        written.expect("a value can be written to memory");
        state.waiting.extend_from_slice(b"\r\n");
        let bytes = state.waiting.len() - before;
        count(&mut state, bytes);
        let alive = !state.dead;
        drop(state);
        self.changed.notify(usize::MAX);
        alive
    }

    /// Bytes to write, all that there are; `None` once it is closed and empty. What was taken before is written.
    pub(crate) async fn take(&self) -> Option<Vec<u8>> {
        self.state.lock().writing = 0;
        self.changed.notify(usize::MAX);
        self.until(|state| {
            if state.waiting.is_empty() {
                return state.closed.then_some(None);
            }
            (state.writing, state.event_bytes) = (state.waiting.len(), 0);
            Some(Some(std::mem::take(&mut state.waiting)))
        })
        .await
    }

    /// Waits until there is room for another reply.
    pub(crate) async fn room(&self) {
        self.until(|state| (state.dead || state.waiting.len() + state.writing <= FULL_BYTES).then_some(()))
            .await;
    }

    /// Waits until all is written, or cannot be.
    pub(crate) async fn written(&self) {
        self.until(|state| (state.dead || state.waiting.is_empty() && state.writing == 0).then_some(()))
            .await;
    }

    /// Takes nothing more; what is in it is still written.
    pub(crate) fn close(&self) {
        self.state.lock().closed = true;
        self.changed.notify(usize::MAX);
    }

    /// Nothing can be written any more.
    pub(crate) fn kill(&self) {
        self.state.lock().kill();
        self.changed.notify(usize::MAX);
    }

    async fn until<T>(&self, mut ready: impl FnMut(&mut State) -> Option<T>) -> T {
        loop {
            // Listening first: a change between the look and the wait is not missed.
            let change = self.changed.listen();
            if let Some(value) = ready(&mut self.state.lock()) {
                return value;
            }
            change.await;
        }
    }
}

impl State {
    fn kill(&mut self) {
        self.closed = true;
        self.dead = true;
        self.waiting = Vec::new();
    }
}

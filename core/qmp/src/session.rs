//! One monitor: greeting, negotiation, then commands one after the other, with events in between.
//!
//! A client that enables `oob` is read while its command runs: up to [`QUEUE_MAX`] commands wait for their turn, and one that is
//! sent with `exec-oob` is answered at once, before those. Without `oob` nothing is read before the command is answered.

use crate::{
    arguments, command,
    error::{Class, Error, Result},
    monitor::Monitor,
    outbox::Outbox,
    wire::Decoder,
};
use driveline_engine::net::Stream;
use event_listener::Event;
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::{
    collections::VecDeque,
    io,
    net::Shutdown,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

/// So many commands wait for their turn; no more is read until one is answered.
/// Source: QEMU's monitor, `QMP_REQ_QUEUE_LEN_MAX`.
const QUEUE_MAX: usize = 8;

/// A connection and what it is to be sent.
pub(crate) struct Session {
    stream: Stream,
    outbox: Outbox,
    queue: Queue,
    /// The client has enabled out-of-band execution.
    oob: AtomicBool,
    /// The negotiation is over: commands and events may pass.
    negotiated: AtomicBool,
    /// It has heard what was kept for the first client.
    greeted: AtomicBool,
    /// The command under way is `quit`, which is done after its reply.
    quits: AtomicBool,
}

impl Session {
    pub(crate) fn new(stream: Stream, pretty: bool) -> Arc<Self> {
        let [oob, negotiated, greeted, quits] = [false; 4].map(AtomicBool::new);
        let outbox = Outbox::new(pretty);
        let queue = Default::default();
        Arc::new(Self { stream, outbox, queue, oob, negotiated, greeted, quits })
    }

    /// Serves until the client hangs up, or [`Session::hang_up`].
    pub(crate) async fn run(&self, monitor: &Monitor) {
        tracing::debug!(target: "driveline::qmp", peer = self.stream.peer(), "a monitor is connected");
        self.outbox.put_reply(&greeting());
        let read = async {
            if let Err(error) = self.read(monitor).await {
                tracing::debug!(target: "driveline::qmp", peer = self.stream.peer(), "reading: {error}");
            }
            self.queue.close();
        };
        let work = async {
            while let Some(message) = self.queue.first().await {
                self.serve(monitor, message).await;
                self.outbox.room().await;
                self.queue.done();
            }
            self.outbox.close();
        };
        let write = async {
            while let Some(bytes) = self.outbox.take().await {
                if let Err(error) = self.stream.write_all(&bytes).await {
                    tracing::debug!(target: "driveline::qmp", peer = self.stream.peer(), "writing: {error}");
                    self.hang_up();
                    break;
                }
            }
        };
        futures::join!(read, work, write);
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Reads what the client says, and puts it into the queue.
    async fn read(&self, monitor: &Monitor) -> io::Result<()> {
        let mut decoder = Decoder::default();
        let mut buffer = vec![0; 16 << 10];
        loop {
            let count = self.stream.read(&mut buffer).await?;
            if count == 0 {
                return Ok(());
            }
            let mut input = &buffer[..count];
            while let Some(message) = decoder.next(&mut input) {
                let message = match message {
                    Ok(Value::Object(message)) if self.is_out_of_band(&message) => {
                        self.reply_out_of_band(monitor, message);
                        self.outbox.room().await;
                        continue;
                    }
                    message => message,
                };
                self.queue.put(message);
                let waiting = if self.oob.load(Relaxed) { QUEUE_MAX - 1 } else { 0 };
                self.queue.room(waiting).await;
            }
        }
    }

    /// Is it to be answered before what waits in the queue?
    fn is_out_of_band(&self, message: &Map<String, Value>) -> bool {
        self.oob.load(Relaxed) && message.contains_key("exec-oob") && !message.contains_key("execute")
    }

    /// Answers what came with `exec-oob`.
    fn reply_out_of_band(&self, monitor: &Monitor, mut message: Map<String, Value>) {
        let id = message.shift_remove("id");
        let result = request(message, true)
            .and_then(|(name, arguments)| command::execute_out_of_band(monitor, &name, arguments));
        self.reply(id, result);
    }

    /// Takes one message to its end.
    async fn serve(&self, monitor: &Monitor, message: Result<Value>) {
        let (id, result) = match message {
            Ok(message) => self.answer(monitor, message).await,
            Err(error) => (None, Err(error)),
        };
        self.reply(id, result);
        if self.negotiated.load(Relaxed) && !self.greeted.swap(true, Relaxed) {
            monitor.greet(self);
        }
        if self.quits.swap(false, Relaxed) {
            monitor.quit();
        }
    }

    /// Does what a message asks for. An `id` comes back with the answer, whatever that is.
    async fn answer(&self, monitor: &Monitor, message: Value) -> (Option<Value>, Result<Value>) {
        let Value::Object(mut message) = message else {
            return (None, Err(Error::generic("QMP input must be a JSON object")));
        };
        let id = message.shift_remove("id");
        let result = match request(message, self.oob.load(Relaxed)) {
            Ok((name, arguments)) => self.execute(monitor, &name, arguments).await,
            Err(error) => Err(error),
        };
        (id, result)
    }

    async fn execute(&self, monitor: &Monitor, name: &str, arguments: Value) -> Result<Value> {
        if self.negotiated.load(Relaxed) {
            tracing::debug!(target: "driveline::qmp", command = name, "a command");
            let result = command::execute(monitor, name, arguments).await;
            self.quits.store(name == "quit" && result.is_ok(), Relaxed);
            return result;
        }
        if name != "qmp_capabilities" {
            let text = "Expecting capabilities negotiation with 'qmp_capabilities'";
            return Err(Error::new(Class::CommandNotFound, text));
        }
        let Capabilities { enable } = arguments::parse(arguments, "")?;
        if enable.unwrap_or_default().into_iter().any(|Capability::Oob| true) {
            self.oob.store(true, Relaxed);
        }
        self.negotiated.store(true, Relaxed);
        Ok(json!({}))
    }

    fn reply(&self, id: Option<Value>, result: Result<Value>) {
        let mut reply = Map::new();
        match result {
            Ok(value) => reply.insert("return".into(), value),
            Err(error) => reply.insert("error".into(), json!(error)),
        };
        reply.extend(id.map(|id| ("id".to_owned(), id)));
        if !self.outbox.put_reply(&reply.into()) {
            self.hang_up();
        }
    }

    /// Tells of an event, if the client has come so far. One that does not read is hung up on.
    pub(crate) fn notify(&self, event: &Value) {
        if self.negotiated.load(Relaxed) && !self.outbox.put_event(event) {
            tracing::warn!(target: "driveline::qmp", peer = self.stream.peer(), "a monitor does not read; it is cut off");
            self.hang_up();
        }
    }

    /// Waits until the client has been sent all there is.
    pub(crate) async fn written(&self) {
        self.outbox.written().await;
    }

    /// Ends the connection.
    pub(crate) fn hang_up(&self) {
        self.outbox.kill();
        // Whoever reads or writes is woken by it.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

fn greeting() -> Value {
    json!({ "QMP": { "version": command::version(), "capabilities": ["oob"] } })
}

/// Arguments of `qmp_capabilities`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Capabilities {
    enable: Option<Vec<Capability>>,
}

/// QAPI's `QMPCapability`.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Capability {
    Oob,
}

/// `qmp_capabilities`, once it was.
pub(crate) async fn capabilities(_: &Monitor, _: Capabilities) -> Result<command::Done> {
    let text = "Capabilities negotiation is already complete, command ignored";
    Err(Error::new(Class::CommandNotFound, text))
}

/// Takes a message apart: the command and its arguments. With `oob` it may be sent with `exec-oob`.
fn request(message: Map<String, Value>, oob: bool) -> Result<(String, Value)> {
    let (mut name, mut arguments) = (None, Value::Object(Map::new()));
    for (member, value) in message {
        match (&*member, value) {
            ("execute", _) if name.is_some() => return Err(clash("execute", "exec-oob")),
            ("exec-oob", _) if oob && name.is_some() => return Err(clash("exec-oob", "execute")),
            ("execute", Value::String(value)) => name = Some(value),
            ("exec-oob", Value::String(value)) if oob => name = Some(value),
            ("arguments", value @ Value::Object(_)) => arguments = value,
            ("arguments", _) => {
                return Err(Error::generic("QMP input member 'arguments' must be an object"));
            }
            ("execute", _) => return Err(Error::generic("QMP input member 'execute' must be a string")),
            ("exec-oob", _) if oob => {
                return Err(Error::generic("QMP input member 'exec-oob' must be a string"));
            }
            _ => return Err(Error::generic(format_args!("QMP input member '{member}' is unexpected"))),
        }
    }
    match name {
        Some(name) => Ok((name, arguments)),
        None => Err(Error::generic("QMP input lacks member 'execute'")),
    }
}

fn clash(second: &str, first: &str) -> Error {
    Error::generic(format_args!("QMP input member '{second}' clashes with '{first}'"))
}

/// Messages that were read and are not answered yet, in their order.
#[derive(Default)]
struct Queue {
    state: Mutex<Waiting>,
    changed: Event,
}

#[derive(Default)]
struct Waiting {
    messages: VecDeque<Result<Value>>,
    /// Those that wait, and the one that is being worked on.
    unanswered: usize,
    /// Nothing more comes.
    closed: bool,
}

impl Queue {
    fn put(&self, message: Result<Value>) {
        let mut state = self.state.lock();
        state.messages.push_back(message);
        state.unanswered += 1;
        drop(state);
        self.changed.notify(usize::MAX);
    }

    /// The next message; `None` once all are taken and nothing more comes.
    async fn first(&self) -> Option<Result<Value>> {
        self.until(|state| match state.messages.pop_front() {
            Some(message) => Some(Some(message)),
            None => state.closed.then_some(None),
        })
        .await
    }

    /// The one that was taken is answered.
    fn done(&self) {
        self.state.lock().unanswered -= 1;
        self.changed.notify(usize::MAX);
    }

    /// Waits until there are no more than so many unanswered.
    async fn room(&self, most: usize) {
        self.until(|state| (state.unanswered <= most).then_some(())).await;
    }

    fn close(&self) {
        self.state.lock().closed = true;
        self.changed.notify(usize::MAX);
    }

    async fn until<T>(&self, mut ready: impl FnMut(&mut Waiting) -> Option<T>) -> T {
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

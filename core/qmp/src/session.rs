//! One monitor: greeting, negotiation, then commands one after the other, with events in between.

use crate::{
    arguments, command,
    error::{Class, Error, Result},
    monitor::Monitor,
    outbox::Outbox,
    wire::Decoder,
};
use driveline_engine::net::Stream;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::{
    io,
    net::Shutdown,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

/// A connection and what it is to be sent.
pub(crate) struct Session {
    stream: Stream,
    outbox: Outbox,
    /// The negotiation is over: commands and events may pass.
    negotiated: AtomicBool,
    /// It has heard what was kept for the first client.
    greeted: AtomicBool,
    /// The command under way is `quit`, which is done after its reply.
    quits: AtomicBool,
}

impl Session {
    pub(crate) fn new(stream: Stream) -> Arc<Self> {
        let [negotiated, greeted, quits] = [false; 3].map(AtomicBool::new);
        Arc::new(Self { stream, outbox: Outbox::default(), negotiated, greeted, quits })
    }

    /// Serves until the client hangs up, or [`Session::hang_up`].
    pub(crate) async fn run(&self, monitor: &Monitor) {
        tracing::debug!(target: "driveline::qmp", peer = self.stream.peer(), "a monitor is connected");
        self.outbox.put(&greeting());
        let read = async {
            if let Err(error) = self.read(monitor).await {
                tracing::debug!(target: "driveline::qmp", peer = self.stream.peer(), "reading: {error}");
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
        futures::join!(read, write);
        let _ = self.stream.shutdown(Shutdown::Both);
    }

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
                self.outbox.room().await;
            }
        }
    }

    /// Does what a message asks for. An `id` comes back with the answer, whatever that is.
    async fn answer(&self, monitor: &Monitor, message: Value) -> (Option<Value>, Result<Value>) {
        let Value::Object(mut message) = message else {
            return (None, Err(Error::generic("QMP input must be a JSON object")));
        };
        let id = message.shift_remove("id");
        let result = match request(message) {
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
        if let Some(name) = enable.unwrap_or_default().first() {
            let text = format_args!("Parameter 'enable[0]' does not accept value '{name}'");
            return Err(Error::generic(text));
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
        self.outbox.put(&reply.into());
    }

    /// Tells of an event, if the client has come so far. One that does not read is hung up on.
    pub(crate) fn notify(&self, event: &Value) {
        if self.negotiated.load(Relaxed) && !self.outbox.put(event) {
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
    json!({ "QMP": { "version": command::version(), "capabilities": [] } })
}

/// Arguments of `qmp_capabilities`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Capabilities {
    enable: Option<Vec<String>>,
}

/// `qmp_capabilities`, once it was.
pub(crate) async fn capabilities(_: &Monitor, _: Capabilities) -> Result<command::Done> {
    let text = "Capabilities negotiation is already complete, command ignored";
    Err(Error::new(Class::CommandNotFound, text))
}

/// Takes a message apart: the command and its arguments.
fn request(message: Map<String, Value>) -> Result<(String, Value)> {
    let (mut name, mut arguments) = (None, Value::Object(Map::new()));
    for (member, value) in message {
        match (&*member, value) {
            ("execute", Value::String(value)) => name = Some(value),
            ("execute", _) => return Err(Error::generic("QMP input member 'execute' must be a string")),
            ("arguments", value @ Value::Object(_)) => arguments = value,
            ("arguments", _) => {
                return Err(Error::generic("QMP input member 'arguments' must be an object"));
            }
            _ => return Err(Error::generic(format_args!("QMP input member '{member}' is unexpected"))),
        }
    }
    match name {
        Some(name) => Ok((name, arguments)),
        None => Err(Error::generic("QMP input lacks member 'execute'")),
    }
}

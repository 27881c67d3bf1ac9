//! A client of a control socket: one command after the other, with the events in between.

use serde_json::{Map, Value, json};
use std::{
    collections::VecDeque,
    fmt,
    io::{self, BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

/// A connection that has negotiated.
#[derive(Debug)]
pub(super) struct Client {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    events: VecDeque<Value>,
    /// The part of a line that was there when time was over.
    partial: Vec<u8>,
    sent: u64,
}

/// Why a command has no answer that it wanted.
#[derive(Debug)]
pub(super) enum Failed {
    /// No daemon answers there.
    Unreachable(String),
    /// The daemon refused, in its words.
    Refused(String),
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable(text) | Self::Refused(text) => f.write_str(text),
        }
    }
}

/// The outcome of a command.
pub(super) type Result<T> = std::result::Result<T, Failed>;

impl Client {
    /// Connects and negotiates.
    pub(super) fn connect(socket: &Path) -> Result<Self> {
        let writer = UnixStream::connect(socket).map_err(|error| {
            let hint = match error.kind() {
                io::ErrorKind::NotFound => "; is a daemon with a [monitor] running there?",
                io::ErrorKind::ConnectionRefused => "; the daemon that made it has ended",
                _ => "",
            };
            Failed::Unreachable(format!("cannot connect to {}: {error}{hint}", socket.display()))
        })?;
        let reader = writer.try_clone().map(BufReader::new).map_err(|error| lost(&error))?;
        let (events, partial) = Default::default();
        let mut client = Self { reader, writer, events, partial, sent: 0 };
        // Another kind of server may wait for its client to speak first.
        client.set_patience(Some(Duration::from_secs(10)))?;
        if client.next_message()?.is_none_or(|greeting| greeting.get("QMP").is_none()) {
            let text = format!("what listens at {} does not speak QMP", socket.display());
            return Err(Failed::Unreachable(text));
        }
        client.set_patience(None)?;
        client.run("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// Runs a command, and returns its answer.
    pub(super) fn run(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.sent += 1;
        let id = json!(self.sent);
        let mut text = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        text.push('\n');
        self.writer.write_all(text.as_bytes()).map_err(|error| lost(&error))?;
        loop {
            let Some(mut message) = self.next_message()? else { continue };
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if message.get("id") == Some(&id) {
                if let Some(answer) = message.get_mut("return") {
                    return Ok(answer.take());
                }
                let text = message["error"]["desc"].as_str().unwrap_or("the daemon refused").to_owned();
                return Err(Failed::Refused(text));
            }
        }
    }

    /// The next event. `None`: none came in that time.
    pub(super) fn event(&mut self, patience: Option<Duration>) -> Result<Option<Value>> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        self.set_patience(patience)?;
        let message = self.next_message();
        self.set_patience(None)?;
        message
    }

    /// An event that came before the last answer.
    pub(super) fn event_at_hand(&mut self) -> Option<Value> {
        self.events.pop_front()
    }

    fn set_patience(&self, patience: Option<Duration>) -> Result<()> {
        self.writer.set_read_timeout(patience).map_err(|error| lost(&error))
    }

    /// `None`: time is over. A line is whole or kept for the next time.
    fn next_message(&mut self) -> Result<Option<Value>> {
        match self.reader.read_until(b'\n', &mut self.partial) {
            Ok(_) if self.partial.ends_with(b"\n") => {
                let line = std::mem::take(&mut self.partial);
                let message = serde_json::from_slice(&line);
                message
                    .map(Some)
                    .map_err(|error| Failed::Unreachable(format!("the daemon's answer: {error}")))
            }
            Ok(_) => Err(Failed::Unreachable("the daemon has ended".to_owned())),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                Ok(None)
            }
            Err(error) => Err(lost(&error)),
        }
    }
}

fn lost(error: &io::Error) -> Failed {
    Failed::Unreachable(format!("the connection to the daemon: {error}"))
}

/// Arguments from those that are given: what is null is left out.
pub(super) fn given<const N: usize>(members: [(&str, Value); N]) -> Value {
    let members = members.into_iter().filter(|(_, value)| !value.is_null());
    members.map(|(key, value)| (key.to_owned(), value)).collect::<Map<_, _>>().into()
}

/// Where the daemon is: as said, as the environment says, or the one place that is looked at.
pub(super) fn socket(said: Option<&Path>) -> PathBuf {
    let environment = || std::env::var_os("DRIVELINE_SOCKET").map(PathBuf::from);
    said.map(Path::to_owned).or_else(environment).unwrap_or_else(|| "qmp.sock".into())
}

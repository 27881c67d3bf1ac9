//! A QMP client of a few lines.

use serde_json::{Value, json};
use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

/// A connection. Events are kept until they are asked for.
pub(crate) struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    events: Vec<Value>,
}

impl Qmp {
    pub(crate) fn connect(socket: &Path) -> Self {
        let deadline = Instant::now() + Duration::from_secs(10);
        let writer = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < deadline, "{}: {error}", socket.display()),
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        writer.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let reader = BufReader::new(writer.try_clone().unwrap());
        let mut qmp = Self { reader, writer, events: Vec::new() };
        assert!(qmp.read()["QMP"].is_object(), "a greeting comes first");
        qmp.run("qmp_capabilities", json!({}));
        qmp
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        assert!(
            self.reader.read_line(&mut line).expect("an answer within a minute") > 0,
            "the socket is open"
        );
        serde_json::from_str(&line).expect("a line is a JSON object")
    }

    /// Runs a command and returns its answer, `return` or `error`.
    pub(crate) fn try_run(&mut self, command: &str, arguments: Value) -> Result<Value, Value> {
        self.send(command, arguments);
        self.answer()
    }

    /// Says a command, whose answer is [`Qmp::answer`].
    pub(crate) fn send(&mut self, command: &str, arguments: Value) {
        let text = json!({ "execute": command, "arguments": arguments }).to_string();
        self.writer.write_all(format!("{text}\n").as_bytes()).unwrap();
    }

    /// The answer to the command that was said last.
    pub(crate) fn answer(&mut self) -> Result<Value, Value> {
        loop {
            let mut answer = self.read();
            if answer.get("event").is_some() {
                self.events.push(answer);
            } else if answer.get("error").is_some() {
                return Err(answer["error"].take());
            } else {
                return Ok(answer["return"].take());
            }
        }
    }

    /// Runs a command that must succeed.
    pub(crate) fn run(&mut self, command: &str, arguments: Value) -> Value {
        self.try_run(command, arguments.clone())
            .unwrap_or_else(|error| panic!("{command} {arguments}: {error}"))
    }

    /// Runs a command whose program may be killed meanwhile: then nobody knows what became of it.
    pub(crate) fn attempt(
        &mut self,
        command: &str,
        arguments: Value,
    ) -> std::io::Result<Result<Value, Value>> {
        let text = json!({ "execute": command, "arguments": arguments }).to_string();
        self.writer.write_all(format!("{text}\n").as_bytes())?;
        loop {
            let mut line = String::new();
            if self.reader.read_line(&mut line)? == 0 || !line.ends_with('\n') {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            let mut answer: Value = serde_json::from_str(&line).expect("a line is a JSON object");
            if answer.get("error").is_some() {
                return Ok(Err(answer["error"].take()));
            } else if answer.get("event").is_none() {
                return Ok(Ok(answer["return"].take()));
            }
            self.events.push(answer);
        }
    }

    /// Events that nobody took yet.
    pub(crate) fn events(&self) -> &[Value] {
        &self.events
    }

    /// Takes those that are wanted.
    pub(crate) fn take_events(&mut self, wanted: impl Fn(&Value) -> bool) -> Vec<Value> {
        let (taken, left) = std::mem::take(&mut self.events).into_iter().partition(wanted);
        self.events = left;
        taken
    }

    /// Waits for one more.
    pub(crate) fn wait_any_event(&mut self) {
        let event = self.read();
        assert!(event.get("event").is_some(), "only events come unasked: {event}");
        self.events.push(event);
    }

    /// Waits for an event of that name whose data has `device` (or `id`, or `name`) as given, and returns its data.
    pub(crate) fn wait_event(&mut self, name: &str, job: &str) -> Value {
        let is_it = |event: &Value| {
            let data = &event["data"];
            event["event"] == name && ["device", "id", "name"].iter().any(|key| data[*key] == job)
        };
        loop {
            if let Some(at) = self.events.iter().position(is_it) {
                return self.events.remove(at)["data"].take();
            }
            let answer = self.read();
            assert!(answer.get("event").is_some(), "only events come unasked: {answer}");
            self.events.push(answer);
        }
    }
}

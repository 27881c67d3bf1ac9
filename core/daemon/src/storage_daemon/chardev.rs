//! `--chardev` and `--monitor`: where clients of the control protocol are.
//!
//! A chardev has one client at a time, as in QEMU: on a socket that listens, the next is taken when one has left. They are set up
//! when their option's turn comes, and monitors speak when all options are done.
//! Source: QEMU's qapi/char.json, `ChardevSocket`; chardev/char-socket.c for texts.

use super::keyval;
use crate::{daemon::Daemon, exports::reason, notify};
use driveline_engine::{
    inherited,
    net::{Listener, Stream, TcpListener, TcpStream, UnixListener, UnixStream},
    signal::Signals,
};
use driveline_qmp::Monitor;
use futures::future::{Either, select};
use serde_json::{Map, Value};
use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::Shutdown,
    os::{
        fd::OwnedFd,
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener as StdListener, UnixStream as StdStream},
    },
    path::PathBuf,
    pin::pin,
    sync::mpsc,
    time::Duration,
};

/// Kinds of QEMU's that are not for a storage daemon's monitors, or not yet for this one.
const REFUSED: [&str; 10] =
    ["pty", "file", "udp", "memory", "ringbuf", "parallel", "pipe", "mux", "serial", "hub"];
/// At the end, what is written to standard output may take so long.
const OUTPUT_WAIT: Duration = Duration::from_secs(1);

/// Chardevs by id, and the monitors on them.
#[derive(Debug)]
pub(super) struct Chardevs {
    all: BTreeMap<String, Chardev>,
    monitors: Vec<(Place, bool)>,
    has_stdio: bool,
    in_background: bool,
}

#[derive(Debug)]
struct Chardev {
    /// Until a monitor takes it.
    place: Option<Place>,
}

#[derive(Debug)]
enum Place {
    /// Clients come, one after the other; the first may be here already.
    Server(Listener, Option<Stream>),
    /// This is the client; connected, or to connect again after a time.
    Client {
        to: Option<Target>,
        stream: Option<Stream>,
        again: Option<Duration>,
    },
    Stdio,
    /// Nobody ever comes.
    Null,
}

/// Where a client connects to, or a server listens.
#[derive(Clone, Debug)]
enum Target {
    Unix(PathBuf),
    Abstract(String),
    Inet(String, String),
}

/// A monitor on standard input and output.
#[derive(Debug, Default)]
pub(super) struct Stdio {
    written: Option<mpsc::Receiver<()>>,
}

impl Stdio {
    /// Waits a little until all that was said is written.
    pub(super) fn finish(self) {
        if let Some(written) = self.written {
            let _ = written.recv_timeout(OUTPUT_WAIT);
        }
    }
}

impl Chardevs {
    /// None. In the background there are no standard streams.
    pub(super) fn new(in_background: bool) -> Self {
        Self { all: BTreeMap::new(), monitors: Vec::new(), has_stdio: false, in_background }
    }

    /// Sets one up. Waits for a client if it says so; `false` if a signal came instead, or only help was asked for.
    pub(super) fn add(&mut self, text: &str, daemon: &Daemon, signals: &mut Signals) -> Result<bool, String> {
        if ["help", "?"].contains(&text) {
            crate::commands::print("Available chardev backend types: \n  stdio\n  socket\n  null\n");
            return Ok(false);
        }
        let mut options = Options::read(text)?;
        let id = options.take("id").ok_or("chardev: no id specified")?;
        if !is_identifier(&id) {
            return Err("Parameter 'id' expects an identifier".into());
        }
        if self.all.contains_key(&id) {
            return Err(format!("Duplicate ID '{id}' for chardev"));
        }
        let kind = options.take("backend").ok_or_else(|| format!("chardev: \"{id}\" missing backend"))?;
        let place = match &*kind {
            "socket" => match socket(&mut options, daemon, signals)? {
                Some(place) => place,
                None => return Ok(false),
            },
            "stdio" => {
                if self.in_background {
                    return Err("cannot use stdio with -daemonize".into());
                }
                if std::mem::replace(&mut self.has_stdio, true) {
                    return Err("cannot use stdio by multiple character devices".into());
                }
                // A terminal sends signals as it always does.
                if options.switch("signal")? == Some(false) {
                    return Err("Parameter 'signal' does not accept value 'off'".into());
                }
                Place::Stdio
            }
            "null" => Place::Null,
            refused if REFUSED.contains(&refused) => {
                return Err(format!("the char driver '{refused}' is not supported"));
            }
            other => return Err(format!("'{other}' is not a valid char driver name")),
        };
        options.finish()?;
        self.all.insert(id, Chardev { place: Some(place) });
        Ok(true)
    }

    /// Puts a monitor on one.
    pub(super) fn monitor(&mut self, mut arguments: Map<String, Value>) -> Result<(), String> {
        let mut text = |key: &str| match arguments.shift_remove(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(format!("Invalid parameter type for '{key}', expected: string")),
        };
        let (chardev, mode, id) = (text("chardev")?, text("mode")?, text("id")?);
        let pretty = match arguments.shift_remove("pretty") {
            None => false,
            Some(Value::Bool(pretty)) => pretty,
            Some(_) => return Err("Invalid parameter type for 'pretty', expected: boolean".into()),
        };
        if let Some(key) = arguments.keys().next() {
            return Err(format!("Parameter '{key}' is unexpected"));
        }
        let chardev = chardev.ok_or("Parameter 'chardev' is missing")?;
        match mode.as_deref() {
            None | Some("control") => {}
            Some("readline") => return Err("Only QMP is supported".into()),
            Some(other) => return Err(format!("Parameter 'mode' does not accept value '{other}'")),
        }
        // A name that nothing refers to.
        drop(id);
        let found = self.all.get_mut(&chardev).ok_or_else(|| format!("chardev \"{chardev}\" not found"))?;
        let place = found.place.take().ok_or_else(|| format!("chardev '{chardev}' is already in use"))?;
        self.monitors.push((place, pretty));
        Ok(())
    }

    /// Lets all monitors speak.
    pub(super) fn serve(&mut self, daemon: &Daemon) -> Stdio {
        let mut stdio = Stdio::default();
        for (place, pretty) in std::mem::take(&mut self.monitors) {
            let place = match place {
                Place::Stdio => match pump() {
                    Ok((stream, written)) => {
                        stdio.written = Some(written);
                        Place::Client { to: None, stream: Some(stream), again: None }
                    }
                    Err(error) => {
                        tracing::error!("no monitor on standard input and output: {error}");
                        continue;
                    }
                },
                other => other,
            };
            let inner = daemon.inner();
            let monitor = inner.monitor().clone();
            inner.take_clients(&daemon.handle(), move || place.serve(monitor, pretty));
        }
        stdio
    }
}

impl Place {
    async fn serve(self, monitor: Monitor, pretty: bool) {
        match self {
            Place::Server(listener, first) => {
                if let Some(stream) = first {
                    session(&monitor, stream, pretty).await;
                }
                loop {
                    match listener.accept().await {
                        Ok(stream) => session(&monitor, stream, pretty).await,
                        Err(error) => {
                            tracing::warn!("accepting a monitor: {error}");
                            driveline_engine::sleep(Duration::from_millis(100)).await;
                        }
                    }
                }
            }
            Place::Client { to, mut stream, again } => loop {
                if let Some(stream) = stream.take() {
                    session(&monitor, stream, pretty).await;
                }
                let (Some(to), Some(again)) = (&to, again) else { return };
                driveline_engine::sleep(again).await;
                stream = to.connect().await.map_err(|error| tracing::debug!("{to}: {error}")).ok();
            },
            Place::Stdio | Place::Null => {}
        }
    }
}

/// As a task of its own, so that it says its last words even if nobody waits any more for the next client.
async fn session(monitor: &Monitor, stream: Stream, pretty: bool) {
    let (over, wait) = futures::channel::oneshot::channel::<()>();
    let monitor = monitor.clone();
    let task = async move {
        match pretty {
            true => monitor.pretty_session(stream).await,
            false => monitor.session(stream).await,
        }
        drop(over);
    };
    driveline_engine::spawn_local(task).detach();
    let _ = wait.await;
}

/// Standard input and output as a socket. Threads do it: what a terminal or pipe is shared with must not find it non-blocking.
fn pump() -> io::Result<(Stream, mpsc::Receiver<()>)> {
    let (ours, theirs) = StdStream::pair()?;
    let (mut input, mut output) = (ours.try_clone()?, ours);
    std::thread::Builder::new().name("stdin".into()).spawn(move || {
        // Errors end it, as the end of the input does.
        let _ = io::copy(&mut io::stdin().lock(), &mut input);
        let _ = input.shutdown(Shutdown::Write);
    })?;
    let (done, written) = mpsc::channel();
    std::thread::Builder::new().name("stdout".into()).spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count @ 1..) = output.read(&mut buffer) {
            let mut out = io::stdout().lock();
            if out.write_all(&buffer[..count]).and_then(|()| out.flush()).is_err() {
                break;
            }
        }
        let _ = output.shutdown(Shutdown::Both);
        drop(done);
    })?;
    Ok((theirs.try_into()?, written))
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Target::Unix(path) => write!(f, "{}", path.display()),
            Target::Abstract(name) => f.write_str(name),
            Target::Inet(host, port) => write!(f, "{host}:{port}"),
        }
    }
}

impl Target {
    async fn connect(&self) -> io::Result<Stream> {
        match self {
            Target::Unix(path) => UnixStream::connect(path).await,
            Target::Abstract(name) => {
                StdStream::connect_addr(&SocketAddr::from_abstract_name(name)?)?.try_into()
            }
            Target::Inet(host, port) => TcpStream::connect(inet(host, port)).await,
        }
    }

    fn listen(&self) -> io::Result<Listener> {
        match self {
            Target::Unix(path) => Ok(UnixListener::bind(path)?.into()),
            Target::Abstract(name) => {
                let listener = StdListener::bind_addr(&SocketAddr::from_abstract_name(name)?)?;
                Listener::inherited(OwnedFd::from(listener))
            }
            Target::Inet(host, port) => Ok(TcpListener::bind(inet(host, port))?.into()),
        }
    }
}

/// An empty host is every address of the machine.
fn inet(host: &str, port: &str) -> String {
    let host = if host.is_empty() { "0.0.0.0" } else { host };
    match host.contains(':') {
        true => format!("[{host}]:{port}"),
        false => format!("{host}:{port}"),
    }
}

/// `None`: a signal came while a client was waited for.
fn socket(options: &mut Options, daemon: &Daemon, signals: &mut Signals) -> Result<Option<Place>, String> {
    let server = options.switch("server")?.unwrap_or(false);
    let wait = options.switch("wait")?;
    let again = match (options.seconds("reconnect", 1000)?, options.seconds("reconnect-ms", 1)?) {
        (Some(_), Some(_)) => return Err("'reconnect' and 'reconnect-ms' are mutually exclusive".into()),
        (one, other) => one.or(other).filter(|time| !time.is_zero()),
    };
    if server && again.is_some() {
        return Err("'reconnect' option is incompatible with socket in server listen mode".into());
    }
    if !server && wait.is_some() {
        return Err("'wait' option is incompatible with socket in client connect mode".into());
    }
    // What only changes how a socket behaves, and not whom it reaches.
    options.switch("nodelay")?;
    options.switch("tight")?;
    let is_abstract = options.switch("abstract")? == Some(true);
    let (path, host, port, fd) =
        (options.take("path"), options.take("host"), options.take("port"), options.take("fd"));
    let target = match (path, host, port, fd) {
        (Some(path), None, _, None) if is_abstract => Target::Abstract(path),
        (Some(path), None, _, None) => Target::Unix(path.into()),
        (None, Some(host), Some(port), None) => Target::Inet(host, port),
        (None, Some(_), None, None) => return Err("chardev: socket: no port given".into()),
        (None, None, _, Some(fd)) => return passed(&fd, server, wait.unwrap_or(true), daemon, signals),
        (None, None, _, None) => {
            return Err("chardev: socket: one of 'path', 'host' and 'fd' is needed".into());
        }
        _ => return Err("None or one of 'path', 'fd' or 'host' option required.".into()),
    };
    if server {
        let listener = target.listen().map_err(|error| match &target {
            Target::Inet(..) => format!("Failed to find an available port: {}", reason(&error)),
            _ => format!("Failed to bind socket to {target}: {}", reason(&error)),
        })?;
        let named = match &target {
            Target::Inet(..) => format!("tcp:{target}"),
            _ => format!("unix:{target}"),
        };
        return waited(listener, &named, wait.unwrap_or(true), daemon, signals);
    }
    let connected = daemon.engine().block_on_local(|| async { target.connect().await });
    let stream = match (connected, again) {
        (Ok(stream), _) => Some(stream),
        // It is tried again when monitors speak.
        (Err(_), Some(_)) => None,
        (Err(error), None) => return Err(format!("Failed to connect to '{target}': {}", reason(&error))),
    };
    Ok(Some(Place::Client { to: Some(target), stream, again }))
}

/// A socket that was passed to the program: one that listens, for a server; one that is connected, for a client.
fn passed(
    fd: &str,
    server: bool,
    wait: bool,
    daemon: &Daemon,
    signals: &mut Signals,
) -> Result<Option<Place>, String> {
    if server {
        return waited(notify::socket(fd)?, &format!("fd:{fd}"), wait, daemon, signals);
    }
    let number = fd.parse().map_err(|_| format!("Unable to parse FD number {fd}"))?;
    let no_socket = |_: io::Error| format!("File descriptor '{fd}' is not a socket");
    let fd = inherited::take(number).map_err(no_socket)?;
    let stream = Stream::try_from(StdStream::from(fd)).map_err(no_socket)?;
    Ok(Some(Place::Client { to: None, stream: Some(stream), again: None }))
}

fn waited(
    listener: Listener,
    named: &str,
    wait: bool,
    daemon: &Daemon,
    signals: &mut Signals,
) -> Result<Option<Place>, String> {
    if !wait {
        return Ok(Some(Place::Server(listener, None)));
    }
    crate::commands::say(format_args!(
        "info: QEMU waiting for connection on: disconnected:{named},server=on"
    ));
    let first = daemon.engine().block_on_local(|| async {
        match select(pin!(listener.accept()), pin!(signals.next())).await {
            Either::Left((accepted, _)) => accepted.map(Some),
            Either::Right(_) => Ok(None),
        }
    });
    match first {
        Ok(Some(stream)) => Ok(Some(Place::Server(listener, Some(stream)))),
        Ok(None) => Ok(None),
        Err(error) => Err(format!("Failed to accept a connection: {}", reason(&error))),
    }
}

/// What a chardev was given.
struct Options(Vec<(String, String)>);

impl Options {
    fn read(text: &str) -> Result<Self, String> {
        Ok(Self(keyval::flat(text, "backend")))
    }

    /// The last of equal keys counts.
    fn take(&mut self, key: &str) -> Option<String> {
        let found = self.0.iter().rposition(|(known, _)| known == key)?;
        let (_, value) = self.0.remove(found);
        self.0.retain(|(known, _)| known != key);
        Some(value)
    }

    fn switch(&mut self, key: &str) -> Result<Option<bool>, String> {
        match self.take(key).as_deref() {
            None => Ok(None),
            Some("on") => Ok(Some(true)),
            Some("off") => Ok(Some(false)),
            Some(_) => Err(format!("Parameter '{key}' expects 'on' or 'off'")),
        }
    }

    fn seconds(&mut self, key: &str, unit_ms: u64) -> Result<Option<Duration>, String> {
        let Some(text) = self.take(key) else { return Ok(None) };
        let number = text.parse::<u32>().map_err(|_| format!("Parameter '{key}' expects a number"))?;
        Ok(Some(Duration::from_millis(u64::from(number) * unit_ms)))
    }

    fn finish(self) -> Result<(), String> {
        match self.0.first() {
            Some((key, _)) => Err(format!("Invalid parameter '{key}'")),
            None => Ok(()),
        }
    }
}

fn is_identifier(id: &str) -> bool {
    id.starts_with(|first: char| first.is_ascii_alphabetic())
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
}

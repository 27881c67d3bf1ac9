//! The server: sockets that accept connections, and a session on an engine thread for each.

use std::fmt;
use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use driveline_engine::net::{Listener, Stream, TcpListener, UnixListener};
use driveline_engine::{Handle, JoinHandle, sleep};
use driveline_graph::Root;
use driveline_op::{Answer, Ask, Buffer, Info};
use driveline_transport::ServerTls;
use parking_lot::Mutex;

use crate::authorize::Authorize;
use crate::export::{AddError, Export, Exports, Storage};
use crate::fault::Fault;
use crate::serve::{choose, choose_tls, transmit, transmit_tls};

/// After an accept that failed, for lack of descriptors say, this long nothing is accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// What is asked for as buffers of a unix socket; the system's limit is less. What it starts with is less than one answer of
/// 256 KiB, so that each would take two system calls and a wait. (TCP finds its own size, if it is left alone.)
const UNIX_SOCKET_BYTES: usize = 1 << 20;

impl Storage for Root {
    fn info(&self) -> Info {
        Root::info(self)
    }

    fn call(&self, ask: Ask, buffer: Buffer) -> impl Future<Output = Answer> {
        self.submit(ask, buffer)
    }
}

/// What a server allows its clients.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// A client has to choose an export within this time; zero: it may take for ever. Default: 10 s.
    pub handshake_limit: Duration,
    /// So many clients at once, later ones wait; zero: any number. Default: 100.
    pub connections_max: usize,
    /// When an export is removed, how long its clients may take to fetch the answers that they wait for. Default: 2 s.
    pub farewell: Duration,
    /// With it, clients have to upgrade to TLS before they are told of any export. Default: none, and who asks for TLS is refused.
    pub tls: Option<ServerTls>,
    /// Which of those that have upgraded may go on. Default: all. It counts together with
    /// [`ServerOptions::tls`] only, whose credentials have to ask clients for their certificates.
    pub authorize: Option<Authorize>,
}

impl Default for ServerOptions {
    fn default() -> Self {
        ServerOptions {
            handshake_limit: Duration::from_secs(10),
            connections_max: 100,
            farewell: Duration::from_secs(2),
            tls: None,
            authorize: None,
        }
    }
}

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A unix socket at this path.
    Unix(PathBuf),
    /// TCP.
    Tcp(SocketAddr),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "{}", path.display()),
            Address::Tcp(address) => write!(f, "{address}"),
        }
    }
}

/// Exports, and the sockets that offer them. Every socket offers all of them.
///
/// Each connection runs on one engine thread, the one that has the fewest. Dropping the server closes its sockets; clients that
/// are connected stay. [`Server::close`] ends them in good order.
pub struct Server<S = Root> {
    shared: Arc<Shared<S>>,
    listeners: Mutex<Vec<JoinHandle<()>>>,
}

struct Shared<S> {
    engine: Handle,
    options: ServerOptions,
    exports: Exports<S>,
    connections: Mutex<Connections>,
}

#[derive(Debug)]
struct Connections {
    /// By engine thread.
    counts: Vec<usize>,
    /// No new ones, and those in their handshake end.
    closing: bool,
    /// Who waits for a change.
    waiting: Vec<Waker>,
}

impl<S> fmt::Debug for Server<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shared { options, exports, connections, .. } = &*self.shared;
        f.debug_struct("Server")
            .field("options", options)
            .field("exports", exports)
            .field("connections", connections)
            .finish_non_exhaustive()
    }
}

impl<S: Storage> Server<S> {
    /// A server without sockets and exports, whose sessions will run on the threads of `engine`.
    pub fn new(engine: Handle, options: ServerOptions) -> Server<S> {
        let connections =
            Connections { counts: vec![0; engine.threads()], closing: false, waiting: Vec::new() };
        let shared =
            Shared { engine, options, exports: Exports::default(), connections: Mutex::new(connections) };
        Server { shared: Arc::new(shared), listeners: Mutex::default() }
    }

    /// Accepts connections on one more socket. Returns its address, in which a TCP port 0 has become a real one.
    ///
    /// Errors: the address is in use, or cannot be had for another reason.
    pub fn listen(&self, address: &Address) -> io::Result<Address> {
        self.accept_from(match address {
            Address::Unix(path) => UnixListener::bind(path)?.into(),
            Address::Tcp(address) => TcpListener::bind(address)?.into(),
        })
    }

    /// Accepts connections on a socket that listens already. Returns its address, as [`Server::listen`] does.
    pub fn accept_from(&self, listener: Listener) -> io::Result<Address> {
        let bound = match &listener {
            Listener::Unix(listener) => Address::Unix(listener.path().to_owned()),
            Listener::Tcp(listener) => Address::Tcp(listener.local_addr()?),
        };
        let shared = Arc::clone(&self.shared);
        let task = self.shared.engine.spawn_on(0, move || shared.accept_all(listener));
        tracing::info!(target: "driveline::nbd", address = %bound, "listening");
        self.listeners.lock().push(task);
        Ok(bound)
    }

    /// Serves `export` as `name` to whoever connects from now on. The empty name is the default export; a client that names
    /// none gets the only one, too, where there is just one.
    pub fn add_export(&self, name: &str, export: Export<S>) -> Result<(), AddError> {
        self.shared.exports.add(name, export)
    }

    /// Takes an export away: its clients get the answers that they wait for, and are disconnected. Returns when nothing
    /// of theirs is in its storage any more; `false` if there is no such export.
    ///
    /// To detach from a graph, keep a clone of the export's [`Root`] and close it afterwards.
    pub async fn remove_export(&self, name: &str) -> bool {
        let Some(removed) = self.shared.exports.remove(name) else { return false };
        let farewell = self.shared.options.farewell;
        // A task of its own: this may be awaited where there is no engine to wait with, and must not stop half-way.
        let task = self.shared.engine.spawn(async move {
            removed.finish();
            let in_time = within(farewell, removed.ended()).await.is_some();
            if !in_time {
                removed.cut();
                removed.ended().await;
            }
        });
        // Without an engine there are no sessions either.
        let _ = task.await;
        true
    }

    /// The exports.
    pub fn exports(&self) -> &Exports<S> {
        &self.shared.exports
    }

    /// Whether it is for clients of TLS only.
    pub fn is_tls(&self) -> bool {
        self.shared.options.tls.is_some()
    }

    /// How many clients are connected.
    pub fn connections(&self) -> usize {
        self.shared.connections.lock().counts.iter().sum()
    }

    /// The same by engine thread.
    pub fn connections_by_thread(&self) -> Vec<usize> {
        self.shared.connections.lock().counts.clone()
    }

    /// Closes the sockets, removes all exports as [`Server::remove_export`] does, and waits until every client is gone.
    pub async fn close(&self) {
        let listeners = std::mem::take(&mut *self.listeners.lock());
        for mut listener in listeners {
            listener.abort();
            // Until its socket is gone.
            let _ = listener.await;
        }
        self.shared.change(|connections| connections.closing = true);
        for name in self.shared.exports.names() {
            self.remove_export(&name).await;
        }
        self.shared.wait(|connections| connections.counts.iter().all(|count| *count == 0)).await;
    }
}

impl<S> Drop for Server<S> {
    fn drop(&mut self) {
        for mut listener in std::mem::take(&mut *self.listeners.lock()) {
            listener.abort();
        }
    }
}

impl<S: Storage> Shared<S> {
    /// The life of a socket.
    async fn accept_all(self: Arc<Self>, listener: Listener) {
        let most = match self.options.connections_max {
            0 => usize::MAX,
            most => most,
        };
        loop {
            self.wait(|connections| connections.counts.iter().sum::<usize>() < most).await;
            match listener.accept().await {
                Ok(stream) => {
                    // Meanwhile another socket may have had the last client.
                    let thread = self.room(most).await;
                    self.clone().begin(stream, thread);
                }
                Err(error) => {
                    tracing::warn!(target: "driveline::nbd", %error, "cannot accept a connection");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Waits until there are fewer connections than `most`, and counts one more on the thread that has the fewest.
    async fn room(&self, most: usize) -> usize {
        poll_fn(|cx| {
            let there_is = |connections: &Connections| connections.counts.iter().sum::<usize>() < most;
            loop {
                std::task::ready!(self.poll_wait(cx, there_is));
                let mut connections = self.connections.lock();
                if there_is(&connections) {
                    let counts = connections.counts.iter_mut().enumerate().rev();
                    let (thread, count) =
                        counts.min_by_key(|(_, count)| **count).expect("an engine has threads");
                    *count += 1;
                    return Poll::Ready(thread);
                }
            }
        })
        .await
    }

    /// Hands a connection to the thread that it counts on.
    fn begin(self: Arc<Self>, stream: Stream, thread: usize) {
        let engine = self.engine.clone();
        // Made here, so that it counts even if the engine refuses the task.
        let connected = Connected { shared: self, thread };
        engine.spawn_on(thread, move || connected.run(stream)).detach();
    }

    /// Changes something that somebody may wait for.
    fn change(&self, change: impl FnOnce(&mut Connections)) {
        let waiting = {
            let mut connections = self.connections.lock();
            change(&mut connections);
            std::mem::take(&mut connections.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }

    fn poll_wait(&self, cx: &Context<'_>, until: impl Fn(&Connections) -> bool) -> Poll<()> {
        let mut connections = self.connections.lock();
        if until(&connections) {
            return Poll::Ready(());
        }
        if !connections.waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            connections.waiting.push(cx.waker().clone());
        }
        Poll::Pending
    }

    async fn wait(&self, until: impl Fn(&Connections) -> bool) {
        poll_fn(|cx| self.poll_wait(cx, &until)).await;
    }
}

/// A connection that counts.
struct Connected<S: Storage> {
    shared: Arc<Shared<S>>,
    thread: usize,
}

impl<S: Storage> Connected<S> {
    async fn run(self, stream: Stream) {
        let shared = Arc::clone(&self.shared);
        let Shared { options, exports, .. } = &*shared;
        let peer = stream.peer();
        let tuned = match stream.is_tcp() {
            true => stream.set_keepalive(true),
            false => stream.set_buffer_sizes(UNIX_SOCKET_BYTES, UNIX_SOCKET_BYTES),
        };
        if let Err(error) = tuned {
            tracing::debug!(target: "driveline::nbd", peer, %error, "the socket stays as it is");
        }
        tracing::debug!(target: "driveline::nbd", peer, thread = self.thread, "connected");
        let too_long = async {
            match options.handshake_limit {
                Duration::ZERO => std::future::pending().await,
                limit => sleep(limit).await,
            }
        };
        let closing = shared.wait(|connections| connections.closing);
        let limit = either(too_long, closing);
        let name = peer.to_owned();
        // Two that are built apart: what one costs the other does not.
        match &options.tls {
            None => match choose(&stream, exports, limit).await {
                Ok(Some(chosen)) => {
                    let thread = chosen.thread();
                    self.on(thread, name, move || async move { transmit(&stream, chosen).await }).await;
                }
                ended => self.tell(&name, ended.map(drop)),
            },
            Some(tls) => match choose_tls(stream, exports, tls, options.authorize.as_ref(), limit).await {
                Ok(Some((stream, chosen))) => {
                    let thread = chosen.thread();
                    self.on(thread, name, move || async move { transmit_tls(&stream, chosen).await }).await;
                }
                ended => self.tell(&name, ended.map(drop)),
            },
        }
    }

    /// Runs a session to its end: here, or on the thread that its export wants it on. There it counts then.
    async fn on<F>(
        mut self,
        thread: Option<usize>,
        peer: String,
        session: impl FnOnce() -> F + Send + 'static,
    ) where
        F: Future<Output = Result<(), Fault>> + 'static,
    {
        let elsewhere = thread.filter(|thread| *thread != self.thread);
        match elsewhere {
            None => {
                let outcome = session().await;
                self.tell(&peer, outcome);
            }
            Some(thread) => {
                self.shared.change(|connections| {
                    connections.counts[self.thread] -= 1;
                    connections.counts[thread] += 1;
                });
                self.thread = thread;
                let engine = self.shared.engine.clone();
                let moved = move || async move {
                    tracing::debug!(target: "driveline::nbd", peer, thread, "moved");
                    let outcome = session().await;
                    self.tell(&peer, outcome);
                };
                engine.spawn_on(thread, moved).detach();
            }
        }
    }

    /// How a connection ended, for the log.
    fn tell(&self, peer: &str, outcome: Result<(), Fault>) {
        match outcome {
            Ok(()) => tracing::debug!(target: "driveline::nbd", peer, "disconnected"),
            Err(Fault::Io(error)) => {
                tracing::debug!(target: "driveline::nbd", peer, %error, "connection lost")
            }
            Err(Fault::HandshakeTimeout) if self.shared.connections.lock().closing => {}
            Err(fault) => {
                let because: Option<&dyn std::error::Error> = std::error::Error::source(&fault);
                tracing::warn!(target: "driveline::nbd", peer, %fault, because, "client disconnected");
            }
        }
    }
}

impl<S: Storage> Drop for Connected<S> {
    fn drop(&mut self) {
        self.shared.change(|connections| connections.counts[self.thread] -= 1);
    }
}

/// Whichever comes first.
async fn either(one: impl Future<Output = ()>, other: impl Future<Output = ()>) {
    let (mut one, mut other) = (pin!(one), pin!(other));
    poll_fn(|cx| match one.as_mut().poll(cx) {
        Poll::Ready(()) => Poll::Ready(()),
        Poll::Pending => other.as_mut().poll(cx),
    })
    .await;
}

/// The output of `future`, if it comes in time.
async fn within<T>(limit: Duration, future: impl Future<Output = T>) -> Option<T> {
    let (mut future, mut limit) = (pin!(future), pin!(sleep(limit)));
    poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(output) => Poll::Ready(Some(output)),
        Poll::Pending => limit.as_mut().poll(cx).map(|()| None),
    })
    .await
}

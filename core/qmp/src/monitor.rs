//! All monitors together: what they control, where they connect, and what they all hear of.

use crate::{
    checkpoints::{self, Views},
    command::{self, Done, Nothing},
    control::Control,
    error::Result,
    events::{self, Event, Reason},
    jobs,
    limiter::Limiter,
    objects::Objects,
    session::Session,
};
use driveline_engine::net::{Stream, TcpListener, UnixListener};
use driveline_graph::Graph;
use driveline_jobs::Jobs;
use futures::future::{join_all, select};
use parking_lot::Mutex;
use serde_json::Value;
use std::{
    fmt, io,
    pin::pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

/// As many connections at once; one more is refused.
const SESSIONS_MAX: usize = 64;
/// At the end a client has this long to read its last replies.
const CLOSE_WAIT: Duration = Duration::from_secs(1);

/// Controls a graph over QMP. Cheap to clone; all clones are the same.
#[derive(Clone)]
pub struct Monitor(Arc<Inner>);

pub(crate) struct Inner {
    graph: Graph,
    jobs: Jobs,
    control: Arc<dyn Control>,
    objects: Objects,
    sessions: Mutex<Vec<Arc<Session>>>,
    /// What happened before there was anybody to hear of it.
    before: Mutex<Vec<Value>>,
    limiter: Limiter,
    /// Views of checkpoints.
    views: Views,
    /// Monitors know that the program ends.
    ending: AtomicBool,
}

impl fmt::Debug for Monitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Monitor").field("sessions", &self.0.sessions.lock().len()).finish_non_exhaustive()
    }
}

/// Where clients connect.
#[derive(Debug)]
pub enum Listener {
    /// A unix socket.
    Unix(UnixListener),
    /// A TCP port. Whoever reaches it has full control.
    Tcp(TcpListener),
}

impl From<UnixListener> for Listener {
    fn from(listener: UnixListener) -> Self {
        Self::Unix(listener)
    }
}

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Self {
        Self::Tcp(listener)
    }
}

impl Listener {
    async fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Unix(listener) => listener.accept().await,
            Self::Tcp(listener) => listener.accept().await,
        }
    }
}

impl Monitor {
    /// Monitors for a graph and its jobs, in a program that does the rest.
    pub fn new(graph: Graph, jobs: Jobs, control: Arc<dyn Control>) -> Self {
        let (sessions, before, ending) = (Mutex::default(), Mutex::default(), AtomicBool::new(false));
        let objects = control.objects().unwrap_or_default();
        if let Err(error) = objects.keep_in(&graph) {
            tracing::error!("objects that drivers do not take: {error}");
        }
        let (limiter, views) = (Limiter::default(), Views::default());
        let inner = Inner { graph, jobs, control, objects, sessions, before, limiter, views, ending };
        let monitor = Self(Arc::new(inner));
        let weak = Arc::downgrade(&monitor.0);
        monitor.0.graph.on_event(move |event| {
            if let driveline_graph::Event::PastLost { node, message } = event
                && let Some(monitor) = Self::upgrade(&weak)
            {
                checkpoints::past_lost(&monitor, node, message);
            }
            if let Some(message) = events::of_graph(event)
                && let Some(monitor) = Self::upgrade(&weak)
            {
                monitor.tell(&message);
            }
        });
        let weak = Arc::downgrade(&monitor.0);
        monitor.0.jobs.on_event(move |event| {
            if let (Some(monitor), Some(message)) = (Self::upgrade(&weak), jobs::message(event)) {
                monitor.tell(&message);
            }
        });
        monitor
    }

    /// For whoever is not to keep it alive.
    pub(crate) fn downgrade(&self) -> Weak<Inner> {
        Arc::downgrade(&self.0)
    }

    pub(crate) fn upgrade(weak: &Weak<Inner>) -> Option<Self> {
        weak.upgrade().map(Self)
    }

    /// Takes connections, each as a task on the thread that this runs on. It does not end by itself.
    pub async fn serve(&self, listener: impl Into<Listener>) {
        let listener = listener.into();
        loop {
            match listener.accept().await {
                Ok(_) if self.0.sessions.lock().len() >= SESSIONS_MAX => {
                    tracing::warn!(target: "driveline::qmp", "there are {SESSIONS_MAX} monitors already");
                }
                Ok(stream) => {
                    let monitor = self.clone();
                    driveline_engine::spawn_local(async move { monitor.session(stream).await }).detach();
                }
                Err(error) => {
                    tracing::warn!(target: "driveline::qmp", %error, "accepting a monitor");
                    driveline_engine::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// Does one command, as a client's would be done: for a program whose command line says what commands say.
    ///
    /// Errors: those of the command. `quit` and the negotiation are a client's business, and do nothing here.
    pub async fn execute(&self, name: &str, arguments: Value) -> Result<Value> {
        command::execute(self, name, arguments).await
    }

    /// Serves one connection until it ends.
    pub async fn session(&self, stream: Stream) {
        self.serve_one(Session::new(stream, false)).await;
    }

    /// The same with line breaks in what it says, for people.
    pub async fn pretty_session(&self, stream: Stream) {
        self.serve_one(Session::new(stream, true)).await;
    }

    async fn serve_one(&self, session: Arc<Session>) {
        self.0.sessions.lock().push(session.clone());
        // Taken out again even if a command panics.
        let _listed = Listed(self, &session);
        session.run(self).await;
    }

    /// Tells all monitors of an event.
    pub fn emit(&self, event: &Event) {
        self.tell(&event.message());
    }

    /// Tells of an event that comes before anybody can be connected: the first client hears of it when it has negotiated.
    pub fn emit_to_first(&self, event: &Event) {
        self.0.before.lock().push(event.message());
    }

    /// A client has negotiated.
    pub(crate) fn greet(&self, session: &Session) {
        for event in std::mem::take(&mut *self.0.before.lock()) {
            session.notify(&event);
        }
    }

    pub(crate) fn tell_now(&self, event: &Value) {
        for session in self.sessions() {
            session.notify(event);
        }
    }

    /// Says why the program ends (unless `quit` was the reason, which has been said), waits a little until all clients
    /// have read that, and hangs up.
    pub async fn close(&self, reason: Reason) {
        if !self.0.ending.swap(true, Relaxed) {
            self.emit(&Event::Shutdown(reason));
        }
        let sessions = self.sessions();
        let written = pin!(join_all(sessions.iter().map(|session| session.written())));
        select(written, pin!(driveline_engine::sleep(CLOSE_WAIT))).await;
        sessions.iter().for_each(|session| session.hang_up());
    }

    fn sessions(&self) -> Vec<Arc<Session>> {
        self.0.sessions.lock().clone()
    }

    pub(crate) fn graph(&self) -> &Graph {
        &self.0.graph
    }

    pub(crate) fn views(&self) -> &Views {
        &self.0.views
    }

    pub(crate) fn limiter(&self) -> &Limiter {
        &self.0.limiter
    }

    pub(crate) fn jobs(&self) -> &Jobs {
        &self.0.jobs
    }

    pub(crate) fn control(&self) -> &dyn Control {
        &*self.0.control
    }

    pub(crate) fn objects(&self) -> &Objects {
        &self.0.objects
    }

    /// Does what `quit` asks for, once its reply is on its way.
    pub(crate) fn quit(&self) {
        if !self.0.ending.swap(true, Relaxed) {
            self.emit(&Event::Shutdown(Reason::Quit));
        }
        self.0.control.quit();
    }
}

struct Listed<'a>(&'a Monitor, &'a Arc<Session>);

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        self.0.0.sessions.lock().retain(|session| !Arc::ptr_eq(session, self.1));
    }
}

/// `quit`. The session does it when it has replied: see [`Monitor::quit`].
pub(crate) async fn quit(_: &Monitor, _: Nothing) -> Result<Done> {
    Ok(Done {})
}

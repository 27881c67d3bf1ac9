//! A running graph: started from a configuration as a whole, ended in good order.

use crate::{
    config::{BitmapSection, Config, DriveSection, Mistake, Mistakes},
    control, drivers,
    exports::{ExportView, Exports, NewExport},
    hung,
    journal::{Interrupted, Journals},
    logging, moved,
    runtime::EngineRuntime,
    stores::{Recovered, Stores},
};
use driveline_engine::{Engine, Handle, JoinHandle, net::Listener};
use driveline_graph::{Change, Error, Graph, GraphOptions, Kind, NewBitmap, Result};
use driveline_jobs::{HOLDER_DRIVER, Jobs};
use driveline_qmp::{Event, Monitor, Objects, Reason};
use driveline_transport::TlsRegistry;
use futures::future::{Either, pending, select};
use parking_lot::Mutex;
use std::{
    fmt,
    pin::pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant, SystemTime},
};

/// Why nothing was started.
#[derive(Debug)]
pub enum StartError {
    /// The configuration is wrong, or names what cannot be opened: every mistake with its place in the file.
    Config(Mistakes),
    /// The world is not as it should be.
    World(String),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StartError::Config(mistakes) => mistakes.fmt(f),
            StartError::World(message) => f.write_str(message),
        }
    }
}

impl std::error::Error for StartError {}

/// A graph with its jobs, exports and monitor, on an engine.
#[derive(Debug)]
pub struct Daemon {
    engine: Engine,
    inner: Arc<Inner>,
}

/// What monitors and signals share.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) graph: Graph,
    pub(crate) jobs: Jobs,
    /// What users create by name beside the graph: secrets, certificates, threads.
    pub(crate) objects: Objects,
    pub(crate) exports: Exports,
    /// What keeps persistent bitmaps.
    pub(crate) stores: Arc<Stores>,
    /// What is written down of jobs.
    pub(crate) journals: Arc<Journals>,
    /// What does commands, whoever they are from.
    monitor: OnceLock<Monitor>,
    /// Where clients of it are waited for.
    accepting: Mutex<Vec<JoinHandle<()>>>,
    /// Somebody wants the program to end.
    pub(crate) quit: Quit,
    /// What the program was started with.
    pub(crate) started: Mutex<Config>,
    /// One file is applied at a time.
    pub(crate) applying: async_lock::Mutex<()>,
    /// Interrupted jobs go on, and nobody is served yet.
    going_on: AtomicBool,
}

/// A bell that rings once.
#[derive(Debug, Default)]
pub(crate) struct Quit {
    rung: std::sync::atomic::AtomicBool,
    waiting: parking_lot::Mutex<Vec<std::task::Waker>>,
}

impl Quit {
    pub(crate) fn ring(&self) {
        self.rung.store(true, std::sync::atomic::Ordering::SeqCst);
        self.waiting.lock().drain(..).for_each(std::task::Waker::wake);
    }

    pub(crate) async fn heard(&self) {
        std::future::poll_fn(|cx| {
            self.waiting.lock().push(cx.waker().clone());
            match self.rung.load(std::sync::atomic::Ordering::SeqCst) {
                true => std::task::Poll::Ready(()),
                false => std::task::Poll::Pending,
            }
        })
        .await;
    }
}

impl Daemon {
    /// Starts what a configuration says. It has been read without mistakes. If anything fails, all of it is undone.
    pub fn start(config: &Config, mistakes: Mistakes) -> Result<Self, StartError> {
        Self::start_activated(config, mistakes, Vec::new(), pending::<()>)
    }

    /// The same, and serves on sockets that were `passed` to the program, too: on each, what is on the server of the export of its
    /// name; if no export has its name, of the first. Opening images may take for ever where a server does not answer, so `ended`
    /// gives that up.
    pub fn start_activated<F: Future<Output = ()>>(
        config: &Config,
        mut mistakes: Mistakes,
        passed: Vec<(String, Listener)>,
        ended: impl FnOnce() -> F + Send,
    ) -> Result<Self, StartError> {
        let (graph, tls) = graph_and_tls(config, &mut mistakes);
        config.check(&graph, &mut mistakes);
        if !mistakes.is_empty() {
            return Err(StartError::Config(mistakes));
        }
        let engine = start_engine(config).map_err(StartError::World)?;
        let jobs = Jobs::new(graph.clone(), Arc::new(EngineRuntime::new(engine.handle())));
        let objects = Objects::new(engine.handle().threads());
        control::load_certificates(&objects, &tls);
        let exports = Exports::new(engine.handle(), graph.clone(), tls);
        let stores = Stores::new(&graph).map_err(|error| StartError::World(error.to_string()))?;
        let journals = Journals::new(&graph, &stores);
        journals.configure(config);
        stores.set_journals(&journals);
        jobs.set_journal(journals.clone());
        let (monitor, accepting, quit, applying) = Default::default();
        let started = Mutex::new(config.clone());
        let (of_graph, of_jobs) = (graph.clone(), jobs.clone());
        let inner = Arc::new(Inner {
            graph,
            jobs,
            objects,
            exports,
            stores,
            journals,
            monitor,
            accepting,
            quit,
            started,
            applying,
            going_on: AtomicBool::new(false),
        });
        let program = Arc::new(control::Program(Arc::downgrade(&inner)));
        inner.monitor.get_or_init(|| Monitor::new(of_graph, of_jobs, program));
        let daemon = Self { engine, inner };
        match daemon
            .engine
            .block_on_local(|| daemon.inner.open(config, daemon.engine.handle(), passed, ended()))
        {
            Ok(()) => Ok(daemon),
            Err(error) => {
                drop(daemon.stop());
                Err(match config.locate(&error) {
                    Some(mistake) => {
                        mistakes.add(mistake);
                        StartError::Config(mistakes)
                    }
                    None => StartError::World(error.to_string()),
                })
            }
        }
    }

    /// The graph.
    pub fn graph(&self) -> &Graph {
        &self.inner.graph
    }

    /// The jobs.
    pub fn jobs(&self) -> &Jobs {
        &self.inner.jobs
    }

    /// What is served.
    pub fn exports(&self) -> Vec<ExportView> {
        self.inner.exports.list()
    }

    /// What became of the bitmaps that were found in stores and images.
    pub fn recovered(&self) -> Vec<Recovered> {
        self.inner.stores.reports()
    }

    /// Those that were found after a crash, for whoever started the program to tell people. What is found later goes to the log.
    pub(crate) fn to_tell(&self) -> Vec<Recovered> {
        self.inner.stores.to_tell()
    }

    /// What became of the jobs that were interrupted when the program ended the last time.
    pub fn interrupted(&self) -> Vec<Interrupted> {
        self.inner.journals.interrupted()
    }

    /// The engine's handle.
    pub fn handle(&self) -> Handle {
        self.engine.handle()
    }

    /// The engine that it runs on.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Does a command of the control protocol. Call it where no engine thread is.
    ///
    /// Errors: those of the command, in QEMU's words.
    pub fn execute(
        &self,
        command: &str,
        arguments: serde_json::Value,
    ) -> driveline_qmp::Result<serde_json::Value> {
        self.engine.block_on_local(|| self.inner.monitor().execute(command, arguments))
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }

    /// Is ready when a monitor says `quit`.
    pub async fn quit_asked(&self) {
        self.inner.quit.heard().await;
    }

    /// Ends everything in order: jobs are cancelled and bitmaps go home, clients get their last answers, images are
    /// closed. Returns the first error, after all has been tried.
    pub fn stop(self) -> Result<()> {
        let result = self.engine.block_on_local(|| self.inner.close());
        self.engine.shutdown();
        result
    }

    /// The same as a future, for those who wait for something else meanwhile. Afterwards only [`Daemon::stop`] is left.
    pub async fn close(&self) -> Result<()> {
        self.inner.close().await
    }
}

impl Inner {
    /// Jobs go on last: what fails afterwards would end them, and with them what they have written down.
    async fn open(
        self: &Arc<Self>,
        config: &Config,
        engine: Handle,
        passed: Vec<(String, Listener)>,
        ended: impl Future<Output = ()>,
    ) -> Result<()> {
        let listener = match &config.monitor {
            Some(address) => Some(control::bind(address.get_ref()).map_err(|error| {
                let message = format_args!("the monitor cannot listen on {}: {error}", address.get_ref());
                Error::new(Kind::of_errno(error.raw_os_error().unwrap_or_default()), message)
            })?),
            None => None,
        };
        let reserved =
            self.exports.reserve(config.exports.iter().map(|section| section.address.get_ref()))?;
        let mut ended = pin!(ended);
        match select(pin!(self.build(config)), ended.as_mut()).await {
            Either::Left((built, _)) => built?,
            Either::Right(_) => {
                return Err(Error::new(Kind::Busy, "it was ended while it opened its images"));
            }
        }
        // Before anything is written to an image that its drive has left.
        moved::refuse(config, &self.graph.layout())?;
        let found = self.stores.find(config).await?;
        let mut change = self.graph.change().await;
        for drive in &config.drives {
            let name = drive.name.get_ref();
            let there = |bitmap: &&BitmapSection| {
                found.iter().any(|(drive, found)| drive == name && found == bitmap.name.get_ref())
            };
            for bitmap in drive.bitmaps.iter().filter(|bitmap| !there(bitmap)) {
                change.add_bitmap(name, new_bitmap(bitmap))?;
            }
        }
        change.commit().await?;
        self.stores.begin(&engine).await;
        self.exports.hold();
        let exports =
            config.exports.iter().map(|section| (section.address.get_ref().clone(), NewExport::of(section)));
        self.exports.start(exports.collect(), reserved).await?;
        for (name, listener) in passed {
            let named = self.exports.list().into_iter().any(|export| export.id == name);
            self.exports.also_on(named.then_some(&*name), listener)?;
        }
        if let Either::Right(_) = select(pin!(self.restart_jobs()), ended).await {
            return Err(Error::new(Kind::Busy, "it was ended while it opened what interrupted jobs copy to"));
        }
        self.let_in()?;
        for report in self.stores.reports().iter().filter(|report| report.crashed) {
            self.monitor().emit_to_first(&Event::BitmapRecovered(control::recovered(report)));
        }
        if let Some(listener) = listener {
            let monitor = self.monitor().clone();
            self.take_clients(&engine, move || async move { monitor.serve(listener).await });
        }
        Ok(())
    }

    /// Lets jobs go on that were interrupted. To be done before anybody is served. What they copy to may be a server that does not
    /// answer: dropped meanwhile, it leaves those jobs as they were that did not go on yet.
    pub(crate) async fn restart_jobs(&self) {
        self.going_on.store(true, SeqCst);
        for report in self.journals.restart_all(&self.jobs).await {
            self.monitor().emit_to_first(&Event::JobInterrupted(control::interrupted(&report)));
        }
    }

    /// Serves, with the jobs that go on. Before that an end of the program leaves those as they were.
    pub(crate) fn let_in(&self) -> Result<()> {
        self.exports.let_in()?;
        self.going_on.store(false, SeqCst);
        Ok(())
    }

    /// Tells of interrupted jobs whose images have come now.
    pub(crate) async fn find_jobs(&self) {
        for report in self.journals.find_added().await {
            self.tell(&Event::JobInterrupted(control::interrupted(&report)));
        }
    }

    /// Makes the graph. Files that are locked are tried for a second: the kernel may give up the locks of a program that was
    /// killed only some time after it, and this may be the one that takes its place.
    async fn build(&self, config: &Config) -> Result<()> {
        const PATIENCE: Duration = Duration::from_secs(1);
        let deadline = Instant::now() + PATIENCE;
        loop {
            match build(config, &self.graph, |definition| definition, false).await {
                Err(error) if error.kind() == Kind::Busy && Instant::now() < deadline => {
                    driveline_engine::sleep(PATIENCE / 50).await;
                }
                built => return built,
            }
        }
    }

    /// What does commands.
    pub(crate) fn monitor(&self) -> &Monitor {
        self.monitor.get().expect("a daemon is started with one")
    }

    /// Runs what waits for monitors' clients, until the end.
    pub(crate) fn take_clients<F>(&self, engine: &Handle, serve: impl FnOnce() -> F + Send + 'static)
    where
        F: Future<Output = ()> + 'static,
    {
        self.accepting.lock().push(engine.spawn_on(0, serve));
    }

    /// Tells monitors of an event.
    pub(crate) fn tell(&self, event: &Event) {
        self.monitor().emit(event);
    }

    async fn close(&self) -> Result<()> {
        match select(pin!(self.close_in_order()), pin!(hung::cut(&self.graph))).await {
            Either::Left((closed, _)) => closed,
            Either::Right((never, _)) => match never {},
        }
    }

    /// Monitors hear of what happens here, so they go last; but no new ones come.
    async fn close_in_order(&self) -> Result<()> {
        for mut accepting in std::mem::take(&mut *self.accepting.lock()) {
            accepting.abort();
        }
        if self.going_on.load(SeqCst) && !self.jobs.list().is_empty() {
            // A start that fails would cancel them. What is written down is made for a kill, so this is one: the next start finds them.
            self.exports.close().await;
            self.journals.beat(SystemTime::now());
            return Ok(());
        }
        self.jobs.shutdown().await;
        for id in self.exports.close().await {
            self.tell(&Event::ExportDeleted { id });
        }
        let (remaining, saved) = self.stores.save().await;
        self.monitor().close(Reason::Signal).await;
        let closed = self.graph.close().await;
        // Files know what the images look like when those are closed.
        let put_away = self.stores.close_files(remaining);
        closed.and(saved).and(put_away)
    }
}

/// A graph without nodes that knows all drivers that `config` can use. Filters that it names and that cannot be used
/// are mistakes; others are only warned of.
pub(crate) fn graph_for(config: &Config, mistakes: &mut Mistakes) -> Graph {
    graph_and_tls(config, mistakes).0
}

/// The same, with the credentials that it names. What is wrong with those is a mistake, too.
fn graph_and_tls(config: &Config, mistakes: &mut Mistakes) -> (Graph, TlsRegistry) {
    let graph = Graph::new(GraphOptions { trace: logging::traces_requests() });
    let tls = TlsRegistry::default();
    for section in &config.tls {
        if let Err(error) = tls.add(section.name.get_ref(), &section.creds) {
            mistakes.add(Mistake::new(section.name.span(), error));
        }
    }
    drivers::register_builtin_with(&graph, &tls);
    let given: Vec<_> = config.plugins.iter().map(|path| path.get_ref().clone()).collect();
    let mut filters = drivers::load_filters(&given);
    drivers::register_filters(&graph, &mut filters);
    for (path, why) in &filters.refused {
        let place = config.plugins.iter().find(|given| given.get_ref() == path);
        let span = place.map(|place| place.span()).unwrap_or_default();
        mistakes.add(Mistake::new(span, format_args!("filters cannot be loaded from here: {why}")));
    }
    for warning in &filters.warnings {
        tracing::warn!("{warning}");
    }
    (graph, tls)
}

/// Starts the engine that the configuration asks for.
pub(crate) fn start_engine(config: &Config) -> Result<Engine, String> {
    let defaults = driveline_engine::Config::default();
    let threads = config.engine.threads.unwrap_or(defaults.threads);
    let wanted = driveline_engine::Config { threads, backend: config.engine.backend, ..defaults };
    Engine::start(wanted).map_err(|error| format!("the engine does not start: {error}"))
}

/// Makes the nodes and drives of a configuration, in one change. `edit` may alter definitions first. In a rehearsal its bitmaps
/// too, none of them persistent: else they come when it is known which of them are there already.
pub(crate) async fn build(
    config: &Config,
    graph: &Graph,
    edit: impl Fn(driveline_graph::Definition) -> driveline_graph::Definition,
    rehearsal: bool,
) -> Result<()> {
    let mut change = graph.change().await;
    let edits = stage(config, graph, &mut change, edit, rehearsal).await;
    change.commit_if(edits).await
}

async fn stage(
    config: &Config,
    graph: &Graph,
    change: &mut Change,
    edit: impl Fn(driveline_graph::Definition) -> driveline_graph::Definition,
    rehearsal: bool,
) -> Result<()> {
    change.set_directory(&config.directory);
    let definitions = config.definitions(graph)?.into_iter().map(edit).collect();
    change.add_nodes(definitions).await?;
    for drive in &config.drives {
        change.set_drive(drive.name.get_ref(), drive.root.get_ref())?;
    }
    for drive in &config.drives {
        if rehearsal {
            for bitmap in &drive.bitmaps {
                let new = NewBitmap { durability: None, ..new_bitmap(bitmap) };
                change.add_bitmap(drive.name.get_ref(), new)?;
            }
        } else {
            add_holder(change, drive).await?;
        }
    }
    Ok(())
}

/// Puts the permanent holder of a drive at its root, if it has one.
async fn add_holder(change: &mut Change, drive: &DriveSection) -> Result<()> {
    let name = drive.name.get_ref();
    if drive.permanent_holder {
        let mut holder = driveline_graph::Options::new();
        holder.insert("driver".into(), HOLDER_DRIVER.into());
        holder.insert("node-name".into(), format!("{name}-holder").into());
        change.insert_filter(holder, name).await.map_err(|error| {
            let why = format_args!("the permanent holder of drive '{name}': {error}");
            Error::new(Kind::Invalid, why).at(drive.root.get_ref())
        })?;
    }
    Ok(())
}

/// A bitmap of the configuration that is not there yet.
pub(crate) fn new_bitmap(bitmap: &BitmapSection) -> NewBitmap {
    NewBitmap {
        name: bitmap.name.get_ref().clone(),
        granularity: bitmap.granularity,
        view: bitmap.view,
        recording: bitmap.recording,
        durability: bitmap.durability,
    }
}

//! The list of jobs: started, listed, and steered by their ids.

use crate::{
    event::JobEvent,
    holder::Holders,
    job::{Common, Force, Job, JobInfo, JobKind},
    journal::Journal,
    state::{JobStatus, Verb},
};
use driveline_graph::{BoxFuture, Error, Graph, Kind, Result};
use event_listener::Event;
use parking_lot::{Mutex, RwLock};
use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

/// What jobs run on. The daemon's is the engine; tests bring their own.
pub trait Runtime: Send + Sync + 'static {
    /// Runs a future to its end, beside others.
    fn spawn(&self, future: BoxFuture<'static, ()>);
    /// The same on the thread that asks, if that is one that runs futures: for what is too short to be worth another one.
    fn spawn_here(&self, future: BoxFuture<'static, ()>) {
        self.spawn(future);
    }
    /// Is ready after that time.
    fn sleep(&self, time: Duration) -> BoxFuture<'static, ()>;
    /// The time since some moment in the past.
    fn now(&self) -> Duration;
}

type Listener = Box<dyn Fn(&JobEvent) + Send + Sync>;

/// Those who listen to jobs.
#[derive(Default)]
pub(crate) struct Listeners(RwLock<Vec<Listener>>);

impl Listeners {
    pub(crate) fn emit(&self, event: &JobEvent) {
        self.0.read().iter().for_each(|listener| listener(event));
    }
}

/// All jobs of a graph. Cheap to clone; all clones are the same list.
#[derive(Clone)]
pub struct Jobs(pub(crate) Arc<Inner>);

pub(crate) struct Inner {
    pub(crate) graph: Graph,
    pub(crate) runtime: Arc<dyn Runtime>,
    pub(crate) holders: Arc<async_lock::Mutex<Holders>>,
    pub(crate) listeners: Arc<Listeners>,
    journal: RwLock<Option<Arc<dyn Journal>>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    jobs: BTreeMap<String, Arc<Job>>,
    /// Nodes whose place a job counts on, and the job.
    claimed: BTreeMap<Arc<str>, String>,
    /// No job is started any more.
    ended: bool,
}

impl fmt::Debug for Jobs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.state.lock().jobs.keys()).finish()
    }
}

impl Jobs {
    /// No jobs, on a graph.
    pub fn new(graph: Graph, runtime: Arc<dyn Runtime>) -> Self {
        let (holders, listeners, journal, state) = Default::default();
        Self(Arc::new(Inner { graph, runtime, holders, listeners, journal, state }))
    }

    /// Writes jobs down from now on, so that they can go on when the program was killed. Without this they end with it.
    pub fn set_journal(&self, journal: Arc<dyn Journal>) {
        *self.0.journal.write() = Some(journal);
    }

    pub(crate) fn journal(&self) -> Option<Arc<dyn Journal>> {
        self.0.journal.read().clone()
    }

    /// The threads and the clock of the jobs.
    pub fn runtime(&self) -> Arc<dyn Runtime> {
        self.0.runtime.clone()
    }

    /// Hears of what happens to jobs. Called in the order of what happens; it must not wait.
    pub fn on_event(&self, listener: impl Fn(&JobEvent) + Send + Sync + 'static) {
        self.0.listeners.0.write().push(Box::new(listener));
    }

    /// All jobs, by id. One that is about to start is none yet.
    pub fn list(&self) -> Vec<JobInfo> {
        let jobs = self.0.state.lock().jobs.values().map(|job| job.info()).collect::<Vec<_>>();
        jobs.into_iter().filter(|job| job.status != JobStatus::Undefined).collect()
    }

    /// One job.
    pub fn get(&self, id: &str) -> Result<JobInfo> {
        Ok(self.find(id)?.info())
    }

    pub(crate) fn find(&self, id: &str) -> Result<Arc<Job>> {
        let state = self.0.state.lock();
        state
            .jobs
            .get(id)
            .cloned()
            .ok_or_else(|| Error::new(Kind::NotFound, format_args!("Job not found: '{id}'")))
    }

    /// Stops a job for a while. Its requests in flight end first.
    pub fn pause(&self, id: &str) -> Result<()> {
        self.find(id)?.verb(Verb::Pause, Force(false))
    }

    /// Undoes a pause, or goes on after an error that stopped the job.
    pub fn resume(&self, id: &str) -> Result<()> {
        self.find(id)?.verb(Verb::Resume, Force(false))
    }

    /// Ends a job without its result. The graph is then as before the job, and the bitmaps are at home. Without `force` one that is
    /// ready has copied all, and ends well; one that is paused is refused.
    pub fn cancel(&self, id: &str, force: bool) -> Result<()> {
        self.find(id)?.verb(Verb::Cancel, Force(force))
    }

    /// Brings a ready job to its end.
    pub fn complete(&self, id: &str) -> Result<()> {
        self.find(id)?.verb(Verb::Complete, Force(false))
    }

    /// Makes the result of a pending job take effect.
    pub fn finalize(&self, id: &str) -> Result<()> {
        self.find(id)?.verb(Verb::Finalize, Force(false))
    }

    /// Forgets a concluded job. When this returns its id is free.
    pub fn dismiss(&self, id: &str) -> Result<()> {
        let job = self.find(id)?;
        job.verb(Verb::Dismiss, Force(false))?;
        self.forget(&job);
        job.set_status(JobStatus::Null);
        Ok(())
    }

    /// Limits a job to so many bytes per second; 0: no limit.
    pub fn set_speed(&self, id: &str, bytes_per_second: u64) -> Result<()> {
        self.find(id)?.set_speed(bytes_per_second)
    }

    /// Waits until a job is over, one way or the other.
    pub async fn wait(&self, id: &str) -> Result<JobInfo> {
        let job = self.find(id)?;
        job.until_concluded().await;
        Ok(job.info())
    }

    /// Cancels all jobs, waits until they are over, and starts no more.
    pub async fn shutdown(&self) {
        let jobs: Vec<_> = {
            let mut state = self.0.state.lock();
            state.ended = true;
            state.jobs.values().cloned().collect()
        };
        for job in &jobs {
            let _ = job.verb(Verb::Cancel, Force(true)); // refused by those that are over already
        }
        for job in jobs {
            job.until_concluded().await;
        }
    }

    // ---- for the kinds of jobs

    /// Checks an id and gives the job its place in the list, with the nodes that it counts on.
    pub(crate) fn reserve(
        &self,
        common: Common,
        claims: &[Arc<str>],
        changed: &Arc<Event>,
    ) -> Result<Arc<Job>> {
        let mut state = self.0.state.lock();
        if state.ended {
            return Err(Error::new(Kind::Busy, "the program is ending; no job can be started"));
        }
        let id = common.id.clone();
        if !id.starts_with(|c: char| c.is_ascii_alphabetic())
            || !id.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
        {
            return Err(Error::new(Kind::Invalid, format_args!("Invalid job ID '{id}'")));
        }
        if state.jobs.contains_key(&id) {
            return Err(Error::new(Kind::Exists, format_args!("Job ID '{id}' already in use")));
        }
        if let Some((node, job)) = claims.iter().find_map(|node| Some((node, state.claimed.get(node)?))) {
            let message = format_args!("Node '{node}' is busy: block device is in use by job '{job}'");
            return Err(Error::new(Kind::Busy, message));
        }
        let job = Job::new(common, self.0.listeners.clone(), changed.clone());
        state.jobs.insert(id.clone(), job.clone());
        state.claimed.extend(claims.iter().map(|node| (node.clone(), id.clone())));
        Ok(job)
    }

    /// A reserved job counts on one more node, which is there for it alone.
    pub(crate) fn claim(&self, job: &Job, node: Arc<str>) {
        self.0.state.lock().claimed.insert(node, job.common.id.clone());
    }

    /// A reserved job is not started after all.
    pub(crate) fn unreserve(&self, job: &Job) {
        self.release(job);
        let jobs = &mut self.0.state.lock().jobs;
        // Its id may be another job's by now.
        if jobs.get(&job.common.id).is_some_and(|there| std::ptr::eq(&**there, job)) {
            jobs.remove(&job.common.id);
        }
        // A shutdown may wait for it.
        job.never_was();
    }

    /// The job's claims end: whoever hears that it is over may start the next one on the same nodes at once.
    pub(crate) fn release(&self, job: &Job) {
        self.0.state.lock().claimed.retain(|_, by| *by != job.common.id);
    }

    /// Nodes of chains that streams and commits work on, each with its job.
    pub(crate) fn chains(&self) -> Vec<(Arc<str>, String)> {
        let state = self.0.state.lock();
        let moves = |id: &str| {
            let kind = state.jobs.get(id).map(|job| job.common.kind);
            matches!(kind, Some(JobKind::Stream | JobKind::Commit))
        };
        let claimed = state.claimed.iter().filter(|(_, id)| moves(id));
        claimed.map(|(node, id)| (node.clone(), id.clone())).collect()
    }

    /// Whoever hears that the job is gone may use its id at once.
    pub(crate) fn forget(&self, job: &Job) {
        self.0.state.lock().jobs.remove(&job.common.id);
    }

    /// Has a shutdown begun?
    pub(crate) fn has_ended(&self) -> bool {
        self.0.state.lock().ended
    }
}

//! A job: its state, and how its user and its work talk to each other.

use crate::{
    copy::PieceError,
    event::JobEvent,
    journal::Kept,
    limit::SLICE,
    manager::{Listeners, Runtime},
    mirror::MirrorTop,
    record::JobRecord,
    state::{ErrorAction, IoStatus, JobStatus, OnError, Verb},
};
use driveline_graph::{Error, Kind, Result};
use event_listener::Event;
use parking_lot::Mutex;
use std::sync::{Arc, OnceLock};

/// `ECANCELED`.
const CANCELLED: i32 = 125;

/// The kinds of jobs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum JobKind {
    /// Data moves up, into the image on top.
    Stream,
    /// Data moves down, into a backing image.
    Commit,
    /// Data moves sideways, into another drive that follows.
    Mirror,
    /// Data as it was at one moment is put away.
    Backup,
    /// An image is made.
    Create,
    /// An image's options are changed.
    Amend,
}

impl JobKind {
    /// The name in QMP.
    pub fn name(self) -> &'static str {
        match self {
            JobKind::Stream => "stream",
            JobKind::Commit => "commit",
            JobKind::Mirror => "mirror",
            JobKind::Backup => "backup",
            JobKind::Create => "create",
            JobKind::Amend => "amend",
        }
    }

    /// Does it work on nodes? QEMU's `query-block-jobs`, `block-job-*` and `BLOCK_JOB_*` know only such jobs.
    pub fn is_block_job(self) -> bool {
        !matches!(self, JobKind::Create | JobKind::Amend)
    }
}

/// A job as it is shown.
#[derive(Clone, Debug)]
pub struct JobInfo {
    /// Its id.
    pub id: String,
    /// What it does.
    pub kind: JobKind,
    /// Where it is in its life.
    pub status: JobStatus,
    /// Work done, in bytes.
    pub current_progress: u64,
    /// Work to do in all, as far as is known.
    pub total_progress: u64,
    /// Why it failed, or that it was cancelled.
    pub error: Option<String>,
    /// Bytes per second; 0: no limit.
    pub speed: u64,
    /// It was paused, by its user or by an error.
    pub paused: bool,
    /// It is at work now.
    pub busy: bool,
    /// It can be completed.
    pub ready: bool,
    /// Has an error stopped it?
    pub io_status: IoStatus,
    /// Of a mirror: do guests' writes reach the target before they are answered, with nothing left to copy?
    pub actively_synced: Option<bool>,
    /// Its result takes effect by itself.
    pub auto_finalize: bool,
    /// It is forgotten by itself.
    pub auto_dismiss: bool,
    /// The drive or node that it was started on.
    pub device: String,
}

/// What a job is started with, whatever it does.
#[derive(Clone, Debug)]
pub(crate) struct Common {
    pub(crate) id: String,
    pub(crate) kind: JobKind,
    pub(crate) device: String,
    pub(crate) speed: u64,
    /// What becomes of errors of reads.
    pub(crate) on_source_error: OnError,
    /// What becomes of errors of writes.
    pub(crate) on_target_error: OnError,
    pub(crate) auto_finalize: bool,
    pub(crate) auto_dismiss: bool,
}

/// A job.
pub(crate) struct Job {
    pub(crate) common: Common,
    state: Mutex<State>,
    /// Shared by the jobs of a group, which wait for each other.
    changed: Arc<Event>,
    listeners: Arc<Listeners>,
    /// A mirror's filter, for `block-job-change`.
    pub(crate) mirror: OnceLock<MirrorTop>,
    /// What is written down of it.
    pub(crate) kept: OnceLock<Arc<Kept>>,
}

struct State {
    status: JobStatus,
    speed: u64,
    paused_by_user: bool,
    paused_by_error: bool,
    cancel: Option<Force>,
    /// Its user wants it to end without its effect, and to have copied all.
    end_softly: bool,
    complete: bool,
    finalize: bool,
    done: u64,
    total: u64,
    error: Option<Error>,
    io_status: IoStatus,
    actively_synced: Option<bool>,
}

impl State {
    /// An error that stops a job is a pause, too: the user resumes it.
    fn paused(&self) -> bool {
        self.paused_by_user || self.paused_by_error
    }
}

/// Is a cancel to end a ready job in any case?
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Force(pub(crate) bool);

/// Why a job's work ended early.
#[derive(Debug)]
pub(crate) enum Stopped {
    /// Its user wanted it.
    Cancelled,
    /// It failed.
    Failed(Error),
}

impl From<Error> for Stopped {
    fn from(error: Error) -> Self {
        Stopped::Failed(error)
    }
}

/// How a job ends that was cancelled, itself or with its group. The text is QEMU's.
pub(crate) fn cancelled() -> Error {
    Error::io_text(CANCELLED, "Operation canceled")
}

/// Is it the error of [`cancelled`]?
pub(crate) fn is_cancelled(error: &Error) -> bool {
    error.errno_code() == CANCELLED
}

impl Job {
    pub(crate) fn new(common: Common, listeners: Arc<Listeners>, changed: Arc<Event>) -> Arc<Self> {
        let state = State {
            status: JobStatus::Undefined,
            speed: common.speed,
            paused_by_user: false,
            paused_by_error: false,
            cancel: None,
            end_softly: false,
            complete: false,
            finalize: false,
            done: 0,
            total: 0,
            error: None,
            io_status: IoStatus::Ok,
            actively_synced: None,
        };
        Arc::new(Self {
            common,
            state: Mutex::new(state),
            changed,
            listeners,
            mirror: OnceLock::new(),
            kept: OnceLock::new(),
        })
    }

    pub(crate) fn info(&self) -> JobInfo {
        let state = self.state.lock();
        let Common { id, kind, device, auto_finalize, auto_dismiss, .. } = self.common.clone();
        JobInfo {
            id,
            kind,
            status: state.status,
            current_progress: state.done,
            total_progress: state.total,
            error: state.error.as_ref().map(Error::to_string),
            speed: state.speed,
            paused: state.paused(),
            busy: state.status == JobStatus::Running,
            ready: matches!(state.status, JobStatus::Ready | JobStatus::Standby),
            io_status: state.io_status,
            actively_synced: state.actively_synced,
            auto_finalize,
            auto_dismiss,
            device,
        }
    }

    pub(crate) fn emit(&self, event: JobEvent) {
        self.listeners.emit(&event);
    }

    // ---- what its user does

    /// Does a verb, if the job's state allows it.
    pub(crate) fn verb(&self, verb: Verb, force: Force) -> Result<()> {
        let mut state = self.state.lock();
        // It would wait until its user lets it go on. QEMU looks at this first, too.
        if verb == Verb::Cancel && !force.0 && state.paused() && state.status != JobStatus::Concluded {
            let id = &self.common.id;
            let message = format_args!("The block job for device '{id}' is currently paused");
            return Err(Error::new(Kind::Busy, message));
        }
        // An error at the very end stops it there.
        let stopped_at_end = state.status == JobStatus::Pending && state.paused_by_error;
        let may_resume = verb == Verb::Resume && stopped_at_end;
        if !state.status.allows(verb) && !may_resume {
            return Err(self.refusal(verb, state.status));
        }
        match verb {
            Verb::Pause if state.paused() => return Err(Error::new(Kind::Busy, "Job is already paused")),
            Verb::Pause => state.paused_by_user = true,
            Verb::Resume if !state.paused() => {
                return Err(Error::new(Kind::Invalid, "Can't resume a job that was not paused"));
            }
            Verb::Resume => {
                state.paused_by_user = false;
                state.paused_by_error = false;
                state.io_status = IoStatus::Ok;
            }
            // All is copied: a soft cancel ends the job as a success, but nothing takes the source's place.
            Verb::Cancel if !force.0 && matches!(state.status, JobStatus::Ready | JobStatus::Standby) => {
                state.end_softly = true;
            }
            Verb::Cancel => state.cancel = Some(force),
            Verb::Complete if state.end_softly => {
                let message = format_args!("Job '{}' cannot be completed", self.common.id);
                return Err(Error::new(Kind::Busy, message));
            }
            Verb::Complete => state.complete = true,
            Verb::Finalize => state.finalize = true,
            // Whoever asked does the rest.
            Verb::Dismiss => {}
            Verb::SetSpeed | Verb::Change => {}
        }
        drop(state);
        self.changed.notify(usize::MAX);
        if matches!(verb, Verb::Pause | Verb::Resume) {
            self.note(|record| record.paused = self.state.lock().paused_by_user);
        }
        Ok(())
    }

    /// Is the verb allowed now?
    pub(crate) fn check(&self, verb: Verb) -> Result<()> {
        let status = self.state.lock().status;
        if status.allows(verb) { Ok(()) } else { Err(self.refusal(verb, status)) }
    }

    fn refusal(&self, verb: Verb, status: JobStatus) -> Error {
        let (id, verb) = (&self.common.id, verb.name());
        let message = format_args!("Job '{id}' in state '{status}' cannot accept command verb '{verb}'");
        Error::new(Kind::Invalid, message)
    }

    pub(crate) fn set_speed(&self, speed: u64) -> Result<()> {
        self.verb(Verb::SetSpeed, Force(false))?;
        self.state.lock().speed = speed;
        self.changed.notify(usize::MAX);
        self.note(|record| record.args.set_speed(self.speed()));
        Ok(())
    }

    /// Writes down what its user changed, if it goes on after a restart.
    pub(crate) fn note(&self, change: impl FnOnce(&mut JobRecord)) {
        if let Some(kept) = self.kept.get() {
            kept.note(change);
        }
    }

    /// It begins paused: so its user left it before the program ended.
    pub(crate) fn pause_first(&self) {
        self.state.lock().paused_by_user = true;
    }

    // ---- what its work does

    pub(crate) fn set_status(&self, next: JobStatus) {
        let mut state = self.state.lock();
        let before = state.status;
        if before == next {
            return;
        }
        assert!(before.may_become(next), "job '{}' goes from {before} to {next}", self.common.id);
        state.status = next;
        drop(state);
        self.emit(JobEvent::StatusChange { id: self.common.id.clone(), status: next });
        self.changed.notify(usize::MAX);
    }

    /// It is not started after all, and nobody hears of it.
    pub(crate) fn never_was(&self) {
        self.state.lock().status = JobStatus::Null;
        self.changed.notify(usize::MAX);
    }

    pub(crate) fn speed(&self) -> u64 {
        self.state.lock().speed
    }

    pub(crate) fn set_total(&self, total: u64) {
        self.state.lock().total = total;
    }

    /// More turned out to be to do.
    pub(crate) fn add_total(&self, more: u64) {
        self.state.lock().total += more;
    }

    pub(crate) fn add_done(&self, bytes: u64) {
        let mut state = self.state.lock();
        state.done += bytes;
        state.total = state.total.max(state.done);
    }

    /// All is done.
    pub(crate) fn fill_up(&self) {
        let mut state = self.state.lock();
        state.done = state.total;
    }

    pub(crate) fn set_error(&self, error: Error) {
        self.state.lock().error = Some(error);
    }

    /// One more error, of what came after the first.
    pub(crate) fn add_error(&self, more: Error) {
        let mut state = self.state.lock();
        state.error = Some(match state.error.take() {
            Some(first) => Error::new(first.kind(), format_args!("{first}; {}", more.message())),
            None => more,
        });
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.state.lock().cancel.is_some()
    }

    pub(crate) fn wants_complete(&self) -> bool {
        self.state.lock().complete
    }

    /// To be completed, or to end without its effect.
    pub(crate) fn wants_end(&self) -> bool {
        let state = self.state.lock();
        state.complete || state.end_softly
    }

    pub(crate) fn set_synced(&self, synced: bool) {
        self.state.lock().actively_synced = Some(synced);
    }

    pub(crate) fn wants_pause(&self) -> bool {
        let state = self.state.lock();
        state.cancel.is_none() && state.paused()
    }

    /// Waits here while the job is paused. Call it with nothing in flight.
    pub(crate) async fn pause_point(&self) -> Result<(), Stopped> {
        if self.wants_pause() {
            let at_work = self.info().status;
            let paused = if at_work == JobStatus::Ready { JobStatus::Standby } else { JobStatus::Paused };
            self.set_status(paused);
            self.until(|state| state.cancel.is_some() || !state.paused()).await;
            self.set_status(at_work);
        }
        if self.is_cancelled() { Err(Stopped::Cancelled) } else { Ok(()) }
    }

    /// Decides about an error by the job's policy, tells of it, and pauses the job if that is the decision.
    pub(crate) fn on_io_error(&self, error: &driveline_op::Error, operation: &'static str) -> ErrorAction {
        let policy = match operation {
            "read" => self.common.on_source_error,
            _ => self.common.on_target_error,
        };
        let action = policy.action(error.code());
        let id = self.common.id.clone();
        self.emit(JobEvent::IoError { id, kind: self.common.kind, operation, action });
        if action == ErrorAction::Stop {
            let mut state = self.state.lock();
            state.paused_by_error = true;
            state.io_status = if error.code() == 28 { IoStatus::NoSpace } else { IoStatus::Failed };
        }
        action
    }

    /// Decides about an error at the very end of a job. If that stops it, it waits here until its user resumes it.
    ///
    /// Errors: the policy lets it fail with this one; or it was cancelled.
    pub(crate) async fn outlast(&self, failed: PieceError, runtime: &Arc<dyn Runtime>) -> Result<()> {
        match self.on_io_error(&failed.error, failed.operation) {
            ErrorAction::Report => return Err(failed.error.into()),
            // What fails at once would fail again at once.
            ErrorAction::Ignore => runtime.sleep(SLICE).await,
            ErrorAction::Stop => self.until(|state| state.cancel.is_some() || !state.paused()).await,
        }
        if self.is_cancelled() { Err(cancelled()) } else { Ok(()) }
    }

    /// Waits until something about the job changes that makes `happened` true.
    async fn until(&self, happened: impl Fn(&State) -> bool) {
        loop {
            let changed = self.changed.listen();
            if happened(&self.state.lock()) {
                return;
            }
            changed.await;
        }
    }

    /// Something that the user did: used to cut waits short.
    pub(crate) async fn user_acted(&self) {
        self.changed.listen().await;
    }

    pub(crate) fn wants_finalize(&self) -> bool {
        self.state.lock().finalize
    }

    /// Another job of its group has failed or was cancelled.
    pub(crate) fn cancel_with_group(&self) {
        self.state.lock().cancel.get_or_insert(Force(true));
        self.changed.notify(usize::MAX);
    }

    /// Waits until it is cancelled.
    pub(crate) async fn until_cancelled(&self) {
        loop {
            let changed = self.changed.listen();
            if self.is_cancelled() {
                return;
            }
            changed.await;
        }
    }

    pub(crate) async fn until_concluded(&self) {
        self.until(|state| matches!(state.status, JobStatus::Concluded | JobStatus::Null)).await;
    }
}

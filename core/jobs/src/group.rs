//! Groups: jobs that end together or not at all.
//!
//! ```text
//!   running ─▶ waiting ──(all are there)──▶ pending ──(finalized)──▶ one change of the graph ─▶ concluded
//!      └──────────┴────── one fails or is cancelled: all abort ─────────┴──────────▶ aborting ─▶ concluded
//! ```
//!
//! Every job is in a group, most of them alone. A job's result takes effect in the same change of the graph as those of
//! the others, while all drives that it touches are drained: nobody sees one without the other.
//!
//! Source: QEMU's `job.c`, `JobTxn`.

use crate::{
    copy::PieceError,
    event::JobEvent,
    holder::Holders,
    job::{self, Force, Job, Stopped, cancelled},
    manager::Jobs,
    record::Phase,
    state::{JobStatus, Verb},
};
use driveline_graph::{BoxFuture, Change, Error, Result};
use event_listener::Event;
use futures::future::{Either, pending, select, select_all};
use parking_lot::Mutex;
use std::{convert::Infallible, pin::pin, sync::Arc, time::Duration};

/// The first pause between two tries of cleaning up after a job; each is twice as long as the one before.
const CLEAN_UP_PAUSE: Duration = Duration::from_millis(50);
/// The longest: about three seconds in all.
const CLEAN_UP_PAUSE_MAX: Duration = Duration::from_millis(1600);

/// The work of one kind of job.
pub(crate) trait Work: Send + Sync + 'static {
    /// Does the work. On `Ok` the result can take effect.
    fn run<'a>(&'a self, job: &'a Arc<Job>) -> BoxFuture<'a, Result<(), Stopped>>;

    /// Does what is slow, like a flush, before the result takes effect.
    fn prepare<'a>(&'a self, _job: &'a Arc<Job>) -> BoxFuture<'a, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    /// Puts the job's end into a change, which others may have put theirs into already. It may be called again, with
    /// another end, when that change was not made.
    fn end<'a>(&'a self, job: &'a Arc<Job>, end: End, into: &'a mut Ending) -> BoxFuture<'a, Result<()>>;

    /// What of its own work kept the change from being made. Its policy decides whether that is tried again.
    fn take_fault(&self) -> Option<PieceError> {
        None
    }

    /// Nodes that the job put into the graph, and that its end takes out again.
    fn own_nodes(&self) -> Vec<Arc<str>> {
        Vec::new()
    }

    /// The change was made.
    fn ended(&self, _end: End) {}

    /// Does its end change the graph at all?
    fn changes_graph(&self) -> bool {
        true
    }
}

/// How a job ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Its result takes effect.
    Success,
    /// The graph becomes what it was before the job.
    Abort,
    /// The same, but images that were read-only before stay writable: to make one read-only has failed, because its disk
    /// fails, and that keeps no bitmap from home.
    AbortWritable,
}

impl End {
    pub(crate) fn is_success(self) -> bool {
        self == End::Success
    }

    /// Does an image that was read-only before the job become so again?
    pub(crate) fn restores_read_only(self) -> bool {
        self != End::AbortWritable
    }
}

/// A change that jobs put their ends into.
pub(crate) struct Ending {
    pub(crate) holders: Holders,
    pub(crate) change: Change,
}

/// A job in its group.
pub(crate) struct Member {
    pub(crate) job: Arc<Job>,
    pub(crate) work: Box<dyn Work>,
}

/// Jobs that end together.
pub(crate) struct Group {
    members: Vec<Member>,
    progress: Mutex<Progress>,
    changed: Arc<Event>,
}

#[derive(Default)]
struct Progress {
    waiting: usize,
    pending: usize,
    /// One has failed or was cancelled.
    broken: bool,
    /// It is too late to cancel.
    finalizing: bool,
    settled: Option<Result<()>>,
}

impl Group {
    /// `changed` is told whatever happens to any of them.
    pub(crate) fn new(members: Vec<Member>, changed: Arc<Event>) -> Arc<Self> {
        Arc::new(Self { members, progress: Mutex::default(), changed })
    }

    fn update(&self, update: impl FnOnce(&mut Progress)) {
        update(&mut self.progress.lock());
        self.changed.notify(usize::MAX);
    }

    /// Waits for `reached`. It is an error if the group breaks up before, or if this member is cancelled.
    async fn until(&self, job: &Job, reached: impl Fn(&Progress) -> bool) -> Result<(), Stopped> {
        loop {
            let changed = self.changed.listen();
            {
                let progress = self.progress.lock();
                if !progress.finalizing && (progress.broken || job.is_cancelled()) {
                    return Err(Stopped::Cancelled);
                }
                if reached(&progress) {
                    return Ok(());
                }
            }
            changed.await;
        }
    }

    /// All of them abort.
    fn break_up(&self) {
        let first = !std::mem::replace(&mut self.progress.lock().broken, true);
        if first {
            self.members.iter().for_each(|member| member.job.cancel_with_group());
        }
        self.changed.notify(usize::MAX);
    }

    /// From here on nobody can be cancelled; unless somebody was.
    fn begin_to_finalize(&self) -> bool {
        let mut progress = self.progress.lock();
        progress.finalizing = !progress.broken && !self.members.iter().any(|m| m.job.is_cancelled());
        progress.finalizing
    }
}

impl Jobs {
    /// Lets the jobs of a group run their lives. When this returns they can be seen and steered.
    pub(crate) fn let_live(&self, group: Arc<Group>) {
        for member in &group.members {
            member.job.set_status(JobStatus::Created);
            member.job.set_status(JobStatus::Running);
        }
        for (at, member) in group.members.iter().enumerate() {
            if self.has_ended() {
                // The shutdown came while the job could not be cancelled yet.
                let _ = member.job.verb(Verb::Cancel, Force(true));
            }
            let (jobs, group) = (self.clone(), group.clone());
            self.0.runtime.spawn(Box::pin(async move { jobs.live(&group, at).await }));
        }
    }

    async fn live(self, group: &Group, at: usize) {
        let Member { job, work } = &group.members[at];
        let result = match work.run(job).await {
            Ok(()) => self.settle(group, at).await,
            Err(stopped) => Err(stopped),
        };
        let result = match result {
            // What was in flight may fail because of that: a connection is cut, say.
            Err(Stopped::Failed(_)) if job.is_cancelled() => Err(Stopped::Cancelled),
            result => result,
        };
        let mut was_cancelled = matches!(result, Err(Stopped::Cancelled));
        if let Err(stopped) = result {
            job.set_error(match stopped {
                Stopped::Failed(error) => error,
                Stopped::Cancelled => cancelled(),
            });
            group.break_up();
            job.set_status(JobStatus::Aborting);
            if let Err(error) = self.abort(&group.members[at]).await {
                tracing::error!(job = job.common.id, "{error}");
                // It is not as if it never was, so nobody is told so.
                was_cancelled = false;
                job.add_error(error);
            }
        }
        // Whoever hears that it is over finds nothing of it after a restart.
        if let Some(kept) = job.kept.get() {
            kept.remove();
        }
        self.release(job);
        // Nor does the next job with its id, which they may start at once.
        if job.common.auto_dismiss {
            self.forget(job);
        }
        if job.common.kind.is_block_job() {
            let info = Box::new(job.info());
            job.emit(if was_cancelled { JobEvent::Cancelled(info) } else { JobEvent::Completed(info) });
        }
        // After that event, as in QEMU.
        job.set_status(JobStatus::Concluded);
        if job.common.auto_dismiss {
            job.set_status(JobStatus::Null);
        }
    }

    /// From the end of a member's work to the effect of all.
    async fn settle(&self, group: &Group, at: usize) -> Result<(), Stopped> {
        let (job, all) = (&group.members[at].job, group.members.len());
        if job.is_cancelled() {
            return Err(Stopped::Cancelled);
        }
        job.set_status(JobStatus::Waiting);
        group.update(|progress| progress.waiting += 1);
        group.until(job, |progress| progress.waiting == all).await?;
        job.set_status(JobStatus::Pending);
        if !job.common.auto_finalize {
            job.emit(JobEvent::Pending(Box::new(job.info())));
        }
        group.update(|progress| progress.pending += 1);
        group.until(job, |progress| progress.pending == all).await?;
        if group.members.iter().any(|member| !member.job.common.auto_finalize) {
            // One that is finalized finalizes all, as in QEMU.
            group.until(job, |_| group.members.iter().any(|m| m.job.wants_finalize())).await?;
        }
        if at == 0 {
            if !group.begin_to_finalize() {
                return Err(Stopped::Cancelled);
            }
            let settled = self.finalize_all(&group.members).await;
            group.update(|progress| progress.settled = Some(settled));
        }
        group.until(job, |progress| progress.settled.is_some()).await?;
        let settled = group.progress.lock().settled.clone();
        // All of them fail with the reason why their common change was not made.
        settled.unwrap_or(Ok(())).map_err(|error| match job::is_cancelled(&error) {
            true => Stopped::Cancelled,
            false => Stopped::Failed(error),
        })
    }

    /// Brings all members to their common end. One that is cancelled while another one waits for its user ends that wait, and all.
    async fn finalize_all(&self, members: &[Member]) -> Result<()> {
        let any_is_cancelled =
            select_all(members.iter().map(|member| Box::pin(member.job.until_cancelled())));
        let all_are_cancelled = async {
            any_is_cancelled.await;
            members.iter().for_each(|member| member.job.cancel_with_group());
            pending::<Infallible>().await
        };
        match select(pin!(self.try_to_finalize(members)), pin!(all_are_cancelled)).await {
            Either::Left((done, _)) => done,
            Either::Right((never, _)) => match never {},
        }
    }

    async fn try_to_finalize(&self, members: &[Member]) -> Result<()> {
        loop {
            for member in members {
                member.work.prepare(&member.job).await?;
                if members.iter().any(|member| member.job.is_cancelled()) {
                    return Err(cancelled());
                }
            }
            let Err(error) = self.end(members, End::Success).await else { return Ok(()) };
            let faults = members.iter().filter_map(|member| Some((&member.job, member.work.take_fault()?)));
            let faults: Vec<_> = faults.collect();
            if faults.is_empty() {
                return Err(error);
            }
            // It may take its time until they are tried again, and none of them is over until then.
            for kept in members.iter().filter_map(|member| member.job.kept.get()) {
                kept.warn(kept.set_phase(Phase::Working));
            }
            for (job, fault) in faults {
                job.outlast(fault, &self.0.runtime).await?;
            }
        }
    }

    /// Makes the graph what it was before a job. What stands in the way may pass, so it is tried for some seconds.
    ///
    /// Errors: why some of it stays, and what.
    async fn abort(&self, member: &Member) -> Result<()> {
        let (job, member) = (&member.job, std::slice::from_ref(member));
        let mut pause = CLEAN_UP_PAUSE;
        loop {
            let Err(error) = self.end(member, End::Abort).await else { return Ok(()) };
            tracing::error!(job = job.common.id, "cleaning up after a job: {error}");
            let Err(error) = self.end(member, End::AbortWritable).await else { return Ok(()) };
            if pause > CLEAN_UP_PAUSE_MAX {
                let layout = self.0.graph.layout();
                let mut stay = member[0].work.own_nodes();
                stay.retain(|node| layout.node(node).is_ok());
                let named: Vec<String> = stay.iter().map(|node| format!("'{node}'")).collect();
                let left = match named.is_empty() {
                    true => "none of its nodes stays".to_owned(),
                    false => format!("its nodes stay: {}", named.join(", ")),
                };
                let text = format_args!("cleaning up after it failed: {}; {left}", error.message());
                return Err(Error::new(error.kind(), text));
            }
            self.0.runtime.sleep(pause).await;
            pause *= 2;
        }
    }

    /// Ends jobs in one change, all of them or none.
    async fn end(&self, members: &[Member], end: End) -> Result<()> {
        if members.iter().any(|member| member.work.changes_graph()) {
            let mut holders = self.0.holders.lock_arc().await;
            let change = self.0.graph.change().await;
            let mut into = Ending { holders: holders.clone(), change };
            for member in members {
                member.work.end(&member.job, end, &mut into).await?;
            }
            // It is made, whatever becomes of nodes that are closed now.
            let _made = into.change.make().await?;
            *holders = into.holders;
        }
        members.iter().for_each(|member| member.work.ended(end));
        Ok(())
    }
}

//! Jobs start inside a change of the graph, together with whatever else the change does.
//!
//! ```text
//!   begin ─▶ stage a job ─▶ other edits of the change ─▶ stage another job ─▶ make ─▶ all of them live
//!      └─────────┴───────────────────┴────────────────────────┴──── given up, or an error: none of it ever was
//! ```
//!
//! What a job needs of the graph (its holder, its filter, its roots) is put into the change, and the job sees the graph
//! as the actions staged before it would have it. All drives are drained together when the change is made, so several jobs
//! on several drives begin at one moment.

use crate::{
    group::{Group, Member, Work},
    holder::{Holders, UsedHolder},
    job::{Common, Job},
    journal::FoundJob,
    manager::Jobs,
};
use async_lock::MutexGuardArc;
use driveline_graph::{Change, Error, Kind, Layout, Result};
use event_listener::Event;
use std::{collections::BTreeSet, fmt, sync::Arc};

/// How jobs that start together end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Completion {
    /// Each for itself.
    #[default]
    Individual,
    /// All of them together or none: see [`JobStatus::Waiting`](crate::JobStatus::Waiting).
    Grouped,
}

/// A change of the graph in which jobs start. Nothing of it is seen by anyone until [`Start::make`]; given up or dropped, it never
/// was.
///
/// While it lives no other change of the graph can be made, and no other job starts or ends.
pub struct Start {
    pub(crate) jobs: Jobs,
    /// As they are once the change is made.
    pub(crate) holders: Holders,
    committed: MutexGuardArc<Holders>,
    change: Option<Change>,
    staged: Vec<Member>,
    /// Reserved, but not staged yet.
    reserved: Option<Arc<Job>>,
    heard: BTreeSet<String>,
    /// The next job that is staged goes on with it.
    pub(crate) restarting: Option<FoundJob>,
    /// What the jobs tell each other by.
    changed: Arc<Event>,
}

impl fmt::Debug for Start {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ids = self.staged.iter().map(|member| &member.job.common.id);
        f.debug_struct("Start").field("jobs", &ids.collect::<Vec<_>>()).finish_non_exhaustive()
    }
}

impl Jobs {
    /// Begins a change in which jobs can start. It waits for the change before.
    pub async fn begin(&self) -> Start {
        // Always in this order: whoever has the change never waits for the holders.
        let committed = self.0.holders.lock_arc().await;
        let change = Some(self.0.graph.change().await);
        let holders = committed.clone();
        let (staged, reserved, heard, changed) = (Vec::new(), None, BTreeSet::new(), Arc::default());
        let restarting = None;
        Start { jobs: self.clone(), holders, committed, change, staged, reserved, heard, restarting, changed }
    }
}

impl Start {
    /// The change, for what else is to happen in it.
    pub fn change(&mut self) -> &mut Change {
        self.change.as_mut().expect("it is there until it is made")
    }

    /// Is it the first time that this change hears of it? For what reads the graph as it was, and must not come twice.
    pub fn is_first(&mut self, what: String) -> bool {
        self.heard.insert(what)
    }

    /// The graph as this change would have it so far.
    pub fn layout(&self) -> Layout {
        self.change.as_ref().expect("it is there until it is made").layout()
    }

    /// Makes the change, and lets all staged jobs live: when this returns they can be seen and steered. Their ids are in
    /// the order of staging.
    ///
    /// Errors: those of [`Change::make`]; then nothing of it ever was. Without jobs also those of [`Change::commit`].
    pub async fn make(self, completion: Completion) -> Result<Vec<String>> {
        let (ids, closed) = self.make_and_close(completion).await?;
        if ids.is_empty() {
            closed?;
        }
        Ok(ids)
    }

    /// As [`Start::make`], for who has to know whether the change was made: then there is the first error of a node that was
    /// closed afterwards, too.
    ///
    /// Errors: those of [`Change::make`]; then nothing of it ever was.
    pub async fn make_and_close(mut self, completion: Completion) -> Result<(Vec<String>, Result<()>)> {
        if let Err(error) = self.check_chains() {
            self.give_up().await;
            return Err(error);
        }
        let change = self.change.take().expect("it is made once");
        let made = change.make().await?;
        *self.committed = std::mem::take(&mut self.holders);
        let staged = std::mem::take(&mut self.staged);
        let ids: Vec<String> = staged.iter().map(|member| member.job.common.id.clone()).collect();
        let group = (completion == Completion::Grouped && ids.len() > 1).then(|| ids.join(" "));
        for kept in staged.iter().filter_map(|member| member.job.kept.get()) {
            kept.began(group.as_deref());
        }
        let groups = match completion {
            Completion::Grouped if !staged.is_empty() => vec![staged],
            _ => staged.into_iter().map(|member| vec![member]).collect(),
        };
        for group in groups {
            self.jobs.let_live(Group::new(group, self.changed.clone()));
        }
        Ok((ids, made.closed))
    }

    /// Makes the change with its jobs, each for itself, if all was staged well; else gives it up, and returns what went wrong.
    pub async fn make_if<E: From<Error>>(
        self,
        staged: std::result::Result<(), E>,
    ) -> std::result::Result<Vec<String>, E> {
        match staged {
            Ok(()) => Ok(self.make(Completion::Individual).await?),
            Err(error) => {
                self.give_up().await;
                Err(error)
            }
        }
    }

    /// Ends a change that is not to be made, as [`Change::give_up`]: none of its jobs ever was.
    pub async fn give_up(mut self) {
        if let Some(change) = self.change.take() {
            change.give_up().await;
        }
    }

    /// A stream or commit counts its layers from the top of the chain: another image between them would hide some from it, and
    /// its end would drop them. Filters may come and go.
    fn check_chains(&self) -> Result<()> {
        let chains = self.jobs.chains();
        if chains.is_empty() {
            return Ok(());
        }
        let (was, is) = (self.jobs.0.graph.layout(), self.layout());
        let below = |layout: &Layout, node: &str| {
            let chain = layout.chain(node).ok()?;
            Some(chain.get(1).map(|node| node.id()))
        };
        for (node, job) in chains {
            let own = self.staged.iter().any(|member| member.job.common.id == job);
            if let (false, Some(was), Some(is)) = (own, below(&was, &node), below(&is, &node))
                && was != is
            {
                let message = format_args!("Node '{node}' is busy: its backing is in use by job '{job}'");
                return Err(Error::new(Kind::Busy, message));
            }
        }
        Ok(())
    }

    /// As [`Start::make_if`], with one job in it.
    pub(crate) async fn make_one<T>(self, staged: Result<T>) -> Result<String> {
        let none = || Error::new(Kind::Invalid, "no job was staged");
        self.make_if(staged.map(drop)).await?.pop().ok_or_else(none)
    }

    // ---- for the kinds of jobs

    /// Checks an id and reserves it, with the nodes that the job counts on. [`Start::stage`] must follow, or the job never was.
    pub(crate) fn reserve(&mut self, common: Common, claims: &[Arc<str>]) -> Result<Arc<Job>> {
        if let Some(job) = self.reserved.take() {
            if let Some(kept) = job.kept.get().filter(|kept| !kept.is_restart) {
                kept.remove();
            }
            self.jobs.unreserve(&job);
        }
        let job = self.jobs.reserve(common, claims, &self.changed)?;
        self.reserved = Some(job.clone());
        Ok(job)
    }

    /// Parks the bitmaps of the drive that a node belongs to, if it has any: see [`Holders::park`].
    pub(crate) async fn park(&mut self, node: &str, holder_name: Option<&str>) -> Result<Option<UsedHolder>> {
        let Some(drive) = self.layout().drive_of(node) else { return Ok(None) };
        let change = self.change.as_mut().expect("it is there until it is made");
        self.holders.park(change, &drive, holder_name).await
    }

    /// The reserved job will live once the change is made. Returns its id.
    pub(crate) fn stage(&mut self, work: impl Work) -> String {
        let job = self.reserved.take().expect("a job is reserved before it is staged");
        let id = job.common.id.clone();
        self.staged.push(Member { job, work: Box::new(work) });
        id
    }
}

impl Drop for Start {
    fn drop(&mut self) {
        let staged = self.staged.drain(..).map(|member| member.job);
        for job in staged.chain(self.reserved.take()) {
            // What was found stays for the next attempt.
            if let Some(kept) = job.kept.get().filter(|kept| !kept.is_restart) {
                kept.remove();
            }
            self.jobs.unreserve(&job);
        }
    }
}

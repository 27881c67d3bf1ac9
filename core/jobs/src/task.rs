//! Jobs that are a future with progress, and touch no node: images that are made or changed.

use crate::{
    group::{End, Ending, Work},
    job::{Common, Job, JobKind, Stopped},
    manager::Jobs,
    start::Start,
    state::OnError,
};
use driveline_graph::{BoxFuture, Result};
use parking_lot::Mutex;
use std::sync::Arc;

/// What a task tells of itself while it runs.
#[derive(Clone)]
pub struct TaskProgress(Arc<Job>);

impl std::fmt::Debug for TaskProgress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("TaskProgress").field(&self.0.common.id).finish()
    }
}

impl TaskProgress {
    /// How much there is to do, in bytes, or in whatever is counted.
    pub fn set_total(&self, total: u64) {
        self.0.set_total(total);
    }

    /// So much more of it is done.
    pub fn add_done(&self, done: u64) {
        self.0.add_done(done);
    }
}

type Body = Box<dyn FnOnce(TaskProgress) -> BoxFuture<'static, Result<()>> + Send>;

struct Task(Mutex<Option<Body>>);

impl Jobs {
    /// Runs a future as a job: it finalizes by itself, and its user dismisses it. A cancel shows at its end, as with
    /// QEMU's jobs of these kinds: what it made stays.
    ///
    /// Errors: an id that is taken, or that cannot be one. Those of the future are the job's.
    pub async fn run_task<F>(&self, kind: JobKind, id: &str, task: F) -> Result<()>
    where
        F: FnOnce(TaskProgress) -> BoxFuture<'static, Result<()>> + Send + 'static,
    {
        let mut start = self.begin().await;
        let staged = start.task(kind, id, task);
        start.make_one(staged).await.map(drop)
    }
}

impl Start {
    /// As [`Jobs::run_task`], once the change is made.
    pub fn task<F>(&mut self, kind: JobKind, id: &str, task: F) -> Result<String>
    where
        F: FnOnce(TaskProgress) -> BoxFuture<'static, Result<()>> + Send + 'static,
    {
        let common = Common {
            id: id.to_owned(),
            kind,
            device: String::new(),
            speed: 0,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
            auto_finalize: true,
            auto_dismiss: false,
        };
        self.reserve(common, &[])?;
        Ok(self.stage(Task(Mutex::new(Some(Box::new(task))))))
    }
}

impl Work for Task {
    fn run<'a>(&'a self, job: &'a Arc<Job>) -> BoxFuture<'a, Result<(), Stopped>> {
        let body = self.0.lock().take();
        Box::pin(async move {
            if let Some(body) = body {
                job.set_total(1);
                body(TaskProgress(job.clone())).await?;
                job.fill_up();
            }
            if job.is_cancelled() { Err(Stopped::Cancelled) } else { Ok(()) }
        })
    }

    fn end<'a>(&'a self, _: &'a Arc<Job>, _: End, _: &'a mut Ending) -> BoxFuture<'a, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn changes_graph(&self) -> bool {
        false
    }
}

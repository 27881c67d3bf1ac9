use super::*;
use crate::{
    job::{Common, Force, JobKind},
    state::{JobStatus, OnError, Verb},
};
use event_listener::Event;
use futures::{FutureExt, future::Shared};
use std::{
    sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst},
    task::{Context, Waker},
    time::Duration,
};

/// Tasks wait until the test lets them run.
#[derive(Default)]
struct Waiting(Mutex<Vec<BoxFuture<'static, ()>>>);

impl Runtime for Waiting {
    fn spawn(&self, future: BoxFuture<'static, ()>) {
        self.0.lock().push(future);
    }
    fn sleep(&self, _: Duration) -> BoxFuture<'static, ()> {
        Box::pin(async {})
    }
    fn now(&self) -> Duration {
        Duration::ZERO
    }
}

/// Short pieces without an end. None is copied before all may be.
struct Endless {
    at: AtomicU64,
    begun: AtomicUsize,
    go: Shared<oneshot::Receiver<()>>,
}

impl Source for Endless {
    fn next(&self) -> BoxFuture<'_, Result<Next, PieceError>> {
        let at = self.at.fetch_add(4096, SeqCst);
        Box::pin(async move { Ok(Next::Piece(at..at + 4096)) })
    }
    fn copy(self: Arc<Self>, _: Range<u64>) -> BoxFuture<'static, Result<(), PieceError>> {
        self.begun.fetch_add(1, SeqCst);
        let go = self.go.clone();
        Box::pin(async move { go.await.map_err(|_| PieceError::writing(Error::IO)) })
    }
    fn retries(&self) -> bool {
        true
    }
    /// Two in one task.
    fn task_bytes_max(&self) -> u64 {
        8192
    }
    fn in_flight_max(&self) -> usize {
        2
    }
}

fn job() -> Arc<Job> {
    let common = Common {
        id: "j".into(),
        kind: JobKind::Mirror,
        device: "vda".into(),
        speed: 0,
        on_source_error: OnError::Report,
        on_target_error: OnError::Report,
        auto_finalize: true,
        auto_dismiss: true,
    };
    let job = Job::new(common, Arc::default(), Arc::new(Event::new()));
    job.set_status(JobStatus::Created);
    job.set_status(JobStatus::Running);
    job
}

/// Pieces that were gathered for a task were still begun after a cancel, and the end waited for them as well.
#[test]
fn a_cancelled_job_begins_nothing_more() {
    let (tell, go) = oneshot::channel();
    let source = Arc::new(Endless { at: AtomicU64::new(0), begun: AtomicUsize::new(0), go: go.shared() });
    let (job, waiting) = (job(), Arc::new(Waiting::default()));
    let runtime: Arc<dyn Runtime> = waiting.clone();
    let mut cx = Context::from_waker(Waker::noop());
    let mut run = pin!(run(&job, &runtime, source.clone()));
    assert!(run.as_mut().poll(&mut cx).is_pending());
    let mut tasks = std::mem::take(&mut *waiting.0.lock());
    assert_eq!(tasks.len(), 2, "as many as may be in flight");
    assert_eq!(source.at.load(SeqCst), 5 * 4096, "and a piece is gathered for the next");
    job.verb(Verb::Cancel, Force(true)).unwrap();
    tell.send(()).unwrap();
    let mut outcome = None;
    while outcome.is_none() {
        tasks.retain_mut(|task| task.as_mut().poll(&mut cx).is_pending());
        outcome = (&mut run).now_or_never();
        let new = std::mem::take(&mut *waiting.0.lock());
        assert!(new.is_empty(), "a task was begun after the cancel");
    }
    assert!(matches!(outcome, Some(Err(Stopped::Cancelled))));
    assert_eq!(source.begun.load(SeqCst), 4);
}

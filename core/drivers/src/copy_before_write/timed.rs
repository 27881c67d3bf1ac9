//! Copies that a write waits for only so long: each is a task of its own, which nobody drops.
//!
//! ```text
//!   write ─▶ task: read the old data, write it to the target ─▶ told ─▶ the write goes on
//!              │                                   cbw-timeout ─▶ the write is answered as `on-cbw-error` says
//!              └─ goes on; a drain of the node, and its close, wait for it
//! ```
//!
//! To drop a copy would be to wait for it: a disk that hangs still has the buffer, and a thread that waits for it serves
//! nobody.

use super::{
    copy::Failure,
    state::{CopyBeforeWrite, Side},
};
use driveline_graph::{BoxFuture, OpenChild};
use driveline_op::{Ask, Body, Buffer, CacheRequest, Call, Edge, Error, Instance, Next, OpTable, Target, op};
use event_listener::Event;
use futures::{
    channel::oneshot,
    future::{Either, select},
};
use parking_lot::Mutex;
use std::{
    ops::Range,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

/// The tasks of a node.
#[derive(Default)]
pub(super) struct Copies {
    /// A task is a request of its own on the children that the node has when it begins. It holds their wiring, as a request
    /// from outside does.
    edge: Mutex<Option<Edge>>,
    running: Arc<Running>,
}

#[derive(Default)]
struct Running {
    count: AtomicUsize,
    ended: Event,
}

/// One task.
struct Task(Arc<Running>);

impl Running {
    fn begin(self: &Arc<Self>) -> Task {
        self.count.fetch_add(1, SeqCst);
        Task(self.clone())
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        if self.0.count.fetch_sub(1, SeqCst) == 1 {
            self.0.ended.notify(usize::MAX);
        }
    }
}

/// What a task asks of the node: the copy of a range, before it is overwritten.
struct Copier(Arc<CopyBeforeWrite>);

static COPIER: OpTable<Copier> = OpTable::new().cache(Copier::cache);

impl Copier {
    async fn cache(&self, next: &mut Next<'_>, request: &CacheRequest<'_>) -> driveline_op::Result<()> {
        let copied = self.0.copy_for_write(next, request.range()).await;
        copied.map_err(|Failure(side, error)| {
            tracing::debug!(?side, "a copy before a write: {error}");
            error
        })
    }
}

impl Copies {
    /// Later tasks use these children.
    pub(super) fn wire(&self, cookie: u64, state: &Arc<CopyBeforeWrite>, children: &[OpenChild]) {
        let edges: Vec<Edge> = children.iter().map(|child| child.edge.clone()).collect();
        let Some(info) = edges.first().map(|file| *file.info()) else { return };
        let copier = Arc::new(Body { cookie, driver: Copier(state.clone()) });
        let target = Target::new(Instance::new(copier, &COPIER), edges);
        *self.edge.lock() = Some(Edge::to(info, &target));
    }

    /// The node is closed.
    pub(super) fn unwire(&self) {
        *self.edge.lock() = None;
    }

    /// Is ready when no task is left; `None`: there is none.
    pub(super) fn own_work(&self) -> Option<BoxFuture<'static, ()>> {
        let running = self.running.clone();
        if running.count.load(SeqCst) == 0 {
            return None;
        }
        Some(Box::pin(async move {
            loop {
                let ended = running.ended.listen();
                if running.count.load(SeqCst) == 0 {
                    return;
                }
                ended.await;
            }
        }))
    }

    /// Copies a range, of whole clusters, and waits for it as long as the settings say.
    ///
    /// Errors: the copy failed, or goes on without the caller.
    pub(super) async fn copy_in_time(
        &self,
        state: &Arc<CopyBeforeWrite>,
        range: Range<u64>,
    ) -> Result<(), Failure> {
        let failed = |error| Err(Failure(Side::Target, error));
        let Some(edge) = self.edge.lock().clone() else { return failed(Error::IO) };
        let ask =
            Ask { op: op::CACHE, offset: range.start, length: range.end - range.start, ..Ask::default() };
        let (tell, told) = oneshot::channel();
        let task = self.running.begin();
        // On this thread, so that it is none the slower for being a task.
        let copy = async move {
            let answer = Call::new(edge, ask, Buffer::default()).await;
            // First: who hears of the end may drain the node.
            drop(task);
            drop(tell.send(answer.result));
        };
        driveline_engine::spawn_local(copy).detach();
        let enough = async {
            // Once the point in time is lost there is nothing to wait for.
            let (late, lost) = (pin!(driveline_engine::sleep(state.settings.timeout)), pin!(state.lost()));
            select(late, lost).await;
        };
        match select(told, pin!(enough)).await {
            Either::Left((Ok(Ok(())), _)) => Ok(()),
            Either::Left((Ok(Err(error)), _)) => failed(error),
            // The engine is shut down.
            Either::Left((Err(_), _)) => failed(Error::IO),
            Either::Right(_) => failed(Error::new(110, "the copy takes too long")),
        }
    }
}

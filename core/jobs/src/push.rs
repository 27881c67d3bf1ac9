//! Copying what a bitmap says from one node to another while guests write to the first: commit and mirror.
//!
//! The bitmap is on the node that is read. A guest's write marks it before it is done, and a piece's bits are cleared before
//! it is read, while no write is under way there: so whatever is clean is the same on both sides, or is being copied just
//! now. What a guest writes while its piece is copied is marked again, and copied again; it waits for no target, however slow
//! that is. Only where the guest's writes go to the target as well, piece and write exclude each other to the end.

use crate::{
    copy::{self, Buffers, Next, PIECE_BYTES_MAX, PieceError, Source},
    event::JobEvent,
    job::{Job, Stopped},
    manager::Runtime,
    safe::Copied,
    state::JobStatus,
};
use driveline_bitmap::Bitmap;
use driveline_graph::{BoxFuture, Error, Result, Root};
use driveline_op::{Ask, Buffer, Call, Edge, Error as OpError, flag, op, status};
use futures::future::{Either, select};
use parking_lot::Mutex;
use std::{
    ops::Range,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

/// How often a job that is ready looks for what the guest has written.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// How often it is looked whether there is something to save, at most.
const SAVE_AGAIN: Duration = Duration::from_millis(100);

/// How a copy is written.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct How {
    /// Flags of all writes.
    pub(crate) flags: u32,
    /// Further flags of zeroes.
    pub(crate) zero_flags: u32,
    /// The scope of UNCHANGED.
    pub(crate) scope: u64,
    /// How many bytes may be in flight; 0: as many as are fast.
    pub(crate) in_flight_bytes: u64,
}

/// What went wrong with what was copied, beside the pieces that failed: the job's policy has decided about those.
#[derive(Default)]
pub(crate) struct Faults {
    /// The target could not be flushed once. What it had answered until then may be lost, whatever later flushes say.
    unflushed: AtomicBool,
    /// The error of a flush that saved the progress, until the policy has decided about it.
    saving: Mutex<Option<OpError>>,
    /// Why the rest could not be copied while guests waited.
    rest: Mutex<Option<PieceError>>,
}

impl Faults {
    /// May the target have lost what was copied?
    pub(crate) fn has_unflushed(&self) -> bool {
        self.unflushed.load(Relaxed)
    }

    /// Why the rest could not be copied. It is told once.
    pub(crate) fn take(&self) -> Option<PieceError> {
        self.rest.lock().take()
    }

    fn flush_failed(&self) {
        self.unflushed.store(true, Relaxed);
    }
}

/// What is copied: what `dirty` says, from `from` to `to`.
pub(crate) struct Push {
    dirty: Arc<Bitmap>,
    from: Root,
    to: Root,
    how: How,
    blocking: Arc<AtomicBool>,
    copied: Option<Arc<Copied>>,
    faults: Arc<Faults>,
    buffers: Buffers,
    cursor: Mutex<u64>,
}

impl Push {
    /// `blocking`: guests' writes go to `to` as well; it changes only while nothing is in flight. `copied`: its progress is kept.
    pub(crate) fn new(
        dirty: &Arc<Bitmap>,
        (from, to): (&Root, &Root),
        how: How,
        blocking: Arc<AtomicBool>,
        copied: Option<Arc<Copied>>,
        faults: Arc<Faults>,
    ) -> Arc<Self> {
        let (dirty, from, to) = (dirty.clone(), from.clone(), to.clone());
        let (buffers, cursor) = Default::default();
        Arc::new(Self { dirty, from, to, how, blocking, copied, faults, buffers, cursor })
    }

    /// Copies until nothing is left.
    pub(crate) async fn run(
        self: &Arc<Self>,
        job: &Arc<Job>,
        runtime: &Arc<dyn Runtime>,
    ) -> Result<(), Stopped> {
        let copying = copy::run(job, runtime, self.clone());
        let ended = match &self.copied {
            Some(copied) => {
                saving_meanwhile(copying, runtime, |now| copied.pause(now), || self.save(runtime)).await
            }
            None => copying.await,
        };
        ended?;
        copy::decide(job, self.take_fault())?;
        *self.cursor.lock() = 0;
        Ok(())
    }

    /// Saves the progress. If a flush for it fails, more is copied after a restart; what becomes of the job by it its policy decides, since
    /// the target may not say it a second time.
    async fn save(&self, runtime: &Arc<dyn Runtime>) {
        let Some(copied) = &self.copied else { return };
        if let Err(error) = copied.save(&self.from, &self.to, || runtime.now()).await {
            self.faults.flush_failed();
            let error = OpError::new(error.errno_code(), error.message());
            self.faults.saving.lock().get_or_insert(error);
        }
    }

    /// Copies until nothing is left, says that the job is ready, and goes on with what guests write until the user wants
    /// it to end. `caught_up` is told whenever nothing is left.
    pub(crate) async fn follow(
        self: &Arc<Self>,
        job: &Arc<Job>,
        runtime: &Arc<dyn Runtime>,
        caught_up: impl Fn(),
    ) -> Result<(), Stopped> {
        loop {
            self.run(job, runtime).await?;
            if self.dirty.bits().next_dirty(0).is_some() {
                continue;
            }
            if self.copied.as_ref().is_some_and(|copied| copied.pause(runtime.now()).is_zero()) {
                self.save(runtime).await;
                copy::decide(job, self.take_fault())?;
            }
            caught_up();
            if job.info().status == JobStatus::Running {
                job.set_status(JobStatus::Ready);
                job.emit(JobEvent::Ready(Box::new(job.info())));
            }
            job.pause_point().await?;
            if job.wants_end() {
                return Ok(());
            }
            futures::future::select(pin!(job.user_acted()), runtime.sleep(LOOK_AGAIN)).await;
            let more = self.dirty.bits().dirty_bytes();
            if more > 0 {
                job.add_total(more);
            }
        }
    }

    /// Copies once more what there is, before guests are kept waiting for the rest: see [`copy_rest`].
    ///
    /// Errors: those that the job's policy lets it fail with, and [`Job::outlast`]'s.
    pub(crate) async fn once_more(self: &Arc<Self>, job: &Job, runtime: &Arc<dyn Runtime>) -> Result<()> {
        while let Err(failed) = self.copy_and_flush().await {
            job.outlast(failed, runtime).await?;
        }
        Ok(())
    }

    async fn copy_and_flush(self: &Arc<Self>) -> Result<(), PieceError> {
        *self.cursor.lock() = 0;
        while let Next::Piece(piece) = self.next().await? {
            self.clone().copy(piece).await?;
        }
        self.to.flush().await.map_err(|error| {
            self.faults.flush_failed();
            PieceError::writing(OpError::new(error.errno_code(), error.message()))
        })
    }

    /// Whole granules: only whole ones become clean.
    fn piece_bytes_max(&self) -> u64 {
        let granule = self.dirty.granularity().bytes();
        let longest = PIECE_BYTES_MAX.max(granule);
        match self.how.in_flight_bytes {
            0 => longest,
            bytes => (bytes / granule * granule).clamp(granule, longest),
        }
    }
}

impl Source for Push {
    fn next(&self) -> BoxFuture<'_, Result<Next, PieceError>> {
        Box::pin(async move {
            let at = *self.cursor.lock();
            let bits = self.dirty.bits();
            let Some(start) = bits.next_dirty(at) else { return Ok(Next::Nothing) };
            let longest = self.piece_bytes_max();
            let round = (start / longest + 1) * longest;
            let end = bits.next_clean(start).unwrap_or(bits.length()).min(round).min(bits.length());
            *self.cursor.lock() = end;
            Ok(Next::Piece(start..end))
        })
    }

    fn copy(self: Arc<Self>, piece: Range<u64>) -> BoxFuture<'static, Result<(), PieceError>> {
        Box::pin(async move {
            let buffers = &self.buffers;
            let (above, below) = self.from.enter_both(&self.to).await;
            // A write that has marked, and is not done yet, would have lost its mark.
            let lock = above.lock(piece.clone()).await;
            let mut flying = Flying::new(&self, piece.clone());
            self.dirty.bits().clear_range(piece.clone());
            let _lock = self.blocking.load(Relaxed).then_some(lock);
            let How { flags, zero_flags, scope, .. } = self.how;
            let mut at = piece.start;
            let copied = async {
                while at < piece.end {
                    let ask =
                        Ask { op: op::BLOCK_STATUS, offset: at, length: piece.end - at, ..Ask::default() };
                    let answer = above.submit(ask, Buffer::default()).await;
                    answer.result.map_err(PieceError::reading)?;
                    let end = at + answer.status.length;
                    if answer.status.flags & status::ZERO != 0 {
                        let (offset, length) = (at, end - at);
                        let flags = flags | zero_flags;
                        let ask =
                            Ask { op: op::WRITE_ZEROES, flags, offset, length, scope, ..Ask::default() };
                        below.submit(ask, Buffer::default()).await.result.map_err(PieceError::writing)?;
                    } else {
                        let ask = Ask { op: op::READ, offset: at, ..Ask::default() };
                        let read = above.submit(ask, buffers.take(end - at)).await;
                        if let Err(error) = read.result {
                            buffers.give(read.buffer);
                            return Err(PieceError::reading(error));
                        }
                        let ask = Ask { op: op::WRITE, flags, offset: at, scope, ..Ask::default() };
                        let written = below.submit(ask, read.buffer).await;
                        buffers.give(written.buffer);
                        written.result.map_err(PieceError::writing)?;
                    }
                    at = end;
                }
                Ok(())
            };
            let result = copied.await;
            flying.is_copied = result.is_ok();
            result
        })
    }

    fn target(&self) -> Option<Root> {
        Some(self.to.clone())
    }

    fn flush_failed(&self) {
        self.faults.flush_failed();
    }

    fn take_fault(&self) -> Option<OpError> {
        self.faults.saving.lock().take()
    }

    fn retries(&self) -> bool {
        true
    }

    fn task_bytes_max(&self) -> u64 {
        self.piece_bytes_max()
    }

    fn in_flight_max(&self) -> usize {
        match self.how.in_flight_bytes {
            0 => copy::IN_FLIGHT_MAX,
            bytes => ((bytes / self.piece_bytes_max()) as usize).clamp(1, copy::IN_FLIGHT_MAX),
        }
    }
}

/// Works, and saves now and then: when `pause` says, until the work is done. A saving that has begun is brought to its end.
pub(crate) async fn saving_meanwhile<T, F: Future<Output = ()>>(
    work: impl Future<Output = T>,
    runtime: &Arc<dyn Runtime>,
    pause: impl Fn(Duration) -> Duration,
    save: impl Fn() -> F,
) -> T {
    let mut work = pin!(work);
    loop {
        let sleep = runtime.sleep(pause(runtime.now()).max(SAVE_AGAIN));
        match select(work.as_mut(), sleep).await {
            Either::Left((done, _)) => return done,
            Either::Right(((), _)) => {}
        }
        match select(work.as_mut(), pin!(save())).await {
            Either::Left((done, saving)) => {
                saving.await;
                return done;
            }
            Either::Right(((), _)) => {}
        }
    }
}

/// A piece that is marked again unless all of it was copied: also when the job fails at another one, and gives this one up
/// half-way.
struct Flying<'a> {
    push: &'a Push,
    piece: Range<u64>,
    is_copied: bool,
}

impl<'a> Flying<'a> {
    fn new(push: &'a Push, piece: Range<u64>) -> Self {
        if let Some(copied) = &push.copied {
            copied.begin(piece.clone());
        }
        Self { push, piece, is_copied: false }
    }
}

impl Drop for Flying<'_> {
    fn drop(&mut self) {
        let Self { push, piece, is_copied } = self;
        if !*is_copied {
            push.dirty.mark_unconditionally(piece.clone());
        }
        if let Some(copied) = &push.copied {
            copied.end(piece.clone(), *is_copied);
        }
    }
}

/// Copies what is left while nothing is in flight, and makes it durable. Then the bitmap is clean. An error is in `faults`, too.
pub(crate) async fn copy_rest(
    dirty: &Bitmap,
    from: &Edge,
    to: &Edge,
    how: How,
    faults: &Faults,
) -> Result<()> {
    let copied = copy_runs(dirty, from, to, how, faults).await;
    copied.map_err(|failed| {
        let error = Error::io_text(failed.error.code(), &failed.error);
        *faults.rest.lock() = Some(failed);
        error
    })
}

async fn copy_runs(
    dirty: &Bitmap,
    from: &Edge,
    to: &Edge,
    how: How,
    faults: &Faults,
) -> Result<(), PieceError> {
    let rest: Vec<Range<u64>> = dirty.bits().iter_dirty().collect();
    for range in rest {
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min(at + PIECE_BYTES_MAX);
            let read = Ask { op: op::READ, offset: at, ..Ask::default() };
            let read = Call::new(from.clone(), read, Buffer::new((end - at) as usize)).await;
            read.result.map_err(PieceError::reading)?;
            let How { flags, scope, .. } = how;
            let write = Ask { op: op::WRITE, flags, offset: at, scope, ..Ask::default() };
            let written = Call::new(to.clone(), write, read.buffer).await;
            written.result.map_err(PieceError::writing)?;
            at = end;
        }
    }
    let flush = Ask { op: op::FLUSH, ..Ask::default() };
    Call::new(to.clone(), flush, Buffer::default()).await.result.map_err(|error| {
        faults.flush_failed();
        PieceError::writing(error)
    })?;
    dirty.bits().clear_all();
    Ok(())
}

/// How a commit writes: the base changes, but nothing that is seen from `top` and above.
pub(crate) fn unchanged_from(top: driveline_graph::NodeId) -> How {
    How { flags: flag::UNCHANGED, zero_flags: flag::MAY_UNMAP, scope: top.0, ..How::default() }
}

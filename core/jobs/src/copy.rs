//! The work of a job: pieces of a node, copied several at a time on all threads, with a speed limit, pauses and an error
//! policy.

use crate::{
    job::{Job, Stopped},
    limit::{RateLimit, SLICE},
    manager::Runtime,
    state::ErrorAction,
};
use driveline_graph::{BoxFuture, Root};
use driveline_op::{Buffer, Error};
use futures::{
    StreamExt,
    channel::oneshot,
    future::{Either, select},
    stream::FuturesUnordered,
};
use parking_lot::Mutex;
use std::{collections::VecDeque, ops::Range, pin::pin, sync::Arc};

/// Pieces in flight at once.
pub(crate) const IN_FLIGHT_MAX: usize = 16;
/// The longest piece. From page cache to page cache each is read and written at once, on one thread, while it is in that
/// processor's cache: pieces of a megabyte are not, and took twice the time for the write.
pub(crate) const PIECE_BYTES_MAX: u64 = 256 << 10;
/// Short pieces of one task at most: others of its thread want to have their turn.
const BATCH_PIECES_MAX: usize = 16;
/// After so much the target is flushed while the copying goes on, so that little is left to wait for at the end.
const FLUSH_BYTES: u64 = 32 << 20;

/// A piece could not be copied: what failed, and in which operation.
pub(crate) struct PieceError {
    pub(crate) error: Error,
    pub(crate) operation: &'static str,
}

impl PieceError {
    pub(crate) fn reading(error: Error) -> Self {
        Self { error, operation: "read" }
    }

    pub(crate) fn writing(error: Error) -> Self {
        Self { error, operation: "write" }
    }
}

/// What a job copies.
pub(crate) trait Source: Send + Sync + 'static {
    /// The next piece to be copied, at most [`PIECE_BYTES_MAX`] long, and how many bytes before it need nothing.
    fn next(&self) -> BoxFuture<'_, Result<Next, PieceError>>;
    /// Copies a piece. It looks again, because the guest may have changed it since.
    fn copy(self: Arc<Self>, piece: Range<u64>) -> BoxFuture<'static, Result<(), PieceError>>;
    /// What is flushed in the course of the copying. The job flushes it at its end all the same.
    fn target(&self) -> Option<Root> {
        None
    }
    /// A flush of the target has failed, which the job may outlast.
    fn flush_failed(&self) {}
    /// Why the target could not be flushed by somebody else than the copying, if nobody has decided about that yet.
    fn take_fault(&self) -> Option<Error> {
        None
    }
    /// Short pieces are copied one after the other by one task, up to so many bytes: a task costs as much as a short piece. It
    /// stays on the thread of the job: short pieces on several threads wait for each other's metadata, and took longer.
    fn task_bytes_max(&self) -> u64 {
        PIECE_BYTES_MAX
    }
    /// How many tasks copy at once.
    fn in_flight_max(&self) -> usize {
        IN_FLIGHT_MAX
    }
    /// A piece that failed and was ignored: is it to be tried again?
    fn retries(&self) -> bool;
}

/// What comes next.
pub(crate) enum Next {
    /// So many bytes need nothing.
    Skip(u64),
    /// A piece to copy.
    Piece(Range<u64>),
    /// Nothing, for now or for good.
    Nothing,
}

/// Buffers, reused from piece to piece.
#[derive(Default)]
pub(crate) struct Buffers(Mutex<Vec<Buffer>>);

impl Buffers {
    pub(crate) fn take(&self, length: u64) -> Buffer {
        let mut buffer = self.0.lock().pop().unwrap_or_else(|| Buffer::new(PIECE_BYTES_MAX as usize));
        buffer.set_len(length as usize);
        buffer
    }

    pub(crate) fn give(&self, buffer: Buffer) {
        self.0.lock().push(buffer);
    }
}

/// Copies until the source has nothing more. An error that was ignored is kept, and returned at the end.
pub(crate) async fn run(
    job: &Arc<Job>,
    runtime: &Arc<dyn Runtime>,
    source: Arc<dyn Source>,
) -> Result<Option<Error>, Stopped> {
    let mut flight = Flight {
        job,
        runtime,
        source,
        flying: FuturesUnordered::new(),
        batch: Vec::new(),
        flushing: false,
        unflushed: 0,
        again: VecDeque::new(),
        ignored: None,
    };
    let outcome = flight.fill().await;
    // A driver may go on with what nobody waits for: a server would store a piece after whoever copies it the next time.
    while flight.flying.next().await.is_some() {}
    outcome.map(|()| flight.ignored)
}

/// Lets the job's policy decide about a flush of the target that failed beside the copying.
pub(crate) fn decide(job: &Job, fault: Option<Error>) -> Result<(), Stopped> {
    let Some(error) = fault else { return Ok(()) };
    match job.on_io_error(&error, "write") {
        ErrorAction::Report => Err(Stopped::Failed(error.into())),
        ErrorAction::Stop | ErrorAction::Ignore => Ok(()),
    }
}

/// Flushes what was copied to, at the end of a job. A failure goes by its policy, as any other.
///
/// Errors: those of [`Job::outlast`].
pub(crate) async fn flush_or_outlast(
    job: &Job,
    runtime: &Arc<dyn Runtime>,
    target: &Root,
) -> driveline_graph::Result<()> {
    while let Err(error) = target.flush().await {
        let error = Error::new(error.errno_code(), error.message());
        job.outlast(PieceError::writing(error), runtime).await?;
    }
    Ok(())
}

/// What is over.
enum Landed {
    Pieces(Vec<Piece>),
    Flush(Result<(), Error>),
}

/// A piece, and how its copy ended.
type Piece = (Range<u64>, Result<(), PieceError>);

/// Pieces in flight, and what became of those before them.
struct Flight<'a> {
    job: &'a Job,
    runtime: &'a Arc<dyn Runtime>,
    source: Arc<dyn Source>,
    flying: FuturesUnordered<BoxFuture<'a, Landed>>,
    /// Pieces for the next task.
    batch: Vec<Range<u64>>,
    /// One of those in flight is a flush.
    flushing: bool,
    /// How much was copied since it began.
    unflushed: u64,
    /// Pieces that failed.
    again: VecDeque<Range<u64>>,
    ignored: Option<Error>,
}

impl Flight<'_> {
    async fn fill(&mut self) -> Result<(), Stopped> {
        let (job, runtime, source) = (self.job, self.runtime, self.source.clone());
        let mut limit = RateLimit::default();
        let (in_flight_max, bytes_max) = (source.in_flight_max(), source.task_bytes_max());
        loop {
            if job.is_cancelled() {
                // What is gathered is not begun any more.
                return Err(Stopped::Cancelled);
            }
            decide(job, source.take_fault())?;
            if job.wants_pause() {
                self.start(false);
                while let Some(landed) = self.flying.next().await {
                    self.settle(landed)?;
                }
                job.pause_point().await?;
            }
            let retries = !self.again.is_empty();
            let piece = match self.again.pop_front() {
                Some(piece) => Some(piece),
                None if self.tasks() < in_flight_max => match self.meanwhile(source.next()).await? {
                    Ok(Next::Skip(bytes)) => {
                        job.add_done(bytes);
                        continue;
                    }
                    Ok(Next::Piece(piece)) => Some(piece),
                    Ok(Next::Nothing) => None,
                    Err(error) => {
                        match job.on_io_error(&error.error, error.operation) {
                            ErrorAction::Report => return Err(Stopped::Failed(error.error.into())),
                            // What is not known cannot be skipped: it is asked again, in a while.
                            ErrorAction::Ignore | ErrorAction::Stop => {
                                self.meanwhile(runtime.sleep(SLICE)).await?;
                            }
                        }
                        continue;
                    }
                },
                None => None,
            };
            let Some(piece) = piece else {
                self.start(false);
                match self.flying.next().await {
                    Some(landed) => self.settle(landed)?,
                    None => return Ok(()),
                }
                continue;
            };
            let length = piece.end - piece.start;
            if retries
                || self.batch.iter().map(|piece| piece.end - piece.start).sum::<u64>() + length > bytes_max
            {
                self.start(false);
            }
            if !self.meanwhile(limit.wait(job, runtime, length)).await? {
                self.again.push_front(piece);
                continue;
            }
            self.batch.push(piece);
            if retries || length >= bytes_max || self.batch.len() == BATCH_PIECES_MAX || job.speed() > 0 {
                self.start(retries);
            }
            if self.tasks() < in_flight_max {
                continue;
            }
            match self.flying.next().await {
                Some(landed) => self.settle(landed)?,
                None => return Ok(()),
            }
        }
    }

    fn tasks(&self) -> usize {
        self.flying.len() - usize::from(self.flushing)
    }

    /// Copies what is in the batch.
    fn start(&mut self, retries: bool) {
        let batch = std::mem::take(&mut self.batch);
        if batch.is_empty() {
            return;
        }
        let (source, runtime, pieces) = (self.source.clone(), self.runtime.clone(), batch.clone());
        let copy = async move {
            // What fails at once would fail again at once, and nobody else would get this thread.
            if retries {
                runtime.sleep(SLICE).await;
            }
            let mut copied = Vec::with_capacity(pieces.len());
            for piece in pieces {
                copied.push((piece.clone(), source.clone().copy(piece).await));
            }
            copied
        };
        let here = batch.len() > 1;
        let lost =
            move || batch.into_iter().map(|piece| (piece, Err(PieceError::writing(Error::IO)))).collect();
        self.launch(here, copy, lost, Landed::Pieces);
    }

    /// Runs something as a task of its own: it needs nobody to wait for it, and has a thread of its own where there is one,
    /// unless it is to stay `here`. What it leaves if it panics, or ends with the whole engine, is `lost`.
    fn launch<T: Send + 'static>(
        &mut self,
        here: bool,
        flight: impl Future<Output = T> + Send + 'static,
        lost: impl FnOnce() -> T + Send + 'static,
        landed: impl FnOnce(T) -> Landed + Send + 'static,
    ) {
        let (tell, told) = oneshot::channel();
        let flight = Box::pin(async move { drop(tell.send(flight.await)) });
        if here {
            self.runtime.spawn_here(flight)
        } else {
            self.runtime.spawn(flight)
        }
        self.flying.push(Box::pin(async move { landed(told.await.unwrap_or_else(|_| lost())) }));
    }

    /// Waits for `future`, and takes note of what lands meanwhile.
    async fn meanwhile<T>(&mut self, future: impl Future<Output = T>) -> Result<T, Stopped> {
        let mut future = pin!(future);
        loop {
            if self.flying.is_empty() {
                return Ok(future.await);
            }
            match select(future.as_mut(), self.flying.next()).await {
                Either::Left((done, _)) => return Ok(done),
                Either::Right((landed, _)) => self.settle(landed.expect("something is in flight"))?,
            }
        }
    }

    fn settle(&mut self, landed: Landed) -> Result<(), Stopped> {
        match landed {
            Landed::Pieces(pieces) => pieces.into_iter().try_for_each(|piece| self.settle_piece(piece)),
            Landed::Flush(result) => {
                self.flushing = false;
                let Err(error) = result else { return Ok(()) };
                match self.job.on_io_error(&error, "write") {
                    ErrorAction::Report => Err(Stopped::Failed(error.into())),
                    // The next one does what this one did not, or fails as well.
                    ErrorAction::Stop | ErrorAction::Ignore => Ok(()),
                }
            }
        }
    }

    fn settle_piece(&mut self, (piece, result): Piece) -> Result<(), Stopped> {
        let length = piece.end - piece.start;
        let Err(failed) = result else {
            self.job.add_done(length);
            self.flush_after(length);
            return Ok(());
        };
        match self.job.on_io_error(&failed.error, failed.operation) {
            ErrorAction::Report => return Err(Stopped::Failed(failed.error.into())),
            ErrorAction::Stop => self.again.push_back(piece),
            ErrorAction::Ignore if self.source.retries() => self.again.push_back(piece),
            ErrorAction::Ignore => {
                self.job.add_done(length);
                self.ignored.get_or_insert(failed.error);
            }
        }
        Ok(())
    }

    fn flush_after(&mut self, bytes: u64) {
        self.unflushed += bytes;
        if self.unflushed < FLUSH_BYTES || self.flushing {
            return;
        }
        let Some(target) = self.source.target() else { return };
        (self.flushing, self.unflushed) = (true, 0);
        let source = self.source.clone();
        let flush = async move {
            let flushed = target.flush().await.inspect_err(|_| source.flush_failed());
            flushed.map_err(|error| Error::new(error.errno_code(), error.message()))
        };
        self.launch(false, flush, || Err(Error::IO), Landed::Flush);
    }
}

#[cfg(test)]
mod tests;

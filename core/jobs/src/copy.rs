//! The work of a job: pieces of a node, copied several at a time, with a speed limit, pauses and an error policy.

use crate::{
    job::{Job, Stopped},
    manager::Runtime,
    state::ErrorAction,
};
use driveline_graph::BoxFuture;
use driveline_op::Buffer;
use futures::{
    StreamExt,
    future::{Either, select},
    stream::FuturesUnordered,
};
use parking_lot::Mutex;
use std::{collections::VecDeque, ops::Range, pin::pin, sync::Arc, time::Duration};

/// Pieces in flight at once.
pub(crate) const IN_FLIGHT_MAX: usize = 16;
/// The longest piece. From page cache to page cache each is read and written at once, on one thread, while it is in that
/// processor's cache: pieces of a megabyte are not, and took twice the time for the write.
pub(crate) const PIECE_BYTES_MAX: u64 = 256 << 10;
/// The speed limit is kept over slices of this length.
const SLICE: Duration = Duration::from_millis(100);

/// A piece could not be copied: what failed, and in which operation.
pub(crate) struct PieceError {
    pub(crate) error: driveline_op::Error,
    pub(crate) operation: &'static str,
}

impl PieceError {
    pub(crate) fn reading(error: driveline_op::Error) -> Self {
        Self { error, operation: "read" }
    }

    pub(crate) fn writing(error: driveline_op::Error) -> Self {
        Self { error, operation: "write" }
    }
}

/// What a job copies.
pub(crate) trait Source: Send + Sync {
    /// The next piece to be copied, at most [`PIECE_BYTES_MAX`] long, and how many bytes before it need nothing.
    fn next(&self) -> BoxFuture<'_, Result<Next, PieceError>>;
    /// Copies a piece. It looks again, because the guest may have changed it since.
    fn copy<'a>(&'a self, piece: Range<u64>, buffers: &'a Buffers) -> BoxFuture<'a, Result<(), PieceError>>;
    /// How many pieces are copied at once.
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
    source: &dyn Source,
    buffers: &Buffers,
) -> Result<Option<driveline_op::Error>, Stopped> {
    let mut flight = Flight {
        job,
        retries: source.retries(),
        flying: FuturesUnordered::new(),
        again: VecDeque::new(),
        ignored: None,
    };
    let outcome = flight.fill(runtime, source, buffers).await;
    // A driver may go on with what nobody waits for: a server would store a piece after whoever copies it the next time.
    while flight.flying.next().await.is_some() {}
    outcome.map(|()| flight.ignored)
}

/// A piece that is over.
type Landed = (Range<u64>, Result<(), PieceError>);

/// Pieces in flight, and what became of those before them.
struct Flight<'a> {
    job: &'a Job,
    retries: bool,
    flying: FuturesUnordered<BoxFuture<'a, Landed>>,
    /// Pieces that failed.
    again: VecDeque<Range<u64>>,
    ignored: Option<driveline_op::Error>,
}

impl<'a> Flight<'a> {
    async fn fill(
        &mut self,
        runtime: &'a Arc<dyn Runtime>,
        source: &'a dyn Source,
        buffers: &'a Buffers,
    ) -> Result<(), Stopped> {
        let job = self.job;
        let mut limit = RateLimit::default();
        let in_flight_max = source.in_flight_max();
        loop {
            if job.is_cancelled() || job.wants_pause() {
                while let Some(landed) = self.flying.next().await {
                    self.settle(landed)?;
                }
                job.pause_point().await?;
            }
            let retries = !self.again.is_empty();
            let piece = match self.again.pop_front() {
                Some(piece) => Some(piece),
                None if self.flying.len() < in_flight_max => match self.meanwhile(source.next()).await? {
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
            if let Some(piece) = piece {
                if !self.meanwhile(limit.wait(job, runtime, piece.end - piece.start)).await? {
                    self.again.push_front(piece);
                    continue;
                }
                self.flying.push(Box::pin(async move {
                    // What fails at once would fail again at once, and nobody else would get this thread.
                    if retries {
                        runtime.sleep(SLICE).await;
                    }
                    let result = source.copy(piece.clone(), buffers).await;
                    (piece, result)
                }));
                if self.flying.len() < in_flight_max {
                    continue;
                }
            }
            match self.flying.next().await {
                Some(landed) => self.settle(landed)?,
                None => return Ok(()),
            }
        }
    }

    /// Waits for `future` while what is in flight goes on. It holds locks, of guests' ranges and of an image's tables, and
    /// `future` may wait for one of them.
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

    fn settle(&mut self, (piece, result): Landed) -> Result<(), Stopped> {
        let Err(failed) = result else {
            self.job.add_done(piece.end - piece.start);
            return Ok(());
        };
        match self.job.on_io_error(&failed.error, failed.operation) {
            ErrorAction::Report => return Err(Stopped::Failed(failed.error.into())),
            ErrorAction::Stop => self.again.push_back(piece),
            ErrorAction::Ignore if self.retries => self.again.push_back(piece),
            ErrorAction::Ignore => {
                self.job.add_done(piece.end - piece.start);
                self.ignored.get_or_insert(failed.error);
            }
        }
        Ok(())
    }
}

/// A speed limit: so many bytes in each slice of time.
#[derive(Default)]
struct RateLimit {
    slice_end: Duration,
    spent: u64,
}

impl RateLimit {
    /// Waits until so many bytes may be copied. `false`: the user wants the job to pause or to end instead.
    async fn wait(&mut self, job: &Job, runtime: &Arc<dyn Runtime>, bytes: u64) -> bool {
        loop {
            if job.is_cancelled() || job.wants_pause() {
                return false;
            }
            let speed = job.speed();
            if speed == 0 {
                return true;
            }
            let quota = (speed / 10).max(1);
            let now = runtime.now();
            if now >= self.slice_end {
                // Debt of a piece longer than a slice's quota is paid off in the slices that follow.
                let slices = 1 + (now - self.slice_end).as_millis() as u64 / SLICE.as_millis() as u64;
                self.spent = self.spent.saturating_sub(quota.saturating_mul(slices));
                self.slice_end = now + SLICE;
            }
            if self.spent < quota {
                self.spent += bytes;
                return true;
            }
            let sleep = runtime.sleep(self.slice_end - now);
            select(pin!(job.user_acted()), sleep).await;
        }
    }
}

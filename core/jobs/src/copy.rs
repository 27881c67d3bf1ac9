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
    let mut flying = FuturesUnordered::new();
    let mut again: VecDeque<Range<u64>> = VecDeque::new();
    let mut ignored = None;
    let mut limit = RateLimit::default();
    let in_flight_max = source.in_flight_max();
    let copied = async {
        loop {
            if job.is_cancelled() || job.wants_pause() {
                while let Some((piece, result)) = flying.next().await {
                    settle(job, source, piece, result, &mut again, &mut ignored)?;
                }
                job.pause_point().await?;
            }
            let retries = !again.is_empty();
            let piece = match again.pop_front() {
                Some(piece) => Some(piece),
                None if flying.len() < in_flight_max => match source.next().await {
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
                            ErrorAction::Ignore | ErrorAction::Stop => runtime.sleep(SLICE).await,
                        }
                        continue;
                    }
                },
                None => None,
            };
            if let Some(piece) = piece {
                let mut room = pin!(limit.wait(job, runtime, piece.end - piece.start));
                // What is in flight goes on meanwhile: it holds locks that guests wait for.
                let granted = loop {
                    if flying.is_empty() {
                        break room.await;
                    }
                    match select(room.as_mut(), flying.next()).await {
                        Either::Left((granted, _)) => break granted,
                        Either::Right((Some((piece, result)), _)) => {
                            settle(job, source, piece, result, &mut again, &mut ignored)?;
                        }
                        Either::Right((None, _)) => unreachable!("something is in flight"),
                    }
                };
                if !granted {
                    again.push_front(piece);
                    continue;
                }
                flying.push(async move {
                    // What fails at once would fail again at once, and nobody else would get this thread.
                    if retries {
                        runtime.sleep(SLICE).await;
                    }
                    let result = source.copy(piece.clone(), buffers).await;
                    (piece, result)
                });
                if flying.len() < in_flight_max {
                    continue;
                }
            }
            match flying.next().await {
                Some((piece, result)) => settle(job, source, piece, result, &mut again, &mut ignored)?,
                None => return Ok(ignored),
            }
        }
    };
    let outcome = copied.await;
    // A driver may go on with what nobody waits for: a server would store a piece after whoever copies it the next time.
    while flying.next().await.is_some() {}
    outcome
}

fn settle(
    job: &Job,
    source: &dyn Source,
    piece: Range<u64>,
    result: Result<(), PieceError>,
    again: &mut VecDeque<Range<u64>>,
    ignored: &mut Option<driveline_op::Error>,
) -> Result<(), Stopped> {
    let Err(failed) = result else {
        job.add_done(piece.end - piece.start);
        return Ok(());
    };
    match job.on_io_error(&failed.error, failed.operation) {
        ErrorAction::Report => return Err(Stopped::Failed(failed.error.into())),
        ErrorAction::Stop => again.push_back(piece),
        ErrorAction::Ignore if source.retries() => again.push_back(piece),
        ErrorAction::Ignore => {
            job.add_done(piece.end - piece.start);
            ignored.get_or_insert(failed.error);
        }
    }
    Ok(())
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

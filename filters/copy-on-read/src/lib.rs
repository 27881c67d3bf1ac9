//! What is read from below an image is kept in it, so that it is read from there the next time.
use driveline_sdk::{
    BlockStatus, Buffer, RangeLock, WriteZeroesRequest, event, flag, info, prelude::*, status,
};
use std::{
    ops::Range,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

/// What becomes of a read whose data cannot be kept.
#[options]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnWriteError {
    /// It succeeds.
    #[default]
    Ignore,
    /// It fails.
    Report,
}

/// How data is kept.
#[options]
#[derive(Debug)]
pub struct Options {
    chunk: Option<Bytes>,
    #[serde(default)]
    on_write_error: OnWriteError,
}

/// The unit in which data is kept, if the child has no unit of allocation.
const CHUNK_BYTES: u64 = 64 << 10;
/// The largest `chunk`: so much memory can each read take.
const CHUNK_BYTES_MAX: u64 = 16 << 20;
/// How much is copied at once, unless a chunk is larger.
const COPY_BYTES: u64 = 1 << 20;

/// A node above an image.
#[derive(Debug)]
pub struct CopyOnRead {
    chunk_bytes: Option<u64>,
    on_write_error: OnWriteError,
    /// A copy holds its range alone; the writes of others share it.
    lock: RangeLock,
    /// Could the last copy not be written? Then that is in the log already.
    failing: AtomicBool,
}

#[filter(name = "copy-on-read", default = "pass", effects(own_writes), summary = "reads populate the child")]
impl Filter for CopyOnRead {
    type Options = Options;

    fn check(options: &Options) -> Result<()> {
        match options.chunk {
            Some(Bytes(bytes)) if !bytes.is_power_of_two() || !(512..=CHUNK_BYTES_MAX).contains(&bytes) => {
                Err(Error::option("chunk", "expected a power of two from 512 to \"16MiB\""))
            }
            _ => Ok(()),
        }
    }

    fn open(options: Options, _: &OpenCx<'_>) -> Result<Self> {
        Ok(CopyOnRead {
            chunk_bytes: options.chunk.map(u64::from),
            on_write_error: options.on_write_error,
            lock: RangeLock::new(),
            failing: AtomicBool::new(false),
        })
    }

    async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        self.populate(next, request.range()).await?;
        next.read(request).await
    }

    async fn cache(&self, next: &mut Next<'_>, request: &CacheRequest<'_>) -> Result<()> {
        self.populate(next, request.range()).await?;
        next.cache(request).await
    }

    // A copy must not overwrite what is written between its read and its write.

    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        let _shared = self.lock.lock_shared(request.range()).await;
        next.write(request).await
    }

    async fn write_zeroes(&self, next: &mut Next<'_>, request: &WriteZeroesRequest<'_>) -> Result<()> {
        let _shared = self.lock.lock_shared(request.range()).await;
        next.write_zeroes(request).await
    }

    async fn discard(&self, next: &mut Next<'_>, request: &DiscardRequest<'_>) -> Result<()> {
        let _shared = self.lock.lock_shared(request.range()).await;
        next.discard(request).await
    }
}

/// Why a copy did not come about.
enum Failure {
    /// What is there cannot be found out or read. The read that follows says so, if it still is so.
    Source,
    /// It cannot be written.
    Write(Error),
}

impl CopyOnRead {
    /// Makes the child have what lies in a range, as far as it comes from below it.
    async fn populate(&self, next: &mut Next<'_>, range: Range<u64>) -> Result<()> {
        if next.info(0).flags & info::READ_ONLY != 0 {
            return Ok(());
        }
        match self.try_populate(next, range).await {
            Ok(copied) => {
                if copied {
                    self.failing.store(false, Relaxed);
                }
                Ok(())
            }
            Err(Failure::Source) => Ok(()),
            Err(Failure::Write(error)) if self.on_write_error == OnWriteError::Report => Err(error),
            Err(Failure::Write(error)) => {
                if !self.failing.swap(true, Relaxed) {
                    tracing::warn!("what was read cannot be kept, until further notice: {error}");
                }
                Ok(())
            }
        }
    }

    /// Returns whether something was copied.
    async fn try_populate(&self, next: &mut Next<'_>, range: Range<u64>) -> Result<bool, Failure> {
        let child = next.info(0);
        let chunk_bytes = match (self.chunk_bytes, u64::from(child.cluster_bytes)) {
            (Some(chunk), _) => chunk,
            (None, 0) => CHUNK_BYTES,
            (None, cluster) => cluster,
        };
        let (mut at, end) = (range.start, range.end.min(child.size_bytes));
        let mut copied = false;
        while at < end {
            let extent = status_of(next, at..end).await?;
            if !is_from_below(&extent) {
                at += extent.length;
                continue;
            }
            // Whole chunks, as the child would otherwise read the rest of them by itself, more than once perhaps.
            let extent_end = (at + extent.length).next_multiple_of(chunk_bytes).min(child.size_bytes);
            let mut piece_start = at - at % chunk_bytes;
            while piece_start < extent_end {
                let piece_end = (piece_start + COPY_BYTES.max(chunk_bytes)).min(extent_end);
                copied |= self.copy(next, piece_start..piece_end).await?;
                piece_start = piece_end;
            }
            at = extent_end;
        }
        Ok(copied)
    }

    /// Copies what of a piece comes from below the child. Returns whether there was any.
    async fn copy(&self, next: &mut Next<'_>, piece: Range<u64>) -> Result<bool, Failure> {
        let _alone = self.lock.lock(piece.clone()).await;
        let mut copied = false;
        let mut at = piece.start;
        while at < piece.end {
            // Others may have written, or copied the same, before the lock was had.
            let extent = status_of(next, at..piece.end).await?;
            let range = at..at + extent.length;
            at = range.end;
            if is_from_below(&extent) {
                copy_extent(next, range, extent.flags & status::ZERO != 0).await?;
                copied = true;
            }
        }
        Ok(copied)
    }
}

/// In a layer below the child. (What is in no layer at all reads as zeroes anyway, so it is not kept.)
fn is_from_below(extent: &BlockStatus) -> bool {
    extent.depth > 1
}

async fn status_of(next: &mut Next<'_>, range: Range<u64>) -> Result<BlockStatus, Failure> {
    let found = next.status_at(0, range).await;
    found.ok().filter(|extent| extent.length > 0).ok_or(Failure::Source)
}

/// What a filter for tests may be told to wait for.
const COR_WRITE: u64 = event::number("cor_write");

async fn copy_extent(next: &mut Next<'_>, range: Range<u64>, is_zero: bool) -> Result<(), Failure> {
    let mut data = Buffer::default();
    if !is_zero {
        data = Buffer::new((range.end - range.start) as usize);
        next.read_at(0, range.start, &mut data).await.map_err(|_| Failure::Source)?;
    }
    next.tell(0, COR_WRITE).await;
    // Zeroes take no space in most images, so they are looked for.
    let written = if data.iter().all(|byte| *byte == 0) {
        next.write_zeroes(&WriteZeroesRequest::new(range, flag::UNCHANGED)).await
    } else {
        next.write_at(0, range.start, &data, flag::UNCHANGED).await
    };
    written.map_err(Failure::Write)
}

export_filters![CopyOnRead];

#[cfg(test)]
mod tests;

//! Old data goes to the target.

use super::state::{CopyBeforeWrite, Side, piece_bytes};
use driveline_op::{BlockStatus, DiscardRequest, Error, Next, Result, WriteZeroesRequest, flag, status};
use std::{ops::Range, sync::atomic::Ordering::Relaxed};

/// How much is claimed at once when all of it is zeroes.
const ZEROES_BYTES: u64 = 1 << 30;

/// What has more extents in a piece is read as a whole from there on: to ask costs as much as to read a few pages.
const EXTENTS_MAX: usize = 4;

/// A copy failed, and at which end.
pub(super) struct Failure(pub(super) Side, pub(super) Error);

impl CopyBeforeWrite {
    /// Copies `range`, of whole clusters, before it is overwritten, and makes the copy safe.
    pub(super) async fn copy_for_write(&self, next: &mut Next<'_>, range: Range<u64>) -> Result<(), Failure> {
        let bytes = self.copy(next, range.clone()).await?;
        self.make_safe(next, range.clone()).await?;
        self.give_up(next, range).await;
        self.by_writes.fetch_add(bytes, Relaxed);
        Ok(())
    }

    /// Copies `range`, of whole clusters, as far as it is not copied. Returns how many bytes were.
    pub(super) async fn copy(&self, next: &mut Next<'_>, range: Range<u64>) -> Result<u64, Failure> {
        let piece_bytes = piece_bytes(self.cluster_bytes());
        let (mut at, mut copied) = (range.start, 0);
        while let Some(mut run) = self.next_left(at..range.end) {
            if run.end - run.start > piece_bytes {
                let ahead = run.start..run.end.min(run.start + ZEROES_BYTES);
                let found = next.status_at(0, ahead).await.map_err(|error| Failure(Side::Source, error))?;
                let zeroes = if found.flags & status::ZERO != 0 { found.length } else { 0 };
                let end = self.whole_end(run.start + zeroes, run.end);
                // A piece ends on a round offset, so that the next one begins there.
                let round = (run.start / piece_bytes + 1) * piece_bytes;
                run.end = run.end.min(end.max(round));
            }
            at = run.end;
            let _claim = self.claims.hold(run.clone(), true).await;
            // Whoever held it before may have copied some of it.
            let mut from = run.start;
            while let Some(part) = self.next_left(from..run.end) {
                from = part.end;
                self.copy_claimed(next, part.clone(), piece_bytes).await?;
                copied += part.end - part.start;
            }
        }
        Ok(copied)
    }

    /// The last end of a cluster that is not beyond `offset`; `end` is one, too.
    fn whole_end(&self, offset: u64, end: u64) -> u64 {
        if offset >= end { end } else { offset & !(self.cluster_bytes() - 1) }
    }

    /// Copies what is claimed.
    async fn copy_claimed(
        &self,
        next: &mut Next<'_>,
        range: Range<u64>,
        piece_bytes: u64,
    ) -> Result<(), Failure> {
        let reading = |error| Failure(Side::Source, error);
        let mut at = range.start;
        while at < range.end {
            let found = next.status_with(0, at..range.end, flag::PRECISE).await.map_err(reading)?;
            let zeroes = if found.flags & status::ZERO != 0 { at + found.length } else { at };
            let end = self.whole_end(zeroes, range.end);
            if end > at {
                let request = WriteZeroesRequest::new(at..end, flag::MAY_UNMAP);
                let written = next.child(1).write_zeroes(&request).await;
                written.map_err(|error| Failure(Side::Target, error))?;
                at = end;
                continue;
            }
            // Whole clusters, even if the end of one is zeroes: the target would have to read what it is not given.
            let end = (at + found.length).next_multiple_of(self.cluster_bytes());
            let end = end.min(range.end).min(at + piece_bytes);
            self.copy_data(next, at..end, found).await?;
            at = end;
        }
        self.finished.mark(range.clone());
        match &self.safe {
            // It may still be lost to a kill: see `give_up`.
            Some(safe) => safe.note(),
            None if self.settings.discard_source => {
                // It is a hint, and the copy is made.
                let _ = next.discard(&DiscardRequest::new(range, 0)).await;
            }
            None => {}
        }
        Ok(())
    }

    /// Copies a piece, of which the first extent is known.
    async fn copy_data(
        &self,
        next: &mut Next<'_>,
        range: Range<u64>,
        first: BlockStatus,
    ) -> Result<(), Failure> {
        let _room = self.room.acquire().await;
        let mut buffer = self.take_buffer(range.end - range.start);
        let read = read_sparse(next, range.start, &mut buffer, first).await;
        let copied = match (read, &self.settings.compress) {
            (Err(error), _) => Err(Failure(Side::Source, error)),
            (Ok(()), None) => {
                let written = next.write_at(1, range.start, &buffer, 0).await;
                written.map_err(|error| Failure(Side::Target, error))
            }
            (Ok(()), Some(_)) => self.write_compressed(range.start, &buffer).await,
        };
        self.give_buffer(buffer);
        copied
    }

    async fn write_compressed(&self, offset: u64, data: &[u8]) -> Result<(), Failure> {
        let Some(compress) = &self.settings.compress else { return Ok(()) };
        let mut at = offset;
        for cluster in data.chunks(self.target_cluster.max(512) as usize) {
            let written = compress(at, cluster.into()).await;
            let failed = |error: driveline_graph::Error| Error::new(error.errno_code(), error.message());
            self.give_buffer(written.map_err(|error| Failure(Side::Target, failed(error)))?);
            at += cluster.len() as u64;
        }
        Ok(())
    }
}

/// Reads from the source, of which the first extent is known; what is known to be zeroes is not read: a file system makes pages of
/// them, which took longer than the data of a granule that was written to in part.
async fn read_sparse(
    next: &mut Next<'_>,
    offset: u64,
    into: &mut [u8],
    first: BlockStatus,
) -> driveline_op::Result<()> {
    let (mut at, mut found) = (0, first);
    for _ in 0..EXTENTS_MAX {
        let length = (found.length as usize).min(into.len() - at);
        let part = &mut into[at..at + length];
        if found.flags & status::ZERO == 0 {
            next.read_at(0, offset + at as u64, part).await?;
        } else {
            part.fill(0);
        }
        at += length;
        if at == into.len() {
            return Ok(());
        }
        found = next.status_with(0, offset + at as u64..offset + into.len() as u64, flag::PRECISE).await?;
    }
    next.read_at(0, offset + at as u64, &mut into[at..]).await
}

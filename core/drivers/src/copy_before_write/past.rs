//! The point in time: what parents call whose edge wants it.

use super::{
    copy::Failure,
    state::{CopyBeforeWrite, LOST, NOT_IN_IT, SOURCE, TARGET},
};
use driveline_op::{
    BlockStatusRequest, CacheRequest, DiscardRequest, Error, FlushRequest, Next, OpTable, ReadRequest,
    Result, WriteRequest, WriteZeroesRequest, status,
};
use std::{ops::Range, sync::Arc, sync::atomic::Ordering::Relaxed};

/// The state of the node, seen as its past.
pub(super) struct Past(pub(super) Arc<CopyBeforeWrite>);

pub(super) static PAST: OpTable<Past> = OpTable::new()
    .read(Past::read)
    .write(Past::write)
    .flush(Past::flush)
    .discard(Past::discard)
    .write_zeroes(Past::write_zeroes)
    .block_status(Past::block_status)
    .cache(Past::cache);

impl Past {
    /// The first run of `range`, and the child that has it. If that is the source, the caller holds the range.
    fn place(&self, range: Range<u64>) -> Result<(usize, Range<u64>)> {
        let state = &self.0;
        // Beyond the end that the node had then there is nothing.
        let Some(denied) = state.denied.extents(range.clone()).next() else { return Err(NOT_IN_IT) };
        if state.is_broken() {
            return Err(LOST);
        }
        if denied.dirty {
            return Err(NOT_IN_IT);
        }
        let Some(run) = state.finished.extents(denied.range).next() else { return Err(NOT_IN_IT) };
        Ok((if run.dirty { TARGET } else { SOURCE }, run.range))
    }

    async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        let range = request.range();
        if range.is_empty() {
            return Ok(());
        }
        // While somebody shares a range nobody overwrites it in the source. What is in the target stays there.
        let all_copied = self.0.is_finished(&range);
        let _shared = match all_copied {
            true => None,
            false => Some(self.0.share(range.clone()).await?),
        };
        let mut at = range.start;
        while at < range.end {
            let (child, run) = self.place(at..range.end)?;
            if run == range {
                next.child(child).read(request).await?;
            } else {
                let memory = request.part(run.start - range.start..run.end - range.start);
                next.child(child).read(&memory.read_request(run.start)).await?;
            }
            at = run.end;
        }
        // If it was lost meanwhile, what was read from the source may have been overwritten already.
        if self.0.is_broken() { Err(LOST) } else { Ok(()) }
    }

    async fn block_status(&self, next: &mut Next<'_>, request: &BlockStatusRequest<'_>) -> Result<()> {
        let range = request.range();
        if range.is_empty() {
            return Ok(());
        }
        let _shared = match self.0.is_finished(&range) {
            true => None,
            false => Some(self.0.share(range.clone()).await?),
        };
        let (child, run) = self.place(range)?;
        let mut found = next.status_at(child, run).await?;
        // Where the data is now it may not be for long, so nobody is told.
        found.flags &= !status::MAPPED;
        found.map = 0;
        if child == TARGET {
            // Nobody must look for it in what backs the target: that is not the past.
            found.depth = 1;
        }
        request.answer(found);
        Ok(())
    }

    /// The range is not wanted any more: writes need not copy it.
    async fn discard(&self, next: &mut Next<'_>, request: &DiscardRequest<'_>) -> Result<()> {
        let (state, cluster) = (&self.0, self.0.cluster_bytes());
        let range = request.range();
        let end =
            if range.end >= state.size_bytes() { state.size_bytes() } else { range.end & !(cluster - 1) };
        let whole = range.start.next_multiple_of(cluster)..end;
        if whole.start >= whole.end {
            return Ok(());
        }
        let _claim = state.claims.hold(whole.clone(), true).await;
        state.leave_out(whole.clone());
        next.child(TARGET).discard(&DiscardRequest::new(whole, 0)).await
    }

    /// What will be read is copied: then it is in no writer's way any more. This is how a job copies, and has the source give up
    /// what it is to give up.
    async fn cache(&self, next: &mut Next<'_>, request: &CacheRequest<'_>) -> Result<()> {
        let state = &self.0;
        if state.is_broken() {
            return Err(LOST);
        }
        let range = state.whole(&request.range());
        match state.copy(next, range.clone()).await {
            Ok(bytes) => {
                state.give_up(next, range).await;
                state.by_order.fetch_add(bytes, Relaxed);
                Ok(())
            }
            Err(Failure(side, error)) => {
                if state.settings.tells_failures {
                    state.failures.lock().insert(request.offset(), side);
                }
                Err(error)
            }
        }
    }

    /// What has been copied becomes durable.
    async fn flush(&self, next: &mut Next<'_>, _: &FlushRequest<'_>) -> Result<()> {
        self.0.flush_target(next).await
    }

    async fn write(&self, _: &mut Next<'_>, _: &WriteRequest<'_>) -> Result<()> {
        Err(Error::NOT_SUPPORTED)
    }

    async fn write_zeroes(&self, _: &mut Next<'_>, _: &WriteZeroesRequest<'_>) -> Result<()> {
        Err(Error::NOT_SUPPORTED)
    }
}

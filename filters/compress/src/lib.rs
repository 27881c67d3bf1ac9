//! Turns writes into compressed ones, for formats that can store them so.
//!
//! A format compresses whole clusters. So a write of a part of one becomes a write of all of it: the cluster is read, changed
//! and written, while other writes to it wait.
use driveline_sdk::{Buffer, ConstMemory, Info, Memory, RangeLock, flag, info, prelude::*};
use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

/// A node that compresses what is written through it.
#[derive(Debug)]
pub struct Compress {
    cluster_bytes: u64,
    size_bytes: AtomicU64,
    writes: RangeLock,
}

#[filter(name = "compress", default = "pass", summary = "turns writes into compressed ones")]
impl Filter for Compress {
    type Options = NoOptions;

    fn open(_: NoOptions, cx: &OpenCx<'_>) -> Result<Self> {
        let below = cx.info(0);
        if below.flags & info::COMPRESSES == 0 || below.cluster_bytes == 0 {
            return Err(Error::NOT_SUPPORTED
                .because("Compression is not supported for underlying format: expected one that compresses clusters (qcow2)"));
        }
        Ok(Self {
            cluster_bytes: u64::from(below.cluster_bytes),
            size_bytes: AtomicU64::new(below.size_bytes),
            writes: RangeLock::new(),
        })
    }

    fn info(&self, _: &[Info], shown: Info) -> Info {
        self.size_bytes.store(shown.size_bytes, Relaxed);
        shown
    }

    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        let range = request.range();
        let clusters = self.clusters(&range);
        // Whole clusters among each other are like any writes, but one that is being changed in part waits for all.
        let _held = if clusters == range {
            self.writes.lock_shared(clusters).await
        } else {
            self.writes.lock(clusters).await
        };
        for part in self.parts(&range) {
            self.write_part(next, request, part).await?;
        }
        Ok(())
    }

    // These store no data: what is not whole clusters of it is the format's business.

    async fn discard(&self, next: &mut Next<'_>, request: &DiscardRequest<'_>) -> Result<()> {
        let _held = self.writes.lock_shared(self.clusters(&request.range())).await;
        next.discard(request).await
    }

    async fn write_zeroes(&self, next: &mut Next<'_>, request: &WriteZeroesRequest<'_>) -> Result<()> {
        let _held = self.writes.lock_shared(self.clusters(&request.range())).await;
        next.write_zeroes(request).await
    }
}

impl Compress {
    /// The clusters that a range touches; the last one of the disk may be shorter.
    fn clusters(&self, range: &Range<u64>) -> Range<u64> {
        let start = range.start / self.cluster_bytes * self.cluster_bytes;
        let end = range.end.div_ceil(self.cluster_bytes).saturating_mul(self.cluster_bytes);
        start..end.min(self.size_bytes.load(Relaxed)).max(range.end)
    }

    /// The range as a part of a cluster, whole clusters, and a part of a cluster. Empty ones are left out.
    fn parts(&self, range: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
        let whole = self.clusters(range);
        let up = |offset: u64| offset.div_ceil(self.cluster_bytes).saturating_mul(self.cluster_bytes);
        let head_end = if whole.start == range.start { range.start } else { up(range.start).min(range.end) };
        let down = range.end / self.cluster_bytes * self.cluster_bytes;
        let tail_start = if whole.end == range.end { range.end } else { down.max(head_end) };
        let parts = [range.start..head_end, head_end..tail_start, tail_start..range.end];
        parts.into_iter().filter(|part| !part.is_empty())
    }

    /// Writes one of the parts.
    async fn write_part(
        &self,
        next: &mut Next<'_>,
        request: &WriteRequest<'_>,
        part: Range<u64>,
    ) -> Result<()> {
        let flags = request.flags() | flag::COMPRESSED;
        let memory = request.part(part.start - request.offset()..part.end - request.offset());
        let cluster = self.clusters(&part);
        if cluster == part {
            let write = memory.write_request(part.start, flags);
            return next.write(&write.with_scope(request.scope())).await;
        }
        let mut data = Buffer::new((cluster.end - cluster.start) as usize);
        let into = Memory::of_mut(&mut data);
        next.read(&into.read_request(cluster.start)).await?;
        drop(into);
        let at = (part.start - cluster.start) as usize;
        request.copy_to(part.start - request.offset(), &mut data[at..at + (part.end - part.start) as usize]);
        let memory = ConstMemory::of(&data);
        next.write(&memory.write_request(cluster.start, flags).with_scope(request.scope())).await
    }
}

export_filters![Compress];

#[cfg(test)]
mod tests;

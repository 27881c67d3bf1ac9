//! Zeroes and discards: changes of the map, without data.

use super::{
    Qcow2,
    io::Io,
    layout::{Entry, Mapping, ZERO},
};
use driveline_op::{DiscardRequest, Error, Next, Result, WriteZeroesRequest, flag};
use std::{ops::Range, sync::atomic::Ordering::Relaxed};

impl Qcow2 {
    pub(crate) async fn write_zeroes(
        &self,
        next: &mut Next<'_>,
        request: &WriteZeroesRequest<'_>,
    ) -> Result<()> {
        self.check_writable()?;
        self.check_range(request.range())?;
        let io = &mut Io::Next(next);
        if self.bitmaps_need_flags() {
            Box::pin(self.flag_bitmaps(io)).await?;
        }
        {
            let _pin = self.epoch.pin();
            let zeroed = Box::pin(self.zero_range(io, request.range(), request.flags())).await;
            self.judge(io, zeroed).await?;
        }
        self.finish(io, request.flags()).await
    }

    pub(crate) async fn discard(&self, next: &mut Next<'_>, request: &DiscardRequest<'_>) -> Result<()> {
        self.check_writable()?;
        self.check_range(request.range())?;
        let io = &mut Io::Next(next);
        if self.bitmaps_need_flags() {
            Box::pin(self.flag_bitmaps(io)).await?;
        }
        // Version 2 has no zero clusters, so what is unmapped would show what the backing file has.
        if self.geometry.version >= 3 || io.info(self.backing()).is_none() {
            let _pin = self.epoch.pin();
            // What the backing file has must not come to light.
            let unmapped = if io.info(self.backing()).is_some() { ZERO } else { 0 };
            let discarded = Box::pin(self.discard_range(io, request.range(), unmapped)).await;
            self.judge(io, discarded).await?;
        }
        self.finish(io, request.flags()).await
    }

    /// Ends a change of the map: durable if asked for, and not too much held back.
    async fn finish(&self, io: &mut Io<'_, '_>, flags: u32) -> Result<()> {
        if flags & flag::FUA != 0 { Box::pin(self.flush_all(io)).await } else { Ok(()) }
    }

    /// The whole clusters, or subclusters, in a range; the image's last one is whole if it is covered as far as it goes.
    fn whole_units(&self, range: &Range<u64>) -> Range<u64> {
        let unit = self.geometry.unit_bytes();
        let end = if range.end >= self.size_bytes() { range.end } else { range.end / unit * unit };
        let start = range.start.next_multiple_of(unit);
        start..end.max(start)
    }

    /// Makes a range read as zeroes.
    pub(crate) async fn zero_range(&self, io: &mut Io<'_, '_>, range: Range<u64>, flags: u32) -> Result<()> {
        let whole = self.whole_units(&range);
        let head = range.start..whole.start.min(range.end);
        let tail = whole.end.min(range.end).max(head.end)..range.end;
        let mut plain = Vec::new();
        for part in [head, tail] {
            if !part.is_empty() && !self.is_zero(io, part.clone()).await? {
                plain.push(part);
            }
        }
        if flags & flag::NO_FALLBACK != 0 && !plain.is_empty() {
            return Err(Error::NOT_SUPPORTED);
        }
        let mut at = whole.start;
        while at < whole.end.min(range.end) {
            let next = at..self.edge(&(at..whole.end));
            if let Some(part) = self.packed_in(io, &next).await? {
                if flags & flag::NO_FALLBACK != 0 {
                    return Err(Error::NOT_SUPPORTED);
                }
                at = part.end;
                self.write_plain_zeroes(io, part).await?;
                continue;
            }
            at = match self.geometry.version {
                2 => self.zero_clusters_v2(io, next, flags).await?,
                _ => self.zero_clusters(io, next, flags).await?,
            };
        }
        for part in plain {
            self.write_plain_zeroes(io, part).await?;
        }
        Ok(())
    }

    /// Is a range zero, as far as the map says?
    pub(crate) async fn is_zero(&self, io: &mut Io<'_, '_>, range: Range<u64>) -> Result<bool> {
        let mut at = range.start;
        while at < range.end {
            let Some(run) = self.look(at, range.end - at, false)? else {
                self.load(io, at).await?;
                continue;
            };
            let zero = match run.mapping {
                Mapping::Zero { .. } => true,
                Mapping::Unallocated => self.in_backing(io, at..at + run.length) == 0,
                _ => false,
            };
            if !zero {
                return Ok(false);
            }
            at += run.length;
        }
        Ok(true)
    }

    /// The part of a range that one slice stands for.
    fn in_slice(&self, range: &Range<u64>) -> (Range<u64>, usize) {
        let coverage = self.geometry.slice_coverage();
        let end = range.end.min((range.start / coverage + 1).saturating_mul(coverage));
        let clusters = self.geometry.align_up(end) - self.geometry.align_down(range.start);
        (range.start..end, (clusters >> self.geometry.cluster_bits) as usize)
    }

    /// Turns the first clusters of a range into zero clusters; returns where it stopped.
    async fn zero_clusters(&self, io: &mut Io<'_, '_>, range: Range<u64>, flags: u32) -> Result<u64> {
        let (range, clusters) = self.in_slice(&range);
        let start = self.geometry.align_down(range.start);
        let _held = self.ranges.hold(start..self.geometry.align_up(range.end)).await;
        if self.raw_external {
            self.zero_raw(io, &range, flags).await?;
        }
        // What a data file has at other places than the disk has is nothing.
        let unmap = flags & flag::MAY_UNMAP != 0 && !self.raw_external;
        let mut meta = self.lock(io).await?;
        let zero = |i: usize, old: Entry| {
            let mapping = self.geometry.mapping(old.word)?;
            if self.geometry.extended_l2 {
                let cluster = start + ((i as u64) << self.geometry.cluster_bits);
                return Ok(self.zeroed(old, self.touched(cluster, &range), unmap));
            }
            Ok(Entry::of(match mapping {
                Mapping::Zero { .. } | Mapping::Data { .. } if !unmap => old.word | ZERO,
                _ => ZERO,
            }))
        };
        self.remap(&mut meta, io, start, clusters, true, zero).await?;
        self.after_remap(meta, io).await?;
        Ok(range.end)
    }

    /// Makes a data file that reads as the disk does read as zeroes.
    async fn zero_raw(&self, io: &mut Io<'_, '_>, range: &Range<u64>, flags: u32) -> Result<()> {
        let range = range.start..range.end.min(self.size_bytes().max(range.start));
        self.data().zero_fast(io, range, flags & (flag::MAY_UNMAP | flag::NO_FALLBACK), true).await
    }

    /// Version 2 has no zero clusters: what cannot be unmapped is written.
    async fn zero_clusters_v2(&self, io: &mut Io<'_, '_>, range: Range<u64>, flags: u32) -> Result<u64> {
        let (range, _) = self.in_slice(&range);
        if self.is_zero(io, range.clone()).await? {
            return Ok(range.end);
        }
        if flags & flag::MAY_UNMAP != 0 && self.in_backing(io, range.clone()) == 0 {
            return self.unmap(io, range, 0).await;
        }
        if flags & flag::NO_FALLBACK != 0 {
            return Err(Error::NOT_SUPPORTED);
        }
        self.write_plain_zeroes(io, range.clone()).await?;
        Ok(range.end)
    }

    /// Sets the entries of the whole clusters of a range to `unmapped`.
    pub(crate) async fn discard_range(
        &self,
        io: &mut Io<'_, '_>,
        range: Range<u64>,
        unmapped: u64,
    ) -> Result<()> {
        let whole = self.whole_units(&range);
        let mut at = whole.start;
        while at < whole.end {
            at = self.unmap(io, at..whole.end, unmapped).await?;
        }
        Ok(())
    }

    /// Sets the entries of the first clusters of a range to `unmapped`; returns where it stopped.
    async fn unmap(&self, io: &mut Io<'_, '_>, range: Range<u64>, unmapped: u64) -> Result<u64> {
        let (part, clusters) = self.in_slice(&range);
        if unmapped == 0
            && let Some(run) = self.look(part.start, range.end - part.start, false)?
            && run.mapping == Mapping::Unallocated
        {
            return Ok(part.start + run.length);
        }
        let start = self.geometry.align_down(part.start);
        let _held = self.ranges.hold(start..self.geometry.align_up(part.end)).await;
        if self.raw_external {
            self.zero_raw(io, &part, flag::MAY_UNMAP).await?;
        } else if self.geometry.data_file {
            // At once, because the place is taken by whoever writes next. Nobody can rely on what is there meanwhile.
            let inside = part.start..part.end.min(self.data().end());
            if inside.start < inside.end && self.pass_discard.load(Relaxed) {
                io.discard(self.data().child, inside).await;
            }
        }
        let unmapped = if self.raw_external { ZERO } else { unmapped };
        let mut meta = self.lock(io).await?;
        let unmap = |i: usize, old: Entry| {
            self.geometry.mapping(old.word)?;
            if self.geometry.extended_l2 {
                let cluster = start + ((i as u64) << self.geometry.cluster_bits);
                return Ok(self.unmapped(old, self.touched(cluster, &part), unmapped != 0));
            }
            Ok(Entry::of(unmapped))
        };
        self.remap(&mut meta, io, start, clusters, true, unmap).await?;
        self.after_remap(meta, io).await?;
        Ok(part.end)
    }

    async fn after_remap(
        &self,
        mut meta: async_lock::MutexGuard<'_, super::meta::Meta>,
        io: &mut Io<'_, '_>,
    ) -> Result<()> {
        self.trim(&mut meta, io).await?;
        if self.much_given_up(&meta) { self.flush_locked(&mut meta, io).await } else { Ok(()) }
    }
}

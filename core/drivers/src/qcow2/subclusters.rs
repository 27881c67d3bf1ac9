//! Extended L2 entries: a cluster has 32 subclusters, each of which is data, zeroes, or the backing file's.
//!
//! Space is still taken and given up by clusters. What is written allocates the subclusters that it touches, so that a
//! small write copies at most what surrounds it in two of them.

use super::{
    Qcow2,
    io::Io,
    layout::{COMPRESSED, COPIED, Entry, OFFSET_MASK, SUBCLUSTERS},
    meta::Taken,
    write::{MERGE_BYTES_MAX, Payload},
};
use driveline_op::Result;
use std::ops::Range;

/// A write that touches one cluster: what it does to it.
struct Plan<'a> {
    taken: Option<Taken<'a>>,
    host: u64,
    /// The entry that the map gets.
    entry: Entry,
    /// Subclusters that are where they will be.
    in_place: u64,
    /// Subclusters that are copied as a whole.
    copied: u64,
}

/// Runs of bits that are set, as ranges of their numbers.
fn runs(mut bits: u64) -> impl Iterator<Item = Range<u64>> {
    std::iter::from_fn(move || {
        (bits != 0).then(|| {
            let start = u64::from(bits.trailing_zeros());
            let end = start + u64::from((bits >> start).trailing_ones());
            bits &= !(((1 << (end - start)) - 1) << start);
            start..end
        })
    })
}

impl Qcow2 {
    /// The subclusters of the cluster at `start` that a range touches, a bit each.
    pub(crate) fn touched(&self, start: u64, range: &Range<u64>) -> u64 {
        let unit = self.geometry.unit_bytes();
        let first = range.start.saturating_sub(start) / unit;
        let end = range.end.saturating_sub(start).div_ceil(unit).min(SUBCLUSTERS);
        if first >= end { 0 } else { ((1 << (end - first)) - 1) << first }
    }

    /// Writes to a cluster that cannot be written in place as a whole. Returns how many bytes it did, perhaps none.
    pub(crate) async fn allocate_subclusters(
        &self,
        io: &mut Io<'_, '_>,
        payload: Payload<'_>,
        offset: u64,
        length: u64,
    ) -> Result<u64> {
        let cluster_bytes = self.geometry.cluster_bytes();
        let unit = self.geometry.unit_bytes();
        let start = self.geometry.align_down(offset);
        let length = length.min(start + cluster_bytes - offset);
        let range = offset..offset + length;
        let _held = self.ranges.hold(start..start + cluster_bytes).await;
        let Some(plan) = self.plan(io, start, self.touched(start, &range)).await? else { return Ok(0) };

        // A data file is as long as the disk, so that it can be read as the disk.
        let disk_end =
            if self.geometry.data_file { self.size_bytes().max(range.end) } else { start + cluster_bytes };
        for subclusters in runs(plan.copied) {
            let from = start + subclusters.start * unit;
            let to = (start + subclusters.end * unit).min(disk_end);
            if from < to {
                self.copy_old(io, from..to, plan.host + (from - start)).await?;
            }
        }
        // What surrounds the data in subclusters that are not there yet.
        let is_there = |at: u64| plan.in_place & 1 << ((at - start) / unit) != 0;
        let first = offset - (offset - start) % unit;
        let last = (start + (range.end - start).next_multiple_of(unit)).min(disk_end);
        let from = if is_there(offset) { offset } else { first };
        let to = if is_there(range.end - 1) { range.end } else { last };
        let at = |guest: u64| plan.host + (guest - start);
        if (from, to) != (offset, range.end) && to - from <= MERGE_BYTES_MAX {
            let mut buffer = vec![0; (to - from) as usize];
            let (before, rest) = buffer.split_at_mut((offset - from) as usize);
            let (data, after) = rest.split_at_mut(length as usize);
            self.read_old(io, from, before).await?;
            payload.copy_to(data);
            self.read_old(io, range.end, after).await?;
            self.data().write(io, at(from), &buffer).await?;
        } else {
            for part in [from..offset, range.end..to] {
                if !part.is_empty() {
                    let place = at(part.start);
                    self.copy_old(io, part, place).await?;
                }
            }
            self.put(io, payload, at(offset), length).await?;
        }
        let mut meta = self.lock(io).await?;
        self.remap(&mut meta, io, start, 1, false, |_, _| Ok(plan.entry)).await?;
        if let Some(taken) = plan.taken {
            taken.keep();
        }
        self.trim(&mut meta, io).await?;
        if self.much_given_up(&meta) {
            self.flush_locked(&mut meta, io).await?;
        }
        Ok(length)
    }

    async fn copy_old(&self, io: &mut Io<'_, '_>, guest: Range<u64>, host: u64) -> Result<()> {
        let mut buffer = vec![0; (guest.end - guest.start) as usize];
        self.read_old(io, guest.start, &mut buffer).await?;
        self.data().write(io, host, &buffer).await
    }

    /// What is to be done so that subclusters can be written. `None`: they may be written in place by now.
    async fn plan(&self, io: &mut Io<'_, '_>, start: u64, touched: u64) -> Result<Option<Plan<'_>>> {
        let mut meta = self.lock(io).await?;
        let old = loop {
            let (slice, first) = self.own_slice(&mut meta, io, start).await?;
            if let Some(entry) = self.map.lock().entry(slice, first) {
                break entry;
            }
        };
        self.geometry.mapping(old.word)?;
        let packed = old.word & COMPRESSED != 0;
        let allocated = if packed { u64::from(u32::MAX) } else { old.allocated() };
        let own = !packed && old.word & COPIED != 0;
        if own && allocated & touched == touched {
            return Ok(None);
        }
        let (taken, host, in_place) = if self.geometry.data_file {
            (None, start, allocated)
        } else if own {
            let host = old.word & OFFSET_MASK;
            self.map.lock().check_data(host..host + self.geometry.cluster_bytes())?;
            (None, host, allocated)
        } else {
            let taken = self.take(&mut meta, io, 1, false).await?;
            let host = taken.clusters.start << self.geometry.cluster_bits;
            (Some(taken), host, 0)
        };
        let zeroes = if packed { 0 } else { old.zeroes() & !touched };
        let entry = Entry { word: host | COPIED, bits: zeroes << SUBCLUSTERS | allocated | touched };
        Ok(Some(Plan { taken, host, entry, in_place, copied: allocated & !touched & !in_place }))
    }

    /// Makes the subclusters of an entry read as zeroes. With `unmap`, space that nothing is in is given up. A packed
    /// cluster is zeroed as a whole only; see [`Qcow2::packed_in`].
    pub(crate) fn zeroed(&self, old: Entry, touched: u64, unmap: bool) -> Entry {
        let packed = old.word & COMPRESSED != 0;
        let (allocated, zeroes) = if packed { (0, 0) } else { (old.allocated() & !touched, old.zeroes()) };
        let word = if packed || unmap && allocated == 0 { 0 } else { old.word };
        Entry { word, bits: (zeroes | touched) << SUBCLUSTERS | allocated }
    }

    /// Unmaps subclusters: they are the backing file's again, or zeroes. Of a packed cluster only all can be.
    pub(crate) fn unmapped(&self, old: Entry, touched: u64, to_zeroes: bool) -> Entry {
        let all = touched == u64::from(u32::MAX);
        if old.word & COMPRESSED != 0 && !all {
            return old;
        }
        let zeroed = self.zeroed(old, touched, true);
        let bits = if to_zeroes { zeroed.bits } else { zeroed.bits & !(touched << SUBCLUSTERS) };
        Entry { bits, ..zeroed }
    }

    /// Where the first part of a range ends that is whole clusters, or inside one.
    pub(crate) fn edge(&self, range: &Range<u64>) -> u64 {
        let (start, end) = (self.geometry.align_up(range.start), self.geometry.align_down(range.end));
        match () {
            () if !self.geometry.extended_l2 => range.end,
            () if start > range.start => start.min(range.end),
            () if end > range.start => end,
            () => range.end,
        }
    }

    /// The part of a range, up to its first cluster's end, that is in a packed cluster which it does not cover.
    pub(crate) async fn packed_in(
        &self,
        io: &mut Io<'_, '_>,
        range: &Range<u64>,
    ) -> Result<Option<Range<u64>>> {
        let start = self.geometry.align_down(range.start);
        let part = range.start..range.end.min(start + self.geometry.cluster_bytes());
        if !self.geometry.extended_l2 || self.touched(start, &part) == u64::from(u32::MAX) {
            return Ok(None);
        }
        loop {
            if let Some(run) = self.look(range.start, 1, false)? {
                let packed = matches!(run.mapping, super::layout::Mapping::Compressed(_));
                return Ok(packed.then_some(part));
            }
            self.load(io, range.start).await?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_those_of_the_bits() {
        let found = |bits| runs(bits).collect::<Vec<_>>();
        assert_eq!(found(0), []);
        assert_eq!(found(0b1011_0001), [0..1, 4..6, 7..8]);
        assert_eq!(found(0x7fff_fffd), [0..1, 2..31]);
    }
}

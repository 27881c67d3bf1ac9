//! The mapping of guest clusters as far as it is in memory: the L1 table, and slices of L2 tables.
//!
//! Everything here is under one short lock. Only holders of the metadata lock change entries, so what was found
//! under that lock stays as it was found.

use super::{
    layout::{Entry, Geometry, Mapping, OFFSET_MASK, REFTABLE_MASK, corrupt},
    snapshot::Snapshot,
};
use driveline_op::Result;
use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
    ops::Range,
    task::{Context, Poll, Waker},
};

/// Offsets are spread well by one multiplication.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct OffsetHasher(u64);

impl Hasher for OffsetHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _: &[u8]) {
        unreachable!("only offsets are hashed")
    }
    fn write_u64(&mut self, offset: u64) {
        self.0 = (offset >> 9).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(26);
    }
}

pub(crate) type ByOffset<V> = HashMap<u64, V, BuildHasherDefault<OffsetHasher>>;

/// What a stretch of the guest's bytes is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// As for its first cluster.
    pub(crate) mapping: Mapping,
    /// Where the first byte is in the file, if it is anywhere as it reads.
    pub(crate) host: u64,
    /// Bytes.
    pub(crate) length: u64,
}

/// What a look into the map finds.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Found {
    Run(Run),
    /// A slice must be loaded first.
    Missing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    Loading,
    Ready,
}

#[derive(Debug)]
struct Slot {
    offset: u64,
    state: State,
    dirty: bool,
    used: u64,
    entries: Box<[u64]>,
}

/// What to do about a slice that is wanted.
#[derive(Debug)]
pub(crate) enum Load {
    Ready,
    /// Somebody loads it.
    Wait,
    /// The caller loads it, into this slot.
    Go(usize),
}

/// What a cluster is, other than data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Metadata {
    Table,
    Bitmap,
}

#[derive(Debug)]
pub(crate) struct Map {
    geometry: Geometry,
    pub(crate) l1: Vec<u64>,
    /// Where the header and the tables that it points to are: never data, whatever a damaged image says.
    pub(crate) protected: [Range<u64>; 3],
    /// Where else no data is: L2 tables, refcount blocks, what belongs to snapshots, and bitmaps. By cluster.
    metadata: ByOffset<Metadata>,
    index: ByOffset<usize>,
    slots: Vec<Slot>,
    capacity: usize,
    dirty: usize,
    tick: u64,
    waiters: Vec<Waker>,
}

impl Map {
    /// `cache_bytes` bounds the slices in memory (a handful are always kept).
    pub(crate) fn new(
        geometry: Geometry,
        l1: Vec<u64>,
        protected: [Range<u64>; 3],
        cache_bytes: u64,
    ) -> Self {
        let capacity = (cache_bytes / geometry.slice_bytes()).clamp(8, 1 << 24) as usize;
        Self {
            geometry,
            l1,
            protected,
            metadata: ByOffset::default(),
            index: ByOffset::default(),
            slots: Vec::new(),
            capacity,
            dirty: 0,
            tick: 0,
            waiters: Vec::new(),
        }
    }

    /// What the guest's bytes from `offset` on are, as far as they are one thing, `length` bytes at most.
    ///
    /// Data that is contiguous in the file is one run; for writing only if all of it may be written in place.
    #[inline]
    pub(crate) fn find(&mut self, offset: u64, length: u64, writing: bool) -> Result<Found> {
        let geometry = self.geometry;
        let index = geometry.l1_index(offset);
        let table = geometry.table(self.l1.get(index).copied().unwrap_or(0))?;
        if table == 0 {
            let mut end = (index as u64 + 1) << geometry.l1_shift();
            let mut next = index + 1;
            while end - offset < length && self.l1.get(next).is_none_or(|entry| entry & OFFSET_MASK == 0) {
                (end, next) = (end + (1 << geometry.l1_shift()), next + 1);
            }
            let length = length.min(end - offset);
            return Ok(Found::Run(Run { mapping: Mapping::Unallocated, host: 0, length }));
        }
        let (slice, first) = geometry.slice_of(table, offset);
        let Some(&slot) = self.index.get(&slice) else { return Ok(Found::Missing) };
        let slot = &mut self.slots[slot];
        if slot.state != State::Ready {
            return Ok(Found::Missing);
        }
        self.tick += 1;
        slot.used = self.tick;
        let unit = geometry.unit_bytes();
        let within = offset % unit;
        let first = first * (geometry.cluster_bytes() / unit) as usize
            + (geometry.in_cluster(offset) / unit) as usize;
        let mapping = geometry.unit(&slot.entries, first)?;
        if geometry.data_file
            && let Mapping::Data { host, .. } = mapping
            && host != offset - within
        {
            return Err(corrupt(format_args!(
                "the cluster at {:#x} of the disk is at {host:#x} of the data file, where it cannot be",
                offset - within
            )));
        }
        let (mut bytes, mut at) = (unit - within, 0);
        let (host, goes_on): (u64, &dyn Fn(Mapping, u64) -> bool) = match mapping {
            // Reading does not care whose the cluster is.
            Mapping::Data { host, copied } => (
                host + within,
                &move |next, at| matches!(next, Mapping::Data { host: h, copied: c } if h == host + at && (!writing || c == copied)),
            ),
            Mapping::Unallocated => (0, &|next, _| next == Mapping::Unallocated),
            Mapping::Zero { .. } => (0, &|next, _| matches!(next, Mapping::Zero { .. })),
            Mapping::Compressed(_) => {
                bytes = geometry.cluster_bytes() - geometry.in_cluster(offset);
                (0, &|_, _| false)
            }
        };
        let units = (geometry.slice_coverage() / unit) as usize;
        for next in first + 1..units {
            at += unit;
            let goes_on = |next| geometry.unit(&slot.entries, next).is_ok_and(|next| goes_on(next, at));
            if bytes >= length || !goes_on(next) {
                break;
            }
            bytes += unit;
        }
        let length = length.min(bytes);
        if writing && !geometry.data_file && matches!(mapping, Mapping::Data { copied: true, .. }) {
            self.check_data(host..host + length)?;
        }
        Ok(Found::Run(Run { mapping, host, length }))
    }

    /// Refuses to write data where there is none.
    #[inline]
    pub(crate) fn check_data(&self, range: Range<u64>) -> Result<()> {
        let mut found = self.protected.iter().find(|p| range.start < p.end && p.start < range.end).cloned();
        let mut cluster = self.geometry.align_down(range.start);
        while cluster < range.end && found.is_none() {
            let end = cluster + self.geometry.cluster_bytes();
            found = self.metadata.contains_key(&cluster).then_some(cluster..end);
            cluster = end;
        }
        match found {
            None => Ok(()),
            Some(metadata) => Err(corrupt(format_args!(
                "data would be written to {range:x?}, which overlaps metadata at {metadata:x?}"
            ))),
        }
    }

    /// A cluster is metadata from now on, until it is given up: see [`Map::forget`].
    pub(crate) fn protect(&mut self, cluster: u64) {
        self.metadata.insert(cluster, Metadata::Table);
    }

    /// Is it metadata of the disk?
    pub(crate) fn is_table(&self, cluster: u64) -> bool {
        self.metadata.get(&cluster) == Some(&Metadata::Table)
    }

    /// Bitmaps are in these clusters from now on, and in no others.
    pub(crate) fn protect_bitmaps(&mut self, clusters: impl Iterator<Item = u64>) {
        self.metadata.retain(|_, what| *what != Metadata::Bitmap);
        for cluster in clusters {
            self.metadata.entry(cluster).or_insert(Metadata::Bitmap);
        }
    }

    /// Protects what the tables in memory point to.
    pub(crate) fn protect_all(&mut self, reftable: &[u64], snapshots: &[Snapshot], snapshots_offset: u64) {
        let (tables, blocks) =
            (self.l1.iter().map(|e| e & OFFSET_MASK), reftable.iter().map(|e| e & REFTABLE_MASK));
        self.metadata = tables.chain(blocks).filter(|&at| at != 0).map(|at| (at, Metadata::Table)).collect();
        let table = (snapshots_offset, super::snapshot::encode(snapshots).len() as u64);
        let l1s = snapshots.iter().map(|s| (s.l1_offset, u64::from(s.l1_entries) * 8));
        for (start, bytes) in l1s.chain([table]) {
            let mut cluster = start;
            while cluster < start + bytes {
                self.protect(cluster);
                cluster += self.geometry.cluster_bytes();
            }
        }
    }

    /// The slice that stands for a guest offset and the entry in it; `None` without a table.
    pub(crate) fn slice_of(&self, offset: u64) -> Result<Option<(u64, usize)>> {
        let l1_entry = self.l1.get(self.geometry.l1_index(offset)).copied().unwrap_or(0);
        let table = self.geometry.table(l1_entry)?;
        Ok((table != 0).then(|| self.geometry.slice_of(table, offset)))
    }

    /// The words of a slice that is loaded.
    pub(crate) fn entries(&self, slice: u64) -> Option<&[u64]> {
        let slot = &self.slots[*self.index.get(&slice)?];
        (slot.state == State::Ready).then_some(&slot.entries)
    }

    /// Entries of a slice that is loaded, by their numbers.
    pub(crate) fn some(&self, slice: u64, numbers: Range<usize>) -> Option<Vec<Entry>> {
        let step = self.geometry.entry_words();
        let words = &self.entries(slice)?[numbers.start * step..numbers.end * step];
        let entry = |words: &[u64]| Entry { word: words[0], bits: words.get(1).copied().unwrap_or(0) };
        Some(words.chunks_exact(step).map(entry).collect())
    }

    /// An entry of a slice that is loaded.
    pub(crate) fn entry(&self, slice: u64, number: usize) -> Option<Entry> {
        Some(self.some(slice, number..number + 1)?[0])
    }

    /// Changes entries of a slice that is loaded, from one on.
    pub(crate) fn set(&mut self, slice: u64, first: usize, entries: &[Entry]) {
        let step = self.geometry.entry_words();
        let words = self.entries_mut(slice).expect("what is changed is loaded");
        for (words, entry) in words[first * step..].chunks_exact_mut(step).zip(entries) {
            words[0] = entry.word;
            if let Some(bits) = words.get_mut(1) {
                *bits = entry.bits;
            }
        }
    }

    /// Changes words of a slice that is loaded.
    fn entries_mut(&mut self, slice: u64) -> Option<&mut [u64]> {
        let slot = &mut self.slots[*self.index.get(&slice)?];
        if slot.state != State::Ready {
            return None;
        }
        self.tick += 1;
        slot.used = self.tick;
        if !slot.dirty {
            slot.dirty = true;
            self.dirty += 1;
        }
        Some(&mut slot.entries)
    }

    /// Finds out who loads a slice, and makes room for it.
    pub(crate) fn begin_load(&mut self, slice: u64) -> Load {
        if let Some(&slot) = self.index.get(&slice) {
            return if self.slots[slot].state == State::Ready { Load::Ready } else { Load::Wait };
        }
        // More are taken only while the others are dirty or being loaded; see `needs_write_back`.
        let slot = if self.slots.len() < self.capacity { None } else { self.victim() };
        let slot = slot.unwrap_or_else(|| {
            let entries = vec![0; self.geometry.slice_bytes() as usize / 8].into_boxed_slice();
            self.slots.push(Slot { offset: 0, state: State::Free, dirty: false, used: 0, entries });
            self.slots.len() - 1
        });
        if self.slots[slot].state == State::Ready {
            self.index.remove(&self.slots[slot].offset);
        }
        self.slots[slot].state = State::Loading;
        self.slots[slot].offset = slice;
        self.index.insert(slice, slot);
        Load::Go(slot)
    }

    /// The slot that was not used for the longest time and can be given up.
    fn victim(&self) -> Option<usize> {
        let can = |slot: &Slot| slot.state == State::Free || slot.state == State::Ready && !slot.dirty;
        let slots = self.slots.iter().enumerate().filter(|(_, slot)| can(slot));
        slots.min_by_key(|(_, slot)| if slot.state == State::Free { 0 } else { slot.used }).map(|(i, _)| i)
    }

    /// Ends what `begin_load` began: with the bytes read, or without.
    pub(crate) fn end_load(&mut self, slot: usize, bytes: Option<&[u8]>) {
        self.tick += 1;
        let s = &mut self.slots[slot];
        s.used = self.tick;
        match bytes {
            Some(bytes) => {
                super::layout::decode_words(bytes, &mut s.entries);
                s.state = State::Ready;
            }
            None => {
                s.state = State::Free;
                self.index.remove(&s.offset);
            }
        }
        for waker in self.waiters.drain(..) {
            waker.wake();
        }
    }

    /// Pending while somebody loads the slice.
    pub(crate) fn poll_loaded(&mut self, slice: u64, cx: &Context<'_>) -> Poll<()> {
        match self.index.get(&slice) {
            Some(&slot) if self.slots[slot].state == State::Loading => {
                self.waiters.push(cx.waker().clone());
                Poll::Pending
            }
            _ => Poll::Ready(()),
        }
    }

    /// Are so many slices dirty that they should be written?
    pub(crate) fn needs_write_back(&self) -> bool {
        self.dirty * 2 > self.capacity
    }

    /// Offsets of dirty slices, ascending.
    pub(crate) fn dirty_slices(&self) -> Vec<u64> {
        let mut out: Vec<_> = self.slots.iter().filter(|s| s.dirty).map(|s| s.offset).collect();
        out.sort_unstable();
        out
    }

    pub(crate) fn mark_clean(&mut self, slice: u64) {
        if let Some(&slot) = self.index.get(&slice)
            && std::mem::take(&mut self.slots[slot].dirty)
        {
            self.dirty -= 1;
        }
    }

    /// Forgets what is cached of a cluster that was given up.
    pub(crate) fn forget(&mut self, cluster: u64) {
        self.metadata.remove(&cluster);
        let mut slice = cluster;
        while slice < cluster + self.geometry.cluster_bytes() {
            if let Some(&slot) = self.index.get(&slice)
                && self.slots[slot].state == State::Ready
            {
                self.mark_clean(slice);
                self.index.remove(&slice);
                self.slots[slot].state = State::Free;
            }
            slice += self.geometry.slice_bytes();
        }
    }
}

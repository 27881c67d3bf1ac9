//! Refcounts: the table, and slices of its blocks. All of it is under the metadata lock.
//!
//! What is in memory may be written at any time: a count is raised before anything points to the cluster, and
//! lowered after what pointed to it is gone from the disk.

use super::{
    event,
    header::REFTABLE_BYTES_MAX,
    io::{FILE, File, Io},
    layout::{Geometry, REFTABLE_MASK, corrupt, encode_words},
    map::ByOffset,
};
use driveline_op::{Error, Result};
use std::{collections::BTreeSet, ops::Range};

/// The unit in which the table is written, in entries: a sector.
const TABLE_PART: usize = 64;

#[derive(Debug)]
struct Slot {
    bytes: Box<[u8]>,
    dirty: bool,
    used: u64,
}

/// The refcounts of an image.
#[derive(Debug)]
pub(crate) struct Refcounts {
    geometry: Geometry,
    pub(crate) table: Vec<u64>,
    pub(crate) table_offset: u64,
    /// Parts of the table that were changed, by number.
    table_dirty: BTreeSet<usize>,
    slots: ByOffset<Slot>,
    capacity: usize,
    tick: u64,
    /// No cluster before this one is free, as far as we know.
    pub(crate) hint: u64,
    /// Table entries of blocks that are being added. If that fails or is cancelled they are taken out again, before
    /// anything else is done.
    adding: Vec<usize>,
    /// Blocks that were added, by offset, until somebody takes note of them.
    pub(crate) added: Vec<u64>,
}

/// What came of looking for free clusters.
#[derive(Debug)]
pub(crate) enum Space {
    /// The first cluster and how many.
    Found(u64, u64),
    /// The table must have that many entries first.
    TableTooSmall(u64),
}

impl Refcounts {
    pub(crate) fn new(geometry: Geometry, table: Vec<u64>, table_offset: u64, cache_bytes: u64) -> Self {
        let capacity = (cache_bytes / geometry.slice_bytes()).clamp(8, 1 << 24) as usize;
        Self {
            geometry,
            table,
            table_offset,
            table_dirty: BTreeSet::new(),
            slots: ByOffset::default(),
            capacity,
            tick: 0,
            hint: 1,
            adding: Vec::new(),
            added: Vec::new(),
        }
    }

    /// The offset of the block that counts a cluster; 0: none, so the count is 0.
    fn block(&self, cluster: u64) -> Result<u64> {
        let index = cluster / self.geometry.block_entries();
        let entry = usize::try_from(index).ok().and_then(|i| self.table.get(i)).copied().unwrap_or(0);
        let block = entry & REFTABLE_MASK;
        if self.geometry.in_cluster(block) != 0 {
            return Err(corrupt(format_args!(
                "refcount table entry {index} is {entry:#x}, which is not at a cluster's beginning"
            )));
        }
        Ok(block)
    }

    fn slice_entries(&self) -> u64 {
        (self.geometry.slice_bytes() * 8) >> self.geometry.refcount_order
    }

    /// The slice with the count of a cluster, loaded, and the entry in it; `None`: there is no block.
    async fn slice(&mut self, file: &File, io: &mut Io<'_, '_>, cluster: u64) -> Result<Option<(u64, u64)>> {
        let block = self.block(cluster)?;
        if block == 0 {
            return Ok(None);
        }
        let entry = cluster % self.geometry.block_entries();
        let slice = block + entry / self.slice_entries() * self.geometry.slice_bytes();
        self.tick += 1;
        if let Some(slot) = self.slots.get_mut(&slice) {
            slot.used = self.tick;
        } else {
            self.make_room(file, io).await?;
            let mut bytes = vec![0; self.geometry.slice_bytes() as usize].into_boxed_slice();
            io.tell(FILE, event::REFBLOCK_LOAD).await;
            file.read(io, slice, &mut bytes).await?;
            self.slots.insert(slice, Slot { bytes, dirty: false, used: self.tick });
        }
        Ok(Some((slice, entry % self.slice_entries())))
    }

    async fn make_room(&mut self, file: &File, io: &mut Io<'_, '_>) -> Result<()> {
        if self.slots.len() < self.capacity {
            return Ok(());
        }
        let (&oldest, slot) = self.slots.iter().min_by_key(|(_, slot)| slot.used).expect("the cache is full");
        if slot.dirty {
            io.tell(FILE, event::REFBLOCK_UPDATE_PART).await;
            file.write(io, oldest, &slot.bytes).await?;
        }
        self.slots.remove(&oldest);
        Ok(())
    }

    pub(crate) async fn get(&mut self, file: &File, io: &mut Io<'_, '_>, cluster: u64) -> Result<u64> {
        let order = self.geometry.refcount_order;
        let found = self.slice(file, io, cluster).await?;
        Ok(found.map_or(0, |(slice, entry)| get(&self.slots[&slice].bytes, order, entry)))
    }

    /// Sets the count of a cluster that a block counts.
    pub(crate) async fn set(
        &mut self,
        file: &File,
        io: &mut Io<'_, '_>,
        cluster: u64,
        value: u64,
    ) -> Result<()> {
        let order = self.geometry.refcount_order;
        let found = self.slice(file, io, cluster).await?;
        let (slice, entry) =
            found.ok_or_else(|| corrupt(format_args!("cluster {cluster} is not counted")))?;
        let slot = self.slots.get_mut(&slice).expect("it was just loaded");
        set(&mut slot.bytes, order, entry, value);
        slot.dirty = true;
        Ok(())
    }

    /// The largest count.
    pub(crate) fn max(&self) -> u64 {
        u64::MAX >> (64 - (1u32 << self.geometry.refcount_order))
    }

    /// Raises the count of a cluster that is in use by one. False if it is not, or if it cannot count more.
    pub(crate) async fn raise(&mut self, file: &File, io: &mut Io<'_, '_>, cluster: u64) -> Result<bool> {
        self.undo_adding();
        let count = self.get(file, io, cluster).await?;
        if count == 0 || count == self.max() {
            return Ok(false);
        }
        self.set(file, io, cluster, count + 1).await?;
        Ok(true)
    }

    /// Lowers the count of a cluster by one; returns what is left.
    pub(crate) async fn lower(&mut self, file: &File, io: &mut Io<'_, '_>, cluster: u64) -> Result<u64> {
        self.undo_adding();
        let count = self.get(file, io, cluster).await?;
        if count == 0 {
            // The image was damaged before. Nothing is lost: the cluster was never safe.
            tracing::warn!(cluster, "a cluster in use has refcount 0: the qcow2 image is damaged");
            return Ok(0);
        }
        self.set(file, io, cluster, count - 1).await?;
        if count == 1 {
            self.hint = self.hint.min(cluster);
        }
        Ok(count - 1)
    }

    /// How many of the clusters, from the first, are free; looks no further than the block.
    async fn free_run(&mut self, file: &File, io: &mut Io<'_, '_>, range: Range<u64>) -> Result<u64> {
        let order = self.geometry.refcount_order;
        let Some((slice, entry)) = self.slice(file, io, range.start).await? else {
            let block_end = (range.start / self.geometry.block_entries() + 1) * self.geometry.block_entries();
            return Ok(range.end.min(block_end) - range.start);
        };
        let end = (entry + range.end - range.start).min(self.slice_entries());
        let bytes = &self.slots[&slice].bytes;
        Ok((entry..end).take_while(|&i| get(bytes, order, i) == 0).count() as u64)
    }

    /// The first cluster from `from` on that is free.
    async fn first_free(&mut self, file: &File, io: &mut Io<'_, '_>, mut from: u64) -> Result<u64> {
        let order = self.geometry.refcount_order;
        loop {
            let Some((slice, entry)) = self.slice(file, io, from).await? else { return Ok(from) };
            let (bytes, end) = (&self.slots[&slice].bytes, self.slice_entries());
            match (entry..end).find(|&i| get(bytes, order, i) == 0) {
                Some(i) => return Ok(from + (i - entry)),
                None => from += end - entry,
            }
        }
    }

    /// Takes free clusters that follow each other: `wanted` of them, or at least one if fewer will do.
    /// Their counts are 1 afterwards.
    ///
    /// Where a block is missing that would count them, it is made, in clusters right behind those taken.
    pub(crate) async fn take(
        &mut self,
        file: &File,
        io: &mut Io<'_, '_>,
        wanted: u64,
        fewer: bool,
    ) -> Result<Space> {
        let entries = self.geometry.block_entries();
        self.undo_adding();
        let mut start = self.first_free(file, io, self.hint).await?;
        let first = start;
        let clusters_max = 1 << (56 - self.geometry.cluster_bits);
        loop {
            let (mut length, mut blocks) = (0, 0);
            // Each block that is missing for the stretch makes it one cluster longer.
            while length < wanted + blocks {
                let at = start + length;
                if at >= clusters_max {
                    return Err(Error::new(27, "the qcow2 image cannot become larger than 2^56 bytes"));
                }
                if at / entries >= self.table.len() as u64 {
                    // The stretch must be counted as a whole by the larger table.
                    return if fewer && length > 0 && blocks == 0 {
                        self.mark(file, io, start, length).await?;
                        Ok(Space::Found(start, length))
                    } else {
                        Ok(Space::TableTooSmall((at + wanted + 2) / entries + 2))
                    };
                }
                let missing = self.block(at)? == 0;
                if missing && fewer && length > 0 && blocks == 0 {
                    break;
                }
                blocks += u64::from(missing && (length == 0 || at.is_multiple_of(entries)));
                let more = self.free_run(file, io, at..start + wanted + blocks).await?;
                length += more;
                if more == 0 {
                    break;
                }
            }
            if length >= wanted + blocks || fewer && length > blocks {
                let usable = length - blocks;
                if blocks > 0 {
                    self.make_blocks(file, io, start..start + length, usable).await?;
                }
                self.mark(file, io, start, length).await?;
                self.added.extend(self.adding.drain(..).map(|index| self.table[index]));
                if start == first {
                    self.hint = start + length;
                }
                return Ok(Space::Found(start, usable));
            }
            start = self.first_free(file, io, start + length.max(1)).await?;
        }
    }

    fn undo_adding(&mut self) {
        for index in std::mem::take(&mut self.adding) {
            self.forget(self.table[index]);
            self.table[index] = 0;
        }
    }

    async fn mark(&mut self, file: &File, io: &mut Io<'_, '_>, start: u64, length: u64) -> Result<()> {
        if start == 0 {
            return Err(corrupt("the header's cluster has refcount 0"));
        }
        for cluster in start..start + length {
            self.set(file, io, cluster, 1).await?;
        }
        Ok(())
    }

    /// Makes the missing blocks for a stretch of free clusters, in its clusters from number `at` on.
    async fn make_blocks(
        &mut self,
        file: &File,
        io: &mut Io<'_, '_>,
        range: Range<u64>,
        at: u64,
    ) -> Result<()> {
        let entries = self.geometry.block_entries();
        let cluster_bytes = self.geometry.cluster_bytes();
        let mut place = range.start + at;
        for index in range.start / entries..=(range.end - 1) / entries {
            if self.table[index as usize] & REFTABLE_MASK != 0 {
                continue;
            }
            let offset = place * cluster_bytes;
            // Nothing points to it yet. What is dirty in the cache is written later, before the table is.
            io.tell(FILE, event::REFBLOCK_ALLOC).await;
            io.tell(FILE, event::REFBLOCK_ALLOC_WRITE).await;
            file.zero(io, offset..offset + cluster_bytes).await?;
            self.forget(offset);
            self.adding.push(index as usize);
            self.table[index as usize] = offset;
            self.table_dirty.insert(index as usize / TABLE_PART);
            place += 1;
        }
        debug_assert_eq!(place, range.end, "as many blocks as were counted");
        Ok(())
    }

    /// Forgets what is cached of a cluster.
    pub(crate) fn forget(&mut self, offset: u64) {
        if self.slots.is_empty() {
            return;
        }
        let mut slice = offset;
        while slice < offset + self.geometry.cluster_bytes() {
            self.slots.remove(&slice);
            slice += self.geometry.slice_bytes();
        }
    }

    pub(crate) fn is_dirty(&self) -> bool {
        !self.table_dirty.is_empty() || self.slots.values().any(|slot| slot.dirty)
    }

    /// Writes blocks, and then what of the table points to new ones, with a flush between.
    pub(crate) async fn write(&mut self, file: &File, io: &mut Io<'_, '_>) -> Result<()> {
        self.undo_adding();
        let mut dirty: Vec<u64> = self.slots.iter().filter(|(_, s)| s.dirty).map(|(&at, _)| at).collect();
        dirty.sort_unstable();
        for slice in dirty {
            let slot = self.slots.get_mut(&slice).expect("nothing leaves the cache meanwhile");
            io.tell(FILE, event::REFBLOCK_UPDATE_PART).await;
            file.write(io, slice, &slot.bytes).await?;
            slot.dirty = false;
        }
        if self.table_dirty.is_empty() {
            return Ok(());
        }
        io.flush().await?;
        while let Some(&part) = self.table_dirty.first() {
            let entries = part * TABLE_PART..((part + 1) * TABLE_PART).min(self.table.len());
            let mut bytes = vec![0; entries.len() * 8];
            encode_words(&self.table[entries.clone()], &mut bytes);
            io.tell(FILE, event::REFBLOCK_ALLOC_HOOKUP).await;
            file.write(io, self.table_offset + entries.start as u64 * 8, &bytes).await?;
            self.table_dirty.remove(&part);
        }
        Ok(())
    }

    /// Writes a larger table, with `entries` at least, behind everything that the present one counts, and returns
    /// its offset and clusters. It is used once the header points to it: see [`Refcounts::adopt`].
    pub(crate) async fn write_larger(
        &mut self,
        file: &File,
        io: &mut Io<'_, '_>,
        entries: u64,
    ) -> Result<Larger> {
        let cluster_bytes = self.geometry.cluster_bytes();
        let block_entries = self.geometry.block_entries();
        let per_cluster = cluster_bytes / 8;
        let old = self.table.len() as u64;
        let mut wanted = entries.max(old + old / 2);
        // The table and the blocks that count it are one stretch; each may make the other longer.
        let (clusters, blocks) = loop {
            let clusters = wanted.div_ceil(per_cluster);
            let mut blocks = clusters.div_ceil(block_entries);
            while blocks * block_entries < clusters + blocks {
                blocks += 1;
            }
            if clusters * per_cluster > old + blocks {
                break (clusters, blocks);
            }
            wanted = old + blocks + 1;
        };
        let bytes = clusters * cluster_bytes;
        let start = old * block_entries;
        if bytes > REFTABLE_BYTES_MAX || (start + clusters + blocks) * cluster_bytes >= 1 << 56 {
            return Err(Error::new(27, "the refcount table of the qcow2 image cannot become larger"));
        }
        io.tell(FILE, event::REFTABLE_GROW).await;
        let mut table = self.table.clone();
        table.resize((clusters * per_cluster) as usize, 0);
        let offset = start * cluster_bytes;
        for i in 0..blocks {
            let at = offset + (clusters + i) * cluster_bytes;
            let mut block = vec![0; cluster_bytes as usize];
            let counted = (clusters + blocks).saturating_sub(i * block_entries).min(block_entries);
            for entry in 0..counted {
                set(&mut block, self.geometry.refcount_order, entry, 1);
            }
            self.forget(at);
            io.tell(FILE, event::REFBLOCK_ALLOC_WRITE_BLOCKS).await;
            file.write(io, at, &block).await?;
            table[(old + i) as usize] = at;
        }
        let mut words = vec![0; bytes as usize];
        encode_words(&table, &mut words);
        io.tell(FILE, event::REFBLOCK_ALLOC_WRITE_TABLE).await;
        file.write(io, offset, &words).await?;
        Ok(Larger { table, offset, clusters, hint: start + clusters + blocks })
    }

    /// Uses the larger table. Returns the clusters of the old one, which are still counted.
    pub(crate) fn adopt(&mut self, larger: Larger) -> Range<u64> {
        let first = self.table_offset >> self.geometry.cluster_bits;
        let clusters = (self.table.len() as u64 * 8).div_ceil(self.geometry.cluster_bytes());
        self.table = larger.table;
        self.table_offset = larger.offset;
        self.table_dirty.clear();
        self.hint = self.hint.min(larger.hint);
        first..first + clusters
    }
}

/// A refcount table that is written, but not in use.
#[derive(Debug)]
pub(crate) struct Larger {
    table: Vec<u64>,
    pub(crate) offset: u64,
    pub(crate) clusters: u64,
    hint: u64,
}

/// The count at an index of a block.
pub(crate) fn get(bytes: &[u8], order: u32, index: u64) -> u64 {
    if order < 3 {
        let bit = index << order;
        let mask = (1u8 << (1 << order)) - 1;
        return u64::from(bytes[(bit / 8) as usize] >> (bit % 8) & mask);
    }
    let width = 1usize << (order - 3);
    let at = index as usize * width;
    bytes[at..at + width].iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

/// Sets the count at an index of a block.
pub(crate) fn set(bytes: &mut [u8], order: u32, index: u64, value: u64) {
    if order < 3 {
        let bit = index << order;
        let mask = (1u8 << (1 << order)) - 1;
        let byte = &mut bytes[(bit / 8) as usize];
        *byte = *byte & !(mask << (bit % 8)) | (value as u8 & mask) << (bit % 8);
        return;
    }
    let width = 1usize << (order - 3);
    let at = index as usize * width;
    bytes[at..at + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_count_that_is_set_is_found_and_others_stay(
            order in 0u32..=6, index in 0u64..64, value: u64, fill: u8
        ) {
            let mut bytes = vec![fill; 512];
            let value = value & (u64::MAX >> (64 - (1u32 << order)));
            let before: Vec<_> = (0..64).map(|i| get(&bytes, order, i)).collect();
            set(&mut bytes, order, index, value);
            for i in 0..64 {
                let expected = if i == index { value } else { before[i as usize] };
                prop_assert_eq!(get(&bytes, order, i), expected);
            }
        }
    }

    #[test]
    fn narrow_counts_begin_at_the_lowest_bit() {
        let mut bytes = [0; 8];
        set(&mut bytes, 0, 1, 1);
        set(&mut bytes, 1, 4, 2);
        assert_eq!(bytes[..2], [0b10, 0b10]);
    }
}

//! Refcounts from nothing: a new table and new blocks, in clusters that neither the image nor its old refcounts use.

use super::{Checker, Use};
use crate::qcow2::{
    header::REFTABLE_BYTES_MAX,
    layout::{REFTABLE_MASK, REFTABLE_RESERVED},
    refcount,
};
use driveline_graph::{Error, Kind, Result};
use std::collections::{BTreeMap, BTreeSet};

impl Checker<'_, '_, '_> {
    /// Makes new refcounts, and points the header to them. The old ones are free then.
    pub(super) async fn rebuild(&mut self) -> Result<()> {
        let geometry = self.geometry;
        let bits = geometry.cluster_bits;
        let per_block = geometry.block_entries();
        // Until the header points to the new ones, the old ones stay as they are.
        let first = self.header.reftable_offset >> bits;
        let old_table = first..first + u64::from(self.header.reftable_clusters);
        let sound = |entry: &&u64| **entry & REFTABLE_RESERVED == 0 && **entry & REFTABLE_MASK != 0;
        let old: BTreeSet<u64> = (self.reftable.iter().filter(sound).map(|entry| entry >> bits))
            .chain(old_table.clone())
            .collect();
        let mut counts: BTreeMap<u64, u64> = self.counts.used().collect();
        // What was counted for the old ones; a block that is also something else was counted once more for that.
        for cluster in self.counted_for_refcounts() {
            match counts.get_mut(&cluster) {
                Some(1) => {
                    counts.remove(&cluster);
                }
                Some(count) => *count -= 1,
                None => {}
            }
        }
        let mut next = 1;
        let mut take = |counts: &mut BTreeMap<u64, u64>, wanted: u64| {
            let mut start = next;
            loop {
                let taken = (start..start + wanted).rev().find(|c| counts.contains_key(c) || old.contains(c));
                match taken {
                    Some(taken) => start = taken + 1,
                    None => break,
                }
            }
            if wanted == 1 {
                next = start + 1;
            }
            counts.extend((start..start + wanted).map(|cluster| (cluster, 1)));
            start
        };
        let mut blocks: BTreeMap<u64, u64> = BTreeMap::new();
        let mut table = 0..0;
        // Blocks and the table count themselves, too: more of them until all is counted.
        loop {
            let needed: BTreeSet<u64> = counts.keys().map(|cluster| cluster / per_block).collect();
            let missing: Vec<u64> = needed.into_iter().filter(|index| !blocks.contains_key(index)).collect();
            let entries = blocks.keys().chain(&missing).max().map_or(1, |last| last + 1);
            let clusters = (entries * 8).div_ceil(geometry.cluster_bytes());
            if clusters * geometry.cluster_bytes() > REFTABLE_BYTES_MAX {
                return Err(Error::new(
                    Kind::NotSupported,
                    "the image is too large for refcounts of this width, so they cannot be made anew",
                ));
            }
            if missing.is_empty() && table.end - table.start >= clusters {
                break;
            }
            for index in missing {
                blocks.insert(index, take(&mut counts, 1));
            }
            if table.end - table.start < clusters {
                table.for_each(|cluster| {
                    counts.remove(&cluster);
                });
                let first = take(&mut counts, clusters);
                table = first..first + clusters;
            }
        }
        let mut words = vec![0; ((table.end - table.start) * geometry.cluster_bytes() / 8) as usize];
        for (&index, &place) in &blocks {
            let mut block = vec![0; geometry.cluster_bytes() as usize];
            for (&cluster, &count) in counts.range(index * per_block..(index + 1) * per_block) {
                refcount::set(&mut block, geometry.refcount_order, cluster - index * per_block, count);
            }
            self.file.write(self.io, place << bits, &block).await?;
            words[index as usize] = place << bits;
        }
        self.write_words(table.start << bits, &words).await?;
        self.header.reftable_offset = table.start << bits;
        self.header.reftable_clusters = (table.end - table.start) as u32;
        self.write_header().await?;
        self.reftable = words;
        self.rebuild = false;
        self.image_end = counts.keys().next_back().map_or(0, |last| last + 1);
        for cluster in blocks.into_values().chain(table) {
            self.counts.add(cluster, u64::MAX, Use::Other);
        }
        Ok(())
    }

    /// The clusters that the walk counted for the table and the blocks, as often as it did.
    fn counted_for_refcounts(&self) -> Vec<u64> {
        let geometry = self.geometry;
        let bits = geometry.cluster_bits;
        let file_clusters = self.file_clusters();
        let blocks = self.reftable.iter().filter_map(|entry| {
            let block = entry & REFTABLE_MASK;
            let counted = entry & REFTABLE_RESERVED == 0
                && block != 0
                && geometry.in_cluster(block) == 0
                && block >> bits < file_clusters;
            counted.then_some(block >> bits)
        });
        let first = self.header.reftable_offset >> bits;
        let table_end = self.header.reftable_offset + self.reftable.len() as u64 * 8;
        let limit = self.file.end().next_multiple_of(512) + geometry.cluster_bytes();
        let table =
            if table_end < limit { first..first + u64::from(self.header.reftable_clusters) } else { 0..0 };
        blocks.chain(table).collect()
    }
}

//! Removing what makes no sense from tables, so that all that is left can be counted.

use super::{
    Checker,
    walk::{L1, Wrong},
};
use crate::qcow2::{
    layout::{COPIED, L1_RESERVED, L2_RESERVED, OFFSET_MASK, ZERO},
    snapshot,
};
use driveline_graph::Result;

impl Checker<'_, '_, '_> {
    /// Goes through all tables once, with the counts of the walk before.
    pub(super) async fn fix(&mut self) -> Result<()> {
        self.quiet = true;
        self.complete_snapshots().await?;
        for table in self.l1_tables() {
            self.fix_l1(table).await?;
        }
        Ok(())
    }

    async fn fix_l1(&mut self, table: L1) -> Result<()> {
        let mut entries = self.words(table.offset, table.entries * 8).await?;
        let before = entries.clone();
        for entry in &mut entries {
            *entry = self.fixed_table(*entry & !L1_RESERVED).await?;
        }
        if entries != before {
            // A table that is copied is there before it is pointed to.
            self.io.flush().await?;
            self.write_words(table.offset, &entries).await?;
        }
        Ok(())
    }

    /// What an L1 entry should be: what it is, or nothing, or a table of its own.
    async fn fixed_table(&mut self, entry: u64) -> Result<u64> {
        let bytes = self.geometry.cluster_bytes();
        let offset = entry & OFFSET_MASK;
        if offset == 0 || self.geometry.in_cluster(offset) != 0 || !self.inside(offset, bytes) {
            return Ok(0);
        }
        let cluster = offset >> self.geometry.cluster_bits;
        let mut words = self.words(offset, bytes).await?;
        let before = words.clone();
        let shared = self.counts.contradictory(cluster);
        let (mut nonsense, mut used) = (0, 0);
        for entry in words.chunks_exact_mut(self.geometry.entry_words()) {
            used += usize::from(entry[0] != 0);
            nonsense += usize::from(self.fix_entry(entry).await?);
        }
        match (shared || self.counts.overflown(cluster), shared && nonsense > used / 2) {
            // It is something else, and hardly was a table: a table that is damaged makes sense for the most part.
            (_, true) => Ok(0),
            (true, false) => {
                let own = self.fresh_clusters(1)?;
                self.write_words(own, &words).await?;
                Ok(own | COPIED)
            }
            (false, _) => {
                if words != before {
                    self.io.flush().await?;
                    self.write_words(offset, &words).await?;
                }
                Ok(entry)
            }
        }
    }

    fn inside(&self, offset: u64, bytes: u64) -> bool {
        offset.saturating_add(bytes)
            < self.file.end().next_multiple_of(512).saturating_add(self.geometry.cluster_bytes())
    }

    /// Makes sense of an L2 entry. True if it had none.
    async fn fix_entry(&mut self, entry: &mut [u64]) -> Result<bool> {
        let (word, bits) = (entry[0], entry.get(1).copied().unwrap_or(0));
        if word | bits == 0 {
            return Ok(false);
        }
        let mut nonsense = false;
        for wrong in self.wrong_with(word, bits).into_iter().flatten() {
            nonsense = true;
            match wrong {
                Wrong::Reserved => entry[0] &= !self.reserved(),
                Wrong::CopiedCompressed => entry[0] &= !COPIED,
                // What is allocated is data; what is allocated nowhere is not.
                Wrong::Subclusters if self.area(entry[0]).is_some() => {
                    entry[1] &= !((bits & 0xffff_ffff) << 32)
                }
                Wrong::Subclusters => entry[1] &= !0xffff_ffff,
                _ => self.clear(entry),
            }
        }
        let Some((offset, bytes)) = self.area(entry[0]).filter(|_| !self.has_data_file()) else {
            return Ok(nonsense);
        };
        if !self.inside(offset, bytes) {
            self.clear(entry);
            return Ok(true);
        }
        let bits = self.geometry.cluster_bits;
        let (first, end) = (offset >> bits, ((offset + bytes - 1) >> bits) + 1);
        if (first..end).any(|cluster| self.counts.overflown(cluster)) {
            let own = self.fresh_clusters(end - first)? + self.geometry.in_cluster(offset);
            let mut data = vec![0; bytes as usize];
            self.file.read(self.io, offset, &mut data).await?;
            self.file.write(self.io, own, &data).await?;
            // The offset is in the lowest bits, whatever else there is.
            entry[0] = entry[0] - offset + own;
        }
        Ok(nonsense)
    }

    fn reserved(&self) -> u64 {
        let zero = if self.geometry.extended_l2 || self.geometry.version < 3 { ZERO } else { 0 };
        L2_RESERVED | zero
    }

    /// Makes an entry one that needs no data: zeroes, where the format has them.
    fn clear(&self, entry: &mut [u64]) {
        match entry {
            [word] if self.geometry.version >= 3 => *word = ZERO,
            [word] => *word = 0,
            [word, bits, ..] => (*word, *bits) = (0, 0xffff_ffff << 32),
            [] => {}
        }
    }

    /// Tells the snapshots that do not know how large the disk was. The table is written to another place, to which
    /// the header then points.
    async fn complete_snapshots(&mut self) -> Result<()> {
        let short: Vec<usize> = (0..self.snapshots.len()).filter(|&number| self.is_short(number)).collect();
        if short.is_empty() {
            return Ok(());
        }
        let size = self.header.size_bytes;
        for number in short {
            let snapshot = &mut self.snapshots[number];
            let state = snapshot.vm_state_bytes();
            snapshot.extra.splice(.., state.to_be_bytes().into_iter().chain(size.to_be_bytes()));
        }
        let mut bytes = snapshot::encode(&self.snapshots);
        let clusters = (bytes.len() as u64).div_ceil(self.geometry.cluster_bytes());
        bytes.resize((clusters * self.geometry.cluster_bytes()) as usize, 0);
        let offset = self.fresh_clusters(clusters)?;
        self.file.write(self.io, offset, &bytes).await?;
        self.header.snapshots_offset = offset;
        self.write_header().await
    }
}

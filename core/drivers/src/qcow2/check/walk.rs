//! Following every pointer of an image, and counting where they lead.

use super::{Checker, Use, snapshot};
use crate::qcow2::{
    header::incompatible,
    layout::{
        COMPRESSED, COPIED, L1_RESERVED, L2_RESERVED, OFFSET_MASK, REFTABLE_MASK, REFTABLE_RESERVED, ZERO,
    },
};
use driveline_graph::Result;
use std::fmt;

/// What is wrong with an entry of an L2 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wrong {
    /// Bits that must be zero are not.
    Reserved,
    /// A compressed cluster that claims to be its only user.
    CopiedCompressed,
    /// A compressed cluster where none can be: with an external data file, or with subclusters.
    MisplacedCompressed,
    /// Subclusters that are allocated and zero, or allocated nowhere.
    Subclusters,
    /// It does not point to a cluster's beginning.
    Unaligned,
    /// It points past the end of the file.
    Outside,
    /// What it points to is used more often than can be counted.
    Overflown,
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Wrong::Reserved => "has reserved bits set",
            Wrong::CopiedCompressed => "is compressed, but claims that it may be written in place",
            Wrong::MisplacedCompressed => "is compressed where that cannot be",
            Wrong::Subclusters => "has subclusters that contradict each other",
            Wrong::Unaligned => "points to data that is not at a cluster's beginning",
            Wrong::Outside => "points past the end of the file",
            Wrong::Overflown => "points to a cluster that is used more often than can be counted",
        })
    }
}

/// An L1 table: where it is, and its entries.
#[derive(Clone, Copy, Debug)]
pub(super) struct L1 {
    pub(super) offset: u64,
    pub(super) entries: u64,
    pub(super) active: bool,
}

impl Checker<'_, '_, '_> {
    /// Counts everything anew.
    pub(super) async fn walk(&mut self) -> Result<()> {
        self.counts = Default::default();
        (self.nonsense, self.rebuild) = (false, false);
        let report = &mut self.report;
        (report.allocated_clusters, report.fragmented_clusters, report.compressed_clusters) = (0, 0, 0);
        self.count(0, 1, Use::Other, &"the header");
        for number in 0..self.snapshots.len() {
            if self.is_short(number) {
                self.nonsense = true;
                self.corruption(|| format!("snapshot {number} does not say how large the disk was"));
            }
        }
        if self.has_data_file() && !self.snapshots.is_empty() {
            let count = self.snapshots.len();
            self.corruption(|| format!("{count} snapshots of an image with an external data file"));
        }
        for table in self.l1_tables() {
            self.walk_l1(table).await?;
        }
        let bytes = snapshot::encode(&self.snapshots).len() as u64;
        self.count(self.header.snapshots_offset, bytes, Use::Other, &"the snapshot table");
        let bytes = self.reftable.len() as u64 * 8;
        self.count(self.header.reftable_offset, bytes, Use::Other, &"the refcount table");
        self.walk_bitmaps().await?;
        self.walk_refcounts();
        Ok(())
    }

    /// Does an entry of the snapshot table lack what version 3 requires?
    pub(super) fn is_short(&self, snapshot: usize) -> bool {
        self.header.version >= 3 && self.snapshots[snapshot].extra.len() < snapshot::EXTRA_BYTES_V3
    }

    pub(super) fn has_data_file(&self) -> bool {
        self.header.incompatible & incompatible::EXTERNAL_DATA != 0
    }

    /// The L1 tables that can be read: the active one, and those of the snapshots.
    pub(super) fn l1_tables(&mut self) -> Vec<L1> {
        let entries = self.header.l1_entries.into();
        let mut tables = vec![L1 { offset: self.header.l1_offset, entries, active: true }];
        let wrong: Vec<_> = self.snapshots.iter().map(|s| s.check(&self.header).err()).collect();
        for (number, wrong) in wrong.into_iter().enumerate() {
            match wrong {
                Some(error) => self.corruption(|| error.to_string()),
                None => tables.push(L1 {
                    offset: self.snapshots[number].l1_offset,
                    entries: self.snapshots[number].l1_entries.into(),
                    active: false,
                }),
            }
        }
        tables
    }

    /// Counts the clusters of an area. Says what is wrong with it, if something is.
    pub(super) fn count(
        &mut self,
        offset: u64,
        bytes: u64,
        as_what: Use,
        what: &dyn fmt::Display,
    ) -> Option<Wrong> {
        if bytes == 0 {
            return None;
        }
        let end = offset.saturating_add(bytes);
        // The last cluster may be there in part.
        if end >= self.file.end().next_multiple_of(512).saturating_add(self.geometry.cluster_bytes()) {
            self.corruption(|| format!("{what} at {offset:#x} reaches past the end of the file"));
            return Some(Wrong::Outside);
        }
        let max = u64::MAX >> (64 - (1u32 << self.geometry.refcount_order));
        let mut wrong = None;
        for cluster in offset >> self.geometry.cluster_bits..((end - 1) >> self.geometry.cluster_bits) + 1 {
            if !self.counts.add(cluster, max, as_what) {
                self.corruption(|| {
                    format!("cluster {cluster} is used more often than can be counted, by {what}")
                });
                wrong = Some(Wrong::Overflown);
            }
        }
        wrong
    }

    async fn walk_l1(&mut self, table: L1) -> Result<()> {
        let whose = if table.active { "the active L1 table" } else { "the L1 table of a snapshot" };
        self.count(table.offset, table.entries * 8, Use::Other, &whose);
        for (index, entry) in self.words(table.offset, table.entries * 8).await?.into_iter().enumerate() {
            if entry == 0 {
                continue;
            }
            if entry & L1_RESERVED != 0 {
                self.nonsense = true;
                self.corruption(|| format!("entry {index} of {whose}, {entry:#x}, has reserved bits set"));
            }
            let offset = entry & OFFSET_MASK;
            if offset == 0 || self.geometry.in_cluster(offset) != 0 {
                self.nonsense = true;
                self.corruption(|| {
                    format!("entry {index} of {whose}, {entry:#x}, does not point to a cluster's beginning")
                });
                continue;
            }
            let bytes = self.geometry.cluster_bytes();
            let wrong = self.count(offset, bytes, Use::Table, &format_args!("L2 table {index}"));
            if let Some(wrong) = wrong {
                self.nonsense = true;
                if wrong == Wrong::Outside {
                    continue;
                }
            }
            self.walk_l2(offset, table.active).await?;
        }
        Ok(())
    }

    async fn walk_l2(&mut self, table: u64, active: bool) -> Result<()> {
        let words = self.words(table, self.geometry.cluster_bytes()).await?;
        let mut expected = 0;
        for (index, entry) in words.chunks_exact(self.geometry.entry_words()).enumerate() {
            let (word, bits) = (entry[0], entry.get(1).copied().unwrap_or(0));
            if word | bits == 0 {
                continue;
            }
            for wrong in self.wrong_with(word, bits).into_iter().flatten() {
                self.nonsense = true;
                self.corruption(|| {
                    format!("entry {index} of the L2 table at {table:#x}, {word:#x}, {wrong}")
                });
            }
            let Some((offset, bytes)) = self.area(word) else { continue };
            if active {
                let compressed = word & COMPRESSED != 0;
                self.report.allocated_clusters += 1;
                self.report.compressed_clusters += u64::from(compressed);
                let apart = expected != 0 && offset != expected;
                self.report.fragmented_clusters += u64::from(compressed || apart);
                expected = if compressed { expected } else { offset + bytes };
            }
            if !self.has_data_file() && !self.is_unused(word, bits) {
                let what = format_args!("entry {index} of the L2 table at {table:#x}");
                self.nonsense |= self.count(offset, bytes, Use::Other, &what).is_some();
            }
        }
        Ok(())
    }

    /// The area that an entry points to: its offset, and bytes.
    pub(super) fn area(&self, word: u64) -> Option<(u64, u64)> {
        if word & COMPRESSED != 0 {
            return Some(self.geometry.compressed(word & !COPIED));
        }
        let offset = word & OFFSET_MASK;
        // With an external data file, the first cluster is at 0.
        let is = offset != 0 || self.has_data_file() && word & COPIED != 0;
        is.then(|| (offset, self.geometry.cluster_bytes()))
    }

    /// Is it an entry whose area is not counted, because it cannot be one?
    fn is_unused(&self, word: u64, bits: u64) -> bool {
        word & COMPRESSED != 0 && bits != 0
    }

    /// What an entry itself says that it cannot mean.
    pub(super) fn wrong_with(&self, word: u64, bits: u64) -> [Option<Wrong>; 3] {
        let when = |is: bool, wrong| is.then_some(wrong);
        if word & COMPRESSED != 0 {
            let misplaced = self.has_data_file() || bits != 0;
            return [
                when(word & COPIED != 0, Wrong::CopiedCompressed),
                when(misplaced, Wrong::MisplacedCompressed),
                None,
            ];
        }
        let zero = if self.geometry.extended_l2 || self.geometry.version < 3 { ZERO } else { 0 };
        let area = self.area(word);
        let contradiction =
            (bits >> 32) & bits & 0xffff_ffff != 0 || area.is_none() && bits & 0xffff_ffff != 0;
        [
            when(word & (L2_RESERVED | zero) != 0, Wrong::Reserved),
            when(contradiction, Wrong::Subclusters),
            when(area.is_some_and(|(offset, _)| self.geometry.in_cluster(offset) != 0), Wrong::Unaligned),
        ]
    }

    /// Counts the blocks of the refcounts.
    fn walk_refcounts(&mut self) {
        for index in 0..self.reftable.len() {
            let entry = self.reftable[index];
            let block = entry & REFTABLE_MASK;
            if entry & REFTABLE_RESERVED != 0 || self.geometry.in_cluster(block) != 0 {
                self.rebuild = true;
                self.corruption(|| {
                    format!("entry {index} of the refcount table, {entry:#x}, does not point to a cluster's beginning")
                });
                continue;
            }
            if block == 0 {
                continue;
            }
            let cluster = block >> self.geometry.cluster_bits;
            if cluster >= self.file_clusters() {
                self.rebuild = true;
                self.corruption(|| {
                    format!("refcount block {index} at {block:#x} is past the end of the file")
                });
                continue;
            }
            self.count(block, self.geometry.cluster_bytes(), Use::Other, &"a refcount block");
            if self.counts.get(cluster) != 1 {
                self.rebuild = true;
                self.corruption(|| format!("refcount block {index} at {block:#x} is also used otherwise"));
            }
        }
    }
}

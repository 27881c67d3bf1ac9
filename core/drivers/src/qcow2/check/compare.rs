//! Comparing what is counted with what is used, and the flags that follow from it.

use super::{Checker, Repair};
use crate::qcow2::{
    layout::{COMPRESSED, COPIED, OFFSET_MASK, REFTABLE_MASK},
    refcount,
};
use driveline_graph::Result;

impl Checker<'_, '_, '_> {
    /// The block of the refcounts with that number, if it can be read; `Err`: it is nowhere.
    fn block(&self, index: u64) -> Result<Option<u64>, u64> {
        let entry = self.reftable.get(index as usize).copied().unwrap_or(0);
        match entry & REFTABLE_MASK {
            0 => Ok(None),
            block if self.geometry.in_cluster(block) != 0 => Err(entry),
            block => Ok(Some(block)),
        }
    }

    /// Compares refcounts. With `fix`, they are set right where that can be done in place.
    pub(super) async fn compare(&mut self, fix: bool) -> Result<()> {
        let geometry = self.geometry;
        let per_block = geometry.block_entries();
        let clusters = self.file_clusters().max(self.counts.end());
        let (fix_leaks, fix_corruptions) = (fix, fix && self.repair == Repair::All);
        self.image_end = self.counts.end();
        let mut counted = self.counts.used().collect::<Vec<_>>().into_iter().peekable();
        for index in 0..self.reftable.len().min(clusters.div_ceil(per_block) as usize) as u64 {
            let first = index * per_block;
            let end = (first + per_block).min(clusters);
            let block = match self.block(index) {
                Ok(None) => continue,
                Ok(Some(block)) => block,
                Err(entry) => {
                    self.report.check_errors += end - first;
                    self.note(|| {
                        format!(
                            "clusters {first} to {} are not checked: refcount table entry {entry:#x}",
                            end - 1
                        )
                    });
                    // Those that come before have no block at all.
                    while let Some((cluster, count)) = counted.next_if(|(cluster, _)| *cluster < end) {
                        if cluster < first {
                            self.uncounted(cluster, count);
                        }
                    }
                    continue;
                }
            };
            let mut bytes = vec![0; geometry.cluster_bytes() as usize];
            self.file.read(self.io, block, &mut bytes).await?;
            let mut changed = false;
            while let Some((cluster, count)) = counted.next_if(|(cluster, _)| *cluster < first) {
                self.uncounted(cluster, count);
            }
            for cluster in first..end {
                let stored = refcount::get(&bytes, geometry.refcount_order, cluster - first);
                let used = counted.next_if(|(next, _)| *next == cluster).map_or(0, |(_, count)| count);
                if stored > 0 {
                    self.image_end = self.image_end.max(cluster + 1);
                }
                if stored == used {
                    continue;
                }
                self.rebuild |= stored == 0;
                if if stored > used { fix_leaks } else { fix_corruptions } {
                    refcount::set(&mut bytes, geometry.refcount_order, cluster - first, used);
                    changed = true;
                } else if stored > used {
                    self.report.leaks += 1;
                    self.note(|| {
                        format!(
                            "cluster {cluster} is leaked: its refcount is {stored}, it is used {used} times"
                        )
                    });
                } else {
                    self.corruption(|| {
                        format!("cluster {cluster} has refcount {stored}, but is used {used} times")
                    });
                }
            }
            if changed {
                self.file.write(self.io, block, &bytes).await?;
            }
        }
        for (cluster, count) in counted {
            self.uncounted(cluster, count);
        }
        Ok(())
    }

    /// A cluster that no block counts.
    fn uncounted(&mut self, cluster: u64, count: u64) {
        self.rebuild = true;
        self.corruption(|| format!("cluster {cluster} has refcount 0, but is used {count} times"));
    }

    /// The refcount that the image has for the cluster at an offset; `None` if there is no way to know.
    async fn stored(&mut self, offset: u64, last: &mut (u64, Vec<u8>)) -> Result<Option<u64>> {
        let cluster = offset >> self.geometry.cluster_bits;
        let per_block = self.geometry.block_entries();
        Ok(match self.block(cluster / per_block) {
            Err(_) => None,
            Ok(None) => Some(0),
            Ok(Some(block)) => {
                if last.0 != block {
                    last.1.resize(self.geometry.cluster_bytes() as usize, 0);
                    self.file.read(self.io, block, &mut last.1).await?;
                    last.0 = block;
                }
                Some(refcount::get(&last.1, self.geometry.refcount_order, cluster % per_block))
            }
        })
    }

    /// Checks who claims to be the only user of a cluster, in what the active L1 table leads to.
    pub(super) async fn check_copied(&mut self) -> Result<()> {
        let sound = self.report.corruptions + self.report.leaks + self.report.check_errors == 0;
        let fix = match self.repair {
            Repair::Nothing => false,
            Repair::Leaks => sound,
            Repair::All => true,
        };
        let mut last = (0, Vec::new());
        let (l1_offset, l1_bytes) = (self.header.l1_offset, u64::from(self.header.l1_entries) * 8);
        let mut l1 = self.words(l1_offset, l1_bytes).await?;
        let mut l1_changed = false;
        let bytes = self.geometry.cluster_bytes();
        for (index, entry) in l1.iter_mut().enumerate() {
            let table = *entry & OFFSET_MASK;
            if table == 0 || self.geometry.in_cluster(table) != 0 {
                continue;
            }
            let what = || format!("entry {index} of the active L1 table");
            let stored = self.stored(table, &mut last).await?;
            l1_changed |= self.copied(entry, stored, fix, what);
            let mut words = self.words(table, bytes).await?;
            let step = self.geometry.entry_words();
            let mut changed = false;
            for number in (0..words.len()).step_by(step) {
                let word = words[number];
                if word & COMPRESSED != 0 {
                    continue;
                }
                let Some((offset, _)) = self.area(word) else { continue };
                // Nothing else is in a data file.
                let stored =
                    if self.has_data_file() { Some(1) } else { self.stored(offset, &mut last).await? };
                let what = || format!("entry {} of the L2 table at {table:#x}", number / step);
                changed |= self.copied(&mut words[number], stored, fix, what);
            }
            // What is also something else is not for us to write to.
            if changed && !self.counts.contradictory(table >> self.geometry.cluster_bits) {
                self.write_words(table, &words).await?;
            }
        }
        if l1_changed {
            self.write_words(l1_offset, &l1).await?;
        }
        Ok(())
    }

    /// Checks the flag of one entry; true if it was changed.
    fn copied(
        &mut self,
        word: &mut u64,
        stored: Option<u64>,
        fix: bool,
        what: impl FnOnce() -> String,
    ) -> bool {
        let Some(stored) = stored else { return false };
        if (stored == 1) == (*word & COPIED != 0) {
            return false;
        }
        let before = *word;
        self.corruption(|| {
            format!("{}, {before:#x}, claims the wrong thing about refcount {stored}", what())
        });
        if fix {
            *word ^= COPIED;
            self.report.corruptions -= 1;
            self.report.corruptions_fixed += 1;
        }
        fix
    }
}

//! What an L1 table leads to, counted once more or once less, and the flags that follow from it.

use super::super::{
    Qcow2,
    check::{Counts, Use},
    io::Io,
    layout::{COMPRESSED, COPIED, OFFSET_MASK, decode_words, encode_words},
    meta::Meta,
};
use driveline_graph::{Error, Kind, Result};

/// Who may claim to be the only user of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claims {
    /// Nobody.
    None,
    /// Whose cluster counts one use.
    Counted,
}

impl Qcow2 {
    async fn words(&self, io: &mut Io<'_, '_>, offset: u64, entries: u64) -> Result<Vec<u64>> {
        let mut bytes = vec![0; entries as usize * 8];
        self.file.read(io, offset, &mut bytes).await?;
        let mut words = vec![0; entries as usize];
        decode_words(&bytes, &mut words);
        Ok(words)
    }

    pub(super) async fn write_words(&self, io: &mut Io<'_, '_>, offset: u64, words: &[u64]) -> Result<()> {
        let mut bytes = vec![0; words.len() * 8];
        encode_words(words, &mut bytes);
        Ok(self.file.write(io, offset, &bytes).await?)
    }

    /// The L1 table at a place in the file.
    pub(super) async fn l1_at(&self, io: &mut Io<'_, '_>, offset: u64, entries: u32) -> Result<Vec<u64>> {
        self.words(io, offset, entries.into()).await
    }

    async fn table_words(&self, io: &mut Io<'_, '_>, table: u64) -> Result<Vec<u64>> {
        self.words(io, table, self.geometry.cluster_bytes() / 8).await
    }

    /// How often each cluster is used by the tables and the data that an L1 table leads to.
    pub(super) async fn reach(&self, io: &mut Io<'_, '_>, l1: &[u64]) -> Result<Counts> {
        let mut counts = Counts::default();
        let mut add = |cluster| counts.add(cluster, u64::MAX, Use::Other);
        for &entry in l1 {
            let table = self.geometry.table(entry)?;
            if table == 0 {
                continue;
            }
            add(table >> self.geometry.cluster_bits);
            for &word in self.table_words(io, table).await?.iter().step_by(self.geometry.entry_words()) {
                for cluster in self.uses(word)? {
                    add(cluster);
                }
            }
        }
        Ok(counts)
    }

    /// Can the clusters be counted that often more? Says so if not.
    pub(super) async fn check_counts(
        &self,
        meta: &mut Meta,
        io: &mut Io<'_, '_>,
        more: &Counts,
    ) -> Result<()> {
        let max = meta.refcounts.max();
        for (cluster, count) in more.used() {
            let now = meta.refcounts.get(&self.file, io, cluster).await?;
            if now == 0 {
                return Err(Error::new(
                    Kind::Corrupt,
                    format_args!("cluster {cluster} is used and has refcount 0; see 'driveline check-image'"),
                ));
            }
            if count > max - now {
                return Err(Error::new(
                    Kind::NotSupported,
                    format_args!(
                        "cluster {cluster} is used {now} times, and refcounts of the image end at {max}"
                    ),
                ));
            }
        }
        Ok(())
    }

    /// Counts the clusters that often more.
    pub(super) async fn raise_all(&self, meta: &mut Meta, io: &mut Io<'_, '_>, more: &Counts) -> Result<()> {
        for (cluster, count) in more.used() {
            let now = meta.refcounts.get(&self.file, io, cluster).await?;
            meta.refcounts.set(&self.file, io, cluster, now + count).await?;
        }
        Ok(())
    }

    /// Counts the clusters that often less.
    pub(super) async fn lower_all(&self, meta: &mut Meta, io: &mut Io<'_, '_>, less: &Counts) -> Result<()> {
        for (cluster, count) in less.used() {
            for _ in 0..count {
                meta.refcounts.lower(&self.file, io, cluster).await?;
            }
        }
        Ok(())
    }

    /// Sets the flags in an L1 table in memory, and in the L2 tables that it leads to.
    pub(super) async fn set_claims(
        &self,
        meta: &mut Meta,
        io: &mut Io<'_, '_>,
        l1: &mut [u64],
        claims: Claims,
    ) -> Result<()> {
        for entry in l1 {
            let table = self.geometry.table(*entry)?;
            if table == 0 {
                continue;
            }
            *entry = self.claim(meta, io, *entry, claims).await?;
            let mut words = self.table_words(io, table).await?;
            let before = words.clone();
            for word in words.iter_mut().step_by(self.geometry.entry_words()) {
                if *word & COMPRESSED == 0 && *word & OFFSET_MASK != 0 {
                    *word = self.claim(meta, io, *word, claims).await?;
                }
            }
            if words != before {
                self.write_words(io, table, &words).await?;
            }
        }
        Ok(())
    }

    async fn claim(&self, meta: &mut Meta, io: &mut Io<'_, '_>, word: u64, claims: Claims) -> Result<u64> {
        let cluster = (word & OFFSET_MASK) >> self.geometry.cluster_bits;
        let only = claims == Claims::Counted && meta.refcounts.get(&self.file, io, cluster).await? == 1;
        Ok(if only { word | COPIED } else { word & !COPIED })
    }
}

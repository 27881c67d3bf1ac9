//! Another size, no data, another backing file: changes while nothing is in flight.

use super::{
    Qcow2, event,
    header::{Header, L1_BYTES_MAX},
    io::{FILE, Io},
    layout::{OFFSET_MASK, decode_words, encode_words},
    meta::Meta,
};
use driveline_graph::{Error, Kind, Result};
use std::sync::atomic::Ordering::Relaxed;

impl Qcow2 {
    /// Takes a new size.
    pub(crate) async fn resize(&self, io: &mut Io<'_, '_>, size_bytes: u64) -> Result<()> {
        self.check_writable()?;
        let old = self.size_bytes();
        if self.geometry.version < 3 && self.header.lock().snapshots > 0 {
            return Err(Error::new(
                Kind::NotSupported,
                "a version 2 image with internal snapshots cannot be resized: they would not know their size",
            ));
        }
        if !size_bytes.is_multiple_of(512) {
            return Err(Error::new(
                Kind::Invalid,
                format_args!(
                    "{size_bytes} bytes; expected a multiple of 512, because QEMU cuts off the rest"
                ),
            ));
        }
        let entries = self.geometry.l1_entries(size_bytes);
        if size_bytes > i64::MAX as u64 || entries * 8 > L1_BYTES_MAX {
            return Err(Error::new(
                Kind::Invalid,
                format_args!(
                    "{size_bytes} bytes need an L1 table of {} bytes; the limit is {L1_BYTES_MAX}",
                    entries.saturating_mul(8)
                ),
            ));
        }
        if self.bitmaps_need_flags() {
            self.flag_bitmaps(io).await?;
        }
        if size_bytes < old {
            self.shrink(io, size_bytes).await?;
        } else {
            self.grow(io, old, size_bytes).await?;
        }
        if size_bytes != old {
            self.bitmaps.resized();
        }
        Ok(())
    }

    async fn shrink(&self, io: &mut Io<'_, '_>, size_bytes: u64) -> Result<()> {
        self.discard_range(io, self.geometry.align_up(size_bytes)..self.size_bytes(), 0).await?;
        let mut meta = self.lock(io).await?;
        let first = self.geometry.l1_entries(size_bytes) as usize;
        let entries = self.map.lock().l1.len();
        for index in first..entries {
            self.drop_table(&mut meta, io, index).await?;
        }
        self.flush_locked(&mut meta, io).await?;
        self.change_header(io, |header| header.size_bytes = size_bytes).await?;
        self.size_bytes.store(size_bytes, Relaxed);
        drop(meta);
        self.settle_resized(io).await;
        Ok(())
    }

    async fn grow(&self, io: &mut Io<'_, '_>, old: u64, size_bytes: u64) -> Result<()> {
        let needed = self.geometry.l1_entries(size_bytes) as usize;
        let mut meta = self.lock(io).await?;
        if self.map.lock().l1.len() < needed {
            self.grow_l1(&mut meta, io, needed).await?;
        }
        drop(meta);
        if self.raw_external {
            self.data().zero_fast(io, old..size_bytes, 0, true).await?;
        }
        // What was behind the end must not come to light: the rest of the last cluster, and what the backing file has.
        // The cluster is there already, so it can be changed before the size is.
        let in_backing = io.info(self.backing()).map_or(0, |info| info.size_bytes).min(size_bytes);
        let zero_end = self.geometry.align_up(old).min(size_bytes).max(in_backing);
        if old < zero_end {
            self.zero_tail(io, old, zero_end).await?;
        }
        let mut meta = self.lock(io).await?;
        self.flush_locked(&mut meta, io).await?;
        self.change_header(io, |header| header.size_bytes = size_bytes).await?;
        self.size_bytes.store(size_bytes, Relaxed);
        drop(meta);
        self.settle_resized(io).await;
        Ok(())
    }

    /// The image has its new size for good, so this is no error of the resize: what was given up is written with the next
    /// flush, and until then it is leaked at worst.
    async fn settle_resized(&self, io: &mut Io<'_, '_>) {
        if let Err(error) = self.settle(io).await {
            tracing::warn!("after a resize: {error}");
        }
    }

    /// Zeroes what is behind the old end, while that is still the end.
    async fn zero_tail(&self, io: &mut Io<'_, '_>, old: u64, end: u64) -> Result<()> {
        let first_whole = self.geometry.align_up(old).min(end);
        if old < first_whole && !self.is_zero(io, old..first_whole).await? {
            self.write_plain_zeroes(io, old..first_whole).await?;
        }
        if first_whole == end {
            return Ok(());
        }
        // The last cluster is zeroed as a whole: nothing of it is seen yet.
        self.zero_range(io, first_whole..self.geometry.align_up(end), 0).await?;
        Ok(())
    }

    /// Moves the L1 table to where it has room for more entries.
    async fn grow_l1(&self, meta: &mut Meta, io: &mut Io<'_, '_>, entries: usize) -> Result<()> {
        // What is dirty goes to the old table, which counts until the header points to the new one.
        self.flush_locked(meta, io).await?;
        let cluster_bytes = self.geometry.cluster_bytes();
        let clusters = (entries as u64 * 8).div_ceil(cluster_bytes);
        io.tell(FILE, event::L1_GROW_ALLOC_TABLE).await;
        let taken = self.take(meta, io, clusters, false).await?;
        let mut l1 = self.map.lock().l1.clone();
        let old_clusters = (l1.len() as u64 * 8).div_ceil(cluster_bytes);
        l1.resize(entries, 0);
        let mut bytes = vec![0; (clusters * cluster_bytes) as usize];
        encode_words(&l1, &mut bytes);
        let offset = taken.clusters.start * cluster_bytes;
        io.tell(FILE, event::L1_GROW_WRITE_TABLE).await;
        self.file.write(io, offset, &bytes).await?;
        meta.refcounts.write(&self.file, io).await?;
        self.sync(io).await?;
        let old_offset = self.header.lock().l1_offset;
        io.tell(FILE, event::L1_GROW_ACTIVATE_TABLE).await;
        self.change_header(io, |header| {
            header.l1_offset = offset;
            header.l1_entries = entries as u32;
        })
        .await?;
        taken.keep();
        self.map.lock().l1 = l1;
        let first = old_offset >> self.geometry.cluster_bits;
        if old_offset != 0 {
            for cluster in first..first + old_clusters {
                meta.refcounts.lower(&self.file, io, cluster).await?;
            }
        }
        Ok(())
    }

    /// Unmaps everything that one L1 entry stands for.
    async fn drop_table(&self, meta: &mut Meta, io: &mut Io<'_, '_>, index: usize) -> Result<()> {
        let l1_entry = self.map.lock().l1[index];
        let table = self.geometry.table(l1_entry)?;
        if table == 0 {
            return Ok(());
        }
        // What is dirty of the table must not come back when its cluster is something else.
        if !self.is_clean() {
            self.flush_locked(meta, io).await?;
        }
        let mut bytes = vec![0; self.geometry.cluster_bytes() as usize];
        self.file.read(io, table, &mut bytes).await?;
        let mut entries = vec![0; bytes.len() / 8];
        decode_words(&bytes, &mut entries);
        let mut used = Vec::new();
        for &entry in entries.iter().step_by(self.geometry.entry_words()) {
            used.push(self.uses(entry)?);
        }
        let cluster = (l1_entry & OFFSET_MASK) >> self.geometry.cluster_bits;
        used.push(cluster..cluster + 1);
        self.give_up_from_l1(meta, index, used.into_iter());
        if self.much_given_up(meta) {
            self.flush_locked(meta, io).await?;
        }
        Ok(())
    }

    /// Gives up everything that this layer has allocated.
    pub(crate) async fn make_empty(&self, io: &mut Io<'_, '_>) -> Result<()> {
        self.check_writable()?;
        if self.raw_external {
            return Err(Error::new(
                Kind::NotSupported,
                "the external data file must read as the disk does, so the image cannot be emptied",
            ));
        }
        if self.bitmaps_need_flags() {
            self.flag_bitmaps(io).await?;
        }
        let mut meta = self.lock(io).await?;
        let entries = self.map.lock().l1.len();
        for index in 0..entries {
            self.drop_table(&mut meta, io, index).await?;
        }
        drop(meta);
        Ok(self.settle(io).await?)
    }

    /// Writes another backing file, with its format, into the header.
    pub(crate) async fn set_backing_file(
        &self,
        io: &mut Io<'_, '_>,
        backing: Option<(&str, &str)>,
    ) -> Result<()> {
        self.check_writable()?;
        if self.raw_external && backing.is_some() {
            return Err(Error::new(
                Kind::NotSupported,
                "the external data file must read as the disk does, so the image cannot have a backing file",
            ));
        }
        let change = |header: &mut Header| {
            header.backing = backing.map(|(name, _)| name.to_owned());
            let format = backing.map(|(_, format)| format.to_owned());
            header.backing_format = format.filter(|format| !format.is_empty());
        };
        let mut header = self.header.lock().clone();
        change(&mut header);
        header.encode()?;
        // Data that was taken from the old backing file is durable before that is no longer named.
        let mut meta = self.lock(io).await?;
        self.flush_locked(&mut meta, io).await?;
        Ok(self.change_header(io, change).await?)
    }
}

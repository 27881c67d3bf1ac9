//! Changing metadata in memory, and writing it back in an order that a crash cannot hurt. See the module above.

use super::{
    Qcow2, event,
    header::Header,
    io::{FILE, Io},
    layout::{COMPRESSED, COPIED, Entry, Mapping, OFFSET_MASK, corrupt, encode_words},
    refcount::{Refcounts, Space},
};
use async_lock::MutexGuard;
use driveline_op::{Error, Result};
use parking_lot::Mutex;
use std::{
    collections::BTreeSet,
    ops::Range,
    sync::atomic::Ordering::{Relaxed, SeqCst},
};

/// The unit in which the L1 table is written, in entries: a sector.
const L1_PART: usize = 64;
/// So much that is given up is held back at most; then it is flushed to be used again.
const GIVEN_UP_MAX: usize = 1024;
const GIVEN_UP_BYTES_MAX: u64 = 1 << 30;

/// What is changed and written under the metadata lock.
#[derive(Debug)]
pub(crate) struct Meta {
    pub(crate) refcounts: Refcounts,
    l1_dirty: BTreeSet<usize>,
    /// The map points to something that may not be durable yet.
    barrier: bool,
    /// Where the packed data ends that was written last, if its cluster is in use: more may follow there. 0: nowhere.
    pub(crate) packed_end: u64,
    /// Unmapped in memory, still mapped on disk.
    given_up: Vec<GivenUp>,
    given_up_clusters: u64,
    /// Unmapped in the file, and durably so after the flush of that number.
    written: Vec<(u64, GivenUp)>,
    /// The last flush that began.
    flushes: u64,
    /// Unmapped on disk, perhaps still used by requests.
    waiting: Vec<GivenUp>,
}

/// Host clusters that lost one of their uses.
#[derive(Debug)]
struct GivenUp {
    clusters: Range<u64>,
    epoch: u64,
    /// Tell the file that it may forget them.
    discard: bool,
}

/// A flush of the file that is to come, or under way.
#[derive(Debug)]
struct Flush {
    number: u64,
    /// See [`Qcow2::changes`].
    changes: u64,
}

/// Host clusters that were taken and are not in use yet. If they never are, they are given back.
#[derive(Debug)]
pub(crate) struct Taken<'a> {
    abandoned: &'a Mutex<Vec<Range<u64>>>,
    pub(crate) clusters: Range<u64>,
}

impl Taken<'_> {
    pub(crate) fn keep(mut self) {
        self.clusters = 0..0;
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if !self.clusters.is_empty() {
            self.abandoned.lock().push(self.clusters.clone());
        }
    }
}

impl Meta {
    pub(crate) fn new(refcounts: Refcounts) -> Self {
        Self {
            refcounts,
            l1_dirty: BTreeSet::new(),
            barrier: false,
            packed_end: 0,
            given_up: Vec::new(),
            given_up_clusters: 0,
            written: Vec::new(),
            flushes: 0,
            waiting: Vec::new(),
        }
    }

    /// Notes that clusters lost a use. `epoch` is read after the map forgot them.
    fn give_up(&mut self, clusters: Range<u64>, epoch: u64, discard: bool) {
        self.given_up_clusters += clusters.end - clusters.start;
        if let Some(last) = self.given_up.last_mut()
            && last.clusters.end == clusters.start
            && (last.epoch, last.discard) == (epoch, discard)
        {
            last.clusters.end = clusters.end;
            return;
        }
        self.given_up.push(GivenUp { clusters, epoch, discard });
    }
}

impl Qcow2 {
    /// Takes the metadata lock.
    pub(crate) async fn lock(&self, io: &mut Io<'_, '_>) -> Result<MutexGuard<'_, Meta>> {
        let mut meta = self.meta.lock().await;
        self.check_sound()?;
        if self.header_unsure.load(Relaxed) {
            // The tables in memory are those of the header in memory.
            let bytes = self.header.lock().encode().map_err(|error| Error::new(22, error))?;
            self.file.write(io, 0, &bytes).await?;
            self.sync(io).await?;
            self.header_unsure.store(false, Relaxed);
        }
        loop {
            let Some(clusters) = self.abandoned.lock().pop() else { return Ok(meta) };
            // Nothing ever pointed to it. What is left of it, if this ends early, is abandoned again.
            let mut left = self.taken(clusters);
            while !left.clusters.is_empty() {
                let cluster = left.clusters.start;
                match meta.refcounts.lower(&self.file, io, cluster).await {
                    Ok(0) => self.freed(&mut meta, cluster),
                    Ok(_) => {}
                    // That is no fault of whoever wants the lock now; whoever comes next tries again.
                    Err(error) => {
                        tracing::warn!(%error, cluster, "a cluster that was not used stays allocated for now");
                        return Ok(meta);
                    }
                }
                left.clusters.start += 1;
            }
        }
    }

    /// Forgets what is known about a cluster that is free now.
    fn freed(&self, meta: &mut Meta, cluster: u64) {
        let bits = self.geometry.cluster_bits;
        self.map.lock().forget(cluster << bits);
        meta.refcounts.forget(cluster << bits);
        if meta.packed_end >> bits == cluster {
            meta.packed_end = 0;
        }
    }

    /// Is everything that completed requests changed in the map durable?
    pub(crate) fn is_clean(&self) -> bool {
        self.changes.load(SeqCst) == self.changes_durable.load(SeqCst)
    }

    /// Notes that the map is about to be changed in memory: under its lock, so that whoever sees the change finds the map not
    /// durable.
    fn changed(&self) {
        self.changes.fetch_add(1, SeqCst);
    }

    /// Clusters that count once more than they are used; see [`Taken`].
    pub(crate) fn taken(&self, clusters: Range<u64>) -> Taken<'_> {
        Taken { abandoned: &self.abandoned, clusters }
    }

    /// Takes free host clusters in a row: `wanted` of them, or at least one if `fewer` will do.
    pub(crate) async fn take(
        &self,
        meta: &mut Meta,
        io: &mut Io<'_, '_>,
        wanted: u64,
        fewer: bool,
    ) -> Result<Taken<'_>> {
        self.reclaim(meta, io).await;
        io.tell(FILE, event::CLUSTER_ALLOC).await;
        loop {
            match meta.refcounts.take(&self.file, io, wanted, fewer).await? {
                Space::Found(first, length) => {
                    let taken = self.taken(first..first + length);
                    let bits = self.geometry.cluster_bits;
                    let mut map = self.map.lock();
                    map.check_data(first << bits..(first + length) << bits)?;
                    meta.refcounts.added.drain(..).for_each(|block| map.protect(block));
                    return Ok(taken);
                }
                Space::TableTooSmall(entries) => self.grow_reftable(meta, io, entries).await?,
            }
        }
    }

    async fn grow_reftable(&self, meta: &mut Meta, io: &mut Io<'_, '_>, entries: u64) -> Result<()> {
        meta.refcounts.write(&self.file, io).await?;
        let larger = meta.refcounts.write_larger(&self.file, io, entries).await?;
        self.sync(io).await?;
        let (offset, clusters) = (larger.offset, larger.clusters as u32);
        io.tell(FILE, event::REFBLOCK_ALLOC_SWITCH_TABLE).await;
        self.change_header(io, |header| {
            (header.reftable_offset, header.reftable_clusters) = (offset, clusters)
        })
        .await?;
        for cluster in meta.refcounts.adopt(larger) {
            meta.refcounts.lower(&self.file, io, cluster).await?;
        }
        Ok(())
    }

    /// Writes a changed header, and flushes. What it points to is durable. After a failure, or if this is cancelled, it
    /// is open which header is on disk; then the old one is written again before anything else.
    pub(crate) async fn change_header(
        &self,
        io: &mut Io<'_, '_>,
        change: impl FnOnce(&mut Header),
    ) -> Result<()> {
        let mut header = self.header.lock().clone();
        change(&mut header);
        let bytes = header.encode().map_err(|error| Error::new(22, error))?;
        self.header_unsure.store(true, Relaxed);
        self.file.write(io, 0, &bytes).await?;
        self.sync(io).await?;
        self.map.lock().protected = header.metadata();
        *self.header.lock() = header;
        self.header_unsure.store(false, Relaxed);
        self.bitmaps.header_written();
        Ok(())
    }

    /// Makes sure that there is an L2 table for a guest offset that no snapshot uses, and that the slice for the
    /// offset is loaded. Returns the slice and the entry in it. A reader may push the slice out at any time.
    pub(crate) async fn own_slice(
        &self,
        meta: &mut Meta,
        io: &mut Io<'_, '_>,
        offset: u64,
    ) -> Result<(u64, usize)> {
        let index = self.geometry.l1_index(offset);
        let l1_entry = self.map.lock().l1.get(index).copied();
        let l1_entry = l1_entry.ok_or_else(|| corrupt("the L1 table is too small"))?;
        if l1_entry & COPIED == 0 || l1_entry & OFFSET_MASK == 0 {
            self.own_table(meta, io, index, self.geometry.table(l1_entry)?).await?;
        }
        let place = self.map.lock().slice_of(offset)?.expect("the table was just made");
        self.load_slice(io, place.0).await?;
        Ok(place)
    }

    /// Makes a new L2 table: empty, or a copy of one that a snapshot uses, too.
    async fn own_table(&self, meta: &mut Meta, io: &mut Io<'_, '_>, index: usize, old: u64) -> Result<()> {
        let taken = self.take(meta, io, 1, false).await?;
        let cluster_bytes = self.geometry.cluster_bytes();
        let offset = taken.clusters.start * cluster_bytes;
        let mut table = vec![0; cluster_bytes as usize];
        if old != 0 {
            // Nobody changes a table that is shared, so what is on disk is what it is.
            io.tell(FILE, event::L2_ALLOC_COW_READ).await;
            self.file.read(io, old, &mut table).await?;
        }
        io.tell(FILE, event::L2_ALLOC_WRITE).await;
        self.file.write(io, offset, &table).await?;
        {
            let mut map = self.map.lock();
            self.changed();
            map.l1[index] = offset | COPIED;
            map.protect(offset);
        }
        meta.l1_dirty.insert(index / L1_PART);
        meta.barrier = true;
        taken.keep();
        if old != 0 {
            let cluster = old / cluster_bytes;
            meta.give_up(cluster..cluster + 1, self.epoch.now(), false);
        }
        Ok(())
    }

    /// Changes the entries of clusters, from a guest offset on and inside one slice: `change` gets the number of the
    /// cluster and its entry, and returns the new one.
    ///
    /// What an old entry used is given up, except the cluster that the new one uses, too.
    pub(crate) async fn remap(
        &self,
        meta: &mut Meta,
        io: &mut Io<'_, '_>,
        offset: u64,
        clusters: usize,
        discard: bool,
        change: impl Fn(usize, Entry) -> Result<Entry>,
    ) -> Result<()> {
        let (old, new) = loop {
            let (slice, first) = self.own_slice(meta, io, offset).await?;
            let mut map = self.map.lock();
            let Some(old) = map.some(slice, first..first + clusters) else { continue };
            let new = old.iter().enumerate().map(|(i, &e)| change(i, e)).collect::<Result<Vec<_>>>()?;
            if new == old {
                return Ok(());
            }
            self.changed();
            map.set(slice, first, &new);
            break (old, new);
        };
        let epoch = self.epoch.now();
        if self.geometry.data_file {
            // Nothing is counted there, and what is new may not be durable yet.
            meta.barrier = true;
            return Ok(());
        }
        for (old, new) in old.into_iter().zip(new) {
            // Data that was not there before.
            meta.barrier |= new.allocated() & !old.allocated() != 0;
            let (old, new) = (old.word, new.word);
            let kept = self.host(new)?;
            let packed = new & COMPRESSED != 0 && new != old;
            if packed || kept.is_some() && self.host(old)? != kept {
                meta.barrier = true;
            }
            if old != new {
                let used = self.uses(old)?;
                if kept != Some(used.start) || used.end - used.start > 1 {
                    meta.give_up(used, epoch, discard);
                } else if old & super::layout::ZERO != new & super::layout::ZERO {
                    meta.barrier = true;
                }
            }
        }
        Ok(())
    }

    /// The host cluster of a standard entry.
    fn host(&self, entry: u64) -> Result<Option<u64>> {
        Ok(match self.geometry.mapping(entry)? {
            Mapping::Data { host, .. } | Mapping::Zero { host, .. } if host != 0 => {
                Some(host >> self.geometry.cluster_bits)
            }
            _ => None,
        })
    }

    /// The host clusters that an entry uses.
    pub(crate) fn uses(&self, entry: u64) -> Result<Range<u64>> {
        let bits = self.geometry.cluster_bits;
        Ok(match self.geometry.mapping(entry)? {
            _ if self.geometry.data_file => 0..0,
            Mapping::Compressed(entry) => {
                let (offset, length) = self.geometry.compressed(entry);
                offset >> bits..((offset + length - 1) >> bits) + 1
            }
            _ => self.host(entry)?.map_or(0..0, |cluster| cluster..cluster + 1),
        })
    }

    /// Gives up clusters whose last mention in the map is changed by the caller, in the L1 table.
    pub(crate) fn give_up_from_l1(
        &self,
        meta: &mut Meta,
        index: usize,
        used: impl Iterator<Item = Range<u64>>,
    ) {
        {
            let mut map = self.map.lock();
            self.changed();
            map.l1[index] = 0;
        }
        meta.l1_dirty.insert(index / L1_PART);
        let epoch = self.epoch.now();
        for clusters in used.filter(|clusters| !clusters.is_empty()) {
            meta.give_up(clusters, epoch, true);
        }
    }

    /// Has so much been given up that it should be flushed?
    pub(crate) fn much_given_up(&self, meta: &Meta) -> bool {
        meta.given_up.len() > GIVEN_UP_MAX
            || meta.given_up_clusters << self.geometry.cluster_bits > GIVEN_UP_BYTES_MAX
    }

    /// Writes what is dirty, in order, without the flush that makes it durable in the end.
    async fn write_back(&self, meta: &mut Meta, io: &mut Io<'_, '_>) -> Result<()> {
        meta.refcounts.write(&self.file, io).await?;
        let slices = self.map.lock().dirty_slices();
        if slices.is_empty() && meta.l1_dirty.is_empty() {
            return Ok(());
        }
        if meta.barrier {
            self.sync(io).await?;
            meta.barrier = false;
        }
        let mut bytes = vec![0; self.geometry.slice_bytes() as usize];
        for slice in slices {
            encode_words(self.map.lock().entries(slice).expect("dirty slices stay"), &mut bytes);
            io.tell(FILE, event::L2_UPDATE).await;
            self.file.write(io, slice, &bytes).await?;
            self.map.lock().mark_clean(slice);
        }
        let l1_offset = self.header.lock().l1_offset;
        while let Some(&part) = meta.l1_dirty.first() {
            let mut bytes = vec![0; L1_PART * 8];
            {
                let map = self.map.lock();
                let entries = &map.l1[part * L1_PART..((part + 1) * L1_PART).min(map.l1.len())];
                bytes.truncate(entries.len() * 8);
                encode_words(entries, &mut bytes);
            }
            io.tell(FILE, event::L1_UPDATE).await;
            self.file.write(io, l1_offset + (part * L1_PART * 8) as u64, &bytes).await?;
            meta.l1_dirty.remove(&part);
        }
        Ok(())
    }

    /// Keeps the caches within their limit, after a change.
    pub(crate) async fn trim(&self, meta: &mut Meta, io: &mut Io<'_, '_>) -> Result<()> {
        if self.map.lock().needs_write_back() { self.write_back(meta, io).await } else { Ok(()) }
    }

    /// Makes everything durable that completed requests wrote.
    pub(crate) async fn flush_all(&self, io: &mut Io<'_, '_>) -> Result<()> {
        if self.is_clean() {
            return self.sync(io).await;
        }
        let mut meta = self.lock(io).await?;
        let flush = self.begin_flush(&mut meta, io).await?;
        // Others may go on meanwhile.
        drop(meta);
        self.sync(io).await?;
        self.end_flush(flush);
        if let Some(mut meta) = self.meta.try_lock() {
            self.reclaim(&mut meta, io).await;
        }
        Ok(())
    }

    /// The same, with nobody else changing anything.
    pub(crate) async fn flush_locked(&self, meta: &mut Meta, io: &mut Io<'_, '_>) -> Result<()> {
        let flush = self.begin_flush(meta, io).await?;
        self.sync(io).await?;
        self.end_flush(flush);
        self.reclaim(meta, io).await;
        Ok(())
    }

    /// Writes what is dirty. A flush of the file then makes it durable; what that includes is returned.
    async fn begin_flush(&self, meta: &mut Meta, io: &mut Io<'_, '_>) -> Result<Flush> {
        // The map is changed under the lock only, so this is all of it.
        let changes = self.changes.load(SeqCst);
        self.write_back(meta, io).await?;
        meta.flushes += 1;
        let number = meta.flushes;
        meta.written.extend(meta.given_up.drain(..).map(|given| (number, given)));
        meta.given_up_clusters = 0;
        Ok(Flush { number, changes })
    }

    fn end_flush(&self, flush: Flush) {
        self.changes_durable.fetch_max(flush.changes, SeqCst);
        self.flushed.fetch_max(flush.number, SeqCst);
    }

    /// Takes back the refcounts of what was given up, as far as nobody uses it any more. A failure leaves them too high.
    async fn reclaim(&self, meta: &mut Meta, io: &mut Io<'_, '_>) {
        let flushed = self.flushed.load(SeqCst);
        let durable = meta.written.extract_if(.., |(flush, _)| *flush <= flushed);
        meta.waiting.extend(durable.map(|(_, given)| given));
        if meta.waiting.is_empty() {
            return;
        }
        let settled = self.epoch.settled();
        while let Some(next) = meta.waiting.iter().position(|given| given.epoch < settled) {
            let given = meta.waiting.swap_remove(next);
            if let Err(error) = self.lower(meta, io, &given).await {
                tracing::warn!(%error, clusters = ?given.clusters, "clusters of a qcow2 image stay allocated");
            }
        }
    }

    async fn lower(&self, meta: &mut Meta, io: &mut Io<'_, '_>, given: &GivenUp) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        io.tell(FILE, event::CLUSTER_FREE).await;
        if given.discard && self.pass_discard.load(Relaxed) {
            let mut free = given.clusters.start..given.clusters.start;
            for cluster in given.clusters.clone() {
                if meta.refcounts.get(&self.file, io, cluster).await? == 1 {
                    free.end = cluster + 1;
                    continue;
                }
                self.discard_file(io, free.start << bits..free.end << bits).await;
                free = cluster + 1..cluster + 1;
            }
            self.discard_file(io, free.start << bits..free.end << bits).await;
        }
        for cluster in given.clusters.clone() {
            if meta.refcounts.lower(&self.file, io, cluster).await? == 0 {
                self.freed(meta, cluster);
            }
        }
        Ok(())
    }

    async fn discard_file(&self, io: &mut Io<'_, '_>, range: Range<u64>) {
        let range = range.start..range.end.min(self.file.end());
        if range.start < range.end && io.info(FILE).is_some() {
            io.discard(FILE, range).await;
        }
    }

    /// Writes everything, so that the image is as it will be found.
    pub(crate) async fn settle(&self, io: &mut Io<'_, '_>) -> Result<()> {
        let mut meta = self.lock(io).await?;
        self.flush_locked(&mut meta, io).await?;
        if meta.refcounts.is_dirty() {
            meta.refcounts.write(&self.file, io).await?;
            self.sync(io).await?;
        }
        Ok(())
    }
}

//! Taking, applying and deleting snapshots, while nothing is in flight.
//!
//! Whatever is only added is durable before the header points to it, and the header changes in one write: a crash
//! leaves the old table of snapshots or the new one. Flags in L2 tables and refcounts cannot change together, so in
//! version 3 the image is marked as dirty while they do not fit: whoever opens it after a crash repairs it first.
//! In version 2 such flags are harmless, and a check sets them right.

use super::{
    super::{
        Qcow2, Repair,
        check::{Counts, Use, Verdict, check},
        header::{AUTOCLEAR_WITNESS, Header, SNAPSHOTS_MAX, incompatible},
        io::Io,
        meta::{Meta, Taken},
        open::read_header,
    },
    Snapshot, TABLE_BYTES_MAX, encode,
    reach::Claims,
};
use driveline_graph::{Error, Kind, Result};
use std::{
    sync::atomic::Ordering::Relaxed,
    time::{SystemTime, UNIX_EPOCH},
};

/// What QEMU can hold of a name.
const NAME_BYTES_MAX: usize = 255;

/// What a change of the snapshots began with, for its end.
struct Begun {
    header: Header,
    snapshots: Vec<Snapshot>,
}

impl Qcow2 {
    /// Keeps the disk as it is now as a snapshot. Returns its id.
    pub(crate) async fn take_snapshot(&self, io: &mut Io<'_, '_>, name: &str) -> Result<String> {
        let begun = self.begin(io).await?;
        let Begun { header, snapshots } = &begun;
        if name.is_empty() || name.len() > NAME_BYTES_MAX || name.contains('\0') {
            return Err(Error::new(
                Kind::Invalid,
                format_args!(
                    "a name of {} bytes; expected 1 to {NAME_BYTES_MAX}, none of them zero",
                    name.len()
                ),
            ));
        }
        if snapshots.iter().any(|snapshot| snapshot.name == name.as_bytes()) {
            return Err(Error::new(Kind::Exists, format_args!("there is a snapshot '{name}' already")));
        }
        if snapshots.len() >= SNAPSHOTS_MAX as usize {
            return Err(Error::new(Kind::NotSupported, "an image has 65536 snapshots at most"));
        }
        let ids = snapshots.iter().filter_map(|snapshot| snapshot.id().parse::<u64>().ok());
        let id = (ids.max().unwrap_or(0) + 1).to_string();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // No state of a VM; the size of the disk; and no count of instructions.
        let extra = [0, header.size_bytes, u64::MAX];
        let mut new = Snapshot {
            l1_offset: 0,
            l1_entries: header.l1_entries,
            id: id.clone().into(),
            name: name.into(),
            date: (now.as_secs() as u32, now.subsec_nanos()),
            vm_clock_ns: 0,
            vm_state_bytes: 0,
            extra: extra.into_iter().flat_map(u64::to_be_bytes).collect(),
        };
        let mut meta = self.lock(io).await?;
        let mut l1 = self.map.lock().l1.clone();
        let used = self.reach(io, &l1).await?;
        self.check_counts(&mut meta, io, &used).await?;
        let changed = async {
            self.mark_dirty(io).await?;
            let kept = self.write_clusters(&mut meta, io, &l1).await?;
            new.l1_offset = kept.clusters.start << self.geometry.cluster_bits;
            self.raise_all(&mut meta, io, &used).await?;
            self.write_counts(&mut meta, io).await?;
            self.set_claims(&mut meta, io, &mut l1, Claims::None).await?;
            self.write_words(io, header.l1_offset, &l1).await?;
            let mut after = snapshots.clone();
            after.push(new);
            self.switch(&mut meta, io, &after, |_| {}).await?;
            kept.keep();
            self.lower_all(&mut meta, io, &self.table_clusters(header, snapshots)).await?;
            self.write_counts(&mut meta, io).await
        };
        let changed = changed.await;
        drop(meta);
        self.end(io, changed).await?;
        Ok(id)
    }

    /// Makes the disk what it was when a snapshot was taken. What it is now is lost.
    pub(crate) async fn apply_snapshot(&self, io: &mut Io<'_, '_>, wanted: &str) -> Result<()> {
        let begun = self.begin(io).await?;
        let Begun { header, snapshots } = &begun;
        let snapshot = &snapshots[self.find_snapshot(snapshots, wanted)?];
        if self.bitmaps.present() {
            return Err(Error::new(
                Kind::NotSupported,
                "the image has persistent bitmaps, which would not know what changes; remove them first",
            ));
        }
        let size = snapshot.size_bytes().unwrap_or(header.size_bytes);
        let needed = self.geometry.l1_entries(size);
        if u64::from(snapshot.l1_entries) < needed || !size.is_multiple_of(512) || size > i64::MAX as u64 {
            return Err(Error::new(
                Kind::Corrupt,
                format_args!(
                    "the snapshot has a disk of {size} bytes and {} L1 entries",
                    snapshot.l1_entries
                ),
            ));
        }
        let mut meta = self.lock(io).await?;
        let mut l1 = self.l1_at(io, snapshot.l1_offset, snapshot.l1_entries).await?;
        let before = self.map.lock().l1.clone();
        let (used, mut unused) = (self.reach(io, &l1).await?, self.reach(io, &before).await?);
        self.check_counts(&mut meta, io, &used).await?;
        self.count_area(&mut unused, header.l1_offset, before.len() as u64 * 8);
        let changed = async {
            self.mark_dirty(io).await?;
            self.raise_all(&mut meta, io, &used).await?;
            self.write_counts(&mut meta, io).await?;
            self.set_claims(&mut meta, io, &mut l1, Claims::None).await?;
            let new = self.write_clusters(&mut meta, io, &l1).await?;
            self.write_counts(&mut meta, io).await?;
            let offset = new.clusters.start << self.geometry.cluster_bits;
            // What was there is counted too often from here on, and nothing else is wrong.
            self.change_header(io, |header| {
                (header.l1_offset, header.l1_entries, header.size_bytes) = (offset, l1.len() as u32, size);
                header.incompatible &= !incompatible::DIRTY;
                // Bitmaps elsewhere do not know what changes, either.
                header.autoclear &= !AUTOCLEAR_WITNESS;
            })
            .await?;
            new.keep();
            self.lower_all(&mut meta, io, &unused).await?;
            self.write_counts(&mut meta, io).await
        };
        let changed = changed.await;
        drop(meta);
        self.end(io, changed).await
    }

    /// Forgets a snapshot.
    pub(crate) async fn delete_snapshot(&self, io: &mut Io<'_, '_>, wanted: &str) -> Result<()> {
        let begun = self.begin(io).await?;
        let Begun { header, snapshots } = &begun;
        let number = self.find_snapshot(snapshots, wanted)?;
        let snapshot = &snapshots[number];
        let mut meta = self.lock(io).await?;
        let l1 = self.l1_at(io, snapshot.l1_offset, snapshot.l1_entries).await?;
        let mut unused = self.reach(io, &l1).await?;
        self.count_area(&mut unused, snapshot.l1_offset, l1.len() as u64 * 8);
        let mut after = snapshots.clone();
        after.remove(number);
        let changed = async {
            let dirty = if self.geometry.version >= 3 { incompatible::DIRTY } else { 0 };
            self.switch(&mut meta, io, &after, |header| header.incompatible |= dirty).await?;
            self.lower_all(&mut meta, io, &unused).await?;
            self.lower_all(&mut meta, io, &self.table_clusters(header, snapshots)).await?;
            self.write_counts(&mut meta, io).await?;
            let mut active = self.map.lock().l1.clone();
            self.set_claims(&mut meta, io, &mut active, Claims::Counted).await?;
            self.write_words(io, header.l1_offset, &active).await?;
            self.sync(io).await?;
            Ok(self.change_header(io, |header| header.incompatible &= !incompatible::DIRTY).await?)
        };
        let changed = changed.await;
        drop(meta);
        self.end(io, changed).await
    }

    /// Makes sure that snapshots can be changed, and that all of the image is in the file.
    async fn begin(&self, io: &mut Io<'_, '_>) -> Result<Begun> {
        self.check_writable()?;
        if self.geometry.data_file {
            return Err(Error::new(
                Kind::NotSupported,
                "the image keeps its data in another file, of which there are no snapshots",
            ));
        }
        self.settle(io).await?;
        let (header, snapshots) = (self.header.lock().clone(), self.snapshots.lock().clone());
        Ok(Begun { header, snapshots })
    }

    /// The snapshot with that id, or else with that name.
    fn find_snapshot(&self, snapshots: &[Snapshot], wanted: &str) -> Result<usize> {
        let by_id = snapshots.iter().position(|snapshot| snapshot.id == wanted.as_bytes());
        by_id
            .or_else(|| snapshots.iter().position(|snapshot| snapshot.name == wanted.as_bytes()))
            .ok_or_else(|| Error::new(Kind::NotFound, format_args!("there is no snapshot '{wanted}'")))
    }

    async fn mark_dirty(&self, io: &mut Io<'_, '_>) -> Result<()> {
        if self.geometry.version >= 3 {
            self.change_header(io, |header| header.incompatible |= incompatible::DIRTY).await?;
        }
        Ok(())
    }

    /// Writes what is counted, and makes it and all that was written durable.
    async fn write_counts(&self, meta: &mut Meta, io: &mut Io<'_, '_>) -> Result<()> {
        meta.refcounts.write(&self.file, io).await?;
        Ok(self.sync(io).await?)
    }

    /// Writes words to clusters of their own.
    async fn write_clusters(&self, meta: &mut Meta, io: &mut Io<'_, '_>, words: &[u64]) -> Result<Taken<'_>> {
        let per_cluster = self.geometry.cluster_bytes() / 8;
        let clusters = (words.len() as u64).div_ceil(per_cluster).max(1);
        let taken = self.take(meta, io, clusters, false).await?;
        let mut padded = words.to_vec();
        padded.resize((clusters * per_cluster) as usize, 0);
        self.write_words(io, taken.clusters.start << self.geometry.cluster_bits, &padded).await?;
        Ok(taken)
    }

    /// Writes another snapshot table and lets the header point to it. Unless `change` says otherwise, the image is in
    /// order then.
    async fn switch(
        &self,
        meta: &mut Meta,
        io: &mut Io<'_, '_>,
        snapshots: &[Snapshot],
        change: impl FnOnce(&mut Header),
    ) -> Result<()> {
        let mut bytes = encode(snapshots);
        if bytes.len() as u64 > TABLE_BYTES_MAX {
            return Err(Error::new(Kind::NotSupported, "the table of snapshots would be longer than 64 MiB"));
        }
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        let mut words = vec![0; bytes.len() / 8];
        super::super::layout::decode_words(&bytes, &mut words);
        let table = match snapshots {
            [] => None,
            _ => Some(self.write_clusters(meta, io, &words).await?),
        };
        self.write_counts(meta, io).await?;
        let offset = table.as_ref().map_or(0, |table| table.clusters.start << self.geometry.cluster_bits);
        self.change_header(io, |header| {
            (header.snapshots, header.snapshots_offset) = (snapshots.len() as u32, offset);
            header.incompatible &= !incompatible::DIRTY;
            change(header);
        })
        .await?;
        if let Some(table) = table {
            table.keep();
        }
        Ok(())
    }

    /// The clusters of the snapshot table.
    fn table_clusters(&self, header: &Header, snapshots: &[Snapshot]) -> Counts {
        let mut counts = Counts::default();
        self.count_area(&mut counts, header.snapshots_offset, encode(snapshots).len() as u64);
        counts
    }

    fn count_area(&self, counts: &mut Counts, offset: u64, bytes: u64) {
        let bits = self.geometry.cluster_bits;
        for cluster in offset >> bits..(offset + bytes).div_ceil(self.geometry.cluster_bytes()) {
            counts.add(cluster, u64::MAX, Use::Other);
        }
    }

    /// Reads everything anew after a change. One that failed in its middle is repaired first, if that is possible.
    async fn end(&self, io: &mut Io<'_, '_>, changed: Result<()>) -> Result<()> {
        let repaired = match &changed {
            Ok(()) => Ok(()),
            Err(_) => match check(io, &self.file, Repair::All).await {
                Ok(report) if report.verdict() == Verdict::Clean => Ok(()),
                Ok(_) => Err(Error::new(Kind::Corrupt, "something is left wrong")),
                Err(error) => Err(error),
            },
        };
        let read = match repaired {
            Ok(()) => match read_header(io).await {
                Ok(header) => self.reload(io, header).await,
                Err(error) => Err(error),
            },
            Err(error) => Err(error),
        };
        if let Err(error) = read {
            // What is in memory is not what is in the file.
            tracing::error!(%error, "a qcow2 image is not written to any more");
            self.damaged.store(true, Relaxed);
            return changed.and(Err(error));
        }
        changed
    }
}

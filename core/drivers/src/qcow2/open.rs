//! Opening an image: everything is checked before anything is changed.

use super::{
    Qcow2, Repair,
    bitmaps::Bitmaps,
    check::check,
    epoch::Epoch,
    event,
    header::{AUTOCLEAR_RAW_EXTERNAL, AUTOCLEAR_WITNESS, Compression, Header, LAZY_REFCOUNTS, incompatible},
    io::{DATA, FILE, File, Io},
    layout::decode_words,
    map::Map,
    meta::Meta,
    ranges::Ranges,
    refcount::Refcounts,
    snapshot::{self, Snapshot},
};
use driveline_graph::{Error, Kind, Result};
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

/// Reads and checks the header.
pub(crate) async fn read_header(io: &mut Io<'_, '_>) -> Result<Header> {
    // Whoever listens knows from now on that we say what we do.
    io.tell(FILE, event::NONE).await;
    let file = File::of(io, FILE);
    if file.end() < 72 {
        return Err(Error::new(
            Kind::Invalid,
            format_args!("not a qcow2 image: it has {} bytes, and a header has 72 at least", file.end()),
        ));
    }
    let mut bytes = vec![0; 512];
    file.read(io, 0, &mut bytes).await?;
    let cluster_bytes = Header::cluster_bytes_of(&bytes)?;
    bytes.resize(cluster_bytes, 0);
    file.read(io, 0, &mut bytes).await?;
    Header::parse(&bytes)
}

/// Reads a table of words.
async fn read_table(io: &mut Io<'_, '_>, file: &File, offset: u64, entries: usize) -> Result<Vec<u64>> {
    let mut bytes = vec![0; entries * 8];
    file.read(io, offset, &mut bytes).await?;
    let mut words = vec![0; entries];
    decode_words(&bytes, &mut words);
    Ok(words)
}

/// What of an image is always in memory.
struct Loaded {
    header: Header,
    snapshots: Vec<Snapshot>,
    map: Map,
    meta: Meta,
}

impl Loaded {
    async fn read(io: &mut Io<'_, '_>, file: &File, header: Header, cache_bytes: u64) -> Result<Self> {
        let geometry = header.geometry();
        let snapshots = snapshot::read(io, file, &header).await?;
        snapshots.iter().try_for_each(|snapshot| snapshot.check(&header))?;
        let l1 = read_table(io, file, header.l1_offset, header.l1_entries as usize).await?;
        let reftable_entries = u64::from(header.reftable_clusters) * geometry.cluster_bytes() / 8;
        io.tell(FILE, event::REFTABLE_LOAD).await;
        let reftable = read_table(io, file, header.reftable_offset, reftable_entries as usize).await?;
        let mut map = Map::new(geometry, l1, header.metadata(), cache_bytes / 2);
        map.protect_all(&reftable, &snapshots, header.snapshots_offset);
        let refcounts = Refcounts::new(geometry, reftable, header.reftable_offset, cache_bytes / 2);
        Ok(Self { header, snapshots, map, meta: Meta::new(refcounts) })
    }
}

/// Repairs an image whose refcounts may be stale, as its header says.
async fn repair_dirty(io: &mut Io<'_, '_>, file: &File, header: Header) -> Result<Header> {
    if header.incompatible & incompatible::DIRTY == 0 {
        return Ok(header);
    }
    let report = check(io, file, Repair::All).await?;
    tracing::warn!(
        corruptions = report.corruptions_fixed,
        leaks = report.leaks_fixed,
        "a qcow2 image was not closed in order; its refcounts were made right"
    );
    let header = read_header(io).await?;
    if header.incompatible & incompatible::DIRTY != 0 {
        return Err(Error::new(
            Kind::Corrupt,
            "the image was not closed (dirty bit), and a repair left something wrong; open it read-only",
        ));
    }
    Ok(header)
}

impl Qcow2 {
    /// Opens the image in child `FILE`; its data is in child `DATA`, if the header says that it is elsewhere. Unless
    /// `read_only`, it is repaired if it is dirty, and the autoclear bits of what is not kept up are cleared; the witness when
    /// something is written.
    pub(crate) async fn open(io: &mut Io<'_, '_>, cache_bytes: u64, read_only: bool) -> Result<Self> {
        let mut header = read_header(io).await?;
        let file = File::of(io, FILE);
        if !read_only {
            header.check_writable()?;
            header = repair_dirty(io, &file, header).await?;
        }
        let data_file = header.geometry().data_file.then(|| File::of(io, DATA));
        let Loaded { header, snapshots, map, meta } = Loaded::read(io, &file, header, cache_bytes).await?;
        let bitmaps = Bitmaps::open(io, &file, &header).await;
        let qcow2 = Self {
            geometry: header.geometry(),
            compression: header.compression,
            size_bytes: AtomicU64::new(header.size_bytes),
            read_only: AtomicBool::new(read_only),
            header_unsure: AtomicBool::new(false),
            file,
            data_file,
            raw_external: header.is_raw_external(),
            ranges: Ranges::default(),
            meta: async_lock::Mutex::new(meta),
            map: Mutex::new(map),
            epoch: Epoch::new(),
            abandoned: Mutex::default(),
            changes: AtomicU64::new(0),
            changes_durable: AtomicU64::new(0),
            flushed: AtomicU64::new(0),
            unpacked: Mutex::new(None),
            snapshots: Mutex::new(snapshots),
            bitmaps,
            damaged: AtomicBool::new(false),
            damage_told: AtomicBool::new(false),
            cookie: 0,
            pass_discard: AtomicBool::new(true),
            cache_bytes,
            header: Mutex::new(header),
        };
        if !read_only {
            qcow2.begin_writing(io).await?;
        }
        Ok(qcow2)
    }

    /// Reads anew what another program may have changed, in files that may be longer by now.
    pub(crate) async fn refresh(&self, io: &mut Io<'_, '_>) -> Result<()> {
        let header = read_header(io).await?;
        if header.geometry() != self.geometry {
            return Err(Error::new(Kind::Invalid, "another image is in its place by now; open it anew"));
        }
        self.file.renew(io);
        if let Some(data_file) = &self.data_file {
            data_file.renew(io);
        }
        self.bitmaps.refresh(io, &self.file, &header).await;
        self.reload(io, header).await
    }

    /// Reads everything anew, while nothing is in flight and nothing is held back.
    pub(crate) async fn reload(&self, io: &mut Io<'_, '_>, header: Header) -> Result<()> {
        let mut loaded = Loaded::read(io, &self.file, header, self.cache_bytes).await?;
        if self.bitmaps.witness_lingers() {
            self.drop_witness(&mut loaded.header);
        }
        self.bitmaps.reload(io, &self.file, &loaded.header).await;
        *self.meta.lock().await = loaded.meta;
        *self.map.lock() = loaded.map;
        self.protect_bitmaps();
        *self.snapshots.lock() = loaded.snapshots;
        *self.unpacked.lock() = None;
        self.abandoned.lock().clear();
        self.flushed.store(0, Relaxed);
        self.size_bytes.store(loaded.header.size_bytes, Relaxed);
        *self.header.lock() = loaded.header;
        Ok(())
    }

    /// Prepares an image for writes that passed all checks.
    async fn begin_writing(&self, io: &mut Io<'_, '_>) -> Result<()> {
        let kept = self.begin_bitmaps(io).await? | AUTOCLEAR_RAW_EXTERNAL;
        // The witness is ours, and speaks of what is written. As long as nothing is, it stays as true as it was: who opens an
        // image and fails to start leaves it behind.
        self.drop_witness(&mut self.header.lock());
        // Whoever understands such a feature must be able to see that it was not kept up.
        let autoclear = self.header.lock().autoclear;
        if autoclear & !kept != 0 {
            self.change_header(io, |header| header.autoclear &= kept).await?;
        }
        Ok(())
    }

    /// Takes the witness out of a header that was read: see [`Bitmaps::let_witness_linger`].
    fn drop_witness(&self, header: &mut Header) {
        if header.autoclear & AUTOCLEAR_WITNESS != 0 {
            header.autoclear &= !AUTOCLEAR_WITNESS;
            self.bitmaps.let_witness_linger();
        }
    }

    /// Writes what is held back; no write is to come.
    pub(crate) async fn end_writing(&self, io: &mut Io<'_, '_>) -> Result<()> {
        Ok(self.settle(io).await?)
    }

    /// Becomes read-only or writable, while nothing is in flight.
    pub(crate) async fn set_read_only(&self, io: &mut Io<'_, '_>, read_only: bool) -> Result<()> {
        if read_only == self.read_only.load(Relaxed) {
            return Ok(());
        }
        if read_only {
            self.end_writing(io).await?;
        } else {
            let header = self.header.lock().clone();
            header.check_writable()?;
            if header.incompatible & incompatible::DIRTY != 0 {
                let header = repair_dirty(io, &self.file, header).await?;
                self.reload(io, header).await?;
            }
            self.begin_writing(io).await?;
        }
        self.read_only.store(read_only, Relaxed);
        Ok(())
    }

    /// The backing file that the header names, and its format; empty if the header names none.
    pub(crate) fn backing_file(&self) -> Option<(String, String)> {
        let header = self.header.lock();
        Some((header.backing.clone()?, header.backing_format.clone().unwrap_or_default()))
    }

    /// The internal snapshots.
    pub(crate) fn snapshots(&self) -> Vec<driveline_graph::Snapshot> {
        let snapshots = self.snapshots.lock();
        let known = snapshots.iter().map(|snapshot| driveline_graph::Snapshot {
            id: snapshot.id().into_owned(),
            name: snapshot.name().into_owned(),
            date_ns: u64::from(snapshot.date.0) * 1_000_000_000 + u64::from(snapshot.date.1),
            vm_clock_ns: snapshot.vm_clock_ns,
            vm_state_bytes: snapshot.vm_state_bytes(),
            size_bytes: snapshot.size_bytes(),
            icount: snapshot.icount(),
        });
        known.collect()
    }

    /// What there is to say about the image.
    pub(crate) fn details(&self) -> serde_json::Value {
        let header = self.header.lock();
        let snapshots = self.snapshots.lock();
        let snapshots = snapshots.iter().map(|snapshot| {
            serde_json::json!({
                "id": snapshot.id(),
                "name": snapshot.name(),
                "virtual-size": snapshot.size_bytes(),
                "vm-state-size": snapshot.vm_state_bytes(),
                "date-sec": snapshot.date.0,
                "date-nsec": snapshot.date.1,
                "vm-clock-nsec": snapshot.vm_clock_ns,
            })
        });
        serde_json::json!({
            "compat": if header.version == 2 { "0.10" } else { "1.1" },
            "cluster-size": self.geometry.cluster_bytes(),
            "refcount-bits": 1u32 << header.refcount_order,
            "compression-type": match self.compression {
                Compression::Zlib => "zlib",
                Compression::Zstd => "zstd",
            },
            "extended-l2": self.geometry.extended_l2,
            "lazy-refcounts": header.compatible & LAZY_REFCOUNTS != 0,
            "corrupt": header.incompatible & incompatible::CORRUPT != 0,
            "dirty": header.incompatible & incompatible::DIRTY != 0,
            "data-file": header.data_file(),
            "data-file-raw": self.raw_external,
            "backing-file": header.backing,
            "backing-format": header.backing_format,
            "snapshots": snapshots.collect::<Vec<_>>(),
            "bitmaps": self.bitmaps.details(),
        })
    }
}

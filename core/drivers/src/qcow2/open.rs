//! Opening an image: everything is checked before anything is changed.

use super::{
    Qcow2,
    bitmaps::Bitmaps,
    epoch::Epoch,
    header::{Compression, Header, incompatible},
    io::{FILE, File, Io},
    layout::decode_words,
    map::Map,
    meta::Meta,
    ranges::Ranges,
    refcount::Refcounts,
    snapshot,
};
use driveline_graph::{Error, Kind, Result};
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

/// Reads and checks the header.
pub(crate) async fn read_header(io: &mut Io<'_, '_>) -> Result<Header> {
    let file = File::new(io.info(FILE).map_or(0, |info| info.size_bytes));
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

impl Qcow2 {
    /// Opens the image in child `FILE`. Unless `read_only`, it clears the autoclear bits of what it does not keep up.
    pub(crate) async fn open(io: &mut Io<'_, '_>, cache_bytes: u64, read_only: bool) -> Result<Self> {
        let header = read_header(io).await?;
        header.check_supported()?;
        if !read_only {
            header.check_writable()?;
        }
        let geometry = header.geometry();
        let file = File::new(io.info(FILE).map_or(0, |info| info.size_bytes));
        let snapshots = snapshot::read(io, &file, &header).await?;
        snapshots.iter().try_for_each(|snapshot| snapshot.check(&header))?;
        let l1 = read_table(io, &file, header.l1_offset, header.l1_entries as usize).await?;
        let reftable_entries = u64::from(header.reftable_clusters) * geometry.cluster_bytes() / 8;
        let reftable = read_table(io, &file, header.reftable_offset, reftable_entries as usize).await?;
        let refcounts = Refcounts::new(geometry, reftable, header.reftable_offset, cache_bytes / 2);
        let bitmaps = Bitmaps::open(io, &file, &header).await;
        let qcow2 = Self {
            geometry,
            compression: header.compression,
            size_bytes: AtomicU64::new(header.size_bytes),
            read_only: AtomicBool::new(read_only),
            header_unsure: AtomicBool::new(false),
            file,
            ranges: Ranges::default(),
            meta: async_lock::Mutex::new(Meta::new(refcounts)),
            map: Mutex::new(Map::new(geometry, l1, header.metadata(), cache_bytes / 2)),
            epoch: Epoch::new(),
            abandoned: Mutex::default(),
            changes: AtomicU64::new(0),
            changes_durable: AtomicU64::new(0),
            flushed: AtomicU64::new(0),
            unpacked: Mutex::new(None),
            snapshots,
            bitmaps,
            header: Mutex::new(header),
        };
        if !read_only {
            qcow2.begin_writing(io).await?;
        }
        Ok(qcow2)
    }

    /// Prepares an image for writes that passed all checks.
    async fn begin_writing(&self, io: &mut Io<'_, '_>) -> Result<()> {
        let kept = self.begin_bitmaps(io).await?;
        // Whoever understands such a feature must be able to see that it was not kept up.
        let autoclear = self.header.lock().autoclear;
        if autoclear & !kept != 0
            && let Err(error) = self.change_header(io, |header| header.autoclear &= kept).await
        {
            if let Err(error) = self.end_bitmaps(io).await {
                tracing::warn!(%error, "bitmaps of a qcow2 image stay flagged as in use");
            }
            return Err(error.into());
        }
        Ok(())
    }

    /// Writes what is held back; no write is to come.
    pub(crate) async fn end_writing(&self, io: &mut Io<'_, '_>) -> Result<()> {
        self.settle(io).await?;
        Ok(self.end_bitmaps(io).await?)
    }

    /// Becomes read-only or writable, while nothing is in flight.
    pub(crate) async fn set_read_only(&self, io: &mut Io<'_, '_>, read_only: bool) -> Result<()> {
        if read_only == self.read_only.load(Relaxed) {
            return Ok(());
        }
        if read_only {
            self.end_writing(io).await?;
        } else {
            self.header.lock().check_writable()?;
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

    /// What there is to say about the image.
    pub(crate) fn details(&self) -> serde_json::Value {
        let header = self.header.lock();
        let snapshots = self.snapshots.iter().map(|snapshot| {
            serde_json::json!({
                "id": snapshot.id(),
                "name": snapshot.name(),
                "virtual-size": snapshot.size_bytes(),
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
            "lazy-refcounts": header.compatible & 1 != 0,
            "corrupt": header.incompatible & incompatible::CORRUPT != 0,
            "dirty": header.incompatible & incompatible::DIRTY != 0,
            "backing-file": header.backing,
            "backing-format": header.backing_format,
            "snapshots": snapshots.collect::<Vec<_>>(),
            "bitmaps": self.bitmaps.details(),
        })
    }
}

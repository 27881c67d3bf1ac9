//! qcow2: QEMU's image format, with backing files, zero clusters, subclusters, compressed clusters, data in another file,
//! persistent bitmaps, and internal snapshots.
//!
//! Reads and writes versions 2 and 3 with every cluster size and refcount width. Compressed clusters are written, and
//! snapshots taken, applied and deleted, by node-level calls: there are no requests for that. Images are checked and
//! repaired ([`check_image`]). It does not decrypt, and does not save or load the state of a VM.
//!
//! Its nouns:
//! * *cluster*: the unit of allocation, of the guest (what it sees) and of the host (what is in the file);
//! * *map* (`map`): which guest cluster is where: the L1 table, and slices of the L2 tables it points to;
//! * *refcounts* (`refcount`): how often each host cluster is used; more than once means copy on write.
//!
//! # Data in another file
//!
//! Each guest cluster is there where the disk has it, so nothing is counted. If the header says that the data file reads as
//! the disk does (raw), zeroes and discards reach it too. It grows with the disk; when the disk shrinks, what is behind
//! its end is zeroed and stays. A relative name in the header is relative to the image (QEMU's: to where it runs).
//!
//! # Order
//!
//! The map and the refcounts are changed in memory and written back later, such that a crash at any time leaves
//! at worst clusters that are counted but not used:
//!
//! 1. refcount blocks, then the refcount table. They only ever hold values that are safe to be found;
//! 2. a flush of the file: refcounts, data and copied data are durable before anything points to them;
//! 3. L2 slices, then L1 entries;
//! 4. a flush of the file. Only now are the refcounts of clusters that were unmapped before step 3 taken back, in
//!    memory, so that nothing is used again while the file may still point to it.
//!
//! So refcounts are never stale, and the dirty bit is never set: images with lazy refcounts are written to like others.
//! One that somebody else left dirty is repaired (`check`) before it is written to.
//!
//! A cluster that is given up is not used again, either, before every request has ended that may have looked it up
//! (`epoch`).
//!
//! # Locks
//!
//! `ranges` (guest clusters whose mapping is about to change), then `meta` (everything that is changed and
//! written), then `map` (short, never across a call). Reads, and writes in place, only take the last.
//!
//! Source: QEMU docs/interop/qcow2.txt.

mod bitmaps;
mod check;
mod compressed;
mod compressing;
mod create;
mod creation;
mod damaged;
mod driver;
mod epoch;
mod event;
#[doc(hidden)]
pub mod fuzz;
mod header;
mod io;
mod layout;
mod map;
mod meta;
mod named;
mod offline;
mod open;
mod packing;
mod ranges;
mod read;
mod refcount;
mod resize;
mod snapshot;
mod sparse;
mod subclusters;
mod write;
mod zero;

pub use self::{
    check::{CheckReport, Repair, Verdict, check_image},
    create::{CreateOptions, Preallocation, create, create_file},
    driver::Qcow2Driver,
    header::Compression,
    offline::{
        apply_snapshot_of_file, check_file, delete_snapshot_of_file, snapshots_of_file, take_snapshot_of_file,
    },
};

use self::{
    epoch::Epoch,
    header::Header,
    io::{DATA, FILE, File, Io},
    layout::Geometry,
    map::{Found, Load, Map, Run},
    meta::Meta,
    ranges::Ranges,
};
use driveline_op::{Error, Result};
use parking_lot::Mutex;
use std::{
    future::poll_fn,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
};

/// An open image.
#[derive(Debug)]
pub(crate) struct Qcow2 {
    geometry: Geometry,
    compression: Compression,
    header: Mutex<Header>,
    size_bytes: AtomicU64,
    read_only: AtomicBool,
    /// Writing a header did not come to its end, so it is not known which one is on disk.
    header_unsure: AtomicBool,
    file: File,
    /// Where data is, if it is not in the file.
    data_file: Option<File>,
    /// The data file reads as the disk does.
    raw_external: bool,
    ranges: Ranges,
    meta: async_lock::Mutex<Meta>,
    map: Mutex<Map>,
    epoch: Epoch,
    /// Host clusters that were taken and never used.
    abandoned: Mutex<Vec<Range<u64>>>,
    /// How often the map was changed, and up to which change it is durable.
    changes: AtomicU64,
    changes_durable: AtomicU64,
    /// The last flush of the file after metadata was written that is done, by its number.
    flushed: AtomicU64,
    /// The last compressed cluster that was read, by its L2 entry.
    unpacked: Mutex<Option<(u64, Arc<[u8]>)>>,
    snapshots: Mutex<Vec<snapshot::Snapshot>>,
    bitmaps: bitmaps::Bitmaps,
    /// Metadata made no sense, so nothing is written any more.
    damaged: AtomicBool,
    /// Whoever listens was told that metadata makes no sense.
    damage_told: AtomicBool,
    /// Names the node to those who listen.
    cookie: u64,
    /// Discards by requests go to the file, too.
    pass_discard: AtomicBool,
    /// See [`Qcow2Driver`].
    cache_bytes: u64,
}

impl Qcow2 {
    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Relaxed)
    }

    /// Where data is.
    #[inline]
    fn data(&self) -> &File {
        self.data_file.as_ref().unwrap_or(&self.file)
    }

    /// The number of the child that unallocated clusters are read from; it may be missing.
    #[inline]
    fn backing(&self) -> usize {
        1 + usize::from(self.data_file.is_some())
    }

    /// Makes what was written durable.
    async fn sync(&self, io: &mut Io<'_, '_>) -> Result<()> {
        if self.data_file.is_some() {
            io.flush_child(DATA).await?;
        }
        io.flush().await
    }

    #[inline]
    fn check_writable(&self) -> Result<()> {
        if self.read_only.load(Relaxed) { Err(Error::NOT_PERMITTED) } else { self.check_sound() }
    }

    #[inline]
    fn check_sound(&self) -> Result<()> {
        if self.damaged.load(Relaxed) { Err(self.unsound()) } else { Ok(()) }
    }

    #[cold]
    fn unsound(&self) -> Error {
        Error::IO.because("the qcow2 image was found damaged and is not written to any more; see 'driveline check-image --repair'")
    }

    #[inline]
    fn check_range(&self, range: Range<u64>) -> Result<()> {
        if range.end <= self.size_bytes() && range.start <= range.end {
            Ok(())
        } else {
            Err(self.outside(range))
        }
    }

    #[cold]
    fn outside(&self, range: Range<u64>) -> Error {
        Error::invalid(format_args!("bytes {range:?} of an image of {}", self.size_bytes()))
    }

    /// What the guest's bytes are from `offset` on; `None` if a slice must be loaded first.
    #[inline]
    fn look(&self, offset: u64, length: u64, writing: bool) -> Result<Option<Run>> {
        match self.map.lock().find(offset, length, writing)? {
            Found::Run(run) => Ok(Some(run)),
            Found::Missing => Ok(None),
        }
    }

    /// Loads the slice that stands for a guest offset, if there is one.
    async fn load(&self, io: &mut Io<'_, '_>, offset: u64) -> Result<()> {
        let slice = self.map.lock().slice_of(offset)?;
        match slice {
            Some((slice, _)) => self.load_slice(io, slice).await,
            None => Ok(()),
        }
    }

    /// Loads a slice of an L2 table. Others that want the same one wait for it.
    async fn load_slice(&self, io: &mut Io<'_, '_>, slice: u64) -> Result<()> {
        /// Ends the loading when it fails or is cancelled.
        struct Loading<'a>(&'a Mutex<Map>, Option<usize>);
        impl Drop for Loading<'_> {
            fn drop(&mut self) {
                if let Some(slot) = self.1 {
                    self.0.lock().end_load(slot, None);
                }
            }
        }
        loop {
            let load = self.map.lock().begin_load(slice);
            match load {
                Load::Ready => return Ok(()),
                Load::Wait => poll_fn(|cx| self.map.lock().poll_loaded(slice, cx)).await,
                Load::Go(slot) => {
                    let mut loading = Loading(&self.map, Some(slot));
                    let mut bytes = vec![0; self.geometry.slice_bytes() as usize];
                    io.tell(FILE, event::L2_LOAD).await;
                    self.file.read(io, slice, &mut bytes).await?;
                    loading.1 = None;
                    self.map.lock().end_load(slot, Some(&bytes));
                    return Ok(());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;

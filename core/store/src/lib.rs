//! The sidecar file that keeps a drive's dirty bitmaps, for any format, through crashes and power cuts.
//!
//! A [`Store`] is one file beside a drive's images, which holds all persistent bitmaps of the drive. Each of them has a
//! [`Ledger`](driveline_bitmap::Ledger), which a [`Bitmap`](driveline_bitmap::Bitmap) tells of every change before memory has it. Whatever
//! happened, [`Store::open`] finds every bitmap usable, with a [`Verdict`] on how far to trust it; "inconsistent" is no answer.
//!
//! What it is not: it knows no node, no drive and no image. What the bitmaps speak of is the caller's, who keeps that in the
//! owner section, for example as a [`Fingerprint`].
//!
//! Its nouns:
//!
//! * a *record* is what of a bitmap has to be known besides its bits; all of them are settled by one write of the *header*;
//! * a *half* is one of a bitmap's two sets of bits; it has a *region* of the file, of as many *places* as it grew in steps;
//! * the *activity log* names the *extents* that may be written without a sync first; a *flight* is one write of it.
//!
//! ```
//! use driveline_bitmap::{BitmapName, Granularity, Half, Record, View};
//! use driveline_store::*;
//!
//! let folder = tempfile::tempdir()?;
//! let path = folder.path().join("vda.bitmaps");
//! let boot_id = BootId::current()?;
//! let options = Options { drive_size: 1 << 30, boot_id, owner: b"vda".to_vec(), log: LogOptions::default() };
//! let store = Store::create(&path, &options)?;
//! let name = BitmapName::new("daily")?;
//! let record = Record { name, recording: true, length: 1 << 30, recorder: Half::First, frozen: false };
//! let (granularity, view, durability) = (Granularity::default(), View::Drive, Durability::Process);
//! let daily = store.add(&Spec { record, granularity, view, durability })?;
//! daily.mark(Half::First, 3..5);
//!
//! // The process is killed.
//! drop((daily, store));
//! let opened = Store::open(&path, &OpenOptions::new(boot_id))?;
//! let daily = &opened.bitmaps[0];
//! assert_eq!(daily.verdict, Verdict::Exact);
//! assert_eq!(daily.bits.iter_dirty().collect::<Vec<_>>(), [196608..327680]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What survives what
//!
//! | | closed in good order | process killed | power cut |
//! |---|---|---|---|
//! | [`Durability::Volatile`] | exact | all dirty | all dirty |
//! | [`Durability::Process`] | exact | exact | all dirty |
//! | [`Durability::Power`] | exact | exact | what was dirty, and the extents that were active |
//!
//! Records are settled durably whatever the durability: a name, a length, a clear or a freeze is never lost, only bits are. When a
//! settle fails, the record before is written again; where that fails too, and the machine goes down before it succeeds, either of
//! the two may be found. Until then nobody is told that data may be written.
//!
//! # The file
//!
//! Numbers are little-endian; places begin and end at multiples of 64 KiB.
//!
//! | bytes | what |
//! |---|---|
//! | 0 | one copy of the header, at most 128 KiB |
//! | 128 KiB | the other copy |
//! | 256 KiB | the heartbeat: nanoseconds since 1970 as u64, 0 if there was none; the rest of 64 KiB is not used |
//! | from 320 KiB | the two rings of the log, and the places of bits, wherever there was room |
//!
//! **A copy of the header** is `magic "DRVLSTOR" | version u32 = 1 | crc32c u32 of the version and of all that follows | bytes u32 of
//! the copy in use | 0 u32 | sequence u64`, then sections. A section is `magic "DRVLSECT" | kind u32 | crc32c u32 of the kind and the
//! body | bytes of the body u32 | 0 u32 | body`, padded with zeros to a multiple of 8. The sound copy with the higher sequence
//! counts; both have the same one unless a write was cut off. If neither is sound, what sections are is told, all dirty. In
//! the bodies `text` is a length u16 and as many bytes:
//!
//! | kind | body |
//! |---|---|
//! | 1, base | uuid 16 · generation u64 · drive size u64 · boot id 16 · clean u8 · role u8 (0 counts, 1 incoming, 2 superseded) · peer uuid 16 · peer path text · epoch u64 · bytes of an extent u64 · extents u32 · start and end of the rings u64 u64 · next bitmap id u64 |
//! | 2, owner | as it was given |
//! | 3, bitmap | id u64 · name text · log2 of the granularity u8 · view u8 (0 drive, 1 node) · durability u8 (0 volatile, 1 process, 2 power) · flags u8 (1 recording, 2 the second half records, 4 frozen) · length u64 · for each half: crc32c u32, places u16, for each of them start and end u64 u64 |
//!
//! **The bits** of a half are one bit a granule, dense, through its places in order, in words of 64 bits with the first granule
//! lowest. Their room is reserved, so that neither a full disk nor a mark can end the process; the second half's when it is first
//! needed. (A file system that copies on write keeps no room for what is written again: this file should not be on a full one.)
//! The checksum of a half, valid if clean, is the crc32c over each 4 KiB page that is not all zeros, with
//! its number in the half as u64 before it.
//!
//! **The log** has two rings, each of twice as many 4 KiB blocks as tell all slots and 16 more. The ring of an epoch is the one that
//! its lowest bit says; an epoch begins when the store is opened, with a ring of empty blocks that is on disk before the
//! header names it. A block is eight sectors of 512 bytes, each `500 bytes of the block | sequence u64 | crc32c u32`, where the
//! checksum is begun with the one of uuid and epoch and goes over the sector's number in the ring as u64 and the 508 bytes. The 4000 bytes are
//! `magic "DRVLLOG1" | seal of the block before u32 | seal u32 | updates u16 | slots told u16 | first of them u32 | 64 updates of
//! slot u32 and extent u64 | 401 slots of extent u64, 2^64 - 1 if empty`; the seal is the crc32c of the sequence as u64 and of all but
//! itself. After a power cut the longest run of blocks that name one another counts. A block whose sectors are sound but of
//! several ages was cut off; a sector that is not sound was damaged, and then nothing is believed.
//!
//! # What it costs
//!
//! Measured by `cargo bench -p driveline-store` on two shared cores, ext4:
//!
//! | | |
//! |---|---|
//! | mark one granule, dirty already | 11 ns; at random over 1 TiB 13 ns |
//! | mark one granule, clean, its page mapped | 11 ns |
//! | `poll_safe` of an active extent | 12 ns; of a bitmap that need not survive power cuts 7 ns |
//! | a flight for one writer, with its fdatasync | 0.2 ms |
//! | open 16 TiB at 64 KiB, with its three syncs | 29 ms with every 100003rd granule dirty, 58 ms with every second |
//! | settle a record | one fdatasync; two if a bitmap survives power cuts |
//!
//! How many of 1000 writes, one at a time on a drive of 100 GiB, have to wait for a flight:
//!
//! | extents, and what a power cut may add | 4 KiB at random | 90 % in 5 % of the drive | 64 KiB in sequence |
//! |---|---|---|---|
//! | 256 of 4 MiB, 1 GiB | 991 | 856 | 15 |
//! | 1024 of 4 MiB, 4 GiB: the default | 966 | 478 | 15 |
//! | 1024 of 16 MiB, 16 GiB | 860 | 109 | 3 |
//! | 4096 of 4 MiB, 16 GiB | 861 | 153 | 15 |
//!
//! Writes at random over the whole drive wait in any case, and share their flights when there are many at once. So the default bounds
//! what is copied too much to some seconds' work, and a drive with a large hot set is given more.
#![deny(unsafe_code)]

mod disk;
mod entry;
mod error;
mod fingerprint;
#[doc(hidden)]
pub mod fuzz;
mod header;
mod ids;
mod inspect;
mod log;
#[allow(unsafe_code, reason = "words of a shared mapping, see there")]
mod mapping;
mod open;
mod rebind;
mod region;
mod space;
mod store;
mod volume;

pub use driveline_bitmap::Durability;
pub use error::{Error, Result};
pub use fingerprint::{Fingerprint, ImageFile};
pub use ids::{BootId, Uuid};
pub use inspect::{Inspected, Inspection, Standing};
pub use log::LogOptions;
pub use open::{Found, OpenOptions, Opened, Verdict};
pub use rebind::Incoming;
pub use store::{OWNER_BYTES_MAX, Options, Spec, Store};

#[cfg(test)]
mod tests;

//! What the header of a store says.

mod codec;

use core::ops::Range;
use std::path::PathBuf;

use driveline_bitmap::{Granularity, Half, Record, View};

pub(crate) use self::codec::{Decoded, VERSION, decode, encode, reseal};
use crate::{BootId, Durability, LogOptions, Uuid};

/// Bytes that each of the two copies may take.
pub(crate) const COPY_BYTES: u64 = 128 << 10;
/// Where the two copies are.
pub(crate) const COPIES: [u64; 2] = [0, COPY_BYTES];
/// Where the heartbeat is.
pub(crate) const HEARTBEAT: u64 = 2 * COPY_BYTES;
/// Where everything else may be.
pub(crate) const REST: u64 = HEARTBEAT + crate::region::ALIGN;

/// Whether the file counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Counts,
    /// A copy of that store, which counts as soon as that one says that it does not.
    Incoming {
        from: Uuid,
        path: PathBuf,
    },
    /// That copy counts in its place.
    Superseded {
        by: Uuid,
        path: PathBuf,
    },
}

/// All that does not belong to one bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Base {
    pub(crate) uuid: Uuid,
    pub(crate) generation: u64,
    pub(crate) drive_size: u64,
    pub(crate) boot_id: BootId,
    /// Closed orderly: the checksums of all halves are known.
    pub(crate) clean: bool,
    pub(crate) role: Role,
    /// Which of the two rings counts, and what seals its sectors; 0 if none was begun.
    pub(crate) epoch: u64,
    pub(crate) log: LogOptions,
    /// Where the rings are.
    pub(crate) rings: Range<u64>,
    pub(crate) next_id: u64,
}

/// One bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) id: u64,
    pub(crate) granularity: Granularity,
    pub(crate) view: View,
    pub(crate) durability: Durability,
    pub(crate) record: Record,
    /// Where the bits of each half are.
    pub(crate) places: [Vec<Range<u64>>; 2],
    /// Checksums of the halves, if the store is clean.
    pub(crate) crcs: [u32; 2],
}

/// One settled state of a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) base: Base,
    pub(crate) owner: Vec<u8>,
    pub(crate) rows: Vec<Row>,
}

impl Header {
    pub(crate) fn has_power(&self) -> bool {
        self.rows.iter().any(|row| row.durability == Durability::Power)
    }
}

/// The place of a half in an array of two.
pub(crate) fn index(half: Half) -> usize {
    match half {
        Half::First => 0,
        Half::Second => 1,
    }
}

/// Whether a record counts the bits of a half.
pub(crate) fn counts(record: &Record, half: Half) -> bool {
    record.frozen || record.recorder == half
}

/// How many granules a bitmap of this length has.
pub(crate) fn granules(granularity: Granularity, length: u64) -> u64 {
    length.div_ceil(granularity.bytes())
}

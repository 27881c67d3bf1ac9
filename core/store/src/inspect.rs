//! Looking at a store without opening it: no lock, no change.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use driveline_bitmap::{Bits, Granularity, Record, View};

use crate::disk::FileDisk;
use crate::header::{Base, Role};
use crate::open::{find_header, judge, read_heartbeat};
use crate::volume::Volume;
use crate::{BootId, Durability, Error, LogOptions, Result, Store, Uuid, Verdict};

/// Whether a store's file counts, as it says itself.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Standing {
    /// It does.
    Counts,
    /// It is a copy that counts as soon as the store that it was made from says that it does not.
    Incoming {
        /// That store.
        from: Uuid,
        /// Where it was.
        path: PathBuf,
    },
    /// A copy of it counts in its place.
    Superseded {
        /// That copy.
        by: Uuid,
        /// Where it was made.
        path: PathBuf,
    },
}

/// A bitmap of a store that was looked at.
#[derive(Debug)]
#[non_exhaustive]
pub struct Inspected {
    /// What was taken down last.
    pub record: Record,
    /// Bytes per bit.
    pub granularity: Granularity,
    /// Whose changes it records.
    pub view: View,
    /// What it survives.
    pub durability: Durability,
    /// What would be dirty if the store were opened now.
    pub bits: Bits,
    /// What would be said of it then. While a process has the store open, that is as if it were killed now.
    pub verdict: Verdict,
}

/// A store that was looked at.
#[derive(Debug)]
#[non_exhaustive]
pub struct Inspection {
    /// Which store it is.
    pub uuid: Uuid,
    /// How often it moved to another file.
    pub generation: u64,
    /// Whether it counts.
    pub standing: Standing,
    /// Bytes of the drive, as told last.
    pub drive_size: u64,
    /// Whether it was closed in good order.
    pub clean: bool,
    /// Which boot opened it last.
    pub boot_id: BootId,
    /// When its process was last known to live.
    pub heartbeat: Option<SystemTime>,
    /// The owner section; none if it was lost.
    pub owner: Option<Vec<u8>>,
    /// The size of its activity log.
    pub log: LogOptions,
    /// Its bitmaps.
    pub bitmaps: Vec<Inspected>,
    /// What is wrong with its header, if both copies are damaged.
    pub damage: Option<String>,
}

impl Store {
    /// The owner section of a store, open or not; none if it was lost. Reads no bits.
    ///
    /// Errors: as [`inspect`](Store::inspect).
    pub fn owner_of(path: &Path) -> Result<Option<Vec<u8>>> {
        let disk = FileDisk::open(path, false);
        let disk = disk.map_err(|source| Error::Io { what: "open", path: path.to_owned(), source })?;
        let found = find_header(&Volume::new(path, Arc::new(disk)))?;
        Ok((!found.owner_lost).then_some(found.header.owner))
    }

    /// Looks at a store, open or not, and changes nothing. What is read while a process has it open is of no one moment.
    ///
    /// Errors: [`Error::Io`]; [`Error::Foreign`], [`Error::Version`], [`Error::NamesLost`].
    pub fn inspect(path: &Path, boot_id: BootId) -> Result<Inspection> {
        let disk = FileDisk::open(path, false);
        let disk = disk.map_err(|source| Error::Io { what: "open", path: path.to_owned(), source })?;
        let volume = Volume::new(path, Arc::new(disk));
        let found = find_header(&volume)?;
        let bitmaps = judge(&volume, &found, boot_id)?.into_iter().map(|judged| Inspected {
            record: judged.row.record,
            granularity: judged.row.granularity,
            view: judged.row.view,
            durability: judged.row.durability,
            bits: judged.bits,
            verdict: judged.verdict,
        });
        let bitmaps = bitmaps.collect();
        let heartbeat = read_heartbeat(&volume)?;
        let Base { uuid, generation, drive_size, boot_id, clean, role, log, .. } = found.header.base;
        let standing = match role {
            Role::Counts => Standing::Counts,
            Role::Incoming { from, path } => Standing::Incoming { from, path },
            Role::Superseded { by, path } => Standing::Superseded { by, path },
        };
        let owner = (!found.owner_lost).then_some(found.header.owner);
        let damage = found.damage;
        Ok(Inspection {
            uuid,
            generation,
            standing,
            drive_size,
            clean,
            boot_id,
            heartbeat,
            owner,
            log,
            bitmaps,
            damage,
        })
    }
}

//! Opening a store after whatever happened to it.

use core::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use driveline_bitmap::{Bits, Granularity, Half, Ledger, Record, View};

use crate::disk::FileDisk;
use crate::entry::Entry;
use crate::header::{self, Base, HEARTBEAT, Header, REST, Role, Row, index};
use crate::log::{self, rings_bytes};
use crate::region::{self, ALIGN, Region};
use crate::store::{Core, Live, lock};
use crate::volume::Volume;
use crate::{BootId, Durability, Error, Result, Store, Uuid, space};

mod find;

pub(crate) use self::find::{FoundHeader, find_header};

/// What is known when a store is opened.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Which boot this is: [`BootId::current`], unless a test pretends that the machine went down.
    pub boot_id: BootId,
    /// Which store it has to be.
    pub uuid: Option<Uuid>,
    /// The oldest generation that it may be.
    pub generation: Option<u64>,
}

impl OpenOptions {
    /// Any store.
    pub fn new(boot_id: BootId) -> Self {
        OpenOptions { boot_id, uuid: None, generation: None }
    }
}

/// How far a bitmap that was found can be trusted. It can be used in any case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Dirty is what was marked, no more and no less.
    Exact,
    /// Dirty is what was marked, and what may have been: all extents that were active when the machine went down.
    Superset {
        /// How many those were.
        extents: u64,
        /// How many bytes became dirty by them.
        bytes: u64,
    },
    /// Everything is dirty, as what was marked is not known.
    AllDirty {
        /// Why.
        reason: String,
    },
}

/// A bitmap that was found in a store.
#[derive(Debug)]
#[non_exhaustive]
pub struct Found {
    /// What keeps it from now on.
    pub ledger: Arc<dyn Ledger>,
    /// Bytes per bit.
    pub granularity: Granularity,
    /// Whose changes it records.
    pub view: View,
    /// What it survives.
    pub durability: Durability,
    /// What was taken down last; not frozen, for who froze it is gone.
    pub record: Record,
    /// What is dirty.
    pub bits: Bits,
    /// If it was frozen for a reader: what was marked since then. A part of `bits`; none if it is not known.
    pub since: Option<Bits>,
    /// How far to trust that.
    pub verdict: Verdict,
}

/// A store that was opened.
#[derive(Debug)]
#[non_exhaustive]
pub struct Opened {
    /// The store.
    pub store: Store,
    /// Its bitmaps, in the order in which they were added.
    pub bitmaps: Vec<Found>,
    /// The owner section; none if it was lost.
    pub owner: Option<Vec<u8>>,
    /// The drive's size as it was told last.
    pub drive_size: u64,
    /// When its process was last known to live.
    pub heartbeat: Option<SystemTime>,
    /// Whether it had been closed in good order.
    pub clean: bool,
    /// Whether the machine has not gone down since: what was written to memory is what is found.
    pub same_boot: bool,
    /// What was wrong with its header, if both copies were damaged.
    pub damage: Option<String>,
}

impl Store {
    /// Opens a store, and finds its bitmaps usable whatever happened to it.
    ///
    /// Errors: [`Error::Locked`]; [`Error::Foreign`], [`Error::Version`], [`Error::Uuid`] and [`Error::Generation`] for what it is
    /// not; [`Error::NamesLost`]; [`Error::Superseded`] and [`Error::Incoming`] if it does not count; [`Error::Io`].
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Opened> {
        let disk = FileDisk::open(path, true);
        let disk = disk.map_err(|source| Error::Io { what: "open", path: path.to_owned(), source })?;
        lock(path, &disk)?;
        Store::open_on(Arc::new(Volume::new(path, Arc::new(disk))), options, true)
    }

    /// Opens the store that is on a disk.
    pub(crate) fn open_on(volume: Arc<Volume>, options: &OpenOptions, threads: bool) -> Result<Opened> {
        let mut found = find_header(&volume)?;
        check_identity(&volume, &found.header.base, options)?;
        check_role(&volume, &mut found)?;
        let judged = judge(&volume, &found, options.boot_id)?;
        let heartbeat = read_heartbeat(&volume)?;
        let FoundHeader { header, sequence, copy, damage, owner_lost } = found;

        let mut base = header.base.clone();
        if base.rings.is_empty() {
            let used = header.rows.iter().flat_map(|row| row.places.iter().flatten().cloned());
            base.rings = space::find(used.collect(), rings_bytes(base.log));
        }
        let same_boot = base.boot_id == options.boot_id;
        (base.clean, base.boot_id, base.role) = (false, options.boot_id, Role::Counts);
        volume.reserve(0..REST)?;
        volume.reserve(base.rings.clone())?;
        let epoch = base.epoch;
        let mut core = Core {
            heartbeat: volume.map(HEARTBEAT..HEARTBEAT + ALIGN)?,
            volume,
            log: None,
            threads,
            epoch,
            base,
            owner: header.owner.clone(),
            lives: Vec::new(),
            settled: header,
            sequence,
            copy,
            batch: false,
            closed: false,
        };
        let (clean, owner) = (core.settled.base.clean, core.owner.clone());
        let bitmaps = core.take_up(judged)?;
        Ok(Opened {
            bitmaps,
            owner: (!owner_lost).then_some(owner),
            drive_size: core.base.drive_size,
            heartbeat,
            clean,
            same_boot,
            damage,
            store: Store::of(core),
        })
    }
}

/// What is to be done with a row that was found.
pub(crate) struct Judged {
    pub(crate) row: Row,
    pub(crate) bits: Bits,
    pub(crate) since: Option<Bits>,
    pub(crate) verdict: Verdict,
    /// Active extents, of which nobody knows whether they changed.
    extents: Vec<Range<u64>>,
}

impl Core {
    /// Makes what was found be what is kept, in an order that lets a crash find the same again, or more.
    fn take_up(&mut self, judged: Vec<Judged>) -> Result<Vec<Found>> {
        for Judged { row, .. } in &judged {
            let mut place = self.new_place(row.durability)?;
            for (region, places) in place.halves.iter_mut().zip(&row.places) {
                places.iter().try_for_each(|place| self.volume.reserve(place.clone()))?;
                *region = Region::map(&self.volume, places)?;
            }
            let name = &row.record.name;
            let entry = Entry::new(row.id, row.granularity, row.view, row.durability, name, place);
            let (next, settled) = (Some(row.record.clone()), Some(row.record.clone()));
            self.lives.push(Live { entry: Arc::new(entry), next, settled, wipes: [false; 2] });
        }
        // First what is dirty in addition.
        let mut found = Vec::new();
        for (at, Judged { row, bits, since, verdict, extents }) in judged.into_iter().enumerate() {
            let entry = Arc::clone(&self.lives[at].entry);
            let (record, shift) = (&row.record, row.granularity.shift());
            self.make_room(&entry, record)?;
            entry.read_volatile(record.recorder, &bits);
            let all = 0..record.length;
            let more = match &verdict {
                Verdict::AllDirty { .. } => core::slice::from_ref(&all),
                _ => &extents,
            };
            for bytes in more.iter().filter(|_| row.durability != Durability::Volatile) {
                let end = header::granules(row.granularity, bytes.end.min(record.length));
                entry.mark(record.recorder, bytes.start >> shift..end);
            }
            let (granularity, view, durability) = (row.granularity, row.view, row.durability);
            let record = Record { frozen: false, ..row.record };
            let ledger = entry;
            found.push(Found { ledger, granularity, view, durability, record, bits, since, verdict });
        }
        // Then a header of this boot that says what the last one said, in both copies: one of them may have been clean.
        self.volume.sync(self.volume.now())?;
        self.write(self.header())?;
        self.volume.sync(self.volume.now())?;
        // Then what a reader had frozen joins what records, and nothing is left that does not count.
        for live in &mut self.lives {
            let Some(record) = &mut live.next else { continue };
            let (place, other) = (live.entry.place(), record.recorder.other());
            let recorder = &place.halves[index(record.recorder)];
            if record.frozen {
                recorder.merge(&place.volume, &place.halves[index(other)])?;
                record.frozen = false;
                live.wipes[index(other)] = true;
            } else {
                place.halves[index(other)].clear_from(&place.volume, 0)?;
            }
            recorder.clear_from(&place.volume, header::granules(live.entry.granularity, record.length))?;
        }
        self.settle()?;
        Ok(found)
    }
}

fn check_identity(volume: &Volume, base: &Base, options: &OpenOptions) -> Result<()> {
    let path = &volume.path;
    match (options.uuid, options.generation) {
        (Some(expected), _) if expected != base.uuid => {
            Err(Error::Uuid { path: path.clone(), found: base.uuid, expected })
        }
        (_, Some(expected)) if base.generation < expected => {
            Err(Error::Generation { path: path.clone(), found: base.generation, expected })
        }
        _ => Ok(()),
    }
}

/// Says whether the file counts. A copy does once the file that it was made from says so, or can say nothing.
fn check_role(volume: &Volume, found: &mut FoundHeader) -> Result<()> {
    let path = &volume.path;
    let (from, from_path) = match found.header.base.role.clone() {
        Role::Counts => return Ok(()),
        Role::Superseded { by, path: by_path } => {
            return Err(Error::Superseded { path: path.clone(), by, by_path });
        }
        Role::Incoming { from, path } => (from, path),
    };
    let original = FileDisk::open(&from_path, false)
        .map_err(|source| Error::Io { what: "open", path: from_path.clone(), source })
        .and_then(|disk| find_header(&Volume::new(&from_path, Arc::new(disk))));
    let reason = match original {
        Ok(original) if original.header.base.uuid == from && original.damage.is_none() => {
            match original.header.base.role {
                Role::Superseded { by, .. } if by == found.header.base.uuid => return Ok(()),
                Role::Superseded { .. } => "which another copy supersedes".to_owned(),
                _ => "which still counts".to_owned(),
            }
        }
        unknown => {
            let what =
                unknown.err().map_or("it is another store, or damaged".to_owned(), |error| error.to_string());
            let reason = format!(
                "the store was copied from {} and never came to count, and that says nothing: {what}",
                from_path.display()
            );
            found.damage.get_or_insert(reason);
            return Ok(());
        }
    };
    Err(Error::Incoming { path: path.clone(), from, from_path, reason })
}

/// Finds out what is dirty in each bitmap, and changes nothing.
pub(crate) fn judge(volume: &Volume, found: &FoundHeader, boot_id: BootId) -> Result<Vec<Judged>> {
    let Header { base, rows, .. } = &found.header;
    let length = volume.length()?;
    let same_boot = base.boot_id == boot_id;
    let extents = match found.damage.is_none() && !base.clean && !same_boot && found.header.has_power() {
        true => log::replay(volume, base.uuid, base.epoch, base.log, &base.rings)?,
        false => Ok(Vec::new()),
    };
    let judge_row = |row: &Row| {
        let bits = Bits::new(row.granularity, row.record.length);
        let mut crcs = [None; 2];
        for half in Half::BOTH {
            if header::counts(&row.record, half) {
                crcs[index(half)] = Some(region::load(volume, &row.places[index(half)], &bits)?);
            }
        }
        let power = row.durability == Durability::Power;
        let reason = if let Some(damage) = &found.damage {
            Some(damage.clone())
        } else if let Some(reason) = missing(row, length) {
            Some(reason)
        } else if base.clean {
            let sound =
                crcs.iter().zip(row.crcs).all(|(found, told)| found.is_none_or(|found| found == told));
            (!sound).then(|| "its bits do not match their checksum, though the store was closed".to_owned())
        } else if row.durability == Durability::Volatile {
            Some("it is volatile, and the store was not closed".to_owned())
        } else if same_boot {
            None
        } else if power {
            extents.as_ref().err().cloned()
        } else {
            Some("the machine went down, and it survives the end of its process alone".to_owned())
        };
        let (extents, verdict) = match (reason, &extents) {
            (Some(reason), _) => {
                bits.mark(0..row.record.length);
                (Vec::new(), Verdict::AllDirty { reason })
            }
            (None, Ok(extents)) if power && !base.clean && !same_boot => {
                let before = bits.dirty_bytes();
                extents.iter().for_each(|bytes| bits.mark(bytes.clone()));
                let (count, bytes) = (extents.len() as u64, bits.dirty_bytes() - before);
                (extents.clone(), Verdict::Superset { extents: count, bytes })
            }
            _ => (Vec::new(), Verdict::Exact),
        };
        let since = match (&verdict, row.record.frozen) {
            (Verdict::Exact, true) => {
                let since = Bits::new(row.granularity, row.record.length);
                region::load(volume, &row.places[index(row.record.recorder)], &since)?;
                Some(since)
            }
            _ => None,
        };
        Ok(Judged { row: row.clone(), bits, since, verdict, extents })
    };
    rows.iter().map(judge_row).collect()
}

/// What of a row's bits is not in the file.
fn missing(row: &Row, length: u64) -> Option<String> {
    let counted = Half::BOTH.into_iter().filter(|&half| header::counts(&row.record, half));
    for half in counted {
        let places = &row.places[index(half)];
        let room: u64 = places.iter().map(|place| (place.end - place.start) * 8).sum();
        let granules = header::granules(row.granularity, row.record.length);
        if room < granules {
            return Some(format!("its header has room for {room} of its {granules} granules"));
        }
        let end = places.iter().map(|place| place.end).max().unwrap_or(0);
        if end > length {
            return Some(format!("the file was cut off: it has {length} bytes, and bits up to {end}"));
        }
    }
    None
}

pub(crate) fn read_heartbeat(volume: &Volume) -> Result<Option<SystemTime>> {
    let mut bytes = [0; 8];
    volume.read_at(&mut bytes, HEARTBEAT)?;
    let nanoseconds = u64::from_le_bytes(bytes);
    Ok((nanoseconds != 0).then(|| UNIX_EPOCH + Duration::from_nanos(nanoseconds)))
}

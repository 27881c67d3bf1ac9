//! An open store: what its header will say, what it says, and how the one becomes the other.

mod settle;

use core::sync::atomic::Ordering;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

use driveline_bitmap::{Granularity, Half, Ledger, Record, View};
use parking_lot::{Mutex, MutexGuard};

use crate::disk::FileDisk;
use crate::entry::{Entry, Place};
use crate::header::{self, Base, HEARTBEAT, Header, REST, Role, index};
use crate::log::{Log, rings_bytes};
use crate::mapping::Words;
use crate::region::{self, ALIGN, CLEAN_CRC, Region};
use crate::volume::Volume;
use crate::{BootId, Durability, Error, LogOptions, Result, Uuid, space};

/// The longest owner section, in bytes.
pub const OWNER_BYTES_MAX: usize = 32 << 10;

/// What a new store is told.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of the drive, for people; each bitmap has its own length.
    pub drive_size: u64,
    /// Which boot this is.
    pub boot_id: BootId,
    /// The owner section to begin with, see [`Store::set_owner`].
    pub owner: Vec<u8>,
    /// The size of the activity log.
    pub log: LogOptions,
}

/// A bitmap to add.
#[derive(Clone, Debug)]
pub struct Spec {
    /// What it is to begin with; clean.
    pub record: Record,
    /// Bytes per bit.
    pub granularity: Granularity,
    /// Whose changes it records.
    pub view: View,
    /// What it survives.
    pub durability: Durability,
}

/// The sidecar file that keeps the bitmaps of one drive, open and locked.
///
/// Dropped without [`close_clean`](Store::close_clean) it is as if the process had been killed. Its ledgers keep the file locked as
/// long as they live.
#[derive(Debug)]
pub struct Store {
    pub(crate) shared: Arc<Shared>,
}

/// What the ledgers of a store have in common.
#[derive(Debug)]
pub(crate) struct Shared {
    core: Mutex<Core>,
    me: Weak<Shared>,
}

/// The control path's part of a store.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) volume: Arc<Volume>,
    pub(crate) heartbeat: Arc<Words>,
    pub(crate) log: Option<Arc<Log>>,
    /// Whether the log has a thread of its own.
    pub(crate) threads: bool,
    /// The epoch of the log, or of the one that was before.
    pub(crate) epoch: u64,
    /// What the header will say.
    pub(crate) base: Base,
    pub(crate) owner: Vec<u8>,
    pub(crate) lives: Vec<Live>,
    /// What it says.
    pub(crate) settled: Header,
    pub(crate) sequence: u64,
    /// Which of the two copies is on disk for sure.
    pub(crate) copy: usize,
    pub(crate) batch: bool,
    /// The checksums were taken: what is marked now would make them lie.
    pub(crate) closed: bool,
}

/// A bitmap as long as anybody may ask for it.
#[derive(Debug)]
pub(crate) struct Live {
    pub(crate) entry: Arc<Entry>,
    /// What the header will say of it: nothing once it is forgotten.
    pub(crate) next: Option<Record>,
    pub(crate) settled: Option<Record>,
    /// Halves to wipe once no settled record counts them.
    pub(crate) wipes: [bool; 2],
}

impl Store {
    /// Makes a new file for a drive's bitmaps, durably.
    ///
    /// Errors: [`Error::Io`], also if the file exists; [`Error::Option`].
    pub fn create(path: &Path, options: &Options) -> Result<Self> {
        options.log.check()?;
        let disk = FileDisk::create(path).map_err(|source| Error::Io {
            what: "create",
            path: path.to_owned(),
            source,
        })?;
        let made = lock(path, &disk).and_then(|()| {
            let store = Store::create_on(Arc::new(Volume::new(path, Arc::new(disk))), options, true)?;
            sync_folder(path)?;
            Ok(store)
        });
        if made.is_err() {
            // What is half made is of no use, and would be in the way of the next attempt.
            let _ = fs::remove_file(path);
        }
        made
    }

    /// Makes a store on an empty disk.
    pub(crate) fn create_on(volume: Arc<Volume>, options: &Options, threads: bool) -> Result<Self> {
        options.log.check()?;
        let rings = REST..REST + rings_bytes(options.log);
        volume.reserve(0..rings.end)?;
        let base = Base {
            uuid: Uuid::random(),
            generation: 1,
            drive_size: options.drive_size,
            boot_id: options.boot_id,
            clean: false,
            role: Role::Counts,
            epoch: 0,
            log: options.log,
            rings,
            next_id: 1,
        };
        let settled = Header { base: base.clone(), owner: Vec::new(), rows: Vec::new() };
        let mut core = Core {
            heartbeat: volume.map(HEARTBEAT..HEARTBEAT + ALIGN)?,
            volume,
            log: None,
            threads,
            epoch: 0,
            base,
            owner: options.owner.clone(),
            lives: Vec::new(),
            settled,
            sequence: 0,
            copy: 1,
            batch: false,
            closed: false,
        };
        core.write(core.header())?;
        Ok(Store::of(core))
    }

    /// Puts a store around its core.
    pub(crate) fn of(core: Core) -> Self {
        let shared = Arc::new_cyclic(|me| {
            core.lives.iter().for_each(|live| live.entry.set_store(me));
            Shared { core: Mutex::new(core), me: Weak::clone(me) }
        });
        Store { shared }
    }

    /// Where the file is.
    pub fn path(&self) -> PathBuf {
        self.shared.core().volume.path.clone()
    }

    /// Which store it is.
    pub fn uuid(&self) -> Uuid {
        self.shared.core().base.uuid
    }

    /// How often it moved to another file.
    pub fn generation(&self) -> u64 {
        self.shared.core().base.generation
    }

    /// Adds a bitmap, and reserves the room for its bits. Within a batch it is settled with that.
    ///
    /// Errors: [`Error::Io`], a full disk above all; [`Error::HeaderFull`].
    pub fn add(&self, spec: &Spec) -> Result<Arc<dyn Ledger>> {
        Ok(self.shared.add(spec)?)
    }

    /// From now on records, bitmaps and the owner section are taken down, and settled together by
    /// [`end_batch`](Store::end_batch). What is marked meanwhile counts once that is done: a batch lies within a drained section.
    ///
    /// Errors: [`Error::State`] if a batch is open.
    pub fn begin_batch(&self) -> Result<()> {
        let mut core = self.shared.core();
        if core.batch {
            return core.refuse("begin a batch of", "another one is open");
        }
        core.batch = true;
        Ok(())
    }

    /// Settles what was taken down since the batch began, with one write of the header.
    ///
    /// Errors: [`Error::Io`], [`Error::HeaderFull`]: nothing of the batch is taken down then, and bitmaps that were added
    /// in it are forgotten. [`Error::State`] if no batch is open.
    pub fn end_batch(&self) -> Result<()> {
        let mut core = self.shared.core();
        if !core.batch {
            return core.refuse("end a batch of", "none is open");
        }
        core.batch = false;
        core.settle()
    }

    /// Keeps these bytes for the caller, as [`Opened::owner`](crate::Opened::owner). Within a batch settled with that.
    ///
    /// Errors: [`Error::Option`] beyond [`OWNER_BYTES_MAX`], [`Error::Io`], [`Error::HeaderFull`].
    pub fn set_owner(&self, owner: &[u8]) -> Result<()> {
        check_owner(owner)?;
        let mut core = self.shared.core();
        core.owner = owner.to_vec();
        core.settle_unless_batch()
    }

    /// Keeps the drive's size, for people. Within a batch settled with that.
    ///
    /// Errors: [`Error::Io`].
    pub fn set_drive_size(&self, bytes: u64) -> Result<()> {
        let mut core = self.shared.core();
        core.base.drive_size = bytes;
        core.settle_unless_batch()
    }

    /// Says that the process lived at `now`. Costs a store to memory; [`Opened::heartbeat`](crate::Opened::heartbeat) has the last.
    pub fn heartbeat(&self, now: SystemTime) {
        let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let nanoseconds = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
        self.shared.core().heartbeat[0].store(nanoseconds.to_le(), Ordering::SeqCst);
    }

    /// Brings everything to stable storage, the bits of volatile bitmaps too.
    ///
    /// Errors: [`Error::Io`]; [`Error::State`] while a batch is open.
    pub fn flush(&self) -> Result<()> {
        let mut core = self.shared.core();
        if core.batch {
            return core.refuse("flush", "a batch is open");
        }
        core.settle()?;
        core.lives.iter().try_for_each(|live| live.entry.write_volatile())?;
        core.volume.sync(core.volume.now())
    }

    /// Closes the store in good order: everything is exact when it is opened again, whatever happens meanwhile.
    ///
    /// Its ledgers are of no use then: whoever asks them whether data may be written gets an error.
    ///
    /// Errors: as [`flush`](Store::flush). The store is closed regardless, as a crash would close it.
    pub fn close_clean(self) -> Result<()> {
        self.flush()?;
        let mut core = self.shared.core();
        core.closed = true;
        core.volume.set_doubt(true);
        core.base.clean = true;
        let mut header = core.header();
        for row in &mut header.rows {
            for half in Half::BOTH {
                row.crcs[index(half)] = match header::counts(&row.record, half) {
                    true => region::checksum(&core.volume, &row.places[index(half)])?,
                    false => CLEAN_CRC,
                };
            }
        }
        core.write(header)
    }
}

impl Shared {
    pub(crate) fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock()
    }

    fn add(&self, spec: &Spec) -> Result<Arc<Entry>> {
        let mut core = self.core();
        core.collect();
        let id = core.base.next_id;
        let place = core.new_place(spec.durability)?;
        let (granularity, name) = (spec.granularity, &spec.record.name);
        let entry = Arc::new(Entry::new(id, granularity, spec.view, spec.durability, name, place));
        entry.set_store(&self.me);
        core.make_room(&entry, &spec.record)?;
        core.base.next_id += 1;
        let (next, wipes) = (Some(spec.record.clone()), [false; 2]);
        core.lives.push(Live { entry: Arc::clone(&entry), next, settled: None, wipes });
        core.settle_unless_batch()?;
        Ok(entry)
    }

    /// A new record of a bitmap, or none any more.
    pub(crate) fn take_down(&self, entry: &Entry, record: Option<&Record>) -> Result<()> {
        let mut core = self.core();
        let at = core.live(entry.id);
        if let Some(record) = record {
            let entry = Arc::clone(&core.lives[at].entry);
            core.make_room(&entry, record)?;
            entry.set_name(&record.name);
        }
        let live = &mut core.lives[at];
        for half in Half::BOTH {
            // A half that was to be wiped, and counts again: a transaction is undone. What was in it counts again too.
            live.wipes[index(half)] &= !record.is_some_and(|record| header::counts(record, half));
        }
        live.next = record.cloned();
        core.settle_unless_batch()
    }

    pub(crate) fn reserve(&self, entry: &Entry, length: u64) -> Result<()> {
        let core = self.core();
        let at = core.live(entry.id);
        let entry = Arc::clone(&core.lives[at].entry);
        let granules = header::granules(entry.granularity, length);
        for half in Half::BOTH {
            if entry.place().halves[index(half)].capacity() > 0 {
                core.make_room_in(&entry, half, granules)?;
            }
        }
        Ok(())
    }

    pub(crate) fn wipe(&self, entry: &Entry, half: Half) {
        let mut core = self.core();
        let at = core.live(entry.id);
        let live = &mut core.lives[at];
        match live.settled.as_ref().is_some_and(|record| header::counts(record, half)) {
            true => live.wipes[index(half)] = true,
            false => entry.wipe_now(half),
        }
    }

    pub(crate) fn counts(&self, id: u64, half: Half) -> bool {
        let core = self.core();
        let settled = &core.lives[core.live(id)].settled;
        settled.as_ref().is_some_and(|record| header::counts(record, half))
    }

    /// Ends a doubt about the header, if there is one.
    pub(crate) fn resolve(&self) -> Result<()> {
        let mut core = self.core();
        if core.closed {
            return core.refuse("rely on", "it was closed");
        }
        if core.volume.in_doubt() { core.put_right() } else { Ok(()) }
    }
}

impl Core {
    /// The live bitmap of an entry that exists.
    fn live(&self, id: u64) -> usize {
        self.lives.iter().position(|live| live.entry.id == id).expect("an entry that exists is live")
    }

    /// The error for what cannot be done now.
    pub(crate) fn refuse<T>(&self, operation: &'static str, reason: &'static str) -> Result<T> {
        Err(Error::State { operation, path: self.volume.path.clone(), reason })
    }

    /// A place without room, with the log that its durability needs.
    pub(crate) fn new_place(&mut self, durability: Durability) -> Result<Place> {
        if durability == Durability::Power && self.log.is_none() {
            self.begin_log()?;
        }
        let log = self.log.clone().filter(|_| durability == Durability::Power);
        Ok(Place { volume: Arc::clone(&self.volume), log, halves: [Region::default(), Region::default()] })
    }

    /// Begins the log of the next epoch.
    pub(crate) fn begin_log(&mut self) -> Result<()> {
        let Base { uuid, log, rings, .. } = &self.base;
        let mut log = Log::begin(&self.volume, *uuid, self.epoch + 1, *log, rings)?;
        if self.threads {
            log.start()?;
        }
        self.epoch += 1;
        self.log = Some(Arc::new(log));
        Ok(())
    }

    /// Makes room for all that a record counts.
    pub(crate) fn make_room(&self, entry: &Entry, record: &Record) -> Result<()> {
        let granules = header::granules(entry.granularity, record.length);
        let counted = Half::BOTH.into_iter().filter(|&half| header::counts(record, half));
        counted.into_iter().try_for_each(|half| self.make_room_in(entry, half, granules))
    }

    fn make_room_in(&self, entry: &Entry, half: Half, granules: u64) -> Result<()> {
        let mut place = Place::clone(&entry.place());
        let region = &mut place.halves[index(half)];
        let Some(bytes) = space::growth(region.capacity(), granules) else { return Ok(()) };
        let mut used: Vec<_> = self.lives.iter().flat_map(|live| places(&live.entry)).collect();
        used.extend(places(entry));
        used.push(self.base.rings.clone());
        let room = space::find(used, bytes);
        let made = self.volume.reserve(room.clone()).and_then(|()| {
            let mut fresh = Region::default();
            fresh.push(&self.volume, room.clone())?;
            // A crash may have left bits of a bitmap that is gone.
            fresh.clear_from(&self.volume, 0)?;
            region.push(&self.volume, room.clone())
        });
        match made {
            Ok(()) => entry.set_place(place),
            Err(_) => self.volume.release(room),
        }
        made
    }

    /// Gives back the room of bitmaps that nobody can ask for any more.
    pub(crate) fn collect(&mut self) {
        let volume = Arc::clone(&self.volume);
        self.lives.retain(|live| {
            let gone = live.next.is_none() && live.settled.is_none() && Arc::strong_count(&live.entry) == 1;
            if gone {
                places(&live.entry).into_iter().for_each(|place| volume.release(place));
            }
            !gone
        });
    }
}

/// All places of an entry.
fn places(entry: &Entry) -> Vec<core::ops::Range<u64>> {
    entry.place().halves.iter().flat_map(Region::places).collect()
}

/// Takes the lock on a file.
pub(crate) fn lock(path: &Path, disk: &FileDisk) -> Result<()> {
    match disk.lock() {
        Ok(true) => Ok(()),
        Ok(false) => Err(Error::Locked { path: path.to_owned() }),
        Err(source) => Err(Error::Io { what: "lock", path: path.to_owned(), source }),
    }
}

/// Makes the file's name durable.
pub(crate) fn sync_folder(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let synced = File::open(folder.unwrap_or(Path::new("."))).and_then(|folder| folder.sync_all());
    synced.map_err(|source| Error::Io { what: "sync the folder of", path: path.to_owned(), source })
}

fn check_owner(owner: &[u8]) -> Result<()> {
    match owner.len() <= OWNER_BYTES_MAX {
        true => Ok(()),
        false => Err(Error::Option {
            option: "the owner section",
            found: format!("{} bytes", owner.len()),
            expected: "at most 32 KiB",
        }),
    }
}

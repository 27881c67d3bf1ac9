//! Moving a store to another file, so that after a crash at any moment exactly one of the two counts.
//!
//! ```text
//!                    old file        new file                 counts
//! copy_to            counts          incoming from old        old
//! supersede          superseded      incoming from old        new: it finds the old one superseded by itself
//! activate           superseded      counts                   new
//! ```

use std::path::{Path, PathBuf, absolute};
use std::sync::Arc;

use crate::disk::{Disk, FileDisk};
use crate::entry::Place;
use crate::header::{Base, HEARTBEAT, Header, REST, Role};
use crate::log::rings_bytes;
use crate::region::{self, ALIGN, Region};
use crate::store::{Core, Live, lock, sync_folder};
use crate::volume::Volume;
use crate::{Durability, Error, Result, Store, Uuid, space};

/// A copy of a store that does not count yet. Dropped, it never will; its file is left where it is.
#[derive(Debug)]
pub struct Incoming {
    /// The store to be, without bitmaps of its own: it shares those of the store that it is a copy of.
    core: Core,
    regions: Vec<(u64, [Region; 2])>,
}

impl Store {
    /// Makes a complete, durable copy in a new file, of the next generation.
    ///
    /// Bitmaps go on being marked here meanwhile: the copy is brought up to date by [`supersede`](Store::supersede).
    ///
    /// Errors: [`Error::Io`], also if the file exists; [`Error::State`] while a batch is open. A file that was made is removed.
    pub fn copy_to(&self, path: &Path) -> Result<Incoming> {
        let io = |what, source| Error::Io { what, path: path.to_owned(), source };
        let disk = FileDisk::create(path).map_err(|source| io("create", source))?;
        let made = lock(path, &disk).and_then(|()| {
            let path = absolute(path).map_err(|source| io("find", source))?;
            let incoming = self.copy_on(&path, Arc::new(disk))?;
            sync_folder(&path)?;
            Ok(incoming)
        });
        if made.is_err() {
            // What is half made is of no use, and would be in the way of the next attempt.
            let _ = std::fs::remove_file(path);
        }
        made
    }

    /// Makes the copy on an empty disk.
    pub(crate) fn copy_on(&self, path: &Path, disk: Arc<dyn Disk>) -> Result<Incoming> {
        let mut old = self.shared.core();
        if old.batch {
            return old.refuse("copy", "a batch is open");
        }
        old.settle()?;
        let volume = Arc::new(Volume::new(path, disk));
        let rings = REST..REST + rings_bytes(old.base.log);
        volume.reserve(0..rings.end)?;
        let from_path = absolute(&old.volume.path).unwrap_or_else(|_| old.volume.path.clone());
        let base = Base {
            uuid: Uuid::random(),
            generation: old.base.generation + 1,
            role: Role::Incoming { from: old.base.uuid, path: from_path },
            epoch: 0,
            rings,
            ..old.base.clone()
        };
        let core = Core {
            heartbeat: volume.map(HEARTBEAT..HEARTBEAT + ALIGN)?,
            volume,
            log: None,
            threads: old.threads,
            epoch: 0,
            settled: Header { base: base.clone(), owner: Vec::new(), rows: Vec::new() },
            base,
            owner: Vec::new(),
            lives: Vec::new(),
            sequence: 0,
            copy: 1,
            batch: false,
            closed: false,
        };
        let mut incoming = Incoming { core, regions: Vec::new() };
        incoming.update(&old)?;
        Ok(incoming)
    }

    /// Brings the copy up to date and says in this file, durably, that the copy counts in its place.
    ///
    /// From before this call until [`Incoming::activate`] returned, no marks may come and no records be taken down: whoever calls
    /// this has drained the drive.
    ///
    /// Errors: [`Error::Io`], [`Error::State`]; this file still counts then, unless the error left its header in doubt.
    pub fn supersede(&self, incoming: &mut Incoming) -> Result<()> {
        let mut old = self.shared.core();
        if old.batch {
            return old.refuse("supersede", "a batch is open");
        }
        if !matches!(&incoming.core.base.role, Role::Incoming { from, .. } if *from == old.base.uuid) {
            return old.refuse("supersede", "the copy was made of another store");
        }
        old.settle()?;
        incoming.update(&old)?;
        let (by, path) = (incoming.core.base.uuid, incoming.core.volume.path.clone());
        old.base.role = Role::Superseded { by, path };
        old.settle()
    }
}

impl Incoming {
    /// Where the copy is.
    pub fn path(&self) -> PathBuf {
        self.core.volume.path.clone()
    }

    /// Which store it will be.
    pub fn uuid(&self) -> Uuid {
        self.core.base.uuid
    }

    /// Makes `store`, which this is a copy of and which was superseded by it, go on in this file, with all its ledgers.
    ///
    /// Errors: [`Error::State`] if it was not superseded. [`Error::Io`] if the header could not be written: the store goes on in
    /// this file regardless, which counts since the other one says so, and the next header tries again.
    pub fn activate(self, store: &Store) -> Result<()> {
        let Incoming { core: mut new, regions } = self;
        let mut core = store.shared.core();
        if !matches!(&core.base.role, Role::Superseded { by, .. } if *by == new.base.uuid) {
            return core.refuse("leave", "it was not superseded by this copy");
        }
        // The old log joins its thread when it is dropped: not under this lock.
        let old_log = core.log.take();
        let mut places = Vec::new();
        for live in &core.lives {
            let halves =
                regions.iter().find(|(id, _)| *id == live.entry.id).map(|(_, halves)| halves.clone());
            let power = live.entry.durability == Durability::Power;
            let (volume, log) = (Arc::clone(&new.volume), new.log.clone().filter(|_| power));
            places.push(live.entry.place());
            live.entry.set_place(Place { volume, log, halves: halves.unwrap_or_default() });
        }
        new.lives = core::mem::take(&mut core.lives);
        new.owner = new.settled.owner.clone();
        new.base = Base { next_id: core.base.next_id, role: Role::Counts, ..new.base };
        *core = new;
        let settled = core.settle();
        drop(core);
        drop((old_log, places));
        settled
    }

    /// Copies what `old` says and holds now, durably.
    fn update(&mut self, old: &Core) -> Result<()> {
        let mut header = old.header();
        if header.has_power() && self.core.log.is_none() {
            self.core.begin_log()?;
        }
        for live in &old.lives {
            let halves = self.copy_bits(live)?;
            match self.regions.iter_mut().find(|(id, _)| *id == live.entry.id) {
                Some((_, known)) => *known = halves,
                None => self.regions.push((live.entry.id, halves)),
            }
        }
        self.regions.retain(|(id, _)| old.lives.iter().any(|live| live.entry.id == *id));
        for row in &mut header.rows {
            let copied = self.regions.iter().find(|(id, _)| *id == row.id);
            let (_, halves) = copied.expect("every bitmap was copied");
            row.places = [0, 1].map(|half| halves[half].places());
        }
        header.base = Base {
            epoch: self.core.epoch,
            drive_size: old.base.drive_size,
            next_id: old.base.next_id,
            ..self.core.base.clone()
        };
        let beat = old.heartbeat[0].load(core::sync::atomic::Ordering::SeqCst);
        self.core.heartbeat[0].store(beat, core::sync::atomic::Ordering::SeqCst);
        self.core.base = header.base.clone();
        self.core.volume.sync(self.core.volume.now())?;
        self.core.write(header)
    }

    /// Copies the bits of one bitmap, to where they were copied before if they still fit.
    fn copy_bits(&self, live: &Live) -> Result<[Region; 2]> {
        let (place, volume) = (live.entry.place(), &self.core.volume);
        let known = self.regions.iter().find(|(id, _)| *id == live.entry.id);
        let mut halves = known.map(|(_, halves)| halves.clone()).unwrap_or_default();
        let mut used: Vec<_> =
            self.regions.iter().flat_map(|(_, halves)| halves).flat_map(Region::places).collect();
        used.push(self.core.base.rings.clone());
        for (half, from) in halves.iter_mut().zip(&place.halves) {
            if half.capacity() < from.capacity() {
                let room = space::find(used.clone(), from.capacity() / 8);
                volume.reserve(room.clone())?;
                used.push(room.clone());
                *half = Region::map(volume, &[room])?;
            }
            half.clear_from(volume, 0)?;
            let Some(to) = half.places().first().cloned() else { continue };
            let since = volume.now();
            region::scan(&place.volume, &from.places(), |page, bytes| {
                volume.write_at(bytes, to.start + page * bytes.len() as u64)
            })?;
            volume.sync(since)?;
        }
        Ok(halves)
    }
}

//! A file of bitmaps as a shelf: those of a drive whose image has no room for them.
//!
//! While such a file is closed in good order it knows what the images looked like. A change by the tool leaves that as it is,
//! so that who changes an image is noticed all the same.

use super::{
    Result,
    shelf::{Home, Shelf, lock, locked, prefixed},
};
use crate::stores::{Owned, Owner, Place, Seen, Trust, beside, inspect};
use driveline_bitmap::{Bitmap, Durability, View};
use driveline_graph::check_name;
use driveline_store::{BootId, Error, Fingerprint, LogOptions, OpenOptions, Options, Spec, Store};
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    sync::Arc,
};

/// How the name of such a file ends.
const ENDING: &str = "dlbitmaps";

/// A file of bitmaps, open.
pub(super) struct Sidecar {
    /// `None`: it is only looked at.
    store: Option<Store>,
    /// Keeps it from being changed meanwhile.
    _lock: Option<File>,
    owned: Option<Owned>,
    /// Was it closed in good order? One that was not stays so: only who knows the images can say what it is worth.
    clean: bool,
    /// It was made just now; the path.
    created: Option<PathBuf>,
}

impl Sidecar {
    /// Looks at such a file, and changes nothing.
    pub(super) fn look(path: &Path) -> Result<Shelf> {
        let lock = lock(path, false)?;
        let (at, found) = inspect(path, boot_id(path)?).map_err(|error| told(path, error))?;
        if at != path {
            return Err(prefixed(
                path,
                format_args!("it does not count; its bitmaps are in {}", at.display()),
            ));
        }
        let owned = found.owner.as_deref().and_then(Owned::decode);
        check_owner(path, owned.as_ref())?;
        let outside = changed(owned.as_ref(), found.clean);
        let notes = notes(path, &owned, found.clean, found.damage, outside.as_ref());
        let size = found.bitmaps.iter().map(|found| found.record.length).max().unwrap_or(found.drive_size);
        let seen = found.bitmaps.into_iter().map(|found| {
            let record = found.record;
            let bitmap = Bitmap::new(record.name, found.granularity, record.length);
            let bitmap = bitmap.with_view(found.view).with_recording(record.recording);
            found.bits.iter_dirty().for_each(|range| bitmap.mark_unconditionally(range));
            let trust = distrust(&bitmap, found.verdict.into(), outside.as_ref());
            let (bitmap, durability) = (Arc::new(bitmap), Some(found.durability));
            Seen { bitmap, trust, durability, file: path.to_owned() }
        });
        let seen = seen.collect();
        let home = Sidecar { store: None, _lock: Some(lock), owned, clean: found.clean, created: None };
        Ok(Shelf { path: path.to_owned(), size, seen, notes, home: Home::Sidecar(home) })
    }

    /// Opens such a file to change it.
    pub(super) fn open(path: &Path) -> Result<Shelf> {
        // Whoever it does not belong to should not have opened it, which already counts as a use.
        let before = Self::look(path)?;
        drop(before);
        let opened = Store::open(path, &OpenOptions::new(boot_id(path)?));
        let opened = opened.map_err(|error| told(path, error))?;
        let owned = opened.owner.as_deref().and_then(Owned::decode);
        let outside = changed(owned.as_ref(), opened.clean);
        let notes = notes(path, &owned, opened.clean, opened.damage, outside.as_ref());
        let size = opened.bitmaps.iter().map(|found| found.record.length).max();
        let seen = opened.bitmaps.into_iter().map(|found| {
            let bitmap = Bitmap::new(found.record.name.clone(), found.granularity, found.record.length);
            let bitmap = bitmap.with_view(found.view).found(found.ledger, &found.record, &found.bits);
            let trust = distrust(&bitmap, found.verdict.into(), outside.as_ref());
            let (bitmap, durability) = (Arc::new(bitmap), Some(found.durability));
            Seen { bitmap, trust, durability, file: path.to_owned() }
        });
        let seen = seen.collect();
        // What changed until now is in the bitmaps; what changes from now on is seen by this.
        let owned = match (owned, outside) {
            (Some(owned), Some(Outside { now, .. })) => {
                Some(Owned { images: now.unwrap_or_default(), ..owned })
            }
            (owned, _) => owned,
        };
        let size = size.unwrap_or(opened.drive_size);
        let home =
            Sidecar { store: Some(opened.store), _lock: None, owned, clean: opened.clean, created: None };
        Ok(Shelf { path: path.to_owned(), size, seen, notes, home: Home::Sidecar(home) })
    }

    /// Makes such a file for a drive of `size` bytes, which has the file's name.
    pub(super) fn create(path: &Path, size: u64) -> Result<Shelf> {
        let drive = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        let ends = path.extension().is_some_and(|ending| ending == ENDING);
        if !ends || check_name(drive).is_err() {
            let expected = "expected an image or a file of bitmaps that is there, or DRIVE.dlbitmaps";
            return Err(prefixed(path, format_args!("there is no such file; {expected}")));
        }
        let image = path.with_extension("");
        if image.is_file() {
            let message = format_args!(
                "that is where the bitmaps of {} are while it is in use; expected another name, or the image itself",
                image.display()
            );
            return Err(prefixed(path, message));
        }
        let absolute = std::path::absolute(path).map_err(|error| prefixed(path, error))?;
        let (owner, place) = (Owner::Drive(drive.to_owned()), Place::File(absolute));
        let owned = Owned { owner, place, lost: Vec::new(), images: Fingerprint::default() };
        let options = Options {
            drive_size: size,
            boot_id: boot_id(path)?,
            owner: owned.encode(),
            log: LogOptions::default(),
        };
        let store = Store::create(path, &options).map_err(|error| told(path, error))?;
        let (store, owned, created) = (Some(store), Some(owned), Some(path.to_owned()));
        let home = Sidecar { store, _lock: None, owned, clean: true, created };
        let (seen, notes) = (Vec::new(), Vec::new());
        Ok(Shelf { path: path.to_owned(), size, seen, notes, home: Home::Sidecar(home) })
    }

    /// Whose changes a bitmap of this file records.
    pub(super) fn view(&self) -> View {
        match self.owned.as_ref().map(|owned| &owned.owner) {
            Some(Owner::Node(_)) => View::Node,
            _ => View::Drive,
        }
    }

    /// Keeps a bitmap here.
    pub(super) fn keep(&self, bitmap: &Bitmap, durability: Durability) -> Result<()> {
        let store = self.store.as_ref().ok_or_else(|| "it is only looked at".to_owned())?;
        let (record, granularity, view) = (bitmap.record(), bitmap.granularity(), bitmap.view());
        let ledger = store.add(&Spec { record, granularity, view, durability }).map_err(text)?;
        bitmap.keep_in(ledger).map_err(|error| error.to_string())
    }

    /// Closes it in good order; or leaves it, flushed, as it was left.
    pub(super) fn put_away(self) -> Result<()> {
        let Some(store) = self.store else { return Ok(()) };
        let owner = self.owned.map(|owned| owned.encode());
        let done = match (self.clean, owner) {
            (false, _) => store.flush(),
            (true, None) => store.close_clean(),
            (true, Some(owner)) => store.set_owner(&owner).and_then(|()| store.close_clean()),
        };
        if let (Err(_), Some(path)) = (&done, &self.created) {
            // Half of it is of no use to anybody.
            drop(fs::remove_file(path));
        }
        done.map_err(text)
    }

    /// Gives it back unchanged.
    pub(super) fn leave(self) -> Result<()> {
        let Some(store) = self.store else { return Ok(()) };
        match &self.created {
            Some(path) => {
                drop(store);
                fs::remove_file(path).map_err(|error| error.to_string())
            }
            None if self.clean => store.close_clean().map_err(text),
            None => Ok(()),
        }
    }
}

/// The files of bitmaps in a folder.
pub(super) fn files_in(folder: &Path) -> Vec<PathBuf> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut found: Vec<PathBuf> =
        paths.filter(|path| path.extension().is_some_and(|ending| ending == ENDING)).collect();
    found.sort();
    found
}

/// How somebody else changed the images since the file was closed.
struct Outside {
    reason: String,
    now: Option<Fingerprint>,
}

/// Did somebody change the images of a drive since the file was closed in good order? Of one that was not, only the drive's
/// program knows which images are the drive's.
fn changed(owned: Option<&Owned>, clean: bool) -> Option<Outside> {
    let before = owned.map(|owned| &owned.images).filter(|images| clean && !images.files.is_empty())?;
    let paths: Vec<&Path> = before.files.iter().map(|file| &*file.path).collect();
    match Fingerprint::take(&paths) {
        Ok(now) => {
            let differences = before.differences(&now);
            let reason = differences.join("; ");
            (!differences.is_empty()).then_some(Outside { reason, now: Some(now) })
        }
        Err(error) => Some(Outside {
            reason: format!("its images cannot be looked at: {error}"),
            now: Some(before.clone()),
        }),
    }
}

/// A bitmap of images that somebody else changed is all dirty.
fn distrust(bitmap: &Bitmap, trust: Trust, outside: Option<&Outside>) -> Trust {
    match outside {
        Some(Outside { reason, .. }) => {
            bitmap.mark_unconditionally(0..bitmap.length());
            Trust::AllDirty { reason: reason.clone() }
        }
        None => trust,
    }
}

/// The bitmaps of an image that is in use are the image's.
fn check_owner(path: &Path, owned: Option<&Owned>) -> Result<()> {
    match owned.map(|owned| &owned.place) {
        Some(Place::Image { file, .. }) if beside(file).file_name() == path.file_name() => {
            let image = path.with_extension("");
            let message = format_args!(
                "it has the bitmaps of {}, whose program was killed or runs; expected the image",
                image.display()
            );
            Err(prefixed(path, message))
        }
        _ => Ok(()),
    }
}

fn notes(
    path: &Path,
    owned: &Option<Owned>,
    clean: bool,
    damage: Option<String>,
    outside: Option<&Outside>,
) -> Vec<String> {
    let mut notes = Vec::new();
    if !clean {
        let whose = owned.as_ref().map_or("its drive".to_owned(), |owned| owned.owner.to_string());
        notes.push(format!(
            "the program that used it was killed; when {whose} is served again, its images are looked at, and if \
             somebody else changed them, all is dirty"
        ));
    }
    if let Some(Outside { reason, .. }) = outside {
        notes.push(format!("somebody else changed the images of the drive: {reason}"));
    }
    notes.extend(damage);
    notes.iter().map(|note| prefixed(path, note)).collect()
}

fn boot_id(path: &Path) -> Result<BootId> {
    BootId::current().map_err(|error| prefixed(path, format_args!("reading the boot id: {error}")))
}

/// An error of a store, with what the system said.
fn text(error: Error) -> String {
    match &error {
        Error::Io { source, .. } => format!("{error}: {source}"),
        _ => error.to_string(),
    }
}

fn told(path: &Path, error: Error) -> String {
    match &error {
        Error::Locked { .. } => locked(path),
        _ => text(error),
    }
}

//! At the start: the files of jobs that were interrupted, and what they say.

use super::{
    ENDING, Journals,
    page::{Book, decode},
};
use crate::stores::{self, store_error};
use driveline_bitmap::Bits;
use driveline_graph::{Error, Kind, Result};
use driveline_jobs::{FoundBitmap, FoundJob, JobArgs, JobRecord};
use driveline_store::{Fingerprint, ImageFile, OpenOptions, Opened, Store, Verdict};
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

/// A file of a job that belongs to this graph.
#[derive(Debug)]
pub(super) struct Candidate {
    pub(super) path: PathBuf,
    /// Its record, or why it cannot be read.
    pub(super) record: Result<JobRecord>,
}

impl Journals {
    /// The files of jobs that worked on images of the graph, in the order of their names. Nothing is opened or changed.
    pub(super) fn candidates(&self) -> Vec<Candidate> {
        let images = stores::all_files(&self.graph);
        let mut directories: BTreeSet<PathBuf> =
            images.iter().filter_map(|file| Some(file.parent()?.to_owned())).collect();
        if let Some(stores) = self.stores.upgrade() {
            let drives = self.graph.drives();
            let paths = drives.iter().filter_map(|drive| stores.path_of(&drive.name));
            directories.extend(paths.filter_map(|path| Some(path.parent()?.to_owned())));
        }
        let entries = directories.iter().filter_map(|directory| fs::read_dir(directory).ok()).flatten();
        let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        let mut paths: Vec<PathBuf> =
            paths.filter(|path| path.extension().is_some_and(|ending| ending == ENDING)).collect();
        paths.sort();
        let candidate = |path: PathBuf| {
            let record = read(&path);
            let ours = match &record {
                Ok(record) => self.is_ours(record, &images),
                // Its name says whose it is.
                Err(_) => images.iter().any(|image| is_beside(&path, image)),
            };
            ours.then_some(Candidate { path, record })
        };
        paths.into_iter().filter_map(candidate).collect()
    }

    /// A job is this graph's if the image that it copies from is part of it; or what a drive shows is what it copied to: then
    /// the target has taken its place. Other graphs may have an image below in common with this one.
    fn is_ours(&self, record: &JobRecord, images: &[PathBuf]) -> bool {
        let has_source = match &record.source.file {
            Some(file) => images.contains(file),
            None => self.graph.node(&record.source.node).is_ok(),
        };
        let target = record.target.as_ref().and_then(|target| target.file.as_ref());
        let shows = |drive: driveline_graph::DriveView| stores::file_of(&self.graph, &drive.format);
        let moves = matches!(record.args, JobArgs::Mirror(_) | JobArgs::Commit(_));
        let is_shown = || {
            target.is_some() && self.graph.drives().into_iter().any(|drive| shows(drive).as_ref() == target)
        };
        has_source || moves && is_shown()
    }

    /// Opens the file of a job, and tells what is known. One that was missed before does not know what guests wrote meanwhile.
    ///
    /// Errors: another program has it, or it cannot be read; it stays as it is.
    pub(super) fn open(&self, path: &Path) -> Result<FoundJob> {
        let opened = Store::open(path, &OpenOptions::new(self.boot_id)).map_err(store_error)?;
        let Opened { store, bitmaps, owner, heartbeat, same_boot, damage, .. } = opened;
        let owner = owner.ok_or_else(|| Error::new(Kind::Corrupt, "its record is lost"))?;
        let (mut record, known) = decode(&owner)?;
        record.unwatched |= self.missed.lock().contains(path);
        let verdict = |verdict: &Verdict| match verdict {
            Verdict::AllDirty { reason } => Some(reason.clone()),
            _ => None,
        };
        let powered_off = (!same_boot).then(|| "the machine went down".to_owned());
        let now = self.files_of(&record);
        let outside = stores::changes_outside(&known, &now, same_boot, heartbeat);
        let unwatched = record.unwatched.then(|| "guests may have written while it did not go on".to_owned());
        let lost = damage.or(powered_off).or(unwatched);
        let lost = lost.or_else(|| bitmaps.iter().find_map(|found| verdict(&found.verdict)));
        let lost = lost.or_else(|| (!outside.is_empty()).then(|| outside.join("; ")));
        let target = record.target.as_ref().and_then(|target| target.file.clone());
        let only_target = |mut files: Fingerprint| {
            files.files.retain(|file| Some(&file.path) == target.as_ref());
            files
        };
        let (target_known, target_now) = (only_target(known.clone()), only_target(now));
        let is_foreign =
            !stores::changes_outside(&target_known, &target_now, same_boot, heartbeat).is_empty();
        record.foreign_target |= is_foreign && matches!(record.args, JobArgs::Mirror(_));
        let bitmaps = bitmaps.into_iter().map(|found| FoundBitmap {
            ledger: found.ledger,
            record: found.record,
            granularity: found.granularity,
            bits: found.bits,
        });
        let bitmaps = bitmaps.collect();
        let since = self.since(&record);
        let book = Book::of(store, known);
        self.books.lock().push(Arc::downgrade(&book));
        Ok(FoundJob { record, page: book, bitmaps, since, lost })
    }

    /// A file cannot be opened, and its images are there: see [`Journals::missed`].
    pub(super) fn miss(&self, path: &Path) {
        self.missed.lock().insert(path.to_owned());
    }

    /// What guests wrote since the bitmap of a backup was frozen.
    fn since(&self, record: &JobRecord) -> Option<Bits> {
        let JobArgs::Backup(args) = &record.args else { return None };
        let stores = self.stores.upgrade()?;
        let name = args.bitmap.as_deref()?;
        stores.since(&args.device, name).or_else(|| stores.since(&self.graph.drive_of(&args.device)?, name))
    }

    /// The images that a job works on: those of its drive or node as they were before this program wrote to them, and its
    /// target as it is.
    pub(super) fn files_of(&self, record: &JobRecord) -> Fingerprint {
        let mut of = stores::files_at_open(&self.graph, record.args.device());
        let target = record.target.as_ref().and_then(|target| target.file.as_ref());
        if let Some(target) = target.filter(|target| of.files.iter().all(|file| file.path != **target))
            && let Ok(found) = fs::metadata(target)
        {
            of.files.push(ImageFile::of(target, &found));
        }
        of
    }
}

/// Reads the record of a job, whoever has it.
pub(super) fn read(path: &Path) -> Result<JobRecord> {
    let owner = Store::owner_of(path).map_err(store_error)?;
    let owner = owner.ok_or_else(|| Error::new(Kind::Corrupt, "its record is lost"))?;
    decode(&owner).map(|(record, _)| record)
}

fn is_beside(path: &Path, image: &Path) -> bool {
    let name =
        |path: &Path| path.file_name().map(|name| name.as_encoded_bytes().to_vec()).unwrap_or_default();
    let (own, image_name) = (name(path), name(image));
    path.parent() == image.parent()
        && own.strip_prefix(image_name.as_slice()).is_some_and(|rest| rest.starts_with(b"."))
}

/// Does a file hold nothing but zeroes? The first thing that is written to one of a job is its header.
pub(super) fn is_blank(path: &Path) -> bool {
    fs::read(path).is_ok_and(|bytes| bytes.iter().all(|byte| *byte == 0))
}

/// The id that the name of a file says.
pub(super) fn id_of(path: &Path) -> String {
    path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default()
}

//! The files that bitmaps are in: which of them there are, and whether the images are still those that they speak of.

use super::{
    Kept, Owner, Stores,
    owner::Owned,
    place::{self, Place},
    save::remove,
    store_error,
};
use driveline_graph::{Error, Kind, NodeView, Result};
use driveline_store::{Fingerprint, ImageFile, OpenOptions, Opened, Store};
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

/// How much later than the last sign of life of its process an image may have been changed, and still count as changed by
/// that process: signs come every second.
const HEARTBEAT_SLACK: Duration = Duration::from_secs(3);

/// The same if the machine went down: the last sign that reached the disk may be as old as the kernel lets dirty pages become.
/// Source: Linux, Documentation/admin-guide/sysctl/vm.rst, `dirty_expire_centisecs` (30 s) and `dirty_writeback_centisecs` (5 s).
const HEARTBEAT_SLACK_POWER: Duration = Duration::from_secs(40);

impl Stores {
    /// Opens all files with bitmaps of a drive or image, wherever the end of the program left them: first the one where they
    /// belong.
    ///
    /// Returns why, if there was one and not even names can be told from it.
    pub(super) fn open_stores(&self, kept: &Kept, place: &Place) -> Result<(Vec<Opened>, Option<String>)> {
        let (mut stores, mut gone): (Vec<Opened>, _) = (Vec::new(), None);
        let options = OpenOptions::new(self.boot_id);
        let path = place.store_path();
        let mut candidates = vec![path.clone()];
        candidates.extend(self.strays(&kept.owner, &path));
        let fixed = kept.inner.lock().fixed;
        self.refuse_somebody_elses(kept, &path)?;
        for candidate in candidates {
            if !candidate.exists() || stores.iter().any(|opened| opened.store.path() == candidate) {
                continue;
            }
            match Store::open(&candidate, &options) {
                Ok(opened) => stores.push(opened),
                // It moved on to another file, or never came to count. The one that counts is named.
                Err(driveline_store::Error::Superseded { by_path: other, .. })
                | Err(driveline_store::Error::Incoming { from_path: other, .. })
                    if other.exists() =>
                {
                    if !stores.iter().any(|opened| opened.store.path() == other) {
                        stores.push(Store::open(&other, &options).map_err(store_error)?);
                    }
                    remove(&candidate)?;
                }
                // In a place that somebody named, a file of another kind is nobody's to touch.
                Err(error) if is_past_use(&error) || !fixed && is_foreign(&error) => {
                    let aside = candidate.with_extension("dlbitmaps.damaged");
                    tracing::error!("{error}; it is kept as {}", aside.display());
                    gone = Some(error.to_string());
                    fs::rename(&candidate, &aside).map_err(|error| {
                        let doing = format_args!("renaming {}", candidate.display());
                        Error::io(error.raw_os_error().unwrap_or(5), doing)
                    })?;
                }
                Err(error) => return Err(store_error(error)),
            }
        }
        Ok((stores, gone))
    }

    /// Two drives of one name have their bitmaps in one place, unless the configuration says another: the second one must not
    /// take what the first one left.
    fn refuse_somebody_elses(&self, kept: &Kept, path: &Path) -> Result<()> {
        let Some(owned) = owned_by(path) else { return Ok(()) };
        let now = place::files_at_open(&self.graph, kept.owner.name());
        let same =
            |a: &ImageFile, b: &ImageFile| a.path == b.path || (a.device, a.inode) == (b.device, b.inode);
        let without = |of: &Fingerprint, others: &Fingerprint| -> Vec<ImageFile> {
            let alone = |file: &&ImageFile| others.files.iter().all(|other| !same(file, other));
            of.files.iter().filter(alone).cloned().collect()
        };
        // A drive loses images to jobs, or gets others put on top. Who has lost one that is still there *and* got another is
        // somebody else, though both may stand on one image.
        let lost = without(&owned.images, &now).into_iter().find(|file| file.path.exists());
        match lost {
            Some(other) if !without(&now, &owned.images).is_empty() => {
                let (name, of) = (kept.owner.name(), other.path.display());
                let message = format_args!(
                    "{} has the bitmaps of {} in {of}; expected another place for this one's: bitmap-store = \
                     \"file:PATH\" in [drive.{name}]",
                    path.display(),
                    owned.owner
                );
                Err(Error::new(Kind::Exists, message))
            }
            _ => Ok(()),
        }
    }

    /// Is it certain that nobody else wrote to the image since this program had its bitmaps in a file beside it? `None`:
    /// it is no image, or not part of the graph any more.
    fn witnessed(&self, place: &Place) -> Option<bool> {
        let Place::Image { file, .. } = place else { return None };
        let views = self.graph.nodes();
        let of_file = |view: &&NodeView| {
            view.node.open_node().witness().is_some()
                && place::file_of(&self.graph, view.node.name()).as_ref() == Some(file)
        };
        views.iter().find(of_file)?.node.open_node().witness().map(|witness| witness.at_open)
    }

    /// Files that hold bitmaps of the same drive or image, but not where they belong: the program ended between a change of
    /// the graph and the move of its bitmaps.
    ///
    /// Other drives may have the same name, in other files. This one's show the same image on top, or were kept beside an
    /// image that is part of it.
    fn strays(&self, owner: &Owner, belongs: &Path) -> Vec<PathBuf> {
        let files = place::files_below(&self.graph, owner.name());
        let chain = self.graph.chain(owner.name()).unwrap_or_default();
        let top = chain.first().and_then(|node| place::file_of(&self.graph, node.name()));
        let mut directories: BTreeSet<&Path> = files.iter().filter_map(|file| file.parent()).collect();
        directories.extend(belongs.parent());
        let entries = directories.into_iter().filter_map(|directory| fs::read_dir(directory).ok()).flatten();
        let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        let is_ours = |path: &PathBuf| {
            owned_by(path).is_some_and(|owned| {
                let shows_top = owned.images.files.iter().any(|image| Some(&image.path) == top.as_ref());
                let is_part = matches!(&owned.place, Place::Image { file, .. } if files.contains(file));
                owned.owner == *owner && (shows_top || is_part)
            })
        };
        let ending = |path: &PathBuf| path.extension().is_some_and(|ending| ending == "dlbitmaps");
        let mut strays: Vec<PathBuf> =
            paths.filter(|path| ending(path) && path != belongs).filter(is_ours).collect();
        strays.sort();
        strays
    }

    /// Why the images of a drive count as changed by somebody else since its bitmaps were kept up.
    pub(super) fn changed_outside(
        &self,
        target: &str,
        owned: Option<&Owned>,
        clean: bool,
        same_boot: bool,
        heartbeat: Option<SystemTime>,
    ) -> Option<String> {
        let witnessed = owned.and_then(|owned| self.witnessed(&owned.place));
        if witnessed == Some(false) {
            return Some("its image was opened for writing by another program meanwhile".to_owned());
        }
        let now = place::files_at_open(&self.graph, target);
        // A file that a tool made knows no images yet.
        let known = owned.map(|owned| &owned.images).filter(|images| !images.files.is_empty());
        let differences = match (clean, known) {
            // They were put away, but could not be brought into the image: its witness says all.
            (true, _) if witnessed.is_some() => Vec::new(),
            (true, known) => known.map(|known| known.differences(&now)).unwrap_or_default(),
            (false, known) => {
                let none = Fingerprint { files: now.files.clone() };
                changes_outside(known.unwrap_or(&none), &now, same_boot, heartbeat)
            }
        };
        (!differences.is_empty()).then(|| differences.join("; "))
    }
}

/// What shows that files were changed by somebody else than the process that `known` them and was last known to live at
/// `heartbeat`, each in words.
pub(crate) fn changes_outside(
    known: &Fingerprint,
    now: &Fingerprint,
    same_boot: bool,
    heartbeat: Option<SystemTime>,
) -> Vec<String> {
    let slack = if same_boot { HEARTBEAT_SLACK } else { HEARTBEAT_SLACK_POWER };
    let mut differences = strangers(known, now);
    differences.extend(heartbeat.iter().flat_map(|last| now.changed_after(*last + slack)));
    differences
}

/// Files that are not those that the bitmaps knew when they were last in use, each in words. Such a file may have grown and
/// changed since, and others may have gone.
fn strangers(known: &Fingerprint, now: &Fingerprint) -> Vec<String> {
    let why = |file: &ImageFile| {
        let name = file.path.display();
        let Some(before) = known.files.iter().find(|before| before.path == file.path) else {
            return Some(format!("{name} was no image of the drive when the bitmaps were last in use"));
        };
        if (before.device, before.inode) != (file.device, file.inode) {
            return Some(format!("{name} is another file than it was"));
        }
        (file.mtime_ns < before.mtime_ns).then(|| format!("{name} is older than it was"))
    };
    now.files.iter().filter_map(why).collect()
}

/// What a store says of itself.
fn owned_by(path: &Path) -> Option<Owned> {
    Owned::decode(Store::owner_of(path).ok()??.as_slice())
}

fn is_foreign(error: &driveline_store::Error) -> bool {
    matches!(error, driveline_store::Error::Foreign { .. })
}

/// Was it a store, of which not even the names of bitmaps are left, or the file is gone that counts in its place? Another
/// file is nobody's to touch.
pub(super) fn is_past_use(error: &driveline_store::Error) -> bool {
    use driveline_store::Error;
    match error {
        Error::NamesLost { .. } | Error::Superseded { .. } | Error::Incoming { .. } => true,
        // Cut off to nothing, or overwritten by zeroes.
        Error::Foreign { path, .. } => fs::read(path).is_ok_and(|bytes| bytes.iter().all(|byte| *byte == 0)),
        _ => false,
    }
}

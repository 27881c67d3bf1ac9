//! A shelf: a file in which bitmaps lie between two runs of the program.
//!
//! ```text
//!   look                 nothing is written, nobody may change the file meanwhile
//!   open ─▶ put_away     the file has what was changed, durably; the bitmaps that a killed program left elsewhere, too
//!        └▶ leave        the file is as it was
//! ```

use super::{
    Result,
    image::Image,
    sidecar::{self, Sidecar},
};
use crate::stores::{Seen, Trust, beside};
use driveline_bitmap::{Bitmap, BitmapName, Durability, Granularity, Operation};
use driveline_drivers::Bytes;
use std::{
    fmt,
    fs::{self, File, TryLockError},
    io::Read,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Between the bitmaps of a file and what is done with them.
pub(super) struct Shelf {
    /// The file, as it was given.
    pub(super) path: PathBuf,
    /// Bytes of the drive.
    pub(super) size: u64,
    /// Its bitmaps, in the file's order.
    pub(super) seen: Vec<Seen>,
    /// What else its user should know, in sentences.
    pub(super) notes: Vec<String>,
    pub(super) home: Home,
}

/// What kind of file it is.
pub(super) enum Home {
    Image(Image),
    Sidecar(Sidecar),
}

/// What the first bytes of a file say that it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Magic {
    Qcow2,
    Store,
}

impl Shelf {
    /// Looks at the bitmaps of a file.
    ///
    /// Errors: it is none that has any; somebody uses it.
    pub(super) async fn look(path: &Path) -> Result<Self> {
        match recognise(path)? {
            Magic::Qcow2 => Image::open(path, false).await,
            Magic::Store => Sidecar::look(path),
        }
    }

    /// Takes the bitmaps of a file to change them. An image stays as it is until [`put_away`](Shelf::put_away); a file of bitmaps
    /// follows each change, as it does under a daemon.
    ///
    /// Errors: as [`look`](Shelf::look), and it cannot be written.
    pub(super) async fn open(path: &Path) -> Result<Self> {
        match recognise(path)? {
            Magic::Qcow2 => Image::open(path, true).await,
            Magic::Store => Sidecar::open(path),
        }
    }

    /// The same, of a file that is made if it is not there, for a drive of `size` bytes.
    ///
    /// Errors: it is not there, and its name is none of a file of bitmaps.
    pub(super) async fn open_or_create(path: &Path, size: u64) -> Result<Self> {
        match path.exists() {
            true => Self::open(path).await,
            false => Sidecar::create(path, size),
        }
    }

    /// The bitmap of this name.
    pub(super) fn find(&self, name: &str) -> Result<&Seen> {
        self.seen.iter().find(|seen| seen.bitmap.name() == *name).ok_or_else(|| {
            let names: Vec<String> = self.seen.iter().map(|seen| seen.bitmap.name().to_string()).collect();
            let nearest = driveline_graph::nearest(name, names.iter().map(String::as_str));
            let expected = match (nearest, &names[..]) {
                (Some(nearest), _) => format!("did you mean '{nearest}'?"),
                (None, []) => "it has no bitmaps".to_owned(),
                (None, names) => format!("expected one of '{}'", names.join("', '")),
            };
            self.error(format_args!("there is no bitmap '{name}'; {expected}"))
        })
    }

    /// The bitmap of this name, with contents that can be used.
    pub(super) fn valid(&self, name: &str) -> Result<Arc<Bitmap>> {
        let seen = self.find(name)?;
        match &seen.trust {
            Trust::Lost { reason } => Err(self.error(format_args!(
                "the contents of bitmap '{name}' are lost: {reason}; adopt it as all dirty, or remove it"
            ))),
            _ => Ok(seen.bitmap.clone()),
        }
    }

    /// From now on the contents of a bitmap are to be trusted so far.
    pub(super) fn trust(&mut self, name: &str, trust: &Trust) {
        for seen in self.seen.iter_mut().filter(|seen| seen.bitmap.name() == *name) {
            seen.trust = trust.clone();
        }
    }

    /// Which bitmaps were found all dirty, and why, in sentences.
    pub(super) fn doubts(&self) -> Vec<String> {
        let doubt = |seen: &Seen| match &seen.trust {
            Trust::AllDirty { reason } => Some(
                self.error(format_args!("bitmap '{}' was found all dirty: {reason}", seen.bitmap.name())),
            ),
            _ => None,
        };
        self.seen.iter().filter_map(doubt).collect()
    }

    /// Can a bitmap here say what it survives?
    pub(super) fn keeps_durability(&self) -> bool {
        matches!(self.home, Home::Sidecar(_))
    }

    /// A bitmap of a drive of another size has no place here.
    pub(super) fn wrong_size(&self, bitmap: &Bitmap) -> String {
        let (name, found, expected) = (bitmap.name(), Bytes(bitmap.length()), Bytes(self.size));
        self.error(format_args!("bitmap '{name}' is of a drive of {found}, expected {expected}"))
    }

    /// Adds a bitmap, which nothing keeps yet.
    ///
    /// Errors: its name is taken, or it does not fit the file.
    pub(super) fn add(&mut self, bitmap: Bitmap, durability: Option<Durability>) -> Result<()> {
        let name = bitmap.name();
        if self.seen.iter().any(|seen| seen.bitmap.name() == name) {
            let taken = driveline_bitmap::Error::NameTaken { name: name.to_string() };
            return Err(self.error(taken));
        }
        let durability = match (&self.home, durability) {
            (Home::Image(_), Some(_)) => {
                return Err(
                    self.error("an image does not say what a bitmap survives; expected no --durability")
                );
            }
            (Home::Image(_), None) => None,
            (Home::Sidecar(sidecar), durability) => {
                let durability = durability.unwrap_or_default();
                sidecar.keep(&bitmap, durability).map_err(|error| self.error(error))?;
                Some(durability)
            }
        };
        let (bitmap, file) = (Arc::new(bitmap), self.path.clone());
        self.seen.push(Seen { bitmap, trust: Trust::Exact, durability, file });
        Ok(())
    }

    /// A clean bitmap for this drive.
    pub(super) fn new_bitmap(&self, name: &str, granularity: Option<Granularity>) -> Result<Bitmap> {
        let name = BitmapName::new(name).map_err(|error| self.error(error))?;
        let granularity = granularity.unwrap_or_else(|| match &self.home {
            Home::Image(image) => image.granularity(),
            Home::Sidecar(_) => Granularity::default(),
        });
        let view = match &self.home {
            Home::Image(_) => driveline_bitmap::View::default(),
            Home::Sidecar(sidecar) => sidecar.view(),
        };
        Ok(Bitmap::new(name, granularity, self.size).with_view(view))
    }

    /// Removes a bitmap, whatever its contents are; also an entry of an image that is none.
    pub(super) fn remove(&mut self, name: &str) -> Result<()> {
        if let Home::Image(image) = &mut self.home
            && self.seen.iter().all(|seen| seen.bitmap.name() != *name)
            && image.forget_broken(name)
        {
            return Ok(());
        }
        let bitmap = self.find(name)?.bitmap.clone();
        bitmap.check(Operation::Remove).and_then(|()| bitmap.forget()).map_err(|error| self.error(error))?;
        self.seen.retain(|seen| seen.bitmap.id() != bitmap.id());
        Ok(())
    }

    /// Brings what was changed to stable storage, and gives the file back.
    ///
    /// Errors: an image is as it was then.
    pub(super) async fn put_away(self) -> Result<Shown> {
        let kind = self.home.kind();
        let Shelf { path, size, mut seen, mut notes, home } = self;
        let done = match home {
            Home::Image(image) => image.put_away(&path, &mut seen, &mut notes).await,
            Home::Sidecar(sidecar) => sidecar.put_away(),
        };
        done.map_err(|error| prefixed(&path, error))?;
        Ok(Shown { path, kind, size, seen, notes })
    }

    /// Gives the file back as it is.
    pub(super) async fn leave(self) -> Result<Shown> {
        let kind = self.home.kind();
        let Shelf { path, size, seen, notes, home } = self;
        let left = match home {
            Home::Image(image) => image.leave().await,
            Home::Sidecar(sidecar) => sidecar.leave(),
        };
        left.map_err(|error| prefixed(&path, error))?;
        Ok(Shown { path, kind, size, seen, notes })
    }

    /// Gives the file back as it is, after something was looked up in it.
    pub(super) async fn leave_with<T>(self, work: impl FnOnce(&Self) -> Result<T>) -> Result<(Shown, T)> {
        let found = work(&self);
        let shown = self.leave().await?;
        Ok((shown, found?))
    }

    /// An error, with the file.
    pub(super) fn error(&self, message: impl fmt::Display) -> String {
        prefixed(&self.path, message)
    }
}

impl Home {
    fn kind(&self) -> &'static str {
        match self {
            Home::Image(_) => "qcow2",
            Home::Sidecar(_) => "dlbitmaps",
        }
    }
}

/// What there is to show of a file once it was given back.
pub(super) struct Shown {
    pub(super) path: PathBuf,
    /// Its kind, in a word.
    pub(super) kind: &'static str,
    pub(super) size: u64,
    pub(super) seen: Vec<Seen>,
    pub(super) notes: Vec<String>,
}

/// Are these two paths the same file?
pub(super) fn same_file(one: &Path, other: &Path) -> bool {
    one == other
        || fs::canonicalize(one).is_ok_and(|one| fs::canonicalize(other).is_ok_and(|other| one == other))
}

/// An error with its file.
pub(super) fn prefixed(path: &Path, message: impl fmt::Display) -> String {
    format!("{}: {message}", path.display())
}

/// Keeps others from a file of bitmaps: from changing it, or from everything.
///
/// Errors: somebody has it.
pub(super) fn lock(path: &Path, alone: bool) -> Result<File> {
    let file = File::open(path).map_err(|error| prefixed(path, error))?;
    match if alone { file.try_lock() } else { file.try_lock_shared() } {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(locked(path)),
        Err(TryLockError::Error(error)) => Err(prefixed(path, error)),
    }
}

/// Somebody has the file: who, as `found` says.
pub(super) fn in_use(found: impl fmt::Display) -> String {
    format!("{found}; expected a file that no daemon and no QEMU uses (one that runs is asked by QMP)")
}

/// Another process has a file of bitmaps.
pub(super) fn locked(path: &Path) -> String {
    in_use(prefixed(path, "it is in use: another process has locked it"))
}

/// What a file is.
///
/// Errors: it cannot be read; it is none that has bitmaps, with those beside it that might have been meant.
fn recognise(path: &Path) -> Result<Magic> {
    let mut start = Vec::new();
    let read = File::open(path).and_then(|file| file.take(8).read_to_end(&mut start));
    read.map_err(|error| prefixed(path, error))?;
    match &start[..] {
        start if start.starts_with(b"QFI\xfb") => Ok(Magic::Qcow2),
        b"DRVLSTOR" => Ok(Magic::Store),
        _ => {
            let beside = sidecar::files_in(path.parent().unwrap_or(Path::new("")));
            let own = beside_if_there(path);
            let hint = match (own, &beside[..]) {
                (Some(own), _) => format!("; did you mean {}?", own.display()),
                (None, []) => String::new(),
                (None, found) => {
                    let found: Vec<String> = found.iter().map(|path| path.display().to_string()).collect();
                    format!(
                        "; bitmaps of a drive of another format are in a file beside it: {}",
                        found.join(", ")
                    )
                }
            };
            let expected = "neither a qcow2 image nor a file of bitmaps";
            Err(prefixed(path, format_args!("it is {expected}{hint}")))
        }
    }
}

fn beside_if_there(path: &Path) -> Option<PathBuf> {
    Some(beside(path)).filter(|beside| beside.exists())
}

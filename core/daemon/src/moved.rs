//! A drive that went on with another image, remembered beside the one that it left.
//!
//! A mirror's pivot, the commit of a top image and a snapshot lead a drive to another image, and its configuration does not
//! know. Started again as it was, the drive would show what it held before: it would go back in time without a word. So a
//! file beside the image says what happened, from before the first request goes to the other image on:
//!
//! ```text
//!   active.qcow2 ◀─ vda       copy.qcow2 ◀─ vda
//!                             active.qcow2.vda.dlmoved   drive = "vda", image = "/…/copy.qcow2"
//! ```
//!
//! Whoever starts that drive on that image, or applies a file that does, is refused. The file goes when the drive comes back to
//! the image while the program runs, or by its user's hand. It also tells of an image that was made without a backing, which is not
//! given one by a file that was changed by half.

mod advice;

pub(crate) use advice::{Advice, Image, Lead, Relation};

use crate::{config::Config, stores::file_in};
use driveline_graph::{DriveView, Error, Kind, Layout, Result, Role};
use parking_lot::Mutex;
use std::{
    collections::BTreeSet,
    fs,
    io::{self, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

/// How the files end.
const ENDING: &str = "dlmoved";

impl Relation {
    const ALL: [(&str, Self); 3] = [("copy", Self::Copy), ("below", Self::Below), ("above", Self::Above)];

    fn word(self) -> &'static str {
        Self::ALL.iter().find(|(_, of)| *of == self).map(|(word, _)| *word).unwrap_or_default()
    }
}

/// What is remembered.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Moved {
    /// Where that is.
    mark: PathBuf,
    /// The image that the drive went on with.
    image: PathBuf,
    relation: Relation,
    /// What that is, if it was noted.
    is: Option<Image>,
}

/// Drives that are led by a file: who changed that knows.
#[derive(Debug, Default)]
pub(crate) struct ByFile(Mutex<BTreeSet<String>>);

impl ByFile {
    /// These drives are led elsewhere because a file says so, until what is returned is dropped.
    pub(crate) fn lead<'a>(&'a self, drives: impl Iterator<Item = &'a str>) -> Led<'a> {
        self.0.lock().extend(drives.map(str::to_owned));
        Led(self)
    }
}

/// Until it is dropped, moves of these drives are their file's.
pub(crate) struct Led<'a>(&'a ByFile);

impl Drop for Led<'_> {
    fn drop(&mut self) {
        self.0.0.lock().clear();
    }
}

/// Remembers that drives are about to show other images. Nothing keeps them from it: what cannot be remembered is logged.
pub(crate) fn remember(before: &Layout, after: &Layout, by_file: &ByFile) {
    for now in after.drives() {
        let Some(was) = before.drives().into_iter().find(|drive| drive.name == now.name) else { continue };
        let (Some(old), Some(new)) = (file_in(before, &was.format), file_in(after, &now.format)) else {
            continue;
        };
        if old == new || !old.is_file() {
            continue;
        }
        if by_file.0.lock().contains(&*now.name) {
            continue;
        }
        let relation = relation(before, after, &was, &now);
        let is = image_of(after, &now.format, &new);
        let written = write(&old, &now.name, &new, relation, &is).and_then(|()| forget(&new, &now.name));
        match written {
            Ok(()) => {
                tracing::info!("drive '{}' goes on with {} after {}", now.name, new.display(), old.display())
            }
            Err(error) => tracing::error!(
                "drive '{}' goes on with {}, which cannot be remembered beside {}: {error}; change its file before the next \
                 start, else it goes back to what it was",
                now.name,
                new.display(),
                old.display()
            ),
        }
    }
}

/// What an image is, by its node.
fn image_of(layout: &Layout, node: &str, file: &Path) -> Image {
    let driver = |node: &str| layout.node(node).map(|node| node.driver_name().to_owned()).unwrap_or_default();
    let below = layout.chain(node).ok().and_then(|chain| Some(chain.get(1)?.name().to_owned()));
    let below = below.and_then(|below| Some((driver(&below), file_in(layout, &below)?)));
    let text = |path: &Path| path.to_string_lossy().into_owned();
    Image {
        driver: driver(node),
        file: text(file),
        backing: below.map(|(driver, file)| (driver, text(&file))),
    }
}

/// What names the image of a drive: its root, or the lowest filter before it.
fn lead_of(layout: &Layout, drive: &DriveView) -> Lead {
    let (mut lead, mut at) = (Lead::Root, drive.root.to_string());
    while at != *drive.format
        && let Ok(view) = layout.view_node(&at)
        && let Some(child) = view.children.iter().find(|child| child.role == Role::Filtered)
    {
        if !view.implicit {
            lead = Lead::Filter(at, child.name.clone());
        }
        at = child.node.to_string();
    }
    lead
}

fn relation(before: &Layout, after: &Layout, was: &DriveView, now: &DriveView) -> Relation {
    let is_in = |layout: &Layout, chain: &str, node: &str| {
        layout.chain(chain).is_ok_and(|chain| chain.iter().any(|image| image.name() == node))
    };
    match (is_in(before, &was.format, &now.format), is_in(after, &now.format, &was.format)) {
        (true, _) => Relation::Below,
        (_, true) => Relation::Above,
        _ => Relation::Copy,
    }
}

/// Refuses a configuration whose drives are to be served from images that they have left.
///
/// Errors: of the first of them, at the node of its image.
pub(crate) fn refuse(config: &Config, layout: &Layout) -> Result<()> {
    for drive in layout.drives() {
        if !config.drives.iter().any(|section| *section.name.get_ref() == *drive.name) {
            continue;
        }
        let Some(image) = file_in(layout, &drive.format) else { continue };
        refuse_backing(config, layout, &drive, &image)?;
        let moved = read(&image, &drive.name);
        let moved = moved.map_err(|error| Error::new(Kind::Corrupt, error).at(&drive.format))?;
        if let Some(moved) = moved {
            let text = refusal(config, layout, &drive, &image, &moved);
            let is_file = layout.node(&drive.format)?.open_node().filename().is_some();
            let key = if is_file { "path" } else { "file" };
            return Err(Error::new(Kind::Invalid, text).at(&drive.format).key(key));
        }
    }
    Ok(())
}

/// Refuses a backing of an image that was made without one: what the drive never had would show where the image holds nothing. That the
/// image names none is not enough to know, since people make images on top of others so; that a drive went to it as such is.
fn refuse_backing(config: &Config, layout: &Layout, drive: &DriveView, image: &Path) -> Result<()> {
    let chain = layout.chain(&drive.format)?;
    let (Some(top), Some(below)) = (chain.first(), chain.get(1)) else { return Ok(()) };
    if top.open_node().backing_file().is_some() {
        return Ok(());
    }
    let files = layout.nodes().into_iter().filter_map(|view| view.node.open_node().filename());
    let files = files.map(|file| std::path::absolute(&file).unwrap_or(file));
    let directories: BTreeSet<PathBuf> = files.filter_map(|file| Some(file.parent()?.to_owned())).collect();
    let suffix = format!(".{}.{ENDING}", drive.name);
    let entries = directories.iter().filter_map(|directory| fs::read_dir(directory).ok()).flatten().flatten();
    let left = entries.filter_map(|entry| Some(PathBuf::from(entry.path().to_str()?.strip_suffix(&suffix)?)));
    let alone = |moved: &Moved| {
        moved.image == image && moved.is.as_ref().is_some_and(|image| image.backing.is_none())
    };
    let found = left.filter_map(|left| read(&left, &drive.name).ok().flatten()).find(alone);
    let Some(Moved { mark, .. }) = found else { return Ok(()) };
    let short = |path: &Path| path.strip_prefix(&config.directory).unwrap_or(path).display().to_string();
    let text = format_args!(
        "drive '{}' went on with {}, which has no backing and names none: with '{}' below it, the drive would show data that is not \
         its own; write backing = false; if it is to be so, remove {}",
        drive.name,
        short(image),
        below.name(),
        short(&mark)
    );
    Err(Error::new(Kind::Invalid, text).at(&drive.format).key("backing"))
}

/// Why a drive is not started, and what to do. Paths below the configuration's directory are said as it says them.
fn refusal(config: &Config, layout: &Layout, drive: &DriveView, image: &Path, moved: &Moved) -> String {
    let short =
        |path: &Path| path.strip_prefix(&config.directory).unwrap_or(path).to_string_lossy().into_owned();
    let names = layout.nodes().into_iter().map(|view| view.node.name().to_owned());
    let names: Vec<String> = names.filter(|name| !name.starts_with('#')).collect();
    let is_image = |name: &str| layout.chain(name).is_ok_and(|chain| chain[0].name() == name);
    let node_of = |file: &Path| {
        names.iter().find(|name| is_image(name) && file_in(layout, name).as_deref() == Some(file))
    };
    // One that was remembered before all was: what can be told of it is its name.
    let is = moved.is.clone().unwrap_or_else(|| Image {
        driver: layout.node(&drive.format).map(|node| node.driver_name().to_owned()).unwrap_or_default(),
        file: moved.image.to_string_lossy().into_owned(),
        backing: None,
    });
    let backing_known = is.backing.as_ref().and_then(|(_, file)| node_of(Path::new(file)));
    let is = Image {
        file: short(Path::new(&is.file)),
        backing: is.backing.as_ref().map(|(driver, file)| (driver.clone(), short(Path::new(file)))),
        ..is
    };
    let advice = Advice {
        drive: &drive.name,
        lead: &lead_of(layout, drive),
        old: &drive.format,
        relation: moved.relation,
        image: &is,
        known: node_of(&moved.image).map(String::as_str),
        backing_known: backing_known.map(String::as_str),
    };
    let (image, other, mark) = (short(image), short(&moved.image), short(&moved.mark));
    format!(
        "drive '{}' went on with {other}; {image} is what it held before, and it would go back in time: {advice}; to go back on \
         purpose, remove {mark}",
        drive.name
    )
}

fn mark_of(image: &Path, drive: &str) -> PathBuf {
    let mut name = image.as_os_str().to_owned();
    name.push(format!(".{drive}.{ENDING}"));
    name.into()
}

fn write(image: &Path, drive: &str, other: &Path, relation: Relation, is: &Image) -> io::Result<()> {
    let identity = identity(image)?;
    let mut table = toml::Table::new();
    table.insert("drive".into(), drive.into());
    table.insert("of".into(), identity.into());
    table.insert("image".into(), other.to_string_lossy().into_owned().into());
    table.insert("relation".into(), relation.word().into());
    table.insert("driver".into(), is.driver.clone().into());
    if let Some((driver, file)) = &is.backing {
        table.insert("backing-driver".into(), driver.clone().into());
        table.insert("backing".into(), file.clone().into());
    }
    let text = format!(
        "# The drive went on with another image; the one that this is beside holds what it was before.\n{table}"
    );
    let mut file = fs::File::create(mark_of(image, drive))?;
    file.write_all(text.as_bytes())?;
    // The drive's users wait for what is done here, but not for the disk: who kills the program finds it in the page cache.
    std::thread::spawn(move || file.sync_all());
    Ok(())
}

/// Which file it is: a new one of the same name may get the old one's number, but not its time of birth (where that is known).
fn identity(image: &Path) -> io::Result<String> {
    let found = fs::metadata(image)?;
    let born = found.created().ok().and_then(|born| born.duration_since(UNIX_EPOCH).ok());
    Ok(format!("{}:{}:{}", found.dev(), found.ino(), born.map(|born| born.as_nanos()).unwrap_or_default()))
}

/// The drive is at this image again.
fn forget(image: &Path, drive: &str) -> io::Result<()> {
    match fs::remove_file(mark_of(image, drive)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// What is remembered of a drive beside an image. One that is another file by now is nobody's past.
fn read(image: &Path, drive: &str) -> std::result::Result<Option<Moved>, String> {
    let mark = mark_of(image, drive);
    let text = match fs::read_to_string(&mark) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("{}: {error}", mark.display())),
    };
    let unreadable = || {
        format!(
            "{} says that the drive '{drive}' went on with another image, and cannot be read; remove it if that is not so",
            mark.display()
        )
    };
    let table: toml::Table = text.parse().map_err(|_| unreadable())?;
    let said = |key: &str| table.get(key).and_then(toml::Value::as_str).ok_or_else(unreadable);
    let relation = said("relation")?;
    let relation = Relation::ALL.iter().find(|(word, _)| *word == relation).map(|(_, relation)| *relation);
    let (of, other) = (said("of")?, PathBuf::from(said("image")?));
    let is = said("driver").ok().map(|driver| Image {
        driver: driver.to_owned(),
        file: other.to_string_lossy().into_owned(),
        backing: said("backing-driver").ok().map(str::to_owned).zip(said("backing").ok().map(str::to_owned)),
    });
    let relation = relation.ok_or_else(unreadable)?;
    if identity(image).is_ok_and(|is| is != of) {
        return Ok(None);
    }
    Ok(Some(Moved { mark, image: other, relation, is }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_remembered_is_of_that_file_and_goes_when_the_drive_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let (image, other) = (folder.path().join("a.qcow2"), folder.path().join("b.qcow2"));
        fs::write(&image, "data").unwrap();
        assert_eq!(read(&image, "vda"), Ok(None));
        let backing = Some(("raw".to_owned(), "/below.raw".to_owned()));
        let file = other.to_string_lossy().into_owned();
        for (backing, (_, relation)) in [None, backing.clone(), backing].into_iter().zip(Relation::ALL) {
            let is = Image { driver: "qcow2".into(), file: file.clone(), backing };
            write(&image, "vda", &other, relation, &is).unwrap();
            let moved = read(&image, "vda").unwrap().unwrap();
            assert_eq!((&moved.image, moved.relation, moved.is), (&other, relation, Some(is)));
        }
        assert_eq!(read(&image, "vdb"), Ok(None), "it is another drive's");
        // Whoever made a new file of that name has another image.
        fs::rename(&image, &other).unwrap();
        fs::write(&image, "new").unwrap();
        assert_eq!(read(&image, "vda"), Ok(None));
        fs::rename(&other, &image).unwrap();
        fs::write(mark_of(&image, "vda"), "drive = ").unwrap();
        assert!(read(&image, "vda").unwrap_err().contains("cannot be read"));
        forget(&image, "vda").unwrap();
        forget(&image, "vda").unwrap();
        assert_eq!(read(&image, "vda"), Ok(None));
    }
}

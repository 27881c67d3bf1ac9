//! `file`: a regular file or a block device.
//!
//! | option | default | meaning |
//! |---|---|---|
//! | `path` | required | which; a relative one starts where the configuration says |
//! | `cache` | `"writeback"` | `"writeback"`: through the host's page cache; `"none"`: past it (O_DIRECT) |
//! | `locking` | `"auto"` | keep other programs from writing to the file meanwhile; `"auto"`: if the file system can |
//! | `discard` | `"unmap"` | `"unmap"`: discarded ranges, and zeroes that may be unmapped, give their space back; `"ignore"`: they do not |
//!
//! A write beyond the end makes a regular file longer, and a read beyond it gives zeroes: formats rely on both. Locks are
//! those of QEMU's tools, in both directions. Once the kernel has failed to write data back, every later
//! flush fails too, because the data that it gave up on is gone.
//!
//! What the page cache holds is read and written on the calling thread without waiting; the rest goes through the engine. No
//! request allocates, unless its memory is not aligned as O_DIRECT needs it and no buffer is left over from an earlier one.

mod create;
mod data;
mod extent;
mod holder;
mod lock;
mod node;
mod reopen;
mod zero;

use driveline_engine::file::{File as EngineFile, OpenOptions};
use driveline_graph::{
    BoxFuture, ChildSpec, CreateArgs, Created, Description, Driver, DriverKind, Error, Kind, OpenArgs,
    OpenNode, Options, Permissions, Result, parse_options,
};
use driveline_op::Body;
use lock::Locks;
use node::FileNode;
use serde::Deserialize;
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

/// The options of a `file` node.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct FileOptions {
    path: PathBuf,
    #[serde(default)]
    cache: Cache,
    #[serde(default)]
    locking: Locking,
    #[serde(default)]
    discard: Discard,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Cache {
    #[default]
    Writeback,
    None,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Locking {
    #[default]
    Auto,
    On,
    Off,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Discard {
    #[default]
    Unmap,
    Ignore,
}

/// The driver `file`.
#[derive(Debug)]
pub struct FileDriver(Description);

impl Default for FileDriver {
    fn default() -> Self {
        Self(Description {
            options: vec!["path".into(), "cache".into(), "locking".into(), "discard".into()],
            ..Description::builtin("file", DriverKind::Protocol, "A regular file or a block device")
        })
    }
}

impl FileDriver {
    fn options(options: &Options) -> Result<FileOptions> {
        let parsed: FileOptions = parse_options(options)?;
        if parsed.path.as_os_str().is_empty() {
            return Err(Error::new(Kind::Invalid, "a path is expected, not an empty text").key("path"));
        }
        Ok(parsed)
    }
}

impl Driver for FileDriver {
    fn description(&self) -> &Description {
        &self.0
    }

    fn check(&self, options: &Options) -> Result<()> {
        Self::options(options).map(drop)
    }

    fn created_in(&self) -> Option<&[ChildSpec]> {
        Some(&[])
    }

    fn create<'a>(&'a self, args: CreateArgs<'a>) -> BoxFuture<'a, Result<Created>> {
        Box::pin(create::create(args))
    }

    fn open<'a>(&'a self, args: OpenArgs<'a>) -> BoxFuture<'a, Result<Arc<dyn OpenNode>>> {
        Box::pin(async move {
            let options = Self::options(args.options)?;
            let path = absolute(args.directory, &options.path)?;
            let (read_only, cookie) = (args.read_only, args.cookie);
            driveline_engine::unblock(move || open(path, &options, read_only, cookie)).await
        })
    }
}

fn absolute(directory: &Path, path: &Path) -> Result<PathBuf> {
    let joined = directory.join(path);
    std::path::absolute(&joined).map_err(|error| io_error(&error, "opening", &joined))
}

fn open(path: PathBuf, options: &FileOptions, read_only: bool, cookie: u64) -> Result<Arc<dyn OpenNode>> {
    let direct = options.cache == Cache::None;
    let how = OpenOptions { read: true, write: !read_only, create: false, direct };
    let file = EngineFile::open_blocking(&path, how).map_err(|error| {
        let invalid = error.raw_os_error() == Some(libc::EINVAL);
        if direct && invalid && EngineFile::open_blocking(&path, OpenOptions { direct: false, ..how }).is_ok()
        {
            let text = format_args!("'{}' is on a file system without O_DIRECT", path.display());
            return Error::new(Kind::NotSupported, text).key("cache");
        }
        io_error(&error, "opening", &path).key("path")
    })?;
    let locks = Locks::new(&file, options.locking, &path)?;
    with_patience(|| {
        locks.take(&file, Permissions::CONSISTENT_READ, Permissions::ALL, &path)?;
        if read_only { Ok(()) } else { locks.take_write(&file, &path) }
    })?;
    let size_bytes = file.len().map_err(|error| io_error(&error, "asking for the size of", &path))?;
    let discard = options.discard == Discard::Unmap;
    let driver = data::File::new(file, size_bytes, read_only, discard);
    let at_open = std::fs::metadata(&path).map_err(|error| io_error(&error, "looking at", &path))?;
    Ok(Arc::new(FileNode { path, at_open, locks, body: Arc::new(Body { cookie, driver }) }))
}

/// Tries again for a moment while the file is locked: the kernel gives up the locks of a program that was killed only
/// some milliseconds later, and a program that has just been forked holds those of its parent until it runs.
fn with_patience(take: impl Fn() -> Result<()>) -> Result<()> {
    const TRIES: u32 = 10;
    const PAUSE: std::time::Duration = std::time::Duration::from_millis(10);
    for _ in 1..TRIES {
        match take() {
            Err(error) if error.kind() == Kind::Busy => std::thread::sleep(PAUSE),
            done => return done,
        }
    }
    take()
}

/// An error of the world, with the file at fault.
fn io_error(error: &std::io::Error, doing: &str, path: &Path) -> Error {
    match error.raw_os_error() {
        Some(errno) => Error::io(errno, format_args!("{doing} '{}'", path.display())),
        None => Error::new(Kind::Invalid, format_args!("{doing} '{}': {error}", path.display())),
    }
}

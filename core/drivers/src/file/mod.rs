//! `file`: a regular file or a block device.
//!
//! | option | default | meaning |
//! |---|---|---|
//! | `path` | required | which; a relative one starts where the configuration says |
//! | `filename` | | the same, in QEMU's word |
//! | `cache` | `"writeback"` | `"writeback"`: through the host's page cache; `"none"`: past it (O_DIRECT) |
//! | `locking` | `"auto"` | keep other programs from writing to the file meanwhile; `"auto"`: if the file system can |
//! | `discard` | `"unmap"` | `"unmap"`: discarded ranges, and zeroes that may be unmapped, give their space back; `"ignore"`: they do not |
//! | `aio` | `"threads"` | `"threads"`, `"native"` (only with `cache = "none"`, as in QEMU) or `"io_uring"`: taken and checked; the engine uses the fastest way that there is |
//! | `drop-cache` | | taken, without effect: it is about pages of another host's writes |
//! | `x-check-cache-dropped` | | the same |
//! | `auto-read-only` | `false` | the file is open for writing only while somebody may write (see the options of every node, too) |
//! | `force-share` | `false` | others may write to what is read here (see the options of every node) |
//!
//! `host_device` is the same for what is a block or character device, and refuses the rest.
//!
//! A write beyond the end makes a regular file longer, and a read beyond it gives zeroes: formats rely on both. Locks are
//! those of QEMU's tools, in both directions. Once the kernel has failed to write data back, every later
//! flush fails too, because the data that it gave up on is gone.
//!
//! What the page cache holds is read and written on the calling thread without waiting; the rest goes through the engine. No
//! request allocates, unless its memory is not aligned as O_DIRECT needs it and no buffer is left over from an earlier one.

mod access;
mod create;
mod data;
mod extent;
mod holder;
mod lock;
mod node;
mod reopen;
mod zero;

use access::Access;
use driveline_engine::file::{File as EngineFile, OpenOptions};
use driveline_graph::{
    BoxFuture, ChildSpec, CreateArgs, Created, Description, Driver, DriverKind, Error, Kind, OpenArgs,
    OpenNode, Options, Permissions, Reopened, Result, parse_options,
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
    #[serde(alias = "filename")]
    path: PathBuf,
    #[serde(default)]
    cache: Cache,
    #[serde(default)]
    locking: Locking,
    #[serde(default)]
    discard: Discard,
    #[serde(default)]
    aio: Aio,
    /// Of no effect, see above.
    #[serde(default)]
    #[expect(dead_code, reason = "only its type is checked")]
    drop_cache: bool,
    /// Of no effect, see above.
    #[serde(default)]
    #[expect(dead_code, reason = "only its type is checked")]
    x_check_cache_dropped: bool,
    #[serde(default)]
    auto_read_only: bool,
    #[serde(default)]
    force_share: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Aio {
    #[default]
    Threads,
    Native,
    IoUring,
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

/// The driver `file`, and `host_device`.
#[derive(Debug)]
pub struct FileDriver {
    description: Description,
    devices_only: bool,
}

impl Default for FileDriver {
    fn default() -> Self {
        Self::named("file", "A regular file or a block device", false)
    }
}

impl FileDriver {
    /// The driver `host_device`: as `file`, for devices only.
    pub fn host_device() -> Self {
        Self::named("host_device", "A block or character device", true)
    }

    fn named(name: &'static str, summary: &'static str, devices_only: bool) -> Self {
        let options = [
            "path",
            "filename",
            "cache",
            "locking",
            "discard",
            "aio",
            "drop-cache",
            "x-check-cache-dropped",
            "auto-read-only",
            "force-share",
        ];
        let options = options.into_iter().map(Into::into).collect();
        let description =
            Description { options, ..Description::builtin(name, DriverKind::Protocol, summary) };
        Self { description, devices_only }
    }

    fn options(options: &Options) -> Result<FileOptions> {
        let parsed: FileOptions = parse_options(options)?;
        if parsed.path.as_os_str().is_empty() {
            return Err(Error::new(Kind::Invalid, "a path is expected, not an empty text").key("path"));
        }
        if parsed.aio == Aio::Native && parsed.cache != Cache::None {
            let text = "aio=native was specified, but it requires cache.direct=on, which was not specified.";
            return Err(Error::new(Kind::Invalid, text).key("aio"));
        }
        Ok(parsed)
    }
}

impl Driver for FileDriver {
    fn description(&self) -> &Description {
        &self.description
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
            let devices_only = self.devices_only;
            driveline_engine::unblock(move || {
                if devices_only {
                    check_device(&path)?;
                }
                open(path, &options, read_only, cookie)
            })
            .await
        })
    }

    fn reopen<'a>(
        &'a self,
        old: &'a Arc<dyn OpenNode>,
        before: &'a Options,
        args: OpenArgs<'a>,
    ) -> BoxFuture<'a, Result<Reopened>> {
        Box::pin(async move {
            let (was, options) = (Self::options(before)?, Self::options(args.options)?);
            let (was_path, path) =
                (absolute(args.directory, &was.path)?, absolute(args.directory, &options.path)?);
            for (key, same) in [
                ("filename", was_path == path),
                ("aio", was.aio == options.aio),
                ("locking", was.locking == options.locking),
            ] {
                if !same {
                    let text = format_args!("Cannot change the option '{key}'");
                    return Err(Error::new(Kind::NotSupported, text));
                }
            }
            let Some(node) = old.as_any().and_then(|old| old.downcast_ref::<FileNode>()) else {
                return Err(Error::new(Kind::NotSupported, "it is no node of this driver"));
            };
            let (direct, discard) = (options.cache == Cache::None, options.discard == Discard::Unmap);
            node.reopen(direct, discard, options.auto_read_only, args.cookie).await
        })
    }
}

fn check_device(path: &Path) -> Result<()> {
    use std::os::unix::fs::FileTypeExt;
    let kind = std::fs::metadata(path).map_err(|error| open_error(&error, path))?.file_type();
    if kind.is_block_device() || kind.is_char_device() {
        return Ok(());
    }
    let text = format_args!(
        "'host_device' driver requires '{}' to be either a character or block device",
        path.display()
    );
    Err(Error::new(Kind::Invalid, text).key("path"))
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
        open_error(&error, &path)
    })?;
    if options.force_share && !read_only {
        return Err(Error::new(Kind::Invalid, "force-share=on can only be used with read-only images"));
    }
    let locks = Locks::new(&file, options.locking, &path)?;
    with_patience(|| {
        locks.take(&file, Permissions::CONSISTENT_READ, Permissions::ALL, &path)?;
        if read_only { Ok(()) } else { locks.take_write(&file, &path) }
    })?;
    let size_bytes = file.len().map_err(|error| io_error(&error, "asking for the size of", &path))?;
    let discard = options.discard == Discard::Unmap;
    let driver = data::File::new(Arc::new(file), size_bytes, read_only, discard);
    let at_open = std::fs::metadata(&path).map_err(|error| io_error(&error, "looking at", &path))?;
    let (locks, body) = (Arc::new(locks), Arc::new(Body { cookie, driver }));
    let access = Access::new(options.auto_read_only, read_only);
    Ok(Arc::new(FileNode { path, at_open, locks, access, body }))
}

/// How often a lock is asked for, and how long is waited in between.
const TRIES: u32 = 10;
const PAUSE: std::time::Duration = std::time::Duration::from_millis(10);

/// Tries again for a moment while the file is locked: the kernel gives up the locks of a program that was killed only
/// some milliseconds later, as those of a file that its ring still has, and a program that has just been forked holds those
/// of its parent until it runs.
fn with_patience(take: impl Fn() -> Result<()>) -> Result<()> {
    for _ in 1..TRIES {
        match take() {
            Err(error) if error.kind() == Kind::Busy => std::thread::sleep(PAUSE),
            done => return done,
        }
    }
    take()
}

/// A file that cannot be opened, in QEMU's words: clients look for them.
fn open_error(error: &std::io::Error, path: &Path) -> Error {
    let Some(errno) = error.raw_os_error() else { return io_error(error, "opening", path).key("path") };
    let reason = error.to_string(); // with the errno's number behind
    let reason = reason.split(" (os error").next().unwrap_or_default();
    Error::io_text(errno, format_args!("Could not open '{}': {reason}", path.display())).key("path")
}

/// An error of the world, with the file at fault.
fn io_error(error: &std::io::Error, doing: &str, path: &Path) -> Error {
    match error.raw_os_error() {
        Some(errno) => Error::io(errno, format_args!("{doing} '{}'", path.display())),
        None => Error::new(Kind::Invalid, format_args!("{doing} '{}': {error}", path.display())),
    }
}

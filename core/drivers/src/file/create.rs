//! Making a file.
//!
//! | option | default | meaning |
//! |---|---|---|
//! | `filename` | required | its name; a file of that name is emptied, a block device must be large enough |
//! | `size` | required | its size in bytes |
//! | `preallocation` | `"off"` | `"falloc"`: it has its space; `"full"`: and is written, with zeroes |
//! | `nocow` | `false` | ask the file system (btrfs) to overwrite it in place; one that cannot do so is no error |
//! | `extent-size-hint` | 1 MiB | ask the file system (XFS) to allocate so much at once; `0`: do not |
//!
//! Source: QEMU qapi/block-core.json, `BlockdevCreateOptionsFile`.

use super::{Locking, absolute, io_error, lock::Locks};
use driveline_engine::file::File as EngineFile;
use driveline_graph::{
    CreateArgs, Created, Error, Kind, Options, Permissions, Preallocation, Result, parse_options,
};
use serde::Deserialize;
use std::{
    fs::File,
    io::{self, ErrorKind},
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, FileTypeExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

/// As QEMU asks for, where nothing else is said: files that grow by small writes are fragmented less.
const EXTENT_BYTES: u64 = 1 << 20;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct CreateOptions {
    filename: PathBuf,
    size: i64,
    #[serde(default)]
    preallocation: Preallocation,
    #[serde(default)]
    nocow: bool,
    extent_size_hint: Option<u64>,
}

fn options(options: &Options) -> Result<CreateOptions> {
    let parsed: CreateOptions = parse_options(options)?;
    if parsed.filename.as_os_str().is_empty() {
        return Err(Error::new(Kind::Invalid, "a path is expected, not an empty text").key("filename"));
    }
    if parsed.size < 0 {
        return Err(Error::io(libc::EINVAL, "Could not resize file").key("size"));
    }
    if parsed.preallocation == Preallocation::Metadata {
        let text = "Unsupported preallocation mode: metadata";
        return Err(Error::new(Kind::NotSupported, text).key("preallocation"));
    }
    Ok(parsed)
}

/// Makes a file. One that is not finished is removed again, if it was not there before.
pub(super) async fn create(args: CreateArgs<'_>) -> Result<Created> {
    let options = options(args.options)?;
    let path = absolute(args.directory, &options.filename)?;
    driveline_engine::unblock(move || {
        let (file, created) = open(&path)?;
        let made = make(file, &path, &options);
        if made.is_err() && created == Created::New {
            // The error that counts is the first.
            let _ = std::fs::remove_file(&path);
        }
        made.map(|()| created)
    })
    .await
}

/// Opens a file, which is made if it is not there.
fn open(path: &Path) -> Result<(File, Created)> {
    let how = |new: bool| {
        // Without O_NONBLOCK the opening of a pipe would wait for its other end.
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let mut how = File::options();
        how.read(true).write(true).create_new(new).mode(0o644).custom_flags(flags).open(path)
    };
    let opened = match how(true) {
        Ok(file) => Ok((file, Created::New)),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            how(false).map(|file| (file, Created::Overwritten))
        }
        Err(error) => Err(error),
    };
    opened.map_err(|error| could_not(&error, format_args!("create '{}'", path.display())))
}

fn make(file: File, path: &Path, options: &CreateOptions) -> Result<()> {
    let could_not_resize = |error: io::Error| could_not(&error, format_args!("resize file"));
    let kind = file.metadata().map_err(could_not_resize)?.file_type();
    let duplicate = file.try_clone().map_err(could_not_resize)?;
    let locked = EngineFile::from_std(duplicate).map_err(|error| io_error(&error, "creating", path))?;
    let locks = Locks::new(&locked, Locking::Auto, path)?;
    // Whoever has the file open must not find it changed; locks end with the file, which is closed on every way out.
    let writes = Permissions::WRITE.or(Permissions::RESIZE);
    locks.take(&locked, writes, Permissions::ALL.without(Permissions::RESIZE), path)?;
    let size = options.size as u64;
    if kind.is_block_device() {
        let there = locked.len().map_err(could_not_resize)?;
        if there < size {
            let text =
                format_args!("'{}' is a block device of {there} bytes, too small for {size}", path.display());
            return Err(Error::io_text(libc::ENOSPC, text).key("size"));
        }
        return Ok(());
    }
    file.set_len(0).map_err(could_not_resize)?;
    if options.nocow
        && let Err(error) = set_nocow(&file)
    {
        tracing::debug!("'{}' is copied on write: {error}", path.display());
    }
    let hint = options.extent_size_hint.unwrap_or(EXTENT_BYTES);
    if hint > 0
        && let Err(error) = set_extent_size(&file, hint)
        && options.extent_size_hint.is_some()
    {
        tracing::warn!("'{}' has no extent size hint: {error}", path.display());
    }
    file.set_len(size).map_err(could_not_resize)?;
    match options.preallocation {
        Preallocation::Off | Preallocation::Metadata => {}
        Preallocation::Falloc if size > 0 => {
            rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, size)
                .or_else(|errno| match errno {
                    // As the C library does where the file system cannot.
                    rustix::io::Errno::OPNOTSUPP => write_zeroes(&file, size),
                    errno => Err(errno.into()),
                })
                .map_err(|error| could_not(&error, format_args!("preallocate data for the new file")))?;
        }
        Preallocation::Falloc => {}
        Preallocation::Full => {
            let doing = format_args!("write zeros for preallocation");
            write_zeroes(&file, size).map_err(|error| could_not(&error, doing))?;
        }
    }
    file.sync_all().map_err(|error| io_error(&error, "writing back", path))
}

fn write_zeroes(file: &File, size: u64) -> io::Result<()> {
    let zeroes = vec![0; 1 << 20];
    let mut at = 0;
    while at < size {
        let length = (size - at).min(zeroes.len() as u64) as usize;
        file.write_all_at(&zeroes[..length], at)?;
        at += length as u64;
    }
    Ok(())
}

fn set_nocow(file: &File) -> io::Result<()> {
    let flags = rustix::fs::ioctl_getflags(file)?;
    Ok(rustix::fs::ioctl_setflags(file, flags | rustix::fs::IFlags::NOCOW)?)
}

/// `struct fsxattr` of linux/fs.h.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    flags: u32,
    extent_bytes: u32,
    others: [u32; 5],
}

fn set_extent_size(file: &File, bytes: u64) -> io::Result<()> {
    /// `FS_IOC_FSGETXATTR` and `FS_IOC_FSSETXATTR` of linux/fs.h.
    const GET: libc::Ioctl = 0x801c_581f_u32 as libc::Ioctl;
    const SET: libc::Ioctl = 0x401c_5820_u32 as libc::Ioctl;
    const EXTENT_SIZE: u32 = 0x800;
    let extent_bytes = u32::try_from(bytes).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    let mut attributes = Attributes::default();
    // SAFETY: the kernel writes a `struct fsxattr`, 28 bytes, which `attributes` is.
    if unsafe { libc::ioctl(file.as_raw_fd(), GET, &raw mut attributes) } == -1 {
        return Err(io::Error::last_os_error());
    }
    attributes.flags |= EXTENT_SIZE;
    attributes.extent_bytes = extent_bytes;
    // SAFETY: the kernel reads a `struct fsxattr`.
    match unsafe { libc::ioctl(file.as_raw_fd(), SET, &raw const attributes) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// An error of the world in QEMU's words.
fn could_not(error: &io::Error, what: std::fmt::Arguments<'_>) -> Error {
    Error::io(error.raw_os_error().unwrap_or(libc::EIO), format_args!("Could not {what}"))
}

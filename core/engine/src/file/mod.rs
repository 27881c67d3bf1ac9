//! Files and block devices: positional vectored I/O on memory that the caller lends.
//!
//! A read or write first tries what needs no waiting: `preadv2` with `RWF_NOWAIT`, and for writes the same where the file
//! system takes it, else a plain `pwritev` as long as such writes return quickly. What would block goes through the
//! thread's ring, or through the blocking pool.

mod lock;
mod transfer;
mod ways;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

pub use lock::LockKind;
pub use transfer::{Control, ReadAt, WriteAt};
use ways::Ways;

/// How a file is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// For reading.
    pub read: bool,
    /// For writing.
    pub write: bool,
    /// Make it if it is not there (mode 0644, less the umask).
    pub create: bool,
    /// Past the page cache (`O_DIRECT`): memory, offsets and lengths are then aligned, see [`File::alignment`].
    pub direct: bool,
}

/// What a file asks of memory addresses, and of offsets and lengths, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// Of each part's address.
    pub memory: u32,
    /// Of the offset and each part's length.
    pub offset: u32,
}

/// An open regular file, block device or character device.
///
/// Its operations run on any thread: on an engine thread through that thread's ring, elsewhere through the blocking pool. One
/// that has begun to wait stays on its thread.
#[derive(Debug)]
pub struct File {
    fd: OwnedFd,
    ways: Ways,
    direct: bool,
    block_device: bool,
}

impl File {
    /// Opens a file, on the blocking pool. A pipe, socket or directory is an error.
    pub async fn open(path: impl AsRef<Path>, options: OpenOptions) -> io::Result<File> {
        let path: PathBuf = path.as_ref().to_owned();
        crate::unblock(move || File::open_blocking(&path, options)).await
    }

    /// Opens a file, blocking for as long as that takes.
    pub fn open_blocking(path: &Path, options: OpenOptions) -> io::Result<File> {
        let file = std::fs::OpenOptions::new()
            .read(options.read)
            .write(options.write)
            .create(options.create)
            .mode(0o644)
            .custom_flags(
                // Without O_NONBLOCK the opening of a pipe that somebody put there would wait for its other end.
                libc::O_NONBLOCK | libc::O_NOCTTY | if options.direct { libc::O_DIRECT } else { 0 },
            )
            .open(path)?;
        // Only the opening was to be non-blocking: with this flag a ring gives up instead of waiting.
        let flags = rustix::fs::fcntl_getfl(&file)?;
        rustix::fs::fcntl_setfl(&file, flags - rustix::fs::OFlags::NONBLOCK)?;
        File::from_std(file)
    }

    /// Takes over an open file. Whether it is `O_DIRECT` is read from it.
    pub fn from_std(file: std::fs::File) -> io::Result<File> {
        let kind = file.metadata()?.file_type();
        if !(kind.is_file() || kind.is_block_device() || kind.is_char_device()) {
            let text = "expected a regular file or a device";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        Ok(File::unchecked(file.into(), kind.is_block_device(), kind.is_char_device()))
    }

    fn unchecked(fd: OwnedFd, block_device: bool, stream: bool) -> File {
        let flags = rustix::fs::fcntl_getfl(&fd);
        let direct = flags.is_ok_and(|flags| flags.contains(rustix::fs::OFlags::DIRECT));
        let ways = if direct || stream { Ways::never_inline() } else { Ways::of(&fd) };
        File { fd, ways, direct, block_device }
    }

    /// Reads at `offset` into the `count` parts of `iov`, in order. Yields how many bytes came: fewer than asked for also in
    /// the middle of the file, for instance when only the first part is in the page cache; 0 is the end. A read that needs
    /// no waiting completes at its first poll, without allocation.
    ///
    /// # Safety
    ///
    /// `iov` is an array of `count` parts (the kernel refuses more than 1024). The array and the memory that it names stay valid, and nobody else touches that
    /// memory, until the future completes or its drop returns. (A future that is forgotten instead holds the memory for ever.)
    pub unsafe fn read_at(&self, iov: *const libc::iovec, count: u32, offset: u64) -> ReadAt<'_> {
        ReadAt::new(self, iov, count, offset)
    }

    /// Writes the `count` parts of `iov`, in order, at `offset`. Yields how many bytes were written, which can be fewer.
    ///
    /// # Safety
    ///
    /// `iov` is an array of `count` parts (the kernel refuses more than 1024). The array and the memory that it names stay valid, and nobody writes to that memory,
    /// until the future completes or its drop returns.
    pub unsafe fn write_at(&self, iov: *const libc::iovec, count: u32, offset: u64) -> WriteAt<'_> {
        WriteAt::new(self, iov, count, offset)
    }

    /// Brings all completed writes to stable storage; with `datasync` without times and the like.
    pub fn fsync(&self, datasync: bool) -> Control<'_> {
        Control::sync(self, datasync)
    }

    /// `fallocate(2)` with `mode` of its `FALLOC_FL_*`.
    pub fn fallocate(&self, mode: i32, offset: u64, length: u64) -> Control<'_> {
        Control::allocate(self, mode, offset, length)
    }

    /// The length in bytes, of a block device too.
    pub fn len(&self) -> io::Result<u64> {
        if self.block_device {
            return Ok(rustix::fs::seek(&self.fd, rustix::fs::SeekFrom::End(0))?);
        }
        Ok(u64::try_from(rustix::fs::fstat(&self.fd)?.st_size).unwrap_or(0))
    }

    /// Whether the length is 0.
    pub fn is_empty(&self) -> io::Result<bool> {
        self.len().map(|length| length == 0)
    }

    /// Truncates or grows a regular file.
    pub fn set_len(&self, length: u64) -> io::Result<()> {
        Ok(rustix::fs::ftruncate(&self.fd, length)?)
    }

    /// Where the next data at or after `offset` begins; `None` if there is none up to the end.
    pub fn seek_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.seek(rustix::fs::SeekFrom::Data(offset))
    }

    /// Where the next hole at or after `offset` begins; the end of the file counts as one. `None` past the end.
    pub fn seek_hole(&self, offset: u64) -> io::Result<Option<u64>> {
        self.seek(rustix::fs::SeekFrom::Hole(offset))
    }

    fn seek(&self, to: rustix::fs::SeekFrom) -> io::Result<Option<u64>> {
        match rustix::fs::seek(&self.fd, to) {
            Ok(offset) => Ok(Some(offset)),
            Err(rustix::io::Errno::NXIO) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether it was opened with `O_DIRECT`.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Whether it is a block device.
    pub fn is_block_device(&self) -> bool {
        self.block_device
    }

    /// What memory and offsets must be aligned to: 1 through the page cache. With `O_DIRECT` it is what the kernel says, or
    /// 4096 where it does not say (before Linux 6.1, and on some file systems).
    pub fn alignment(&self) -> Alignment {
        if !self.direct {
            return Alignment { memory: 1, offset: 1 };
        }
        let wanted = rustix::fs::StatxFlags::DIOALIGN;
        match rustix::fs::statx(&self.fd, c"", rustix::fs::AtFlags::EMPTY_PATH, wanted) {
            Ok(found) if found.stx_mask & wanted.bits() != 0 && found.stx_dio_offset_align != 0 => {
                Alignment { memory: found.stx_dio_mem_align.max(1), offset: found.stx_dio_offset_align }
            }
            _ => Alignment { memory: 4096, offset: 4096 },
        }
    }

    fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl AsFd for File {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for File {
    fn as_raw_fd(&self) -> RawFd {
        self.fd()
    }
}

#[cfg(test)]
mod tests;

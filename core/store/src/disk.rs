//! What a store needs of a file, so that tests can put a failing or forgetful one in its place.

pub(crate) mod memory;

use core::fmt;
use core::ops::Range;
use core::sync::atomic::Ordering;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{FallocateFlags, FlockOperation, SeekFrom, fallocate, flock, seek};
use rustix::io::Errno;

use crate::mapping::Words;

/// Bytes of a page of every mapping: no machine that runs Linux has smaller ones.
pub(crate) const PAGE: usize = 4096;

/// A file with room that can be reserved, and parts of it as words.
pub(crate) trait Disk: fmt::Debug + Send + Sync {
    /// Bytes up to the end of the file.
    fn length(&self) -> io::Result<u64>;

    /// Fills `buffer`; what is beyond the end of the file reads as zeros.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `data`, to the page cache.
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()>;

    /// Makes room for these bytes, so that a later write of them cannot fail for lack of it. What is there stays.
    fn reserve(&self, range: Range<u64>) -> io::Result<()>;

    /// Gives the room of these bytes back; they read as zeros then, if the file system can do so.
    fn release(&self, range: Range<u64>) -> io::Result<()>;

    /// Brings to stable storage what was written or stored in a mapping before this call, and the file's length.
    fn sync(&self) -> io::Result<()>;

    /// Maps bytes, which are reserved, as words.
    fn map(&self, range: Range<u64>) -> io::Result<Words>;

    /// The first bytes within `range` that may be anything but zeros.
    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>>;

    /// Makes the next sync write all of `words`, changed or not. A sync that fails may leave pages that count as written and
    /// are not.
    fn redirty(&self, words: &Words) {
        for page in words.chunks(PAGE / 8) {
            page[0].fetch_or(0, Ordering::SeqCst);
        }
    }
}

/// A file of a file system.
#[derive(Debug)]
pub(crate) struct FileDisk {
    file: File,
}

impl FileDisk {
    /// Makes a new file; one that is there already is an error.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        Ok(FileDisk { file })
    }

    /// Opens a file for reading, and for writing as well if asked to.
    pub(crate) fn open(path: &Path, write: bool) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(write).open(path)?;
        match file.metadata()?.is_file() {
            true => Ok(FileDisk { file }),
            false => Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")),
        }
    }

    /// Keeps every other opener out until the file and all its mappings are gone. Says whether nobody else does.
    pub(crate) fn lock(&self) -> io::Result<bool> {
        match flock(&self.file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(Errno::WOULDBLOCK) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl Disk for FileDisk {
    fn length(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read_at(&self, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buffer.is_empty() {
            match self.file.read_at(buffer, offset) {
                Ok(0) => {
                    buffer.fill(0);
                    break;
                }
                Ok(count) => {
                    buffer = &mut buffer[count..];
                    offset += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn reserve(&self, range: Range<u64>) -> io::Result<()> {
        loop {
            return match fallocate(&self.file, FallocateFlags::empty(), range.start, range.end - range.start)
            {
                Err(Errno::INTR) => continue,
                // A file system that cannot reserve cannot punch holes either: what is within the file has room.
                Err(Errno::OPNOTSUPP) => {
                    let zeros = vec![0; 1 << 20];
                    let mut at = self.length()?.max(range.start);
                    while at < range.end {
                        let count = (range.end - at).min(zeros.len() as u64);
                        self.write_at(&zeros[..count as usize], at)?;
                        at += count;
                    }
                    Ok(())
                }
                other => Ok(other?),
            };
        }
    }

    fn release(&self, range: Range<u64>) -> io::Result<()> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, punch, range.start, range.end - range.start) {
            Ok(()) | Err(Errno::OPNOTSUPP) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn map(&self, range: Range<u64>) -> io::Result<Words> {
        Words::map(&self.file, range)
    }

    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        // One descriptor, one position: but nothing else uses it.
        let start = match seek(&self.file, SeekFrom::Data(range.start)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(range)),
            Err(errno) => return Err(errno.into()),
        };
        if start >= range.end {
            return Ok(None);
        }
        let end = seek(&self.file, SeekFrom::Hole(start))?;
        Ok(Some(start..end.min(range.end)))
    }
}

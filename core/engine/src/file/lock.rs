//! Open-file-description locks: advisory, by byte range, kept by the open file and not by the process.

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use super::File;

/// What a range is locked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// With others that share; the file is open for reading.
    Shared,
    /// Alone; the file is open for writing.
    Exclusive,
}

impl File {
    /// Locks a range of bytes; it need not exist in the file. False: somebody else's lock is in the way.
    ///
    /// The lock ends with `unlock_ofd` or when this file is closed. Locking again what this file has locked changes the kind.
    pub fn try_lock_ofd(&self, range: Range<u64>, kind: LockKind) -> io::Result<bool> {
        match self.lock_call(libc::F_OFD_SETLK, range, type_of(kind)) {
            Ok(_) => Ok(true),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Whether `try_lock_ofd` would succeed, without locking.
    pub fn can_lock_ofd(&self, range: Range<u64>, kind: LockKind) -> io::Result<bool> {
        let found = self.lock_call(libc::F_OFD_GETLK, range, type_of(kind))?;
        Ok(found.l_type == libc::F_UNLCK as libc::c_short)
    }

    /// Unlocks a range of bytes.
    pub fn unlock_ofd(&self, range: Range<u64>) -> io::Result<()> {
        self.lock_call(libc::F_OFD_SETLK, range, libc::F_UNLCK as libc::c_short).map(drop)
    }

    fn lock_call(&self, command: i32, range: Range<u64>, kind: libc::c_short) -> io::Result<libc::flock> {
        let bad = |_| io::Error::new(io::ErrorKind::InvalidInput, "a lock beyond the largest file offset");
        // A length of 0 would mean "up to any end": that is not an empty range.
        if range.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "an empty range cannot be locked"));
        }
        let mut lock = libc::flock {
            l_type: kind,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: i64::try_from(range.start).map_err(bad)?,
            l_len: i64::try_from(range.end - range.start).map_err(bad)?,
            l_pid: 0,
        };
        // SAFETY: `lock` is on the stack.
        match unsafe { libc::fcntl(self.as_raw_fd(), command, &raw mut lock) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(lock),
        }
    }
}

fn type_of(kind: LockKind) -> libc::c_short {
    match kind {
        LockKind::Shared => libc::F_RDLCK as libc::c_short,
        LockKind::Exclusive => libc::F_WRLCK as libc::c_short,
    }
}

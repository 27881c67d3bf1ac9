//! Another access mode for an open file.

use super::{io_error, lock};
use driveline_engine::file::{File, OpenOptions};
use driveline_graph::{Error, Kind, Result};
use std::{
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

/// Puts a new opening of the same file under the descriptor of `ours`, read-only or writable. The new one has the locks
/// before the old one goes, so nobody gets in between. On an error everything is as it was.
///
/// Nothing is in flight (the graph sees to that), so nobody uses the descriptor meanwhile.
pub(super) fn reopen(ours: &File, path: &Path, held: lock::Held, read_only: bool) -> Result<()> {
    let error = |error: io::Error| io_error(&error, "reopening", path);
    let new = open_again(ours, path, held, read_only, ours.is_direct())?;
    // The kernel keeps the old one for as long as it is busy with a request that we know is done, and its locks with it.
    lock::unlock_all(ours, held);
    // SAFETY: no memory is passed. The descriptor stays valid and stays that of `ours`; only the opening behind it changes,
    // to one of the same file with the same flags but for the access mode.
    match unsafe { libc::dup3(new.as_raw_fd(), ours.as_raw_fd(), libc::O_CLOEXEC) } {
        -1 => {
            let failed = io::Error::last_os_error();
            lock::copy(held, ours).map_err(error)?;
            Err(error(failed))
        }
        _ => Ok(()),
    }
}

/// Another opening of the same file, with the same locks.
pub(super) fn open_again(
    ours: &File,
    path: &Path,
    held: lock::Held,
    read_only: bool,
    direct: bool,
) -> Result<File> {
    let how = OpenOptions { read: true, write: !read_only, create: false, direct };
    let error = |error: io::Error| io_error(&error, "reopening", path);
    let new = File::open_blocking(&name(ours, path), how).map_err(error)?;
    let identity = |file: &File| rustix::fs::fstat(file).map(|stat| (stat.st_dev, stat.st_ino));
    if identity(&new).map_err(io::Error::from).map_err(error)?
        != identity(ours).map_err(io::Error::from).map_err(error)?
    {
        let text = format_args!("'{}' is another file by now", path.display());
        return Err(Error::new(Kind::NotFound, text));
    }
    if !lock::copy(held, &new).map_err(error)? {
        let text =
            format_args!("'{}' is in use: another process has locked it for itself alone", path.display());
        return Err(Error::new(Kind::Busy, text));
    }
    Ok(new)
}

/// A name that leads to the open file even when it was renamed, if there is one.
fn name(ours: &File, path: &Path) -> PathBuf {
    let own = PathBuf::from(format!("/proc/self/fd/{}", ours.as_raw_fd()));
    if own.exists() { own } else { path.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::{super::Locking, *};
    use driveline_graph::Permissions;

    /// A snapshot was refused sometimes, because "another process" had the file of the image: the opening before, which the
    /// kernel had not let go of yet after a sync.
    #[test]
    fn an_opening_that_lingers_in_the_kernel_has_no_locks() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.img");
        std::fs::write(&path, [0; 4096]).unwrap();
        let how = OpenOptions { read: true, write: true, create: false, direct: false };
        let file = File::open_blocking(&path, how).unwrap();
        let locks = lock::Locks::new(&file, Locking::On, &path).unwrap();
        let reads = Permissions::CONSISTENT_READ;
        locks.take(&file, reads.or(Permissions::WRITE), reads, &path).unwrap();
        let _lingers = rustix::io::dup(&file).unwrap();
        reopen(&file, &path, locks.held(), true).unwrap();
        locks.take(&file, reads, reads, &path).unwrap();
    }
}

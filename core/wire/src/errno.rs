//! The error numbers that may stand in a reply.

use std::fmt;

/// An error as NBD numbers them; [`Errno::OK`] is none.
///
/// The numbers are Linux's, but only the ones named here may be sent: the peer's system may number others differently.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Errno(pub u32);

impl Errno {
    /// Success.
    pub const OK: Errno = Errno(0);
    /// Not permitted, for example to write to a read-only export.
    pub const EPERM: Errno = Errno(1);
    /// Input or output failed.
    pub const EIO: Errno = Errno(5);
    /// Out of memory.
    pub const ENOMEM: Errno = Errno(12);
    /// The request makes no sense.
    pub const EINVAL: Errno = Errno(22);
    /// Out of space.
    pub const ENOSPC: Errno = Errno(28);
    /// The request is too large.
    pub const EOVERFLOW: Errno = Errno(75);
    /// Not possible, or not as fast as was asked.
    pub const ENOTSUP: Errno = Errno(95);
    /// The server goes away.
    pub const ESHUTDOWN: Errno = Errno(108);

    /// The number to send for `errno` of this system.
    ///
    /// Whatever has no counterpart is EIO: EINVAL (QEMU's choice) would blame the client for a fault of the storage.
    pub const fn from_system(errno: i32) -> Errno {
        match errno {
            0 => Errno::OK,
            libc::EPERM | libc::EACCES | libc::EROFS => Errno::EPERM,
            libc::ENOMEM => Errno::ENOMEM,
            libc::EINVAL => Errno::EINVAL,
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => Errno::ENOSPC,
            libc::EOVERFLOW => Errno::EOVERFLOW,
            libc::ENOTSUP | libc::ENOSYS => Errno::ENOTSUP,
            libc::ESHUTDOWN => Errno::ESHUTDOWN,
            _ => Errno::EIO,
        }
    }

    /// This error as a number of this system; an unexpected one counts as EINVAL, as proto.md asks of clients.
    pub const fn to_system(self) -> i32 {
        match self {
            Errno::OK => 0,
            Errno::EPERM => libc::EPERM,
            Errno::EIO => libc::EIO,
            Errno::ENOMEM => libc::ENOMEM,
            Errno::ENOSPC => libc::ENOSPC,
            Errno::EOVERFLOW => libc::EOVERFLOW,
            Errno::ENOTSUP => libc::ENOTSUP,
            Errno::ESHUTDOWN => libc::ESHUTDOWN,
            _ => libc::EINVAL,
        }
    }

    /// The name, for an error that has one.
    pub const fn name(self) -> Option<&'static str> {
        Some(match self {
            Errno::OK => "OK",
            Errno::EPERM => "EPERM",
            Errno::EIO => "EIO",
            Errno::ENOMEM => "ENOMEM",
            Errno::EINVAL => "EINVAL",
            Errno::ENOSPC => "ENOSPC",
            Errno::EOVERFLOW => "EOVERFLOW",
            Errno::ENOTSUP => "ENOTSUP",
            Errno::ESHUTDOWN => "ESHUTDOWN",
            _ => return None,
        })
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "Errno({})", self.0),
        }
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_nbd_error_survives_the_way_through_the_system() {
        for nbd in [0, 1, 5, 12, 22, 28, 75, 95, 108].map(Errno) {
            assert_eq!(Errno::from_system(nbd.to_system()), nbd);
            assert!(nbd.name().is_some());
        }
    }

    #[test]
    fn a_full_quota_is_a_full_disk() {
        assert_eq!(Errno::from_system(libc::EDQUOT), Errno::ENOSPC);
        assert_eq!(Errno::from_system(libc::EFBIG), Errno::ENOSPC);
    }

    #[test]
    fn the_storage_is_blamed_for_what_has_no_name() {
        assert_eq!(Errno::from_system(libc::ETIMEDOUT), Errno::EIO);
        assert_eq!(Errno(4711).to_system(), libc::EINVAL);
    }
}

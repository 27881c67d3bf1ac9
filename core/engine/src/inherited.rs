//! Descriptors that whoever started the program left open for it, by number: sockets of systemd, ends of pipes.

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use parking_lot::Mutex;

/// Two that take the same number at once must not both get it.
static TAKING: Mutex<()> = Mutex::new(());

/// Takes over a descriptor that was open when the program was started; once.
///
/// All that this program opens itself is closed on exec, and what came through an exec is not: so no number that is somebody
/// else's can be taken. Standard input, output and error are everybody's, and cannot be taken either.
///
/// Errors: `NotFound` for a number that is not open, or not inherited, or taken already.
pub fn take(number: RawFd) -> io::Result<OwnedFd> {
    take_if(number, |_| Ok(()))
}

/// The same for one that is what it has to be. Another stays open, for whoever it is meant for.
pub fn take_if(number: RawFd, check: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>) -> io::Result<OwnedFd> {
    let _turn = TAKING.lock();
    let none =
        || io::Error::new(io::ErrorKind::NotFound, "no descriptor of that number was passed to the program");
    if number <= libc::STDERR_FILENO {
        return Err(none());
    }
    // SAFETY: it asks about a number, and touches nothing.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    if flags < 0 || flags & libc::FD_CLOEXEC != 0 {
        return Err(none());
    }
    // SAFETY: it is open, and nobody takes or closes it meanwhile: it has no owner, and this is our turn.
    check(unsafe { BorrowedFd::borrow_raw(number) })?;
    // SAFETY: the flag of a descriptor that nobody in this program owns, see above.
    if unsafe { libc::fcntl(number, libc::F_SETFD, flags | libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and the flag says to the next caller that it has an owner now.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

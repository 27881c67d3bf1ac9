//! Descriptors that whoever started the program left open for it.

use driveline_engine::{inherited, net::Listener};
use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd},
    os::unix::net::UnixStream,
};

/// A number that another option means was closed when it was found to be no socket that listens.
#[test]
fn a_descriptor_that_is_refused_stays_open_for_whom_it_is_meant() {
    let (here, there) = UnixStream::pair().unwrap();
    // Without the flag that closes it for the next program: so it is as one that was inherited.
    // SAFETY: the descriptor is open, and the new one has no other owner.
    let number = unsafe { OwnedFd::from_raw_fd(libc::dup(there.as_raw_fd())) }.into_raw_fd();
    let refused = inherited::take_if(number, Listener::check).unwrap_err();
    assert_eq!(refused.to_string(), "the socket does not listen");
    let taken = UnixStream::from(inherited::take(number).unwrap());
    drop(there);
    io::Write::write_all(&mut &taken, b"x").unwrap();
    let mut byte = [0];
    io::Read::read_exact(&mut &here, &mut byte).unwrap();
    assert_eq!(inherited::take(number).unwrap_err().kind(), io::ErrorKind::NotFound, "it is taken");
}

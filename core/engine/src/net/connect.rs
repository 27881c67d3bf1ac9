//! Connecting to somebody who listens.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::{Stream, stream::unix_peer};
use crate::driver::Ready;

pub(super) const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

/// Makes [`Stream`]s of unix sockets.
#[derive(Debug)]
pub enum UnixStream {}

impl UnixStream {
    /// Connects to a path.
    pub async fn connect(path: impl AsRef<Path>) -> io::Result<Stream> {
        let address = SocketAddrUnix::new(path.as_ref())?;
        let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, FLAGS, None)?;
        let mut pause = Duration::from_micros(50);
        loop {
            match rustix::net::connect(&fd, &address) {
                Ok(()) => break,
                Err(Errno::INTR) => {}
                // The listener's queue is full. There is nothing to wait for in such a socket but time.
                Err(Errno::AGAIN) => {
                    crate::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_millis(10));
                }
                Err(error) => return Err(error.into()),
            }
        }
        let peer = unix_peer(&fd);
        Ok(Stream::new(fd, false, peer))
    }
}

/// Makes [`Stream`]s of TCP.
#[derive(Debug)]
pub enum TcpStream {}

impl TcpStream {
    /// Connects to the first address of `address` that answers. Names are resolved on the blocking pool.
    pub async fn connect(address: impl ToSocketAddrs + Send + 'static) -> io::Result<Stream> {
        let addresses: Vec<SocketAddr> =
            crate::unblock(move || address.to_socket_addrs().map(Iterator::collect)).await?;
        let mut last = io::Error::new(io::ErrorKind::InvalidInput, "the name has no address");
        for address in addresses {
            match connect_one(&address).await {
                Ok(fd) => {
                    let stream = Stream::new(fd, true, address.to_string());
                    stream.set_nodelay(true)?;
                    return Ok(stream);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

async fn connect_one(address: &SocketAddr) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let fd = rustix::net::socket_with(family, SocketType::STREAM, FLAGS, None)?;
    match rustix::net::connect(&fd, address) {
        Ok(()) => {}
        Err(Errno::INPROGRESS | Errno::INTR) => {
            Ready::new(&fd, libc::POLLOUT).await?;
            rustix::net::sockopt::socket_error(&fd)??;
        }
        Err(error) => return Err(error.into()),
    }
    Ok(fd)
}

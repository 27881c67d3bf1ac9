//! Sockets that accept connections.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};

use super::{Stream, connect::FLAGS};
use crate::driver::Ready;

/// So many connections wait to be accepted, if the system allows it.
const BACKLOG: i32 = 4096;

/// Accepts connections on a path. Dropping it unlinks the path, if its socket is still the one there.
#[derive(Debug)]
pub struct UnixListener {
    listener: std::os::unix::net::UnixListener,
    path: PathBuf,
    /// Device and inode of the socket file, if it goes with this.
    identity: Option<(u64, u64)>,
}

impl UnixListener {
    /// Listens on `path`. A socket file that a dead process left there is replaced; one that somebody listens on is
    /// `AddrInUse`, and so is any other kind of file. That takes a second: the kernel may end a killed process' ring, and with it
    /// the listening socket, some time after the process itself.
    pub fn bind(path: impl AsRef<Path>) -> io::Result<UnixListener> {
        let path = path.as_ref();
        let listener = match std::os::unix::net::UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && becomes_stale(path) => {
                std::fs::remove_file(path)?;
                std::os::unix::net::UnixListener::bind(path)?
            }
            other => other?,
        };
        listener.set_nonblocking(true)?;
        let found = std::fs::symlink_metadata(path)?;
        // Absolute, so that a later change of directory does not make it name something else.
        let path = std::path::absolute(path)?;
        Ok(UnixListener { listener, path, identity: Some((found.dev(), found.ino())) })
    }

    /// Listens on an abstract name, which is no file: nothing of it is left in the end.
    pub fn bind_abstract(name: &[u8]) -> io::Result<UnixListener> {
        let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
        let listener = std::os::unix::net::UnixListener::bind_addr(&address)?;
        listener.set_nonblocking(true)?;
        let path = format!("@{}", String::from_utf8_lossy(name).trim_end_matches('\0'));
        Ok(UnixListener { listener, path: path.into(), identity: None })
    }

    /// Waits for the next connection.
    ///
    /// Errors: among others no descriptors left (`EMFILE`); the caller waits a little and goes on.
    pub async fn accept(&self) -> io::Result<Stream> {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => return stream.try_into(),
                Err(error) => go_on(&self.listener, error).await?,
            }
        }
    }

    /// Where it listens: its path, or `@` and its abstract name; empty if it was inherited and has no path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for UnixListener {
    fn drop(&mut self) {
        let ours = std::fs::symlink_metadata(&self.path)
            .is_ok_and(|found| Some((found.dev(), found.ino())) == self.identity);
        if ours {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl AsFd for UnixListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// A socket file that nobody listens on, now or within a second.
fn becomes_stale(path: &Path) -> bool {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    let deadline = Instant::now() + Duration::from_secs(1);
    loop {
        if is_stale(path) {
            return true;
        }
        if !is_socket || Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A socket file that nobody listens on: connecting to it is refused. (To one that is merely busy it is not.)
fn is_stale(path: &Path) -> bool {
    if !std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
        return false;
    }
    let refused = || -> Result<bool, Errno> {
        let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, FLAGS, None)?;
        let address = SocketAddrUnix::new(path)?;
        Ok(rustix::net::connect(&fd, &address) == Err(Errno::CONNREFUSED))
    };
    refused().unwrap_or(false)
}

/// Accepts TCP connections.
#[derive(Debug)]
pub struct TcpListener {
    listener: std::net::TcpListener,
}

/// What a TCP listener does beyond the usual.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpOptions {
    /// `::` takes no clients of IPv4.
    pub only_ipv6: bool,
    /// The kernel looks now and then whether clients that say nothing are still there.
    pub keep_alive: bool,
}

impl TcpListener {
    /// Listens on `address` with options. Port 0 takes a free one.
    pub fn bind_with(address: SocketAddr, options: TcpOptions) -> io::Result<TcpListener> {
        use rustix::net::{bind, listen, socket_with, sockopt};
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let fd = socket_with(family, SocketType::STREAM, FLAGS, None)?;
        sockopt::set_socket_reuseaddr(&fd, true)?;
        // Clients have it from the socket that they came in on.
        sockopt::set_socket_keepalive(&fd, options.keep_alive)?;
        if address.is_ipv6() {
            sockopt::set_ipv6_v6only(&fd, options.only_ipv6)?;
        }
        bind(&fd, &address)?;
        listen(&fd, BACKLOG)?;
        Ok(TcpListener { listener: fd.into() })
    }

    /// Listens on the first address of `address` that can be had. Port 0 takes a free one, see [`TcpListener::local_addr`].
    pub fn bind(address: impl ToSocketAddrs) -> io::Result<TcpListener> {
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok(TcpListener { listener })
    }

    /// Waits for the next connection. It comes with Nagle's delay off.
    ///
    /// Errors: as for [`UnixListener::accept`].
    pub async fn accept(&self) -> io::Result<Stream> {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    match Stream::try_from(stream).and_then(|s| s.set_nodelay(true).map(|()| s)) {
                        Ok(stream) => return Ok(stream),
                        // Closed again between the two calls: not an error of the listener.
                        Err(error) => {
                            tracing::debug!(target: "driveline::engine", %error, "a connection went away")
                        }
                    }
                }
                Err(error) => go_on(&self.listener, error).await?,
            }
        }
    }

    /// Where it listens.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

impl AsFd for TcpListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// A socket that accepts connections, of either kind.
#[derive(Debug)]
pub enum Listener {
    /// A unix socket.
    Unix(UnixListener),
    /// TCP.
    Tcp(TcpListener),
}

impl Listener {
    /// A socket that somebody else made and listens on already, as systemd does. Its path is left alone in the end.
    ///
    /// Errors: `InvalidInput` for what is no such socket.
    pub fn inherited(fd: OwnedFd) -> io::Result<Listener> {
        Listener::check(fd.as_fd())?;
        match rustix::net::sockopt::socket_domain(&fd)? {
            AddressFamily::UNIX => {
                let listener = std::os::unix::net::UnixListener::from(fd);
                listener.set_nonblocking(true)?;
                let path = listener.local_addr()?.as_pathname().map(Path::to_owned).unwrap_or_default();
                Ok(Listener::Unix(UnixListener { listener, path, identity: None }))
            }
            AddressFamily::INET | AddressFamily::INET6 => {
                let listener = std::net::TcpListener::from(fd);
                listener.set_nonblocking(true)?;
                Ok(Listener::Tcp(TcpListener { listener }))
            }
            _ => unreachable!("it was checked"),
        }
    }

    /// Would [`Listener::inherited`] take it?
    pub fn check(fd: BorrowedFd<'_>) -> io::Result<()> {
        let wrong = |what| io::Error::new(io::ErrorKind::InvalidInput, what);
        let listens = rustix::net::sockopt::socket_acceptconn(fd);
        if !listens.map_err(|_| wrong("it is no socket"))? {
            return Err(wrong("the socket does not listen"));
        }
        match rustix::net::sockopt::socket_domain(fd)? {
            AddressFamily::UNIX | AddressFamily::INET | AddressFamily::INET6 => Ok(()),
            _ => Err(wrong("the socket is neither a unix socket nor TCP")),
        }
    }

    /// Waits for the next connection.
    ///
    /// Errors: as for [`UnixListener::accept`].
    pub async fn accept(&self) -> io::Result<Stream> {
        match self {
            Listener::Unix(listener) => listener.accept().await,
            Listener::Tcp(listener) => listener.accept().await,
        }
    }
}

impl From<UnixListener> for Listener {
    fn from(listener: UnixListener) -> Listener {
        Listener::Unix(listener)
    }
}

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Listener {
        Listener::Tcp(listener)
    }
}

/// After a failed accept: waits for the next connection, or hands the error on.
async fn go_on(listener: &impl AsFd, error: io::Error) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::WouldBlock => Ready::new(listener, libc::POLLIN).await,
        io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => Ok(()),
        _ => Err(error),
    }
}

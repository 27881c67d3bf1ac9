//! A connected stream socket.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use crate::driver::Ready;
use crate::executor::with_current;

/// The kernel takes no more parts in one call.
const PARTS_MAX: usize = 1024;
/// Parts of what a partial write left that are sent at a time.
const REST_PARTS: usize = 64;

/// A connected unix or TCP socket.
///
/// All operations take `&self`: one task may read while another writes. Two that read at once share the bytes in no
/// particular order. It can be moved to another engine thread between operations.
pub struct Stream {
    fd: OwnedFd,
    tcp: bool,
    peer: String,
}

impl Stream {
    /// Wraps a connected socket that is non-blocking.
    pub(super) fn new(fd: OwnedFd, tcp: bool, peer: String) -> Stream {
        Stream { fd, tcp, peer }
    }

    /// A connected pair of unix sockets.
    pub fn pair() -> io::Result<(Stream, Stream)> {
        let (one, other) = std::os::unix::net::UnixStream::pair()?;
        Ok((one.try_into()?, other.try_into()?))
    }

    /// Reads what is there, at least one byte; 0 is the end (or an empty `buffer`).
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.read_vectored(&mut [IoSliceMut::new(buffer)]).await
    }

    /// As [`Stream::read`], into several buffers, in order.
    pub async fn read_vectored(&self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        proceed().await;
        loop {
            match self.try_read_vectored(buffers) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    Ready::new(self, libc::POLLIN | libc::POLLRDHUP).await?;
                }
                other => return other,
            }
        }
    }

    /// Reads until `buffer` is full. Errors: `UnexpectedEof` if the end comes first.
    pub async fn read_exact(&self, mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            match self.read(buffer).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => buffer = &mut buffer[count..],
            }
        }
        Ok(())
    }

    /// Reads what is there now. Errors: `WouldBlock` if nothing is.
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.try_read_vectored(&mut [IoSliceMut::new(buffer)])
    }

    fn try_read_vectored(&self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        loop {
            let count = buffers.len().min(PARTS_MAX);
            let result = if let [buffer] = &mut buffers[..] {
                // SAFETY: the buffer is borrowed for the call.
                unsafe { libc::recv(self.fd(), buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_DONTWAIT) }
            } else {
                // SAFETY: IoSliceMut has the layout of iovec; the socket is non-blocking.
                unsafe { libc::readv(self.fd(), buffers.as_mut_ptr().cast(), count as i32) }
            };
            match checked(result) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    /// Writes all of `data`.
    pub async fn write_all(&self, data: &[u8]) -> io::Result<()> {
        self.write_all_vectored(&[IoSlice::new(data)]).await
    }

    /// Writes all parts, in order, however many calls it takes: one, when the socket has room.
    ///
    /// A write that is dropped or fails half-way has written an unknown part: the connection is of no more use.
    pub async fn write_all_vectored(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        proceed().await;
        let mut rest = Rest { parts, offset: 0 };
        rest.advance(0);
        while !rest.parts.is_empty() {
            match self.try_write(&rest) {
                Ok(count) => rest.advance(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    Ready::new(self, libc::POLLOUT).await?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn try_write(&self, rest: &Rest<'_, '_>) -> io::Result<usize> {
        loop {
            let result = if rest.offset == 0 {
                self.send(&rest.parts[..rest.parts.len().min(PARTS_MAX)])
            } else {
                // The first part is half written: a copy of the table in which it begins later.
                let mut table = [IoSlice::new(&[]); REST_PARTS];
                let count = rest.parts.len().min(REST_PARTS);
                table[..count].copy_from_slice(&rest.parts[..count]);
                table[0].advance(rest.offset);
                self.send(&table[..count])
            };
            match checked(result) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    fn send(&self, parts: &[IoSlice<'_>]) -> isize {
        const FLAGS: i32 = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        if let [part] = parts {
            // SAFETY: the part is borrowed for the call.
            return unsafe { libc::send(self.fd(), part.as_ptr().cast(), part.len(), FLAGS) };
        }
        // SAFETY: all-zero is a valid msghdr.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        // The kernel only reads the parts; IoSlice has the layout of iovec.
        message.msg_iov = parts.as_ptr().cast_mut().cast();
        message.msg_iovlen = parts.len() as _;
        // SAFETY: the message and its parts are borrowed for the call.
        unsafe { libc::sendmsg(self.fd(), &raw const message, FLAGS) }
    }

    /// Ends one or both directions; the other side reads the end.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        let how = match how {
            Shutdown::Read => rustix::net::Shutdown::Read,
            Shutdown::Write => rustix::net::Shutdown::Write,
            Shutdown::Both => rustix::net::Shutdown::Both,
        };
        Ok(rustix::net::shutdown(&self.fd, how)?)
    }

    /// TCP: send small packets at once. Nothing to do on a unix socket.
    pub fn set_nodelay(&self, on: bool) -> io::Result<()> {
        if self.tcp {
            rustix::net::sockopt::set_tcp_nodelay(&self.fd, on)?;
        }
        Ok(())
    }

    /// TCP: notice a peer that is gone without a word. Nothing to do on a unix socket.
    pub fn set_keepalive(&self, on: bool) -> io::Result<()> {
        if self.tcp {
            rustix::net::sockopt::set_socket_keepalive(&self.fd, on)?;
        }
        Ok(())
    }

    /// How much the kernel keeps for this side, as far as the system's limits allow; bigger ones mean fewer wake-ups for
    /// big messages.
    pub fn set_buffer_sizes(&self, receive: usize, send: usize) -> io::Result<()> {
        rustix::net::sockopt::set_socket_recv_buffer_size(&self.fd, receive)?;
        Ok(rustix::net::sockopt::set_socket_send_buffer_size(&self.fd, send)?)
    }

    /// Who is at the other end, for people: an address and port, or `unix` with the process that connected.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Whether it is TCP; else it is a unix socket.
    pub fn is_tcp(&self) -> bool {
        self.tcp
    }

    /// Two owned halves, for a task that reads and one that writes. Dropping the write half ends that direction.
    pub fn into_split(self) -> (ReadHalf, WriteHalf) {
        let stream = Arc::new(self);
        (ReadHalf { stream: Arc::clone(&stream) }, WriteHalf { stream })
    }

    fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl TryFrom<std::os::unix::net::UnixStream> for Stream {
    type Error = io::Error;

    fn try_from(stream: std::os::unix::net::UnixStream) -> io::Result<Stream> {
        stream.set_nonblocking(true)?;
        let fd = OwnedFd::from(stream);
        let peer = unix_peer(&fd);
        Ok(Stream::new(fd, false, peer))
    }
}

impl TryFrom<std::net::TcpStream> for Stream {
    type Error = io::Error;

    fn try_from(stream: std::net::TcpStream) -> io::Result<Stream> {
        stream.set_nonblocking(true)?;
        let peer = stream.peer_addr()?.to_string();
        Ok(Stream::new(stream.into(), true, peer))
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream").field("fd", &self.fd()).field("peer", &self.peer).finish()
    }
}

/// The reading side of a [`Stream`].
#[derive(Debug)]
pub struct ReadHalf {
    stream: Arc<Stream>,
}

/// The writing side of a [`Stream`].
#[derive(Debug)]
pub struct WriteHalf {
    stream: Arc<Stream>,
}

impl ReadHalf {
    /// See [`Stream::read`].
    pub async fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.read(buffer).await
    }

    /// See [`Stream::read_exact`].
    pub async fn read_exact(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        self.stream.read_exact(buffer).await
    }

    /// See [`Stream::try_read`].
    pub fn try_read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.try_read(buffer)
    }

    /// The whole, for what neither half does alone.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }
}

impl WriteHalf {
    /// See [`Stream::write_all`].
    pub async fn write_all(&mut self, data: &[u8]) -> io::Result<()> {
        self.stream.write_all(data).await
    }

    /// See [`Stream::write_all_vectored`].
    pub async fn write_all_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        self.stream.write_all_vectored(parts).await
    }

    /// The whole, for what neither half does alone.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }
}

impl Drop for WriteHalf {
    fn drop(&mut self) {
        // Gone already if the other side was faster.
        let _ = self.stream.shutdown(Shutdown::Write);
    }
}

/// What is left to write: `parts`, of the first of which `offset` bytes are written.
struct Rest<'p, 'd> {
    parts: &'p [IoSlice<'d>],
    offset: usize,
}

impl Rest<'_, '_> {
    fn advance(&mut self, count: usize) {
        self.offset += count;
        while let [first, rest @ ..] = self.parts
            && self.offset >= first.len()
        {
            self.offset -= first.len();
            self.parts = rest;
        }
    }
}

/// Lets other tasks run when this one has done much without waiting.
async fn proceed() {
    std::future::poll_fn(|cx| {
        with_current(|worker| worker.expect("sockets are used on an engine thread").poll_proceed(1, cx))
    })
    .await;
}

pub(super) fn unix_peer(fd: &OwnedFd) -> String {
    match rustix::net::sockopt::socket_peercred(fd) {
        Ok(peer) => format!("unix (pid {}, uid {})", peer.pid.as_raw_pid(), peer.uid.as_raw()),
        Err(_) => "unix".to_owned(),
    }
}

fn checked(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

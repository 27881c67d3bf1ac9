//! Where a server is, and the way there.

use driveline_engine::net::{Stream, TcpStream, UnixStream};
use std::{
    fmt,
    io::{self, ErrorKind},
    net::{SocketAddr, ToSocketAddrs},
    path::PathBuf,
};

/// What is asked for as buffers of a unix socket: what it starts with is less than one request of 256 KiB.
const UNIX_SOCKET_BYTES: usize = 1 << 20;

#[derive(Clone, Debug)]
pub(super) enum Address {
    Unix(PathBuf),
    /// With or without keep-alive.
    Inet(Inet, bool),
}

#[derive(Clone, Debug)]
pub(super) struct Inet {
    pub(super) host: String,
    pub(super) port: u16,
    /// The host is an address, and not looked up.
    pub(super) numeric: bool,
    pub(super) ipv4: Option<bool>,
    pub(super) ipv6: Option<bool>,
}

impl Address {
    pub(super) async fn connect(&self) -> io::Result<Stream> {
        match self {
            Address::Unix(path) => {
                let stream = UnixStream::connect(path).await?;
                // The system allows what it likes.
                let _ = stream.set_buffer_sizes(UNIX_SOCKET_BYTES, UNIX_SOCKET_BYTES);
                Ok(stream)
            }
            Address::Inet(inet, keep_alive) => {
                let stream = inet.connect().await?;
                stream.set_nodelay(true)?;
                stream.set_keepalive(*keep_alive)?;
                Ok(stream)
            }
        }
    }

    /// The host, which a certificate is expected to name.
    pub(super) fn host(&self) -> Option<&str> {
        match self {
            Address::Unix(_) => None,
            Address::Inet(inet, _) => Some(&inet.host),
        }
    }

    /// A URI that leads to an export there.
    ///
    /// Source: QEMU block/nbd.c, `nbd_refresh_filename`.
    pub(super) fn uri(&self, export: &str) -> String {
        match self {
            Address::Unix(path) => format!("nbd+unix:///{export}?socket={}", path.display()),
            Address::Inet(inet, _) if export.is_empty() => format!("nbd://{inet}"),
            Address::Inet(inet, _) => format!("nbd://{inet}/{export}"),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "{}", path.display()),
            Address::Inet(inet, _) => write!(f, "{inet}"),
        }
    }
}

impl fmt::Display for Inet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

impl Inet {
    /// Is an address one that the options want? Naming one family rules the other out, unless that is named too.
    fn wants(&self, address: &SocketAddr) -> bool {
        let (this, other) = if address.is_ipv4() { (self.ipv4, self.ipv6) } else { (self.ipv6, self.ipv4) };
        this.unwrap_or(other != Some(true))
    }

    async fn connect(&self) -> io::Result<Stream> {
        let place = (self.host.clone(), self.port);
        let found: Vec<SocketAddr> =
            driveline_engine::unblock(move || place.to_socket_addrs().map(Iterator::collect)).await?;
        let mut last = io::Error::new(ErrorKind::NotFound, "the name has no address of that family");
        for address in found.into_iter().filter(|address| self.wants(address)) {
            match TcpStream::connect(address).await {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

//! The sockets that exports are served on: taken, and named for clients.

use super::inet;
use crate::{config::Address, notify};
use driveline_engine::net::{Listener, TcpListener, UnixListener};
use driveline_graph::{Error, Kind, Result};
use driveline_nbd::Address as Socket;
use std::{
    collections::BTreeMap,
    net::{SocketAddr, ToSocketAddrs},
};

/// Sockets that are taken for exports to come. Clients can connect, and wait. Dropped, they are given up.
#[derive(Debug, Default)]
pub struct Reserved(BTreeMap<Address, Listener>);

impl Reserved {
    /// Takes one more, unless it is among them.
    pub(super) fn add(&mut self, address: &Address) -> Result<()> {
        if !self.0.contains_key(address) {
            self.0.insert(address.clone(), listen(address)?);
        }
        Ok(())
    }

    /// The socket for an address, taken now if it was not before.
    pub(super) fn take(&mut self, address: &Address) -> Result<Listener> {
        self.0.remove(address).map_or_else(|| listen(address), Ok)
    }
}

fn listen(address: &Address) -> Result<Listener> {
    bind(address).map_err(|error| match error {
        Unheard::Io(error) | Unheard::Name(error) => {
            let message = format_args!("cannot listen on {address}: {error}");
            Error::new(Kind::of_errno(error.raw_os_error().unwrap_or_default()), message)
        }
        Unheard::Passed(text) => Error::new(Kind::Invalid, text),
    })
}

/// Why nobody can be heard on an address.
pub(super) enum Unheard {
    /// It cannot be had.
    Io(std::io::Error),
    /// Its name has no number.
    Name(std::io::Error),
    /// No such socket was passed.
    Passed(String),
}

impl Unheard {
    /// For monitors. Source: the texts of QEMU's util/qemu-sockets.c.
    pub(super) fn in_qemus_words(self, address: &Address) -> Error {
        match self {
            Unheard::Io(error) if matches!(address, Address::Unix(_) | Address::Abstract(_)) => {
                let text = format!("Failed to bind socket to {address}: {}", reason(&error));
                Error::new(Kind::of_errno(error.raw_os_error().unwrap_or_default()), text)
            }
            Unheard::Io(error) => {
                let text = format!("Failed to find an available port: {}", reason(&error));
                Error::new(Kind::of_errno(error.raw_os_error().unwrap_or_default()), text)
            }
            Unheard::Name(error) => {
                let why = reason(&error);
                let why = why.rsplit(": ").next().unwrap_or_default();
                Error::new(Kind::Invalid, format_args!("address resolution failed for {address}: {why}"))
            }
            Unheard::Passed(text) => Error::new(Kind::Invalid, text),
        }
    }
}

impl From<Unheard> for Error {
    fn from(unheard: Unheard) -> Self {
        match unheard {
            Unheard::Io(error) | Unheard::Name(error) => {
                Error::new(Kind::of_errno(error.raw_os_error().unwrap_or_default()), error)
            }
            Unheard::Passed(text) => Error::new(Kind::Invalid, text),
        }
    }
}

/// What the system says, without the number.
pub(crate) fn reason(error: &std::io::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error") {
        Some((text, _)) => text.to_owned(),
        None => text,
    }
}

pub(super) fn bind(address: &Address) -> Result<Listener, Unheard> {
    match address {
        Address::Unix(path) => UnixListener::bind(path).map(Listener::from).map_err(Unheard::Io),
        Address::Tcp(text) => {
            let mut last = std::io::Error::new(std::io::ErrorKind::NotFound, "the name has no address");
            for found in text.to_socket_addrs().map_err(Unheard::Name)? {
                match TcpListener::bind(found) {
                    Ok(listener) => return Ok(listener.into()),
                    Err(error) => last = error,
                }
            }
            Err(Unheard::Io(last))
        }
        Address::Passed(name) => notify::socket(name).map_err(Unheard::Passed),
        Address::Inet(inet) => inet::bind(inet).map(Listener::from),
        Address::Abstract(name) => UnixListener::bind_abstract(name).map(Listener::from).map_err(Unheard::Io),
    }
}

/// As it is bound: port 0 is a real one here.
pub(super) fn bound(listener: &Listener) -> Result<Socket> {
    Ok(match listener {
        Listener::Unix(listener) => Socket::Unix(listener.path().to_owned()),
        Listener::Tcp(listener) => Socket::Tcp(listener.local_addr().map_err(Unheard::Io)?),
    })
}

/// An address that NBD's clients take.
pub fn uri(socket: &Socket, name: &str) -> String {
    match socket {
        Socket::Unix(path) => {
            format!("nbd+unix:///{}?socket={}", escape(name.as_bytes()), escape_path(path))
        }
        Socket::Tcp(SocketAddr::V6(address)) if address.ip().is_unspecified() => {
            format!("nbd://[::1]:{}/{}", address.port(), escape(name.as_bytes()))
        }
        Socket::Tcp(SocketAddr::V4(address)) if address.ip().is_unspecified() => {
            format!("nbd://127.0.0.1:{}/{}", address.port(), escape(name.as_bytes()))
        }
        Socket::Tcp(address) => format!("nbd://{address}/{}", escape(name.as_bytes())),
    }
}

fn escape_path(path: &std::path::Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    escape(path.as_os_str().as_bytes())
}

/// Percent-encoding of what a URI takes neither in a path nor in a query.
fn escape(bytes: &[u8]) -> String {
    let mut out = String::new();
    for byte in bytes {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' | b':' => {
                out.push(char::from(*byte));
            }
            other => out.push_str(&format!("%{other:02X}")),
        }
    }
    out
}

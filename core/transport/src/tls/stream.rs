//! A transport upgraded to TLS.

use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::pin::pin;
use std::task::{Context, Waker};

use rustls::{CertificateError, ClientConnection, Connection, Error, ServerConnection};

use super::name;
use crate::{ClientTls, ServerTls, TlsError, Transport};

/// How much is read from below at once: a few records of the largest size.
const INCOMING_BYTES: usize = 64 << 10;
/// How much is encrypted before it is sent, so that a large write does not need twice its memory.
const OUTGOING_BYTES: usize = 256 << 10;

/// TLS over a transport.
///
/// One reader and one writer, from one thread, as everywhere; the reader never writes. An answer that the protocol owes (to
/// an update of keys) goes out with the next write, which is when it is due.
pub struct TlsStream<T> {
    below: T,
    /// Never borrowed over an await.
    tls: RefCell<Connection>,
    incoming: RefCell<Incoming>,
    /// Memory of the writer, kept from one write to the next.
    outgoing: RefCell<Vec<u8>>,
}

/// Bytes from below that the library has not taken yet.
#[derive(Default)]
struct Incoming {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// There will be no more.
    ended: bool,
}

impl<T> fmt::Debug for TlsStream<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TlsStream")
    }
}

impl<T: Transport> TlsStream<T> {
    /// Upgrades a connection that a client asked to.
    ///
    /// Errors: the client is no client of TLS, or it shows no certificate that we trust; the text says which.
    pub async fn accept(below: T, tls: &ServerTls) -> io::Result<TlsStream<T>> {
        let connection = ServerConnection::new(tls.0.clone()).map_err(|error| broken(&error))?;
        TlsStream::upgrade(below, connection.into()).await
    }

    /// Upgrades a connection to a server, which has to be `hostname`.
    ///
    /// Errors: as [`TlsStream::accept`], or those of [`ClientTls::check_name`]. A server that does not like *our* certificate says so
    /// later, to the first read.
    pub async fn connect(below: T, tls: &ClientTls, hostname: Option<&str>) -> io::Result<TlsStream<T>> {
        let invalid = |error: TlsError| io::Error::new(io::ErrorKind::InvalidInput, error);
        let name = tls.server_name(hostname).map_err(invalid)?;
        let connection = ClientConnection::new(tls.config.clone(), name).map_err(|error| broken(&error))?;
        TlsStream::upgrade(below, connection.into()).await
    }

    async fn upgrade(below: T, mut connection: Connection) -> io::Result<TlsStream<T>> {
        // What is given to the library is sent before more is given: its own limit would only cut writes short.
        connection.set_buffer_limit(None);
        let stream = TlsStream {
            below,
            tls: RefCell::new(connection),
            incoming: RefCell::default(),
            outgoing: RefCell::default(),
        };
        loop {
            stream.send_pending().await?;
            if !stream.tls.borrow().is_handshaking() {
                return Ok(stream);
            }
            if !stream.take_in().await? {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the connection ended in the TLS handshake",
                ));
            }
        }
    }

    /// Whose the peer's certificate is: its distinguished name, as QEMU spells it (`C=GB,O=Home,CN=laptop`). `None`: it showed no
    /// certificate, or one whose subject is no name.
    pub fn peer_name(&self) -> Option<String> {
        let tls = self.tls.borrow();
        let own = tls.peer_certificates()?.first()?;
        name::spelled(webpki::EndEntityCert::try_from(own).ok()?.subject())
    }

    /// The alert that the peer ended the connection with, if it sent one. What else comes is thrown away.
    pub async fn last_words(&self) -> Option<io::Error> {
        loop {
            match self.take_in().await {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) if error.get_ref().is_some() => return Some(error),
                Err(_) => return None,
            }
        }
    }

    /// Says that nothing more will be sent. Whoever is left without this word may take the end for an attack.
    pub async fn finish(&self) -> io::Result<()> {
        self.tls.borrow_mut().send_close_notify();
        self.send_pending().await
    }

    /// Sends what the library has ready.
    async fn send_pending(&self) -> io::Result<()> {
        let mut out = self.outgoing.take();
        out.clear();
        {
            let mut tls = self.tls.borrow_mut();
            while tls.wants_write() {
                tls.write_tls(&mut out)?;
            }
        }
        if !out.is_empty() {
            self.below.write_all(&[IoSlice::new(&out)]).await?;
        }
        self.outgoing.replace(out);
        Ok(())
    }

    /// Gives the library more to work with. `false`: there is no more.
    async fn take_in(&self) -> io::Result<bool> {
        if self.digest()? {
            return Ok(true);
        }
        let mut incoming = self.incoming.take();
        if incoming.ended {
            self.incoming.replace(incoming);
            return Ok(false);
        }
        if incoming.buffer.is_empty() {
            incoming.buffer = vec![0; INCOMING_BYTES].into_boxed_slice();
        }
        let read = self.below.read(&mut [IoSliceMut::new(&mut incoming.buffer)]).await;
        if let Ok(read) = read {
            (incoming.start, incoming.end) = (0, read);
            incoming.ended = read == 0;
        }
        self.incoming.replace(incoming);
        if read? == 0 {
            return Ok(false);
        }
        let outcome = self.digest();
        if outcome.is_err() {
            // The other side may learn why, if it listens; the error is ours to report in any case. Later than in the handshake,
            // which has a limit, nobody waits for one who does not listen.
            let handshaking = self.tls.borrow().is_handshaking();
            let mut told = pin!(self.send_pending());
            if handshaking {
                let _ = told.await;
            } else {
                let _ = told.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            }
        }
        outcome
    }

    /// Lets the library take of what is here, as much as it likes at once. `false`: nothing is here.
    fn digest(&self) -> io::Result<bool> {
        let mut incoming = self.incoming.borrow_mut();
        let Incoming { buffer, start, end, .. } = &mut *incoming;
        if start == end {
            return Ok(false);
        }
        let mut tls = self.tls.borrow_mut();
        let mut here = &buffer[*start..*end];
        *start += tls.read_tls(&mut here)?;
        tls.process_new_packets().map_err(|error| broken(&error))?;
        Ok(true)
    }

    /// Reads what is decrypted. `None`: nothing is.
    fn read_plain(&self, parts: &mut [IoSliceMut<'_>]) -> io::Result<Option<usize>> {
        let mut tls = self.tls.borrow_mut();
        let mut total = 0;
        for part in parts {
            let mut filled = 0;
            while filled < part.len() {
                match tls.reader().read(&mut part[filled..]) {
                    Ok(0) => return Ok(Some(total)),
                    Ok(read) => (filled, total) = (filled + read, total + read),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        return Ok((total > 0).then_some(total));
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(Some(total))
    }
}

impl<T: Transport> Transport for TlsStream<T> {
    async fn read(&self, parts: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        loop {
            if let Some(read) = self.read_plain(parts)? {
                return Ok(read);
            }
            // An end without farewell is an end: NBD has a farewell of its own, and every message a length.
            if !self.take_in().await? {
                return Ok(0);
            }
        }
    }

    async fn write_all(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let mut waiting = 0;
        for part in parts {
            for piece in part.chunks(OUTGOING_BYTES) {
                self.tls.borrow_mut().writer().write_all(piece)?;
                waiting += piece.len();
                if waiting >= OUTGOING_BYTES {
                    self.send_pending().await?;
                    waiting = 0;
                }
            }
        }
        self.send_pending().await
    }
}

/// What went wrong, in words that people who know QEMU know.
fn broken(error: &Error) -> io::Error {
    let text = match error {
        Error::InvalidCertificate(why) => match why {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                "The certificate has expired".to_owned()
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "The certificate is not yet activated".to_owned()
            }
            CertificateError::Revoked => "The certificate has been revoked".to_owned(),
            // An authority of the same name that did not sign it is another one.
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                "The certificate hasn't got a known issuer".to_owned()
            }
            CertificateError::NotValidForName => "Certificate does not match the hostname".to_owned(),
            CertificateError::NotValidForNameContext { expected, .. } => {
                format!("Certificate does not match the hostname {}", expected.to_str())
            }
            other => format!("The certificate is not trusted: {other}"),
        },
        Error::NoCertificatesPresented => "No certificate was found".to_owned(),
        other => other.to_string(),
    };
    io::Error::new(io::ErrorKind::InvalidData, format!("TLS handshake or session failed: {text}"))
}

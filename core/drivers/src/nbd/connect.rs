//! From an address to a connection that takes requests.

use super::{
    address::Address,
    link::within,
    negotiate::{Wanted, greet, haggle, start_tls},
    terms::Terms,
};
use driveline_engine::net::Stream;
use driveline_transport::{ClientTls, Receive, TlsStream};
use std::{io, time::Duration};

/// A server that takes longer over the handshake is no use.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(30);

/// Where to connect to, and how.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) address: Address,
    pub(super) wanted: Wanted,
    /// The credentials, and the name that the server's certificate has to have.
    pub(super) tls: Option<(ClientTls, Option<String>)>,
    pub(super) reconnect_delay: Duration,
    pub(super) open_timeout: Duration,
}

/// A connection after its handshake.
#[derive(Debug)]
pub(super) struct Connected {
    pub(super) way: Way,
    pub(super) receive: Receive,
    pub(super) terms: Terms,
}

#[derive(Debug)]
pub(super) enum Way {
    Plain(Stream),
    Tls(Box<TlsStream<Stream>>),
}

pub(super) async fn connect(target: &Target) -> io::Result<Connected> {
    let slow = || io::Error::new(io::ErrorKind::TimedOut, "the server takes too long over the handshake");
    within(HANDSHAKE_LIMIT, handshake(target)).await.ok_or_else(slow)?
}

async fn handshake(target: &Target) -> io::Result<Connected> {
    let stream = target.address.connect().await.map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("Failed to connect to '{}': {}", target.address, os_text(&error)),
        )
    })?;
    let mut receive = Receive::new();
    greet(&stream, &mut receive).await?;
    match &target.tls {
        None => {
            let terms = haggle(&stream, &mut receive, &target.wanted).await?;
            Ok(Connected { way: Way::Plain(stream), receive, terms })
        }
        Some((tls, hostname)) => {
            start_tls(&stream, &mut receive).await?;
            let stream = TlsStream::connect(stream, tls, hostname.as_deref()).await?;
            let mut receive = Receive::new();
            let terms = match haggle(&stream, &mut receive, &target.wanted).await {
                Ok(terms) => terms,
                // A server that hung up on us may have said why.
                Err(error) => return Err(stream.last_words().await.map_or(error, Into::into)),
            };
            Ok(Connected { way: Way::Tls(Box::new(stream)), receive, terms })
        }
    }
}

/// The text of an error without its number, as C has it.
fn os_text(error: &io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error ") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

//! Why a connection ended otherwise than by agreement.

use std::io;

use driveline_wire::{Malformed, OptionCode};

/// What a client did, or what happened to its connection. Nobody but the log is interested.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The connection failed.
    #[error("connection")]
    Io(#[from] io::Error),
    /// The client sent what is no message.
    #[error("malformed message")]
    Malformed(#[from] Malformed),
    /// The client announced more data than anyone would read.
    #[error("{length} bytes of data announced for {what}")]
    TooLong {
        /// For which message.
        what: String,
        /// How many bytes.
        length: u64,
    },
    /// The client set handshake flags that were not offered.
    #[error("unknown client flags {flags:#x}")]
    ClientFlags {
        /// The flags.
        flags: u32,
    },
    /// The client sent an option that cannot be refused in any other way.
    #[error("option {option} refused: {why}")]
    Option {
        /// Which option.
        option: OptionCode,
        /// Why.
        why: &'static str,
    },
    /// The client sent something between its wish for TLS and the answer.
    #[error("data in the clear before TLS")]
    BeforeTls,
    /// The client and we did not come to TLS.
    #[error("TLS handshake")]
    Tls(#[source] io::Error),
    /// The client is one of those that may not connect.
    #[error("{why}")]
    NotAuthorized {
        /// Who it is, and what forbids it.
        why: String,
    },
    /// The client took too long to choose an export.
    #[error("handshake took too long")]
    HandshakeTimeout,
}

//! What is wrong with credentials.

use std::io;
use std::path::PathBuf;

/// Why credentials cannot be used. The texts say what QEMU's say.
///
/// Source: QEMU crypto/tlscredsx509.c.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file that has to be there cannot be read.
    #[error("Unable to access credentials {path}: {error}", path = path.display())]
    Access {
        /// The file.
        path: PathBuf,
        /// Why not. It is part of the text, and so no source.
        error: io::Error,
    },
    /// A file holds something else.
    #[error("Unable to import {what} {path}: {why}", path = path.display())]
    Import {
        /// What it should hold.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A certificate is of no use to us.
    #[error("{text}")]
    Certificate {
        /// Which, and why.
        text: String,
    },
    /// No credentials of that name.
    #[error("No TLS credentials with id '{id}'")]
    NotFound {
        /// The name.
        id: String,
    },
    /// The name is taken.
    #[error("attempt to add duplicate property '{id}' to object (type 'container')")]
    Exists {
        /// The name.
        id: String,
    },
    /// The credentials are for the other end.
    #[error("Expected TLS credentials for a {expected} endpoint")]
    Endpoint {
        /// Which end they should be for.
        expected: &'static str,
    },
    /// A client has to know whom it talks to.
    #[error("No hostname for certificate validation")]
    NoHostname,
    /// What was given as a host name is none.
    #[error("'{name}' is neither a host name nor an address")]
    Hostname {
        /// What was given.
        name: String,
    },
}

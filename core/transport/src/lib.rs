//! A connection as both sides of NBD use it: bytes over a socket, or over TLS on a socket.
//!
//! It is what server and client share below the protocol, and knows nothing of NBD. It is no general TLS library either:
//! credentials are what QEMU's `tls-creds-x509` takes, a directory with files of fixed names.
//!
//! Three nouns:
//! * a [`Transport`] carries bytes in order, for one reader and one writer;
//! * a [`Receive`] reads messages from one, small ones through a buffer and payload straight to where it belongs;
//! * [`TlsCreds`] describe a directory of certificates; loaded they are [`ServerTls`] or [`ClientTls`], which upgrade
//!   a transport to a [`TlsStream`]. A [`TlsRegistry`] keeps loaded ones by name.
//!
//! ```
//! use driveline_transport::{Endpoint, TlsCreds, TlsRegistry};
//!
//! let registry = TlsRegistry::default();
//! let creds = TlsCreds::new("/nowhere", Endpoint::Server);
//! let error = registry.add("tls0", &creds).unwrap_err().to_string();
//! assert!(error.starts_with("Unable to access credentials /nowhere/ca-cert.pem"), "{error}");
//! ```

#![forbid(unsafe_code)]

mod receive;
mod tls;
mod transport;

pub use receive::Receive;
pub use tls::{ClientTls, Endpoint, ServerTls, TlsCreds, TlsError, TlsRegistry, TlsStream};
pub use transport::Transport;

//! TLS by x509 certificates, as QEMU's `tls-creds-x509` has it.
//!
//! Pre-shared keys and anonymous credentials, QEMU's other two kinds, are not to be had: the library (rustls) has neither.
//! Names of servers are looked for among the alternative names of a certificate; a common name counts for nothing.

mod creds;
mod error;
mod files;
mod name;
mod registry;
mod sanity;
mod stream;
mod trust;

pub use creds::{ClientTls, Endpoint, ServerTls, TlsCreds};
pub use error::TlsError;
pub use registry::TlsRegistry;
pub use stream::TlsStream;

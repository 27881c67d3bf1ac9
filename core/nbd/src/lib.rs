//! Network block device: the protocol as a pure codec, and (on top of it) the server that exports drives.
//!
//! [`wire`] knows the bytes and nothing else: no socket, no storage, no thread. Server and client share it.

#![forbid(unsafe_code)]

mod contexts;
mod export;
mod fault;
mod handshake;
mod limits;
mod receive;
mod serve;
mod server;
mod session;
mod transport;
pub mod wire;

pub use export::{AddError, Export, Exports, Removed, Storage};
pub use fault::Fault;
pub use limits::{PAYLOAD_BYTES_MAX, REQUESTS_MAX};
pub use serve::serve;
pub use server::{Address, Server, ServerOptions};
pub use transport::Transport;

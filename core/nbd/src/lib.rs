//! Network block device: the protocol as a pure codec, and (on top of it) the server that exports drives.
//!
//! [`wire`] knows the bytes and nothing else: no socket, no storage, no thread. Server and client share it.

#![forbid(unsafe_code)]

pub mod wire;

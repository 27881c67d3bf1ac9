//! Built-in drivers of a storage graph.
//!
//! | driver | kind | what it is |
//! |---|---|---|
//! | [`file`](mod@file) | protocol | a regular file or a block device |
//! | [`memory`] | protocol | bytes in memory, sparse |
//! | [`nbd`] | protocol | an export of an NBD server |
//! | [`null`] | protocol | takes all writes and keeps none |
//! | [`raw`] | format | its file as it is, or a window of it |
//! | [`copy_before_write`] | filter | copies data to a target before it is overwritten |
//! | [`snapshot_access`] | format | the point in time of a copy-before-write node |
//! | [`qcow2`] | format | an image with a backing chain |
//! | [`quorum`] | format | several children that vote about what they hold |
//!
//! The crate knows nothing of graphs beyond the contract of a driver ([`driveline_graph::Driver`]), and nothing of
//! exports, jobs or configuration files. The modules say which options a driver takes.
//!
//! Three nouns:
//! * a *driver* opens nodes of its kind, and says which options and children it takes;
//! * a *node* is what it opened: operations on the data path, and questions and changes beside it;
//! * [`conformance`] is what every writable node must do, as a check that each driver here passes.
//!
//! [`conformance`] shows how a node is opened and checked.
#![deny(unsafe_code)]

pub mod conformance;
pub mod copy_before_write;
#[allow(unsafe_code)] // memory is lent to the kernel here
pub mod file;
pub mod memory;
pub mod nbd;
pub mod null;
mod options;
pub mod qcow2;
pub mod quorum;
mod range;
pub mod raw;
pub mod snapshot_access;

pub use copy_before_write::CopyBeforeWriteDriver;
pub use file::FileDriver;
pub use memory::MemoryDriver;
pub use nbd::NbdDriver;
pub use null::NullDriver;
pub use options::{Bytes, NotBytes};
pub use quorum::QuorumDriver;
pub use raw::RawDriver;
pub use snapshot_access::SnapshotAccessDriver;

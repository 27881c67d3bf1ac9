//! Built-in drivers of a storage graph.
//!
//! Protocols are leaves: [`FileDriver`], [`NullDriver`], [`MemoryDriver`]. Formats read and write a child:
//! [`RawDriver`], [`qcow2`]. The crate knows
//! nothing of graphs beyond the contract of a driver ([`driveline_graph::Driver`]), and nothing of exports, jobs or
//! configuration files.
//!
//! Three nouns:
//! * a *driver* opens nodes of its kind, and says which options and children it takes;
//! * a *node* is what it opened: operations on the data path, and questions and changes beside it;
//! * [`conformance`] is what every writable node must do, as a check that each driver here passes.
//!
//! [`conformance`] shows how a node is opened and checked.
#![deny(unsafe_code)]

pub mod conformance;
#[allow(unsafe_code)] // memory is lent to the kernel here
mod file;
mod memory;
mod null;
mod options;
pub mod qcow2;
mod range;
mod raw;

pub use file::FileDriver;
pub use memory::MemoryDriver;
pub use null::NullDriver;
pub use options::{Bytes, NotBytes};
pub use raw::RawDriver;

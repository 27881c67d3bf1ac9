//! Built-in drivers of a storage graph.
//!
//! The crate knows nothing of graphs beyond the contract of a driver
//! ([`driveline_graph::Driver`]), and nothing of exports, jobs or configuration files.
#![deny(unsafe_code)]

mod options;

pub use options::Bytes;

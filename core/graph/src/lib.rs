//! Nodes, edges, permissions, drain and graph transactions.
#![forbid(unsafe_code)]

mod driver;
mod error;

pub use driver::{
    BoxFuture, ChildSpec, Description, Driver, DriverKind, ImpliedChild, Missing, OpenArgs, OpenChild,
    OpenNode, Options, Permissions, Role, parse_options,
};
pub use error::{Error, Kind, Result};

//! What scenario tests are made of: a daemon as a process, a QMP client, an NBD guest, and other people's tools.

mod daemon;
mod guest;
mod map;
mod qmp;
mod tools;
mod vm;

pub(crate) use daemon::Daemon;
pub(crate) use guest::Guest;
pub(crate) use map::{dirty, extents};
pub(crate) use qmp::Qmp;
pub(crate) use tools::{have, output, run};
pub(crate) use vm::Vm;

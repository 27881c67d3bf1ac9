//! What scenario tests are made of: a daemon as a process, a QMP client, an NBD guest, and other people's tools.

mod daemon;
mod guest;
mod map;
mod qmp;
mod storage_daemon;
mod tools;
mod vm;
mod writer;

pub(crate) use daemon::{Daemon, serve};
pub(crate) use guest::Guest;
pub(crate) use map::{dirty, extents};
pub(crate) use qmp::Qmp;
pub(crate) use storage_daemon::StorageDaemon;
pub(crate) use tools::{have, output, run};
pub(crate) use vm::Vm;
pub(crate) use writer::{GRANULE, Moment, Writer};

//! The program `driveline`, as a library: a TOML file becomes a storage graph, served over NBD.
//!
//! It is the only crate that knows all others: it reads the file, loads plugins, opens the graph, serves it, and ends it
//! in order. It has no I/O logic and no graph logic of its own.
//!
//! Its nouns:
//! * [`config::Config`]: a file that was read, and [`config::Mistakes`]: all that is wrong with it;
//! * [`daemon::Daemon`]: a graph that runs, with its jobs, exports and monitor;
//! * [`picture::Picture`]: a graph that is drawn.
//!
//! ```
//! use driveline_daemon::{config::Config, daemon::Daemon};
//! let text = r#"
//!     [node.disk]
//!     driver = "memory"
//!     size = "16MiB"
//!
//!     [drive.vda]
//!     root = "disk"
//!     bitmaps = [{ name = "daily" }]
//! "#;
//! let (config, mistakes) = Config::parse("vm.toml".as_ref(), text);
//! let daemon = Daemon::start(&config, mistakes)?;
//! assert_eq!(daemon.graph().size_bytes("vda")?, 16 << 20);
//! daemon.stop()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod apply;
pub mod cli;
pub mod commands;
pub mod config;
mod control;
pub mod daemon;
pub mod demo;
pub mod drivers;
pub mod exports;
mod hung;
mod journal;
pub mod logging;
mod moved;
pub mod notify;
pub mod picture;
pub mod runtime;
pub mod storage_daemon;
pub mod stores;

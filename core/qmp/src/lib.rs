//! The control socket: QMP, the protocol of QEMU's monitors, with QEMU's commands for block devices.
//!
//! Clients written for QEMU work: arguments, results, errors and events are those of its schema, version 10.0. It is no
//! complete QMP: what it knows is the table in `command.rs`, which `query-commands` prints, and what it does not know is refused
//! by name. What QEMU does not have is prefixed with `x-driveline-`. Where a command on bitmaps or jobs takes a node,
//! the name of a drive does as well.
//!
//! | beyond QEMU | what it does |
//! |---|---|
//! | `x-driveline-block-dirty-bitmap-move` `node` `name` `target` | moves a bitmap to another node or drive |
//! | `x-driveline-block-dirty-bitmap-rename` `node` `name` `new-name` | renames it; whoever uses it does not notice |
//! | `x-driveline-block-dirty-bitmap-populate` `node` `name` | marks what is allocated in the top image |
//! | `x-driveline-blockdev-insert-filter` `options` `above` | opens a filter above a node, or a drive's root, under load; returns its `node-name` |
//! | `x-driveline-blockdev-remove-filter` `node-name` | takes it out again |
//! | `x-driveline-yank` `node-name` | cuts the connections of an `nbd` node: what was asked there fails with EIO and is not asked again; it is connected to again as after a loss. It can be sent with `exec-oob`. (QEMU's storage daemon has no `yank`) |
//! | `block-dirty-bitmap-add` with `x-driveline-view` | `drive` (the default on a drive's name) or `node` (on a node's): whose changes are recorded |
//! | `block-dirty-bitmap-add` with `x-driveline-durability` | `volatile`, `process` (the default) or `power`: what a `persistent` one survives |
//! | `x-driveline-block-dirty-bitmap-adopt` `node` `name` | makes a bitmap whose contents are lost usable, all of it dirty |
//! | `x-driveline-block-dirty-bitmap-store` `node` `store` `flush` | says where persistent bitmaps are kept; moves them to `store` (`qcow2:NODE` or `file:PATH`) first, and brings them to stable storage |
//! | `x-driveline-apply` `file` `dry-run` `prune-bitmaps` | changes the running graph to what a configuration file says, as one; returns the `steps`, what is `kept` although no file has it, and what takes a `restart` |
//! | `x-driveline-checkpoint-create` `name` `drives` `granularity` `persistent` `durability` `view` | keeps this moment of several drives by a name, the same for all; it can be an action, unless it has a `view`: the data as they are now, and what changed since `base`, on an NBD export of each drive; what is written over meanwhile is kept in the directory `scratch` |
//! | `x-driveline-checkpoint-release` `name` | ends the view of a checkpoint, which is kept |
//! | `x-driveline-checkpoint-delete` `name` `drives` | forgets it; what changed between others does not change |
//! | `x-driveline-query-checkpoints` `drive` | those that are kept, the oldest of a drive first; a `view` says whether it is `serving` or `lost`, and the `reason` |
//! | `x-driveline-checkpoint-delta` `drive` `from` `to` `bitmap` `start` | what changed between two of them, or since one: `count`, `areas`, and `next` if there are more; as a bitmap of the drive, too, if one is named |
//! | `blockdev-mirror` and `drive-mirror` with `sync` `incremental` or `bitmap`, `bitmap` and `bitmap-mode` | only what a bitmap says is copied at first; the arguments are those of `blockdev-backup` |
//! | `block-job-change` to `background` | a mirror's copy mode can be changed both ways |
//! | `transaction` with `completion-mode` `grouped` and any action | jobs of every kind end together; actions that start none take effect at once |
//! | `transaction` with `block-export-add` and `block-export-del` | exports come and go with the rest, or not at all; what it shows may come in the same transaction but for bitmaps, and cannot go in it |
//! | `x-driveline-query-recovered-bitmaps` | what became of bitmaps that were found at the start: `exact`, `superset`, `all-dirty` or `lost` |
//! | event `X_DRIVELINE_BITMAP_RECOVERED` | the same: of what a crash left, for the first client that connects, and of images that are opened meanwhile |
//! | `block-stream`, `block-commit`, `blockdev-` and `drive-mirror`, `-backup` with `x-driveline-on-restart` | `resume` or `drop`: what becomes of the job when the program is killed and started again; without it, what the drive's `on-restart` says |
//! | `x-driveline-query-interrupted-jobs` | jobs that were interrupted when the program ended the last time: `resumed` (with the bytes that were `left`), `finished`, `dropped`, or `failed`, with the `reason` |
//! | `x-driveline-interrupted-job-resume` `id` | tries once more with one that has `failed` |
//! | `x-driveline-interrupted-job-drop` `id` | gives it up; its target stays as it is |
//! | event `X_DRIVELINE_JOB_INTERRUPTED` | the same as the query, for each of them, for the first client that connects |
//! | event `X_DRIVELINE_CHECKPOINT_VIEW_LOST` `checkpoint` `drive` `node-name` `export` `reason` | a guest overwrote what could not be kept, so the view shows nothing any more: reading it fails with `EIO`; releasing it is left |
//! | event `X_DRIVELINE_NODE_FAILED` `node-name` `message` | an operation of a filter panicked |
//!
//! What can be an action of a `transaction` is the table in `transaction.rs`: those that change bitmaps, filters, snapshots, exports,
//! checkpoints, stream, commit and mirror. The table at the end has all differences to QEMU that are on purpose.
//!
//! Its nouns:
//! * [`Monitor`]: all connections to one graph; takes clients and tells them of events;
//! * a *session*: one connection; negotiates, then does one command after the other;
//! * [`Control`]: what commands need of the program around the graph.
//!
//! Bytes become messages in `wire.rs`, messages become arguments in `arguments.rs`, and QEMU's node definitions become
//! Driveline's in `translate.rs`. Bad input changes nothing.
//!
//! The wire types are serde structs of our own: those of the `qapi-qmp` crate are for clients; they let unknown members pass, and
//! flatten what they inherit, so that no error could name the argument that is wrong, as QEMU's do.
//!
//! ```
//! use driveline_engine::{Config, Engine, net::Stream};
//! use driveline_graph::{BoxFuture, Graph, GraphOptions};
//! use driveline_jobs::{Jobs, Runtime};
//! use driveline_qmp::{Control, ExportInfo, Monitor, NbdExport, NbdServer, RemoveMode, Result};
//! use std::{sync::Arc, time::Duration};
//!
//! # fn none<'a>() -> BoxFuture<'a, Result<()>> { Box::pin(async { Err(driveline_qmp::Error::generic("none here")) }) }
//! struct Program;
//! impl Control for Program {
//!     fn exports(&self) -> Vec<ExportInfo> { Vec::new() }
//! #   fn add_export(&self, _: NbdExport) -> BoxFuture<'_, Result<()>> { none() }
//! #   fn remove_export<'a>(&'a self, _: &'a str, _: RemoveMode) -> BoxFuture<'a, Result<()>> { none() }
//! #   fn start_nbd_server(&self, _: NbdServer) -> BoxFuture<'_, Result<()>> { none() }
//! #   fn stop_nbd_server(&self) -> BoxFuture<'_, Result<()>> { none() }
//!     fn quit(&self) {}
//!     // ...
//! }
//!
//! # struct Threads(driveline_engine::Handle);
//! # impl Runtime for Threads {
//! #     fn spawn(&self, future: BoxFuture<'static, ()>) { self.0.spawn(future).detach() }
//! #     fn sleep(&self, time: Duration) -> BoxFuture<'static, ()> { Box::pin(driveline_engine::sleep(time)) }
//! #     fn now(&self) -> Duration { Duration::ZERO }
//! # }
//! let engine = Engine::start(Config::default())?;
//! let graph = Graph::new(GraphOptions::default());
//! let jobs = Jobs::new(graph.clone(), Arc::new(Threads(engine.handle())));
//! let reply = engine.block_on(async {
//!     let monitor = Monitor::new(graph, jobs, Arc::new(Program));
//!     let (client, server) = Stream::pair()?;
//!     let session = async { monitor.session(server).await };
//!     let talk = async {
//!         client.write_all(br#"{"execute": "qmp_capabilities"} {"execute": "query-block", "id": 1}"#).await?;
//!         client.shutdown(std::net::Shutdown::Write)?;
//!         let mut text = vec![0; 4096];
//!         let mut length = 0;
//!         loop {
//!             match client.read(&mut text[length..]).await? {
//!                 0 => return std::io::Result::Ok(String::from_utf8_lossy(&text[..length]).into_owned()),
//!                 count => length += count,
//!             }
//!         }
//!     };
//!     futures::join!(session, talk).1
//! })?;
//! assert!(reply.starts_with(r#"{"QMP":"#));
//! assert!(reply.ends_with("{\"return\":[],\"id\":1}\r\n"));
//! # Ok::<(), std::io::Error>(())
//! ```
//!
#![doc = include_str!("../differences.md")]
#![forbid(unsafe_code)]

mod amend;
mod apply;
mod arguments;
mod backup;
mod bitmaps;
mod changes;
mod checkpoints;
mod command;
mod control;
mod create;
mod debug;
mod error;
mod events;
mod exports;
mod image;
mod interrupted;
mod jobs;
mod limiter;
mod mirror;
mod monitor;
mod nodes;
mod objects;
mod outbox;
mod schema;
mod session;
mod snapshots;
mod stats;
mod stores;
mod transaction;
mod translate;
mod wire;

pub use control::{
    Address, Applied, ApplyWish, BitmapPlace, BitmapStore, Control, ExportInfo, ExportToCome, Inet,
    InterruptedJob, NbdExport, NbdServer, NodesGoing, RecoveredBitmap, RemoveMode,
};
pub use error::{Class, Error, Result};
pub use events::{Event, Reason};
pub use monitor::{Listener, Monitor};
pub use objects::{
    AuthzList, AuthzListFile, AuthzPolicy, AuthzRule, Endpoint, IoThread, Limit, Object, ObjectChange,
    ObjectUse, Objects, Secret, ThrottleLimits, TlsX509,
};

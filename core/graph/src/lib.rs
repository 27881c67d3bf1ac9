//! A storage graph: nodes, edges, permissions, drain, transactions, and where dirty bitmaps attach and move.
//!
//! It knows no TOML, no plugin loading and no NBD: it takes drivers as trait objects, definitions as JSON objects,
//! and requests through [`Root`]s.
//!
//! Its nouns:
//! * [`Node`]: an open instance of a [`Driver`]; nodes have children by name;
//! * [`Root`]: a user from outside, on a drive or a node; its requests are what a drain waits for;
//! * [`Change`]: edits of the graph, made as one transaction while what they touch is drained, or not at all.
//!
//! A *drive* is a name for a root node. What is put on top, taken away or replaced there, the drive and its roots
//! follow. It has no I/O logic of its own.
//!
//! # The path of a request
//!
//! See `io.rs`: check, begin, permit, drive, finish, one function each. Edges are resolved when the graph changes:
//! a call goes straight to the first node below that implements the operation (`wiring.rs`), through a hop only
//! where a node has bitmaps, range locks or limits. An operation that a filter's SDK did not know is lowered to
//! ones that it knew, or refused (`lower.rs`); it never slips past.
//!
//! # Why changes need no unsafe code
//!
//! Wiring is immutable. A change builds new edges and swaps them into the roots; requests that are under way keep
//! what they began on. Draining is still done, because a bitmap that is cleared, a node that is closed or a file
//! that is re-pointed must have no request half-way through it.
//!
//! ```
//! use driveline_graph::*;
//! # use driveline_op::*;
//! # use std::sync::Arc;
//! # struct Null(Description);
//! # struct Open(Arc<Body<()>>);
//! # async fn read(_: &(), _: &mut Next<'_>, r: &ReadRequest<'_>) -> driveline_op::Result<()> { r.zero(0..r.length()); Ok(()) }
//! # async fn write(_: &(), _: &mut Next<'_>, _: &WriteRequest<'_>) -> driveline_op::Result<()> { Ok(()) }
//! # static OPS: OpTable<()> = OpTable::new().read(read).write(write);
//! # impl OpenNode for Open {
//! #     fn instance(&self) -> Instance { Instance::new(self.0.clone(), &OPS) }
//! #     fn info(&self, _: &[Info]) -> Info { Info { size_bytes: 1 << 20, ..Info::default() } }
//! # }
//! # impl Driver for Null {
//! #     fn description(&self) -> &Description { &self.0 }
//! #     fn check(&self, _: &Options) -> Result<()> { Ok(()) }
//! #     fn open<'a>(&'a self, a: OpenArgs<'a>) -> BoxFuture<'a, Result<Arc<dyn OpenNode>>> {
//! #         Box::pin(async move { Ok(Arc::new(Open(Arc::new(Body { cookie: a.cookie, driver: () }))) as Arc<dyn OpenNode>) })
//! #     }
//! # }
//! # let null = Null(Description::builtin("null", DriverKind::Protocol, ""));
//! # fn object(v: serde_json::Value) -> Options { v.as_object().unwrap().clone() }
//! # futures::executor::block_on(async {
//! let graph = Graph::new(GraphOptions::default());
//! graph.register(Arc::new(null))?; // a leaf driver
//! let mut change = graph.change().await;
//! let disk = graph.parse(object(serde_json::json!({ "driver": "null", "node-name": "disk" })), &[])?;
//! change.add_node(disk).await?;
//! change.set_drive("vda", "disk")?;
//! change.add_bitmap("vda", NewBitmap::named("daily"))?;
//! change.commit().await?;
//!
//! let guest = graph.open_root("vda", RootOptions::writer("a guest")).await?;
//! guest.write(4096, &[1; 512], 0).await?;
//! assert_eq!(graph.bitmap("vda", "daily")?.bits().dirty_bytes(), 65536);
//! # Ok::<(), Error>(()) }).unwrap();
//! ```
#![forbid(unsafe_code)]

mod bitmaps;
mod change;
mod common;
mod create;
mod definition;
mod driver;
mod edges;
mod error;
mod event;
mod filename;
mod fit;
mod gate;
mod graph;
mod guard;
mod io;
mod keeper;
mod layout;
mod lower;
mod node;
mod object;
mod owed;
mod past;
mod permission;
mod ranges;
mod root;
mod stats;
mod stored;
mod topology;
mod wiring;

pub use bitmaps::NewBitmap;
pub use change::{Change, Internal, Made, reopen::refuse_changes};
pub use common::{COMMON_OPTIONS, DetectZeroes, NodeOptions};
pub use create::{CreateArgs, CreateTarget, Created, CreatedImage, NewImage, Preallocation};
pub use definition::{ChildDefinition, Definition, check_name, in_order, nested};
pub use driver::{
    BoxFuture, ChildSpec, Description, Driver, DriverKind, ImpliedChild, Missing, OpenArgs, OpenChild,
    OpenNode, Options, Permissions, Reopened, Role, Snapshot, parse_options,
};
pub use edges::{EdgeParent, EdgeView};
pub use error::{Error, Kind, Result};
pub use event::{Event, NodeEvent};
pub use filename::Filenames;
pub use graph::{Graph, GraphOptions, node_failed, node_tells};
pub use keeper::Keeper;
pub use layout::{ChildView, DriveView, Layout, NodeView};
pub use node::{Node, NodeId};
pub use object::ObjectCall;
pub use ranges::{Hold, Ranges};
pub use root::{RangeLock, Root, RootOptions, RootPlace, Unit};
pub use stats::{Count, Statistics};
pub use stored::{BitmapLimits, BitmapToStore, StoredBitmap, StoredBitmaps, Witness};
pub use topology::nearest;

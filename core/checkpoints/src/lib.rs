//! Moments of a drive that are kept by name, so that what changed between any two of them can be asked later.
//!
//! A backup tool marks a moment each time it backs up. To know what changed since *any* of them, others keep a bitmap that
//! records for each, and every write of the guest pays for all. Here only one records, whatever their number: a checkpoint
//! begins an *epoch*, and ends the one before. What changed between two moments is what the epochs between them have.
//!
//! ```text
//!   checkpoint   monday        tuesday       wednesday
//!                  ├─ epoch ─────┼─ epoch ─────┼─ epoch ──▶ now
//!   bitmap         disabled      disabled      records
//! ```
//!
//! It is no backup, and keeps no data: a view of the data as it was is the business of who makes one at the same moment.
//!
//! Its nouns:
//! * a [`Checkpoint`]: a moment of one drive; those of several drives that were made together have one name;
//! * an [`Epoch`]: the time from a checkpoint to the next, and the bitmap that has what changed in it;
//! * a *delta*: what changed between two checkpoints, or since one.
//!
//! Epochs are ordinary bitmaps of the drive, so they follow it through jobs, and survive what it survives. Their order is in
//! their names, and so is which epoch each follows: if somebody takes one away by other means, deltas across it are refused
//! instead of being less than the truth.
//!
//! ```
//! use driveline_checkpoints as checkpoints;
//! # use driveline_graph::*;
//! # use std::sync::Arc;
//! # futures::executor::block_on(async {
//! # let graph = Graph::new(GraphOptions::default());
//! # graph.register(Arc::new(driveline_drivers::MemoryDriver::default()))?;
//! # let mut change = graph.change().await;
//! # let disk = serde_json::json!({ "driver": "memory", "node-name": "disk", "size": "1MiB" });
//! # change.add_node(graph.parse(disk.as_object().unwrap().clone(), &[])?).await?;
//! # change.set_drive("vda", "disk")?;
//! # change.commit().await?;
//! let guest = graph.open_root("vda", RootOptions::writer("a guest")).await?;
//! for (name, at) in [("monday", 0), ("tuesday", 65536), ("wednesday", 131072)] {
//!     let mut change = graph.change().await;
//!     checkpoints::create(&graph, &mut change, &checkpoints::NewCheckpoint::named(name, "vda"))?;
//!     change.commit().await?;
//!     guest.write(at, &[1; 512], 0).await?;
//! }
//! let tuesdays = checkpoints::delta(&graph, "vda", "tuesday", Some("wednesday"))?;
//! assert_eq!(tuesdays.iter_dirty().collect::<Vec<_>>(), [65536..131072]);
//! assert_eq!(checkpoints::delta(&graph, "vda", "monday", None)?.dirty_bytes(), 3 * 65536);
//! # Ok::<(), Error>(()) }).unwrap();
//! ```
#![forbid(unsafe_code)]

mod chain;
mod epoch;

pub use chain::{Checkpoint, NewCheckpoint, add_delta, create, delete, delta, of_drive};
pub use epoch::Epoch;

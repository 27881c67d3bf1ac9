//! What every writable node must do, as one check that all drivers and filters pass.
//!
//! [`check`] runs seeded random operations on a node, compares what it reads with a model in memory, and asserts
//! the contract of each operation: reads see completed writes, bytes beside a write stay, zeroes are zeroes, an extent's answer is
//! true and covers the range, operations on nothing succeed, disjoint requests at the same time do not disturb each
//! other. It panics where the contract is broken, with the seed.
//!
//! ```
//! use driveline_drivers::{MemoryDriver, conformance::{Check, check, open_node}};
//!
//! futures::executor::block_on(async {
//!     let options = serde_json::json!({ "size": "1MiB" });
//!     let node = open_node(&MemoryDriver::default(), options, vec![]).await.unwrap();
//!     check(&node.edge, Check { seed: 1, steps: 50, ..Check::default() }).await;
//! });
//! ```
//!
//! It knows no graph: [`open_node`] wires nodes by hand. To check a node behind something else than an edge, give
//! [`check_with`] a closure that runs a request.

mod model;
mod node;
mod scatter;
mod suite;
#[cfg(test)]
mod tests;

pub use node::{OpenNodeArgs, edge_to, open_node, options_of, options_with_words};
pub use scatter::scattered;
pub use suite::{Check, check, check_with};

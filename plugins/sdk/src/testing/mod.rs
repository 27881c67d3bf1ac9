//! The test kit: filters in this process, without a library or a program around them, in virtual time.
//!
//! ```
//! # use driveline_sdk::{prelude::*, testing::{self, json}};
//! # struct Guard;
//! # #[filter(name = "guard", default = "pass")]
//! # impl Filter for Guard {
//! #     type Options = NoOptions;
//! #     fn open(_: NoOptions, _: &OpenCx<'_>) -> Result<Self> { Ok(Guard) }
//! #     async fn write(&self, _: &mut Next<'_>, _: &WriteRequest<'_>) -> Result<()> { Err(Error::NOT_PERMITTED) }
//! # }
//! let below = testing::memory(1 << 20);
//! let guard = testing::open::<Guard>(json!({}), &below).unwrap();
//! testing::block_on(async {
//!     assert_eq!(guard.read(0..2).await.unwrap(), [0, 0]);
//!     assert_eq!(guard.write(0, b"data").await.unwrap_err().code(), 1);
//! });
//! assert_eq!(below.seen(), ["read 0+2"]); // what came through
//! ```
//!
//! A test that runs several requests at once uses [`join`]. Time stands still while anything can go on, and then
//! jumps to where the next sleeper wakes ([`crate::sleep`] for an hour takes no time, and tests can count on it).
//!
//! Errors of requests arrive as they would in the program: as their numbers ([`crate::Error::code`]), without their texts. A
//! panic is an `EIO` here too, and [`Node::failures`] has its text. Events of `tracing` go to the test's own subscriber
//! ([`listen`]).
//! Children beside the first are given to [`open_with`].
//!
//! Operations that a filter leaves out go to the child with `default = "pass"` and are refused with `"deny"`: the
//! emulation that Driveline offers in the latter case is not here.

mod clock;
mod leaf;
mod listen;
mod node;
mod readme;

pub use clock::{block_on, join};
pub use leaf::{Leaf, growing, memory};
pub use listen::listen;
pub use node::{Below, Node, check, object, open, open_with, option_names};
pub use readme::{check_readme, readme_table};
pub use serde_json::{Value, json};

//! Write a Driveline filter.
//!
//! A filter is a node that stands between a drive's user and its data, and may delay, refuse, count, copy or change
//! what passes. It is a shared library that anyone can write, ship and upgrade apart from Driveline, and this crate
//! is the only one it needs. A whole one:
//!
//! ```
//! // Waits before each read.
//! use driveline_sdk::prelude::*;
//!
//! #[options]
//! struct Options {
//!     /// How long.
//!     #[serde(default)]
//!     read: Time,
//! }
//!
//! struct Delay {
//!     read: Time,
//! }
//!
//! #[filter(name = "delay", default = "pass", summary = "waits before reads")]
//! impl Filter for Delay {
//!     type Options = Options;
//!
//!     fn open(options: Options, _: &OpenCx<'_>) -> Result<Self> {
//!         Ok(Delay { read: options.read })
//!     }
//!
//!     async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
//!         sleep(*self.read).await;
//!         next.read(request).await
//!     }
//! }
//!
//! export_filters![Delay];
//!
//! // And a test of it, in virtual time:
//! use driveline_sdk::testing::{self, json};
//! let below = testing::memory(1 << 20);
//! let delay = testing::open::<Delay>(json!({ "read": "1h" }), &below).unwrap();
//! testing::block_on(async {
//!     delay.read(0..512).await.unwrap();
//!     assert_eq!(now().as_secs(), 3600);
//! });
//! assert_eq!(below.seen(), ["read 0+512"]);
//! ```
//!
//! The crate's manifest says `[lib] crate-type = ["cdylib"]`; named `driveline-filter-delay`, it becomes
//! `libdriveline_filter_delay.so`, which Driveline finds beside itself or in `DRIVELINE_PLUGIN_PATH` (other names it
//! does not look at). It must be built
//! with `panic = "unwind"`, the default; `codegen-units = 1` in its release profile makes each request some
//! nanoseconds cheaper.
//!
//! # What `#[filter]` declares
//!
//! | | |
//! |---|---|
//! | `name = ".."` | the driver's name in a graph |
//! | `default = ".."` | what becomes of the operations left out: `"pass"`, they go to the child as they are; `"deny"`, they are emulated through those that are there (write_zeroes as writes), else refused. Choose `"deny"` if the filter changes data or offsets, or must see every change (a mirror, a checksum): a forgotten operation must not reach the child unchanged |
//! | `summary = ".."` | one line for people |
//! | `children("target", ..)` | children beside the filtered one, each given by its name in a configuration; one that may be missing ends with `?` and comes behind the others |
//! | `child_words("image", ..)` | other words for the filtered child, beside `child` and `file` |
//! | `objects("throttle-group", ..)` | kinds of objects that nodes share by name, see [`Filter::object`] |
//! | `effects(..)` | `changes_data`, `changes_offsets`, `own_writes` (writes of its own accord), `not_live` (not to be inserted above a node in use) |
//!
//! # More children than one
//!
//! Child 0 is the one that the filter stands on: `child = "disk"` in a graph, and what [`Next::write`] and the like
//! call. Those of `children(..)` are given in the same way by their own names, and have numbers that
//! [`OpenCx::child`] tells:
//!
//! ```
//! # use driveline_sdk::{prelude::*, testing::{self, json}};
//! struct Tee {
//!     copy: ChildId,
//! }
//!
//! #[filter(name = "tee", default = "deny", children("copy"))]
//! impl Filter for Tee {
//!     type Options = NoOptions;
//!
//!     fn open(_: NoOptions, cx: &OpenCx<'_>) -> Result<Self> {
//!         let copy = cx.child("copy")?;
//!         if cx.info(copy).size_bytes < cx.info(0).size_bytes {
//!             return Err(Error::option("copy", "it is smaller than the child"));
//!         }
//!         Ok(Tee { copy })
//!     }
//!
//!     async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
//!         next.read(request).await
//!     }
//!
//!     async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
//!         next.write(request).await?;
//!         next.child(self.copy).write(request).await
//!     }
//!
//!     async fn flush(&self, next: &mut Next<'_>, request: &FlushRequest<'_>) -> Result<()> {
//!         next.flush(request).await?;
//!         next.child(self.copy).flush(request).await
//!     }
//! }
//!
//! let (below, copy) = (testing::memory(4096), testing::memory(4096));
//! let tee = testing::open_with::<Tee>(json!({}), &below, &[("copy", &copy)]).unwrap();
//! testing::block_on(tee.write(512, b"data")).unwrap();
//! assert_eq!(copy.data(512..516), b"data");
//! ```
//!
//! ([`Next::fork`] is for calls at the same time.)
//!
//! # Options
//!
//! [`options`](macro@options) makes a struct of them. Keys are the fields' names with `-` for `_`; unknown keys are
//! refused; a field that may be left out has `#[serde(default)]`, as with serde, whose other attributes work too.
//! What is inside (lists of structs, enums) gets `#[options]` as well. [`Bytes`] and [`Time`] have units. A
//! mistake is reported with its key (`rules[1].event`) and what was expected; values that no type can refuse are
//! refused in [`Filter::check`], with [`Error::option`].
//!
//! # What it can use
//!
//! Waiting: [`sleep`], [`now`]. Calling children: [`Next`]. Ranges: [`RangeLock`]. Memory: [`Buffer`]. Failing:
//! [`Error`], whose number goes to the client; [`Error::because`] adds a text, which is logged with the node's name.
//! Logging: the macros of [`tracing`], which reach the program's log with the crate's name as their target
//! (`--log warn,driveline_filter_delay=debug`); which node it was says [`OpenCx::node_name`], if the filter keeps it.
//! What nobody listens to costs a nanosecond. A plugin has copies of everything static, so it cannot use tokio's sockets
//! and timers, nor thread-locals of the program; threads of its own it can.
//!
//! It is not for drivers that are leaves or formats: those are built into Driveline.

// The macros name this crate from outside; its own tests use them too.
extern crate self as driveline_sdk;

#[doc(hidden)]
pub mod export;
mod filter;
mod lock;
mod log;
mod options;
pub mod testing;
mod time;
mod units;

pub use driveline_abi::permission;
pub use driveline_macros::{filter, options};
pub use driveline_op::{
    BUFFER_ALIGNMENT, BlockStatus, BlockStatusRequest, Buffer, CacheRequest, Child, ChildOp, ConstMemory,
    DiscardRequest, Error, EventRequest, FlushRequest, Info, IoVec, Memory, Next, ReadRequest, ResizeRequest,
    Result, WriteRequest, WriteZeroesRequest, event, flag, info, op, status,
};
pub use filter::{Alarm, ChildId, Claim, Filter, ObjectCall, OpenCx};
pub use lock::{RangeGuard, RangeLock, RangeLocking};
pub use options::NoOptions;
pub use time::{Sleep, now, sleep, sleep_until};
pub use units::{Bytes, Time};
#[doc(no_inline)]
pub use {serde, serde_json, tracing};

/// What nearly every filter needs.
pub mod prelude {
    #[doc(no_inline)]
    pub use crate::{
        BlockStatusRequest, Bytes, CacheRequest, ChildId, DiscardRequest, Error, EventRequest, Filter,
        FlushRequest, Next, NoOptions, OpenCx, ReadRequest, ResizeRequest, Result, Time, WriteRequest,
        WriteZeroesRequest, export_filters, filter, now, options, sleep, tracing,
    };
}

/// What the attributes refuse.
///
/// A filter without a choice of what becomes of the operations that it leaves out:
/// ```compile_fail
/// # use driveline_sdk::prelude::*;
/// struct Undecided;
/// #[filter(name = "undecided")]
/// impl Filter for Undecided {
///     type Options = NoOptions;
///     fn open(_: NoOptions, _: &OpenCx<'_>) -> Result<Self> { Ok(Undecided) }
/// }
/// ```
/// A name that could not stand in a configuration:
/// ```compile_fail
/// # use driveline_sdk::prelude::*;
/// struct Named;
/// #[filter(name = "My Filter", default = "pass")]
/// impl Filter for Named {
///     type Options = NoOptions;
///     fn open(_: NoOptions, _: &OpenCx<'_>) -> Result<Self> { Ok(Named) }
/// }
/// ```
/// An operation that does not exist:
/// ```compile_fail
/// # use driveline_sdk::prelude::*;
/// struct Misspelt;
/// #[filter(name = "misspelt", default = "pass")]
/// impl Filter for Misspelt {
///     type Options = NoOptions;
///     fn open(_: NoOptions, _: &OpenCx<'_>) -> Result<Self> { Ok(Misspelt) }
///     async fn reed(&self, next: &mut Next<'_>, r: &ReadRequest<'_>) -> Result<()> { next.read(r).await }
/// }
/// ```
/// A lock that is held while waiting:
/// ```compile_fail
/// # use driveline_sdk::prelude::*;
/// struct Locks(std::sync::Mutex<u64>);
/// #[filter(name = "locks", default = "pass")]
/// impl Filter for Locks {
///     type Options = NoOptions;
///     fn open(_: NoOptions, _: &OpenCx<'_>) -> Result<Self> { Ok(Locks(Default::default())) }
///     async fn read(&self, next: &mut Next<'_>, r: &ReadRequest<'_>) -> Result<()> {
///         let mut count = self.0.lock().unwrap();
///         *count += 1;
///         next.read(r).await
///     }
/// }
/// ```
/// (The same, let go before, is taken:)
/// ```
/// # use driveline_sdk::prelude::*;
/// struct Locks(std::sync::Mutex<u64>);
/// #[filter(name = "locks", default = "pass")]
/// impl Filter for Locks {
///     type Options = NoOptions;
///     fn open(_: NoOptions, _: &OpenCx<'_>) -> Result<Self> { Ok(Locks(Default::default())) }
///     async fn read(&self, next: &mut Next<'_>, r: &ReadRequest<'_>) -> Result<()> {
///         *self.0.lock().unwrap() += 1;
///         next.read(r).await
///     }
/// }
/// ```
#[cfg(doctest)]
pub mod refused {}

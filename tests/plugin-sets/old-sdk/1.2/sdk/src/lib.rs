//! Write a Driveline filter: the SDK as it was with ABI 1.2.

// The macros name this crate from outside; its own tests use them too.
extern crate self as driveline_sdk;

#[doc(hidden)]
pub mod export;
mod filter;
mod lock;
mod log;
mod options;
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

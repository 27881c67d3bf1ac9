//! Write a Driveline filter: the SDK of ABI 1.1, without its test kit.
//!
//! Frozen. Libraries that were built with it are out there; this one is kept to build such a library at any time.

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

pub use driveline_macros::{filter, options};
pub use driveline_op::{
    BUFFER_ALIGNMENT, BlockStatus, BlockStatusRequest, Buffer, CacheRequest, Child, ChildOp, ConstMemory,
    DiscardRequest, Error, FlushRequest, Info, IoVec, Memory, Next, ReadRequest, Result, WriteRequest,
    WriteZeroesRequest, flag, info, op, status,
};
pub use filter::{ChildId, Filter, OpenCx};
pub use lock::{RangeGuard, RangeLock, RangeLocking};
pub use options::NoOptions;
pub use time::{Sleep, now, sleep, sleep_until};
pub use units::{Bytes, Time};
#[doc(no_inline)]
pub use {serde, tracing};

/// What nearly every filter needs.
pub mod prelude {
    #[doc(no_inline)]
    pub use crate::{
        BlockStatusRequest, Bytes, CacheRequest, ChildId, DiscardRequest, Error, Filter, FlushRequest, Next,
        NoOptions, OpenCx, ReadRequest, Result, Time, WriteRequest, WriteZeroesRequest, export_filters,
        filter, now, options, sleep, tracing,
    };
}

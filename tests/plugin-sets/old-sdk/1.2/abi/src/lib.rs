//! The plugin ABI: the words that Driveline and its filter plugins share.
//!
//! This crate holds types and nothing that runs. A filter author never reads it: he reads
//! `driveline-sdk`, which turns these words into a trait with `async fn`s. A host author reads
//! `driveline-op` (the safe face of [`OpVt`]) and `driveline-loader` (how a library is opened and checked).
//!
//! Three nouns:
//! * [`Request`]: what is to be done, 64 bytes, passed by pointer;
//! * [`OpVt`]: the one asynchronous protocol: start it, poll it, or drop it;
//! * [`EdgeAbi`]: what a filter calls: for each operation the first node below that implements it.
//!
//! # How it may change
//!
//! The version of this crate *is* the version of the ABI ([`PluginModRef`] carries it). Majors must be equal.
//! Minors may differ either way, because only prefix types grow ([`FilterOps`], [`FilterDesc`], [`HostApi`],
//! [`PluginMod`]), only at their end, and what an older side lacks reads as `None` on the newer one. All other
//! types are frozen within a major; their `reserved` fields are zero until a minor gives them a meaning
//! (`#[sabi(rename = ..)]`).
//!
//! | since | operations | also |
//! |---|---|---|
//! | 1.0 | read, write, flush, discard, write_zeroes, block_status | |
//! | 1.1 | cache | [`HostApi::node_failed`](HostApi) |
//! | 1.2 | resize, event | [`flag::COMPRESSED`]; of filters: own limits, permissions, a first and a last operation, optional children, objects |
//!
//! A filter built against 1.0 says that it knows six operations ([`FilterDesc::operations_known`](FilterDesc)).
//! The host never lets a seventh slip past it: it lowers it to ones the filter knows, or refuses it.
//!
//! # Lifetimes, for all of [`OpVt`]
//!
//! The request, its `iov` and `out`, the slot, the scratch memory and the wake handle are lent until `start` or
//! `poll` returns something other than [`Status::PENDING`], or until `drop` returns. A wake handle is borrowed:
//! clone it to keep it. `start`, `poll` and `drop` of one slot never run at once, though they may run on
//! different threads. `drop` may come at any time after `PENDING` and ends everything below before it returns.

mod host;
mod operation;
mod plugin;
mod word;

pub use host::{CallsiteInfo, FieldValue, HostApi, HostApiRef, Value};
pub use operation::{EdgeAbi, OpVt, ResolvedOp, Scratch, TargetAbi, WakeHandle, WakeVt};
pub use plugin::{
    ChildArg, FfiError, FilterDesc, FilterDescRef, FilterOps, FilterOpsRef, FilterPtr, OpenArgs, PluginMod,
    PluginModRef,
};
pub use word::{
    BlockStatus, Info, IoVec, Request, Status, default, effect, event, flag, info, object, op, permission,
    status,
};

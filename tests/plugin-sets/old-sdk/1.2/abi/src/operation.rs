//! The one asynchronous protocol, and the edges that carry it.

use crate::word::{Info, Request, Status};
use abi_stable::StableAbi;

/// A waker that is one pointer: `*const WakeHandle`. The object that it points to begins with this.
#[repr(C)]
#[derive(StableAbi, Debug)]
pub struct WakeHandle {
    /// What can be done with the waker.
    pub vt: &'static WakeVt,
}

/// What can be done with a [`WakeHandle`]; as in [`core::task::RawWakerVTable`].
#[repr(C)]
#[derive(StableAbi, Debug)]
pub struct WakeVt {
    /// Returns a handle of one's own.
    pub clone: unsafe extern "C" fn(*const WakeHandle) -> *const WakeHandle,
    /// Wakes and consumes.
    pub wake: unsafe extern "C" fn(*const WakeHandle),
    /// Wakes a handle that is only borrowed.
    pub wake_by_ref: unsafe extern "C" fn(*const WakeHandle),
    /// Gives back a handle of one's own.
    pub drop: unsafe extern "C" fn(*const WakeHandle),
}

/// What is left of the request's arena. A callee carves the slots of its children from it.
#[repr(C)]
#[derive(StableAbi, Clone, Copy, Debug)]
pub struct Scratch {
    /// The first free byte; any alignment; may be null when `len` is 0.
    pub ptr: *mut u8,
    /// Bytes.
    pub len: usize,
}

/// An operation of a node: the whole asynchronous protocol. See the crate doc for lifetimes.
#[repr(C)]
#[derive(StableAbi, Debug)]
pub struct OpVt {
    /// Bytes that the operation's state takes.
    pub size: usize,
    /// Their alignment, a power of two.
    pub align: usize,
    /// Builds the state in `slot` and polls it once. `PENDING`: the slot is live, and only `poll` and `drop`
    /// may be called on it. Anything else: the slot is dead.
    pub start: unsafe extern "C" fn(
        target: *const TargetAbi,
        request: *const Request,
        slot: *mut u8,
        rest: Scratch,
        waker: *const WakeHandle,
    ) -> Status,
    /// Goes on with a live slot.
    pub poll: unsafe extern "C" fn(slot: *mut u8, waker: *const WakeHandle) -> Status,
    /// Cancels a live slot. When it returns, nothing touches the request, its memory or the slot any more.
    pub drop: unsafe extern "C" fn(slot: *mut u8),
}

/// A node together with what it may call: the first argument of [`OpVt::start`].
#[repr(C)]
#[derive(StableAbi, Debug)]
pub struct TargetAbi {
    /// The node's own state, as its `open` returned it.
    pub node: *const u8,
    /// Its children: `n_edges` pointers, in the order of its children.
    pub edges: *const *const EdgeAbi,
    /// How many children there are.
    pub n_edges: u32,
    /// Zero.
    pub reserved: u32,
}

/// An operation of an edge, resolved by the host past all nodes that leave it out.
#[repr(C)]
#[derive(StableAbi, Clone, Copy, Debug)]
pub struct ResolvedOp {
    /// Passed to `start`.
    pub target: *const TargetAbi,
    /// Null: refused with `ENOTSUP`.
    pub vt: *const OpVt,
}

/// An edge from a parent to its child: what the parent may call. Built by the host and never changed: a graph
/// change builds other edges, and requests that are under way keep the ones that they began on.
#[repr(C)]
#[derive(StableAbi, Debug)]
pub struct EdgeAbi {
    /// How many entries `ops` has; operations from here on are unknown to the host.
    pub n_ops: u32,
    /// Zero.
    pub reserved: u32,
    /// By operation number.
    pub ops: *const ResolvedOp,
    /// Size and limits of the child.
    pub info: Info,
}

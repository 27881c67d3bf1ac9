//! What the host offers to plugins: time, buffers, logging.

use crate::{operation::WakeHandle, word::Status};
use abi_stable::{
    StableAbi,
    std_types::{RSlice, RStr},
};

/// A `tracing` callsite of a plugin.
#[repr(C)]
#[derive(StableAbi, Clone, Copy, Debug)]
pub struct CallsiteInfo<'a> {
    /// Name of the event or span.
    pub name: RStr<'a>,
    /// The plugin's target.
    pub target: RStr<'a>,
    /// Source file.
    pub file: RStr<'a>,
    /// Line in it.
    pub line: u32,
    /// 1 error, 2 warn, 3 info, 4 debug, 5 trace.
    pub level: u32,
    /// A span, else an event.
    pub is_span: bool,
    /// Names of the fields, in order.
    pub fields: RSlice<'a, RStr<'a>>,
}

/// A value of a field of an event.
#[repr(u8)]
#[derive(StableAbi, Clone, Copy, Debug)]
pub enum Value<'a> {
    /// An unsigned number.
    U64(u64),
    /// A signed number.
    I64(i64),
    /// A floating-point number.
    F64(f64),
    /// A truth value.
    Bool(bool),
    /// A text.
    Str(RStr<'a>),
    /// A value as its `Debug` or `Display` prints it.
    Debug(RStr<'a>),
}

/// A field of an event: which one, and its value.
#[repr(C)]
#[derive(StableAbi, Clone, Copy, Debug)]
pub struct FieldValue<'a> {
    /// Index in [`CallsiteInfo::fields`].
    pub index: u32,
    /// Its value.
    pub value: Value<'a>,
}

/// Services of the host. Every function may be called from any thread that the host runs a filter on, and from
/// threads of the plugin's own, except timers, which need the former.
#[repr(C)]
#[allow(missing_debug_implementations)] // function pointers say nothing
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = HostApiRef, prefix_fields = HostApiPrefix)))]
#[sabi(missing_field(option))]
pub struct HostApi {
    /// Nanoseconds of a clock that never goes back.
    pub now_ns: extern "C" fn() -> u64,
    /// Starts a timer; 0: the deadline has passed already.
    pub timer_start: unsafe extern "C" fn(deadline_ns: u64, waker: *const WakeHandle) -> u64,
    /// `OK` when the timer has expired; else takes the new waker and says `PENDING`.
    pub timer_poll: unsafe extern "C" fn(timer: u64, waker: *const WakeHandle) -> Status,
    /// Gives back a timer, expired or not.
    pub timer_drop: unsafe extern "C" fn(timer: u64),
    /// Memory for I/O; null when there is none. `align` is a power of two.
    pub buffer_alloc: unsafe extern "C" fn(len: usize, align: usize) -> *mut u8,
    /// Gives it back, with the same `len` and `align`.
    pub buffer_free: unsafe extern "C" fn(base: *mut u8, len: usize, align: usize),
    /// The most verbose level that anyone listens to, 0 to 5.
    pub log_max_level: extern "C" fn() -> u32,
    /// Registers a callsite, once; the handle names it from then on.
    pub log_register: extern "C" fn(&CallsiteInfo<'_>) -> u64,
    /// Does anyone listen to it?
    pub log_enabled: extern "C" fn(callsite: u64) -> bool,
    /// An event.
    pub log_event: extern "C" fn(callsite: u64, values: RSlice<'_, FieldValue<'_>>),
    /// A new span, child of the thread's current one.
    pub span_new: extern "C" fn(callsite: u64, values: RSlice<'_, FieldValue<'_>>) -> u64,
    /// Enters a span on this thread.
    pub span_enter: extern "C" fn(u64),
    /// Leaves it.
    pub span_exit: extern "C" fn(u64),
    /// One more handle to a span.
    pub span_clone: extern "C" fn(u64),
    /// One handle less.
    #[sabi(last_prefix_field)]
    pub span_close: extern "C" fn(u64),
    /// A filter panicked in an operation: the node is marked as failed. Since 1.1.
    pub node_failed: extern "C" fn(cookie: u64, message: RStr<'_>),
}

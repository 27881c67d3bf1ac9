//! What a plugin shows to the host.

use crate::{
    host::HostApiRef,
    operation::OpVt,
    word::{Info, Status},
};
use abi_stable::{
    StableAbi, declare_root_module_statics,
    library::RootModule,
    package_version_strings,
    sabi_types::VersionStrings,
    std_types::{ROption, RResult, RSlice, RStr, RString},
};

/// An error of a cold path: opening, options. The data path has [`Status`] only.
#[repr(C)]
#[derive(StableAbi, Debug, Clone)]
pub struct FfiError {
    /// A positive errno.
    pub errno: i32,
    /// The option at fault, or empty.
    pub key: RString,
    /// What is wrong and what was expected, without the node's name.
    pub message: RString,
}

/// A child at the time of opening.
#[repr(C)]
#[derive(StableAbi, Debug, Clone, Copy)]
pub struct ChildArg<'a> {
    /// `child` for the filtered one, else the name that the filter declared.
    pub name: RStr<'a>,
    /// Its size and limits.
    pub info: Info,
}

/// What a filter is opened with.
#[repr(C)]
#[derive(StableAbi, Debug)]
pub struct OpenArgs<'a> {
    /// The node's name.
    pub node_name: RStr<'a>,
    /// The node's options, a JSON object, without those that the host keeps for itself (driver, children).
    pub options_json: RStr<'a>,
    /// The children, in the order in which edges are numbered.
    pub children: RSlice<'a, ChildArg<'a>>,
    /// Names the node in [`HostApi`](crate::HostApi) calls.
    pub cookie: u64,
    /// What an older instance saved for this one (live upgrade, a later minor); none for now.
    pub saved_state: ROption<RSlice<'a, u8>>,
    /// Zero.
    pub reserved: [u64; 4],
}

/// The state of an opened filter, as its own library knows it.
#[repr(transparent)]
#[derive(StableAbi, Clone, Copy, Debug)]
pub struct FilterPtr(
    /// Opaque to the host.
    pub *const u8,
);

/// The operations of a filter. `None`: left out by its author.
#[repr(C)]
#[allow(missing_debug_implementations)] // function pointers say nothing
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = FilterOpsRef, prefix_fields = FilterOpsPrefix)))]
#[sabi(missing_field(option))]
pub struct FilterOps {
    /// Ends the filter. No operation is in flight; the pointer is dead afterwards.
    pub close: unsafe extern "C" fn(FilterPtr) -> Status,
    /// The size shown above for a size below. `None`: the same.
    pub size: Option<unsafe extern "C" fn(FilterPtr, child_size_bytes: u64) -> u64>,
    /// See [`op::READ`](crate::op::READ).
    pub read: Option<&'static OpVt>,
    /// See [`op::WRITE`](crate::op::WRITE).
    pub write: Option<&'static OpVt>,
    /// See [`op::FLUSH`](crate::op::FLUSH).
    pub flush: Option<&'static OpVt>,
    /// See [`op::DISCARD`](crate::op::DISCARD).
    pub discard: Option<&'static OpVt>,
    /// See [`op::WRITE_ZEROES`](crate::op::WRITE_ZEROES).
    pub write_zeroes: Option<&'static OpVt>,
    /// See [`op::BLOCK_STATUS`](crate::op::BLOCK_STATUS).
    #[sabi(last_prefix_field)]
    pub block_status: Option<&'static OpVt>,
    /// See [`op::CACHE`](crate::op::CACHE). Since 1.1.
    pub cache: Option<&'static OpVt>,
    /// See [`op::RESIZE`](crate::op::RESIZE). Since 1.2.
    pub resize: Option<&'static OpVt>,
    /// See [`op::EVENT`](crate::op::EVENT). Since 1.2.
    pub event: Option<&'static OpVt>,
    /// Looks at the children before anything else does, and may refuse them: the first operation after `open`. Its request is
    /// that of a flush. Since 1.2.
    pub begin: Option<&'static OpVt>,
    /// Leaves the children as they shall be found when the filter is not there any more: the last operation before
    /// `close`, and before nothing may be written any more. Its request is that of a flush. Since 1.2.
    pub settle: Option<&'static OpVt>,
    /// The limits shown above, given those of the children; `shown` begins as child 0's, with the size from `size`.
    /// Since 1.2.
    pub info: Option<unsafe extern "C" fn(FilterPtr, children: RSlice<'_, Info>, shown: &mut Info)>,
    /// What it needs of a child, and does not let others do with it, beyond what its kind does: two sets of bits of
    /// [`permission`](crate::permission). Since 1.2.
    pub permissions: Option<unsafe extern "C" fn(FilterPtr, child: u32, takes: &mut u32, denies: &mut u32)>,
    /// The host waits until nothing is in flight in the filter, or has ended that: 1 or 0. It may come while requests are at
    /// work, from any thread, does not wait, and is called with 0 once for each 1. Since 1.3.
    pub drained: Option<unsafe extern "C" fn(FilterPtr, drained: u32)>,
}

/// A filter: its name, what it declares, and how it is opened.
#[repr(C)]
#[allow(missing_debug_implementations)] // function pointers say nothing
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = FilterDescRef, prefix_fields = FilterDescPrefix)))]
#[sabi(missing_field(option))]
pub struct FilterDesc {
    /// The driver's name in a graph.
    pub name: RStr<'static>,
    /// The version of the filter.
    pub version: RStr<'static>,
    /// One line for people.
    pub summary: RStr<'static>,
    /// How many operations the SDK knew that it was built with. The host never passes it one from here on.
    pub operations_known: u32,
    /// One of [`default`](crate::default).
    pub default: u32,
    /// Bits of [`effect`](crate::effect).
    pub effects: u64,
    /// Children beside the filtered one, by name; each is required.
    pub children: RSlice<'static, RStr<'static>>,
    /// Its operations.
    pub ops: FilterOpsRef,
    /// The names of the options that it accepts.
    pub options: extern "C" fn() -> RSlice<'static, RStr<'static>>,
    /// Would these options (a JSON object) be accepted? No effect.
    pub check: extern "C" fn(options_json: RStr<'_>) -> RResult<(), FfiError>,
    /// Opens an instance.
    #[sabi(last_prefix_field)]
    pub open: extern "C" fn(&OpenArgs<'_>) -> RResult<FilterPtr, FfiError>,
    /// The bits of [`flag`](crate::flag) that the SDK knew. The host takes others from what it passes. Without it: those
    /// of before 1.2. Since 1.2.
    pub flags_known: u32,
    /// Further children that may be missing; they come behind the others. Since 1.2.
    pub children_optional: RSlice<'static, RStr<'static>>,
    /// Other words for the filtered child. Since 1.2.
    pub child_words: RSlice<'static, RStr<'static>>,
    /// Kinds of objects that the library keeps for the nodes of this filter. Since 1.2.
    pub objects: RSlice<'static, RStr<'static>>,
    /// Does one of [`object`](crate::object) with an object; properties are JSON objects. Since 1.2.
    pub object: extern "C" fn(
        kind: RStr<'_>,
        name: RStr<'_>,
        call: u32,
        properties: RStr<'_>,
    ) -> RResult<RString, FfiError>,
    /// Why `begin` or `settle` of a filter of this library failed that just ended on this thread; empty: it said only the
    /// number. Since 1.2.
    pub last_failure: extern "C" fn() -> RString,
}

/// The root of a plugin library.
#[repr(C)]
#[allow(missing_debug_implementations)] // function pointers say nothing
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = PluginModRef, prefix_fields = PluginModPrefix)))]
#[sabi(missing_field(option))]
pub struct PluginMod {
    /// The panic strategy of the build. A library that aborts on panic is refused.
    pub panics_unwind: bool,
    /// Takes the host's services. Called once, before anything else.
    pub init: extern "C" fn(host: HostApiRef) -> RResult<(), FfiError>,
    /// The host's log filter has changed.
    pub log_refresh: extern "C" fn(),
    /// The filters in this library.
    #[sabi(last_prefix_field)]
    pub filters: extern "C" fn() -> RSlice<'static, FilterDescRef>,
}

impl RootModule for PluginModRef {
    declare_root_module_statics! { PluginModRef }
    const BASE_NAME: &'static str = "driveline_filter";
    const NAME: &'static str = "driveline filter plugin";
    const VERSION_STRINGS: VersionStrings = package_version_strings!();
}

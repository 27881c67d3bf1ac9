//! What the macros write is written against this module; authors need nothing of it.
//!
//! Every `extern "C"` function here catches panics: one that crossed the boundary would end the process.

use crate::{Error, Filter, FlushRequest, Info, Next, ObjectCall, OpenCx, Result, log, options};
use abi_stable::std_types::{
    RResult::{self, RErr, ROk},
    RSlice, RString,
};
use driveline_abi::{FfiError, FilterDesc, FilterOps, FilterPtr, HostApiRef, OpVt, OpenArgs, Status, object};
use driveline_op::{Body, flag, op, panic_text};
use std::{
    any::Any,
    cell::Cell,
    collections::BTreeMap,
    marker::PhantomData,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{OnceLock, PoisonError, RwLock},
};

pub use crate::options::OptionNames;
pub use abi_stable::{
    library::{
        __call_root_module_loader as call_root_module_loader, CheckTypeLayout, LibHeader,
        ROOT_MODULE_LOADER_NAME, RootModuleResult,
    },
    prefix_type::WithMetadata,
    std_types::RStr,
};
pub use driveline_abi::{FilterDescRef, FilterOpsRef, PluginMod, PluginModRef, default, effect};
pub use driveline_op::OpTable;

/// Names of options.
pub type Names = RSlice<'static, RStr<'static>>;

/// What `#[filter(...)]` declares.
#[derive(Debug)]
pub struct Declared {
    /// The driver's name.
    pub name: &'static str,
    /// The version of the author's crate.
    pub version: &'static str,
    /// One line for people.
    pub summary: &'static str,
    /// One of [`default`].
    pub default: u32,
    /// Bits of [`effect`].
    pub effects: u64,
    /// Children beside the filtered one.
    pub children: &'static [RStr<'static>],
    /// Further ones that may be missing.
    pub children_optional: &'static [RStr<'static>],
    /// Other words for the filtered one.
    pub child_words: &'static [RStr<'static>],
    /// Kinds of objects.
    pub objects: &'static [RStr<'static>],
    /// Is `info` among the methods written?
    pub has_info: bool,
    /// Is `permissions`?
    pub has_permissions: bool,
    /// Is `size` among the methods written?
    pub has_size: bool,
    /// The names of its options.
    pub options: extern "C" fn() -> Names,
}

/// A filter with `#[filter]` on it.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a filter that can be exported",
    label = "its `impl Filter` has no `#[filter]`, or one with a mistake",
    note = "write `#[filter(name = \"..\", default = \"pass\")]` above `impl Filter for {Self}`"
)]
pub trait Exported: Filter {
    /// Its declaration.
    const DECLARED: Declared;
    /// The operations that its author wrote.
    const OPERATIONS: OpTable<Self>;
    /// `begin`, where operations have `flush`, if its author wrote it.
    const BEGIN: OpTable<Self>;
    /// `settle`, likewise.
    const SETTLE: OpTable<Self>;
}

thread_local! {
    /// See `FilterDesc::last_failure`.
    static LAST_FAILURE: Cell<String> = const { Cell::new(String::new()) };
}

fn remember(error: &Error) {
    LAST_FAILURE.set(error.message().unwrap_or_default().to_owned());
}

extern "C" fn last_failure() -> RString {
    LAST_FAILURE.take().into()
}

/// `begin`, whose error is one that people read.
pub async fn begin_told<F: Filter>(
    filter: &F,
    next: &mut Next<'_>,
    request: &FlushRequest<'_>,
) -> Result<()> {
    filter.begin(next, request).await.inspect_err(remember)
}

/// `settle`, likewise.
pub async fn settle_told<F: Filter>(
    filter: &F,
    next: &mut Next<'_>,
    request: &FlushRequest<'_>,
) -> Result<()> {
    filter.settle(next, request).await.inspect_err(remember)
}

/// The first operation of a filter, if it has one.
pub(crate) const fn begin<F: Exported>() -> Option<&'static OpVt> {
    F::BEGIN.slots()[op::FLUSH as usize]
}

/// The last operation of a filter, if it has one.
pub(crate) const fn settle<F: Exported>() -> Option<&'static OpVt> {
    F::SETTLE.slots()[op::FLUSH as usize]
}

/// The description of an exported filter, as the host sees it.
pub const fn describe<F: Exported>() -> FilterDescRef {
    FilterDescRef(Described::<F>::DESC.static_as_prefix())
}

struct Described<F>(PhantomData<F>);

impl<F: Exported> Described<F> {
    const OPS: &'static WithMetadata<FilterOps> = {
        let slots = F::OPERATIONS.slots();
        &WithMetadata::new(FilterOps {
            close: close::<F>,
            size: if F::DECLARED.has_size { Some(size::<F>) } else { None },
            read: slots[op::READ as usize],
            write: slots[op::WRITE as usize],
            flush: slots[op::FLUSH as usize],
            discard: slots[op::DISCARD as usize],
            write_zeroes: slots[op::WRITE_ZEROES as usize],
            block_status: slots[op::BLOCK_STATUS as usize],
            cache: slots[op::CACHE as usize],
            resize: slots[op::RESIZE as usize],
            event: slots[op::EVENT as usize],
            begin: begin::<F>(),
            settle: settle::<F>(),
            info: if F::DECLARED.has_info { Some(info::<F>) } else { None },
            permissions: if F::DECLARED.has_permissions { Some(permissions::<F>) } else { None },
        })
    };

    const DESC: &'static WithMetadata<FilterDesc> = &WithMetadata::new(FilterDesc {
        name: RStr::from_str(F::DECLARED.name),
        version: RStr::from_str(F::DECLARED.version),
        summary: RStr::from_str(F::DECLARED.summary),
        operations_known: op::COUNT as u32,
        default: F::DECLARED.default,
        effects: F::DECLARED.effects,
        children: RSlice::from_slice(F::DECLARED.children),
        ops: FilterOpsRef(Self::OPS.static_as_prefix()),
        options: F::DECLARED.options,
        check: check::<F>,
        open: open::<F>,
        flags_known: flag::KNOWN,
        children_optional: RSlice::from_slice(F::DECLARED.children_optional),
        child_words: RSlice::from_slice(F::DECLARED.child_words),
        objects: RSlice::from_slice(F::DECLARED.objects),
        object: object::<F>,
        last_failure,
    });
}

static HOST: OnceLock<HostApiRef> = OnceLock::new();

/// The host's services.
#[inline]
pub(crate) fn host() -> HostApiRef {
    *HOST.get().expect("a filter runs in a host, or in driveline_sdk::testing")
}

/// The names of open nodes by their cookies: the log says whose error it tells of. A node that is reopened has two instances for
/// a while, so they are counted.
static NAMES: RwLock<BTreeMap<u64, (String, usize)>> = RwLock::new(BTreeMap::new());

fn node_name(cookie: u64) -> Option<String> {
    NAMES.read().unwrap_or_else(PoisonError::into_inner).get(&cookie).map(|(name, _)| name.clone())
}

/// An instance of a node is open.
fn remember_name(cookie: u64, name: &str) {
    let mut names = NAMES.write().unwrap_or_else(PoisonError::into_inner);
    names.entry(cookie).or_insert_with(|| (name.to_owned(), 0)).1 += 1;
}

/// An instance is closed.
fn forget_name(cookie: u64) {
    let mut names = NAMES.write().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, instances)) = names.get_mut(&cookie) {
        *instances -= 1;
        if *instances == 0 {
            names.remove(&cookie);
        }
    }
}

/// Is there a host?
pub(crate) fn started() -> bool {
    HOST.get().is_some()
}

/// Takes the host's services; the first host counts.
pub(crate) fn start(host: HostApiRef) {
    let _ = HOST.set(host);
    driveline_op::set_panic_hook(node_failed);
    driveline_op::set_name_hook(node_name);
}

/// The start of a plugin.
pub extern "C" fn init(host: HostApiRef) -> RResult<(), FfiError> {
    guard(|| {
        start(host);
        log::install(host);
        // A library has a panic hook of its own, which would write to stderr. Threads of the filter's own have
        // nobody else to tell of their panics.
        std::panic::set_hook(Box::new(|info| {
            let place = info.location().map(|place| format!("{}:{}", place.file(), place.line()));
            let text = info.payload_as_str().unwrap_or("(no text)");
            tracing::error!(place, "a panic: {text}");
            PANICKED_AT.with(|last| last.set(place));
        }));
        Ok(())
    })
}

thread_local! {
    /// Where this thread panicked last.
    static PANICKED_AT: Cell<Option<String>> = const { Cell::new(None) };
}

/// The host's log filter has changed.
pub extern "C" fn log_refresh() {
    let _ = catch_unwind(tracing_core::callsite::rebuild_interest_cache).map_err(std::mem::forget);
}

/// A panic in words.
fn panic_words(text: &str) -> String {
    match PANICKED_AT.with(Cell::take) {
        Some(place) => format!("it panicked at {place}: {text}"),
        None => format!("it panicked: {text}"),
    }
}

fn node_failed(cookie: u64, text: &str) {
    raise(cookie, &panic_words(text));
}

/// Tells the host that a node failed.
pub(crate) fn raise(cookie: u64, words: &str) {
    match started().then(|| host().node_failed()).flatten() {
        Some(tell) => tell(cookie, words.into()),
        // A host that is older than this service.
        None => tracing::error!("a filter failed: {words}"),
    }
}

/// Tells the host of a panic outside the operations, which have a hook of their own.
fn tell(cookie: u64, payload: Box<dyn Any + Send>) {
    let text = panic_text(payload);
    let _ = catch_unwind(|| node_failed(cookie, &text)).map_err(std::mem::forget);
}

fn on_panic(payload: Box<dyn Any + Send>) -> FfiError {
    FfiError { errno: 5, key: "".into(), message: panic_words(&panic_text(payload)).into() }
}

fn guard<T>(f: impl FnOnce() -> Result<T>) -> RResult<T, FfiError> {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(value)) => ROk(value),
        Ok(Err(error)) => RErr(FfiError {
            errno: error.code(),
            key: error.key().unwrap_or("").into(),
            message: match error.message() {
                Some(message) => message.into(),
                None => error.to_string().into(),
            },
        }),
        Err(payload) => RErr(on_panic(payload)),
    }
}

fn read_options<F: Filter>(json: &str) -> Result<F::Options> {
    let options = options::parse::<F::Options>(json)?;
    F::check(&options)?;
    Ok(options)
}

extern "C" fn check<F: Filter>(options_json: RStr<'_>) -> RResult<(), FfiError> {
    guard(|| read_options::<F>(options_json.as_str()).map(drop))
}

extern "C" fn open<F: Filter>(arguments: &OpenArgs<'_>) -> RResult<FilterPtr, FfiError> {
    guard(|| {
        let options = read_options::<F>(arguments.options_json.as_str())?;
        let cx = OpenCx {
            cookie: arguments.cookie,
            node_name: arguments.node_name.as_str(),
            children: arguments.children.as_slice(),
        };
        let body = Body { cookie: arguments.cookie, driver: F::open(options, &cx)? };
        remember_name(arguments.cookie, arguments.node_name.as_str());
        Ok(FilterPtr(Box::into_raw(Box::new(body)).cast_const().cast()))
    })
}

extern "C" fn object<F: Filter>(
    kind: RStr<'_>,
    name: RStr<'_>,
    call: u32,
    properties: RStr<'_>,
) -> RResult<RString, FfiError> {
    guard(|| {
        let properties = || options::parse::<serde_json::Value>(properties.as_str());
        let call = match call {
            object::CHECK => ObjectCall::Check(properties()?),
            object::CREATE => ObjectCall::Create(properties()?),
            object::SET => ObjectCall::Set(properties()?),
            object::GET => ObjectCall::Get,
            object::DELETE => ObjectCall::Delete,
            // A host newer than this.
            other => return Err(Error::NOT_SUPPORTED.because(format_args!("there is no call {other}"))),
        };
        F::object(kind.as_str(), name.as_str(), call).map(|properties| properties.to_string().into())
    })
}

unsafe extern "C" fn close<F: Filter>(filter: FilterPtr) -> Status {
    // SAFETY: the pointer came from `open`, and the host closes once, with nothing in flight.
    let body = unsafe { Box::from_raw(filter.0.cast_mut().cast::<Body<F>>()) };
    let cookie = body.cookie;
    forget_name(cookie);
    match catch_unwind(AssertUnwindSafe(|| drop(body))) {
        Ok(()) => Status::OK,
        Err(payload) => {
            tell(cookie, payload);
            Status::PANICKED
        }
    }
}

unsafe extern "C" fn size<F: Filter>(filter: FilterPtr, child_size_bytes: u64) -> u64 {
    // SAFETY: the pointer came from `open`, and the host has not closed it.
    let body = unsafe { &*filter.0.cast::<Body<F>>() };
    catch_unwind(AssertUnwindSafe(|| body.driver.size(child_size_bytes))).unwrap_or_else(|payload| {
        tell(body.cookie, payload);
        0 // nothing can be done with such a node
    })
}

unsafe extern "C" fn info<F: Filter>(filter: FilterPtr, children: RSlice<'_, Info>, shown: &mut Info) {
    // SAFETY: the pointer came from `open`, and the host has not closed it.
    let body = unsafe { &*filter.0.cast::<Body<F>>() };
    let asked = catch_unwind(AssertUnwindSafe(|| body.driver.info(children.as_slice(), *shown)));
    match asked {
        Ok(info) => *shown = info,
        Err(payload) => {
            tell(body.cookie, payload);
            shown.size_bytes = 0; // nothing can be done with such a node
        }
    }
}

unsafe extern "C" fn permissions<F: Filter>(
    filter: FilterPtr,
    child: u32,
    takes: &mut u32,
    denies: &mut u32,
) {
    // SAFETY: as above.
    let body = unsafe { &*filter.0.cast::<Body<F>>() };
    match catch_unwind(AssertUnwindSafe(|| body.driver.permissions(child as usize))) {
        Ok(claim) => (*takes, *denies) = (claim.takes, claim.denies),
        Err(payload) => tell(body.cookie, payload),
    }
}

const _: () = {
    let (expected, written) =
        (ROOT_MODULE_LOADER_NAME.as_bytes(), b"_1as_0lib_1header_0root_bmodule_bloader");
    assert!(expected.len() == written.len());
    let mut index = 0;
    while index < expected.len() {
        assert!(
            expected[index] == written[index],
            "the name in export_filters! is the one that hosts look for"
        );
        index += 1;
    }
};

/// Exports filters from a shared library: `export_filters![Delay];`, once in a crate of type `cdylib`.
#[macro_export]
macro_rules! export_filters {
    ($($filter:ty),+ $(,)?) => {
        const _: () = {
            use $crate::export::*;

            extern "C" fn filters() -> $crate::export::Filters {
                const LIST: &[FilterDescRef] = &[$(describe::<$filter>()),+];
                $crate::export::Filters::from_slice(LIST)
            }

            fn root() -> PluginModRef {
                const ROOT: &WithMetadata<PluginMod> = &WithMetadata::new(PluginMod {
                    panics_unwind: ::core::cfg!(panic = "unwind"),
                    init,
                    log_refresh,
                    filters,
                });
                PluginModRef(ROOT.static_as_prefix())
            }

            extern "C" fn erased() -> RootModuleResult {
                call_root_module_loader(root)
            }

            // What abi_stable's own attribute would write, if authors had abi_stable among their dependencies.
            // SAFETY: `erased` returns the module that the header is typed with, and the name is abi_stable's.
            #[unsafe(export_name = "_1as_0lib_1header_0root_bmodule_bloader")]
            static HEADER: LibHeader =
                unsafe { LibHeader::from_constructor::<PluginModRef>(erased, CheckTypeLayout::Yes) };
        };
    };
}

/// The filters of a library.
pub type Filters = RSlice<'static, FilterDescRef>;

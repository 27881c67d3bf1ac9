//! The host's side of what plugins may ask for.
//!
//! Every function here is called by plugins, so none of them lets a panic out: it would end the process.

mod log;
mod timers;

pub use timers::ThreadTimers;

use abi_stable::{prefix_type::WithMetadata, std_types::RStr};
use driveline_abi::{HostApi, HostApiRef, Status, WakeHandle};
use driveline_op::{panic_text, with_context};
use std::{
    alloc::{Layout, alloc, dealloc},
    panic::{AssertUnwindSafe, catch_unwind},
    ptr::null_mut,
    sync::{Arc, OnceLock},
    task::Waker,
};

/// What the program does for its plugins. All may be called from any thread.
pub trait HostServices: Send + Sync + 'static {
    /// Nanoseconds of a clock that never goes back.
    fn now_ns(&self) -> u64;

    /// Starts a timer that wakes once; 0: the deadline has passed already.
    fn timer_start(&self, deadline_ns: u64, waker: Waker) -> u64;

    /// Has the timer expired? If not, it will wake this waker.
    fn timer_poll(&self, timer: u64, waker: &Waker) -> bool;

    /// Gives a timer back, expired or not.
    fn timer_drop(&self, timer: u64);

    /// A filter panicked; `cookie` is what its node was opened with.
    fn node_failed(&self, cookie: u64, message: &str);
}

static SERVICES: OnceLock<Arc<dyn HostServices>> = OnceLock::new();

/// Says who serves plugins. It is to be called before the first one is loaded; `false`: it is too late.
///
/// Without it plugins are served by [`ThreadTimers`].
pub fn install(services: Arc<dyn HostServices>) -> bool {
    SERVICES.set(services).is_ok()
}

fn services() -> &'static dyn HostServices {
    &**SERVICES.get_or_init(|| Arc::new(ThreadTimers::default()))
}

/// Runs the body of a callback. If it panics the plugin gets `otherwise`.
fn callback<T>(otherwise: T, body: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| {
        let text = panic_text(payload);
        let _ = catch_unwind(|| ::tracing::error!("a service for plugins panicked: {text}"))
            .map_err(std::mem::forget);
        otherwise
    })
}

extern "C" fn now_ns() -> u64 {
    callback(0, || services().now_ns())
}

unsafe extern "C" fn timer_start(deadline_ns: u64, waker: *const WakeHandle) -> u64 {
    // SAFETY: the plugin lends the handle for the call.
    callback(0, || unsafe {
        with_context(waker, |cx| services().timer_start(deadline_ns, cx.waker().clone()))
    })
}

unsafe extern "C" fn timer_poll(timer: u64, waker: *const WakeHandle) -> Status {
    callback(Status::OK, || {
        // SAFETY: as above.
        let expired = unsafe { with_context(waker, |cx| services().timer_poll(timer, cx.waker())) };
        if expired { Status::OK } else { Status::PENDING }
    })
}

unsafe extern "C" fn timer_drop(timer: u64) {
    callback((), || services().timer_drop(timer));
}

unsafe extern "C" fn buffer_alloc(len: usize, align: usize) -> *mut u8 {
    match Layout::from_size_align(len.max(1), align) {
        // SAFETY: the layout is not empty.
        Ok(layout) => unsafe { alloc(layout) },
        Err(_) => null_mut(),
    }
}

unsafe extern "C" fn buffer_free(base: *mut u8, len: usize, align: usize) {
    if let Ok(layout) = Layout::from_size_align(len.max(1), align) {
        // SAFETY: the plugin's: it came from `buffer_alloc` with the same size and alignment.
        unsafe { dealloc(base, layout) }
    }
}

extern "C" fn node_failed(cookie: u64, message: RStr<'_>) {
    callback((), || services().node_failed(cookie, message.as_str()));
}

const API: &WithMetadata<HostApi> = &WithMetadata::new(HostApi {
    now_ns,
    timer_start,
    timer_poll,
    timer_drop,
    buffer_alloc,
    buffer_free,
    log_max_level: log::max_level,
    log_register: log::register,
    log_enabled: log::enabled,
    log_event: log::event,
    span_new: log::span_new,
    span_enter: log::span_enter,
    span_exit: log::span_exit,
    span_clone: log::span_clone,
    span_close: log::span_close,
    node_failed,
});

/// What plugins are given.
pub(crate) fn api() -> HostApiRef {
    HostApiRef(API.static_as_prefix())
}

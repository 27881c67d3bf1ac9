//! A host whose time is virtual, one for each thread.

use crate::export;
use abi_stable::{
    prefix_type::WithMetadata,
    std_types::{RSlice, RStr},
};
use driveline_abi::{CallsiteInfo, FieldValue, HostApi, HostApiRef, Status, WakeHandle};
use driveline_op::with_context;
use std::{
    alloc::{Layout, alloc, dealloc},
    cell::RefCell,
    collections::BTreeMap,
    future::Future,
    pin::{Pin, pin},
    ptr::null_mut,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll, Wake, Waker},
};

#[derive(Default)]
struct Clock {
    now_ns: u64,
    last_timer: u64,
    /// By timer number: when, and whom to wake.
    timers: BTreeMap<u64, (u64, Waker)>,
}

thread_local! {
    static CLOCK: RefCell<Clock> = RefCell::default();
}

/// Panics of nodes: which, and the text.
static FAILURES: Mutex<Vec<(u64, String)>> = Mutex::new(Vec::new());

pub(super) fn failures(cookie: u64) -> Vec<String> {
    let failures = FAILURES.lock().unwrap_or_else(PoisonError::into_inner);
    failures.iter().filter(|(node, _)| *node == cookie).map(|(_, text)| text.clone()).collect()
}

/// Makes this the host of the filters in this process.
pub(super) fn install() {
    if !export::started() {
        export::start(HostApiRef(API.static_as_prefix()));
    }
}

/// Goes to the time at which the next timer expires. `false`: there is none.
fn advance() -> bool {
    let due: Vec<Waker> = CLOCK.with_borrow_mut(|clock| {
        let Some(next) = clock.timers.values().map(|(deadline, _)| *deadline).min() else {
            return Vec::new();
        };
        clock.now_ns = clock.now_ns.max(next);
        let due = clock.timers.extract_if(.., |_, (deadline, _)| *deadline == next);
        due.map(|(_, (_, waker))| waker).collect()
    });
    let any = !due.is_empty();
    due.into_iter().for_each(Waker::wake);
    any
}

struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Relaxed);
    }
}

/// Runs a future to its end, in virtual time. Panics if nothing can ever wake it.
pub fn block_on<F: Future>(future: F) -> F::Output {
    install();
    let woken = Arc::new(Woken(AtomicBool::new(false)));
    let waker = Waker::from(woken.clone());
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return output;
        }
        while !woken.0.swap(false, Relaxed) {
            assert!(advance(), "the future waits, and nothing will ever wake it");
        }
    }
}

/// Runs futures at the same time; their outputs in the order given.
pub async fn join<T>(futures: impl IntoIterator<Item = impl Future<Output = T>>) -> Vec<T> {
    let mut running: Vec<_> = futures.into_iter().map(|future| (Box::pin(future), None)).collect();
    std::future::poll_fn(|cx| {
        let mut pending = false;
        for (future, output) in running.iter_mut().filter(|(_, output)| output.is_none()) {
            match Pin::new(future).poll(cx) {
                Poll::Ready(done) => *output = Some(done),
                Poll::Pending => pending = true,
            }
        }
        if pending { Poll::Pending } else { Poll::Ready(()) }
    })
    .await;
    running.into_iter().filter_map(|(_, output)| output).collect()
}

extern "C" fn now_ns() -> u64 {
    CLOCK.with_borrow(|clock| clock.now_ns)
}

unsafe extern "C" fn timer_start(deadline_ns: u64, waker: *const WakeHandle) -> u64 {
    // SAFETY: the handle is valid for the call.
    let waker = unsafe { with_context(waker, |cx| cx.waker().clone()) };
    CLOCK.with_borrow_mut(|clock| {
        if deadline_ns <= clock.now_ns {
            return 0;
        }
        clock.last_timer += 1;
        clock.timers.insert(clock.last_timer, (deadline_ns, waker));
        clock.last_timer
    })
}

unsafe extern "C" fn timer_poll(timer: u64, waker: *const WakeHandle) -> Status {
    // SAFETY: as above.
    let waker = unsafe { with_context(waker, |cx| cx.waker().clone()) };
    let old = CLOCK.with_borrow_mut(|clock| {
        clock.timers.get_mut(&timer).map(|(_, old)| std::mem::replace(old, waker)) // dropped outside
    });
    if old.is_some() { Status::PENDING } else { Status::OK }
}

unsafe extern "C" fn timer_drop(timer: u64) {
    let _ = CLOCK.try_with(|clock| clock.borrow_mut().timers.remove(&timer));
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
        // SAFETY: the caller's: it came from `buffer_alloc` with the same size and alignment.
        unsafe { dealloc(base, layout) }
    }
}

// Logging is not bridged: in this process, events reach the test's own subscriber by themselves.
extern "C" fn log_max_level() -> u32 {
    0
}

extern "C" fn log_register(_: &CallsiteInfo<'_>) -> u64 {
    0
}

extern "C" fn log_enabled(_: u64) -> bool {
    false
}

extern "C" fn log_event(_: u64, _: RSlice<'_, FieldValue<'_>>) {}

extern "C" fn span_new(_: u64, _: RSlice<'_, FieldValue<'_>>) -> u64 {
    0
}

extern "C" fn span_nothing(_: u64) {}

extern "C" fn node_failed(cookie: u64, message: RStr<'_>) {
    FAILURES.lock().unwrap_or_else(PoisonError::into_inner).push((cookie, message.to_string()));
}

const API: &WithMetadata<HostApi> = &WithMetadata::new(HostApi {
    now_ns,
    timer_start,
    timer_poll,
    timer_drop,
    buffer_alloc,
    buffer_free,
    log_max_level,
    log_register,
    log_enabled,
    log_event,
    span_new,
    span_enter: span_nothing,
    span_exit: span_nothing,
    span_clone: span_nothing,
    span_close: span_nothing,
    node_failed,
});

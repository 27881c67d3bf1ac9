//! Wakers across the boundary: a `std` waker that *is* a [`WakeHandle`], and one wrapped as a handle.

use driveline_abi::{WakeHandle, WakeVt};
use std::{
    mem::ManuallyDrop,
    ptr,
    task::{Context, RawWaker, RawWakerVTable, Waker},
};

/// The vtable of a `std` waker whose data pointer is a [`WakeHandle`]. An executor that makes its wakers with
/// this vtable hands them to operations as they are, without a box for each wait.
pub static HANDLE_WAKER: RawWakerVTable = {
    unsafe fn clone(p: *const ()) -> RawWaker {
        let w = p.cast::<WakeHandle>();
        // SAFETY: the data of such a waker is a valid handle (contract of this vtable).
        unsafe { RawWaker::new(((*w).vt.clone)(w).cast(), &HANDLE_WAKER) }
    }
    unsafe fn wake(p: *const ()) {
        let w = p.cast::<WakeHandle>();
        // SAFETY: as above.
        unsafe { ((*w).vt.wake)(w) }
    }
    unsafe fn wake_by_ref(p: *const ()) {
        let w = p.cast::<WakeHandle>();
        // SAFETY: as above.
        unsafe { ((*w).vt.wake_by_ref)(w) }
    }
    unsafe fn drop(p: *const ()) {
        let w = p.cast::<WakeHandle>();
        // SAFETY: as above.
        unsafe { ((*w).vt.drop)(w) }
    }
    RawWakerVTable::new(clone, wake, wake_by_ref, drop)
};

/// A handle around somebody else's waker, borrowed for one call.
#[repr(C)]
struct Borrowed {
    handle: WakeHandle,
    waker: *const Waker,
}

/// A handle that owns somebody else's waker.
#[repr(C)]
struct Owned {
    handle: WakeHandle,
    waker: Waker,
}

unsafe extern "C" fn never(_: *const WakeHandle) {
    // A borrowed handle is not its user's to consume; to go on would be a double free.
    std::process::abort()
}

fn own(waker: &Waker) -> *const WakeHandle {
    let owned = Owned { handle: WakeHandle { vt: &OWNED }, waker: waker.clone() };
    Box::into_raw(Box::new(owned)).cast_const().cast()
}

static BORROWED: WakeVt = {
    unsafe extern "C" fn clone(p: *const WakeHandle) -> *const WakeHandle {
        // SAFETY: a handle with this vtable is a `Borrowed` whose waker outlives the call.
        own(unsafe { &*(*p.cast::<Borrowed>()).waker })
    }
    unsafe extern "C" fn wake_by_ref(p: *const WakeHandle) {
        // SAFETY: as above.
        unsafe { (*(*p.cast::<Borrowed>()).waker).wake_by_ref() }
    }
    WakeVt { clone, wake: never, wake_by_ref, drop: never }
};

static OWNED: WakeVt = {
    unsafe extern "C" fn clone(p: *const WakeHandle) -> *const WakeHandle {
        // SAFETY: a handle with this vtable is an `Owned` made by `own`.
        own(unsafe { &(*p.cast::<Owned>()).waker })
    }
    unsafe extern "C" fn wake(p: *const WakeHandle) {
        // SAFETY: as above, and the caller gives its handle up.
        unsafe { Box::from_raw(p.cast_mut().cast::<Owned>()) }.waker.wake();
    }
    unsafe extern "C" fn wake_by_ref(p: *const WakeHandle) {
        // SAFETY: as in `clone`.
        unsafe { (*p.cast::<Owned>()).waker.wake_by_ref() }
    }
    unsafe extern "C" fn drop(p: *const WakeHandle) {
        // SAFETY: as in `wake`.
        std::mem::drop(unsafe { Box::from_raw(p.cast_mut().cast::<Owned>()) });
    }
    WakeVt { clone, wake, wake_by_ref, drop }
};

/// Runs `f` with a `std` context for a borrowed handle.
///
/// # Safety
///
/// `w` is valid for the call.
#[inline]
pub unsafe fn with_context<T>(w: *const WakeHandle, f: impl FnOnce(&mut Context<'_>) -> T) -> T {
    // SAFETY: the caller's; not dropped, so the borrowed handle is not consumed.
    let waker = ManuallyDrop::new(unsafe { Waker::from_raw(RawWaker::new(w.cast(), &HANDLE_WAKER)) });
    f(&mut Context::from_waker(&waker))
}

/// Runs `f` with a handle, borrowed for the call, that wakes `cx`'s task.
#[inline]
pub fn with_handle<T>(cx: &Context<'_>, f: impl FnOnce(*const WakeHandle) -> T) -> T {
    let waker = cx.waker();
    if ptr::eq(waker.vtable(), &raw const HANDLE_WAKER) {
        return f(waker.data().cast());
    }
    let borrowed = Borrowed { handle: WakeHandle { vt: &BORROWED }, waker };
    f((&raw const borrowed).cast())
}

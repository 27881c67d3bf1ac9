//! From an `async fn` to an [`OpVt`]. Panics end here.

use crate::{
    Next, Result,
    request::{
        BlockStatusRequest, CacheRequest, DiscardRequest, EventRequest, FlushRequest, ReadRequest,
        ResizeRequest, View, WriteRequest, WriteZeroesRequest,
    },
    wake::with_context,
};
use driveline_abi::{OpVt, Request, Scratch, Status, TargetAbi, WakeHandle, op};
use std::{
    any::Any,
    fmt,
    future::Future,
    marker::PhantomData,
    mem::{ManuallyDrop, MaybeUninit},
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::OnceLock,
    task::Poll,
};

/// A driver's state as operations find it: what [`TargetAbi::node`] points to.
#[repr(C)]
#[derive(Debug)]
pub struct Body<D> {
    /// Stands for the node when hooks are called.
    pub cookie: u64,
    /// The driver.
    pub driver: D,
}

/// The operations of a driver: which `async fn` does what. A missing one is left out.
///
/// ```
/// use driveline_op::{Next, OpTable, ReadRequest, Result};
/// struct Zeroes;
/// impl Zeroes {
///     async fn read(&self, _next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
///         request.zero(0..request.length());
///         Ok(())
///     }
/// }
/// static OPS: OpTable<Zeroes> = OpTable::new().read(Zeroes::read);
/// assert!(OPS.slots()[driveline_abi::op::READ as usize].is_some());
/// ```
pub struct OpTable<D> {
    slots: [Option<&'static OpVt>; op::COUNT],
    driver: PhantomData<fn(&D)>,
}

impl<D> fmt::Debug for OpTable<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names =
            op::NAMES.iter().zip(&self.slots).filter(|(_, slot)| slot.is_some()).map(|(name, _)| name);
        f.debug_set().entries(names).finish()
    }
}

macro_rules! setters {
    ($($(#[$doc:meta])* $name:ident $req:ident $op:expr;)*) => {
        impl<D: Send + Sync + 'static> OpTable<D> { $(
            $(#[$doc])*
            #[must_use]
            pub const fn $name<R, M>(mut self, _: M) -> Self
            where
                M: Fn(&'static D, &'static mut Next<'static>, &'static $req<'static>) -> R + Copy + 'static,
                R: Future<Output = Result<()>> + Send + 'static,
            {
                self.slots[$op as usize] = Some(&Shim::<D, $req<'static>, R, M>::VT);
                self
            }
        )* }
    };
}

impl<D: Send + Sync + 'static> Default for OpTable<D> {
    fn default() -> Self {
        Self::new()
    }
}

impl<D: Send + Sync + 'static> OpTable<D> {
    /// No operation.
    pub const fn new() -> Self {
        Self { slots: [None; op::COUNT], driver: PhantomData }
    }

    /// By operation number.
    pub const fn slots(&self) -> &[Option<&'static OpVt>; op::COUNT] {
        &self.slots
    }
}

setters! {
    /// How reads are done.
    read ReadRequest op::READ;
    /// How writes are done.
    write WriteRequest op::WRITE;
    /// How flushes are done.
    flush FlushRequest op::FLUSH;
    /// How discards are done.
    discard DiscardRequest op::DISCARD;
    /// How zeroes are written.
    write_zeroes WriteZeroesRequest op::WRITE_ZEROES;
    /// How extents are described.
    block_status BlockStatusRequest op::BLOCK_STATUS;
    /// How hints are taken.
    cache CacheRequest op::CACHE;
    /// How the size is changed.
    resize ResizeRequest op::RESIZE;
    /// How a parent's events are taken.
    event EventRequest op::EVENT;
}

/// What is told of a panic in an operation: the node's cookie, and the text.
pub type PanicHook = fn(cookie: u64, text: &str);
static PANIC_HOOK: OnceLock<PanicHook> = OnceLock::new();

/// Sets who is told of panics in operations of this library. The first call counts; it returns whether it was.
pub fn set_panic_hook(hook: PanicHook) -> bool {
    PANIC_HOOK.set(hook).is_ok()
}

/// What knows the name of a node by its cookie, for the log.
pub type NameHook = fn(cookie: u64) -> Option<String>;
static NAME_HOOK: OnceLock<NameHook> = OnceLock::new();

/// Sets who knows the names of this library's nodes. The first call counts; it returns whether it was.
pub fn set_name_hook(hook: NameHook) -> bool {
    NAME_HOOK.set(hook).is_ok()
}

/// The name of a node, if somebody knows it. A panic in the hook is no name.
pub(crate) fn node_name(cookie: u64) -> Option<String> {
    let hook = NAME_HOOK.get()?;
    catch_unwind(AssertUnwindSafe(|| hook(cookie))).unwrap_or_else(|payload| {
        std::mem::forget(payload);
        None
    })
}

/// The text of a panic. The payload is leaked, because its `Drop` could panic again.
pub fn panic_text(payload: Box<dyn Any + Send>) -> String {
    let text = match (payload.downcast_ref::<&str>(), payload.downcast_ref::<String>()) {
        (Some(text), _) => (*text).to_owned(),
        (_, Some(text)) => text.clone(),
        _ => "(no text)".to_owned(),
    };
    std::mem::forget(payload);
    text
}

#[cold]
#[inline(never)]
fn on_panic(cookie: u64, payload: Box<dyn Any + Send>) -> Status {
    let text = panic_text(payload);
    // The hook and the log are code like any other: a panic in them must not get out either.
    let _ = catch_unwind(AssertUnwindSafe(|| match PANIC_HOOK.get() {
        Some(hook) => hook(cookie, &text),
        None => tracing::error!("an operation panicked: {text}"),
    }))
    .map_err(std::mem::forget);
    Status::PANICKED
}

/// The state of a running operation. `next` stays where it is while `future` borrows it.
#[repr(C)]
struct Slot<R> {
    next: Next<'static>,
    cookie: u64,
    future: ManuallyDrop<R>,
}

struct Shim<D, Q, R, M>(PhantomData<(D, Q, R, M)>);

impl<D, Q, R, M> Shim<D, Q, R, M>
where
    D: Send + Sync + 'static,
    Q: View,
    R: Future<Output = Result<()>> + Send,
    M: Fn(&'static D, &'static mut Next<'static>, &'static Q) -> R + Copy,
{
    const VT: OpVt = OpVt {
        size: size_of::<Slot<R>>(),
        align: align_of::<Slot<R>>(),
        start: Self::start,
        poll: Self::poll,
        drop: Self::drop,
    };

    unsafe extern "C" fn start(
        target: *const TargetAbi,
        request: *const Request,
        slot: *mut u8,
        rest: Scratch,
        waker: *const WakeHandle,
    ) -> Status {
        const { assert!(size_of::<M>() == 0, "an operation is a function item, not a closure with state") };
        // SAFETY: `M` has no bytes, and a value of it existed when the table was made.
        #[allow(clippy::uninit_assumed_init)]
        let make = unsafe { MaybeUninit::<M>::uninit().assume_init() };
        // SAFETY: the target lends a `Body<D>`: instances are only ever paired with their own driver's table.
        let body = unsafe { &*(*target).node.cast::<Body<D>>() };
        let built = catch_unwind(AssertUnwindSafe(|| {
            let slot = slot.cast::<Slot<R>>();
            // SAFETY: a fresh slot of our size and alignment; all that is lent outlives the future in it.
            unsafe {
                (&raw mut (*slot).next).write(Next::new(target, rest));
                (&raw mut (*slot).cookie).write(body.cookie);
                let future = make(&body.driver, &mut (*slot).next, &*request.cast::<Q>());
                (&raw mut (*slot).future).write(ManuallyDrop::new(future));
                Self::go(slot, waker)
            }
        }));
        built.unwrap_or_else(|payload| on_panic(body.cookie, payload))
    }

    /// Polls the future. Unless it says PENDING the future is dropped, by unwinding too: the slot is dead.
    ///
    /// # Safety
    ///
    /// `slot` holds a future that is not dropped yet.
    #[inline(always)]
    unsafe fn go(slot: *mut Slot<R>, waker: *const WakeHandle) -> Status {
        struct End<R>(*mut Slot<R>);
        impl<R> Drop for End<R> {
            #[inline(always)]
            fn drop(&mut self) {
                // SAFETY: runs once, while the slot is still lent.
                unsafe {
                    ManuallyDrop::drop(&mut (*self.0).future);
                    (*self.0).next.check_none_live();
                }
            }
        }
        let end = End(slot);
        // SAFETY: the future stays in the slot until it is dropped; the waker is lent.
        let polled = unsafe { with_context(waker, |cx| Pin::new_unchecked(&mut *(*slot).future).poll(cx)) };
        match polled {
            Poll::Pending => {
                std::mem::forget(end);
                Status::PENDING
            }
            Poll::Ready(result) => {
                drop(end);
                match result {
                    Ok(()) => Status::OK,
                    Err(error) => {
                        // SAFETY: the slot is still lent, and a number has no destructor.
                        let cookie = unsafe { (*slot).cookie };
                        error.into_status(cookie, Q::OP)
                    }
                }
            }
        }
    }

    unsafe extern "C" fn poll(slot: *mut u8, waker: *const WakeHandle) -> Status {
        let slot = slot.cast::<Slot<R>>();
        // SAFETY: the slot is live (protocol).
        let cookie = unsafe { (*slot).cookie };
        // SAFETY: as above.
        catch_unwind(AssertUnwindSafe(|| unsafe { Self::go(slot, waker) }))
            .unwrap_or_else(|payload| on_panic(cookie, payload))
    }

    unsafe extern "C" fn drop(slot: *mut u8) {
        let slot = slot.cast::<Slot<R>>();
        // SAFETY: the slot is live (protocol).
        let cookie = unsafe { (*slot).cookie };
        let dropped = catch_unwind(AssertUnwindSafe(|| {
            // SAFETY: as above; nobody uses the slot afterwards.
            unsafe { ManuallyDrop::drop(&mut (*slot).future) }
        }));
        if let Err(payload) = dropped {
            on_panic(cookie, payload);
        }
        // SAFETY: `next` has no destructor and is still there.
        unsafe { (*slot).next.check_none_live() };
    }
}

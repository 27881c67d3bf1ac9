//! Calling what is below, from inside an operation.

use crate::{
    Error, Result,
    request::{
        BlockStatusRequest, CacheRequest, ConstMemory, DiscardRequest, EventRequest, FlushRequest, Memory,
        ReadRequest, ResizeRequest, WriteRequest, WriteZeroesRequest,
    },
    wake::with_handle,
};
use driveline_abi::{BlockStatus, EdgeAbi, Info, OpVt, Request, Scratch, Status, TargetAbi, op};
use std::{
    alloc::{Layout, alloc, dealloc},
    fmt,
    future::Future,
    marker::{PhantomData, PhantomPinned},
    ops::Range,
    pin::Pin,
    ptr::{self, null_mut},
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    task::{Context, Poll},
};

/// What is below this node, for one request: its children, and memory for calls to them.
///
/// One call at a time (`&mut`) takes its state from the request's arena, without allocation; [`Next::fork`]
/// gives another handle for calls at the same time, whose state is on the heap. Methods without a child go to
/// child 0: the filtered one of a filter, the file of a format.
pub struct Next<'a> {
    target: &'a TargetAbi,
    scratch: Scratch,
    live: AtomicU32,
    root: *const AtomicU32,
}

// SAFETY: the raw pointers are to memory lent for the operation; every access is through `&mut`, or atomic.
unsafe impl Send for Next<'_> {}
// SAFETY: as above.
unsafe impl Sync for Next<'_> {}

impl fmt::Debug for Next<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Next").field("children", &self.target.n_edges).finish_non_exhaustive()
    }
}

/// Writes the methods of [`Child`] and, for child 0, those of [`Next`].
macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident $req:ident $op:expr;)*) => {
        impl Next<'_> { $(
            $(#[$doc])*
            #[inline]
            pub fn $name<'b>(&'b mut self, request: &'b $req<'_>) -> ChildOp<'b> { self.child(0).$name(request) }
        )* }
        impl<'b> Child<'b> { $(
            $(#[$doc])*
            #[inline]
            pub fn $name(self, request: &'b $req<'_>) -> ChildOp<'b> { ChildOp::new(self, &request.0, $op) }
        )* }
    };
}

calls! {
    /// Reads from the child.
    read ReadRequest op::READ;
    /// Writes to the child.
    write WriteRequest op::WRITE;
    /// Makes the child's completed writes durable.
    flush FlushRequest op::FLUSH;
    /// Gives a range of the child up.
    discard DiscardRequest op::DISCARD;
    /// Makes a range of the child read as zeroes.
    write_zeroes WriteZeroesRequest op::WRITE_ZEROES;
    /// Asks the child about an extent.
    block_status BlockStatusRequest op::BLOCK_STATUS;
    /// Tells the child what will be read.
    cache CacheRequest op::CACHE;
    /// Changes the child's size.
    resize ResizeRequest op::RESIZE;
    /// Tells the child what happens here (see also [`Next::tell`]).
    event EventRequest op::EVENT;
}

impl<'a> Next<'a> {
    /// # Safety
    ///
    /// `target` and what it points to, and `scratch`, are lent for the operation that this `Next` belongs to.
    #[inline]
    pub(crate) unsafe fn new(target: *const TargetAbi, scratch: Scratch) -> Self {
        // SAFETY: the caller's.
        Next { target: unsafe { &*target }, scratch, live: AtomicU32::new(0), root: ptr::null() }
    }

    /// How many children there are.
    pub fn children(&self) -> usize {
        self.target.n_edges as usize
    }

    /// Child number `index` (asserted to exist).
    #[inline]
    pub fn child(&mut self, index: usize) -> Child<'_> {
        let edge = self.edge(index);
        Child { next: (&raw mut *self).cast(), edge, lent: PhantomData }
    }

    /// Size and limits of child number `index` (asserted to exist).
    pub fn info(&self, index: usize) -> &'a Info {
        &self.edge(index).info
    }

    #[inline]
    fn edge(&self, index: usize) -> &'a EdgeAbi {
        assert!(index < self.target.n_edges as usize, "a node calls only children that it has");
        // SAFETY: the target lends `n_edges` valid edges for the operation's time.
        unsafe { &**self.target.edges.add(index) }
    }

    /// Another handle, for calls at the same time as others.
    pub fn fork(&self) -> Next<'_> {
        let root = if self.root.is_null() { &raw const self.live } else { self.root };
        let scratch = Scratch { ptr: null_mut(), len: 0 };
        Next { target: self.target, scratch, live: AtomicU32::new(0), root }
    }

    /// Reads into a buffer of one's own from child `index`.
    pub async fn read_at(&mut self, index: usize, offset: u64, into: &mut [u8]) -> Result<()> {
        let memory = Memory::of_mut(into);
        let request = memory.read_request(offset);
        self.child(index).read(&request).await
    }

    /// Writes a buffer of one's own to child `index`.
    pub async fn write_at(&mut self, index: usize, offset: u64, from: &[u8], flags: u32) -> Result<()> {
        let memory = ConstMemory::of(from);
        let request = memory.write_request(offset, flags);
        self.child(index).write(&request).await
    }

    /// Asks child `index` about the first extent of `range`.
    pub async fn status_at(&mut self, index: usize, range: Range<u64>) -> Result<BlockStatus> {
        let mut answer = BlockStatus::default();
        let request = BlockStatusRequest::new(range, &mut answer);
        self.child(index).block_status(&request).await?;
        Ok(request.answered())
    }

    /// Changes the size of child `index`.
    pub async fn resize_at(&mut self, index: usize, size_bytes: u64) -> Result<()> {
        self.child(index).resize(&ResizeRequest::new(size_bytes)).await
    }

    /// Tells child `index` what is about to happen here: a number of [`event`](driveline_abi::event). Where nobody listens
    /// it is a look at two words.
    #[inline]
    pub async fn tell(&mut self, index: usize, event: u64) {
        if self.listens(index) {
            // What comes of it is not our business: an event has no outcome.
            let _ = self.child(index).event(&EventRequest::new(event)).await;
        }
    }

    /// Does anybody below child `index` listen to events?
    #[inline]
    pub fn listens(&self, index: usize) -> bool {
        let edge = self.edge(index);
        // SAFETY: the edge lends `n_ops` entries.
        op::EVENT < edge.n_ops && unsafe { !(*edge.ops.add(op::EVENT as usize)).vt.is_null() }
    }

    /// Flushes child `index`.
    pub async fn flush_at(&mut self, index: usize) -> Result<()> {
        self.child(index).flush(&FlushRequest::new()).await
    }

    #[inline]
    fn count(&self, up: bool) {
        if self.root.is_null() {
            // Only this operation's own thread of control gets here, so no read-modify-write is needed.
            let live = self.live.load(Relaxed);
            self.live.store(if up { live.wrapping_add(1) } else { live.wrapping_sub(1) }, Relaxed);
        } else {
            // SAFETY: `root` is the `live` of the `Next` that this one was forked from, which it borrows.
            let root = unsafe { &*self.root };
            if up {
                root.fetch_add(1, Relaxed)
            } else {
                root.fetch_sub(1, Relaxed)
            };
        }
    }

    /// A call that was leaked (`mem::forget`) would go on in memory that is about to be used for something else.
    #[inline]
    pub(crate) fn check_none_live(&self) {
        if self.live.load(Relaxed) != 0 {
            leaked()
        }
    }
}

#[cold]
fn leaked() -> ! {
    tracing::error!("an operation leaked a call to its child that was still in progress");
    std::process::abort()
}

/// One child of a node, ready for one call.
pub struct Child<'b> {
    next: *mut Next<'b>,
    edge: &'b EdgeAbi,
    lent: PhantomData<&'b mut Next<'b>>,
}

// SAFETY: stands for the `&mut Next` that it was made from, which is Send.
unsafe impl Send for Child<'_> {}

impl fmt::Debug for Child<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Child").field("info", &self.edge.info).finish_non_exhaustive()
    }
}

impl Child<'_> {
    /// Its size and limits.
    pub fn info(&self) -> &Info {
        &self.edge.info
    }
}

#[derive(Clone, Copy)]
enum State {
    New,
    Live,
    Done,
}

/// A call to a child. Dropped before it is done, it cancels.
pub struct ChildOp<'b> {
    next: *mut Next<'b>,
    edge: &'b EdgeAbi,
    request: &'b Request,
    op: u32,
    state: State,
    heap: bool,
    vt: *const OpVt,
    slot: *mut u8,
    lent: PhantomData<(&'b mut Next<'b>, PhantomPinned)>,
}

// SAFETY: stands for a `&mut Next` and a request, both Send; the child's state is Send by the ABI's contract.
unsafe impl Send for ChildOp<'_> {}

impl fmt::Debug for ChildOp<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChildOp").field("op", &op::NAMES.get(self.op as usize)).finish_non_exhaustive()
    }
}

impl<'b> ChildOp<'b> {
    #[inline]
    fn new(child: Child<'b>, request: &'b Request, op: u32) -> Self {
        Self {
            next: child.next,
            edge: child.edge,
            request,
            op,
            state: State::New,
            heap: false,
            vt: ptr::null(),
            slot: null_mut(),
            lent: PhantomData,
        }
    }

    /// Finds memory for the child's state and starts it. `None`: refused, with an errno.
    #[inline]
    fn start(&mut self, cx: &Context<'_>) -> Result<Status> {
        // SAFETY: `next` was a `&mut Next` borrowed for 'b, and this is its only user.
        let next = unsafe { &*self.next };
        if next.root.is_null() {
            next.check_none_live();
        }
        if self.op >= self.edge.n_ops {
            // A host older than this operation. A hint may be left out; the rest may not.
            let hint = matches!(self.op, op::CACHE | op::EVENT);
            return if hint { Ok(Status::OK) } else { Err(Error::NOT_SUPPORTED) };
        }
        // SAFETY: the edge lends `n_ops` entries.
        let resolved = unsafe { &*self.edge.ops.add(self.op as usize) };
        if resolved.vt.is_null() {
            return Err(Error::NOT_SUPPORTED);
        }
        self.vt = resolved.vt;
        // SAFETY: a non-null vt of an edge is valid for the edge's life.
        let vt = unsafe { &*resolved.vt };
        let arena = next.scratch;
        let pad = arena.ptr.align_offset(vt.align);
        let rest = if !arena.ptr.is_null() && pad <= arena.len && vt.size <= arena.len - pad {
            // SAFETY: in bounds, as just checked.
            self.slot = unsafe { arena.ptr.add(pad) };
            // SAFETY: as above.
            Scratch { ptr: unsafe { self.slot.add(vt.size) }, len: arena.len - pad - vt.size }
        } else {
            self.heap = true;
            let layout = heap_layout(vt);
            // SAFETY: the layout is not empty.
            self.slot = unsafe { alloc(layout) };
            if self.slot.is_null() {
                self.heap = false;
                return Err(Error::NO_MEMORY);
            }
            Scratch { ptr: null_mut(), len: 0 }
        };
        // SAFETY: the protocol of OpVt: a fresh slot of the declared size; request, target and waker are lent.
        Ok(with_handle(cx, |w| unsafe { (vt.start)(resolved.target, self.request, self.slot, rest, w) }))
    }

    #[inline]
    fn finish(&mut self) {
        if self.heap {
            // SAFETY: allocated in `start` with the same layout, and the child is done with it.
            unsafe { dealloc(self.slot, heap_layout(&*self.vt)) };
        }
        if let State::Live = self.state {
            // SAFETY: as in `start`.
            unsafe { (*self.next).count(false) };
        }
        self.state = State::Done;
    }
}

fn heap_layout(vt: &OpVt) -> Layout {
    Layout::from_size_align(vt.size.max(1), vt.align).expect("a vtable declares a valid layout")
}

impl Future for ChildOp<'_> {
    type Output = Result<()>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        // SAFETY: nothing is moved out of `self`.
        let me = unsafe { self.get_unchecked_mut() };
        let status = match me.state {
            State::New => {
                // A slot is live only after PENDING, so a panic or cancel in `start` needs no clean-up here.
                let status = match me.start(cx) {
                    Ok(status) => status,
                    Err(error) => {
                        me.state = State::Done;
                        return Poll::Ready(Err(error));
                    }
                };
                if status == Status::PENDING {
                    // SAFETY: as in `start`.
                    unsafe { (*me.next).count(true) };
                    me.state = State::Live;
                    return Poll::Pending;
                }
                status
            }
            State::Live => {
                // SAFETY: the slot is live, and its vtable is the one that it was started with.
                let status = with_handle(cx, |w| unsafe { ((*me.vt).poll)(me.slot, w) });
                if status == Status::PENDING {
                    return Poll::Pending;
                }
                status
            }
            State::Done => panic!("a call to a child was polled after its end"),
        };
        me.finish();
        Poll::Ready(if status == Status::OK { Ok(()) } else { Err(Error::of(status)) })
    }
}

impl Drop for ChildOp<'_> {
    #[inline]
    fn drop(&mut self) {
        if let State::Live = self.state {
            // SAFETY: the slot is live; this cancels it.
            unsafe { ((*self.vt).drop)(self.slot) };
            self.finish();
        }
    }
}

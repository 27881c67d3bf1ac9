//! A request from outside: it owns its memory, its arena and a hold on the wiring.

use crate::{Buffer, Error, Result, arena::Arena, wake::with_handle, wiring::Edge};
use driveline_abi::{BlockStatus, IoVec, OpVt, Request, Scratch, Status, op};
use std::{
    borrow::Borrow,
    fmt,
    future::Future,
    marker::PhantomPinned,
    pin::Pin,
    ptr,
    task::{Context, Poll},
};

/// What is asked of an edge from outside the graph.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ask {
    /// One of [`op`].
    pub op: u32,
    /// Bits of [`flag`](driveline_abi::flag).
    pub flags: u32,
    /// The first byte.
    pub offset: u64,
    /// Bytes; for read and write, those of the buffer count instead.
    pub length: u64,
    /// See [`Request::scope`].
    pub scope: u64,
    /// Ties trace events together.
    pub trace_id: u64,
}

/// What comes back: the outcome, the buffer, and the extent if one was asked for.
#[derive(Debug)]
pub struct Answer {
    /// How it went.
    pub result: Result<()>,
    /// The buffer that was given.
    pub buffer: Buffer,
    /// The answer to a block_status.
    pub status: BlockStatus,
}

/// A request on an edge, as a future. It may be dropped at any time, which cancels it, and leaked at any time,
/// which leaks its buffer with it.
///
/// `G` holds the edge: the edge itself, or a guard that also counts the request.
pub struct Call<G: Borrow<Edge>> {
    guard: G,
    request: Request,
    iov: IoVec,
    status: BlockStatus,
    buffer: Buffer,
    arena: Arena,
    vt: *const OpVt,
    slot: *mut u8,
    state: State,
    _pin: PhantomPinned,
}

enum State {
    New,
    Live,
    Done,
}

// SAFETY: the parts are Send, and the operation's state is Send by the ABI's contract.
unsafe impl<G: Borrow<Edge> + Send> Send for Call<G> {}

impl<G: Borrow<Edge>> fmt::Debug for Call<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Call").field("request", &self.request).finish_non_exhaustive()
    }
}

impl<G: Borrow<Edge>> Call<G> {
    /// A request with a buffer: what a write stores, or where a read puts what it finds (all of its length).
    /// Other operations take an empty one.
    pub fn new(guard: G, ask: Ask, buffer: Buffer) -> Self {
        let arena = Arena::take(guard.borrow().arena_bytes());
        let with_memory = matches!(ask.op, op::READ | op::WRITE);
        let request = Request {
            op: ask.op,
            flags: ask.flags,
            offset: ask.offset,
            length: if with_memory { buffer.len() as u64 } else { ask.length },
            iov: ptr::null(),
            iovcnt: u32::from(with_memory && !buffer.is_empty()),
            reserved0: 0,
            out: ptr::null_mut(),
            scope: ask.scope,
            trace_id: ask.trace_id,
        };
        Self {
            guard,
            request,
            iov: IoVec { base: ptr::null_mut(), len: 0 },
            status: BlockStatus::default(),
            buffer,
            arena,
            vt: ptr::null(),
            slot: ptr::null_mut(),
            state: State::New,
            _pin: PhantomPinned,
        }
    }

    fn start(&mut self, cx: &Context<'_>) -> Result<Status> {
        let edge: &Edge = self.guard.borrow();
        if self.request.op as usize >= op::COUNT {
            return Err(Error::NOT_SUPPORTED);
        }
        let resolved = edge.resolved(self.request.op);
        if resolved.vt.is_null() {
            return Err(Error::NOT_SUPPORTED);
        }
        // `self` is pinned by now, so the request may point into it.
        self.iov = IoVec { base: self.buffer.as_mut_ptr(), len: self.buffer.len() };
        self.request.iov = &raw const self.iov;
        self.request.out = (&raw mut self.status).cast();
        self.vt = resolved.vt;
        // SAFETY: the edge, which `guard` keeps, keeps its vtables.
        let vt = unsafe { &*resolved.vt };
        let (base, len) = self.arena.raw();
        let pad = base.align_offset(vt.align);
        assert!(pad <= len && vt.size <= len - pad, "the arena has room for the edge's largest operation");
        // SAFETY: in bounds, as just asserted.
        self.slot = unsafe { base.add(pad) };
        // SAFETY: as above.
        let rest = Scratch { ptr: unsafe { self.slot.add(vt.size) }, len: len - pad - vt.size };
        let (target, request, slot) = (resolved.target, &raw const self.request, self.slot);
        // SAFETY: the protocol of OpVt: all that is lent is owned by this pinned future, which cancels on drop.
        Ok(with_handle(cx, |w| unsafe { (vt.start)(target, request, slot, rest, w) }))
    }
}

impl<G: Borrow<Edge>> Future for Call<G> {
    type Output = Answer;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Answer> {
        // SAFETY: nothing that the operation points to is moved while it is live.
        let me = unsafe { self.get_unchecked_mut() };
        let outcome = match me.state {
            State::New => me.start(cx),
            // SAFETY: the slot is live, with the vtable that it was started with.
            State::Live => Ok(with_handle(cx, |w| unsafe { ((*me.vt).poll)(me.slot, w) })),
            State::Done => panic!("a request was polled after its end"),
        };
        let result = match outcome {
            Ok(Status::PENDING) => {
                me.state = State::Live;
                return Poll::Pending;
            }
            Ok(Status::OK) => Ok(()),
            Ok(status) => Err(Error::of(status)),
            Err(error) => Err(error),
        };
        me.state = State::Done;
        Poll::Ready(Answer { result, buffer: std::mem::take(&mut me.buffer), status: me.status })
    }
}

impl<G: Borrow<Edge>> Drop for Call<G> {
    fn drop(&mut self) {
        if let State::Live = self.state {
            // SAFETY: the slot is live; this cancels, and returns when nothing below uses our memory any more.
            unsafe { ((*self.vt).drop)(self.slot) };
        }
    }
}

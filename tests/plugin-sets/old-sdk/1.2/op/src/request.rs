//! Requests as drivers see them: one type an operation, each a view of the ABI's [`Request`].

use driveline_abi::{BlockStatus, IoVec, Request, op};
use smallvec::SmallVec;
use std::{marker::PhantomData, ops::Range, ptr};

/// A request type: a transparent view of [`Request`] for one operation.
///
/// # Safety
///
/// Implementors are `#[repr(transparent)]` over [`Request`].
pub(crate) unsafe trait View: Sized + 'static {
    /// The operation.
    const OP: u32;
}

macro_rules! views {
    ($($(#[$doc:meta])* $name:ident = $op:expr;)*) => { $(
        $(#[$doc])*
        #[repr(transparent)]
        #[derive(Clone, Debug)]
        pub struct $name<'a>(pub(crate) Request, PhantomData<&'a [IoVec]>);

        // SAFETY: the pointers are to memory lent for the operation, which its lender keeps valid on any thread
        // (see driveline_abi, "Lifetimes"); all access to it is by raw copies.
        unsafe impl Send for $name<'_> {}
        // SAFETY: as above; a shared view gives no access that an own copy would not.
        unsafe impl Sync for $name<'_> {}
        // SAFETY: repr(transparent), above.
        unsafe impl View for $name<'static> { const OP: u32 = $op; }

        impl $name<'_> {
            /// The first byte of the range.
            #[inline]
            pub fn offset(&self) -> u64 { self.0.offset }
            /// Bytes in the range.
            #[inline]
            pub fn length(&self) -> u64 { self.0.length }
            /// The bytes addressed.
            #[inline]
            pub fn range(&self) -> Range<u64> { self.0.offset..self.0.offset + self.0.length }
            /// Bits of [`flag`](driveline_abi::flag).
            #[inline]
            pub fn flags(&self) -> u32 { self.0.flags }
            /// See [`Request::scope`].
            #[inline]
            pub fn scope(&self) -> u64 { self.0.scope }
            /// Ties the trace events of one request together.
            #[inline]
            pub fn trace_id(&self) -> u64 { self.0.trace_id }
            /// The same request at another offset.
            #[inline]
            #[must_use]
            pub fn at(&self, offset: u64) -> Self { let mut r = self.clone(); r.0.offset = offset; r }
            /// The same request with other flags.
            #[inline]
            #[must_use]
            pub fn with_flags(&self, flags: u32) -> Self { let mut r = self.clone(); r.0.flags = flags; r }
            /// The same request with a scope (see [`Request::scope`]).
            #[inline]
            #[must_use]
            pub fn with_scope(&self, scope: u64) -> Self { let mut r = self.clone(); r.0.scope = scope; r }
            /// The request as it crosses the boundary.
            #[inline]
            pub fn as_abi(&self) -> &Request { &self.0 }
        }

        impl $name<'_> {
            fn build(offset: u64, length: u64, flags: u32) -> Self {
                Self(Request { op: $op, flags, offset, length, iov: ptr::null(), iovcnt: 0, reserved0: 0,
                    out: ptr::null_mut(), scope: 0, trace_id: 0 }, PhantomData)
            }
        }
    )* };
}

views! {
    /// Fill lent memory with what is at an offset.
    ReadRequest = op::READ;
    /// Store lent memory at an offset.
    WriteRequest = op::WRITE;
    /// Make completed writes durable.
    FlushRequest = op::FLUSH;
    /// Give a range up.
    DiscardRequest = op::DISCARD;
    /// Make a range read as zeroes.
    WriteZeroesRequest = op::WRITE_ZEROES;
    /// Describe the first extent of a range.
    BlockStatusRequest = op::BLOCK_STATUS;
    /// A range will be read soon.
    CacheRequest = op::CACHE;
    /// The node is `offset` bytes long from now on.
    ResizeRequest = op::RESIZE;
    /// The parent is about to do what `offset` says (see [`event`](driveline_abi::event)).
    EventRequest = op::EVENT;
}

macro_rules! with_memory {
    ($($name:ident $doc:literal;)*) => { $(
        impl<'a> $name<'a> {
            /// The lent memory. It may change under you: copy, never borrow.
            #[inline]
            pub fn iov(&self) -> &'a [IoVec] {
                if self.0.iovcnt == 0 { return &[]; }
                // SAFETY: whoever made the request lends `iovcnt` entries for the operation's time.
                unsafe { std::slice::from_raw_parts(self.0.iov, self.0.iovcnt as usize) }
            }
            #[doc = $doc]
            ///
            /// `part` counts from the beginning of this request and lies inside it (asserted).
            pub fn part(&self, part: Range<u64>) -> Memory<'a> {
                assert!(part.start <= part.end && part.end <= self.0.length, "a part of a request lies inside it");
                Memory::slice(self.iov(), part)
            }
        }
    )* };
}

with_memory! {
    ReadRequest "The memory for a part of this request, to read into from somewhere.";
    WriteRequest "The memory of a part of this request, to write somewhere.";
}

impl ReadRequest<'_> {
    /// Copies `data` into the memory, `at` bytes from its beginning. It fits (asserted).
    pub fn fill(&self, at: u64, data: &[u8]) {
        let memory = self.part(at..at + data.len() as u64);
        let mut done = 0;
        for v in &memory.iov {
            // SAFETY: the memory is lent for writing while the read lasts, and `part` asserted the bounds.
            unsafe { ptr::copy_nonoverlapping(data.as_ptr().add(done), v.base, v.len) };
            done += v.len;
        }
    }

    /// Zeroes a part of the memory.
    pub fn zero(&self, part: Range<u64>) {
        for v in &self.part(part).iov {
            // SAFETY: as in `fill`.
            unsafe { ptr::write_bytes(v.base, 0, v.len) };
        }
    }
}

impl WriteRequest<'_> {
    /// Copies memory, from `at` bytes after its beginning, into `data`. There is enough (asserted).
    pub fn copy_to(&self, at: u64, data: &mut [u8]) {
        let memory = self.part(at..at + data.len() as u64);
        let mut done = 0;
        for v in &memory.iov {
            // SAFETY: the memory is lent for reading while the write lasts, and `part` asserted the bounds.
            unsafe { ptr::copy_nonoverlapping(v.base, data.as_mut_ptr().add(done), v.len) };
            done += v.len;
        }
    }
}

impl FlushRequest<'_> {
    /// A flush.
    pub fn new() -> Self {
        Self::build(0, 0, 0)
    }
}

impl Default for FlushRequest<'_> {
    fn default() -> Self {
        Self::new()
    }
}

impl DiscardRequest<'_> {
    /// A discard of `range`.
    pub fn new(range: Range<u64>, flags: u32) -> Self {
        Self::build(range.start, range.end - range.start, flags)
    }
}

impl WriteZeroesRequest<'_> {
    /// Zeroes for `range`.
    pub fn new(range: Range<u64>, flags: u32) -> Self {
        Self::build(range.start, range.end - range.start, flags)
    }
}

impl CacheRequest<'_> {
    /// A hint that `range` will be read.
    pub fn new(range: Range<u64>) -> Self {
        Self::build(range.start, range.end - range.start, 0)
    }
}

impl ResizeRequest<'_> {
    /// A new size.
    pub fn new(size_bytes: u64) -> Self {
        Self::build(size_bytes, 0, 0)
    }

    /// The new size.
    pub fn size_bytes(&self) -> u64 {
        self.0.offset
    }
}

impl EventRequest<'_> {
    /// What the parent is about to do: a number of [`event`](driveline_abi::event).
    pub fn new(event: u64) -> Self {
        Self::build(event, 0, 0)
    }

    /// What it is.
    pub fn event(&self) -> u64 {
        self.0.offset
    }
}

impl<'a> BlockStatusRequest<'a> {
    /// A question about the first extent of `range`; the answer goes to `answer`.
    pub fn new(range: Range<u64>, answer: &'a mut BlockStatus) -> Self {
        let mut r = Self::build(range.start, range.end - range.start, 0);
        r.0.out = ptr::from_mut(answer).cast();
        r
    }

    /// Answers. `length` is cut to the request's, and is at least 1 (asserted).
    pub fn answer(&self, mut status: BlockStatus) {
        status.length = status.length.min(self.0.length);
        assert!(status.length > 0 || self.0.length == 0, "an extent has at least one byte");
        // SAFETY: whoever made the request lends `out` for a `BlockStatus` for the operation's time.
        unsafe { self.0.out.cast::<BlockStatus>().write(status) };
    }

    /// What was answered so far: a filter looks here after `next.block_status(req)`.
    pub fn answered(&self) -> BlockStatus {
        // SAFETY: as in `answer`; the maker of the request initialised it.
        unsafe { self.0.out.cast::<BlockStatus>().read() }
    }
}

/// A list of lent memory: what a request reads into or writes from. Up to four pieces take no allocation.
#[derive(Debug)]
pub struct Memory<'a> {
    iov: SmallVec<[IoVec; 4]>,
    length: u64,
    lent: PhantomData<&'a mut [u8]>,
}

// SAFETY: as for requests: lent memory, used by raw copies only.
unsafe impl Send for Memory<'_> {}
// SAFETY: as above.
unsafe impl Sync for Memory<'_> {}

impl<'a> Memory<'a> {
    /// Memory to read into (or to write from).
    pub fn of_mut(memory: &'a mut [u8]) -> Self {
        let (base, len) = (memory.as_mut_ptr(), memory.len());
        Self { iov: SmallVec::from_slice(&[IoVec { base, len }]), length: len as u64, lent: PhantomData }
    }

    /// Nothing yet; see [`Memory::push`].
    pub fn empty() -> Self {
        Self { iov: SmallVec::new(), length: 0, lent: PhantomData }
    }

    /// Bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// A read of this memory's length at `offset`.
    pub fn read_request(&self, offset: u64) -> ReadRequest<'_> {
        let mut r = ReadRequest::build(offset, self.length, 0);
        (r.0.iov, r.0.iovcnt) = (self.iov.as_ptr(), self.iov.len() as u32);
        r
    }

    /// A write of this memory at `offset`.
    pub fn write_request(&self, offset: u64, flags: u32) -> WriteRequest<'_> {
        let mut r = WriteRequest::build(offset, self.length, flags);
        (r.0.iov, r.0.iovcnt) = (self.iov.as_ptr(), self.iov.len() as u32);
        r
    }

    /// Appends other memory.
    pub fn push(&mut self, other: Memory<'a>) {
        self.length += other.length;
        self.iov.extend(other.iov);
    }

    fn slice(iov: &[IoVec], part: Range<u64>) -> Self {
        let mut out = Self { iov: SmallVec::new(), length: part.end - part.start, lent: PhantomData };
        let (mut skip, mut left) = (part.start, out.length);
        for v in iov {
            if left == 0 {
                break;
            }
            let len = v.len as u64;
            if skip >= len {
                skip -= len;
                continue;
            }
            let take = (len - skip).min(left);
            // SAFETY: `skip` is inside this entry.
            out.iov.push(IoVec { base: unsafe { v.base.add(skip as usize) }, len: take as usize });
            (skip, left) = (0, left - take);
        }
        debug_assert_eq!(left, 0, "iov covers the request");
        out
    }
}

/// Memory that is only written from.
#[derive(Debug)]
pub struct ConstMemory<'a>(Memory<'a>);

impl<'a> ConstMemory<'a> {
    /// Memory to write from.
    pub fn of(memory: &'a [u8]) -> Self {
        let iov = IoVec { base: memory.as_ptr().cast_mut(), len: memory.len() };
        Self(Memory { iov: SmallVec::from_slice(&[iov]), length: memory.len() as u64, lent: PhantomData })
    }

    /// A write of this memory at `offset`. No write request lets its memory be changed.
    pub fn write_request(&self, offset: u64, flags: u32) -> WriteRequest<'_> {
        self.0.write_request(offset, flags)
    }
}

//! The path of a request through the graph, one function a stage, in the order in which they run:
//!
//! ```text
//! submit: check (range, flags) → begin (in flight) → permit (the root's permissions) → drive → finish
//!   at a node that has something to observe, a hop:
//!       begin (wait for overlapping holders, mark bitmaps) → drive (fit to its limits) → the node → finish
//! ```
//!
//! A node without bitmaps, locks or limits has no hop: its parent calls it directly.

use crate::{
    fit::Fit,
    node::{Node, NodeId},
    ranges::Hold,
    root::{InFlight, RootShared},
};
use driveline_bitmap::Bitmap;
use driveline_op::{
    Answer, Ask, BlockStatusRequest, Buffer, CacheRequest, Call, DiscardRequest, Error, FlushRequest, Info,
    Next, OpTable, ReadRequest, Result, WriteRequest, WriteZeroesRequest, flag, info, op,
};
use std::{future::poll_fn, ops::Range, sync::Arc, time::Instant};

/// Takes a request from outside to its end.
pub(crate) async fn submit(root: &Arc<RootShared>, ask: Ask, buffer: Buffer) -> Answer {
    let size_bytes = root.size_bytes();
    if let Err(error) = check(size_bytes, &ask, &buffer) {
        return refuse(root, &ask, error, buffer);
    }
    let flight = begin(root).await;
    // Between the two the drive may have been resized: what counts is the wiring that the request runs on.
    if flight.edge_info().size_bytes != size_bytes
        && let Err(error) = check(flight.edge_info().size_bytes, &ask, &buffer)
    {
        return refuse(root, &ask, error, buffer);
    }
    run(flight, ask, buffer).await
}

/// The same, for one who is inside already (see [`Unit`](crate::Unit)).
pub(crate) async fn submit_in(inside: &InFlight, ask: Ask, buffer: Buffer) -> Answer {
    if let Err(error) = check(inside.edge_info().size_bytes, &ask, &buffer) {
        return refuse(inside.root(), &ask, error, buffer);
    }
    run(begin_again(inside), ask, buffer).await
}

/// Is the request one that can be? What it asks for must lie inside the node.
fn check(size_bytes: u64, ask: &Ask, buffer: &Buffer) -> Result<()> {
    tracing::trace!(target: "driveline::io", stage = "check", op = op::NAMES.get(ask.op as usize), id = ask.trace_id);
    // A size is changed by a change of the graph, and events are between formats and what is below them.
    if ask.op as usize >= op::COUNT || matches!(ask.op, op::RESIZE | op::EVENT) {
        return Err(Error::NOT_SUPPORTED);
    }
    let length = if matches!(ask.op, op::READ | op::WRITE) { buffer.len() as u64 } else { ask.length };
    let inside = ask.offset.checked_add(length).is_some_and(|end| end <= size_bytes);
    if ask.op != op::FLUSH && !inside {
        let past_the_end = matches!(ask.op, op::WRITE | op::WRITE_ZEROES);
        return Err(if past_the_end { Error::NO_SPACE } else { Error::INVALID });
    }
    if ask.flags & !flag::KNOWN == 0 { Ok(()) } else { Err(Error::INVALID) }
}

/// In flight from here to the end; waits while the root is drained.
async fn begin(root: &Arc<RootShared>) -> InFlight {
    let flight = InFlight::enter(root).await;
    tracing::trace!(target: "driveline::io", stage = "begin", root = root.user());
    flight
}

/// The same without waiting: a drain waits for whoever is inside.
fn begin_again(inside: &InFlight) -> InFlight {
    tracing::trace!(target: "driveline::io", stage = "begin", root = inside.root().user());
    inside.again()
}

/// From its begin to its end.
async fn run(flight: InFlight, mut ask: Ask, buffer: Buffer) -> Answer {
    if let Err(error) = permit(flight.root(), &ask) {
        return refuse(flight.root(), &ask, error, buffer);
    }
    if matches!(ask.op, op::WRITE | op::WRITE_ZEROES | op::DISCARD) && flight.root().writes_through() {
        ask.flags |= flag::FUA;
    }
    if ask.op == op::FLUSH
        && let Err(error) = flight.root().debts.pay().await
    {
        return refuse(flight.root(), &ask, Error::new(error.errno_code(), error), buffer);
    }
    tracing::trace!(target: "driveline::io", stage = "drive", root = flight.root().user(), id = ask.trace_id);
    let root = flight.root().clone();
    let began = root.stats().map(|_| Instant::now());
    let answer = Call::new(flight, ask, buffer).await;
    if let (Some(stats), Some(began)) = (root.stats(), began) {
        stats.ended(&ask, &answer, began);
    }
    finish(&root, &ask, &answer);
    answer
}

fn refuse(root: &RootShared, ask: &Ask, error: Error, buffer: Buffer) -> Answer {
    if let Some(stats) = root.stats() {
        stats.refused(ask);
    }
    Answer { result: Err(error), buffer, status: Default::default() }
}

/// May this root ask for it?
fn permit(root: &RootShared, ask: &Ask) -> Result<()> {
    tracing::trace!(target: "driveline::io", stage = "permit", root = root.user(), id = ask.trace_id);
    let allowed = match ask.op {
        op::WRITE | op::WRITE_ZEROES | op::DISCARD => root.may_write(ask.flags & flag::UNCHANGED != 0),
        _ => true,
    };
    if allowed { Ok(()) } else { Err(Error::NOT_PERMITTED) }
}

/// The request has ended; whoever waits for the root to be empty hears of it when the guard goes.
fn finish(root: &RootShared, ask: &Ask, answer: &Answer) {
    let errno = answer.result.as_ref().err().map(Error::code);
    tracing::trace!(target: "driveline::io", stage = "finish", root = root.user(), id = ask.trace_id, errno);
}

/// The bitmaps of a node, as its hop sees them.
#[derive(Clone)]
pub(crate) struct Marks {
    /// Those that do not record ignore what they are told.
    pub(crate) bitmaps: Arc<[Arc<Bitmap>]>,
    /// The nodes at and below this one: what the scope of UNCHANGED is looked up in.
    pub(crate) reach: Vec<NodeId>,
    /// The node grows when something is written behind its end (a file below a format, and the filters on it), and its bitmaps
    /// with it.
    pub(crate) grows: bool,
}

impl Marks {
    /// A write of data that is the same before and after marks nothing *here*; with a scope, "here" is the node of
    /// the scope and all above it.
    ///
    /// Is there a bitmap whose mark must be safe ([`Marks::safe`]) before the data can be?
    #[inline]
    fn mark(&self, range: &Range<u64>, flags: u32, scope: u64) -> bool {
        let unchanged = flags & flag::UNCHANGED != 0;
        if unchanged && (scope == 0 || self.reach.binary_search(&NodeId(scope)).is_ok()) {
            return false;
        }
        let mut waits = false;
        for bitmap in self.bitmaps.iter() {
            // What a job writes below changes this node, but no drive: a drive's bitmap does not want it.
            if unchanged && bitmap.view() == driveline_bitmap::View::Drive {
                continue;
            }
            if self.grows && range.end > bitmap.length() {
                bitmap.grow(range.end);
            }
            bitmap.mark(range.clone());
            waits |= bitmap.waits();
        }
        waits
    }

    /// Waits until what was marked is as safe as the bitmaps promise. A write whose mark cannot be made safe fails: it must
    /// not reach the disk unrecorded.
    async fn safe(&self, range: &Range<u64>) -> Result<()> {
        for bitmap in self.bitmaps.iter().filter(|bitmap| bitmap.waits()) {
            poll_fn(|cx| bitmap.poll_safe(range.clone(), cx.waker())).await.map_err(|error| match error {
                driveline_bitmap::Error::Store { errno, .. } => Error::new(errno, error),
                error => Error::IO.because(error),
            })?;
        }
        Ok(())
    }

    /// Marks, and waits if it has to.
    #[inline]
    pub(crate) async fn mark_safely(&self, range: Range<u64>, flags: u32, scope: u64) -> Result<()> {
        if self.mark(&range, flags, scope) { self.safe(&range).await } else { Ok(()) }
    }
}

/// What stands before a node that has bitmaps and nothing else to observe: [`Hop`] with all but the marking left
/// out, because a drive with a bitmap is the common case and must cost what one without does.
pub(crate) struct MarkOnly(pub(crate) Marks);

pub(crate) static MARK_ONLY: OpTable<MarkOnly> =
    OpTable::new().write(MarkOnly::write).discard(MarkOnly::discard).write_zeroes(MarkOnly::write_zeroes);

impl MarkOnly {
    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        self.0.mark_safely(request.range(), request.flags(), request.scope()).await?;
        next.write(request).await
    }

    async fn write_zeroes(&self, next: &mut Next<'_>, request: &WriteZeroesRequest<'_>) -> Result<()> {
        self.0.mark_safely(request.range(), request.flags(), request.scope()).await?;
        next.write_zeroes(request).await
    }

    async fn discard(&self, next: &mut Next<'_>, request: &DiscardRequest<'_>) -> Result<()> {
        self.0.mark_safely(request.range(), request.flags(), request.scope()).await?;
        next.discard(request).await
    }
}

/// What stands before a node that has something to observe.
pub(crate) struct Hop {
    pub(crate) node: Arc<Node>,
    pub(crate) marks: Marks,
    /// Changes hold their range while they run: somebody locks ranges of the node, or the node's limits make
    /// read-modify-writes. Not so for the locker's own requests, which lie in what it holds.
    pub(crate) holds: bool,
    /// Reads share their range: a filter copies old data to this node, and what backs it may change afterwards.
    pub(crate) reads_hold: bool,
    /// Changes hold their range alone.
    pub(crate) alone: bool,
    /// The node's limits, if it has any.
    pub(crate) fit: Option<Fit>,
}

pub(crate) static HOP: OpTable<Hop> = OpTable::new()
    .read(Hop::read)
    .write(Hop::write)
    .flush(Hop::flush)
    .discard(Hop::discard)
    .write_zeroes(Hop::write_zeroes)
    .block_status(Hop::block_status)
    .cache(Hop::cache);

impl Hop {
    /// Is marking all there is to do?
    pub(crate) fn only_marks(&self) -> bool {
        !self.holds && !self.reads_hold && self.fit.is_none()
    }

    /// Does anything have to be done for this operation?
    pub(crate) fn wants(&self, op: u32) -> bool {
        let changes = matches!(op, op::WRITE | op::WRITE_ZEROES | op::DISCARD);
        let fits = matches!(op, op::READ | op::BLOCK_STATUS) || changes;
        changes && (self.holds || !self.marks.bitmaps.is_empty())
            || fits && self.fit.is_some()
            || matches!(op, op::READ | op::BLOCK_STATUS) && self.reads_hold
    }

    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        let _hold = self.begin_change("write", request.range(), request.flags(), request.scope()).await?;
        let result = match &self.fit {
            None => next.write(request).await,
            Some(fit) => fit.write(next, request).await,
        };
        self.finish("write", &result);
        result
    }

    async fn write_zeroes(&self, next: &mut Next<'_>, request: &WriteZeroesRequest<'_>) -> Result<()> {
        let _hold =
            self.begin_change("write_zeroes", request.range(), request.flags(), request.scope()).await?;
        let result = match &self.fit {
            None => next.write_zeroes(request).await,
            Some(fit) => fit.write_zeroes(next, request).await,
        };
        self.finish("write_zeroes", &result);
        result
    }

    async fn discard(&self, next: &mut Next<'_>, request: &DiscardRequest<'_>) -> Result<()> {
        let _hold = self.begin_change("discard", request.range(), request.flags(), request.scope()).await?;
        let result = match &self.fit {
            None => next.discard(request).await,
            Some(fit) => fit.discard(next, request).await,
        };
        self.finish("discard", &result);
        result
    }

    /// Waits for overlapping holders of the range, then marks. It marks before the driver gets the request and
    /// whatever becomes of it: after a failed write nobody knows what the range holds.
    async fn begin_change(
        &self,
        op: &str,
        range: Range<u64>,
        flags: u32,
        scope: u64,
    ) -> Result<Option<Hold>> {
        tracing::trace!(target: "driveline::io", stage = "begin", node = &*self.node.name, op, offset = range.start);
        let hold = match self.hold_range(&range) {
            Some((range, exclusive)) => Some(self.node.ranges.hold(range, exclusive).await),
            None => None,
        };
        self.marks.mark_safely(range, flags, scope).await?;
        tracing::trace!(target: "driveline::io", stage = "drive", node = &*self.node.name, op);
        Ok(hold)
    }

    /// What must be held for a change of `range`, and whether alone: a read-modify-write needs its blocks whole.
    fn hold_range(&self, range: &Range<u64>) -> Option<(Range<u64>, bool)> {
        if !self.holds {
            return None;
        }
        let blocks = self.fit.as_ref().map_or_else(|| range.clone(), |fit| fit.blocks(range));
        let exclusive = self.alone || blocks != *range;
        Some((blocks, exclusive))
    }

    fn finish(&self, op: &str, result: &Result<()>) {
        let errno = result.as_ref().err().map(Error::code);
        tracing::trace!(target: "driveline::io", stage = "finish", node = &*self.node.name, op, errno);
    }

    async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        tracing::trace!(target: "driveline::io", stage = "drive", node = &*self.node.name, op = "read");
        let _hold = self.begin_read(request.range()).await;
        match &self.fit {
            None => next.read(request).await,
            Some(fit) => fit.read(next, request).await,
        }
    }

    /// What is found unallocated is read from the backing while nobody copies to the range.
    async fn begin_read(&self, range: Range<u64>) -> Option<Hold> {
        if self.reads_hold { Some(self.node.ranges.hold(range, false).await) } else { None }
    }

    async fn block_status(&self, next: &mut Next<'_>, request: &BlockStatusRequest<'_>) -> Result<()> {
        let _hold = self.begin_read(request.range()).await;
        match &self.fit {
            None => next.block_status(request).await,
            Some(fit) => fit.block_status(next, request).await,
        }
    }

    async fn flush(&self, next: &mut Next<'_>, request: &FlushRequest<'_>) -> Result<()> {
        tracing::trace!(target: "driveline::io", stage = "drive", node = &*self.node.name, op = "flush");
        next.flush(request).await
    }

    async fn cache(&self, next: &mut Next<'_>, request: &CacheRequest<'_>) -> Result<()> {
        next.cache(request).await
    }
}

/// What parents see of a node whose limits a hop takes care of.
pub(crate) fn without_limits(mut info: Info, read_only: bool) -> Info {
    info.request_alignment = 1;
    info.transfer_bytes_max = 0;
    if read_only {
        info.flags |= info::READ_ONLY;
    }
    info
}

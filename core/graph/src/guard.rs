//! What stands before a node whose options change its requests: `detect-zeroes`, `discard`, `cache.no-flush`, and a
//! threshold that tells of writes behind it. A node without any of them has no guard.

use crate::{common::DetectZeroes, event::Event, graph, node::Node};
use driveline_op::{
    DiscardRequest, FlushRequest, Next, OpTable, Result, WriteRequest, WriteZeroesRequest, flag, op,
};
use std::sync::{
    Arc, Weak,
    atomic::{AtomicU64, Ordering::SeqCst},
};

/// Writes are looked at in pieces of this.
const PIECE_BYTES: u64 = 4096;

/// Tells once of a write that ends behind an offset.
#[derive(Default)]
pub(crate) struct Threshold {
    /// 0: none.
    bytes: AtomicU64,
    graph: Weak<graph::Inner>,
}

impl Threshold {
    pub(crate) fn new(graph: &graph::Graph) -> Self {
        Self { bytes: AtomicU64::new(0), graph: Arc::downgrade(&graph.0) }
    }

    pub(crate) fn get(&self) -> u64 {
        self.bytes.load(SeqCst)
    }

    /// Returns what it was.
    pub(crate) fn set(&self, bytes: u64) -> u64 {
        self.bytes.swap(bytes, SeqCst)
    }

    fn look(&self, node: &Node, end: u64) {
        let threshold = self.get();
        // Whoever takes it away tells of it, so it is told once.
        if threshold == 0
            || end <= threshold
            || self.bytes.compare_exchange(threshold, 0, SeqCst, SeqCst).is_err()
        {
            return;
        }
        if let Some(graph) = self.graph.upgrade() {
            let exceeded = end - threshold;
            graph::Graph(graph).emit(&Event::WriteThreshold { node: node.name.clone(), exceeded, threshold });
        }
    }
}

/// Stands before a node; child 0 is the node.
pub(crate) struct Guard {
    pub(crate) node: Arc<Node>,
    pub(crate) detect_zeroes: DetectZeroes,
    pub(crate) ignores_discard: bool,
    pub(crate) ignores_flush: bool,
    /// The node can write zeroes by itself.
    pub(crate) zeroes: bool,
}

pub(crate) static GUARD: OpTable<Guard> = OpTable::new()
    .write(Guard::write)
    .write_zeroes(Guard::write_zeroes)
    .discard(Guard::discard)
    .flush(Guard::flush);

impl Guard {
    /// Does anything have to be done for this operation?
    pub(crate) fn wants(&self, op: u32) -> bool {
        let watches = self.node.threshold.get() > 0;
        match op {
            op::WRITE => self.detects() || self.ignores_flush || watches,
            op::WRITE_ZEROES => self.ignores_discard || self.ignores_flush || watches,
            op::DISCARD => self.ignores_discard,
            op::FLUSH => self.ignores_flush,
            _ => false,
        }
    }

    fn detects(&self) -> bool {
        self.detect_zeroes != DetectZeroes::Off && self.zeroes
    }

    /// What the flags of a change become.
    fn flags(&self, mut flags: u32) -> u32 {
        if self.ignores_flush {
            flags &= !flag::FUA;
        }
        if self.ignores_discard {
            flags &= !flag::MAY_UNMAP;
        }
        flags
    }

    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        self.node.threshold.look(&self.node, request.range().end);
        let flags = self.flags(request.flags());
        if self.detects() && is_zero(request) {
            let unmap = if self.detect_zeroes == DetectZeroes::Unmap { flag::MAY_UNMAP } else { 0 };
            let zeroes = WriteZeroesRequest::new(request.range(), flags | unmap).with_scope(request.scope());
            return next.write_zeroes(&zeroes).await;
        }
        next.write(&request.with_flags(flags)).await
    }

    async fn write_zeroes(&self, next: &mut Next<'_>, request: &WriteZeroesRequest<'_>) -> Result<()> {
        self.node.threshold.look(&self.node, request.range().end);
        next.write_zeroes(&request.with_flags(self.flags(request.flags()))).await
    }

    /// A discard is a hint: where it is not wanted it becomes nothing.
    async fn discard(&self, next: &mut Next<'_>, request: &DiscardRequest<'_>) -> Result<()> {
        if self.ignores_discard { Ok(()) } else { next.discard(request).await }
    }

    async fn flush(&self, next: &mut Next<'_>, request: &FlushRequest<'_>) -> Result<()> {
        if self.ignores_flush { Ok(()) } else { next.flush(request).await }
    }
}

/// Is the data of a write nothing but zeroes? Data that is not mostly shows it in its first bytes.
fn is_zero(request: &WriteRequest<'_>) -> bool {
    let mut piece = [0_u8; PIECE_BYTES as usize];
    let (length, mut at) = (request.length(), 0);
    let mut step = 64;
    while at < length {
        step = step.min(length - at);
        let piece = &mut piece[..step as usize];
        request.copy_to(at, piece);
        // One OR over all: the compiler makes wide instructions of it.
        if piece.iter().fold(0, |all, byte| all | byte) != 0 {
            return false;
        }
        at += step;
        step = PIECE_BYTES;
    }
    length > 0
}

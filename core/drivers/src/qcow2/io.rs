//! Calls to the children, from inside an operation and from outside.

use driveline_op::{Ask, Buffer, Call, DiscardRequest, Edge, Info, Next, Result, op};
use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

/// The child that the image is in.
pub(crate) const FILE: usize = 0;
/// The child that unallocated clusters are read from; it may be missing.
pub(crate) const BACKING: usize = 1;

/// The children of a node, in the order of its description.
///
/// Metadata is read and written in operations, which call through [`Next`], and while nothing is in flight (open,
/// resize, close), through the edges themselves.
pub(crate) enum Io<'a, 'n> {
    Next(&'a mut Next<'n>),
    Edges(&'a [Edge]),
}

impl Io<'_, '_> {
    pub(crate) fn info(&self, child: usize) -> Option<&Info> {
        match self {
            Io::Next(next) => (child < next.children()).then(|| next.info(child)),
            Io::Edges(edges) => edges.get(child).map(Edge::info),
        }
    }

    pub(crate) async fn read(&mut self, child: usize, offset: u64, into: &mut [u8]) -> Result<()> {
        match self {
            Io::Next(next) => next.read_at(child, offset, into).await,
            Io::Edges(edges) => {
                let ask = Ask { op: op::READ, offset, ..Ask::default() };
                let answer = Call::new(&edges[child], ask, Buffer::new(into.len())).await;
                answer.result?;
                into.copy_from_slice(&answer.buffer);
                Ok(())
            }
        }
    }

    async fn write(&mut self, offset: u64, from: &[u8]) -> Result<()> {
        match self {
            Io::Next(next) => next.write_at(FILE, offset, from, 0).await,
            Io::Edges(edges) => {
                let ask = Ask { op: op::WRITE, offset, ..Ask::default() };
                Call::new(&edges[FILE], ask, Buffer::from(from)).await.result
            }
        }
    }

    pub(crate) async fn flush(&mut self) -> Result<()> {
        match self {
            Io::Next(next) => next.flush_at(FILE).await,
            Io::Edges(edges) => ask(&edges[FILE], op::FLUSH, 0..0, 0).await,
        }
    }

    /// Gives a range of the file up. That is advice, so a failure does not matter.
    pub(crate) async fn discard(&mut self, range: Range<u64>) {
        let result = match self {
            Io::Next(next) => next.discard(&DiscardRequest::new(range.clone(), 0)).await,
            Io::Edges(edges) => ask(&edges[FILE], op::DISCARD, range.clone(), 0).await,
        };
        if let Err(error) = result {
            tracing::debug!(?range, %error, "the file did not take a discard");
        }
    }
}

async fn ask(edge: &Edge, op: u32, range: Range<u64>, flags: u32) -> Result<()> {
    let ask = Ask { op, flags, offset: range.start, length: range.end - range.start, ..Ask::default() };
    Call::new(edge, ask, Buffer::default()).await.result
}

/// The file child, with what its edge does not know: how far it has grown since.
///
/// An image may end inside a cluster, or before one that is allocated; there it reads as zeroes.
#[derive(Debug)]
pub(crate) struct File {
    end: AtomicU64,
    touched: AtomicU64,
}

impl File {
    pub(crate) fn new(end: u64) -> Self {
        Self { end: AtomicU64::new(end), touched: AtomicU64::new(end) }
    }

    /// It reads as zeroes from here on.
    pub(crate) fn end(&self) -> u64 {
        self.end.load(Relaxed)
    }

    /// It reaches at least this far.
    pub(crate) fn grown(&self, end: u64) {
        if self.end() < end {
            self.end.fetch_max(end, Relaxed);
        }
    }

    /// Nobody ever tried to write from here on.
    pub(crate) fn touched(&self) -> u64 {
        self.touched.load(Relaxed)
    }

    /// Somebody is going to write up to here.
    pub(crate) fn touch(&self, end: u64) {
        self.touched.fetch_max(end, Relaxed);
    }

    pub(crate) async fn read(&self, io: &mut Io<'_, '_>, offset: u64, into: &mut [u8]) -> Result<()> {
        let inside = self.end().saturating_sub(offset).min(into.len() as u64) as usize;
        into[inside..].fill(0);
        if inside == 0 { Ok(()) } else { io.read(FILE, offset, &mut into[..inside]).await }
    }

    pub(crate) async fn write(&self, io: &mut Io<'_, '_>, offset: u64, from: &[u8]) -> Result<()> {
        self.touch(offset + from.len() as u64);
        io.write(offset, from).await?;
        self.grown(offset + from.len() as u64);
        Ok(())
    }

    /// Zeroes a range, whether or not something is there.
    pub(crate) async fn zero(&self, io: &mut Io<'_, '_>, range: Range<u64>) -> Result<()> {
        let zeroes = vec![0; (range.end - range.start).min(256 << 10) as usize];
        let mut at = range.start;
        while at < range.end {
            let length = (range.end - at).min(zeroes.len() as u64) as usize;
            self.write(io, at, &zeroes[..length]).await?;
            at += length as u64;
        }
        Ok(())
    }
}

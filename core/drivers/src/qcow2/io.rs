//! Calls to the children, from inside an operation and from outside.

use driveline_op::{
    Ask, Buffer, Call, DiscardRequest, Edge, Error, Info, Next, Result, WriteZeroesRequest, op,
};
use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

/// The child that the image is in.
pub(crate) const FILE: usize = 0;
/// The child that data is in, if the image keeps it in another file.
pub(crate) const DATA: usize = 1;

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

    async fn write(&mut self, child: usize, offset: u64, from: &[u8]) -> Result<()> {
        match self {
            Io::Next(next) => next.write_at(child, offset, from, 0).await,
            Io::Edges(edges) => {
                let ask = Ask { op: op::WRITE, offset, ..Ask::default() };
                Call::new(&edges[child], ask, Buffer::from(from)).await.result
            }
        }
    }

    /// Does anybody below a child listen to events?
    #[inline]
    pub(crate) fn listens(&self, child: usize) -> bool {
        match self {
            Io::Next(next) => next.listens(child),
            Io::Edges(edges) => edges.get(child).is_some_and(|edge| !edge.refuses(op::EVENT)),
        }
    }

    pub(crate) async fn tell_listener(&mut self, child: usize, event: u64) {
        match self {
            Io::Next(next) => next.tell(child, event).await,
            // An event has no outcome.
            Io::Edges(edges) => drop(ask(&edges[child], op::EVENT, event..event, 0).await),
        }
    }

    pub(crate) async fn flush(&mut self) -> Result<()> {
        self.flush_child(FILE).await
    }

    pub(crate) async fn flush_child(&mut self, child: usize) -> Result<()> {
        match self {
            Io::Next(next) => next.flush_at(child).await,
            Io::Edges(edges) => ask(&edges[child], op::FLUSH, 0..0, 0).await,
        }
    }

    async fn write_zeroes(&mut self, child: usize, range: Range<u64>, flags: u32) -> Result<()> {
        match self {
            Io::Next(next) => next.child(child).write_zeroes(&WriteZeroesRequest::new(range, flags)).await,
            Io::Edges(edges) => ask(&edges[child], op::WRITE_ZEROES, range, flags).await,
        }
    }

    /// Gives a range of a child up. That is advice, so a failure does not matter.
    pub(crate) async fn discard(&mut self, child: usize, range: Range<u64>) {
        let result = match self {
            Io::Next(next) => next.child(child).discard(&DiscardRequest::new(range.clone(), 0)).await,
            Io::Edges(edges) => ask(&edges[child], op::DISCARD, range.clone(), 0).await,
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

/// A child that is written to, with what its edge does not know: how far it has grown since.
///
/// An image may end inside a cluster, or before one that is allocated; there it reads as zeroes.
#[derive(Debug)]
pub(crate) struct File {
    pub(crate) child: usize,
    end: AtomicU64,
    touched: AtomicU64,
}

impl File {
    /// A child, as long as its edge says.
    pub(crate) fn of(io: &Io<'_, '_>, child: usize) -> Self {
        let end = io.info(child).map_or(0, |info| info.size_bytes);
        Self { child, end: AtomicU64::new(end), touched: AtomicU64::new(end) }
    }

    /// Another program may have written to it: it is as long as its edge says now.
    pub(crate) fn renew(&self, io: &Io<'_, '_>) {
        let end = io.info(self.child).map_or(0, |info| info.size_bytes);
        self.end.store(end, Relaxed);
        self.touched.store(end, Relaxed);
    }

    /// The file of an image that is being made: whatever is there is nothing.
    pub(crate) fn empty() -> Self {
        Self { child: FILE, end: AtomicU64::new(0), touched: AtomicU64::new(0) }
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
        if self.touched() < end {
            self.touched.fetch_max(end, Relaxed);
        }
    }

    pub(crate) async fn read(&self, io: &mut Io<'_, '_>, offset: u64, into: &mut [u8]) -> Result<()> {
        let inside = self.end().saturating_sub(offset).min(into.len() as u64) as usize;
        into[inside..].fill(0);
        if inside == 0 { Ok(()) } else { io.read(self.child, offset, &mut into[..inside]).await }
    }

    pub(crate) async fn write(&self, io: &mut Io<'_, '_>, offset: u64, from: &[u8]) -> Result<()> {
        self.touch(offset + from.len() as u64);
        io.write(self.child, offset, from).await?;
        self.grown(offset + from.len() as u64);
        Ok(())
    }

    /// Zeroes a range, in the child's own way if it has one. With `exact`, a range behind its end, too, so that it is as
    /// long as that.
    pub(crate) async fn zero_fast(
        &self,
        io: &mut Io<'_, '_>,
        range: Range<u64>,
        flags: u32,
        exact: bool,
    ) -> Result<()> {
        let inside = range.start..range.end.min(self.end());
        if inside.start < inside.end {
            match io.write_zeroes(self.child, inside.clone(), flags).await {
                Err(error) if error.code() == Error::NOT_SUPPORTED.code() => self.zero(io, inside).await?,
                done => done?,
            }
        }
        if exact && range.end > self.end() {
            self.zero(io, range.end.saturating_sub(512)..range.end).await?;
        }
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

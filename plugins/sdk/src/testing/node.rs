//! A filter under test, opened the way a host opens it.

use super::{clock, leaf::Leaf};
use crate::{
    BlockStatus, Buffer, Error, Info, Result,
    export::{self, Exported, FilterDescRef, FilterOpsRef, default},
    flag,
};
use abi_stable::std_types::{RNone, RSlice, RStr};
use driveline_abi::{ChildArg, FfiError, FilterPtr, OpVt, OpenArgs, op};
use driveline_op::{Answer, Ask, Call, Edge, Instance, Route, Target};
use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

/// What can be below a filter under test: a [`Leaf`], another [`Node`], or any edge.
pub trait Below {
    /// An edge to it.
    fn edge(&self) -> Edge;
}

impl Below for Leaf {
    fn edge(&self) -> Edge {
        self.edge()
    }
}

impl Below for Edge {
    fn edge(&self) -> Edge {
        self.clone()
    }
}

impl Below for Node {
    fn edge(&self) -> Edge {
        self.edge.clone()
    }
}

/// An opened filter, closed on drop.
#[derive(Debug)]
pub struct Node {
    edge: Edge,
    cookie: u64,
}

/// Closes the filter when the last edge to it is gone.
struct Opened {
    filter: FilterPtr,
    ops: FilterOpsRef,
}

// SAFETY: `Filter` is Send + Sync, and the pointer is to one.
unsafe impl Send for Opened {}
// SAFETY: as above.
unsafe impl Sync for Opened {}

impl Drop for Opened {
    fn drop(&mut self) {
        // SAFETY: it came from the same filter's `open`, and nothing that could call it is left.
        unsafe { (self.ops.close())(self.filter) };
    }
}

fn error_of(error: &FfiError) -> Error {
    match error.key.as_str() {
        "" => Error::new(error.errno, &error.message),
        key => Error::option(key, &error.message),
    }
}

/// The names of a filter's options.
pub fn option_names<F: Exported>() -> Vec<&'static str> {
    (F::DECLARED.options)().iter().map(|name| name.as_str()).collect()
}

/// Would a filter take these options?
pub fn check<F: Exported>(options: serde_json::Value) -> Result<()> {
    let description = export::describe::<F>();
    let json = options.to_string();
    (description.check())(json.as_str().into()).into_result().map_err(|error| error_of(&error))
}

/// Opens a filter over one child. `options` is what stands in a configuration, as `json!({ "read": "5ms" })`.
pub fn open<F: Exported>(options: serde_json::Value, child: &impl Below) -> Result<Node> {
    open_with::<F>(options, child, &[])
}

/// Opens a filter that declared further children.
pub fn open_with<F: Exported>(
    options: serde_json::Value,
    child: &impl Below,
    named: &[(&str, &dyn Below)],
) -> Result<Node> {
    static COOKIE: AtomicU64 = AtomicU64::new(1);
    clock::install();
    let description = export::describe::<F>();
    let mut names = vec!["child"];
    let mut edges = vec![child.edge()];
    for declared in description.children() {
        let found = named.iter().find(|(name, _)| *name == declared.as_str());
        let (name, below) = found.ok_or_else(|| Error::option(declared, "this child is needed"))?;
        names.push(*name);
        edges.push(below.edge());
    }
    assert_eq!(names.len(), named.len() + 1, "a child was given that the filter does not declare");
    let children: Vec<ChildArg<'_>> = names
        .iter()
        .zip(&edges)
        .map(|(name, edge)| ChildArg { name: RStr::from_str(name), info: *edge.info() })
        .collect();
    let (json, cookie) = (options.to_string(), COOKIE.fetch_add(1, Relaxed));
    let arguments = OpenArgs {
        node_name: "test".into(),
        options_json: json.as_str().into(),
        children: RSlice::from_slice(&children),
        cookie,
        saved_state: RNone,
        reserved: [0; 4],
    };
    let filter = (description.open())(&arguments).into_result().map_err(|error| error_of(&error))?;
    Ok(Node { edge: wire(description, filter, edges), cookie })
}

fn wire(description: FilterDescRef, filter: FilterPtr, edges: Vec<Edge>) -> Edge {
    let ops = description.ops();
    let below = edges[0].clone();
    let mut info: Info = *below.info();
    if let Some(size) = ops.size() {
        // SAFETY: the filter was just opened.
        info.size_bytes = unsafe { size(filter, info.size_bytes) };
    }
    let slots: [Option<&'static OpVt>; op::COUNT] = [
        ops.read(),
        ops.write(),
        ops.flush(),
        ops.discard(),
        ops.write_zeroes(),
        ops.block_status(),
        ops.cache().flatten(),
    ];
    let keep = Arc::new(Opened { filter, ops });
    // SAFETY: the operations are those of the filter that the pointer is to, which `keep` keeps open.
    let instance = unsafe { Instance::foreign(filter.0, slots, keep) };
    let target = Target::new(instance, edges);
    let pass = description.default() == default::PASS;
    Edge::new(info, |operation| match () {
        () if target.instance().has(operation) => Route::To(&target),
        // A flush has nothing that a filter could have to change.
        () if pass || operation == op::FLUSH => Route::As(&below),
        () => Route::Refuse,
    })
}

impl Node {
    /// Size and limits, as a parent sees them.
    pub fn info(&self) -> Info {
        *self.edge.info()
    }

    /// The texts of its panics.
    pub fn failures(&self) -> Vec<String> {
        clock::failures(self.cookie)
    }

    /// Any request.
    pub async fn call(&self, ask: Ask, buffer: Buffer) -> Answer {
        Call::new(self.edge.clone(), ask, buffer).await
    }

    async fn plain(&self, op: u32, range: Range<u64>, flags: u32) -> Result<()> {
        let ask = Ask { op, flags, offset: range.start, length: range.end - range.start, ..Ask::default() };
        self.call(ask, Buffer::default()).await.result
    }

    /// Reads.
    pub async fn read(&self, range: Range<u64>) -> Result<Vec<u8>> {
        let ask = Ask { op: op::READ, offset: range.start, ..Ask::default() };
        let answer = self.call(ask, Buffer::new((range.end - range.start) as usize)).await;
        answer.result.map(|()| answer.buffer.to_vec())
    }

    /// Writes.
    pub async fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.write_with(offset, data, 0).await
    }

    /// Writes, with bits of [`flag`].
    pub async fn write_with(&self, offset: u64, data: &[u8], flags: u32) -> Result<()> {
        let ask = Ask { op: op::WRITE, flags, offset, ..Ask::default() };
        self.call(ask, Buffer::from(data)).await.result
    }

    /// Flushes.
    pub async fn flush(&self) -> Result<()> {
        self.plain(op::FLUSH, 0..0, 0).await
    }

    /// Discards.
    pub async fn discard(&self, range: Range<u64>) -> Result<()> {
        self.plain(op::DISCARD, range, 0).await
    }

    /// Writes zeroes, which may give back space.
    pub async fn write_zeroes(&self, range: Range<u64>) -> Result<()> {
        self.plain(op::WRITE_ZEROES, range, flag::MAY_UNMAP).await
    }

    /// Asks about the first extent of a range.
    pub async fn block_status(&self, range: Range<u64>) -> Result<BlockStatus> {
        let (offset, length) = (range.start, range.end - range.start);
        let ask = Ask { op: op::BLOCK_STATUS, offset, length, ..Ask::default() };
        let answer = self.call(ask, Buffer::default()).await;
        answer.result.map(|()| answer.status)
    }

    /// Hints.
    pub async fn cache(&self, range: Range<u64>) -> Result<()> {
        self.plain(op::CACHE, range, 0).await
    }
}

//! A filter under test, opened the way a host opens it.

use super::{clock, leaf::Leaf};
use crate::{
    BlockStatus, Buffer, Claim, Error, Filter, Info, ObjectCall, Result,
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
    /// Its last operation, where flush is.
    settle: Option<Edge>,
    opened: Arc<Opened>,
    cookie: u64,
}

/// Closes the filter when the last edge to it is gone.
struct Opened {
    filter: FilterPtr,
    ops: FilterOpsRef,
}

impl std::fmt::Debug for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Opened")
    }
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

/// Does something with an object of a filter.
pub fn object<F: Filter>(kind: &str, name: &str, call: ObjectCall) -> Result<serde_json::Value> {
    clock::install();
    F::object(kind, name, call)
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
    for declared in description.children_optional().expect("this SDK has them") {
        if let Some((name, below)) = named.iter().find(|(name, _)| *name == declared.as_str()) {
            names.push(*name);
            edges.push(below.edge());
        }
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
    let opened = Arc::new(Opened { filter, ops: description.ops() });
    let own = |vt| {
        let mut slots = [None; op::COUNT];
        slots[op::FLUSH as usize] = Some(vt);
        // SAFETY: as in `wire`.
        let instance = unsafe { Instance::foreign(filter.0, slots, opened.clone()) };
        Edge::to(*edges[0].info(), &Target::new(instance, edges.clone()))
    };
    if let Some(begin) = export::begin::<F>().map(own) {
        let ask = Ask { op: op::FLUSH, ..Ask::default() };
        let begun = clock::block_on(Call::new(begin, ask, Buffer::default())).result;
        let said = description.last_failure().map(|ask| ask()).unwrap_or_default();
        begun.map_err(|error| if said.is_empty() { error } else { error.because(said) })?;
    }
    let settle = export::settle::<F>().map(own);
    Ok(Node { edge: wire(description, &opened, edges), settle, opened, cookie })
}

fn wire(description: FilterDescRef, opened: &Arc<Opened>, edges: Vec<Edge>) -> Edge {
    let filter = opened.filter;
    let ops = description.ops();
    let below = edges[0].clone();
    let mut info: Info = *below.info();
    if let Some(size) = ops.size() {
        // SAFETY: the filter was just opened.
        info.size_bytes = unsafe { size(filter, info.size_bytes) };
    }
    if let Some(limits) = ops.info().flatten() {
        let children: Vec<Info> = edges.iter().map(|edge| *edge.info()).collect();
        // SAFETY: as above.
        unsafe { limits(filter, RSlice::from_slice(&children), &mut info) };
    }
    let slots: [Option<&'static OpVt>; op::COUNT] = [
        ops.read(),
        ops.write(),
        ops.flush(),
        ops.discard(),
        ops.write_zeroes(),
        ops.block_status(),
        ops.cache().flatten(),
        ops.resize().flatten(),
        ops.event().flatten(),
    ];
    // SAFETY: the operations are those of the filter that the pointer is to, which `opened` keeps open.
    let instance = unsafe { Instance::foreign(filter.0, slots, opened.clone()) };
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

    /// Changes the size.
    pub async fn resize(&self, size_bytes: u64) -> Result<()> {
        self.plain(op::RESIZE, size_bytes..size_bytes, 0).await
    }

    /// Tells it of an event, by its name.
    pub async fn event(&self, name: &str) -> Result<()> {
        let event = driveline_abi::event::number(name);
        self.plain(op::EVENT, event..event, 0).await
    }

    /// What comes before its end.
    pub async fn settle(&self) -> Result<()> {
        let Some(settle) = &self.settle else { return Ok(()) };
        let ask = Ask { op: op::FLUSH, ..Ask::default() };
        Call::new(settle, ask, Buffer::default()).await.result
    }

    /// What it needs of a child beyond what is passed on.
    pub fn permissions(&self, child: usize) -> Claim {
        let mut claim = Claim::default();
        if let Some(ask) = self.opened.ops.permissions().flatten() {
            // SAFETY: the filter is open.
            unsafe { ask(self.opened.filter, child as u32, &mut claim.takes, &mut claim.denies) };
        }
        claim
    }

    /// Tells it that a drain begins or ends.
    pub fn drained(&self, drained: bool) {
        if let Some(tell) = self.opened.ops.drained().flatten() {
            // SAFETY: the filter is open.
            unsafe { tell(self.opened.filter, drained.into()) };
        }
    }

    /// Hints.
    pub async fn cache(&self, range: Range<u64>) -> Result<()> {
        self.plain(op::CACHE, range, 0).await
    }
}

//! The trait that a filter implements.

use crate::{
    BlockStatusRequest, CacheRequest, DiscardRequest, Error, EventRequest, FlushRequest, Info, Next,
    ReadRequest, ResizeRequest, Result, WriteRequest, WriteZeroesRequest,
};
use driveline_abi::ChildArg;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::future::Future;

/// The number of a child: what [`Next::child`] and [`Next::info`] take. Child 0 is the filtered one.
pub type ChildId = usize;

/// Tells the program that a node failed.
#[derive(Clone, Copy, Debug)]
pub struct Alarm {
    pub(crate) cookie: u64,
}

impl Alarm {
    /// Marks the node as failed, which its users see and hear of: what it holds or was told cannot be right. Requests come
    /// all the same; what becomes of them is up to the filter.
    pub fn raise(&self, message: impl std::fmt::Display) {
        crate::export::raise(self.cookie, &message.to_string());
    }
}

/// What a filter learns when it is opened.
#[derive(Debug)]
pub struct OpenCx<'a> {
    pub(crate) cookie: u64,
    pub(crate) node_name: &'a str,
    pub(crate) children: &'a [ChildArg<'a>],
}

impl OpenCx<'_> {
    /// The node's name.
    pub fn node_name(&self) -> &str {
        self.node_name
    }

    /// To be kept, by a filter that may find out that something is wrong with its node.
    pub fn alarm(&self) -> Alarm {
        Alarm { cookie: self.cookie }
    }

    /// The number of a child, by the name that the filter declared (`children("target")`).
    pub fn child(&self, name: &str) -> Result<ChildId> {
        let found = self.children.iter().position(|child| child.name.as_str() == name);
        found.ok_or_else(|| Error::option(name, "this child is needed"))
    }

    /// The number of a child that may be missing (`children("log?")`); `None`: it is.
    pub fn optional_child(&self, name: &str) -> Option<ChildId> {
        self.children.iter().position(|child| child.name.as_str() == name)
    }

    /// Size and limits of a child as they are now. They may change later; [`Next::info`] is always right.
    pub fn info(&self, child: ChildId) -> &Info {
        &self.children[child].info
    }
}

/// What a filter needs of a child, and does not let others do with it: bits of [`permission`](crate::permission).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Claim {
    /// What it needs.
    pub takes: u32,
    /// What others must not do.
    pub denies: u32,
}

/// What is done with an object (see [`Filter::object`]).
#[derive(Clone, Debug, PartialEq)]
pub enum ObjectCall {
    /// Would one with these properties be taken? It has no effect.
    Check(Value),
    /// Make one. What is not given is what it is by default.
    Create(Value),
    /// Change some properties, while nodes use it.
    Set(Value),
    /// Ask for all properties.
    Get,
    /// End it.
    Delete,
}

/// A filter: a node that stands between a parent and its child.
///
/// Implement it with the [`filter`](macro@crate::filter) attribute, and write only the operations that the filter
/// changes. What is left out costs nothing: the parent then calls what is below. (The default methods here are
/// for calls from within, as `self.read(next, request).await`; they are never in the path of a request.)
///
/// An operation gets `&self`: several requests are in a filter at the same time, on several threads. State that
/// changes is atomic, or behind a lock that is not held over an `.await` (for ranges: [`RangeLock`](crate::RangeLock)).
///
/// An operation may panic; its request fails with `EIO` and the node is marked as failed, and that is all.
pub trait Filter: Sized + Send + Sync + 'static {
    /// What stands under the node's name in a configuration: a struct with [`options`](macro@crate::options),
    /// or [`NoOptions`](crate::NoOptions).
    type Options: DeserializeOwned;

    /// Opens a node. Refuse an option with [`Error::option`]. No child may be called yet.
    fn open(options: Self::Options, cx: &OpenCx<'_>) -> Result<Self>;

    /// Refuses options whose types are right and whose values are not. It comes before every `open`, and alone when
    /// a configuration is only checked; it has no effect.
    fn check(options: &Self::Options) -> Result<()> {
        let _ = options;
        Ok(())
    }

    /// The size shown above, for a size of child 0.
    fn size(&self, child_size_bytes: u64) -> u64 {
        child_size_bytes
    }

    /// The limits shown above, for those of the children. `shown` has child 0's, with the size that [`Filter::size`] says.
    fn info(&self, children: &[Info], shown: Info) -> Info {
        let _ = children;
        shown
    }

    /// What it needs of a child, and does not let others do with it, beyond what it passes on from its own users.
    fn permissions(&self, child: ChildId) -> Claim {
        let _ = child;
        Claim::default()
    }

    /// Does something with an object: what nodes of this filter share by name and is no node itself, as a throttle group
    /// is. The kinds are those of `#[filter(objects(..))]`. Returns its properties as they are then (a JSON object); what
    /// is returned for [`ObjectCall::Check`] and [`ObjectCall::Delete`] does not matter. On an error nothing was changed.
    fn object(kind: &str, name: &str, call: ObjectCall) -> Result<Value> {
        let _ = (name, call);
        Err(Error::NOT_SUPPORTED.because(format_args!("there are no objects of the kind '{kind}'")))
    }

    /// Fills the request's memory with what is at its offset.
    fn read(
        &self,
        next: &mut Next<'_>,
        request: &ReadRequest<'_>,
    ) -> impl Future<Output = Result<()>> + Send {
        async move { next.read(request).await }
    }

    /// Stores the request's memory at its offset.
    fn write(
        &self,
        next: &mut Next<'_>,
        request: &WriteRequest<'_>,
    ) -> impl Future<Output = Result<()>> + Send {
        async move { next.write(request).await }
    }

    /// Makes all completed writes durable.
    fn flush(
        &self,
        next: &mut Next<'_>,
        request: &FlushRequest<'_>,
    ) -> impl Future<Output = Result<()>> + Send {
        async move { next.flush(request).await }
    }

    /// Gives a range up; what it reads as afterwards is unspecified.
    fn discard(
        &self,
        next: &mut Next<'_>,
        request: &DiscardRequest<'_>,
    ) -> impl Future<Output = Result<()>> + Send {
        async move { next.discard(request).await }
    }

    /// Makes a range read as zeroes.
    fn write_zeroes(
        &self,
        next: &mut Next<'_>,
        request: &WriteZeroesRequest<'_>,
    ) -> impl Future<Output = Result<()>> + Send {
        async move { next.write_zeroes(request).await }
    }

    /// Describes the first extent of a range, with [`BlockStatusRequest::answer`].
    fn block_status(
        &self,
        next: &mut Next<'_>,
        request: &BlockStatusRequest<'_>,
    ) -> impl Future<Output = Result<()>> + Send {
        async move { next.block_status(request).await }
    }

    /// Takes the hint that a range will be read.
    fn cache(
        &self,
        next: &mut Next<'_>,
        request: &CacheRequest<'_>,
    ) -> impl Future<Output = Result<()>> + Send {
        async move { next.cache(request).await }
    }

    /// Takes a new size.
    fn resize(
        &self,
        next: &mut Next<'_>,
        request: &ResizeRequest<'_>,
    ) -> impl Future<Output = Result<()>> + Send {
        async move { next.resize(request).await }
    }

    /// Hears what its parent is about to do.
    fn event(
        &self,
        next: &mut Next<'_>,
        request: &EventRequest<'_>,
    ) -> impl Future<Output = Result<()>> + Send {
        async move { next.event(request).await }
    }

    /// Looks at the children, which [`Filter::open`] cannot call, before there are requests. With an error the node is not
    /// opened, and its text is the reason. The request says nothing.
    fn begin(
        &self,
        next: &mut Next<'_>,
        request: &FlushRequest<'_>,
    ) -> impl Future<Output = Result<()>> + Send {
        let _ = (next, request);
        async { Ok(()) }
    }

    /// Leaves the children as they shall be found when the filter is gone, or may not write any more. It comes before the
    /// end (no request comes afterwards), and whenever the node becomes read-only. The request says nothing.
    fn settle(
        &self,
        next: &mut Next<'_>,
        request: &FlushRequest<'_>,
    ) -> impl Future<Output = Result<()>> + Send {
        let _ = (next, request);
        async { Ok(()) }
    }
}

//! The trait that a filter implements.

use crate::{
    BlockStatusRequest, CacheRequest, DiscardRequest, Error, FlushRequest, Info, Next, ReadRequest, Result,
    WriteRequest, WriteZeroesRequest,
};
use driveline_abi::ChildArg;
use serde::de::DeserializeOwned;
use std::future::Future;

/// The number of a child: what [`Next::child`] and [`Next::info`] take. Child 0 is the filtered one.
pub type ChildId = usize;

/// What a filter learns when it is opened.
#[derive(Debug)]
pub struct OpenCx<'a> {
    pub(crate) node_name: &'a str,
    pub(crate) children: &'a [ChildArg<'a>],
}

impl OpenCx<'_> {
    /// The node's name.
    pub fn node_name(&self) -> &str {
        self.node_name
    }

    /// The number of a child, by the name that the filter declared (`children("target")`).
    pub fn child(&self, name: &str) -> Result<ChildId> {
        let found = self.children.iter().position(|child| child.name.as_str() == name);
        found.ok_or_else(|| Error::option(name, "this child is needed"))
    }

    /// Size and limits of a child as they are now. They may change later; [`Next::info`] is always right.
    pub fn info(&self, child: ChildId) -> &Info {
        &self.children[child].info
    }
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
}

//! `raw`: a child's bytes as they are, or a window of them.
//!
//! | option | default | meaning |
//! |---|---|---|
//! | `file` | required | the child |
//! | `offset` | `0` | where in the child the node begins |
//! | `size` | the rest of the child | its size |
//!
//! Without `offset` and `size` the node has no operations of its own: requests go straight to the child. With `size` the
//! node cannot be resized, because that is what the user fixed.

mod create;

use crate::{Bytes, range};
use driveline_graph::{
    BoxFuture, ChildSpec, CreateArgs, Created, Description, Driver, DriverKind, Error, Kind, Missing,
    OpenArgs, OpenChild, OpenNode, Options, Preallocation, Reopened, Result, Role, parse_options,
};
use driveline_op::{
    BlockStatusRequest, Body, CacheRequest, DiscardRequest, Info, Instance, Next, OpTable, ReadRequest,
    ResizeRequest, WriteRequest, WriteZeroesRequest,
};
use serde::Deserialize;
use std::sync::Arc;

/// The options of a `raw` node.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct RawOptions {
    offset: Bytes,
    size: Option<Bytes>,
}

/// The driver `raw`.
#[derive(Debug)]
pub struct RawDriver(Description);

impl Default for RawDriver {
    fn default() -> Self {
        Self(Description {
            children: vec![ChildSpec::required("file", Role::Data)],
            options: vec!["offset".into(), "size".into()],
            missing: Missing::Pass,
            effects: driveline_abi::effect::CHANGES_OFFSETS,
            ..Description::builtin("raw", DriverKind::Format, "Shows its file as it is, or a window of it")
        })
    }
}

impl RawDriver {
    fn options(options: &Options) -> Result<RawOptions> {
        let parsed: RawOptions = parse_options(options)?;
        range::check_size(parsed.offset.0).map_err(|error| error.key("offset"))?;
        if let Some(Bytes(size)) = parsed.size {
            range::check_size(size.saturating_add(parsed.offset.0)).map_err(|error| error.key("size"))?;
        }
        Ok(parsed)
    }
}

impl Driver for RawDriver {
    fn description(&self) -> &Description {
        &self.0
    }

    fn check(&self, options: &Options) -> Result<()> {
        Self::options(options).map(drop)
    }

    fn created_in(&self) -> Option<&[ChildSpec]> {
        Some(&self.0.children)
    }

    fn create<'a>(&'a self, args: CreateArgs<'a>) -> BoxFuture<'a, Result<Created>> {
        Box::pin(create::create(args))
    }

    fn open<'a>(&'a self, args: OpenArgs<'a>) -> BoxFuture<'a, Result<Arc<dyn OpenNode>>> {
        Box::pin(async move {
            let RawOptions { offset: Bytes(offset), size } = Self::options(args.options)?;
            let Some(file) = args.child("file") else {
                return Err(Error::new(Kind::Invalid, "a child is required").key("file"));
            };
            let child = file.edge.info();
            let alignment = u64::from(child.request_alignment);
            for (key, value) in [("offset", offset), ("size", size.map_or(0, |size| size.0))] {
                if !value.is_multiple_of(alignment) {
                    let text = format_args!(
                        "{value} is not a multiple of {alignment}, which '{}' needs",
                        file.node_name
                    );
                    return Err(Error::new(Kind::Invalid, text).key(key));
                }
            }
            let end = offset + size.map_or(0, |size| size.0);
            if end > child.size_bytes {
                let text = format_args!(
                    "the window ends at {end}, but '{}' has only {} bytes",
                    file.node_name, child.size_bytes
                );
                return Err(Error::new(Kind::OutOfRange, text).key(if size.is_some() {
                    "size"
                } else {
                    "offset"
                }));
            }
            let window = Window { offset, size: size.map(|size| size.0) };
            Ok(Arc::new(RawNode(Arc::new(Body { cookie: args.cookie, driver: window }))) as _)
        })
    }

    /// Opening has no effect, so the new window is just another instance.
    fn reopen<'a>(
        &'a self,
        _: &'a Arc<dyn OpenNode>,
        _: &'a Options,
        args: OpenArgs<'a>,
    ) -> BoxFuture<'a, Result<Reopened>> {
        Box::pin(async move {
            let open = self.open(args).await?;
            Ok(Reopened { open, undo: Box::new(|| {}), close_old: false })
        })
    }
}

/// An open node.
struct RawNode(Arc<Body<Window>>);

impl OpenNode for RawNode {
    fn instance(&self) -> Instance {
        let all = Window { offset: 0, size: None };
        Instance::new(self.0.clone(), if self.0.driver == all { &PASS } else { &SHIFT })
    }

    fn info(&self, children: &[Info]) -> Info {
        let window = &self.0.driver;
        let Some(child) = children.first() else { return Info::default() };
        // Should the child have become shorter, so has the window.
        let rest = child.size_bytes.saturating_sub(window.offset);
        Info { size_bytes: window.size.map_or(rest, |size| size.min(rest)), ..*child }
    }

    fn details(&self) -> serde_json::Value {
        let window = &self.0.driver;
        serde_json::json!({ "offset": window.offset, "size": window.size })
    }

    fn resize<'a>(&'a self, children: &'a [OpenChild], size_bytes: u64) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let window = &self.0.driver;
            if window.size.is_some() {
                let text = "its size is fixed by the option 'size'";
                return Err(Error::new(Kind::NotSupported, text));
            }
            let end = size_bytes.saturating_add(window.offset);
            range::check_size(end)?;
            let file = children.first().ok_or_else(|| Error::new(Kind::Invalid, "a child is required"))?;
            file.resize(end).await.map_err(|error| error.at(&file.node_name))
        })
    }

    fn preallocate<'a>(
        &'a self,
        children: &'a [OpenChild],
        range: std::ops::Range<u64>,
        how: Preallocation,
    ) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let window = &self.0.driver;
            range::inside(
                range.start,
                range.end.saturating_sub(range.start),
                window.size.unwrap_or(u64::MAX),
            )?;
            let range = range.start.saturating_add(window.offset)..range.end.saturating_add(window.offset);
            let file = children.first().ok_or_else(|| Error::new(Kind::Invalid, "a child is required"))?;
            file.node.preallocate(&[], range, how).await.map_err(|error| error.at(&file.node_name))
        })
    }
}

/// Which part of the child the node is.
#[derive(Debug, PartialEq, Eq)]
struct Window {
    offset: u64,
    /// `None`: to the end of the child.
    size: Option<u64>,
}

static PASS: OpTable<Window> = OpTable::new();

/// Flushes are not shifted, so they are not here.
static SHIFT: OpTable<Window> = OpTable::new()
    .read(Window::read)
    .write(Window::write)
    .discard(Window::discard)
    .write_zeroes(Window::write_zeroes)
    .block_status(Window::block_status)
    .cache(Window::cache)
    .resize(Window::resize);

type Done = driveline_op::Result<()>;

impl Window {
    /// Where in the child the range begins. Nothing outside the window is touched, whatever is asked.
    #[inline]
    fn shift(&self, offset: u64, length: u64) -> driveline_op::Result<u64> {
        let size = self.size.unwrap_or(range::SIZE_BYTES_MAX - self.offset);
        range::inside(offset, length, size)?;
        Ok(offset + self.offset)
    }

    async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Done {
        let offset = self.shift(request.offset(), request.length())?;
        next.read(&request.at(offset)).await
    }

    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Done {
        let offset = self.shift(request.offset(), request.length())?;
        next.write(&request.at(offset)).await
    }

    async fn discard(&self, next: &mut Next<'_>, request: &DiscardRequest<'_>) -> Done {
        let offset = self.shift(request.offset(), request.length())?;
        next.discard(&request.at(offset)).await
    }

    async fn write_zeroes(&self, next: &mut Next<'_>, request: &WriteZeroesRequest<'_>) -> Done {
        let offset = self.shift(request.offset(), request.length())?;
        next.write_zeroes(&request.at(offset)).await
    }

    /// The child's answer stands as it is: `map` already counts from where the child counts.
    async fn block_status(&self, next: &mut Next<'_>, request: &BlockStatusRequest<'_>) -> Done {
        let offset = self.shift(request.offset(), request.length())?;
        next.block_status(&request.at(offset)).await
    }

    async fn cache(&self, next: &mut Next<'_>, request: &CacheRequest<'_>) -> Done {
        let offset = self.shift(request.offset(), request.length())?;
        next.cache(&request.at(offset)).await
    }

    async fn resize(&self, next: &mut Next<'_>, request: &ResizeRequest<'_>) -> Done {
        if self.size.is_some() {
            return Err(driveline_op::Error::NOT_SUPPORTED); // the user fixed it
        }
        let end = request.size_bytes().checked_add(self.offset).ok_or(driveline_op::Error::INVALID)?;
        next.resize_at(0, end).await
    }
}

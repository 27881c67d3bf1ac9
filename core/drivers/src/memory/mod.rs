//! `memory`: a node whose data is in memory and goes away with it.
//!
//! | option | default | meaning |
//! |---|---|---|
//! | `size` | required | its size when it is opened |
//!
//! It behaves like a file: sparse, and a write beyond the end makes it longer (formats rely on that).

mod pages;

use crate::{Bytes, range};
use driveline_graph::{
    BoxFuture, Description, Driver, DriverKind, OpenArgs, OpenChild, OpenNode, Options, Result, parse_options,
};
use driveline_op::{
    BlockStatus, BlockStatusRequest, Body, CacheRequest, DiscardRequest, Error as OpError, FlushRequest,
    Info, Instance, Next, OpTable, ReadRequest, WriteRequest, WriteZeroesRequest, info, status,
};
use pages::Pages;
use serde::Deserialize;
use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
};

/// The options of a `memory` node.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct MemoryOptions {
    size: Bytes,
}

/// The driver `memory`.
#[derive(Debug)]
pub struct MemoryDriver(Description);

impl Default for MemoryDriver {
    fn default() -> Self {
        Self(Description {
            options: vec!["size".into()],
            ..Description::builtin("memory", DriverKind::Protocol, "Keeps data in memory, sparsely")
        })
    }
}

impl MemoryDriver {
    fn options(options: &Options) -> Result<MemoryOptions> {
        let parsed: MemoryOptions = parse_options(options)?;
        range::check_size(parsed.size.0).map_err(|error| error.key("size"))?;
        Ok(parsed)
    }
}

impl Driver for MemoryDriver {
    fn description(&self) -> &Description {
        &self.0
    }

    fn check(&self, options: &Options) -> Result<()> {
        Self::options(options).map(drop)
    }

    fn open<'a>(&'a self, args: OpenArgs<'a>) -> BoxFuture<'a, Result<Arc<dyn OpenNode>>> {
        Box::pin(async move {
            let driver = Memory {
                size: AtomicU64::new(Self::options(args.options)?.size.0),
                read_only: AtomicBool::new(args.read_only),
                pages: Pages::default(),
            };
            Ok(Arc::new(MemoryNode(Arc::new(Body { cookie: args.cookie, driver }))) as _)
        })
    }
}

/// An open node.
struct MemoryNode(Arc<Body<Memory>>);

impl OpenNode for MemoryNode {
    fn instance(&self) -> Instance {
        Instance::new(self.0.clone(), &OPERATIONS)
    }

    fn info(&self, _: &[Info]) -> Info {
        let memory = &self.0.driver;
        let flags = if memory.read_only.load(Relaxed) { info::READ_ONLY } else { 0 };
        Info {
            size_bytes: memory.size.load(Relaxed),
            flags: flags | info::FAST_ZERO | info::DISCARD,
            ..Info::default()
        }
    }

    fn details(&self) -> serde_json::Value {
        serde_json::json!({ "allocated-bytes": self.0.driver.pages.allocated_bytes() })
    }

    fn resize<'a>(&'a self, _: &'a [OpenChild], size_bytes: u64) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            range::check_size(size_bytes)?;
            let before = self.0.driver.size.swap(size_bytes, Relaxed);
            if size_bytes < before {
                // What is cut off must not come back when the node grows again.
                self.0.driver.pages.zero(size_bytes..before);
            }
            Ok(())
        })
    }

    fn set_read_only<'a>(&'a self, _: &'a [OpenChild], read_only: bool) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            self.0.driver.read_only.store(read_only, Relaxed);
            Ok(())
        })
    }
}

struct Memory {
    size: AtomicU64,
    read_only: AtomicBool,
    pages: Pages,
}

static OPERATIONS: OpTable<Memory> = OpTable::new()
    .read(Memory::read)
    .write(Memory::write)
    .flush(Memory::flush)
    .discard(Memory::discard)
    .write_zeroes(Memory::write_zeroes)
    .block_status(Memory::block_status)
    .cache(Memory::cache);

type Done = driveline_op::Result<()>;

impl Memory {
    async fn read(&self, _: &mut Next<'_>, request: &ReadRequest<'_>) -> Done {
        range::inside(request.offset(), request.length(), range::SIZE_BYTES_MAX)?;
        self.pages.read(request);
        Ok(())
    }

    async fn write(&self, _: &mut Next<'_>, request: &WriteRequest<'_>) -> Done {
        self.about_to_write(request.offset(), request.length())?;
        self.pages.write(request);
        self.grow(request.offset(), request.length());
        Ok(())
    }

    async fn flush(&self, _: &mut Next<'_>, _: &FlushRequest<'_>) -> Done {
        Ok(())
    }

    async fn discard(&self, _: &mut Next<'_>, request: &DiscardRequest<'_>) -> Done {
        self.about_to_write(request.offset(), request.length())?;
        self.pages.zero(request.range());
        Ok(())
    }

    async fn write_zeroes(&self, _: &mut Next<'_>, request: &WriteZeroesRequest<'_>) -> Done {
        self.about_to_write(request.offset(), request.length())?;
        self.pages.zero(request.range());
        self.grow(request.offset(), request.length());
        Ok(())
    }

    async fn block_status(&self, _: &mut Next<'_>, request: &BlockStatusRequest<'_>) -> Done {
        range::inside(request.offset(), request.length(), range::SIZE_BYTES_MAX)?;
        let (data, length) = self.pages.extent(request.range());
        let flags = if data { status::DATA | status::MAPPED } else { status::ZERO };
        request.answer(BlockStatus { flags, depth: 1, length, map: request.offset(), reserved: 0 });
        Ok(())
    }

    async fn cache(&self, _: &mut Next<'_>, _: &CacheRequest<'_>) -> Done {
        Ok(())
    }

    #[inline]
    fn about_to_write(&self, offset: u64, length: u64) -> Done {
        if self.read_only.load(Relaxed) {
            return Err(OpError::NOT_PERMITTED);
        }
        range::inside(offset, length, range::SIZE_BYTES_MAX)
    }

    #[inline]
    fn grow(&self, offset: u64, length: u64) {
        if length > 0 && offset + length > self.size.load(Relaxed) {
            self.size.fetch_max(offset + length, Relaxed);
        }
    }
}

//! `null`: a node without data, for measuring what is above it.
//!
//! | option | default | meaning |
//! |---|---|---|
//! | `size` | `"1GiB"` | its size |
//! | `read-zeroes` | `true` | reads give zeroes; else they leave memory as it is, with old data of other requests in it |
//! | `latency-ns` | `0` | how long every operation takes at least; 0: it completes at once |
//!
//! Writes go nowhere and succeed. `null-co` and `null-aio` are the same by QEMU's names, with QEMU's default for
//! `read-zeroes`, which is `false`.

use crate::{Bytes, range};
use driveline_graph::{
    BoxFuture, Description, Driver, DriverKind, OpenArgs, OpenChild, OpenNode, Options, Result, parse_options,
};
use driveline_op::{
    BlockStatus, BlockStatusRequest, Body, CacheRequest, DiscardRequest, FlushRequest, Info, Instance, Next,
    OpTable, ReadRequest, WriteRequest, WriteZeroesRequest, info, status,
};
use serde::Deserialize;
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

/// The options of a `null` node.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct NullOptions {
    size: Bytes,
    read_zeroes: bool,
    latency_ns: u64,
}

impl Default for NullOptions {
    fn default() -> Self {
        Self { size: Bytes(1 << 30), read_zeroes: true, latency_ns: 0 }
    }
}

/// The driver `null`.
#[derive(Debug)]
pub struct NullDriver {
    description: Description,
    read_zeroes: bool,
}

impl Default for NullDriver {
    fn default() -> Self {
        Self::named("null", true)
    }
}

impl NullDriver {
    /// The driver by the names that it has in QEMU: `null-co`, `null-aio`.
    pub fn of_qemu() -> [Self; 2] {
        ["null-co", "null-aio"].map(|name| Self::named(name, false))
    }

    fn named(name: &'static str, read_zeroes: bool) -> Self {
        let description = Description {
            options: vec!["size".into(), "read-zeroes".into(), "latency-ns".into()],
            ..Description::builtin(name, DriverKind::Protocol, "Takes all writes and keeps none")
        };
        Self { description, read_zeroes }
    }

    fn options(&self, options: &Options) -> Result<NullOptions> {
        let mut options = options.clone();
        options.entry("read-zeroes").or_insert(self.read_zeroes.into());
        let parsed: NullOptions = parse_options(&options)?;
        range::check_size(parsed.size.0).map_err(|error| error.key("size"))?;
        Ok(parsed)
    }
}

impl Driver for NullDriver {
    fn description(&self) -> &Description {
        &self.description
    }

    fn check(&self, options: &Options) -> Result<()> {
        self.options(options).map(drop)
    }

    fn open<'a>(&'a self, args: OpenArgs<'a>) -> BoxFuture<'a, Result<Arc<dyn OpenNode>>> {
        Box::pin(async move {
            let options = self.options(args.options)?;
            let driver = Null {
                size: AtomicU64::new(options.size.0),
                flags: if args.read_only { info::READ_ONLY } else { info::FAST_ZERO },
                read_zeroes: options.read_zeroes,
                latency: Duration::from_nanos(options.latency_ns),
            };
            Ok(Arc::new(NullNode(Arc::new(Body { cookie: args.cookie, driver }))) as _)
        })
    }
}

/// An open node.
struct NullNode(Arc<Body<Null>>);

impl OpenNode for NullNode {
    fn instance(&self) -> Instance {
        Instance::new(self.0.clone(), &OPERATIONS)
    }

    fn info(&self, _: &[Info]) -> Info {
        let null = &self.0.driver;
        Info { size_bytes: null.size.load(Relaxed), flags: null.flags, ..Info::default() }
    }

    fn resize<'a>(&'a self, _: &'a [OpenChild], size_bytes: u64) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            range::check_size(size_bytes)?;
            self.0.driver.size.store(size_bytes, Relaxed);
            Ok(())
        })
    }
}

struct Null {
    size: AtomicU64,
    flags: u32,
    read_zeroes: bool,
    latency: Duration,
}

static OPERATIONS: OpTable<Null> = OpTable::new()
    .read(Null::read)
    .write(Null::write)
    .flush(Null::flush)
    .discard(Null::discard)
    .write_zeroes(Null::write_zeroes)
    .block_status(Null::block_status)
    .cache(Null::cache);

type Done = driveline_op::Result<()>;

impl Null {
    async fn read(&self, _: &mut Next<'_>, request: &ReadRequest<'_>) -> Done {
        range::inside(request.offset(), request.length(), self.size.load(Relaxed))?;
        if self.read_zeroes {
            request.zero(0..request.length());
        }
        self.wait().await
    }

    async fn write(&self, _: &mut Next<'_>, request: &WriteRequest<'_>) -> Done {
        range::inside(request.offset(), request.length(), self.size.load(Relaxed))?;
        self.wait().await
    }

    async fn flush(&self, _: &mut Next<'_>, _: &FlushRequest<'_>) -> Done {
        self.wait().await
    }

    async fn discard(&self, _: &mut Next<'_>, request: &DiscardRequest<'_>) -> Done {
        range::inside(request.offset(), request.length(), self.size.load(Relaxed))?;
        self.wait().await
    }

    async fn write_zeroes(&self, _: &mut Next<'_>, request: &WriteZeroesRequest<'_>) -> Done {
        range::inside(request.offset(), request.length(), self.size.load(Relaxed))?;
        self.wait().await
    }

    async fn block_status(&self, _: &mut Next<'_>, request: &BlockStatusRequest<'_>) -> Done {
        range::inside(request.offset(), request.length(), self.size.load(Relaxed))?;
        let flags = if self.read_zeroes { status::ZERO } else { status::DATA };
        request.answer(BlockStatus { flags, depth: 1, length: request.length(), ..BlockStatus::default() });
        self.wait().await
    }

    async fn cache(&self, _: &mut Next<'_>, _: &CacheRequest<'_>) -> Done {
        self.wait().await
    }

    #[inline]
    async fn wait(&self) -> Done {
        if !self.latency.is_zero() {
            driveline_engine::sleep(self.latency).await;
        }
        Ok(())
    }
}

//! Drivers for tests: `cow`, an image in memory with a backing; `bitmap-holder`, which does nothing; `pass`, a
//! filter that handles every operation; `fault`, which fails or holds what it is told to.

use super::sim::Sim;
use driveline_graph::{
    BoxFuture, ChildSpec, Description, Driver, DriverKind, OpenArgs, OpenChild, OpenNode, Options, Result,
    Role,
};
use driveline_jobs::Runtime;
use driveline_op::{
    BlockStatus, BlockStatusRequest, Body, DiscardRequest, Error, FlushRequest, Info, Instance, Next,
    OpTable, ReadRequest, WriteRequest, WriteZeroesRequest, status,
};
use parking_lot::Mutex;
use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

pub const CLUSTER: u64 = 4096;
type OpResult = driveline_op::Result<()>;

/// What all nodes of a world share: the scheduler, and the faults.
#[derive(Clone)]
pub struct World {
    pub sim: Sim,
    /// One write in so many fails, in `fault` nodes; 0: none.
    pub faults: Arc<AtomicU64>,
    /// Flushes fail, in `fault` nodes.
    pub flush_fault: Arc<AtomicBool>,
    /// A write takes so many milliseconds, in `fault` nodes.
    pub delay_ms: Arc<AtomicU64>,
    /// So many headers can be written, and then one cannot; 0: all can.
    pub header_fault: Arc<AtomicU64>,
}

impl World {
    pub fn new(sim: &Sim) -> Self {
        let (faults, flush_fault, delay_ms, header_fault) = Default::default();
        Self { sim: sim.clone(), faults, flush_fault, delay_ms, header_fault }
    }
}

/// Registers the drivers of a world.
pub fn register(graph: &driveline_graph::Graph, world: &World) {
    let driver = |name, kind, children: Vec<ChildSpec>, open: Open| {
        let mut description = Description::builtin(name, kind, "for tests");
        description.children = children;
        Arc::new(TestDriver { description, world: world.clone(), open })
    };
    let filtered = vec![ChildSpec::required("child", Role::Filtered)];
    let backing = vec![ChildSpec::optional("backing", Role::Backing)];
    graph.register(driver("cow", DriverKind::Format, backing, open_cow)).unwrap();
    graph
        .register(driver("bitmap-holder", DriverKind::Filter, filtered.clone(), |_, a| {
            filter(a, (), &HOLDER)
        }))
        .unwrap();
    graph
        .register(driver("pass", DriverKind::Filter, filtered.clone(), |w, a| filter(a, Pass(w), &PASS)))
        .unwrap();
    graph
        .register(driver("fault", DriverKind::Filter, filtered, |w, a| filter(a, Fault(w), &FAULT)))
        .unwrap();
}

type Open = fn(World, &OpenArgs<'_>) -> Arc<dyn OpenNode>;

struct TestDriver {
    description: Description,
    world: World,
    open: Open,
}

impl Driver for TestDriver {
    fn description(&self) -> &Description {
        &self.description
    }
    fn check(&self, _: &Options) -> Result<()> {
        Ok(())
    }
    fn open<'a>(&'a self, args: OpenArgs<'a>) -> BoxFuture<'a, Result<Arc<dyn OpenNode>>> {
        let node = (self.open)(self.world.clone(), &args);
        Box::pin(async move { Ok(node) })
    }
}

struct Filter(Instance);

fn filter<D: Send + Sync + 'static>(args: &OpenArgs<'_>, driver: D, table: &OpTable<D>) -> Arc<dyn OpenNode> {
    Arc::new(Filter(Instance::new(Arc::new(Body { cookie: args.cookie, driver }), table)))
}

impl OpenNode for Filter {
    fn instance(&self) -> Instance {
        self.0.clone()
    }
    fn info(&self, children: &[Info]) -> Info {
        children[0]
    }
}

static HOLDER: OpTable<()> = OpTable::new();

struct Pass(World);
static PASS: OpTable<Pass> = OpTable::new()
    .read(Pass::read)
    .write(Pass::write)
    .flush(Pass::flush)
    .discard(Pass::discard)
    .write_zeroes(Pass::write_zeroes)
    .block_status(Pass::block_status);

impl Pass {
    async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> OpResult {
        self.0.sim.maybe_yield().await;
        next.read(request).await
    }
    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> OpResult {
        self.0.sim.maybe_yield().await;
        next.write(request).await
    }
    async fn flush(&self, next: &mut Next<'_>, request: &FlushRequest<'_>) -> OpResult {
        next.flush(request).await
    }
    async fn discard(&self, next: &mut Next<'_>, request: &DiscardRequest<'_>) -> OpResult {
        next.discard(request).await
    }
    async fn write_zeroes(&self, next: &mut Next<'_>, request: &WriteZeroesRequest<'_>) -> OpResult {
        self.0.sim.maybe_yield().await;
        next.write_zeroes(request).await
    }
    async fn block_status(&self, next: &mut Next<'_>, request: &BlockStatusRequest<'_>) -> OpResult {
        next.block_status(request).await
    }
}

struct Fault(World);
static FAULT: OpTable<Fault> = OpTable::new().read(Fault::read).write(Fault::write).flush(Fault::flush);

impl Fault {
    fn strike(&self) -> OpResult {
        let one_in = self.0.faults.load(SeqCst);
        if one_in > 0 && self.0.sim.chance(one_in) { Err(Error::IO) } else { Ok(()) }
    }
    async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> OpResult {
        self.strike()?;
        next.read(request).await
    }
    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> OpResult {
        let delay = self.0.delay_ms.load(SeqCst);
        if delay > 0 {
            self.0.sim.sleep(Duration::from_millis(delay)).await;
        }
        self.strike()?;
        next.write(request).await
    }
}

impl Fault {
    async fn flush(&self, next: &mut Next<'_>, request: &FlushRequest<'_>) -> OpResult {
        if self.0.flush_fault.load(SeqCst) { Err(Error::IO) } else { next.flush(request).await }
    }
}

/// An image in memory: clusters of data or zeroes, the rest from the backing.
pub struct Cow {
    world: World,
    clusters: Mutex<BTreeMap<u64, Option<Vec<u8>>>>,
    size: AtomicU64,
    changing: async_lock::Mutex<()>,
    backing: Mutex<Option<(String, String)>>,
    read_only: AtomicBool,
}

struct CowNode(Arc<Body<Cow>>);

static COW: OpTable<Cow> = OpTable::new()
    .read(Cow::read)
    .write(Cow::write)
    .flush(Cow::flush)
    .discard(Cow::discard)
    .write_zeroes(Cow::write_zeroes)
    .block_status(Cow::block_status);

fn open_cow(world: World, args: &OpenArgs<'_>) -> Arc<dyn OpenNode> {
    let size = args.options.get("size").and_then(|size| size.as_u64()).unwrap_or(1 << 20);
    let mut clusters = BTreeMap::new();
    if let Some(every) = args.options.get("fill-every").and_then(|every| every.as_u64()) {
        let byte = args.options["fill-byte"].as_u64().unwrap() as u8;
        for at in (0..size / CLUSTER).filter(|at| at % every == 0) {
            clusters.insert(at, (at % (2 * every) == 0).then(|| vec![byte; CLUSTER as usize]));
        }
    }
    let driver = Cow {
        world,
        clusters: Mutex::new(clusters),
        size: AtomicU64::new(size),
        changing: Default::default(),
        backing: Default::default(),
        read_only: AtomicBool::new(args.read_only),
    };
    Arc::new(CowNode(Arc::new(Body { cookie: args.cookie, driver })))
}

impl OpenNode for CowNode {
    fn instance(&self) -> Instance {
        Instance::new(self.0.clone(), &COW)
    }
    fn info(&self, _: &[Info]) -> Info {
        let size_bytes = self.0.driver.size.load(SeqCst);
        Info { size_bytes, cluster_bytes: CLUSTER as u32, ..Info::default() }
    }
    fn filename(&self) -> Option<std::path::PathBuf> {
        Some(format!("/image-{}", self.0.cookie).into())
    }
    fn resize<'a>(&'a self, _: &'a [OpenChild], size: u64) -> BoxFuture<'a, Result<()>> {
        self.0.driver.clusters.lock().retain(|at, _| at * CLUSTER < size);
        self.0.driver.size.store(size, SeqCst);
        Box::pin(async { Ok(()) })
    }
    fn set_read_only<'a>(&'a self, _: &'a [OpenChild], read_only: bool) -> BoxFuture<'a, Result<()>> {
        self.0.driver.read_only.store(read_only, SeqCst);
        Box::pin(async { Ok(()) })
    }
    fn backing_file(&self) -> Option<(String, String)> {
        self.0.driver.backing.lock().clone()
    }
    fn set_backing_file<'a>(
        &'a self,
        _: &'a [OpenChild],
        backing: Option<(&'a str, &'a str)>,
    ) -> BoxFuture<'a, Result<()>> {
        let before = self.0.driver.world.header_fault.load(SeqCst);
        self.0.driver.world.header_fault.store(before.saturating_sub(1), SeqCst);
        if before == 1 {
            return Box::pin(async { Err(driveline_graph::Error::io(5, "writing the header")) });
        }
        *self.0.driver.backing.lock() = backing.map(|(file, format)| (file.to_owned(), format.to_owned()));
        Box::pin(async { Ok(()) })
    }
}

impl Cow {
    fn pieces(range: Range<u64>) -> impl Iterator<Item = (u64, Range<u64>)> {
        let mut at = range.start;
        std::iter::from_fn(move || {
            (at < range.end).then(|| {
                let end = range.end.min((at / CLUSTER + 1) * CLUSTER);
                let piece = (at / CLUSTER, at..end);
                at = end;
                piece
            })
        })
    }

    /// As a format loads a table, under a lock that others wait for.
    async fn look_up(&self, cluster: u64) -> Option<Option<Vec<u8>>> {
        let _changing = self.changing.lock().await;
        self.world.sim.maybe_yield().await;
        self.clusters.lock().get(&cluster).cloned()
    }

    async fn below(&self, next: &mut Next<'_>, range: Range<u64>) -> driveline_op::Result<Vec<u8>> {
        let mut data = vec![0; (range.end - range.start) as usize];
        if next.children() > 0 {
            let size = next.info(0).size_bytes;
            let end = range.end.min(size).max(range.start);
            let there = (end - range.start) as usize;
            if there > 0 {
                next.read_at(0, range.start, &mut data[..there]).await?;
            }
        }
        Ok(data)
    }

    async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> OpResult {
        for (cluster, piece) in Self::pieces(request.range()) {
            let here = self.look_up(cluster).await;
            let at = (piece.start % CLUSTER) as usize;
            let length = (piece.end - piece.start) as usize;
            let data = match here {
                Some(Some(data)) => data[at..at + length].to_vec(),
                Some(None) => vec![0; length],
                None => self.below(next, piece.clone()).await?,
            };
            request.fill(piece.start - request.offset(), &data);
        }
        Ok(())
    }

    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> OpResult {
        assert!(!self.read_only.load(SeqCst), "a read-only image gets no writes");
        for (cluster, piece) in Self::pieces(request.range()) {
            self.world.sim.maybe_yield().await;
            let mut data = vec![0; (piece.end - piece.start) as usize];
            request.copy_to(piece.start - request.offset(), &mut data);
            self.store(next, cluster, piece, &data).await?;
        }
        Ok(())
    }

    async fn store(&self, next: &mut Next<'_>, cluster: u64, piece: Range<u64>, data: &[u8]) -> OpResult {
        let _changing = self.changing.lock().await;
        let start = cluster * CLUSTER;
        let here = self.clusters.lock().get(&cluster).cloned();
        let mut whole = match here {
            Some(Some(data)) => data,
            Some(None) => vec![0; CLUSTER as usize],
            None => self.below(next, start..start + CLUSTER).await?,
        };
        self.world.sim.maybe_yield().await;
        let at = (piece.start - start) as usize;
        whole[at..at + data.len()].copy_from_slice(data);
        self.clusters.lock().insert(cluster, Some(whole));
        Ok(())
    }

    async fn write_zeroes(&self, next: &mut Next<'_>, request: &WriteZeroesRequest<'_>) -> OpResult {
        for (cluster, piece) in Self::pieces(request.range()) {
            self.world.sim.maybe_yield().await;
            if piece.end - piece.start == CLUSTER {
                let _changing = self.changing.lock().await;
                self.clusters.lock().insert(cluster, None);
            } else {
                let zeroes = vec![0; (piece.end - piece.start) as usize];
                self.store(next, cluster, piece, &zeroes).await?;
            }
        }
        Ok(())
    }

    /// What is given up reads as zeroes.
    async fn discard(&self, _: &mut Next<'_>, request: &DiscardRequest<'_>) -> OpResult {
        for (cluster, piece) in Self::pieces(request.range()) {
            self.world.sim.maybe_yield().await;
            if piece.end - piece.start == CLUSTER {
                let _changing = self.changing.lock().await;
                self.clusters.lock().insert(cluster, None);
            }
        }
        Ok(())
    }

    async fn flush(&self, _: &mut Next<'_>, _: &FlushRequest<'_>) -> OpResult {
        Ok(())
    }

    async fn block_status(&self, next: &mut Next<'_>, request: &BlockStatusRequest<'_>) -> OpResult {
        let (cluster, piece) = Self::pieces(request.range()).next().expect("not empty");
        let length = piece.end - piece.start;
        let found = match self.look_up(cluster).await.as_ref().map(Option::is_some) {
            Some(true) => BlockStatus { flags: status::DATA, depth: 1, length, ..Default::default() },
            Some(false) => BlockStatus { flags: status::ZERO, depth: 1, length, ..Default::default() },
            None if next.children() > 0 && piece.start < next.info(0).size_bytes => {
                let end = piece.end.min(next.info(0).size_bytes);
                let found = next.status_at(0, piece.start..end).await?;
                BlockStatus { depth: if found.depth > 0 { found.depth + 1 } else { 0 }, ..found }
            }
            None => {
                let depth = if next.children() > 0 { 2 } else { 0 };
                BlockStatus { flags: status::ZERO, depth, length, ..Default::default() }
            }
        };
        request.answer(found);
        Ok(())
    }
}

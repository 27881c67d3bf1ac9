//! A graph for tests of plugins: filters on a leaf that remembers what it was asked.

use driveline_graph::{
    BoxFuture, Description, Driver, DriverKind, Event, Graph, GraphOptions, OpenArgs, OpenNode, Options,
    Result, Root, RootOptions,
};
use driveline_loader::{HostServices, host};
use driveline_op::{
    BlockStatus, BlockStatusRequest, Body, CacheRequest, DiscardRequest, FlushRequest, Info, Instance, Next,
    OpTable, ReadRequest, WriteRequest, WriteZeroesRequest, flag, status,
};
use futures::executor::block_on;
use serde_json::{Value, json};
use std::{
    path::Path,
    sync::{Arc, Mutex},
    task::{Poll, Waker},
};

pub(crate) const SIZE: u64 = 1 << 20;

type OpResult = driveline_op::Result<()>;

/// What a leaf was asked, in order.
type Seen = Arc<Mutex<Vec<String>>>;

struct LeafDriver(Description, Seen);

struct Leaf {
    data: Mutex<Vec<u8>>,
    seen: Seen,
}

static LEAF: OpTable<Leaf> = OpTable::new()
    .read(Leaf::read)
    .write(Leaf::write)
    .flush(Leaf::flush)
    .discard(Leaf::discard)
    .write_zeroes(Leaf::write_zeroes)
    .block_status(Leaf::block_status)
    .cache(Leaf::cache);

impl Leaf {
    fn saw(&self, what: String) {
        self.seen.lock().unwrap().push(what);
    }

    async fn read(&self, _: &mut Next<'_>, request: &ReadRequest<'_>) -> OpResult {
        // It answers on the second poll, so that callers have a child at work.
        let mut first = true;
        std::future::poll_fn(|cx| {
            cx.waker().wake_by_ref();
            if std::mem::take(&mut first) { Poll::Pending } else { Poll::Ready(()) }
        })
        .await;
        self.saw(format!("read {}+{}", request.offset(), request.length()));
        request.fill(0, &self.data.lock().unwrap()[request.offset() as usize..][..request.length() as usize]);
        Ok(())
    }

    async fn write(&self, _: &mut Next<'_>, request: &WriteRequest<'_>) -> OpResult {
        let names = [(flag::FUA, " fua"), (flag::COMPRESSED, " compressed")];
        let flags: String =
            names.iter().filter(|(bit, _)| request.flags() & bit != 0).map(|(_, n)| *n).collect();
        self.saw(format!("write {}+{}{flags}", request.offset(), request.length()));
        request.copy_to(
            0,
            &mut self.data.lock().unwrap()[request.offset() as usize..][..request.length() as usize],
        );
        Ok(())
    }

    async fn flush(&self, _: &mut Next<'_>, _: &FlushRequest<'_>) -> OpResult {
        self.saw("flush".into());
        Ok(())
    }

    async fn discard(&self, _: &mut Next<'_>, request: &DiscardRequest<'_>) -> OpResult {
        self.saw(format!("discard {}+{}", request.offset(), request.length()));
        Ok(())
    }

    async fn write_zeroes(&self, _: &mut Next<'_>, request: &WriteZeroesRequest<'_>) -> OpResult {
        self.saw(format!("write_zeroes {}+{}", request.offset(), request.length()));
        self.data.lock().unwrap()[request.offset() as usize..][..request.length() as usize].fill(0);
        Ok(())
    }

    async fn block_status(&self, _: &mut Next<'_>, request: &BlockStatusRequest<'_>) -> OpResult {
        self.saw(format!("block_status {}+{}", request.offset(), request.length()));
        let flags = status::ZERO | status::DATA;
        request.answer(BlockStatus { flags, depth: 1, length: request.length(), ..BlockStatus::default() });
        Ok(())
    }

    async fn cache(&self, _: &mut Next<'_>, request: &CacheRequest<'_>) -> OpResult {
        self.saw(format!("cache {}+{}", request.offset(), request.length()));
        Ok(())
    }
}

struct OpenLeaf(Arc<Body<Leaf>>);

impl OpenNode for OpenLeaf {
    fn instance(&self) -> Instance {
        Instance::new(self.0.clone(), &LEAF)
    }

    fn info(&self, _: &[Info]) -> Info {
        Info { size_bytes: SIZE, ..Info::default() }
    }
}

impl Driver for LeafDriver {
    fn description(&self) -> &Description {
        &self.0
    }

    fn check(&self, _: &Options) -> Result<()> {
        Ok(())
    }

    fn open<'a>(&'a self, args: OpenArgs<'a>) -> BoxFuture<'a, Result<Arc<dyn OpenNode>>> {
        let leaf = Leaf { data: Mutex::new(vec![0; SIZE as usize]), seen: self.1.clone() };
        let body = Arc::new(Body { cookie: args.cookie, driver: leaf });
        Box::pin(async move { Ok(Arc::new(OpenLeaf(body)) as Arc<dyn OpenNode>) })
    }
}

/// The services of this process, as a program would install its own.
#[derive(Default)]
struct Services {
    timers: host::ThreadTimers,
}

impl HostServices for Services {
    fn now_ns(&self) -> u64 {
        self.timers.now_ns()
    }

    fn timer_start(&self, deadline_ns: u64, waker: Waker) -> u64 {
        self.timers.timer_start(deadline_ns, waker)
    }

    fn timer_poll(&self, timer: u64, waker: &Waker) -> bool {
        self.timers.timer_poll(timer, waker)
    }

    fn timer_drop(&self, timer: u64) {
        self.timers.timer_drop(timer);
    }

    fn node_failed(&self, cookie: u64, message: &str) {
        driveline_graph::node_failed(cookie, message);
    }
}

/// A graph with a leaf `disk`, and filters on it.
pub(crate) struct World {
    pub(crate) graph: Graph,
    seen: Seen,
    failures: Arc<Mutex<Vec<String>>>,
}

impl World {
    /// A graph that knows the filters of these libraries.
    pub(crate) fn new(libraries: &[&Path]) -> Self {
        host::install(Arc::new(Services::default()));
        let (graph, seen) = (Graph::new(GraphOptions::default()), Seen::default());
        let description = Description::builtin("leaf", DriverKind::Protocol, "remembers what it was asked");
        graph.register(Arc::new(LeafDriver(description, seen.clone()))).unwrap();
        for library in libraries {
            let plugin = driveline_loader::load(library).unwrap_or_else(|error| panic!("{error}"));
            for driver in plugin.drivers() {
                graph.register(driver.clone()).unwrap();
            }
        }
        let failures = Arc::new(Mutex::new(Vec::new()));
        let told = failures.clone();
        graph.on_event(move |event| {
            if let Event::NodeFailed { node, message } = event {
                told.lock().unwrap().push(format!("{node}: {message}"));
            }
        });
        let world = Self { graph, seen, failures };
        world.add(json!({ "driver": "leaf", "node-name": "disk" })).unwrap();
        world
    }

    /// Adds a node.
    pub(crate) fn add(&self, definition: Value) -> Result<()> {
        block_on(async {
            let mut change = self.graph.change().await;
            let definition = self.graph.parse(definition.as_object().unwrap().clone(), &[])?;
            change.add_node(definition).await?;
            change.commit().await.map(drop)
        })
    }

    /// Adds a node `filter` of this driver above `disk`, and opens a root on it.
    pub(crate) fn filter(&self, driver: &str, mut options: Value) -> Root {
        options["driver"] = driver.into();
        options["node-name"] = "filter".into();
        options["child"] = "disk".into();
        self.add(options).unwrap_or_else(|error| panic!("{error}"));
        self.root("filter")
    }

    /// A root on a node.
    pub(crate) fn root(&self, node: &str) -> Root {
        block_on(self.graph.open_root(node, RootOptions::writer("a test")))
            .unwrap_or_else(|error| panic!("{error}"))
    }

    /// What the leaf was asked since the last call.
    pub(crate) fn seen(&self) -> Vec<String> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }

    /// The nodes that failed, and how.
    pub(crate) fn failures(&self) -> Vec<String> {
        self.failures.lock().unwrap().clone()
    }
}

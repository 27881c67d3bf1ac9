//! A disk that does not answer: what goes on beside it, and what waits for it.

use driveline_drivers::{CopyBeforeWriteDriver, MemoryDriver};
use driveline_engine::{Config, Engine};
use driveline_graph::{
    BoxFuture, Description, Driver, DriverKind, Graph, GraphOptions, OpenArgs, OpenNode, Options, Result,
    Root, RootOptions,
};
use driveline_op::{Body, Info, Instance, Next, OpTable, ReadRequest, WriteRequest};
use futures::{
    FutureExt,
    channel::oneshot,
    future::{Either, Shared, select},
};
use parking_lot::{Condvar, Mutex};
use serde_json::{Value, json};
use std::{
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

const SIZE: u64 = 1 << 20;
/// Longer than anything that does not hang, on a loaded machine too.
const LONG: Duration = Duration::from_secs(20);

/// A disk whose writes wait until it is told to answer. As with a kernel that has somebody's buffer, to give a write up is to
/// wait for it, and whoever does that holds its thread up.
#[derive(Clone)]
struct Stuck {
    answers: Shared<oneshot::Receiver<()>>,
    given_up: Arc<(Mutex<bool>, Condvar)>,
}

/// Makes it answer.
struct Cure(oneshot::Sender<()>);

impl Stuck {
    fn new() -> (Self, Cure) {
        let (tell, answers) = oneshot::channel();
        (Self { answers: answers.shared(), given_up: Arc::default() }, Cure(tell))
    }

    async fn read(&self, _: &mut Next<'_>, request: &ReadRequest<'_>) -> driveline_op::Result<()> {
        request.zero(0..request.length());
        Ok(())
    }

    async fn write(&self, _: &mut Next<'_>, _: &WriteRequest<'_>) -> driveline_op::Result<()> {
        struct InKernel<'a>(&'a Stuck, bool);
        impl Drop for InKernel<'_> {
            fn drop(&mut self) {
                if !self.1 {
                    let (given_up, told) = &*self.0.given_up;
                    *given_up.lock() = true;
                    told.wait_for(&mut given_up.lock(), LONG);
                }
            }
        }
        let mut kernel = InKernel(self, false);
        let _ = self.answers.clone().await;
        kernel.1 = true;
        Ok(())
    }
}

static STUCK: OpTable<Stuck> = OpTable::new().read(Stuck::read).write(Stuck::write);

struct StuckDriver(Description, Stuck);

struct StuckNode(Arc<Body<Stuck>>);

impl Driver for StuckDriver {
    fn description(&self) -> &Description {
        &self.0
    }
    fn check(&self, _: &Options) -> Result<()> {
        Ok(())
    }
    fn open<'a>(&'a self, args: OpenArgs<'a>) -> BoxFuture<'a, Result<Arc<dyn OpenNode>>> {
        let node = StuckNode(Arc::new(Body { cookie: args.cookie, driver: self.1.clone() }));
        Box::pin(async move { Ok(Arc::new(node) as _) })
    }
}

impl OpenNode for StuckNode {
    fn instance(&self) -> Instance {
        Instance::new(self.0.clone(), &STUCK)
    }
    fn info(&self, _: &[Info]) -> Info {
        Info { size_bytes: SIZE, ..Info::default() }
    }
}

async fn add(graph: &Graph, node: Value) {
    let mut change = graph.change().await;
    let definition = graph.parse(node.as_object().unwrap().clone(), &[]).unwrap();
    change.add_node(definition).await.unwrap();
    change.commit().await.unwrap();
}

/// A drive whose old data goes to a disk that hangs.
async fn copying_to(stuck: Stuck, on_error: &str) -> (Graph, Root) {
    let graph = Graph::new(GraphOptions::default());
    graph.register(Arc::new(MemoryDriver::default())).unwrap();
    graph.register(Arc::new(CopyBeforeWriteDriver::default())).unwrap();
    let description = Description::builtin("stuck", DriverKind::Protocol, "for tests");
    graph.register(Arc::new(StuckDriver(description, stuck))).unwrap();
    add(&graph, json!({ "driver": "memory", "node-name": "disk", "size": SIZE })).await;
    add(&graph, json!({ "driver": "stuck", "node-name": "target" })).await;
    let cbw = json!({
        "driver": "copy-before-write", "node-name": "cbw", "file": "disk", "target": "target",
        "cbw-timeout": 1, "on-cbw-error": on_error,
    });
    add(&graph, cbw).await;
    let root = graph.open_root("disk", RootOptions::writer("before")).await.unwrap();
    root.write(0, &[3; 65536], 0).await.unwrap();
    root.close().await.unwrap();
    let root = graph.open_root("cbw", RootOptions::writer("a guest")).await.unwrap();
    (graph, root)
}

async fn in_time<T>(future: impl Future<Output = T>) -> T {
    match select(pin!(future), pin!(driveline_engine::sleep(LONG))).await {
        Either::Left((output, _)) => output,
        Either::Right(_) => panic!("it hangs"),
    }
}

/// `cbw-timeout` was over, and the guest's write hung all the same: the copy was dropped, and to drop what a hanging disk was
/// asked for is to wait for that disk.
#[test]
fn a_write_is_answered_in_time_though_its_copy_hangs_and_a_drain_waits_for_the_copy() {
    for on_error in ["break-guest-write", "break-snapshot"] {
        let (stuck, cure) = Stuck::new();
        let engine = Engine::start(Config { threads: 1, ..Config::default() }).unwrap();
        let given_up = stuck.given_up.clone();
        engine.block_on_local(|| async move {
            let (graph, root) = copying_to(stuck, on_error).await;
            let begun = Instant::now();
            let written = in_time(root.write(0, &[4; 4096], 0)).await;
            assert!(begun.elapsed() < LONG, "the write waited for the disk");
            assert!(begun.elapsed() >= Duration::from_secs(1), "the copy was given its time");
            match on_error {
                "break-snapshot" => written.unwrap(),
                _ => assert_eq!(written.unwrap_err().errno_code(), 110),
            }
            let closing = graph.clone();
            let mut closed = driveline_engine::spawn_local(async move {
                root.close().await.unwrap();
                closing.close().await
            });
            let soon = driveline_engine::sleep(Duration::from_millis(200));
            let waits = matches!(select(&mut closed, pin!(soon)).await, Either::Right(_));
            assert!(waits, "the copy still uses its target");
            cure.0.send(()).unwrap();
            in_time(closed).await.unwrap().unwrap();
        });
        assert!(!*given_up.0.lock(), "a copy under way is not given up");
    }
}

/// The one that takes long has the range, and others that want it waited for that.
#[test]
fn once_the_point_in_time_is_lost_nobody_waits_for_the_copy_that_hangs() {
    let (stuck, cure) = Stuck::new();
    let engine = Engine::start(Config { threads: 1, ..Config::default() }).unwrap();
    engine.block_on_local(|| async move {
        let (graph, root) = copying_to(stuck, "break-snapshot").await;
        let mut change = graph.change().await;
        let past = change.attach_to_past("cbw", &RootOptions::reader("a backup")).unwrap();
        change.commit().await.unwrap();
        let first = root.clone();
        let first = driveline_engine::spawn_local(async move { first.write(0, &[4; 4096], 0).await });
        driveline_engine::yield_now().await;
        let reader = past.clone();
        let reader = driveline_engine::spawn_local(async move { reader.read(0..4096).await });
        in_time(first).await.unwrap().unwrap();
        assert_eq!(in_time(reader).await.unwrap().unwrap_err().errno_code(), libc::EIO);
        in_time(root.write(4096, &[5; 4096], 0)).await.unwrap();
        cure.0.send(()).unwrap();
        in_time(async { (past.close().await.unwrap(), root.close().await.unwrap()) }).await;
        in_time(graph.close()).await.unwrap();
    });
}

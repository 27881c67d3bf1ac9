//! What a filter costs a request: a 4 KiB read through pass-through plugins, as nanoseconds for each.
//!
//! The plugins are four copies of one library, in turns, so each hop crosses from one library to another. A read is
//! answered at once (`inline`), or when it is polled again (`later`). A filter that leaves reads out is not
//! called at all (`absent`), which must show as 0. One with an event that nobody listens to is `silent`.
//!
//! The plugins are built with one codegen unit. With cargo's sixteen a filter's `async fn` may land apart from the
//! vtable that polls it; a hop is a frame deeper then, and 40 hops cost twice as much each.

#[path = "../../../tests/plugins/sets.rs"]
#[allow(dead_code)] // the tests use more of it
mod sets;

use criterion::{BenchmarkId, Criterion};
use driveline_graph::{BoxFuture, Driver, OpenArgs, OpenChild, OpenNode, Options};
use driveline_loader::{Plugin, load};
use driveline_op::{
    Ask, Body, Buffer, Call, Edge, Info, Instance, Next, OpTable, ReadRequest, Result, Route, Target, op,
};
use std::{
    fs,
    future::Future,
    hint::black_box,
    path::Path,
    pin::pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Instant,
};

const HOPS: [usize; 4] = [0, 1, 10, 40];

/// A leaf that does nothing, at once or later.
struct Null {
    later: bool,
}

static NULL: OpTable<Null> = OpTable::new().read(Null::read);

impl Null {
    async fn read(&self, _: &mut Next<'_>, _: &ReadRequest<'_>) -> Result<()> {
        let mut wait = self.later;
        std::future::poll_fn(|_| if std::mem::take(&mut wait) { Poll::Pending } else { Poll::Ready(()) })
            .await;
        Ok(())
    }
}

struct OpenNull(Arc<Body<Null>>);

impl OpenNode for OpenNull {
    fn instance(&self) -> Instance {
        Instance::new(self.0.clone(), &NULL)
    }

    fn info(&self, _: &[Info]) -> Info {
        Info { size_bytes: 1 << 20, ..Info::default() }
    }
}

fn ready<T>(mut future: BoxFuture<'_, T>) -> T {
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => output,
        Poll::Pending => panic!("opening a filter does not wait"),
    }
}

/// So many filters of that name on a leaf.
fn chain(plugins: &[&'static Plugin], filter: &str, hops: usize, later: bool) -> Edge {
    let mut node: Arc<dyn OpenNode> =
        Arc::new(OpenNull(Arc::new(Body { cookie: 0, driver: Null { later } })));
    let info = node.info(&[]);
    let mut edge = Edge::to(info, &Target::new(node.instance(), vec![]));
    for hop in 0..hops {
        let drivers = plugins[hop % plugins.len()].drivers();
        let driver = drivers.iter().find(|driver| driver.name() == filter).expect("the set has it");
        let child = OpenChild {
            name: "child".into(),
            edge: edge.clone(),
            unfiltered: node.clone(),
            node,
            node_name: "below".into(),
        };
        let options = Options::new();
        let args = OpenArgs {
            node_name: "hop",
            cookie: 0,
            options: &options,
            children: vec![child],
            read_only: false,
            directory: Path::new("/"),
        };
        node = ready(driver.open(args)).expect("it opens");
        let target = Target::new(node.instance(), vec![edge.clone()]);
        let below = edge;
        edge = Edge::new(info, |op| match target.instance().has(op) {
            true => Route::To(&target),
            false => Route::As(&below),
        });
    }
    edge
}

fn read(edge: &Edge, buffer: &mut Buffer) {
    let ask = Ask { op: op::READ, ..Ask::default() };
    let mut call = pin!(Call::new(edge, ask, std::mem::take(buffer)));
    let cx = &mut Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(answer) = call.as_mut().poll(cx) {
            assert!(answer.result.is_ok());
            *buffer = black_box(answer.buffer);
            return;
        }
    }
}

/// Nanoseconds for each read, by the fastest of several runs: others on the machine only ever make it slower.
fn measure(edge: &Edge) -> f64 {
    const READS: u32 = 5_000;
    let mut buffer = Buffer::new(4096);
    let runs = (0..101).map(|_| {
        let begun = Instant::now();
        (0..READS).for_each(|_| read(black_box(edge), &mut buffer));
        begun.elapsed()
    });
    runs.min().unwrap_or_default().as_nanos() as f64 / f64::from(READS)
}

fn main() {
    let library = sets::file(&sets::set("current", sets::Profile::Release), "set");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let plugins: Vec<&'static Plugin> = (0..4)
        .map(|copy| {
            let path = folder.path().join(format!("{copy}.so"));
            fs::copy(&library, &path).expect("it can be copied");
            load(&path).unwrap_or_else(|error| panic!("{error}"))
        })
        .collect();
    let cases = [
        ("inline", "passthrough", false),
        ("later", "passthrough", true),
        ("silent", "silent", false),
        ("absent", "nothing", false),
    ];

    let mut criterion = Criterion::default().configure_from_args();
    for (case, filter, later) in cases {
        let mut group = criterion.benchmark_group(format!("hop/{case}"));
        for hops in HOPS {
            let (edge, mut buffer) = (chain(&plugins, filter, hops, later), Buffer::new(4096));
            let id = BenchmarkId::from_parameter(hops);
            group.bench_function(id, |bench| bench.iter(|| read(black_box(&edge), &mut buffer)));
        }
        group.finish();
    }
    criterion.final_summary();

    println!("\nns for each filter on the way of a read (target: 25; absent: 0)");
    for (case, filter, later) in cases {
        let times = HOPS.map(|hops| measure(&chain(&plugins, filter, hops, later)));
        print!("{case:8} base {:6.1}", times[0]);
        for (hops, time) in HOPS.iter().zip(times).skip(1) {
            print!("   {hops:2} hops {:5.1}", (time - times[0]) / *hops as f64);
        }
        println!();
    }
}

#![allow(missing_docs)] // what criterion's macros make
//! What a request costs on its way through the graph to a driver that does nothing.

use criterion::{Criterion, criterion_group, criterion_main};
use driveline_graph::*;
use driveline_op::{Ask, Body, Buffer, Info, Instance, Next, OpTable, ReadRequest, WriteRequest, op};
use futures::FutureExt;
use std::sync::Arc;

struct Null;
static NULL: OpTable<Null> = OpTable::new().read(Null::read).write(Null::write);

impl Null {
    async fn read(&self, _: &mut Next<'_>, _: &ReadRequest<'_>) -> driveline_op::Result<()> {
        Ok(())
    }
    async fn write(&self, _: &mut Next<'_>, _: &WriteRequest<'_>) -> driveline_op::Result<()> {
        Ok(())
    }
}

struct Pass;
static PASS: OpTable<Pass> = OpTable::new().read(Pass::read).write(Pass::write);

impl Pass {
    async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> driveline_op::Result<()> {
        next.read(request).await
    }
    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> driveline_op::Result<()> {
        next.write(request).await
    }
}

static NOTHING: OpTable<()> = OpTable::new();

struct Open(Instance, Option<Info>);

impl OpenNode for Open {
    fn instance(&self) -> Instance {
        self.0.clone()
    }
    fn info(&self, children: &[Info]) -> Info {
        self.1.unwrap_or_else(|| children[0])
    }
}

struct Kind0(Description, fn(u64) -> Open);

impl Driver for Kind0 {
    fn description(&self) -> &Description {
        &self.0
    }
    fn check(&self, _: &Options) -> Result<()> {
        Ok(())
    }
    fn open<'a>(&'a self, args: OpenArgs<'a>) -> BoxFuture<'a, Result<Arc<dyn OpenNode>>> {
        let open = self.1(args.cookie);
        Box::pin(async move { Ok(Arc::new(open) as Arc<dyn OpenNode>) })
    }
}

fn graph(filter: &'static str, count: usize, bitmap: bool) -> Root {
    futures::executor::block_on(async {
        let graph = Graph::new(GraphOptions::default());
        let null = Description::builtin("null", DriverKind::Protocol, "");
        graph
            .register(Arc::new(Kind0(null, |cookie| {
                let body = Arc::new(Body { cookie, driver: Null });
                Open(Instance::new(body, &NULL), Some(Info { size_bytes: 1 << 40, ..Info::default() }))
            })))
            .unwrap();
        for (name, open) in [
            (
                "pass",
                (|cookie| Open(Instance::new(Arc::new(Body { cookie, driver: Pass }), &PASS), None))
                    as fn(u64) -> Open,
            ),
            ("nothing", |cookie| Open(Instance::new(Arc::new(Body { cookie, driver: () }), &NOTHING), None)),
        ] {
            let mut description = Description::builtin(name, DriverKind::Filter, "");
            description.children = vec![ChildSpec::required("child", Role::Filtered)];
            graph.register(Arc::new(Kind0(description, open))).unwrap();
        }
        let object = |value: serde_json::Value| value.as_object().unwrap().clone();
        let mut change = graph.change().await;
        let disk =
            graph.parse(object(serde_json::json!({ "driver": "null", "node-name": "disk" })), &[]).unwrap();
        change.add_node(disk).await.unwrap();
        change.set_drive("vda", "disk").unwrap();
        for _ in 0..count {
            change.insert_filter(object(serde_json::json!({ "driver": filter })), "vda").await.unwrap();
        }
        if bitmap {
            change.add_bitmap("vda", NewBitmap::named("daily")).unwrap();
        }
        change.commit().await.unwrap();
        graph.open_root("vda", RootOptions::writer("bench")).await.unwrap()
    })
}

fn requests(c: &mut Criterion) {
    let mut group = c.benchmark_group("request");
    let cases = [
        ("null", "pass", 0, false),
        ("null, bitmap", "pass", 0, true),
        ("1 filter that does nothing", "nothing", 1, false),
        ("40 filters that do nothing", "nothing", 40, false),
        ("1 filter that passes on", "pass", 1, false),
        ("10 filters that pass on", "pass", 10, false),
        ("40 filters that pass on", "pass", 40, false),
    ];
    for (name, filter, count, bitmap) in cases {
        let root = graph(filter, count, bitmap);
        let mut buffer = Some(Buffer::new(4096));
        let mut at = 0u64;
        group.bench_function(name, |b| {
            b.iter(|| {
                at = (at + 4096) & ((1 << 30) - 1);
                let ask = Ask { op: op::WRITE, offset: at, ..Ask::default() };
                let answer = root.submit(ask, buffer.take().unwrap()).now_or_never().expect("nothing waits");
                buffer = Some(answer.buffer);
            });
        });
    }
}

criterion_group!(benches, requests);
criterion_main!(benches);

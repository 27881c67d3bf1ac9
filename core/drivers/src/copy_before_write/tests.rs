use super::{CopyBeforeWrite, CopyBeforeWriteDriver, CopyingFilter, Settings};
use crate::{
    MemoryDriver,
    conformance::{OpenNodeArgs, open_node, options_of},
};
use driveline_bitmap::Granularity;
use driveline_graph::{
    BoxFuture, Description, Driver, DriverKind, Graph, GraphOptions, OpenArgs, OpenNode, Options, RootOptions,
};
use driveline_op::{
    BlockStatus, BlockStatusRequest, Body, Error, Info, Instance, Next, OpTable, ReadRequest, WriteRequest,
    flag, status,
};
use futures::executor::block_on;
use serde_json::json;
use std::sync::Arc;

#[test]
fn the_options_that_are_listed_are_those_that_are_accepted() {
    let samples = json!({
        "bitmap": { "node": "active", "name": "daily" },
        "on-cbw-error": "break-snapshot",
        "cbw-timeout": 45,
        "min-cluster-size": "1MiB",
    });
    options_of(&CopyBeforeWriteDriver::default(), samples);
}

#[test]
fn a_cluster_that_can_be_none_is_refused_before_anything_is_opened() {
    let driver = CopyBeforeWriteDriver::default();
    for bytes in [1000, 3 << 20, 1 << 31] {
        let options = json!({ "min-cluster-size": bytes });
        let error = driver.check(options.as_object().unwrap()).unwrap_err();
        assert_eq!(error.option(), Some("min-cluster-size"), "{error}");
        let settings = Settings { cluster_bytes_min: bytes, ..Settings::default() };
        assert!(CopyingFilter::new(settings).is_err());
    }
}

#[test]
fn a_reopen_keeps_the_point_in_time_or_is_refused() {
    block_on(async {
        let memory = MemoryDriver::default();
        let size = || json!({ "size": "1MiB" });
        let target = OpenNodeArgs { name: "target", ..OpenNodeArgs::default() };
        let children = vec![
            open_node(&memory, size(), vec![]).await.unwrap(),
            target.open(&memory, size(), vec![]).await.unwrap(),
        ];
        let driver = CopyBeforeWriteDriver::default();
        let node = open_node(&driver, json!({}), children.clone()).await.unwrap().node;
        let (before, other) = (json!({}), json!({ "cbw-timeout": 1 }));
        for (options, kept) in [(&before, true), (&other, false)] {
            let args = OpenArgs {
                node_name: "cbw",
                cookie: 0,
                options: options.as_object().unwrap(),
                children: children.clone(),
                read_only: false,
                directory: std::path::Path::new("."),
            };
            let reopened = driver.reopen(&node, before.as_object().unwrap(), args).await;
            match reopened {
                Ok(same) => assert!(kept && std::sync::Arc::ptr_eq(&same.open, &node) && !same.close_old),
                Err(error) => assert!(!kept && error.to_string().contains("cbw-timeout"), "{error}"),
            }
        }
    });
}

/// Clusters are as long as the user wants them, and each copy in flight has one in memory: 64 of 32 MiB took 2 GiB.
#[test]
fn long_clusters_do_not_take_more_memory_than_short_ones() {
    for (cluster, copies) in [(64 << 10, 512), (32 << 20, 4), (1 << 30, 1)] {
        let granularity = Granularity::new(cluster).unwrap();
        let state = CopyBeforeWrite::new(0, Settings::default(), granularity, 4 << 30, 0, None);
        let held: Vec<_> = std::iter::from_fn(|| state.room.try_acquire()).take(1000).collect();
        assert_eq!(held.len(), copies, "of {cluster} bytes each");
        state.give_buffer(state.take_buffer(cluster.min(4 << 20)));
        let kept: usize = state.buffers.lock().iter().map(|buffer| buffer.len()).sum();
        assert_eq!(kept > 0, cluster <= 2 << 20);
    }
}

/// A mebibyte of clusters of 64 KiB, each with 4096 bytes of data in its middle. It is a file system's: what is around them cannot be read.
struct Holes(Description);

const DATA: u64 = 16 << 10;

#[derive(Debug)]
struct Clusters;

static CLUSTERS: OpTable<Clusters> =
    OpTable::new().read(Clusters::read).write(Clusters::write).block_status(Clusters::block_status);

impl Clusters {
    async fn read(&self, _: &mut Next<'_>, request: &ReadRequest<'_>) -> driveline_op::Result<()> {
        if request.offset() % 65536 != DATA || request.length() != 4096 {
            return Err(Error::IO);
        }
        request.fill(0, &[5; 4096]);
        Ok(())
    }

    async fn write(&self, _: &mut Next<'_>, _: &WriteRequest<'_>) -> driveline_op::Result<()> {
        Ok(())
    }

    async fn block_status(
        &self,
        _: &mut Next<'_>,
        request: &BlockStatusRequest<'_>,
    ) -> driveline_op::Result<()> {
        let at = request.offset() % 65536;
        let (flags, end) = match at {
            _ if request.flags() & flag::PRECISE == 0 => (status::DATA, 65536),
            0..DATA => (status::ZERO, DATA),
            DATA..20480 => (status::DATA, 20480),
            _ => (status::ZERO, 65536),
        };
        request.answer(BlockStatus { flags, depth: 1, length: end - at, ..BlockStatus::default() });
        Ok(())
    }
}

impl Driver for Holes {
    fn description(&self) -> &Description {
        &self.0
    }
    fn check(&self, _: &Options) -> driveline_graph::Result<()> {
        Ok(())
    }
    fn open<'a>(&'a self, args: OpenArgs<'a>) -> BoxFuture<'a, driveline_graph::Result<Arc<dyn OpenNode>>> {
        let node = OpenHoles(Arc::new(Body { cookie: args.cookie, driver: Clusters }));
        Box::pin(async { Ok(Arc::new(node) as _) })
    }
}

struct OpenHoles(Arc<Body<Clusters>>);

impl OpenNode for OpenHoles {
    fn instance(&self) -> Instance {
        Instance::new(self.0.clone(), &CLUSTERS)
    }
    fn info(&self, _: &[Info]) -> Info {
        Info { size_bytes: 1 << 20, ..Info::default() }
    }
}

/// A file system makes pages of what it has none of: reading the holes of a sparse image took longer than all the rest of a copy.
#[test]
fn zeroes_around_the_data_of_a_cluster_are_copied_unread() {
    let graph = Graph::new(GraphOptions::default());
    graph.register(Arc::new(MemoryDriver::default())).unwrap();
    graph.register(Arc::new(CopyBeforeWriteDriver::default())).unwrap();
    graph
        .register(Arc::new(Holes(Description::builtin("holes", DriverKind::Protocol, "for tests"))))
        .unwrap();
    block_on(async {
        let mut change = graph.change().await;
        for definition in [
            json!({ "driver": "memory", "node-name": "target", "size": "1MiB" }),
            json!({ "driver": "copy-before-write", "node-name": "cbw", "file": { "driver": "holes" }, "target": "target" }),
        ] {
            let definition = definition.as_object().unwrap().clone();
            change.add_node(graph.parse(definition, &[]).unwrap()).await.unwrap();
        }
        change.commit().await.unwrap();
        let past = graph.open_root("target", RootOptions::reader("the past")).await.unwrap();
        let guest = graph.open_root("cbw", RootOptions::writer("the guest")).await.unwrap();
        guest.write(3 << 16, &[1; 512], 0).await.unwrap();
        let copied = past.read(3 << 16..4 << 16).await.unwrap();
        let data = DATA as usize..DATA as usize + 4096;
        assert!(copied[data.clone()].iter().all(|&byte| byte == 5));
        assert!(copied[..data.start].iter().chain(&copied[data.end..]).all(|&byte| byte == 0));
        guest.close().await.unwrap();
        past.close().await.unwrap();
    });
}

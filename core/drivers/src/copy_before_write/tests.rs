use super::{CopyBeforeWrite, CopyBeforeWriteDriver, CopyingFilter, Settings};
use crate::{
    MemoryDriver,
    conformance::{OpenNodeArgs, open_node, options_of},
};
use driveline_bitmap::Granularity;
use driveline_graph::{Driver, OpenArgs};
use futures::executor::block_on;
use serde_json::json;

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

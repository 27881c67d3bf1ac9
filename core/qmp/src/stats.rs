//! `query-blockstats`: what the users of drives and nodes did.

use crate::{error::Result, monitor::Monitor};
use driveline_graph::{Count, Graph, NodeView, Role, Statistics};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{collections::BTreeMap, time::Duration};

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct QueryBlockstats {
    query_nodes: Option<bool>,
}

/// QAPI's `BlockStats`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct BlockStats {
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    qdev: Option<String>,
    node_name: Option<String>,
    stats: BlockDeviceStats,
    #[serde(skip_serializing_if = "Option::is_none")]
    driver_specific: Option<FileStats>,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent: Option<Box<BlockStats>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing: Option<Box<BlockStats>>,
}

/// QAPI's `BlockStatsSpecificFile`, with its driver.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct FileStats {
    driver: FileDriver,
    discard_nb_ok: u64,
    discard_nb_failed: u64,
    discard_bytes_ok: u64,
}

/// The drivers that count discards.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum FileDriver {
    File,
    HostDevice,
}

/// For each field its value, of [`Statistics`]. There are no zones here, and requests are not merged.
macro_rules! device_stats {
    ($($field:ident = |$stats:ident| $value:expr,)*) => {
        /// QAPI's `BlockDeviceStats`.
        #[derive(Debug, Serialize, Deserialize)]
        pub(crate) struct BlockDeviceStats {
            $($field: u64,)*
            #[serde(skip_serializing_if = "Option::is_none")]
            idle_time_ns: Option<u64>,
            account_invalid: bool,
            account_failed: bool,
            /// No intervals are kept.
            timed_stats: Vec<TimedStats>,
        }

        impl BlockDeviceStats {
            fn new(statistics: &Statistics) -> Self {
                Self {
                    $($field: { let $stats = statistics; $value },)*
                    idle_time_ns: statistics.idle.map(nanos),
                    account_invalid: false,
                    account_failed: false,
                    timed_stats: Vec::new(),
                }
            }
        }
    };
}

device_stats! {
    rd_bytes = |s| s.reads.bytes,
    wr_bytes = |s| s.writes.bytes,
    zone_append_bytes = |_s| 0,
    unmap_bytes = |s| s.discards.bytes,
    rd_operations = |s| s.reads.operations,
    wr_operations = |s| s.writes.operations,
    zone_append_operations = |_s| 0,
    flush_operations = |s| s.flushes.operations,
    unmap_operations = |s| s.discards.operations,
    rd_total_time_ns = |s| time(&s.reads),
    wr_total_time_ns = |s| time(&s.writes),
    zone_append_total_time_ns = |_s| 0,
    flush_total_time_ns = |s| time(&s.flushes),
    unmap_total_time_ns = |s| time(&s.discards),
    wr_highest_offset = |s| s.highest_write,
    rd_merged = |_s| 0,
    wr_merged = |_s| 0,
    zone_append_merged = |_s| 0,
    unmap_merged = |_s| 0,
    failed_rd_operations = |s| s.reads.failed,
    failed_wr_operations = |s| s.writes.failed,
    failed_zone_append_operations = |_s| 0,
    failed_flush_operations = |s| s.flushes.failed,
    failed_unmap_operations = |s| s.discards.failed,
    invalid_rd_operations = |s| s.reads.invalid,
    invalid_wr_operations = |s| s.writes.invalid,
    invalid_zone_append_operations = |_s| 0,
    invalid_flush_operations = |s| s.flushes.invalid,
    invalid_unmap_operations = |s| s.discards.invalid,
}

/// QAPI's `BlockDeviceTimedStats`, of an interval.
#[derive(Debug, Serialize, Deserialize)]
struct TimedStats {
    interval_length: u64,
    min_rd_latency_ns: u64,
    max_rd_latency_ns: u64,
    avg_rd_latency_ns: u64,
    min_wr_latency_ns: u64,
    max_wr_latency_ns: u64,
    avg_wr_latency_ns: u64,
    min_zone_append_latency_ns: u64,
    max_zone_append_latency_ns: u64,
    avg_zone_append_latency_ns: u64,
    min_flush_latency_ns: u64,
    max_flush_latency_ns: u64,
    avg_flush_latency_ns: u64,
    avg_rd_queue_depth: f64,
    avg_wr_queue_depth: f64,
    avg_zone_append_queue_depth: f64,
}

fn time(count: &Count) -> u64 {
    nanos(count.time)
}

fn nanos(time: Duration) -> u64 {
    time.as_nanos().try_into().unwrap_or(u64::MAX)
}

pub(crate) async fn query_blockstats(monitor: &Monitor, query: QueryBlockstats) -> Result<Vec<BlockStats>> {
    let graph = monitor.graph();
    let nodes = Nodes::of(graph);
    if query.query_nodes == Some(true) {
        return Ok(nodes.order.iter().map(|view| nodes.stats(view, false)).collect());
    }
    let drive = |drive: driveline_graph::DriveView| {
        let mut stats = nodes.stats(nodes.get(&drive.root)?, true);
        stats.stats = BlockDeviceStats::new(&graph.drive_statistics(&drive.name));
        stats.device = Some(drive.name.to_string());
        Some(stats)
    };
    Ok(graph.drives().into_iter().filter_map(drive).collect())
}

/// All nodes at one moment.
struct Nodes<'g> {
    graph: &'g Graph,
    order: Vec<NodeView>,
    by_name: BTreeMap<String, usize>,
}

impl<'g> Nodes<'g> {
    fn of(graph: &'g Graph) -> Self {
        let order = graph.nodes();
        let by_name = order.iter().enumerate().map(|(at, view)| (view.node.name().to_owned(), at)).collect();
        Self { graph, order, by_name }
    }

    fn get(&self, name: &str) -> Option<&NodeView> {
        self.by_name.get(name).map(|at| &self.order[*at])
    }

    fn child(&self, view: &NodeView, is: impl Fn(Role) -> bool) -> Option<&NodeView> {
        view.children.iter().find(|child| is(child.role)).and_then(|child| self.get(&child.node))
    }

    /// The one child that the node's data is in: not the file of an image that keeps its data elsewhere, nor any of a quorum's.
    fn data(&self, view: &NodeView) -> Option<&NodeView> {
        let elsewhere = view.children.iter().any(|child| child.name == "data-file");
        let first = |role| matches!(role, Role::Storage | Role::Filtered | Role::PointInTime);
        if let Some(first) = self.child(view, first).filter(|_| !elsewhere) {
            return Some(first);
        }
        let mut data = view.children.iter().filter(|child| child.role == Role::Data);
        data.next().filter(|_| data.next().is_none()).and_then(|child| self.get(&child.node))
    }

    /// Of a node, and of what is below it: its file, and for a drive the images behind it, too.
    fn stats(&self, view: &NodeView, of_drive: bool) -> BlockStats {
        let file = self.data(view);
        let behind = self.child(view, |role| matches!(role, Role::Filtered | Role::Backing));
        let below = |view| Box::new(self.stats(view, of_drive));
        let mut statistics = self.graph.node_statistics(view.node.name());
        // A file below a format has no users who count; who makes a volume larger in time wants to know it of that file.
        let highest = view.node.open_node().details().get("highest-write").and_then(Value::as_u64);
        statistics.highest_write = statistics.highest_write.max(highest.unwrap_or(0));
        BlockStats {
            device: None,
            qdev: None,
            node_name: Some(view.node.name().to_owned()),
            stats: BlockDeviceStats::new(&statistics),
            driver_specific: of_file(view),
            parent: file.map(below),
            backing: behind.filter(|_| of_drive).map(below),
        }
    }
}

/// What a file says about its discards.
fn of_file(view: &NodeView) -> Option<FileStats> {
    let details = view.node.open_node().details();
    let discards = details.get("discards")?;
    let count = |key| discards.get(key).and_then(Value::as_u64);
    Some(FileStats {
        driver: match view.node.driver_name() {
            "host_device" => FileDriver::HostDevice,
            _ => FileDriver::File,
        },
        discard_nb_ok: count("ok")?,
        discard_nb_failed: count("failed")?,
        discard_bytes_ok: count("ok-bytes")?,
    })
}

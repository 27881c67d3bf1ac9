//! Where roots lead to, and what nodes are beside their drivers, one claim a test.

#![allow(unreachable_pub, missing_debug_implementations, missing_docs, dead_code)]

mod kit;

use driveline_graph::RootOptions;
use kit::Bench;
use serde_json::json;

#[test]
fn a_root_that_follows_goes_with_its_place_and_one_that_stays_does_not() {
    let bench = Bench::new();
    bench.add(json!([{ "driver": "memory", "node-name": "disk" }])).unwrap();
    let graph = &bench.graph;
    let export = bench.run(graph.open_following_root("disk", RootOptions::reader("an export"))).unwrap();
    let job = bench.run(graph.open_root("disk", RootOptions::reader("a job"))).unwrap();
    bench.insert("pass", "filter", "disk").unwrap();
    assert_eq!((&*export.node_name(), &*job.node_name()), ("filter", "disk"));
    assert_eq!(graph.view_node("filter").unwrap().parents, ["an export"]);

    // Whoever stays at the filter itself keeps it; what follows goes down with it.
    bench.change(|change| change.remove_filter("filter")).unwrap();
    assert_eq!((&*export.node_name(), &*job.node_name()), ("disk", "disk"));

    bench.add(json!([{ "driver": "memory", "node-name": "other" }])).unwrap();
    bench.change(|change| change.replace_node("disk", "other")).unwrap();
    assert_eq!((&*export.node_name(), &*job.node_name()), ("other", "disk"));
    let place = export.place();
    drop(export);
    assert_eq!(place.node_name(), None);
}

//! Queries that clients and people who look for mistakes ask: counters, the graph with its permissions, bitmaps as numbers.

use crate::{
    interop::Qsd,
    kit::{World, has},
};
use driveline_drivers::qcow2::{CreateOptions, create_file};
use driveline_graph::RootOptions;
use serde_json::{Value, json};
use std::process::Command;

#[test]
fn what_the_users_of_a_drive_do_is_counted_and_what_jobs_do_is_not() {
    let (world, mut client) = World::with_disk();
    let nothing = client.ok("query-blockstats", json!({}));
    assert_eq!(nothing[0]["device"], "vda");
    assert_eq!(nothing[0]["stats"].get("idle_time_ns"), None);
    world.write("vda", 0, &[1; 512]);
    world.engine.block_on(async {
        let root = world.graph.open_root("vda", RootOptions::writer("a guest")).await.unwrap();
        root.count();
        root.write(4096, &[1; 8192], 0).await.unwrap();
        root.write_zeroes(0..512, 0).await.unwrap();
        root.read(0..1024).await.unwrap();
        root.read(0..1024).await.unwrap();
        root.discard(0..512, 0).await.unwrap();
        root.flush().await.unwrap();
        root.write(1 << 20, &[1], 0).await.unwrap_err();
        let reader = world.graph.open_root("vda", RootOptions::reader("a reader")).await.unwrap();
        reader.count();
        reader.read(0..512).await.unwrap();
        reader.write(0, &[1; 512], 0).await.unwrap_err();
    });
    let stats = client.ok("query-blockstats", json!({}))[0]["stats"].clone();
    let expected = [
        ("rd_bytes", 2560),
        ("wr_bytes", 8704),
        ("unmap_bytes", 512),
        ("rd_operations", 3),
        ("wr_operations", 2),
        ("unmap_operations", 1),
        ("flush_operations", 1),
        ("wr_highest_offset", 12288),
        ("failed_wr_operations", 0),
        ("invalid_wr_operations", 2),
        ("rd_merged", 0),
    ];
    for (name, value) in expected {
        assert_eq!(stats[name], value, "{name}: {stats}");
    }
    for name in ["rd_total_time_ns", "wr_total_time_ns", "unmap_total_time_ns", "flush_total_time_ns"] {
        assert!(stats[name].as_u64().unwrap() > 0, "{name}: {stats}");
    }
    assert!(stats["idle_time_ns"].is_u64());
    // The drive's users are not the node's.
    let nodes = client.ok("query-blockstats", json!({ "query-nodes": true }));
    assert_eq!((&nodes[0]["node-name"], &nodes[0]["stats"]["rd_bytes"]), (&json!("disk"), &json!(0)));
}

#[test]
fn statistics_reach_down_to_the_file_and_its_discards() {
    let world = World::new();
    let mut client = world.client();
    std::fs::write(world.path("disk.raw"), vec![1; 1 << 20]).unwrap();
    let file = json!({ "driver": "file", "filename": world.path("disk.raw"), "node-name": "file", "discard": "unmap" });
    client
        .ok("blockdev-add", json!({ "driver": "raw", "node-name": "fmt", "file": file, "discard": "unmap" }));
    world.drive("vda", "fmt");
    world.engine.block_on(async {
        let root = world.graph.open_root("vda", RootOptions::writer("a guest")).await.unwrap();
        root.discard(0..65536, 0).await.unwrap();
    });
    let stats = client.ok("query-blockstats", json!({}));
    let file = &stats[0]["parent"];
    assert_eq!((&stats[0]["node-name"], &file["node-name"]), (&json!("fmt"), &json!("file")));
    let specific =
        json!({ "driver": "file", "discard-nb-ok": 1, "discard-nb-failed": 0, "discard-bytes-ok": 65536 });
    assert_eq!(file["driver-specific"], specific);
}

/// What was said of a file below an image was as old as the last change of the graph, and that nothing was written to it: who
/// makes a volume larger in time would never have done so.
#[test]
fn a_file_below_an_image_is_told_of_as_it_is_now() {
    let (world, mut client) = World::with_disk();
    let path = world.path("image.qcow2");
    create_file(path.as_ref(), &CreateOptions::new(64 << 20)).unwrap();
    let file = json!({ "driver": "file", "filename": path, "node-name": "file" });
    client.ok("blockdev-add", json!({ "driver": "qcow2", "node-name": "image", "file": file }));
    world.drive("vdb", "image");
    world.write("vdb", 0, &vec![1; 1 << 20]);
    let end = std::fs::metadata(&path).unwrap().len();
    assert!(end > 1 << 20);
    let nodes = client.ok("query-named-block-nodes", json!({}));
    let node = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "file").unwrap();
    assert_eq!(node["image"]["virtual-size"], end);
    let nodes = client.ok("query-blockstats", json!({ "query-nodes": true }));
    let node = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "file").unwrap();
    assert!(node["stats"]["wr_highest_offset"].as_u64().unwrap() >= 1 << 20, "{node}");
}

/// The story: only what has a single child was told of as it is now, so a filter with a log beside its file was not.
#[test]
fn a_filter_with_a_child_beside_its_file_is_told_of_as_it_is_now() {
    let (world, mut client) = World::with_disk();
    let path = world.path("image.qcow2");
    create_file(path.as_ref(), &CreateOptions::new(64 << 20)).unwrap();
    let file = json!({ "driver": "blklogwrites", "node-name": "logging",
        "file": { "driver": "file", "filename": path }, "log": { "driver": "null-co", "size": 512 } });
    client.ok("blockdev-add", json!({ "driver": "qcow2", "node-name": "image", "file": file }));
    world.drive("vdb", "image");
    world.write("vdb", 0, &vec![1; 1 << 20]);
    let nodes = client.ok("query-named-block-nodes", json!({}));
    let node = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "logging").unwrap();
    assert_eq!(node["image"]["virtual-size"], std::fs::metadata(&path).unwrap().len());
}

#[test]
fn the_graph_shows_users_nodes_and_what_they_need() {
    let (world, mut client) = World::with_disk();
    client.ok("blockdev-add", json!({ "driver": "raw", "node-name": "fmt", "file": "disk" }));
    let root =
        world.engine.block_on(world.graph.open_root("fmt", RootOptions::writer("export 'e'"))).unwrap();
    let graph = client.ok("x-debug-query-block-graph", json!({}));
    let nodes = graph["nodes"].as_array().unwrap();
    let id = |name: &str| nodes.iter().find(|node| node["name"] == name).unwrap()["id"].clone();
    let kinds: Vec<&Value> = ["export 'e'", "fmt", "disk"]
        .iter()
        .map(|name| &nodes.iter().find(|node| node["name"] == **name).unwrap()["type"])
        .collect();
    assert_eq!(kinds, ["block-backend", "block-driver", "block-driver"]);
    let edges = graph["edges"].as_array().unwrap();
    let of = |parent: &str| edges.iter().find(|edge| edge["parent"] == id(parent)).unwrap();
    assert_eq!(of("export 'e'")["perm"], json!(["consistent-read", "write"]));
    assert_eq!((&of("export 'e'")["name"], &of("export 'e'")["child"]), (&json!("root"), &id("fmt")));
    assert_eq!((&of("fmt")["name"], &of("fmt")["child"]), (&json!("file"), &id("disk")));
    drop(root);
}

#[test]
fn a_bitmap_has_the_same_number_as_in_qemu() {
    if !has("qemu-storage-daemon", Command::new("qemu-storage-daemon").arg("--version")) {
        return;
    }
    let (world, mut client) = World::with_disk();
    let mut qsd = Qsd::start();
    for granularity in [512, 65536] {
        let name = format!("b{granularity}");
        let add = json!({ "node": "disk", "name": name, "granularity": granularity });
        let ask = json!({ "node": "disk", "name": name });
        let sums = [&mut client, &mut qsd.client].map(|client| {
            client.ok("block-dirty-bitmap-add", add.clone());
            client.ok("x-debug-block-dirty-bitmap-sha256", ask.clone())["sha256"].clone()
        });
        assert_eq!(sums[0], sums[1]);
    }
    world.write("disk", 65536, &[1; 512]);
    let sum = client.ok("x-debug-block-dirty-bitmap-sha256", json!({ "node": "disk", "name": "b65536" }));
    // One word with bit 1 set.
    let expected = "d86e8112f3c4c4442126f8e9f44f16867da487f29052bf91b810457db34209a4";
    assert_eq!(sum["sha256"], expected);
    let nope = json!({ "node": "nope", "name": "b" });
    for client in [&mut client, &mut qsd.client] {
        assert_eq!(client.wrong("x-debug-block-dirty-bitmap-sha256", nope.clone()), "Node 'nope' not found");
    }
}

/// Where the lowest of many images names another backing than it has, the name of each was found by those of all below it, twice: the
/// query took a second with 24 images, and a year with 50.
#[test]
fn a_long_chain_is_told_of_at_once_whatever_its_lowest_image_names() {
    let world = World::new();
    let mut client = world.client();
    std::fs::write(world.path("base.raw"), [0; 4096]).unwrap();
    let file = json!({ "driver": "file", "filename": world.path("base.raw") });
    client.ok("blockdev-add", json!({ "driver": "raw", "node-name": "base", "file": file }));
    world.drive("vda", "base");
    const IMAGES: usize = 50;
    for at in 0..IMAGES {
        let snapshot = json!({ "device": "vda", "snapshot-file": world.path(&format!("{at}.qcow2")),
            "snapshot-node-name": format!("n{at}"), "format": "qcow2" });
        client.ok("blockdev-snapshot-sync", snapshot);
    }
    let flat = json!({ "flat": true });
    let top = |nodes: Value| {
        let mut nodes = nodes.as_array().unwrap().iter();
        nodes.find(|node| node["node-name"] == "n49").unwrap()["file"].as_str().unwrap().to_owned()
    };
    let nodes = client.ok("query-named-block-nodes", flat.clone());
    assert_eq!(top(nodes), world.path("49.qcow2"));
    let other = json!({ "device": "vda", "image-node-name": "n0", "backing-file": "other.raw" });
    client.ok("change-backing-file", other);
    let nodes = client.ok("query-named-block-nodes", flat);
    let told: Value = serde_json::from_str(top(nodes).strip_prefix("json:").unwrap()).unwrap();
    let images = std::iter::successors(Some(&told), |image| image.get("backing"));
    assert_eq!(images.count(), IMAGES + 1);
}

//! Quorums of images, as a monitor changes them.

use crate::kit::World;
use driveline_drivers::qcow2::{CreateOptions, create_file};
use driveline_graph::RootOptions;
use serde_json::{Value, json};

/// A quorum `q` of raw and qcow2 on files, and a third node.
fn world(third: Value) -> World {
    let world = World::new();
    let mut client = world.client();
    std::fs::write(world.path("raw"), vec![0; 1 << 20]).unwrap();
    create_file(std::path::Path::new(&world.path("qcow2")), &CreateOptions::new(1 << 20)).unwrap();
    for format in ["raw", "qcow2"] {
        let file = json!({ "driver": "file", "filename": world.path(format) });
        client.ok("blockdev-add", json!({ "driver": format, "node-name": format, "file": file }));
    }
    client.ok("blockdev-add", third);
    client.ok(
        "blockdev-add",
        json!({ "driver": "quorum", "node-name": "q", "vote-threshold": 2, "rewrite-corrupted": true,
            "children": ["raw", "qcow2", "third"] }),
    );
    world
}

fn sizes(world: &World) -> [u64; 4] {
    ["q", "raw", "qcow2", "third"].map(|name| world.graph.node(name).unwrap().info().size_bytes)
}

/// The story: a quorum asked its children's drivers itself, which do not know their files, so only files and memory could grow.
#[test]
fn a_quorum_of_formats_is_resized_with_all_that_it_consists_of() {
    let world = world(json!({ "driver": "memory", "node-name": "third", "size": 1 << 20 }));
    let mut client = world.client();
    client.ok("block_resize", json!({ "node-name": "q", "size": 2 << 20 }));
    assert_eq!(sizes(&world), [2 << 20; 4]);
    assert_eq!(std::fs::metadata(world.path("raw")).unwrap().len(), 2 << 20);
    world.write("q", (2 << 20) - 512, &[1; 512]);
    world.engine.block_on(async {
        let root = world.graph.open_root("qcow2", RootOptions::reader("a reader")).await.unwrap();
        assert_eq!(root.read((2 << 20) - 512..2 << 20).await.unwrap()[..], [1; 512]);
    });
    client.ok("block_resize", json!({ "node-name": "q", "size": 1 << 20 }));
    assert_eq!(sizes(&world), [1 << 20; 4]);
}

#[test]
fn a_quorum_of_which_one_child_cannot_grow_stays_as_it_is() {
    // A window has the size that it was given.
    let memory = json!({ "driver": "memory", "size": 1 << 20 });
    let world = world(json!({ "driver": "raw", "node-name": "third", "size": 1 << 20, "file": memory }));
    let mut client = world.client();
    client.wrong("block_resize", json!({ "node-name": "q", "size": 2 << 20 }));
    assert_eq!(sizes(&world), [1 << 20; 4]);
    assert_eq!(std::fs::metadata(world.path("raw")).unwrap().len(), 1 << 20);
}

/// The story: whether outvoted children are put right was decided when the quorum was opened.
#[test]
fn a_quorum_that_becomes_writable_puts_right_who_is_outvoted() {
    let world = World::new();
    let mut client = world.client();
    for name in ["a", "b", "c"] {
        client.ok("blockdev-add", json!({ "driver": "memory", "node-name": name, "size": 4096 }));
    }
    world.write("a", 0, &[1; 512]);
    let quorum = |read_only: bool| {
        json!({ "driver": "quorum", "node-name": "q", "vote-threshold": 2, "rewrite-corrupted": true,
            "children": ["a", "b", "c"], "read-only": read_only })
    };
    client.ok("blockdev-add", quorum(true));
    let read = |name: &str| {
        world.engine.block_on(async {
            let root = world.graph.open_root(name, RootOptions::reader("a reader")).await.unwrap();
            root.read(0..512).await.unwrap()[0]
        })
    };
    assert_eq!((read("q"), read("a")), (0, 1));
    client.ok("blockdev-reopen", json!({ "options": [quorum(false)] }));
    assert_eq!((read("q"), read("a")), (0, 0));
}

//! Events of what goes wrong below.

use crate::kit::{Client, World};
use driveline_drivers::qcow2::{CreateOptions, create_file};
use driveline_graph::RootOptions;
use serde_json::{Value, json};
use std::{
    os::unix::fs::FileExt,
    path::Path,
    time::{Duration, Instant},
};

/// An image of 1 MiB whose first cluster is at a place where no cluster can be.
fn damaged(world: &World, name: &str) -> String {
    let path = world.path(name);
    create_file(Path::new(&path), &CreateOptions::new(1 << 20)).unwrap();
    let mut client = world.client();
    client.ok("blockdev-add", node(name, &path, false));
    world.write(name, 0, &[1; 65536]);
    client.ok("blockdev-del", json!({ "node-name": name }));
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let word = |offset: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, offset).unwrap();
        u64::from_be_bytes(bytes)
    };
    let l2 = word(word(40)) & 0x00ff_ffff_ffff_fe00;
    file.write_all_at(&(word(l2) | 0x200).to_be_bytes(), l2).unwrap();
    path
}

fn node(name: &str, path: &str, read_only: bool) -> Value {
    let file = json!({ "driver": "file", "filename": path });
    json!({ "driver": "qcow2", "node-name": name, "read-only": read_only, "file": file })
}

fn read_fails(world: &World, target: &str) {
    world.engine.block_on(async {
        let root = world.graph.open_root(target, RootOptions::reader("a guest")).await.unwrap();
        root.read(0..512).await.unwrap_err();
    });
}

/// All events of a name that have come once a command is answered.
fn so_far(client: &mut Client, name: &str) -> Vec<Value> {
    client.ok("query-version", json!({}));
    let (named, rest) = std::mem::take(&mut client.events).into_iter().partition(|e| e["event"] == name);
    client.events = rest;
    named
}

#[test]
fn a_read_that_meets_damage_marks_a_writable_image_and_is_told_once() {
    let world = World::new();
    let path = damaged(&world, "image");
    let mut client = world.client();
    client.ok("blockdev-add", node("image", &path, false));
    world.drive("vda", "image");
    read_fails(&world, "vda");
    let data = client.event("BLOCK_IMAGE_CORRUPTED");
    let said = [&data["device"], &data["node-name"], &data["fatal"]];
    assert_eq!(said, [&json!("vda"), &json!("image"), &json!(true)]);
    assert!(data["msg"].as_str().unwrap().starts_with("L2 entry 0x8"), "{data}");
    world.engine.block_on(async {
        let root = world.graph.open_root("vda", RootOptions::writer("a guest")).await.unwrap();
        root.write(1 << 19, &[1; 512], 0).await.unwrap_err();
        root.read(0..512).await.unwrap_err();
    });
    assert_eq!(so_far(&mut client, "BLOCK_IMAGE_CORRUPTED"), Vec::<Value>::new());
    let header = std::fs::read(&path).unwrap();
    assert_eq!(header[79] & 2, 2, "the mark is in the header");
}

#[test]
fn damage_of_an_image_that_is_only_read_is_told_once_and_changes_nothing() {
    let world = World::new();
    let path = damaged(&world, "image");
    let before = std::fs::read(&path).unwrap();
    let mut client = world.client();
    client.ok("blockdev-add", node("image", &path, true));
    read_fails(&world, "image");
    let data = client.event("BLOCK_IMAGE_CORRUPTED");
    assert_eq!([&data["device"], &data["fatal"]], [&json!(""), &json!(false)]);
    read_fails(&world, "image");
    assert_eq!(so_far(&mut client, "BLOCK_IMAGE_CORRUPTED"), Vec::<Value>::new());
    world.close();
    assert!(std::fs::read(&path).unwrap() == before);
}

#[test]
fn a_quorum_that_fails_often_is_told_of_once_a_second_with_the_last_failure() {
    let world = World::new();
    let mut client = world.client();
    for (name, kind) in [("a", "memory"), ("b", "memory")] {
        client.ok("blockdev-add", json!({ "driver": kind, "node-name": name, "size": 1 << 20 }));
    }
    world.write("a", 0, &[1; 4096]);
    let quorum = json!({ "driver": "quorum", "node-name": "q", "vote-threshold": 2, "children": ["a", "b"] });
    client.ok("blockdev-add", quorum);
    let began = Instant::now();
    world.engine.block_on(async {
        let root = world.graph.open_root("q", RootOptions::reader("a guest")).await.unwrap();
        for at in 0..5 {
            root.read(at * 512..(at + 1) * 512).await.unwrap_err();
        }
    });
    // More than the interval may have passed already, on a machine that is busy.
    if began.elapsed() < Duration::from_millis(900) {
        assert_eq!(client.event("QUORUM_FAILURE")["sector-num"], 0);
        assert_eq!(client.event("QUORUM_FAILURE")["sector-num"], 4);
        assert!(began.elapsed() >= Duration::from_secs(1));
        assert_eq!(so_far(&mut client, "QUORUM_FAILURE"), Vec::<Value>::new());
    }
}

//! Plugins of other versions of the ABI: refused, or served both ways.

use super::{sets::library, world::World};
use driveline_loader::{Plugin, PluginReport, load};
use driveline_op::{Ask, Buffer, flag, op};
use futures::executor::block_on;
use serde_json::json;

fn refusal(set: &str) -> String {
    let path = library(set, set);
    let text = load(&path).expect_err("refused").to_string();
    assert!(!text.contains('\n'), "one line: {text}");
    text.strip_prefix(&format!("plugin {}: ", path.display())).unwrap().to_owned()
}

#[test]
fn another_major_version_is_refused() {
    assert_eq!(
        refusal("major"),
        "expected filter ABI 1.3.0, found 2.0.0; rebuild it with an SDK for ABI 1.x"
    );
}

#[test]
fn changed_layouts_are_refused_and_the_place_is_named() {
    for (set, place) in [
        (
            "swapped",
            "filters > data > ops > read > start > param_1 (Request): field offset here, field length there",
        ),
        (
            "grown",
            "filters > data > ops > read > start > edges > info > reserved ([u64;2]): length 2 here, length 4 there",
        ),
        ("retyped", "init > log_max_level (u32): type u32 here, type u64 there"),
    ] {
        let expected =
            format!("it says filter ABI 1.3.0, but its types differ from this program's at {place}");
        assert_eq!(refusal(set), expected);
    }
}

/// Loads a plugin of each version in several orders: the verdict must not depend on what came before.
#[test]
fn newer_and_older_minor_versions_load_in_any_order() {
    let order = ["newer", "old", "old-1-1", "old-1-2", "current"];
    let names = ["newer", "old", "old-1-1", "old-1-2", "small"];
    for _ in 0..2 {
        for (set, name) in order.iter().zip(names) {
            let folder = tempfile::tempdir().unwrap();
            let copy = folder.path().join("copy.so");
            std::fs::copy(library(set, name), &copy).unwrap();
            load(&copy).unwrap_or_else(|error| panic!("{error}"));
        }
    }
}

fn known(plugin: &Plugin) -> (String, u32) {
    let report = PluginReport::of(plugin);
    (report.abi_version, report.filters[0].operations_known)
}

#[test]
fn a_newer_plugin_works_and_its_new_operation_is_ignored() {
    let path = library("newer", "newer");
    assert_eq!(known(load(&path).unwrap()), ("1.4.0".into(), 10));
    let world = World::new(&[&path]);
    let root = world.filter("variant", json!({}));
    block_on(async {
        root.write(0, b"data", 0).await.unwrap();
        assert_eq!(&root.read(0..4).await.unwrap()[..], b"data");
        root.write_zeroes(0..2, 0).await.unwrap();
    });
    assert_eq!(world.seen(), ["write 0+4", "read 0+4", "write_zeroes 0+2"]);
}

#[test]
fn an_operation_newer_than_a_plugin_never_slips_past_it() {
    let path = library("old", "old");
    assert_eq!(known(load(&path).unwrap()), ("1.0.0".into(), 6));
    let world = World::new(&[&path]);
    let root = world.filter("old", json!({}));
    block_on(async {
        root.write(0, b"data", 0).await.unwrap();
        assert_eq!(&root.read(0..4).await.unwrap()[..], b"data");
        root.write_zeroes(0..2, 0).await.unwrap();
        root.flush().await.unwrap();
        world.seen();
        // It left discard out and said "pass"; it has never heard of cache, which is a hint and so ends above it.
        root.discard(0..512, 0).await.unwrap();
        let ask = Ask { op: op::CACHE, length: 512, ..Ask::default() };
        let _ = root.submit(ask, Buffer::default()).await;
    });
    assert_eq!(world.seen(), ["discard 0+512"]);
}

#[test]
fn a_compressed_write_is_a_plain_one_for_plugins_that_never_heard_of_it() {
    for (set, known_operations) in [("old", 6), ("old-1-1", 7)] {
        let path = library(set, set);
        assert_eq!(known(load(&path).unwrap()).1, known_operations);
        let world = World::new(&[&path]);
        let root = world.filter(set, json!({}));
        block_on(async {
            let flags = flag::COMPRESSED | flag::FUA;
            root.write(0, b"data", flags).await.unwrap_or_else(|error| panic!("{set}: {error}"));
            assert_eq!(&root.read(0..4).await.unwrap()[..], b"data");
        });
        assert_eq!(world.seen(), ["write 0+4 fua", "read 0+4"], "{set}");
        assert!(world.failures().is_empty(), "{:?}", world.failures());
    }
    // Straight to the leaf, the flag is there.
    let world = World::new(&[]);
    block_on(world.root("disk").write(0, b"data", flag::COMPRESSED)).unwrap();
    assert_eq!(world.seen(), ["write 0+4 compressed"]);
}

#[test]
fn a_panic_in_an_old_plugin_is_an_error_too() {
    let world = World::new(&[&library("old", "old")]);
    let root = world.filter("old", json!({ "panics": true }));
    assert_eq!(block_on(root.read(0..4)).unwrap_err().errno_code(), 5);
}

#[test]
fn two_versions_of_one_filter_work_at_once() {
    let (one, two) = (
        load(&library("current", "versioned-1")).unwrap(),
        load(&library("current", "versioned-2")).unwrap(),
    );
    let (world_one, world_two) = (World::new(&[&one.path]), World::new(&[&two.path]));
    let (root_one, root_two) =
        (world_one.filter("versioned", json!({})), world_two.filter("versioned", json!({})));
    block_on(async {
        assert_eq!(root_one.read(0..1).await.unwrap()[0], 1);
        assert_eq!(root_two.read(0..1).await.unwrap()[0], 2);
        assert_eq!(root_one.read(0..1).await.unwrap()[0], 1);
    });
}

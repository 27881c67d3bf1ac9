//! Panics in a filter end in its node, wherever they begin.

use super::{child, sets::library, world::World};
use futures::executor::block_on;
use serde_json::json;

fn world() -> World {
    World::new(&[&library("current", "set")])
}

#[test]
fn a_panic_in_an_operation_is_an_error_and_names_the_node() {
    for (place, words) in [
        ("before-child", "before the child"),
        ("after-child", "after the child"),
        ("after-wait", "after waiting"),
        ("index", "index out of bounds"),
        ("drop-of-future", "in drop"),
        ("hostile-payload", "(no text)"),
        ("cancelled", "with a child at work"),
    ] {
        let world = world();
        let root = world.filter("chaos", json!({ "place": place }));
        for _ in 0..3 {
            assert_eq!(block_on(root.read(0..512)).unwrap_err().errno_code(), 5, "{place}");
        }
        let failures = world.failures();
        assert!(!failures.is_empty(), "{place}: the node is marked");
        assert!(
            failures[0].starts_with("filter: it panicked at ") && failures[0].contains(words),
            "{place}: {failures:?}"
        );
        assert!(failures[0].contains("chaos.rs:"), "{place}: says where: {failures:?}");
        // What it leaves out still works.
        block_on(root.write(0, b"data", 0)).unwrap();
        assert_eq!(root.in_flight(), 0);
    }
}

#[test]
fn a_panic_while_opening_is_a_refusal() {
    for place in ["check", "open"] {
        let world = world();
        let definition = json!({ "driver": "chaos", "node-name": "c", "child": "disk", "place": place });
        let error = world.add(definition).unwrap_err();
        assert!(error.message().contains(&format!("in {place}")), "{error}");
        assert!(error.message().contains("it panicked at "), "{error}");
    }
}

#[test]
fn a_panic_about_the_size_leaves_an_empty_node() {
    let world = world();
    let root = world.filter("chaos", json!({ "place": "size" }));
    assert_eq!(root.info().size_bytes, 0);
}

#[test]
fn a_panic_while_closing_is_told() {
    let world = world();
    let root = world.filter("chaos", json!({ "place": "close" }));
    block_on(root.read(0..512)).unwrap();
    block_on(root.close()).unwrap();
    block_on(world.graph.close()).unwrap();
}

/// What cannot be contained: a call to a child that was leaked would go on in memory that is used again.
#[test]
fn a_forgotten_child_operation_ends_the_process_rather_than_corrupt_memory() {
    let (status, output) = child::run("forget", &library("current", "set"));
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(6), "{output}");
}

pub(crate) fn forget(path: &std::path::Path) {
    let world = World::new(&[path]);
    let root = world.filter("chaos", json!({ "place": "forget" }));
    let _ = block_on(root.read(0..512));
}

//! What filters do to requests.

use super::{sets::library, world::World};
use driveline_op::{Ask, Buffer, op};
use futures::{executor::block_on, future::join_all};
use serde_json::json;
use std::time::{Duration, Instant};

fn world() -> World {
    World::new(&[&library("current", "set")])
}

/// Every operation once, on a root: the errno of each, 0 where it went well.
fn every_operation(root: &driveline_graph::Root) -> Vec<(&'static str, i32)> {
    // Those after them are not for users.
    let operations = op::NAMES.iter().take(ALL_BELOW.len()).enumerate().map(|(number, name)| {
        let ask = Ask { op: number as u32, offset: 0, length: 512, ..Ask::default() };
        let buffer = Buffer::new(if number < 2 { 512 } else { 0 });
        let ask = if ask.op == op::FLUSH { Ask { length: 0, ..ask } } else { ask };
        let errno = block_on(root.submit(ask, buffer)).result.map_or_else(|error| error.code(), |()| 0);
        (*name, errno)
    });
    operations.collect()
}

const ALL_BELOW: [&str; 7] = [
    "read 0+512",
    "write 0+512",
    "flush",
    "discard 0+512",
    "write_zeroes 0+512",
    "block_status 0+512",
    "cache 0+512",
];

#[test]
fn every_operation_passes_through_and_past() {
    for filter in ["passthrough", "nothing"] {
        let world = world();
        let root = world.filter(filter, json!({}));
        assert!(every_operation(&root).iter().all(|(_, errno)| *errno == 0), "{filter}");
        assert_eq!(world.seen(), ALL_BELOW, "{filter}");
    }
}

#[test]
fn a_filter_gets_the_operations_that_it_has_and_no_other() {
    for (number, name) in op::NAMES.iter().take(ALL_BELOW.len()).enumerate() {
        let world = world();
        let root = world.filter(&format!("only-{}", name.replace('_', "-")), json!({}));
        for (other, errno) in every_operation(&root) {
            assert_eq!(errno, if other == *name { 28 } else { 0 }, "only-{name}: {other}");
        }
        let below: Vec<_> =
            ALL_BELOW.iter().enumerate().filter(|(at, _)| *at != number).map(|(_, seen)| *seen).collect();
        assert_eq!(world.seen(), below, "only-{name}");
    }
}

#[test]
fn what_a_filter_denies_is_emulated_or_refused_and_never_passed() {
    let world = world();
    let root = world.filter("invert", json!({}));
    assert_eq!(root.info().size_bytes, super::world::SIZE / 2);
    block_on(async {
        root.write(0, &[1; 4096], 0).await.unwrap();
        root.write_zeroes(0..512, 0).await.unwrap();
        assert_eq!(&root.read(0..1024).await.unwrap()[..], [[0; 512], [1; 512]].concat());
        let status = root.block_status(0..1024).await.unwrap();
        assert_eq!(status.flags & driveline_op::status::ZERO, 0, "what is zero below is not zero above");
        let _ = root.discard(0..512, 0).await;
        root.flush().await.unwrap();
    });
    let seen = world.seen();
    assert!(
        seen.iter().all(|seen| ["read", "write ", "flush"].iter().any(|may| seen.starts_with(may))),
        "{seen:?}"
    );
}

#[test]
fn a_filter_with_two_children_writes_to_both() {
    let world = world();
    world.add(json!({ "driver": "leaf", "node-name": "copy" })).unwrap();
    let root = world.filter("mirror", json!({ "target": "copy" }));
    block_on(root.write(512, b"twice", 0)).unwrap();
    assert_eq!(world.seen(), ["write 512+5", "write 512+5"]);
    block_on(root.close()).unwrap();
    assert_eq!(&block_on(world.root("copy").read(512..517)).unwrap()[..], b"twice");
}

#[test]
fn a_child_that_is_not_given_is_missed() {
    let error = world().add(json!({ "driver": "mirror", "node-name": "m", "child": "disk" })).unwrap_err();
    assert!(error.to_string().contains("target"), "{error}");
}

#[test]
fn options_are_refused_by_name() {
    let world = world();
    let refusal = |options: serde_json::Value| {
        let mut definition = json!({ "driver": "sleeper", "node-name": "s", "child": "disk" });
        definition.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
        let error = world.add(definition).unwrap_err();
        (error.option().map(str::to_owned), error.message().to_owned())
    };
    let key = |name: &str| Some(name.to_owned());
    assert_eq!(refusal(json!({})), (key("time"), "it must be given".into()));
    assert_eq!(refusal(json!({ "time": "2min" })), (key("time"), "at most a minute".into()));
    assert_eq!(
        refusal(json!({ "time": "1s", "tme": 1 })),
        (key("tme"), "there is no such option, expected `time`".into())
    );
}

#[test]
fn many_sleep_at_once() {
    let world = world();
    let root = world.filter("sleeper", json!({ "time": "20ms" }));
    let begun = Instant::now();
    let reads = block_on(join_all((0..100).map(|at| root.read(at * 512..(at + 1) * 512))));
    assert!(reads.iter().all(Result::is_ok));
    assert!(begun.elapsed() >= Duration::from_millis(20) && begun.elapsed() < Duration::from_millis(1000));
}

#[test]
fn a_request_that_is_dropped_is_cancelled_below() {
    let world = world();
    let root = world.filter("sleeper", json!({ "time": "1min" }));
    let mut read = Box::pin(root.read(0..512));
    assert!(futures::FutureExt::now_or_never(read.as_mut()).is_none());
    drop(read);
    assert_eq!(root.in_flight(), 0);
    assert_eq!(world.seen(), [""; 0]);
}

#[test]
fn threads_share_a_filter() {
    let world = world();
    let root = world.filter("passthrough", json!({}));
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let root = &root;
            scope.spawn(move || {
                for round in 0..200u8 {
                    let at = thread * 4096;
                    block_on(root.write(at, &[round; 512], 0)).unwrap();
                    assert_eq!(&block_on(root.read(at..at + 512)).unwrap()[..], [round; 512]);
                }
            });
        }
    });
}

#[test]
fn a_filter_is_closed_once_and_only_when_nothing_can_call_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger");
    let world = world();
    let root = world.filter("ledger", json!({ "path": path }));
    let lines = || std::fs::read_to_string(&path).unwrap();
    let mut read = Box::pin(root.read(0..512));
    assert!(futures::FutureExt::now_or_never(read.as_mut()).is_none(), "it is under way");
    assert_eq!(lines(), "opened\n");
    block_on(read).unwrap();
    block_on(root.close()).unwrap();
    block_on(world.graph.close()).unwrap();
    drop(world);
    assert_eq!(lines(), "opened\nclosed\n");
}

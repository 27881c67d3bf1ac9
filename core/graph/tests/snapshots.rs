//! What a snapshot keeps is made durable while its users go on.

#![allow(unreachable_pub, missing_debug_implementations, missing_docs, dead_code)]

mod kit;

use driveline_graph::Root;
use futures::FutureExt;
use kit::Bench;
use serde_json::json;
use std::{pin::pin, thread, time::Duration};

/// A drive on an image, and an overlay that is not in use yet.
fn drive() -> (Bench, Root) {
    let bench = Bench::new();
    let nodes = json!([
        { "driver": "memory", "node-name": "f" },
        { "driver": "overlay", "node-name": "base", "file": "f" },
        { "driver": "memory", "node-name": "g" },
        { "driver": "overlay", "node-name": "over", "file": "g" },
    ]);
    bench.add(nodes).unwrap();
    bench.change(|change| change.set_drive("vda", "base")).unwrap();
    let root = bench.root("vda");
    (bench, root)
}

/// Another drive, `vdb`, with an overlay of its own, `over2`.
fn second_drive(bench: &Bench) -> Root {
    let nodes = json!([
        { "driver": "memory", "node-name": "f2" },
        { "driver": "overlay", "node-name": "base2", "file": "f2" },
        { "driver": "memory", "node-name": "g2" },
        { "driver": "overlay", "node-name": "over2", "file": "g2" },
    ]);
    bench.add(nodes).unwrap();
    bench.change(|change| change.set_drive("vdb", "base2")).unwrap();
    bench.root("vdb")
}

fn snapshot(bench: &Bench) -> driveline_graph::Result<()> {
    bench.change(|change| change.snapshot("vda", "over"))
}

/// Takes a snapshot, and lets the disk answer with that from the flush on that comes when its users have gone on.
fn snapshot_then_unpaid(bench: &Bench, errno: i32) {
    bench.disk.pass(1);
    thread::scope(|scope| {
        let taken = scope.spawn(|| snapshot(bench));
        while flushes(bench) < 2 {
            thread::sleep(Duration::from_millis(1));
        }
        bench.disk.free(errno);
        taken.join().unwrap().unwrap();
    });
}

fn flushes(bench: &Bench) -> usize {
    bench.log.lock().iter().filter(|entry| *entry == "flush").count()
}

/// A snapshot of eight drives stopped their writes until a disk had synced all of them, because it flushed while they were
/// drained.
#[test]
fn users_write_while_what_a_snapshot_keeps_is_flushed_and_only_their_flushes_wait() {
    let (bench, root) = drive();
    bench.run(root.write(0, b"before", 0)).unwrap();
    bench.disk.pass(1);
    thread::scope(|scope| {
        let taken = scope.spawn(|| snapshot(&bench));
        // The first is before the drain, the second afterwards.
        while flushes(&bench) < 2 {
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(*root.node_name(), *"over");
        bench.run(root.write(0, b"after!", 0)).unwrap();
        let mut flushed = pin!(root.flush());
        assert!(flushed.as_mut().now_or_never().is_none(), "what was written before is not durable yet");
        assert!(!bench.graph.view_node("base").unwrap().read_only, "nor is it read-only before it is");
        bench.disk.free(0);
        bench.run(flushed).unwrap();
        taken.join().unwrap().unwrap();
    });
    assert!(bench.graph.view_node("base").unwrap().read_only);
    bench.take_log();
    bench.run(root.flush()).unwrap();
    assert_eq!(flushes(&bench), 1, "nothing is owed any more");
}

#[test]
fn a_flush_is_refused_as_long_as_what_a_snapshot_keeps_cannot_be_made_durable() {
    let (bench, root) = drive();
    bench.run(root.write(0, b"before", 0)).unwrap();
    snapshot_then_unpaid(&bench, libc::EIO);
    let error = bench.run(root.flush()).unwrap_err();
    assert_eq!(error.errno_code(), libc::EIO);
    assert!(error.to_string().contains("base"), "it names the node: {error}");
    bench.disk.free(0);
    bench.run(root.flush()).unwrap();
}

#[test]
fn a_snapshot_of_what_cannot_be_flushed_is_refused_and_changes_nothing() {
    let (bench, root) = drive();
    bench.disk.free(libc::ENOSPC);
    let error = snapshot(&bench).unwrap_err();
    assert_eq!(error.errno_code(), libc::ENOSPC);
    assert_eq!(*root.node_name(), *"base");
    bench.disk.free(0);
    snapshot(&bench).unwrap();
}

/// What is owed for an image that is not read any more (a stream took its data over) is owed by nobody.
#[test]
fn what_is_owed_for_an_image_that_has_gone_is_forgotten() {
    let (bench, root) = drive();
    snapshot_then_unpaid(&bench, libc::EIO);
    bench.change(|change| change.set_child("over", "backing", None)).unwrap();
    bench.take_log();
    bench.disk.free(0);
    bench.run(root.flush()).unwrap();
    assert_eq!(flushes(&bench), 1, "that of the overlay");
}

/// A disk that failed kept the images of all drives open for writing.
#[test]
fn what_one_drive_cannot_pay_does_not_keep_another_ones_image_writable() {
    let (bench, root) = drive();
    let _other = second_drive(&bench);
    snapshot_then_unpaid(&bench, libc::EIO);
    bench.run(root.flush()).unwrap_err();
    bench.disk.free(0);
    bench.change(|change| change.snapshot("vdb", "over2")).unwrap();
    assert!(bench.graph.view_node("base2").unwrap().read_only);
    bench.take_log();
    bench.run(root.flush()).unwrap();
    assert_eq!(flushes(&bench), 2, "the first drive owes still, and the second has not tried to pay that");
}

/// Both snapshots were in one change, and one debt: a disk that failed made every flush of the other drive fail, for good.
#[test]
fn what_one_drive_cannot_pay_of_a_snapshot_of_two_is_no_matter_of_the_other() {
    let (bench, root) = drive();
    let other = second_drive(&bench);
    bench.disk.pass(2);
    thread::scope(|scope| {
        let both = || {
            bench.change(|change| {
                change.snapshot("vda", "over")?;
                change.snapshot("vdb", "over2")
            })
        };
        let taken = scope.spawn(both);
        // Two before the drain, two afterwards.
        while flushes(&bench) < 4 {
            thread::sleep(Duration::from_millis(1));
        }
        *bench.disk.broken.lock() = Some("f2".into());
        bench.disk.free(0);
        taken.join().unwrap().unwrap();
    });
    bench.run(root.flush()).unwrap();
    bench.run(other.flush()).unwrap_err();
    let is_read_only = |node| bench.graph.view_node(node).unwrap().read_only;
    assert!(is_read_only("base") && !is_read_only("base2"));
    *bench.disk.broken.lock() = None;
    bench.run(other.flush()).unwrap();
}

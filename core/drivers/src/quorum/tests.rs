use crate::{
    MemoryDriver, QuorumDriver,
    conformance::{Check, OpenNodeArgs, check, open_node, options_of},
};
use driveline_bitmap::View;
use driveline_graph::{Graph, GraphOptions, NewBitmap, OpenChild, Options, Permissions, RootOptions};
use driveline_op::{Ask, Buffer, Call, op};
use futures::executor::block_on;
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::sync::Arc;

const SIZE: u64 = 1 << 20;

/// A node of the children's kind, named as a quorum names them.
async fn child(name: &'static str, size: u64) -> OpenChild {
    let args = OpenNodeArgs { name, ..OpenNodeArgs::default() };
    args.open(&MemoryDriver::default(), json!({ "size": size }), vec![]).await.unwrap()
}

async fn put(child: &OpenChild, offset: u64, data: &[u8]) {
    let ask = Ask { op: op::WRITE, offset, ..Ask::default() };
    Call::new(&child.edge, ask, Buffer::from(data)).await.result.unwrap();
}

async fn get(child: &OpenChild, offset: u64, length: usize) -> driveline_op::Result<Vec<u8>> {
    let ask = Ask { op: op::READ, offset, ..Ask::default() };
    let answer = Call::new(&child.edge, ask, Buffer::new(length)).await;
    answer.result.map(|()| answer.buffer.to_vec())
}

async fn three(options: Value) -> (OpenChild, [OpenChild; 3]) {
    let children =
        [child("children.0", SIZE).await, child("children.1", SIZE).await, child("children.2", SIZE).await];
    let quorum = open_node(&QuorumDriver::default(), options, children.to_vec()).await.unwrap();
    (quorum, children)
}

#[test]
fn the_options_are_those_that_are_listed() {
    options_of(
        &QuorumDriver::default(),
        json!({ "vote-threshold": 2, "blkverify": true, "rewrite-corrupted": false, "read-pattern": "fifo" }),
    );
}

#[test]
fn what_most_children_say_is_read_and_the_others_are_set_right_if_asked_for() {
    block_on(async {
        for rewrite in [false, true] {
            let (quorum, children) =
                three(json!({ "vote-threshold": 2, "rewrite-corrupted": rewrite })).await;
            put(&quorum, 4096, &[7; 4096]).await;
            for child in &children {
                assert_eq!(get(child, 4096, 4096).await.unwrap(), [7; 4096]);
            }
            put(&children[1], 5000, &[9; 10]).await;
            assert_eq!(get(&quorum, 4096, 4096).await.unwrap(), [7; 4096]);
            let now = get(&children[1], 5000, 10).await.unwrap();
            assert_eq!(now == [7; 10], rewrite);
            // Three that say three things have no winner.
            put(&children[0], 0, b"a").await;
            put(&children[1], 0, b"b").await;
            assert_eq!(get(&quorum, 0, 512).await.unwrap_err().code(), 5);
        }
    });
}

#[test]
fn in_fifo_the_first_child_is_believed() {
    block_on(async {
        let (quorum, children) = three(json!({ "vote-threshold": 2, "read-pattern": "fifo" })).await;
        put(&children[0], 0, &[1; 512]).await;
        assert_eq!(get(&quorum, 0, 512).await.unwrap(), [1; 512]);
    });
}

#[test]
fn what_cannot_be_a_quorum_is_refused() {
    block_on(async {
        let open = |options: Value, count: usize, last: u64| async move {
            let mut children = Vec::new();
            for (at, name) in ["children.0", "children.1", "children.2"][..count].iter().enumerate() {
                children.push(child(name, if at + 1 == count { last } else { SIZE }).await);
            }
            match open_node(&QuorumDriver::default(), options, children).await {
                Ok(_) => panic!("it was opened"),
                Err(error) => error.to_string(),
            }
        };
        for (options, count, last, text) in [
            (json!({ "vote-threshold": 0 }), 2, SIZE, "Parameter 'vote-threshold' expects a value >= 1"),
            (json!({ "vote-threshold": 3 }), 2, SIZE, "threshold may not exceed children count"),
            (json!({ "vote-threshold": 1 }), 0, SIZE, "Number of provided children must be 1 or more"),
            (json!({ "vote-threshold": 2, "blkverify": true }), 3, SIZE, "exactly two files"),
            (
                json!({ "vote-threshold": 2, "blkverify": true, "rewrite-corrupted": true }),
                2,
                SIZE,
                "cannot be used with blkverify=on",
            ),
            (json!({ "vote-threshold": 1 }), 2, 512, "the children differ in size"),
        ] {
            let found = open(options.clone(), count, last).await;
            assert!(found.contains(text), "{options}: {found}");
        }
    });
}

#[test]
fn a_quorum_does_what_every_node_must_do() {
    block_on(async {
        let (quorum, _) = three(json!({ "vote-threshold": 2, "rewrite-corrupted": true })).await;
        let sizes = Check { size_bytes_max: SIZE, length_bytes_max: 64 << 10, ..Check::default() };
        check(&quorum.edge, Check { seed: 11, steps: 400, ..sizes }).await;
    });
}

/// A child that was outvoted was written to as if it did not change, and a backup of what changed in it missed that.
#[test]
fn the_bitmap_of_a_child_records_its_repair_and_that_of_the_quorum_does_not() {
    block_on(async {
        let graph = graph_of(json!([
            { "driver": "memory", "node-name": "a", "size": SIZE },
            { "driver": "memory", "node-name": "b", "size": SIZE },
            { "driver": "memory", "node-name": "c", "size": SIZE },
        ]))
        .await;
        let bad = graph.open_root("c", RootOptions::writer("a fault")).await.unwrap();
        bad.write(70_000, &[9; 10], 0).await.unwrap();
        bad.close().await.unwrap();
        let mut change = graph.change().await;
        let node = json!({ "driver": "quorum", "node-name": "q", "vote-threshold": 2, "rewrite-corrupted": true,
            "children": ["a", "b", "c"] });
        change.add_node(graph.parse(object(node), &[]).unwrap()).await.unwrap();
        for node in ["a", "c", "q"] {
            let bitmap = NewBitmap { view: View::Node, ..NewBitmap::named("b") };
            change.add_bitmap(node, bitmap).unwrap();
        }
        change.commit().await.unwrap();
        let guest = graph.open_root("q", RootOptions::writer("a guest")).await.unwrap();
        assert_eq!(&guest.read(69_632..73_728).await.unwrap()[..], &[0; 4096]);
        let dirty = |node: &str| {
            let bitmap = graph.bitmap(node, "b").unwrap();
            bitmap.bits().iter_dirty().map(|range| (range.start, range.end)).collect::<Vec<_>>()
        };
        assert_eq!((dirty("a"), dirty("c"), dirty("q")), (vec![], vec![(65536, 131_072)], vec![]));
        graph.close().await.unwrap();
    });
}

/// It wrote to children that it had not claimed to write to: without the lock that keeps others from doing so as well.
#[test]
fn who_rewrites_claims_to_write_to_the_children_unless_it_is_read_only() {
    block_on(async {
        for (options, writes) in [
            (json!({}), false),
            (json!({ "rewrite-corrupted": true }), true),
            (json!({ "rewrite-corrupted": true, "read-only": true }), false),
        ] {
            let graph = graph_of(json!([{ "driver": "memory", "node-name": "a", "size": SIZE }])).await;
            let mut node = object(json!({ "driver": "quorum", "node-name": "q", "vote-threshold": 1,
                "children": ["a"] }));
            node.extend(object(options.clone()));
            let mut change = graph.change().await;
            change.add_node(graph.parse(node, &[]).unwrap()).await.unwrap();
            change.commit().await.unwrap();
            let _reader = graph.open_root("q", RootOptions::reader("a reader")).await.unwrap();
            let needs = graph.view_node("a").unwrap().needs;
            assert_eq!(needs.contains(Permissions::WRITE), writes, "{options}: {needs}");
            graph.close().await.unwrap();
        }
    });
}

fn object(value: Value) -> Options {
    let Value::Object(object) = value else { panic!("an object") };
    object
}

async fn graph_of(nodes: Value) -> Graph {
    let graph = Graph::new(GraphOptions::default());
    graph.register(Arc::new(MemoryDriver::default())).unwrap();
    graph.register(Arc::new(QuorumDriver::default())).unwrap();
    let mut change = graph.change().await;
    for node in nodes.as_array().unwrap() {
        change.add_node(graph.parse(object(node.clone()), &[]).unwrap()).await.unwrap();
    }
    change.commit().await.unwrap();
    graph
}

/// In a graph: a list of children by name, children that are added and removed under way, and what is told of bad ones.
#[test]
fn children_come_and_go_in_a_graph_and_bad_ones_are_told_of() {
    block_on(async {
        let graph = Graph::new(GraphOptions::default());
        graph.register(Arc::new(MemoryDriver::default())).unwrap();
        graph.register(Arc::new(QuorumDriver::default())).unwrap();
        let told = Arc::new(Mutex::new(Vec::new()));
        let ears = told.clone();
        graph.on_event(move |event| ears.lock().push(event.clone()));
        let mut change = graph.change().await;
        for name in ["a", "b", "c", "d"] {
            let node = json!({ "driver": "memory", "node-name": name, "size": SIZE });
            change.add_node(graph.parse(object(node), &[]).unwrap()).await.unwrap();
        }
        change.commit().await.unwrap();
        let mut change = graph.change().await;
        let list = json!(["a", { "driver": "memory", "size": SIZE }, "c"]);
        let node = json!({ "driver": "quorum", "node-name": "q", "vote-threshold": 2, "children": list });
        change.add_node(graph.parse(object(node), &[]).unwrap()).await.unwrap();
        change.set_drive("vda", "q").unwrap();
        change.commit().await.unwrap();
        let names = || {
            let view = graph.view_node("q").unwrap();
            view.children.iter().map(|child| child.name.clone()).collect::<Vec<_>>()
        };
        assert_eq!(names(), ["children.0", "children.1", "children.2"]);
        let guest = graph.open_root("vda", RootOptions::writer("a guest")).await.unwrap();
        guest.write(0, &[1; 4096], 0).await.unwrap();

        let mut change = graph.change().await;
        assert_eq!(change.add_child("q", "d").unwrap(), "children.3");
        change.commit().await.unwrap();
        told.lock().clear();
        // The new one knows nothing of what was written before.
        assert_eq!(&guest.read(512..1024).await.unwrap()[..], &[1; 512]);
        let bad = driveline_graph::Event::QuorumBad {
            node: "d".into(),
            operation: "read",
            error: None,
            range: 512..1024,
        };
        assert_eq!(told.lock().drain(..).collect::<Vec<_>>(), [bad]);
        guest.write(0, &[2; 4096], 0).await.unwrap();
        assert_eq!(&guest.read(0..4096).await.unwrap()[..], &[2; 4096]);
        assert_eq!(*told.lock(), []);

        let mut change = graph.change().await;
        change.remove_child("q", "children.1").unwrap();
        change.remove_child("q", "children.0").unwrap();
        let error = change.remove_child("q", "children.3").unwrap_err().to_string();
        assert!(
            error.contains("The number of children cannot be lower than the vote threshold 2"),
            "{error}"
        );
        let error = change.remove_child("q", "children.9").unwrap_err().to_string();
        assert!(error.contains("Node 'q' does not have child 'children.9'"), "{error}");
        let error = change.add_child("a", "b").unwrap_err().to_string();
        assert!(error.contains("The node a does not support adding a child"), "{error}");
        change.commit().await.unwrap();
        assert_eq!(names(), ["children.2", "children.3"]);
        assert_eq!(&guest.read(0..4096).await.unwrap()[..], &[2; 4096]);
        graph.close().await.unwrap();
    });
}

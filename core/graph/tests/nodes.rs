//! Where roots lead to, and what nodes are beside their drivers, one claim a test.

#![allow(unreachable_pub, missing_debug_implementations, missing_docs, dead_code)]

mod kit;

use driveline_graph::{NewBitmap, RootOptions};
use kit::Bench;
use serde_json::json;
use std::sync::atomic::Ordering::SeqCst;

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

/// A driver may write when it opens and take that back when it is closed (so did qcow2 with its bitmaps). Only a change that
/// failed in the middle of being made closed what it had opened; every error before that just dropped it.
#[test]
fn what_a_change_opened_is_closed_whatever_becomes_of_it() {
    let bench = Bench::new();
    let closed = || bench.closed.load(SeqCst);
    let node = |options: serde_json::Value| bench.graph.parse(options.as_object().unwrap().clone(), &[]);
    let memory = |name| node(json!({ "driver": "memory", "node-name": name }));

    // The second of two, and any later edit.
    let two = json!([{ "driver": "memory", "node-name": "a" }, { "driver": "memory", "node-name": "b", "size": "x", "no": 1 }]);
    bench.add(two).unwrap_err();
    assert_eq!(closed(), 1, "before the error is told");
    let gone = bench.run(async {
        let mut change = bench.graph.change().await;
        let edits = async {
            change
                .add_nodes(vec![
                    memory("a")?,
                    node(json!({ "driver": "overlay", "file": { "driver": "memory" } }))?,
                ])
                .await?;
            change.set_drive("vda", "missing")
        };
        let edits = edits.await;
        change.commit_if(edits).await
    });
    assert_eq!((gone.unwrap_err().kind(), closed()), (driveline_graph::Kind::NotFound, 4));

    // Dropped: the next change does it, or the end.
    let forget = || {
        bench.run(async {
            let mut change = bench.graph.change().await;
            change.add_node(memory("a").unwrap()).await.unwrap();
        });
    };
    forget();
    assert_eq!(closed(), 4);
    bench.add(json!([{ "driver": "memory", "node-name": "a" }])).unwrap();
    assert_eq!(closed(), 5);
    bench.change(|change| change.remove_node("a")).unwrap();
    forget();
    bench.run(bench.graph.close()).unwrap();
    assert_eq!(closed(), 7);

    // Taken out again before it was made.
    bench.run(async {
        let mut change = bench.graph.change().await;
        change.add_node(memory("a").unwrap()).await.unwrap();
        change.remove_node("a").unwrap();
        change.commit().await.unwrap();
    });
    assert_eq!((closed(), bench.graph.nodes().len()), (8, 0));
}

fn writes(bench: &Bench, root: &driveline_graph::Root, data: &[u8], flags: u32) -> Vec<String> {
    bench.run(root.write(4096, data, flags)).unwrap();
    bench.take_log()
}

#[test]
fn zeroes_are_detected_where_that_is_asked_for_and_written_as_they_are_elsewhere() {
    for (options, expected) in [
        (json!({}), "write 4096+8192 flags 0"),
        (json!({ "detect-zeroes": "on" }), "write_zeroes 4096+8192 flags 0"),
        (json!({ "detect-zeroes": "unmap", "discard": "unmap" }), "write_zeroes 4096+8192 flags 4"),
    ] {
        let bench = Bench::new();
        let mut node = json!({ "driver": "memory", "node-name": "disk" });
        node.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
        bench.add(json!([node])).unwrap();
        let root = bench.root("disk");
        assert_eq!(writes(&bench, &root, &[0; 8192], 0), [expected], "{options}");
        // One byte anywhere is data.
        for at in [0, 63, 64, 4095, 4159, 8191] {
            let mut data = [0; 8192];
            data[at] = 1;
            assert_eq!(writes(&bench, &root, &data, 0), ["write 4096+8192 flags 0"], "{at}");
        }
    }
    let bench = Bench::new();
    let wrong = json!([{ "driver": "memory", "node-name": "disk", "detect-zeroes": "unmap" }]);
    assert!(bench.add(wrong).unwrap_err().to_string().contains("without setting discard operation to unmap"));
}

#[test]
fn discards_and_flushes_end_where_they_are_not_wanted() {
    let bench = Bench::new();
    bench
        .add(
            json!([{ "driver": "memory", "node-name": "disk", "discard": "ignore", "cache.no-flush": true }]),
        )
        .unwrap();
    let root = bench.root("disk");
    bench.run(root.discard(0..4096, 0)).unwrap();
    bench.run(root.flush()).unwrap();
    assert!(bench.take_log().is_empty());
    let (fua, unmap) = (driveline_op::flag::FUA, driveline_op::flag::MAY_UNMAP);
    bench.run(root.write_zeroes(0..4096, unmap | fua)).unwrap();
    assert_eq!(bench.take_log(), ["write_zeroes 0+4096 flags 0"]);
    assert_eq!(writes(&bench, &root, &[1; 512], fua), ["write 4096+512 flags 0"]);
}

#[test]
fn a_discard_that_is_ignored_is_in_no_bitmap_and_not_even_behind_a_filter_that_is_put_in_front() {
    let bench = Bench::new();
    for (node, discard, dirty) in [("a", "ignore", vec![]), ("b", "unmap", vec![(0, 65536)])] {
        bench.add(json!([{ "driver": "memory", "node-name": node, "discard": discard }])).unwrap();
        bench.change(|change| change.set_drive(&format!("drive-{node}"), node)).unwrap();
        bench.change(|change| change.add_bitmap(node, NewBitmap::named("b"))).unwrap();
        let filter = format!("filter-{node}");
        bench.insert("holder", &filter, node).unwrap();
        bench.change(|change| change.add_bitmap(&filter, NewBitmap::named("b"))).unwrap();
        let root = bench.root(&format!("drive-{node}"));
        bench.run(root.discard(0..4096, 0)).unwrap();
        assert_eq!((bench.dirty(node, "b"), bench.dirty(&filter, "b")), (dirty.clone(), dirty));
        bench.run(root.write_zeroes(0..4096, driveline_op::flag::MAY_UNMAP)).unwrap();
        assert_eq!(bench.dirty(node, "b"), [(0, 65536)]);
    }
}

#[test]
fn a_write_behind_the_threshold_is_told_once() {
    let bench = Bench::new();
    bench.add(json!([{ "driver": "memory", "node-name": "disk" }])).unwrap();
    let told = std::sync::Arc::new(parking_lot::Mutex::new(Vec::new()));
    let heard = told.clone();
    bench.graph.on_event(move |event| {
        if let driveline_graph::Event::WriteThreshold { node, exceeded, threshold } = event {
            heard.lock().push((node.to_string(), *exceeded, *threshold));
        }
    });
    let root = bench.root("disk");
    bench.change(|change| change.set_write_threshold("disk", 8192)).unwrap();
    assert_eq!(bench.graph.node("disk").unwrap().write_threshold(), 8192);
    bench.run(root.write(4096, &[1; 4096], 0)).unwrap();
    assert!(told.lock().is_empty(), "it ends at the threshold, not behind it");
    bench.run(root.write(4096, &[1; 4608], 0)).unwrap();
    bench.run(root.write(65536, &[1; 512], 0)).unwrap();
    assert_eq!(*told.lock(), [("disk".to_owned(), 512, 8192)]);
    assert_eq!(bench.graph.node("disk").unwrap().write_threshold(), 0);
}

fn reopen(bench: &Bench, options: serde_json::Value) -> driveline_graph::Result<()> {
    bench.change(|change| {
        let definition = change.parse(options.as_object().unwrap().clone())?;
        change.reopen(definition)
    })
}

#[test]
fn a_filter_is_reopened_beside_the_old_instance_and_keeps_bitmaps_and_parents() {
    let bench = Bench::new();
    bench
        .add(json!([{ "driver": "memory", "node-name": "a" }, { "driver": "memory", "node-name": "b" }]))
        .unwrap();
    bench.add(json!([{ "driver": "pass", "node-name": "filter", "child": "a" }])).unwrap();
    bench.change(|change| change.set_drive("vda", "filter")).unwrap();
    bench.change(|change| change.add_bitmap("filter", driveline_graph::NewBitmap::named("daily"))).unwrap();
    let root = bench.root("vda");
    bench.run(root.write(0, &[1; 512], 0)).unwrap();
    let closed = bench.closed.load(std::sync::atomic::Ordering::SeqCst);

    reopen(&bench, json!({ "driver": "pass", "node-name": "filter", "child": "b", "detect-zeroes": "on" }))
        .unwrap();
    assert_eq!(bench.closed.load(std::sync::atomic::Ordering::SeqCst), closed + 1, "the old one is closed");
    assert_eq!(&*bench.graph.view_node("filter").unwrap().children[0].node, "b");
    bench.run(root.write(1 << 19, &[2; 512], 0)).unwrap();
    assert_eq!(bench.bytes(&root, 0..512)[..], [0; 512], "what is read is the other child's");
    assert_eq!(bench.dirty("filter", "daily"), [(0, 65536), (1 << 19, (1 << 19) + 65536)]);

    for (options, expected) in [
        (
            json!({ "driver": "deny", "node-name": "filter", "child": "b" }),
            "Cannot change the option 'driver'",
        ),
        (json!({ "driver": "memory", "node-name": "b", "size": 512 }), "Cannot change the option 'size'"),
        (json!({ "driver": "pass", "node-name": "filter", "child": "filter" }), "would create a cycle"),
        (json!({ "driver": "pass", "node-name": "filter", "child": { "driver": "memory" } }), "child.driver"),
        (json!({ "driver": "memory", "node-name": "b", "read-only": true }), "it is read-only, and"),
    ] {
        let text = reopen(&bench, options).unwrap_err().to_string();
        assert!(text.contains(expected), "{text}");
    }
    assert_eq!(&*bench.graph.view_node("filter").unwrap().children[0].node, "b");
    bench.run(root.write(0, &[3; 512], 0)).unwrap();
}

#[test]
fn an_inactive_node_takes_no_writes_until_it_is_active_again() {
    let bench = Bench::new();
    bench.add(json!([{ "driver": "memory", "node-name": "disk" }])).unwrap();
    bench.add(json!([{ "driver": "overlay", "node-name": "top", "file": "disk" }])).unwrap();
    let error = bench.change(|change| change.set_active("disk", false)).unwrap_err();
    assert_eq!(error.message(), "Node has active parent node");
    let writer = bench.root("top");
    let error = bench.change(|change| change.set_active("top", false)).unwrap_err();
    assert!(error.message().starts_with("it is inactive, and a guest needs write"), "{error}");
    drop(writer);
    bench.change(|change| change.set_active("top", false)).unwrap();
    assert!(!bench.graph.view_node("disk").unwrap().common.active, "what is below goes with it");
    assert_eq!(bench.graph.view_node("disk").unwrap().needs, driveline_graph::Permissions::NONE);
    let open = bench.graph.open_root("top", RootOptions::writer("a guest"));
    assert!(bench.run(open).unwrap_err().message().contains("inactive"));
    let error = bench.add(json!([{ "driver": "pass", "node-name": "f", "child": "top" }])).unwrap_err();
    assert!(error.message().contains("Inactive 'top' can't be a child child of active 'f'"), "{error}");
    bench.change(|change| change.set_active("top", true)).unwrap();
    bench.run(bench.root("top").write(0, &[1; 512], 0)).unwrap();
}

#[test]
fn a_user_is_given_another_node_under_load() {
    let bench = Bench::new();
    bench
        .add(json!([{ "driver": "memory", "node-name": "a" }, { "driver": "memory", "node-name": "b" }]))
        .unwrap();
    let user = RootOptions::writer("export 'e'");
    let root = bench.run(bench.graph.open_following_root("a", user)).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let written = std::thread::scope(|scope| {
        let guest = scope.spawn(|| {
            let mut written = 0_u64;
            while !stop.load(std::sync::atomic::Ordering::SeqCst) {
                bench.run(root.write(written % 128 * 512, &[1; 512], 0)).unwrap();
                written += 1;
            }
            written
        });
        for round in 0..200 {
            let node = if round % 2 == 0 { "b" } else { "a" };
            bench.change(|change| change.replace_under_user("export 'e'", node)).unwrap();
            assert_eq!(&*root.node_name(), node);
        }
        stop.store(true, std::sync::atomic::Ordering::SeqCst);
        guest.join().unwrap()
    });
    let log = bench.take_log();
    assert_eq!(log.len() as u64, written, "every write arrived once");
    assert!(bench.change(|change| change.replace_under_user("export 'x'", "a")).is_err());
}

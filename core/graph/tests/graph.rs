//! What a graph must hold, one claim a test.

#![allow(unreachable_pub, missing_debug_implementations, missing_docs, dead_code)]

mod kit;

use driveline_bitmap::View;
use driveline_graph::{Event, Kind, NewBitmap, Permissions, RootOptions};
use driveline_op::{Ask, Buffer, flag, op};
use kit::Bench;
use parking_lot::Mutex;
use serde_json::json;
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::SeqCst},
};

fn drive(nodes: serde_json::Value, root: &str) -> Bench {
    let bench = Bench::new();
    bench.add(nodes).unwrap();
    bench.change(|change| change.set_drive("vda", root)).unwrap();
    bench
}

fn memory() -> Bench {
    drive(json!([{ "driver": "memory", "node-name": "disk" }]), "disk")
}

fn bitmap(name: &str, view: View) -> NewBitmap {
    NewBitmap { granularity: Some(4096), view, ..NewBitmap::named(name) }
}

// ---- names and shapes

#[test]
fn what_cannot_be_is_refused_with_the_names_it_is_about() {
    let bench = memory();
    let text = |nodes| bench.add(nodes).unwrap_err().to_string();
    assert_eq!(
        text(json!([{ "driver": "memroy", "node-name": "a" }])),
        "node 'a': option 'driver': unknown driver 'memroy'; did you mean 'memory'?"
    );
    assert_eq!(
        text(json!([{ "driver": "pass", "node-name": "a" }])),
        "node 'a': option 'child': missing; driver 'pass' needs this child"
    );
    assert_eq!(
        text(json!([{ "driver": "pass", "node-name": "a", "child": "dsk" }])),
        "node 'a': option 'child': there is no node 'dsk'; did you mean 'disk'?"
    );
    assert_eq!(
        text(json!([{ "driver": "memory", "node-name": "disk" }])),
        "node 'disk': the name 'disk' is taken"
    );
    assert_eq!(
        text(json!([{ "driver": "memory", "node-name": "vda" }])),
        "node 'vda': the name 'vda' is taken"
    );
    assert_eq!(
        text(json!([{ "driver": "memory", "node-name": "1st" }])),
        "'1st' cannot be a name; expected a letter, then letters, digits, '-', '.' and '_', at most 127"
    );
    assert_eq!(
        text(json!([{ "driver": "memory", "node-name": "a", "sise": 5 }])),
        "node 'a': option 'sise': unknown option"
    );
    assert_eq!(
        text(
            json!([{ "driver": "pass", "node-name": "a", "child": "b" }, { "driver": "pass", "node-name": "b", "child": "a" }])
        ),
        "a cycle of nodes: a -> b -> a"
    );
    assert_eq!(bench.graph.nodes().len(), 1, "nothing was added by any of these");
}

#[test]
fn a_cycle_by_re_pointing_a_child_is_refused() {
    let bench = memory();
    bench.insert("pass", "low", "vda").unwrap();
    bench.insert("pass", "high", "vda").unwrap();
    let error = bench.change(|change| change.set_child("low", "child", Some("high"))).unwrap_err();
    assert_eq!(error.to_string(), "a cycle of nodes: high -> low -> high");
}

#[test]
fn a_node_in_use_is_not_removed_and_its_users_are_named() {
    let bench = memory();
    bench.insert("pass", "limit", "disk").unwrap();
    let error = bench.change(|change| change.remove_node("disk")).unwrap_err();
    assert_eq!(error.to_string(), "node 'disk': it is in use by node 'limit' (as its 'child')");
    let error = bench.change(|change| change.remove_node("limit")).unwrap_err();
    assert_eq!(error.to_string(), "node 'limit': it is in use by drive 'vda'");
}

#[test]
fn implicit_nodes_go_with_their_parent_and_are_closed_once() {
    let bench = Bench::new();
    bench.add(json!([{ "driver": "pass", "node-name": "top", "child": { "driver": "memory" } }])).unwrap();
    assert_eq!(bench.graph.nodes().len(), 2);
    bench.change(|change| change.remove_node("top")).unwrap();
    assert_eq!((bench.graph.nodes().len(), bench.closed.load(SeqCst)), (0, 2));
}

#[test]
fn a_failed_change_closes_what_it_opened_and_leaves_nothing() {
    let bench = memory();
    let error = bench.add(json!([{ "driver": "memory", "node-name": "a" }, { "driver": "pass", "node-name": "b", "child": "none" }]));
    assert!(error.is_err());
    assert_eq!(bench.graph.nodes().len(), 1);
}

// ---- permissions

#[test]
fn a_conflict_names_both_users_and_the_permission() {
    let bench = drive(
        json!([{ "driver": "overlay", "node-name": "image", "file": { "driver": "memory", "node-name": "disk" } }]),
        "image",
    );
    let error = bench.run(bench.graph.open_root("disk", RootOptions::writer("export 'raw'"))).unwrap_err();
    assert_eq!(error.kind(), Kind::NotPermitted);
    assert_eq!(
        error.to_string(),
        "node 'disk': export 'raw' needs 'write', which node 'image' (as its 'file') does not share"
    );
}

#[test]
fn a_read_only_node_has_no_writers() {
    let bench = drive(json!([{ "driver": "memory", "node-name": "disk", "read-only": true }]), "disk");
    let error = bench.run(bench.graph.open_root("vda", RootOptions::writer("export 'vda'"))).unwrap_err();
    assert_eq!(error.to_string(), "node 'disk': it is read-only, and export 'vda' needs write");
}

#[test]
fn a_root_may_do_only_what_it_said() {
    let bench = memory();
    let reader = bench.run(bench.graph.open_root("vda", RootOptions::reader("a reader"))).unwrap();
    assert_eq!(bench.run(reader.write(0, &[1], 0)).unwrap_err().kind(), Kind::NotPermitted);
    assert_eq!(bench.take_log(), [""; 0], "nothing reached the disk");
}

#[test]
fn requests_outside_the_node_are_refused_and_overflow_is_no_way_in() {
    let bench = memory();
    let root = bench.root("vda");
    for offset in [1 << 20, (1 << 20) - 1, u64::MAX, u64::MAX - 1] {
        assert!(bench.run(root.write(offset, &[1, 2], 0)).is_err());
        let ask = Ask { op: op::DISCARD, offset, length: 2, ..Ask::default() };
        assert!(bench.run(root.submit(ask, Buffer::default())).result.is_err());
    }
    assert!(bench.take_log().is_empty());
}

// ---- fitting

#[test]
fn unaligned_and_long_requests_are_made_to_fit() {
    let bench = drive(
        json!([{ "driver": "memory", "node-name": "disk", "alignment": 512, "transfer-max": 1024 }]),
        "disk",
    );
    let root = bench.root("vda");
    let data: Vec<u8> = (0..3000).map(|i| i as u8).collect();
    bench.run(root.write(100, &data, 0)).unwrap();
    assert_eq!(
        bench.take_log(),
        [
            "read 0+512 flags 0",
            "write 0+512 flags 0",
            "read 3072+512 flags 0",
            "write 3072+512 flags 0",
            "write 512+1024 flags 0",
            "write 1536+1024 flags 0",
            "write 2560+512 flags 0"
        ]
    );
    assert_eq!(bench.bytes(&root, 100..3100)[..], data[..]);
    bench.run(root.write_zeroes(200..1000, 0)).unwrap();
    let found = bench.bytes(&root, 0..1100);
    assert!(
        found[200..1000].iter().all(|b| *b == 0)
            && found[1000..1100] == data[900..1000]
            && found[199] == data[99]
    );
}

// ---- lower, never bypass

#[test]
fn an_operation_newer_than_a_filter_arrives_as_ones_it_knows() {
    let bench = memory();
    bench.insert("old", "old", "vda").unwrap();
    let root = bench.root("vda");
    bench.take_log();
    bench.run(root.write_zeroes(0..8192, 0)).unwrap();
    assert_eq!(bench.take_log(), ["old.write 0+8192", "write 0+8192 flags 0"], "zeroes become a write");
    bench.run(root.discard(0..4096, 0)).unwrap();
    assert!(bench.take_log().is_empty(), "a discard becomes nothing");
    let found = bench.run(root.block_status(0..8192)).unwrap();
    assert_eq!((found.length, found.flags), (8192, driveline_op::status::DATA), "an extent is data");
    let fast = bench.run(root.write_zeroes(0..4096, flag::NO_FALLBACK)).unwrap_err();
    assert_eq!(fast.kind(), Kind::NotSupported, "what must be fast is refused");
    assert!(bench.take_log().is_empty());
}

/// A flag that only says how is no reason to refuse, but a filter that never heard of it must not meet it.
#[test]
fn a_flag_newer_than_a_filter_is_taken_away_before_it() {
    for (driver, seen) in [("status-before-1-2", 0), ("status", flag::PRECISE)] {
        let bench = memory();
        bench.insert(driver, "filter", "vda").unwrap();
        let root = bench.root("vda");
        bench.take_log();
        let ask = Ask { op: op::BLOCK_STATUS, length: 4096, flags: flag::PRECISE, ..Ask::default() };
        bench.run(root.submit(ask, Buffer::default())).result.unwrap();
        let expected =
            [format!("filter.block_status flags {seen}"), format!("block_status 0+4096 flags {seen}")];
        assert_eq!(bench.take_log(), expected);
    }
}

#[test]
fn what_a_filter_left_out_passes_or_is_emulated_as_its_author_said() {
    let bench = memory();
    bench.insert("pass", "pass", "vda").unwrap();
    let root = bench.root("vda");
    bench.run(root.write_zeroes(0..4096, 0)).unwrap();
    assert_eq!(bench.take_log(), ["write_zeroes 0+4096 flags 0"]);
    bench.insert("deny", "deny", "vda").unwrap();
    bench.run(root.write_zeroes(0..4096, 0)).unwrap();
    assert_eq!(bench.take_log(), ["deny.write 0+4096", "pass.write 0+4096", "write 0+4096 flags 0"]);
    bench.run(root.flush()).unwrap();
    assert_eq!(bench.take_log(), ["flush"], "a flush always passes");
    bench.insert("read-only-deny", "closed", "vda").unwrap();
    assert_eq!(bench.run(root.write(0, &[1], 0)).unwrap_err().kind(), Kind::NotSupported);
    assert_eq!(bench.run(root.write_zeroes(0..1, 0)).unwrap_err().kind(), Kind::NotSupported);
    assert!(bench.take_log().is_empty());
}

#[test]
fn a_panic_is_an_io_error_that_marks_the_node_as_failed() {
    let bench = memory();
    bench.insert("panic", "broken", "vda").unwrap();
    let events = Arc::new(Mutex::new(Vec::new()));
    let seen = events.clone();
    bench.graph.on_event(move |event| seen.lock().push(event.clone()));
    let root = bench.root("vda");
    std::panic::set_hook(Box::new(|_| {}));
    let error = bench.run(root.write(0, &[1], 0)).unwrap_err();
    let _ = std::panic::take_hook();
    assert_eq!((error.kind(), error.errno_code()), (Kind::Io, 5));
    assert_eq!(bench.graph.node("broken").unwrap().failure().as_deref(), Some("I cannot write"));
    let failed = Event::NodeFailed { node: "broken".into(), message: "I cannot write".into() };
    assert!(events.lock().contains(&failed));
    assert_eq!(bench.bytes(&root, 0..1)[..], [0], "reads still work");
}

// ---- bitmaps

#[test]
fn unchanged_writes_never_dirty_however_many_filters_lie_between() {
    let bench = memory();
    for name in ["a", "b", "c"] {
        bench.insert("pass", name, "vda").unwrap();
    }
    bench.insert("populate", "cor", "vda").unwrap();
    for (node, view) in [("disk", View::Node), ("b", View::Drive), ("c", View::Node)] {
        bench.change(|change| change.add_bitmap(node, bitmap("seen", view))).unwrap();
    }
    let root = bench.root("vda");
    bench.bytes(&root, 0..8192);
    assert!(bench.take_log().contains(&format!("write 0+8192 flags {}", flag::UNCHANGED)), "it did write");
    for node in ["disk", "b", "c"] {
        assert_eq!(bench.dirty(node, "seen"), [], "{node}");
    }
    bench.run(root.write(4096, &[1], 0)).unwrap();
    for node in ["disk", "b", "c"] {
        assert_eq!(bench.dirty(node, "seen"), [(4096, 8192)], "{node}");
    }
}

#[test]
fn plain_and_failed_writes_zeroes_and_discards_dirty_before_they_are_answered() {
    let bench = memory();
    bench.insert("panic", "broken", "vda").unwrap();
    bench.change(|change| change.add_bitmap("vda", bitmap("daily", View::Drive))).unwrap();
    let root = bench.root("vda");
    std::panic::set_hook(Box::new(|_| {}));
    assert!(bench.run(root.write(0, &[1], 0)).is_err());
    let _ = std::panic::take_hook();
    assert_eq!(bench.dirty("vda", "daily"), [(0, 4096)], "nobody knows what a failed write left");
    bench.run(root.write_zeroes(8192..8193, 0)).unwrap();
    bench.run(root.discard(16384..16385, 0)).unwrap();
    assert_eq!(bench.dirty("vda", "daily"), [(0, 4096), (8192, 12288), (16384, 20480)]);
}

#[test]
fn a_scope_says_from_where_upwards_nothing_changes() {
    let bench = memory();
    bench.insert("pass", "middle", "vda").unwrap();
    bench.insert("pass", "top", "vda").unwrap();
    for (node, name, view) in [
        ("top", "t", View::Node),
        ("middle", "m", View::Node),
        ("disk", "n", View::Node),
        ("disk", "d", View::Drive),
    ] {
        bench.change(|change| change.add_bitmap(node, bitmap(name, view))).unwrap();
    }
    let scope = bench.graph.node("middle").unwrap().id().0;
    let root = bench.root("vda");
    let ask = Ask { op: op::WRITE, flags: flag::UNCHANGED, scope, ..Ask::default() };
    bench.run(root.submit(ask, Buffer::new(512))).result.unwrap();
    assert_eq!(
        (bench.dirty("top", "t"), bench.dirty("middle", "m")),
        (vec![], vec![]),
        "the scope and above ignore it"
    );
    assert_eq!(bench.dirty("disk", "n"), [(0, 4096)], "below, a node's bitmap records it");
    assert_eq!(bench.dirty("disk", "d"), [], "below, a drive's bitmap does not: no drive has changed");
}

#[test]
fn bitmaps_move_with_their_identity_and_a_parked_one_is_found_at_home() {
    let bench = memory();
    bench.change(|change| change.add_bitmap("vda", bitmap("daily", View::Drive))).unwrap();
    let root = bench.root("vda");
    bench.run(root.write(0, &[1], 0)).unwrap();
    let handle = bench.graph.bitmap("vda", "daily").unwrap();
    bench.insert("holder", "holder", "vda").unwrap();
    bench.change(|change| change.park_bitmap(&handle, "holder")).unwrap();
    assert_eq!(bench.graph.bitmap("disk", "daily").unwrap().id(), handle.id());
    assert_eq!(bench.graph.bitmap("vda", "daily").unwrap().id(), handle.id());
    assert_eq!(&*bench.graph.bitmap_places("disk").unwrap()[0].0, "holder");
    let taken = bench.change(|change| change.add_bitmap("disk", bitmap("daily", View::Drive))).unwrap_err();
    assert_eq!(taken.kind(), Kind::Exists);
    bench.run(root.write(8192, &[1], 0)).unwrap();
    let error = bench.change(|change| change.remove_filter("holder")).unwrap_err();
    assert_eq!(error.to_string(), "node 'holder': it has bitmaps ('daily'); move or remove them first");
    bench
        .change(|change| {
            change.bring_home("holder", "daily", "vda")?;
            change.remove_emptied_filter("holder")
        })
        .unwrap();
    assert_eq!((handle.bits().dirty_bytes(), bench.graph.nodes().len()), (8192, 1));
    assert_eq!(&*bench.graph.bitmap_places("vda").unwrap()[0].0, "disk");
}

/// A job's own bitmap says what it still has to copy. Whoever else cleared it had the job leave that out.
#[test]
fn a_bitmap_that_its_owner_keeps_busy_goes_with_him_alone_and_is_his_again_if_it_stays() {
    let bench = memory();
    bench.change(|change| change.add_bitmap("vda", bitmap("own", View::Node))).unwrap();
    let own = bench.graph.bitmap("vda", "own").unwrap();
    let used = Arc::new(Mutex::new(Some(own.begin_use("job 'm'").unwrap())));
    let refused = bench.change(|change| change.clear_bitmap("vda", "own")).unwrap_err();
    assert!(refused.to_string().contains("in use by job 'm'"), "{refused}");
    bench.change(|change| change.remove_bitmap("vda", "own")).unwrap_err();
    let failed = bench.change(|change| {
        change.remove_own_bitmap("vda", &used, "job 'm'")?;
        change.clear_bitmap("vda", "none")
    });
    assert_eq!(failed.unwrap_err().kind(), Kind::NotFound);
    assert_eq!((own.users(), bench.graph.bitmap("vda", "own").is_ok()), (vec!["job 'm'".to_owned()], true));
    bench.change(|change| change.remove_own_bitmap("vda", &used, "job 'm'")).unwrap();
    assert!(bench.graph.bitmap("vda", "own").is_err() && !own.is_busy());
}

#[test]
fn a_transaction_is_made_whole_or_not_at_all() {
    let bench = memory();
    bench.change(|change| change.add_bitmap("vda", bitmap("a", View::Drive))).unwrap();
    let root = bench.root("vda");
    bench.run(root.write(0, &[1], 0)).unwrap();
    let result = bench.change(|change| {
        change.clear_bitmap("vda", "a")?;
        change.rename_bitmap("vda", "a", "b")?;
        change.disable_bitmap("vda", "b")?;
        change.add_bitmap("vda", bitmap("c", View::Drive))?;
        change.resize("vda", 2 << 20)?;
        change.merge_bitmaps("vda", "c", vec![("vda".into(), "none".into())])
    });
    assert_eq!(result.unwrap_err().kind(), Kind::NotFound);
    let names: Vec<_> = bench.graph.bitmaps("vda").unwrap().iter().map(|b| b.name().to_string()).collect();
    let a = bench.graph.bitmap("vda", "a").unwrap();
    assert_eq!((names, a.is_recording(), root.info().size_bytes), (vec!["a".to_owned()], true, 1 << 20));
    assert_eq!(bench.dirty("vda", "a"), [(0, 4096)]);
}

#[test]
fn a_resize_reaches_every_parent_and_grown_area_is_dirty_for_the_drive_only() {
    let bench = memory();
    bench.insert("pass", "limit", "vda").unwrap();
    bench.insert("pass", "upper", "vda").unwrap();
    bench
        .change(|change| {
            change.add_bitmap("vda", bitmap("drive", View::Drive))?;
            change.add_bitmap("limit", bitmap("node", View::Node))
        })
        .unwrap();
    let root = bench.root("vda");
    bench.change(|change| change.resize("vda", (1 << 20) + 10_000)).unwrap();
    assert_eq!(root.info().size_bytes, (1 << 20) + 10_000);
    for node in ["disk", "limit", "upper"] {
        assert_eq!(bench.graph.node(node).unwrap().info().size_bytes, (1 << 20) + 10_000, "{node}");
    }
    assert_eq!(bench.dirty("vda", "drive"), [(1 << 20, (1 << 20) + 10_000)]);
    assert_eq!(bench.dirty("limit", "node"), []);
    bench.run(root.write(1 << 20, &[1], 0)).unwrap();
    bench.change(|change| change.resize("vda", 4096)).unwrap();
    assert_eq!(bench.dirty("vda", "drive"), []);
}

#[test]
fn a_resize_that_a_user_does_not_share_is_refused_by_his_name() {
    let bench = memory();
    let mut options = RootOptions::writer("job 'stream0'");
    options.shares = Permissions::ALL.without(Permissions::RESIZE);
    let _job = bench.run(bench.graph.open_root("disk", options)).unwrap();
    let error = bench.change(|change| change.resize("vda", 4096)).unwrap_err();
    assert_eq!(error.to_string(), "node 'disk': job 'stream0' does not share 'resize'");
}

#[test]
fn a_node_below_an_overlay_is_resized_only_while_nobody_uses_the_overlay() {
    // After a commit into its backing an overlay is still there, and in nobody's way.
    let bench = memory();
    bench
        .add(serde_json::json!([
            { "driver": "memory", "node-name": "of", "size": 1 << 20 },
            { "driver": "overlay", "node-name": "over", "file": "of", "backing": "disk" },
        ]))
        .unwrap();
    bench.insert("pass", "between", "disk").unwrap();
    bench.change(|change| change.resize("vda", 2 << 20)).unwrap();
    assert_eq!(bench.graph.node("disk").unwrap().info().size_bytes, 2 << 20);
    let reader = bench.run(bench.graph.open_root("over", RootOptions::reader("a reader"))).unwrap();
    let error = bench.change(|change| change.resize("vda", 1 << 20)).unwrap_err();
    assert_eq!(error.to_string(), "node 'disk': node 'over' (as its 'backing') does not share 'resize'");
    bench.run(reader.close()).unwrap();
    bench.change(|change| change.resize("vda", 1 << 20)).unwrap();
}

// ---- changes under load

#[test]
fn filters_come_and_go_under_load_and_no_request_is_lost_or_fails() {
    let bench = memory();
    bench.change(|change| change.add_bitmap("vda", bitmap("daily", View::Drive))).unwrap();
    let root = bench.root("vda");
    let stop = std::sync::atomic::AtomicBool::new(false);
    let written = std::thread::scope(|scope| {
        let guests: Vec<_> = (0..2u64)
            .map(|guest| {
                let (root, stop) = (root.clone(), &stop);
                scope.spawn(move || {
                    let mut count = 0u64;
                    while !stop.load(SeqCst) {
                        let offset = (count % 100 * 2 + guest) * 512;
                        let data = [(count % 251) as u8; 512];
                        futures::executor::block_on(async {
                            root.write(offset, &data, 0).await.unwrap();
                            assert_eq!(root.read(offset..offset + 512).await.unwrap()[..], data);
                        });
                        count += 1;
                    }
                    count
                })
            })
            .collect();
        for turn in 0..300 {
            bench.insert("pass", &format!("f{turn}"), if turn % 2 == 0 { "vda" } else { "disk" }).unwrap();
            if turn >= 3 {
                bench.change(|change| change.remove_filter(&format!("f{}", turn - 3))).unwrap();
            }
            bench.log.lock().clear();
        }
        stop.store(true, SeqCst);
        guests.into_iter().map(|guest| guest.join().unwrap()).min().unwrap()
    });
    assert!(written > 0, "the guests got on");
    assert_eq!(bench.dirty("vda", "daily"), [(0, 200 * 512)]);
}

#[test]
fn a_filter_that_cannot_be_inserted_live_is_refused_above_a_node_in_use() {
    let bench = memory();
    let error = bench.insert("not-live", "f", "vda").unwrap_err();
    assert_eq!(error.to_string(), "filter 'not-live' says that it cannot be inserted above a node in use");
}

#[test]
fn a_root_on_a_drive_follows_it_and_one_on_a_node_stays() {
    let bench = memory();
    let (guest, job) =
        (bench.root("vda"), bench.run(bench.graph.open_root("disk", RootOptions::reader("job"))).unwrap());
    bench.insert("pass", "limit", "disk").unwrap();
    assert_eq!((&*guest.node_name(), &*job.node_name()), ("limit", "disk"));
    bench.take_log();
    bench.bytes(&job, 0..512);
    assert_eq!(bench.take_log(), ["read 0+512 flags 0"], "the job goes under the filter");
    bench.bytes(&guest, 0..512);
    assert_eq!(bench.take_log(), ["limit.read", "read 0+512 flags 0"]);
}

#[test]
fn a_locked_range_keeps_guests_out_but_not_its_owner() {
    use futures::FutureExt;
    let bench = memory();
    let mut options = RootOptions::writer("job");
    options.locks = true;
    let job = bench.run(bench.graph.open_root("disk", options)).unwrap();
    let guest = bench.root("vda");
    bench.run(async {
        let unit = job.enter().await;
        let lock = unit.lock(0..4096).await;
        let mut write = Box::pin(guest.write(4000, &[7; 200], 0));
        assert!(write.as_mut().now_or_never().is_none(), "it waits");
        guest.write(4096, &[1], 0).now_or_never().expect("beside it nobody waits").unwrap();
        let ask = Ask { op: op::WRITE, ..Ask::default() };
        unit.submit(ask, Buffer::new(4096)).await.result.unwrap();
        drop(lock);
        write.await.unwrap();
        assert_eq!(guest.read(4000..4001).await.unwrap()[..], [7], "the guest's write is the later one");
    });
}

#[test]
fn who_enters_two_roots_holds_neither_while_he_waits() {
    use futures::FutureExt;
    let bench = memory();
    bench.add(json!([{ "driver": "memory", "node-name": "other" }])).unwrap();
    let (a, b) = (bench.root("disk"), bench.root("other"));
    bench.run(async {
        let busy = b.enter().await;
        let mut change = Box::pin(async {
            let mut change = bench.graph.change().await;
            change.add_bitmap("other", bitmap("x", View::Node)).unwrap();
            change.commit().await
        });
        assert!(change.as_mut().now_or_never().is_none(), "it waits for the unit inside");
        let mut both = Box::pin(a.enter_both(&b));
        assert!(both.as_mut().now_or_never().is_none());
        assert_eq!(a.in_flight(), 0, "a drain of the first root would not wait for it");
        drop(busy);
        change.await.unwrap();
        both.await;
    });
}

#[test]
fn a_bitmap_of_a_file_records_what_is_written_behind_its_end() {
    let file = json!({ "driver": "memory", "node-name": "disk", "size": 4096 });
    let bench = drive(json!([{ "driver": "growing", "node-name": "image", "file": file }]), "image");
    bench.change(|change| change.add_bitmap("disk", bitmap("node", View::Node))).unwrap();
    bench.run(bench.root("image").write(0, &[1], 0)).unwrap();
    assert_eq!(bench.dirty("disk", "node"), [(4096, 4097)]);
}

/// Two threads wrote behind the end of a file at once. Both saw the old length; the one whose write ended lower was the later
/// one, made the bitmap shorter again, and so dropped the other one's mark.
#[test]
fn what_several_threads_write_behind_the_end_of_a_file_is_all_recorded() {
    const THREADS: u64 = 2;
    const END: u64 = 2 << 20;
    for _ in 0..16 {
        let file = json!({ "driver": "memory", "node-name": "disk", "size": END });
        let bench = drive(json!([{ "driver": "growing", "node-name": "image", "file": file }]), "image");
        let node = NewBitmap { granularity: Some(512), ..bitmap("node", View::Node) };
        bench.change(|change| change.add_bitmap("disk", node)).unwrap();
        let (root, arrived) = (bench.root("image"), AtomicU64::new(0));
        let write = |thread| {
            for round in 0..END / 512 / THREADS {
                let at = (round * THREADS + (round + thread) % THREADS) * 512;
                // At the same moment: a barrier would wake one after the other.
                arrived.fetch_add(1, SeqCst);
                while arrived.load(SeqCst) < (round + 1) * THREADS {
                    std::thread::yield_now();
                }
                bench.run(root.write(at, &[1; 512], 0)).unwrap();
            }
        };
        std::thread::scope(|scope| {
            (0..THREADS).for_each(|thread| {
                let write = &write;
                scope.spawn(move || write(thread));
            })
        });
        assert_eq!(bench.dirty("disk", "node"), [(END, 2 * END)]);
    }
}

#[test]
fn closing_the_graph_closes_every_node_once() {
    let bench = memory();
    bench.insert("pass", "limit", "vda").unwrap();
    bench.run(bench.graph.close()).unwrap();
    assert_eq!((bench.graph.nodes().len(), bench.closed.load(SeqCst)), (0, 2));
}

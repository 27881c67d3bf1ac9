//! Snapshots: on top and inside, alone and in transactions, under load, and what is left when one fails.

use crate::kit::{Client, World, has};
use driveline_graph::RootOptions;
use serde_json::{Value, json};
use std::{
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

const SIZE: u64 = 1 << 20;

/// An image that is made and added as a node, by QMP alone.
fn image(world: &World, client: &mut Client, name: &str, size: u64) {
    world.engine.block_on(async {
        for options in [
            json!({ "driver": "file", "filename": world.path(name), "size": 0 }),
            json!({ "driver": "qcow2", "size": size, "file": { "driver": "file", "path": world.path(name) } }),
        ] {
            let Value::Object(options) = options else { unreachable!() };
            world.graph.create(options).await.unwrap();
        }
    });
    let file = json!({ "driver": "file", "filename": world.path(name) });
    client.ok("blockdev-add", json!({ "driver": "qcow2", "node-name": name, "file": file, "backing": null }));
}

fn node(client: &mut Client, name: &str) -> Option<Value> {
    let nodes = client.ok("query-named-block-nodes", json!({}));
    nodes.as_array().unwrap().iter().find(|node| node["node-name"] == name).cloned()
}

fn contents(world: &World, node: &str) -> Vec<u8> {
    world.engine.block_on(async {
        let root = world.graph.open_root(node, RootOptions::reader("a reader")).await.unwrap();
        root.read(0..root.info().size_bytes).await.unwrap().to_vec()
    })
}

fn bitmaps(client: &mut Client, name: &str) -> Vec<(String, u64)> {
    let node = node(client, name).unwrap();
    let list = node["dirty-bitmaps"].as_array().cloned().unwrap_or_default();
    list.iter().map(|b| (b["name"].as_str().unwrap().to_owned(), b["count"].as_u64().unwrap())).collect()
}

/// What there is of nodes: names, whether they are read-only, and bitmaps.
fn shape(client: &mut Client) -> Vec<[Value; 4]> {
    let nodes = client.ok("query-named-block-nodes", json!({ "flat": true }));
    let of = |node: &Value| ["node-name", "ro", "drv", "dirty-bitmaps"].map(|key| node[key].clone());
    nodes.as_array().unwrap().iter().map(of).collect()
}

#[test]
fn a_snapshot_takes_the_drive_and_its_bitmaps_along_and_leaves_the_old_image_read_only() {
    let world = World::new();
    let mut client = world.client();
    image(&world, &mut client, "base", SIZE);
    world.drive("vda", "base");
    world.write("vda", 0, &[1; 65536]);
    client.ok("block-dirty-bitmap-add", json!({ "node": "vda", "name": "daily" }));
    client.ok("block-dirty-bitmap-add", json!({ "node": "base", "name": "mine" }));
    world.write("vda", 65536, &[2; 65536]);

    image(&world, &mut client, "over", SIZE);
    client.ok("blockdev-snapshot", json!({ "node": "base", "overlay": "over" }));
    world.write("vda", 131_072, &[3; 65536]);
    assert_eq!(bitmaps(&mut client, "over"), [("daily".to_owned(), 131_072)]);
    assert_eq!(bitmaps(&mut client, "base"), [("mine".to_owned(), 65536)]);
    let (base, over) = (node(&mut client, "base").unwrap(), node(&mut client, "over").unwrap());
    assert_eq!((&base["ro"], &over["ro"]), (&json!(true), &json!(false)));
    assert_eq!(over["backing_file_depth"], 1);
    let drive = client.ok("query-block", json!({}));
    assert_eq!(drive[0]["inserted"]["node-name"], "over");
    let mut expected = vec![0; SIZE as usize];
    expected[..65536].fill(1);
    expected[65536..131_072].fill(2);
    assert!(contents(&world, "base") == expected);
    expected[131_072..196_608].fill(3);
    assert!(contents(&world, "over") == expected);

    // The same with an image that is made for it, which names the one below.
    client.ok(
        "blockdev-snapshot-sync",
        json!({ "device": "vda", "snapshot-file": world.path("sync"), "snapshot-node-name": "sync" }),
    );
    world.write("vda", 0, &[4; 512]);
    expected[..512].fill(4);
    assert!(contents(&world, "sync") == expected);
    assert_eq!(bitmaps(&mut client, "sync"), [("daily".to_owned(), 196_608)]);
    let sync = node(&mut client, "sync").unwrap();
    assert_eq!(sync["image"]["backing-filename"], world.path("over"));
    assert_eq!(sync["image"]["backing-filename-format"], "qcow2");
    // And one that is there already, found by node-name, on which the size may differ.
    image(&world, &mut client, "grown", 2 * SIZE);
    client.ok("blockdev-del", json!({ "node-name": "grown" }));
    client.ok(
        "blockdev-snapshot-sync",
        json!({ "node-name": "sync", "snapshot-file": world.path("grown"), "snapshot-node-name": "grown",
            "mode": "existing" }),
    );
    expected.resize(2 * SIZE as usize, 0);
    assert!(contents(&world, "vda") == expected);
    assert_eq!(bitmaps(&mut client, "grown"), [("daily".to_owned(), 196_608 + SIZE)], "what grew is dirty");
    drop(client);
    let path = world.path("sync");
    drop(world.engine.block_on(world.graph.close()));
    if has("qemu-img", Command::new("qemu-img").arg("--version")) {
        // The data below the last overlay is what QEMU finds, too.
        let raw = format!("{path}.raw");
        let run = |args: &[&str]| assert!(Command::new("qemu-img").args(args).status().unwrap().success());
        run(&["check", "-q", &path]);
        // The chain above the base was linked by nodes, so the header of `over` names nothing.
        run(&["rebase", "-u", "-b", &world.path("base"), "-F", "qcow2", &world.path("over")]);
        run(&["convert", "-O", "raw", &path, &raw]);
        assert!(std::fs::read(raw).unwrap() == expected[..SIZE as usize]);
    }
}

#[test]
fn filters_stay_on_the_drive_and_exports_of_a_node_go_along() {
    let world = World::new();
    let mut client = world.client();
    image(&world, &mut client, "base", SIZE);
    client.ok("blockdev-add", json!({ "driver": "idle", "node-name": "limit", "file": "base" }));
    world.drive("vda", "limit");
    let export =
        world.engine.block_on(world.graph.open_following_root("base", RootOptions::reader("an export")));
    let export = export.unwrap();
    client.ok(
        "blockdev-snapshot-sync",
        json!({ "device": "vda", "snapshot-file": world.path("over"), "snapshot-node-name": "over" }),
    );
    let drive = client.ok("query-block", json!({}));
    assert_eq!(drive[0]["inserted"]["node-name"], "limit");
    assert_eq!(&*export.node_name(), "over");
    // By the filter's own name it goes on top of the filter, as with QEMU.
    client.ok(
        "blockdev-snapshot-sync",
        json!({ "node-name": "limit", "snapshot-file": world.path("top"), "snapshot-node-name": "top" }),
    );
    let drive = client.ok("query-block", json!({}));
    assert_eq!(drive[0]["inserted"]["node-name"], "top");
    assert_eq!(node(&mut client, "over").unwrap()["ro"], true);
}

#[test]
fn what_cannot_be_a_snapshot_is_refused_in_qemus_words_and_changes_nothing() {
    let world = World::new();
    let mut client = world.client();
    image(&world, &mut client, "base", SIZE);
    image(&world, &mut client, "over", SIZE);
    image(&world, &mut client, "lower", SIZE);
    client.ok("blockdev-add", json!({ "driver": "memory", "node-name": "raw", "size": SIZE }));
    world.drive("vda", "base");
    world.drive("vdb", "over");
    let before = shape(&mut client);
    let files = || {
        let mut names: Vec<_> =
            std::fs::read_dir(world.folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let files_before = files();
    let sync = |more: Value| {
        let mut arguments =
            json!({ "node-name": "base", "snapshot-file": world.path("new"), "snapshot-node-name": "n" });
        arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        arguments
    };
    let top = "blockdev-snapshot";
    let cases = [
        (
            top,
            json!({ "node": "nope", "overlay": "lower" }),
            "Cannot find device='nope' nor node-name='nope'",
        ),
        (top, json!({ "node": "base", "overlay": "nope" }), "Cannot find device='nope' nor node-name='nope'"),
        (top, json!({ "node": "base", "overlay": "base" }), "The overlay is already in use"),
        (top, json!({ "node": "base", "overlay": "over" }), "The overlay is already in use"),
        (top, json!({ "node": "base", "overlay": "raw" }), "The overlay does not support backing images"),
        ("blockdev-snapshot-sync", json!({ "snapshot-file": "x" }), "Cannot find device='' nor node-name=''"),
        (
            "blockdev-snapshot-sync",
            json!({ "node-name": "nope", "snapshot-file": "x" }),
            "Cannot find device='' nor node-name='nope'",
        ),
        (
            "blockdev-snapshot-sync",
            json!({ "node-name": "base", "snapshot-file": "x" }),
            "New overlay node-name missing",
        ),
        (
            "blockdev-snapshot-sync",
            sync(json!({ "snapshot-node-name": "over" })),
            "New overlay node-name already in use",
        ),
        (
            "blockdev-snapshot-sync",
            sync(json!({ "format": "raw" })),
            "Backing file not supported for file format 'raw'",
        ),
        ("blockdev-snapshot-sync", sync(json!({ "format": "bad" })), "Unknown file format 'bad'"),
        (
            "blockdev-snapshot-sync",
            sync(json!({ "snapshot-file": world.path("base") })),
            "Error: Trying to create an image with the same filename as the backing file",
        ),
        (
            "blockdev-snapshot-sync",
            sync(json!({ "snapshot-file": "/no such/file" })),
            "Could not create '/no such/file': No such file or directory",
        ),
        ("blockdev-snapshot-sync", sync(json!({ "mode": "existing" })), "No such file or directory"),
        (
            "blockdev-snapshot-internal-sync",
            json!({ "device": "nope", "name": "s" }),
            "Cannot find device='nope' nor node-name='nope'",
        ),
        (
            "blockdev-snapshot-internal-sync",
            json!({ "device": "raw", "name": "s" }),
            "Block format 'memory' used by device 'raw' does not support internal snapshots",
        ),
        ("blockdev-snapshot-internal-sync", json!({ "device": "vda", "name": "" }), "Name is empty"),
        ("blockdev-snapshot-delete-internal-sync", json!({ "device": "vda" }), "Name or id must be provided"),
        (
            "blockdev-snapshot-delete-internal-sync",
            json!({ "device": "vda", "id": "77" }),
            "Snapshot with id '77' and name 'null' does not exist on device 'vda'",
        ),
        (
            "blockdev-snapshot-delete-internal-sync",
            json!({ "device": "raw", "id": "77" }),
            "Failed to get a snapshot list: Operation not supported",
        ),
    ];
    for (command, arguments, text) in cases {
        let found = client.wrong(command, arguments.clone());
        assert!(found.contains(text), "{command} {arguments}: {found}");
        assert_eq!(shape(&mut client), before, "{command} {arguments}");
        assert_eq!(files(), files_before, "{command} {arguments}");
    }
    // A node that is there and free goes on top of any other, whatever the sizes.
    client.ok(top, json!({ "node": "raw", "overlay": "lower" }));
}

#[test]
fn internal_snapshots_are_taken_told_and_deleted() {
    let world = World::new();
    let mut client = world.client();
    image(&world, &mut client, "base", SIZE);
    world.drive("vda", "base");
    for name in ["one", "two"] {
        client.ok("blockdev-snapshot-internal-sync", json!({ "device": "vda", "name": name }));
        world.write("vda", 0, name.as_bytes());
    }
    let taken = client.wrong("blockdev-snapshot-internal-sync", json!({ "device": "vda", "name": "one" }));
    assert_eq!(taken, "Snapshot with name 'one' already exists on device 'vda'");
    let wrong = json!({ "device": "vda", "name": "one", "id": "2" });
    let text = client.wrong("blockdev-snapshot-delete-internal-sync", wrong);
    assert_eq!(text, "Snapshot with id '2' and name 'one' does not exist on device 'vda'");
    let gone = client.ok("blockdev-snapshot-delete-internal-sync", json!({ "device": "vda", "name": "one" }));
    assert_eq!((&gone["id"], &gone["name"], &gone["vm-state-size"]), (&json!("1"), &json!("one"), &json!(0)));
    for key in ["date-sec", "date-nsec", "vm-clock-sec", "vm-clock-nsec"] {
        assert!(gone[key].is_u64(), "{key}: {gone}");
    }
    let left = world.graph.node("base").unwrap().open_node().snapshots();
    assert_eq!(left.iter().map(|snapshot| &*snapshot.name).collect::<Vec<_>>(), ["two"]);
}

#[test]
fn of_eight_snapshots_none_is_taken_if_one_fails_whichever_it_is() {
    let world = World::new();
    let mut client = world.client();
    let drives = ["a", "b", "c", "d", "e", "f", "g", "h"];
    for name in drives {
        image(&world, &mut client, name, SIZE);
        client
            .ok("block-dirty-bitmap-add", json!({ "node": name, "name": "b", "x-driveline-view": "drive" }));
        world.write(name, 0, name.as_bytes());
    }
    let before = shape(&mut client);
    for fails in 0..=drives.len() {
        let mut actions: Vec<Value> = drives
            .iter()
            .enumerate()
            .map(|(at, name)| {
                let file =
                    if at == fails { "/no such/file".into() } else { world.path(&format!("{name}.over")) };
                let overlay = format!("{name}-over");
                json!({ "type": "blockdev-snapshot-sync",
                    "data": { "node-name": name, "snapshot-file": file, "snapshot-node-name": overlay } })
            })
            .collect();
        actions.insert(
            0,
            json!({ "type": "blockdev-snapshot-internal-sync", "data": { "device": "a", "name": "inside" } }),
        );
        if fails == drives.len() {
            // It is found only when everything is drained, after the internal snapshot was taken.
            actions.push(
                json!({ "type": "block-dirty-bitmap-remove", "data": { "node": "h", "name": "none" } }),
            );
        }
        client.wrong("transaction", json!({ "actions": actions }));
        assert_eq!(shape(&mut client), before, "{fails}");
        for name in drives {
            assert!(!Path::new(&world.path(&format!("{name}.over"))).exists(), "{fails}: {name}");
            assert_eq!(world.graph.node(name).unwrap().open_node().snapshots(), [], "{fails}: {name}");
        }
        // Nothing is read-only, and no lock is left behind.
        world.write("a", 4096, &[fails as u8; 512]);
    }
}

#[test]
fn a_snapshot_is_refused_while_a_job_counts_on_the_image() {
    let world = World::new();
    let mut client = world.client();
    image(&world, &mut client, "base", SIZE);
    world.drive("vda", "base");
    world.write("vda", 0, &[1; 65536]);
    client.ok(
        "blockdev-snapshot-sync",
        json!({ "device": "vda", "snapshot-file": world.path("top"), "snapshot-node-name": "top" }),
    );
    client.ok("block-stream", json!({ "job-id": "s", "device": "top", "speed": 1, "auto-finalize": false }));
    let arguments =
        json!({ "node-name": "top", "snapshot-file": world.path("more"), "snapshot-node-name": "more" });
    let text = client.wrong("blockdev-snapshot-sync", arguments.clone());
    assert!(text.starts_with("Node 'top' is busy: block device is in use by"), "{text}");
    assert!(!Path::new(&world.path("more")).exists());
    client.ok("job-cancel", json!({ "id": "s" }));
    client.event("BLOCK_JOB_CANCELLED");
    client.ok("blockdev-snapshot-sync", arguments);
}

/// Two drives, written in turn: what is on the second was on the first before. Snapshots of both are of one moment, and no
/// write is lost, whatever is put on top.
#[test]
fn snapshots_of_drives_are_of_one_moment_under_load() {
    let world = World::new();
    let mut client = world.client();
    for name in ["left", "right"] {
        image(&world, &mut client, name, SIZE);
    }
    world.drive("vda", "left");
    world.drive("vdb", "right");
    let (stop, slowest) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    const WRITERS: u64 = 4;
    let last: Vec<Arc<AtomicU64>> = (0..WRITERS).map(|_| Arc::default()).collect();
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let (graph, stop, last) = (world.graph.clone(), stop.clone(), last[writer as usize].clone());
            let slowest = slowest.clone();
            world.engine.handle().spawn_on(1, move || async move {
                let options = || RootOptions::writer(format!("guest {writer}"));
                let left = graph.open_root("vda", options()).await.unwrap();
                let right = graph.open_root("vdb", options()).await.unwrap();
                let at = writer * 65536;
                for count in 1u64.. {
                    let begun = Instant::now();
                    left.write(at, &count.to_le_bytes(), 0).await.unwrap();
                    right.write(at, &count.to_le_bytes(), 0).await.unwrap();
                    slowest.fetch_max(begun.elapsed().as_micros() as u64, Relaxed);
                    last.store(count, Relaxed);
                    // Others have their turn on this thread.
                    driveline_engine::yield_now().await;
                    if stop.load(Relaxed) {
                        return;
                    }
                }
            })
        })
        .collect();
    let at = |data: &[u8], writer: u64| {
        let start = (writer * 65536) as usize;
        u64::from_le_bytes(data[start..start + 8].try_into().unwrap())
    };
    let mut seen = [0; WRITERS as usize];
    let (mut left, mut right) = ("left".to_owned(), "right".to_owned());
    for round in 0..12 {
        let start: u64 = last.iter().map(|last| last.load(Relaxed)).sum();
        while last.iter().map(|last| last.load(Relaxed)).sum::<u64>() < start + 20 {
            std::thread::yield_now();
        }
        let action = |node: &str, name: &str| {
            json!({ "type": "blockdev-snapshot-sync", "data": { "node-name": node,
                "snapshot-file": world.path(name), "snapshot-node-name": name } })
        };
        let names = (format!("left-{round}"), format!("right-{round}"));
        let actions = [action(&left, &names.0), action(&right, &names.1)];
        client.ok("transaction", json!({ "actions": actions }));
        let (a, b) = (contents(&world, &left), contents(&world, &right));
        for writer in 0..WRITERS {
            let (a, b) = (at(&a, writer), at(&b, writer));
            assert!(a == b || a == b + 1, "round {round}: {a} and {b} are not of one moment");
            assert!(b >= seen[writer as usize], "round {round}: a write was lost");
            seen[writer as usize] = a;
        }
        (left, right) = names;
    }
    stop.store(true, Relaxed);
    world.engine.block_on(async {
        for writer in writers {
            writer.await.unwrap();
        }
    });
    let (a, b) = (contents(&world, "vda"), contents(&world, "vdb"));
    for writer in 0..WRITERS {
        let last = last[writer as usize].load(Relaxed);
        assert_eq!((at(&a, writer), at(&b, writer)), (last, last), "nothing that was acknowledged is lost");
    }
    eprintln!("the slowest pair of writes took {} us", slowest.load(Relaxed));
}

/// What `drive-mirror` was to be put on was a node of its own transaction, and looked for in the graph as it was.
#[test]
fn a_drive_mirror_has_the_images_of_its_own_transaction_below_it() {
    let world = World::new();
    let mut client = world.client();
    image(&world, &mut client, "base", SIZE);
    world.drive("vda", "base");
    let snapshot = |name: &str| {
        json!({ "type": "blockdev-snapshot-sync", "data": { "device": "vda", "format": "qcow2",
            "snapshot-file": world.path(name), "snapshot-node-name": name } })
    };
    let mirror = json!({ "type": "drive-mirror", "data": { "job-id": "j", "device": "vda", "sync": "top",
        "target": world.path("copy"), "format": "qcow2", "node-name": "copy" } });
    client.ok("transaction", json!({ "actions": [snapshot("one"), snapshot("two"), mirror] }));
    client.event("BLOCK_JOB_READY");
    assert_eq!(node(&mut client, "copy").unwrap()["image"]["backing-image"]["filename"], world.path("one"));
    client.ok("job-complete", json!({ "id": "j" }));
    client.event("BLOCK_JOB_COMPLETED");
}

//! Mirrors by command, with QEMU's tools as referees of what is on the target.

use crate::kit::{Client, World, has};
use serde_json::{Value, json};
use std::process::Command;

fn run(program: &str, arguments: &[&str]) -> String {
    let done = Command::new(program).args(arguments).output().unwrap();
    assert!(done.status.success(), "{program} {arguments:?}: {done:?}");
    String::from_utf8(done.stdout).unwrap()
}

/// A drive `vda` on a chain of two qcow2 images of 8 MiB with data in both, and a bitmap `daily`.
fn chain() -> Option<(World, Client)> {
    if !has("qemu-img", Command::new("qemu-img").arg("--version"))
        || !has("qemu-io", Command::new("qemu-io").arg("--version"))
    {
        return None;
    }
    let world = World::new();
    let (base, top) = (world.path("base.qcow2"), world.path("top.qcow2"));
    run("qemu-img", &["create", "-f", "qcow2", &base, "8M"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 3M", &base]);
    run("qemu-img", &["create", "-f", "qcow2", "-b", &base, "-F", "qcow2", &top]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 8 1M 64k", "-c", "write -z 2M 64k", &top]);
    let mut client = world.client();
    client.ok("blockdev-add", node("base", &base, json!({ "read-only": true })));
    client.ok("blockdev-add", node("top", &top, json!({ "backing": "base" })));
    world.drive("vda", "top");
    client.ok("block-dirty-bitmap-add", json!({ "node": "vda", "name": "daily" }));
    Some((world, client))
}

fn node(name: &str, file: &str, more: Value) -> Value {
    let mut node = json!({ "driver": "qcow2", "node-name": name,
        "file": { "driver": "file", "filename": file } });
    node.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    node
}

fn until(client: &mut Client, id: &str, status: &str) {
    loop {
        let data = client.event("JOB_STATUS_CHANGE");
        if data["id"] == id && data["status"] == status {
            return;
        }
    }
}

fn create(world: &World, name: &str, more: &[&str]) -> String {
    let path = world.path(name);
    run("qemu-img", &[&["create", "-f", "qcow2"], more, &[&path, "8M"]].concat());
    path
}

/// Closes the images, and compares two of them.
fn same(world: &World, one: &str, other: &str) {
    world.close();
    let (one, other) = (world.path(one), world.path(other));
    run("qemu-img", &["compare", "-U", "-f", "qcow2", "-F", "qcow2", &one, &other]);
    run("qemu-img", &["check", "-U", "-f", "qcow2", &other]);
}

#[test]
fn a_mirror_follows_the_guest_and_takes_the_drives_place() {
    for mode in ["background", "write-blocking"] {
        let Some((world, mut client)) = chain() else { return };
        let target = create(&world, "target.qcow2", &[]);
        client.ok("blockdev-add", node("target", &target, json!({})));
        let mirror = json!({ "job-id": "j", "device": "vda", "target": "target", "sync": "full",
            "copy-mode": mode, "filter-node-name": "flt", "auto-dismiss": false });
        client.ok("blockdev-mirror", mirror);
        let ready = client.event("BLOCK_JOB_READY");
        assert_eq!(
            (&ready["device"], &ready["type"], &ready["speed"]),
            (&json!("j"), &json!("mirror"), &json!(0))
        );
        let job = client.ok("query-block-jobs", json!({}))[0].clone();
        assert_eq!(
            (&job["ready"], &job["actively-synced"]),
            (&json!(true), &json!(mode == "write-blocking"))
        );
        world.write("vda", 5 << 20, &[9; 4096]);
        let other = if mode == "background" { "write-blocking" } else { "background" };
        client.ok("block-job-change", json!({ "id": "j", "type": "mirror", "copy-mode": other }));
        world.write("vda", 6 << 20, &[9; 512]);
        client.ok("job-complete", json!({ "id": "j" }));
        until(&mut client, "j", "concluded");
        client.ok("job-dismiss", json!({ "id": "j" }));
        let drive = client.ok("query-block", json!({}))[0]["inserted"].clone();
        assert_eq!(drive["node-name"], "target");
        assert_eq!(drive["dirty-bitmaps"][0]["count"], 131072);
        same(&world, "top.qcow2", "target.qcow2");
    }
}

#[test]
fn drive_mirror_makes_its_target_with_the_backing_that_its_sync_needs() {
    for (sync, backing) in [("full", None), ("top", Some("base.qcow2")), ("none", Some("top.qcow2"))] {
        for pivot in [true, false] {
            let Some((world, mut client)) = chain() else { return };
            let target = world.path("target.qcow2");
            client.ok(
                "drive-mirror",
                json!({ "job-id": "j", "device": "vda", "target": target, "sync": sync,
                "format": "qcow2", "node-name": "new" }),
            );
            client.event("BLOCK_JOB_READY");
            world.write("vda", (5 << 20) + 512, &[9; 512]);
            if pivot {
                client.ok("block-job-complete", json!({ "device": "j" }));
            } else {
                client.ok("block-job-cancel", json!({ "device": "j" }));
            }
            let ended = client.event("BLOCK_JOB_COMPLETED");
            assert_eq!(ended.get("error"), None);
            until(&mut client, "j", "null");
            let nodes = client.ok("query-named-block-nodes", json!({ "flat": true }));
            let has = |name: &str| nodes.as_array().unwrap().iter().any(|node| node["node-name"] == name);
            assert!(has("top") && has("new") == pivot, "without a pivot the new node has gone: {sync}");
            let info: Value =
                serde_json::from_str(&run("qemu-img", &["info", "-U", "--output=json", &target])).unwrap();
            assert_eq!(info["backing-filename"].as_str(), backing.map(|name| world.path(name)).as_deref());
            if pivot || sync != "none" {
                same(&world, "top.qcow2", "target.qcow2");
            }
        }
    }
}

#[test]
fn a_bitmap_says_what_is_mirrored_into_an_older_copy() {
    let Some((world, mut client)) = chain() else { return };
    let target = world.path("target.qcow2");
    let copy = json!({ "job-id": "j", "device": "vda", "target": target, "sync": "full" });
    client.ok("drive-mirror", copy);
    client.event("BLOCK_JOB_READY");
    client.ok("block-job-cancel", json!({ "device": "j" }));
    until(&mut client, "j", "null");
    world.write("vda", 4 << 20, &[9; 512]);
    let again = json!({ "job-id": "j", "device": "vda", "target": target, "sync": "incremental",
        "bitmap": "daily", "mode": "existing", "format": "qcow2" });
    client.ok("drive-mirror", again);
    assert_eq!(client.event("BLOCK_JOB_READY")["len"], 65536);
    client.ok("block-job-cancel", json!({ "device": "j" }));
    until(&mut client, "j", "null");
    assert_eq!(client.ok("query-block", json!({}))[0]["inserted"]["dirty-bitmaps"][0]["count"], 0);
    same(&world, "top.qcow2", "target.qcow2");
}

#[test]
fn wrong_mirrors_are_refused_in_qemus_words_and_leave_nothing() {
    let Some((world, mut client)) = chain() else { return };
    let small = world.path("small.qcow2");
    run("qemu-img", &["create", "-f", "qcow2", &small, "4M"]);
    let target = create(&world, "target.qcow2", &[]);
    client.ok("blockdev-add", node("small", &small, json!({})));
    client.ok("blockdev-add", node("target", &target, json!({})));
    let nodes = client.ok("query-named-block-nodes", json!({ "flat": true }));
    let wrong = [
        (json!({ "device": "none" }), "Cannot find device='none' nor node-name='none'"),
        (json!({ "target": "none" }), "Cannot find device='none' nor node-name='none'"),
        (json!({ "target": "top" }), "Can't mirror node into itself"),
        (json!({ "target": "small" }), "Source and target image have different sizes"),
        (json!({ "granularity": 100 }), "Parameter 'granularity' expects a value in range [512B, 64MB]"),
        (json!({ "granularity": 513 }), "Parameter 'granularity' expects a power of 2"),
        (json!({ "buf-size": -1 }), "Invalid parameter 'buf-size'"),
        (json!({ "speed": -1 }), "Parameter 'speed' expects a non-negative value"),
        (json!({ "replaces": "none" }), "Failed to find node with node-name='none'"),
        (json!({ "filter-node-name": "small" }), "Duplicate nodes with node-name='small'"),
        (json!({ "sync": "incremental" }), "must provide a valid bitmap name for 'incremental' sync mode"),
        (
            json!({ "sync": "bitmap", "bitmap": "no", "bitmap-mode": "never" }),
            "Bitmap 'no' could not be found",
        ),
        (json!({ "sync": "half" }), "Parameter 'sync' does not accept value 'half'"),
    ];
    for (difference, expected) in wrong {
        let mut mirror = json!({ "job-id": "j", "device": "vda", "target": "target", "sync": "full" });
        mirror.as_object_mut().unwrap().extend(difference.as_object().unwrap().clone());
        assert_eq!(client.wrong("blockdev-mirror", mirror), expected);
    }
    let fresh = world.path("fresh.qcow2");
    for difference in [json!({ "replaces": "none" }), json!({ "node-name": "top" }), json!({ "job-id": "!" })]
    {
        let mut mirror = json!({ "device": "vda", "target": fresh, "sync": "full" });
        mirror.as_object_mut().unwrap().extend(difference.as_object().unwrap().clone());
        client.wrong("drive-mirror", mirror);
        assert!(!std::path::Path::new(&fresh).exists(), "the file that was made has gone: {difference}");
    }
    assert_eq!(client.ok("query-named-block-nodes", json!({ "flat": true })), nodes);
    assert_eq!(client.ok("query-jobs", json!({})), json!([]));

    // In a transaction a mirror and a bitmap begin at one moment, or neither does.
    let act = |kind: &str, data: Value| json!({ "type": kind, "data": data });
    let mirror = json!({ "job-id": "j", "device": "vda", "target": "target", "sync": "full" });
    let both = json!([
        act("blockdev-mirror", mirror),
        act("block-dirty-bitmap-add", json!({ "node": "vda", "name": "since" })),
        act("abort", json!({})),
    ]);
    client.wrong("transaction", json!({ "actions": both }));
    assert_eq!(client.ok("query-named-block-nodes", json!({ "flat": true })), nodes);
    let both = &both.as_array().unwrap()[..2];
    let grouped = json!({ "completion-mode": "grouped" });
    client.ok("transaction", json!({ "actions": both, "properties": grouped }));
    client.event("BLOCK_JOB_READY");
    world.write("vda", 0, &[1; 512]);
    client.ok("block-job-cancel", json!({ "device": "j", "force": true }));
    client.event("BLOCK_JOB_CANCELLED");
    until(&mut client, "j", "null");
    let bitmaps = client.ok("query-block", json!({}))[0]["inserted"]["dirty-bitmaps"].clone();
    let count = |name: &str| {
        let found = bitmaps.as_array().unwrap().iter().find(|bitmap| bitmap["name"] == name);
        found.unwrap()["count"].clone()
    };
    assert_eq!((count("daily"), count("since")), (json!(65536), json!(65536)));
}

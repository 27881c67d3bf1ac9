//! Jobs by command: started, steered, watched.

use crate::kit::{Client, World, has};
use driveline_graph::RootOptions;
use serde_json::{Value, json};
use std::process::Command;

/// A drive `vda` on a chain of two qcow2 images of 8 MiB, with data in the base, and a bitmap `daily`.
fn chain() -> Option<(World, Client)> {
    if !has("qemu-img", Command::new("qemu-img").arg("--version"))
        || !has("qemu-io", Command::new("qemu-io").arg("--version"))
    {
        return None;
    }
    let world = World::new();
    let run = |program: &str, arguments: &[&str]| {
        let done = Command::new(program).args(arguments).output().unwrap();
        assert!(done.status.success(), "{done:?}");
    };
    let (base, top) = (world.path("base.qcow2"), world.path("top.qcow2"));
    run("qemu-img", &["create", "-f", "qcow2", &base, "8M"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 8M", &base]);
    run("qemu-img", &["create", "-f", "qcow2", "-b", &base, "-F", "qcow2", &top]);
    let mut client = world.client();
    let file = |path: &str| json!({ "driver": "file", "filename": path });
    client.ok(
        "blockdev-add",
        json!({ "driver": "qcow2", "node-name": "base", "file": file(&base), "read-only": true }),
    );
    client.ok(
        "blockdev-add",
        json!({ "driver": "qcow2", "node-name": "top", "file": file(&top), "backing": "base" }),
    );
    world.drive("vda", "top");
    client.ok("block-dirty-bitmap-add", json!({ "node": "vda", "name": "daily" }));
    Some((world, client))
}

fn until(client: &mut Client, id: &str, status: &str) {
    loop {
        let data = client.event("JOB_STATUS_CHANGE");
        if data["id"] == id && data["status"] == status {
            return;
        }
    }
}

/// Dirty bytes of `daily`.
fn dirty(client: &mut Client) -> Value {
    client.ok("query-block", json!({}))[0]["inserted"]["dirty-bitmaps"][0]["count"].clone()
}

#[test]
fn a_stream_is_slowed_paused_and_finished_and_the_bitmap_does_not_notice() {
    let Some((world, mut client)) = chain() else { return };
    let stream = json!({ "device": "vda", "job-id": "j", "speed": 65536, "auto-finalize": false,
        "auto-dismiss": false, "on-error": "report" });
    client.ok("block-stream", stream.clone());
    until(&mut client, "j", "running");
    assert!(client.wrong("block-stream", stream).contains("in use"));

    client.ok("job-pause", json!({ "id": "j" }));
    until(&mut client, "j", "paused");
    let job = client.ok("query-block-jobs", json!({}))[0].clone();
    assert_eq!((&job["device"], &job["type"], &job["speed"]), (&json!("j"), &json!("stream"), &json!(65536)));
    assert_eq!(
        (&job["paused"], &job["status"], &job["io-status"]),
        (&json!(true), &json!("paused"), &json!("ok"))
    );
    assert_eq!(
        (&job["auto-finalize"], &job["auto-dismiss"], &job["ready"]),
        (&json!(false), &json!(false), &json!(false))
    );
    assert!(job["offset"].as_u64() < job["len"].as_u64(), "{job}");
    assert!(client.wrong("job-complete", json!({ "id": "j" })).contains("complete"));

    world.write("vda", 0, &[1; 512]);
    client.ok("block-job-set-speed", json!({ "device": "j", "speed": 0 }));
    client.ok("block-job-resume", json!({ "device": "j" }));
    assert_eq!(client.event("BLOCK_JOB_PENDING"), json!({ "type": "stream", "id": "j" }));
    client.ok("job-finalize", json!({ "id": "j" }));
    let done = client.event("BLOCK_JOB_COMPLETED");
    assert_eq!((&done["device"], &done["type"], done.get("error")), (&json!("j"), &json!("stream"), None));
    assert_eq!(done["len"], done["offset"]);
    until(&mut client, "j", "concluded");
    let jobs = client.ok("query-jobs", json!({}));
    assert_eq!(
        (&jobs[0]["status"], &jobs[0]["id"], jobs[0].get("error")),
        (&json!("concluded"), &json!("j"), None)
    );
    client.ok("job-dismiss", json!({ "id": "j" }));
    assert_eq!(client.ok("query-jobs", json!({})), json!([]));

    assert_eq!(dirty(&mut client), 65536);
    let inserted = client.ok("query-block", json!({}))[0]["inserted"].clone();
    assert_eq!((&inserted["node-name"], inserted.get("backing_file")), (&json!("top"), None));
}

#[test]
fn an_active_commit_is_ready_and_then_completed() {
    let Some((world, mut client)) = chain() else { return };
    world.write("vda", 1 << 20, &[1; 512]);
    client.ok("block-commit", json!({ "device": "vda", "base-node": "base", "filter-node-name": "holder" }));
    let ready = client.event("BLOCK_JOB_READY");
    assert_eq!((&ready["device"], &ready["type"]), (&json!("vda"), &json!("commit")));
    client.ok("block-job-complete", json!({ "device": "vda" }));
    assert_eq!(client.event("BLOCK_JOB_COMPLETED").get("error"), None);
    until(&mut client, "vda", "null");
    assert_eq!(client.ok("query-block", json!({}))[0]["inserted"]["node-name"], "base");
    assert_eq!(dirty(&mut client), 65536);
}

#[test]
fn a_job_is_cancelled() {
    let Some((_world, mut client)) = chain() else { return };
    client.ok("block-stream", json!({ "device": "top", "job-id": "j", "speed": 1 }));
    client.ok("block-job-cancel", json!({ "device": "j" }));
    assert_eq!(client.event("BLOCK_JOB_CANCELLED")["device"], "j");
    until(&mut client, "j", "null");
    assert_eq!(client.ok("query-jobs", json!({})), json!([]));
    assert_eq!(dirty(&mut client), 0);
}

/// A job was seen as `undefined` until its first turn came, and could not be cancelled: not by its user, and not by a
/// shutdown, which then waited for all of its work.
#[test]
fn a_job_runs_when_its_command_returns_and_can_be_cancelled_at_once() {
    let Some((_world, mut client)) = chain() else { return };
    client.ok("block-stream", json!({ "device": "vda", "job-id": "j", "speed": 65536 }));
    let jobs = client.ok("query-jobs", json!({}));
    assert_eq!(jobs[0]["status"], "running", "{jobs}");
    client.ok("job-cancel", json!({ "id": "j" }));
    until(&mut client, "j", "null");
    assert_eq!(client.ok("query-jobs", json!({})), json!([]));
}

#[test]
fn wrong_jobs_are_refused_in_qemus_words() {
    let (_world, mut client) = World::with_disk();
    let wrong = [
        (
            "block-stream",
            json!({ "device": "zz" }),
            "GenericError",
            "Cannot find device='zz' nor node-name='zz'",
        ),
        ("block-commit", json!({ "device": "zz" }), "DeviceNotFound", "Device 'zz' not found"),
        ("block-stream", json!({ "device": "vda", "job-id": "1 2" }), "GenericError", "Invalid job ID '1 2'"),
        (
            "block-stream",
            json!({ "device": "vda", "base": "x", "base-node": "y" }),
            "GenericError",
            "'base' and 'base-node' cannot be specified at the same time",
        ),
        (
            "block-stream",
            json!({ "device": "vda", "speed": -1 }),
            "GenericError",
            "Parameter 'speed' expects a non-negative value",
        ),
        (
            "block-stream",
            json!({ "device": "vda", "on-error": "zz" }),
            "GenericError",
            "Parameter 'on-error' does not accept value 'zz'",
        ),
        (
            "block-stream",
            json!({ "device": "vda", "base-node": "zz" }),
            "GenericError",
            "Cannot find device='zz' nor node-name='zz'",
        ),
        ("job-pause", json!({ "id": "j" }), "GenericError", "Job not found"),
        ("block-job-pause", json!({ "device": "j" }), "DeviceNotActive", "Block job 'j' not found"),
        (
            "block-job-set-speed",
            json!({ "device": "j", "speed": 1 }),
            "DeviceNotActive",
            "Block job 'j' not found",
        ),
        ("block-job-dismiss", json!({ "id": "j" }), "DeviceNotActive", "Block job 'j' not found"),
    ];
    for (command, arguments, class, expected) in wrong {
        let reply = client.execute(command, arguments);
        assert_eq!(reply["error"], json!({ "class": class, "desc": expected }), "{command}");
    }
    assert_eq!(client.ok("query-jobs", json!({})), json!([]));
}

/// The story: a stream down to a window of a file left an image that named the whole file, and read other data when it was
/// opened again.
#[test]
fn an_image_above_a_window_names_the_window() {
    use driveline_drivers::qcow2::{CreateOptions, create_file};
    const SIZE: u64 = 128 << 10;
    let world = World::new();
    let mut client = world.client();
    let mut data = vec![1; 64 << 10];
    data.resize((64 << 10) + SIZE as usize, 7);
    std::fs::write(world.path("disk"), &data).unwrap();
    let file = |name: &str| json!({ "driver": "file", "filename": world.path(name) });
    let window = json!({ "driver": "raw", "node-name": "window", "offset": 64 << 10, "size": SIZE, "file": file("disk") });
    client.ok("blockdev-add", window);
    for (name, backing) in [("mid", "window"), ("top", "mid")] {
        create_file(std::path::Path::new(&world.path(name)), &CreateOptions::new(SIZE)).unwrap();
        let image = json!({ "driver": "qcow2", "node-name": name, "file": file(name), "backing": backing });
        client.ok("blockdev-add", image);
    }
    client.ok("block-stream", json!({ "device": "top", "job-id": "j", "base-node": "window" }));
    assert_eq!(client.event("BLOCK_JOB_COMPLETED").get("error"), None);
    client.ok("blockdev-del", json!({ "node-name": "top" }));
    client.ok("blockdev-add", json!({ "driver": "qcow2", "node-name": "again", "file": file("top") }));
    let nodes = client.ok("query-named-block-nodes", json!({ "flat": true }));
    let again = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "again").unwrap();
    let named = again["image"]["backing-filename"].as_str().unwrap();
    assert!(named.starts_with("json:{") && named.contains("65536"), "{named}");
    world.engine.block_on(async {
        let root = world.graph.open_root("again", RootOptions::reader("a reader")).await.unwrap();
        assert!(root.read(0..SIZE).await.unwrap().iter().all(|byte| *byte == 7));
    });
    world.close();
    if has("qemu-io", Command::new("qemu-io").arg("--version")) {
        let read = ["-r", "-f", "qcow2", "-c", "read -P 7 0 128k", &world.path("top")];
        let done = Command::new("qemu-io").args(read).output().unwrap();
        assert!(done.status.success(), "{done:?}");
    }
}

/// What a guest writes at the beginning of its disk must not become an image's metadata.
#[test]
fn a_file_that_is_a_backing_is_named_as_raw_whatever_is_asked_for() {
    for mask in
        [json!({}), json!({ "backing-mask-protocol": true }), json!({ "backing-mask-protocol": false })]
    {
        let world = World::new();
        let mut client = world.client();
        std::fs::write(world.path("disk"), vec![7; 1 << 16]).unwrap();
        let file = |name: &str| json!({ "driver": "file", "node-name": format!("{name}-file"), "filename": world.path(name) });
        client.ok("blockdev-add", file("disk"));
        for (name, backing) in [("mid", "disk-file"), ("top", "mid")] {
            let options = driveline_drivers::qcow2::CreateOptions::new(1 << 16);
            driveline_drivers::qcow2::create_file(std::path::Path::new(&world.path(name)), &options).unwrap();
            let image =
                json!({ "driver": "qcow2", "node-name": name, "file": file(name), "backing": backing });
            client.ok("blockdev-add", image);
        }
        let mut stream = json!({ "device": "top", "job-id": "j", "base-node": "disk-file" });
        stream.as_object_mut().unwrap().extend(mask.as_object().unwrap().clone());
        client.ok("block-stream", stream);
        assert_eq!(client.event("BLOCK_JOB_COMPLETED").get("error"), None);
        let named = world.graph.node("top").unwrap().open_node().backing_file();
        assert_eq!(named, Some((world.path("disk"), "raw".to_owned())), "{mask}");
    }
}

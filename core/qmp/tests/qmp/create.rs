//! Images that are made by `blockdev-create`.

use crate::{
    interop::Qsd,
    kit::{Client, World, has},
};
use serde_json::{Value, json};
use std::process::Command;

const SIZE: u64 = 1 << 20;

/// Runs `blockdev-create` to its end: the error of the command, or else of the job.
fn create(client: &mut Client, options: Value) -> Option<String> {
    let reply = client.execute("blockdev-create", json!({ "job-id": "make", "options": options }));
    if let Some(text) = reply["error"]["desc"].as_str() {
        return Some(text.to_owned());
    }
    loop {
        let jobs = client.ok("query-jobs", json!({}));
        if jobs[0]["status"] == "concluded" {
            assert_eq!((&jobs[0]["type"], &jobs[0]["id"]), (&json!("create"), &json!("make")));
            client.ok("job-dismiss", json!({ "id": "make" }));
            return jobs[0]["error"].as_str().map(str::to_owned);
        }
        client.event("JOB_STATUS_CHANGE");
    }
}

/// The story: neither the node of a data file below a filter had a name, nor could its size be changed, and an image over a filter
/// of ours was named by a definition that no other program can open.
#[test]
fn filters_that_only_we_have_are_in_no_name_that_others_read() {
    if !has("qemu-img", Command::new("qemu-img").arg("--version")) {
        return;
    }
    let world = World::new();
    let mut client = world.client();
    for name in ["image", "data"] {
        let path = world.path(name);
        std::fs::write(&path, b"").unwrap();
        let file = json!({ "driver": "file", "filename": path });
        client.ok("blockdev-add", json!({ "driver": "bitmap-holder", "node-name": name, "file": file }));
    }
    let options = json!({ "driver": "qcow2", "file": "image", "data-file": "data", "size": SIZE });
    assert_eq!(create(&mut client, options), None);
    client.ok("blockdev-add", json!({ "driver": "qcow2", "node-name": "disk", "file": "image" }));
    let nodes = client.ok("query-named-block-nodes", json!({ "flat": true }));
    let disk = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "disk").unwrap();
    assert_eq!(disk["image"]["filename"], json!(world.path("image")));

    let overlay = json!({ "device": "disk", "snapshot-file": world.path("top"), "snapshot-node-name": "top",
        "format": "qcow2" });
    client.ok("blockdev-snapshot-sync", overlay);
    let chain = Command::new("qemu-img")
        .args(["info", "-U", "--output=json", "--backing-chain", &world.path("top")])
        .output()
        .unwrap();
    let chain: Value = serde_json::from_slice(&chain.stdout).unwrap();
    assert_eq!(chain[1]["filename"], json!(world.path("image")), "{chain}");
    assert_eq!(chain[1]["format-specific"]["data"]["data-file"], json!(world.path("data")));
}

#[test]
fn images_are_made_by_jobs_with_qemus_errors() {
    let world = World::new();
    let mut client = world.client();
    let path = world.path("made");
    assert_eq!(create(&mut client, json!({ "driver": "file", "filename": path, "size": 0 })), None);
    client.ok("blockdev-add", json!({ "driver": "file", "node-name": "f", "filename": path }));
    let qcow2 = |more: Value| {
        let mut options = json!({ "driver": "qcow2", "file": "f", "size": SIZE });
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        options
    };
    assert_eq!(create(&mut client, qcow2(json!({ "extended-l2": true, "preallocation": "falloc" }))), None);
    for (options, text) in [
        (json!({ "size": 5 }), "Parameter 'options.driver' is missing"),
        (json!({ "driver": "nope" }), "Parameter 'driver' does not accept value 'nope'"),
        (json!({ "driver": "memory" }), "Driver 'memory' does not support blockdev-create"),
        (json!({ "driver": "file", "filename": "x" }), "Parameter 'options.size' is missing"),
        (
            json!({ "driver": "file", "filename": "/no such/file", "size": 5 }),
            "Could not create '/no such/file': No such file or directory",
        ),
        (qcow2(json!({ "foo": 1 })), "Parameter 'options.foo' is unexpected"),
        (qcow2(json!({ "file": "nope" })), "Cannot find device='nope' nor node-name='nope'"),
        (qcow2(json!({ "size": 1000 })), "Image size must be a multiple of 512 bytes"),
        (qcow2(json!({ "cluster-size": 256 })), "Cluster size must be a power of two between 512 and 2048k"),
        (qcow2(json!({ "backing-fmt": "raw" })), "Backing format cannot be used without backing file"),
        (
            qcow2(json!({ "encrypt": { "format": "luks" } })),
            "Encrypted images are not supported: neither AES nor LUKS",
        ),
    ] {
        assert_eq!(create(&mut client, options.clone()).as_deref(), Some(text), "{options}");
    }
    // A node that is defined in place goes again; the image is good for use.
    let inline = qcow2(json!({ "file": { "driver": "file", "filename": world.path("made") } }));
    let text = create(&mut client, inline.clone());
    assert_eq!(text, None, "nobody writes to the file: {text:?}");
    client.ok("blockdev-add", json!({ "driver": "qcow2", "node-name": "q", "file": "f" }));
    assert!(create(&mut client, inline).is_some(), "it is in use");
    let text = create(&mut client, qcow2(json!({}))).unwrap();
    assert!(text.contains("'q'") || text.contains("write"), "{text}");
    assert_eq!(client.ok("query-jobs", json!({})), json!([]));
}

/// Each of these, to both: a command that is refused, or a job that ends at once.
const AMENDS: &[&str] = &[
    r#"{"job-id": "j", "node-name": "q", "options": {"driver": "qcow2"}}"#,
    r#"{"job-id": "j", "node-name": "q", "options": {"driver": "qcow2"}, "force": true}"#,
    r#"{"job-id": "j", "node-name": "q", "options": {"driver": "qcow2", "encrypt": {"format": "qcow"}}}"#,
    r#"{"job-id": "j", "node-name": "q", "options": {"driver": "qcow2", "encrypt": {"format": "luks", "state": "active"}}}"#,
    r#"{"job-id": "j", "node-name": "q", "options": {"driver": "qcow2", "encrypt": {"format": "luks"}}}"#,
    r#"{"job-id": "j", "node-name": "q", "options": {"driver": "qcow2", "encrypt": {"format": "x"}}}"#,
    r#"{"job-id": "j", "node-name": "q", "options": {"driver": "qcow2", "encrypt": {}}}"#,
    r#"{"job-id": "j", "node-name": "q", "options": {"driver": "qcow2", "size": 5}}"#,
    r#"{"job-id": "j", "node-name": "q", "options": {"driver": "raw"}}"#,
    r#"{"job-id": "j", "node-name": "q", "options": {"driver": "luks", "state": "active"}}"#,
    r#"{"job-id": "j", "node-name": "q", "options": {"driver": "luks"}}"#,
    r#"{"job-id": "j", "node-name": "q", "options": {"driver": "x"}}"#,
    r#"{"job-id": "j", "node-name": "q", "options": {}}"#,
    r#"{"job-id": "j", "node-name": "n", "options": {"driver": "null-co"}}"#,
    r#"{"job-id": "j", "node-name": "nope", "options": {"driver": "qcow2"}}"#,
    r#"{"job-id": "1 j", "node-name": "q", "options": {"driver": "qcow2"}}"#,
    r#"{"node-name": "q", "options": {"driver": "qcow2"}}"#,
];

#[test]
fn an_image_that_is_not_encrypted_is_amended_as_by_qemu_to_what_it_is() {
    if !has("qemu-storage-daemon", Command::new("qemu-storage-daemon").arg("--version")) {
        return;
    }
    let world = World::new();
    let (mut ours, mut qsd) = (world.client(), Qsd::start());
    for (name, client) in [("ours", &mut ours), ("theirs", &mut qsd.client)] {
        let path = world.path(name);
        driveline_drivers::qcow2::create_file(
            std::path::Path::new(&path),
            &driveline_drivers::qcow2::CreateOptions::new(SIZE),
        )
        .unwrap();
        let file = json!({ "driver": "file", "filename": path });
        client.ok("blockdev-add", json!({ "driver": "qcow2", "node-name": "q", "file": file }));
        client.ok("blockdev-add", json!({ "driver": "null-co", "node-name": "n" }));
    }
    let done = |client: &mut Client, arguments: &Value| {
        let reply = client.execute("x-blockdev-amend", arguments.clone());
        if reply.get("error").is_some() {
            return reply["error"].clone();
        }
        while client.event("JOB_STATUS_CHANGE")["status"] != "concluded" {}
        let jobs = client.ok("query-jobs", json!({}));
        client.ok("job-dismiss", json!({ "id": "j" }));
        jobs
    };
    for amend in AMENDS {
        let arguments: Value = serde_json::from_str(amend).unwrap();
        let [ours, theirs] = [&mut ours, &mut qsd.client].map(|client| done(client, &arguments));
        assert_eq!(ours, theirs, "{amend}");
    }
}

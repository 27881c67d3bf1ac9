//! What a reading of nodes, creation and reopening found, and options that nothing else tries: each through the whole program.

use crate::harness::{Daemon, Guest, Qmp, have, run};
use serde_json::{Value, json};
use std::path::Path;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

/// A program without a drive, but with a server and a monitor.
struct World {
    folder: TempDir,
    daemon: Daemon,
    qmp: Qmp,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let daemon = Daemon::start(folder.path(), "[monitor]\nqmp = \"qmp.sock\"\n");
        let mut qmp = daemon.qmp();
        let address = json!({ "type": "unix", "data": { "path": daemon.path("nbd.sock") } });
        qmp.run("nbd-server-start", json!({ "addr": address }));
        Self { folder, daemon, qmp }
    }

    fn path(&self, name: &str) -> String {
        self.daemon.path(name)
    }

    fn raw(&mut self, name: &str, bytes: u64) {
        std::fs::write(self.path(name), vec![0; bytes as usize]).unwrap();
        let file = json!({ "driver": "file", "filename": self.path(name), "discard": "unmap" });
        self.qmp.run(
            "blockdev-add",
            json!({ "driver": "raw", "node-name": name, "discard": "unmap", "file": file }),
        );
    }

    fn export(&mut self, node: &str) -> Guest {
        self.qmp.run(
            "block-export-add",
            json!({ "type": "nbd", "id": node, "node-name": node, "name": node, "writable": true }),
        );
        Guest::connect(&self.folder.path().join("nbd.sock"), node)
    }

    fn refused(&mut self, command: &str, arguments: Value) -> String {
        let error = self.qmp.try_run(command, arguments).unwrap_err();
        error["desc"].as_str().unwrap().to_owned()
    }

    /// The job's end: its error.
    fn end(&mut self, job: &str) -> Option<String> {
        let end = self.qmp.wait_event("BLOCK_JOB_COMPLETED", job);
        while self.qmp.wait_event("JOB_STATUS_CHANGE", job)["status"] != "null" {}
        end.get("error").and_then(Value::as_str).map(str::to_owned)
    }
}

/// Opening a pipe waits for somebody at its other end, and with it waited the whole program.
#[test]
fn a_named_pipe_is_not_waited_for() {
    if !have("a_named_pipe_is_not_waited_for", &["mkfifo"]) {
        return;
    }
    let mut world = World::new();
    run("mkfifo", &[&world.path("pipe")]);
    let file = json!({ "driver": "file", "node-name": "n", "filename": world.path("pipe") });
    assert!(world.refused("blockdev-add", file).contains("pipe"));
    assert_eq!(world.qmp.run("query-named-block-nodes", json!({})), json!([]));
}

/// A header can name its own image as what is below: by a plain name that was found, by a `json:` one it was opened without end.
#[test]
fn a_backing_chain_that_leads_back_to_itself_by_a_json_name_is_refused() {
    if !have("a_backing_chain_that_leads_back_to_itself_by_a_json_name_is_refused", &["qemu-img"]) {
        return;
    }
    let mut world = World::new();
    let image = world.path("loop.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", &image, "1M"]);
    let below = json!({ "driver": "qcow2", "file": { "driver": "file", "filename": image } });
    run("qemu-img", &["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", &format!("json:{below}"), &image]);
    let node =
        json!({ "driver": "qcow2", "node-name": "n", "file": { "driver": "file", "filename": image } });
    world.refused("blockdev-add", node);
    assert_eq!(world.qmp.run("query-named-block-nodes", json!({})), json!([]));
}

/// Each dot of a key is a level, and taking them apart went as deep as there were dots: the stack ended before the key.
#[test]
fn keys_cannot_be_nested_without_end() {
    let mut world = World::new();
    let key = "file.".repeat(20_000) + "driver";
    world.refused("blockdev-add", json!({ "driver": "raw", "node-name": "n", key: "file" }));
    world.qmp.run("query-version", json!({}));
}

/// The file was emptied before the format was asked whether it can have a backing image.
#[test]
fn a_format_without_backing_files_leaves_the_file_as_it_was() {
    let mut world = World::new();
    world.raw("disk", MIB);
    std::fs::write(world.path("precious.raw"), b"precious").unwrap();
    let target = world.path("precious.raw");
    for command in ["drive-backup", "drive-mirror"] {
        let arguments =
            json!({ "device": "disk", "job-id": "j", "sync": "none", "target": target, "format": "raw" });
        assert!(world.refused(command, arguments).contains("Backing file not supported"));
        assert_eq!(std::fs::read(&target).unwrap(), b"precious");
    }
}

#[test]
fn a_backup_that_discards_its_source_leaves_nothing_there() {
    let mut world = World::new();
    world.raw("disk", 4 * MIB);
    world.raw("copy", 4 * MIB);
    let mut guest = world.export("disk");
    guest.write(MIB, &vec![7; MIB as usize]).unwrap();
    guest.flush().unwrap();
    world.qmp.run(
        "blockdev-backup",
        json!({ "device": "disk", "target": "copy", "job-id": "j", "sync": "full", "discard-source": true }),
    );
    assert_eq!(world.end("j"), None);
    let copy = std::fs::read(world.path("copy")).unwrap();
    assert!(copy[MIB as usize..2 * MIB as usize].iter().all(|byte| *byte == 7));
    assert!(guest.read(0, 4 << 20).unwrap().iter().all(|byte| *byte == 0));
}

/// Copying old data takes longer than the guest may be kept waiting: its write is done, and the point in time is lost.
#[test]
fn a_copy_before_write_that_takes_too_long_breaks_the_snapshot_and_not_the_guest() {
    let mut world = World::new();
    world.raw("disk", 4 * MIB);
    world.raw("copy", 4 * MIB);
    world.qmp.run(
        "object-add",
        json!({ "qom-type": "throttle-group", "id": "slow", "limits": { "bps-write": 1024 } }),
    );
    world.qmp.run(
        "blockdev-add",
        json!({ "driver": "throttle", "node-name": "slowly", "throttle-group": "slow", "file": "copy" }),
    );
    let filter = json!({ "driver": "copy-before-write", "node-name": "cbw", "target": "slowly", "file": "disk",
        "on-cbw-error": "break-snapshot", "cbw-timeout": 1 });
    world.qmp.run("blockdev-add", filter);
    world.qmp.run("blockdev-add", json!({ "driver": "snapshot-access", "node-name": "view", "file": "cbw" }));
    let mut past = world.export("view");
    let mut guest = world.export("cbw");
    past.read(0, 4096).unwrap();
    // The first takes what the group lets through at once; the next ones have to wait.
    for at in 0..8 {
        guest.write(at * 65536, &[9; 4096]).unwrap();
    }
    assert!(past.read(0, 4096).is_err(), "the point in time is lost");
    assert_eq!(guest.read(7 * 65536, 4096).unwrap(), vec![9; 4096]);
}

/// One of three children is changed behind the back of all: the others outvote it, and it is told of.
#[test]
fn a_quorum_outvotes_a_child_that_lies_and_takes_another() {
    let mut world = World::new();
    for child in ["c0", "c1", "c2", "c3"] {
        world.raw(child, MIB);
    }
    let quorum =
        json!({ "driver": "quorum", "node-name": "q", "vote-threshold": 2, "children": ["c0", "c1", "c2"] });
    world.qmp.run("blockdev-add", quorum);
    let mut guest = world.export("q");
    guest.write(0, &[5; 4096]).unwrap();
    guest.flush().unwrap();
    std::fs::write(Path::new(&world.path("c1")), vec![6; MIB as usize]).unwrap();
    assert_eq!(guest.read(0, 4096).unwrap(), vec![5; 4096]);
    world.qmp.run("query-version", json!({}));
    let told = world.qmp.take_events(|event| event["event"] == "QUORUM_REPORT_BAD");
    assert_eq!(told.first().map(|event| &event["data"]["node-name"]), Some(&json!("c1")), "{told:?}");

    world.qmp.run("x-blockdev-change", json!({ "parent": "q", "child": "children.1" }));
    world.qmp.run("x-blockdev-change", json!({ "parent": "q", "node": "c3" }));
    world.qmp.run("blockdev-del", json!({ "node-name": "c1" }));
    guest.write(8192, &[8; 4096]).unwrap();
    assert_eq!(guest.read(8192, 4096).unwrap(), vec![8; 4096]);
    let error = world.refused("x-blockdev-change", json!({ "parent": "q", "child": "children.9" }));
    assert!(error.contains("children.9"), "{error}");
}

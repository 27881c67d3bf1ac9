//! The same story in QEMU's names only: a client that knows nothing of Driveline, and does what QEMU's semantics ask of it, is served
//! by QEMU's storage daemon and by ours alike. A node's bitmap stays with its node there, so the client itself adds one where the next
//! writes go, and merges it when they come home.

use super::SIZE;
use crate::harness::{Guest, Moment, Qmp, StorageDaemon, Writer, have, run};
use serde_json::{Value, json};
use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// A storage daemon, its guest and its client.
struct Client {
    folder: tempfile::TempDir,
    daemon: Option<StorageDaemon>,
    qmp: Option<Qmp>,
    writer: Option<Writer>,
    /// The last backup.
    last: Option<PathBuf>,
}

fn action(kind: &str, data: Value) -> Value {
    json!({ "type": kind, "data": data })
}

/// A qcow2 node over a file, for `--blockdev` and `blockdev-add`.
fn node(name: &str, file: &Path, backing: Option<&str>) -> Value {
    let below = json!({ "driver": "file", "filename": file });
    json!({ "driver": "qcow2", "node-name": name, "file": below, "backing": backing })
}

impl Client {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.qcow2"))
    }

    fn create(&self, name: &str, backing: Option<&Path>) -> PathBuf {
        let (file, size) = (self.path(name), SIZE.to_string());
        let mut arguments = vec!["create", "-q", "-f", "qcow2"];
        if let Some(backing) = backing {
            arguments.extend(["-F", "qcow2", "-b", backing.to_str().unwrap()]);
        }
        arguments.extend([file.to_str().unwrap(), &size]);
        run("qemu-img", &arguments);
        file
    }

    /// Starts the program with a chain of images, each named as its node, the lowest first; the guest has the top one.
    fn serve(&mut self, program: Command, images: &[&str]) {
        let mut arguments = Vec::new();
        let mut below = None;
        for name in images {
            arguments.extend(["--blockdev".to_owned(), node(name, &self.path(name), below).to_string()]);
            below = Some(name);
        }
        let socket = self.folder.path().join("nbd.sock");
        let _ = std::fs::remove_file(&socket);
        arguments.extend(["--nbd-server".into(), format!("addr.type=unix,addr.path={}", socket.display())]);
        let top = images.last().unwrap();
        arguments.extend(["--export".into(), format!("nbd,id=disk,name=disk,node-name={top},writable=on")]);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let daemon = StorageDaemon::start(program, self.folder.path(), &arguments);
        self.qmp = Some(daemon.qmp());
        self.daemon = Some(daemon);
    }

    fn guest(&self) -> Guest {
        Guest::connect(&self.folder.path().join("nbd.sock"), "disk")
    }

    fn writer(&self) -> &Writer {
        self.writer.as_ref().unwrap()
    }

    fn run(&mut self, command: &str, arguments: Value) -> Value {
        self.qmp.as_mut().unwrap().run(command, arguments)
    }

    fn transaction(&mut self, actions: &[Value]) {
        self.run("transaction", json!({ "actions": actions }));
    }

    /// Runs a job to its end; one that gets ready is completed then.
    fn job(&mut self, command: &str, mut arguments: Value, when_ready: Option<&[Value]>) {
        arguments["job-id"] = "job".into();
        self.run(command, arguments);
        if let Some(actions) = when_ready {
            self.qmp.as_mut().unwrap().wait_event("BLOCK_JOB_READY", "job");
            self.transaction(actions);
            self.run("job-complete", json!({ "id": "job" }));
        }
        self.end_job();
    }

    fn end_job(&mut self) -> u64 {
        let qmp = self.qmp.as_mut().unwrap();
        let done = qmp.wait_event("BLOCK_JOB_COMPLETED", "job");
        assert_eq!(done.get("error"), None, "{done}");
        while qmp.wait_event("JOB_STATUS_CHANGE", "job")["status"] != "null" {}
        done["len"].as_u64().unwrap()
    }

    /// What `daily` of a node is like; `None`: it has none.
    fn daily(&mut self, of: &str) -> Option<Value> {
        let nodes = self.run("query-named-block-nodes", json!({ "flat": true }));
        let node = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == of).unwrap();
        let bitmaps = node["dirty-bitmaps"].as_array()?;
        bitmaps.iter().find(|bitmap| bitmap["name"] == "daily").cloned()
    }

    /// Copies a node into a new image, and restores that at once. With usable bitmaps of the node, those that are named, only what they
    /// have; the node's own begins anew.
    fn back_up(&mut self, name: &str, of: &str, bitmaps: &[(&str, &str)]) {
        let incremental = !bitmaps.is_empty();
        let below = self.last.clone().filter(|_| incremental);
        let file = self.create(name, below.as_deref());
        self.run("blockdev-add", node("target", &file, None));
        let sync = if incremental { "incremental" } else { "full" };
        let mut backup = json!({ "job-id": "job", "device": of, "target": "target", "sync": sync });
        let mut actions = Vec::new();
        if incremental {
            // The bitmaps of nodes below go into one of this node, for the job alone.
            let sources: Vec<Value> =
                bitmaps.iter().map(|(node, name)| json!({ "node": node, "name": name })).collect();
            actions.push(action(
                "block-dirty-bitmap-add",
                json!({ "node": of, "name": "job", "disabled": true }),
            ));
            let merge = json!({ "node": of, "target": "job", "bitmaps": sources });
            actions.push(action("block-dirty-bitmap-merge", merge));
            // One of an image below cannot be changed.
            let own = json!({ "node": of, "name": "daily" });
            actions.push(action("block-dirty-bitmap-clear", own));
            backup["bitmap"] = "job".into();
        } else {
            let daily = json!({ "node": of, "name": "daily", "persistent": true });
            actions.push(action("block-dirty-bitmap-add", daily));
        }
        actions.push(action("blockdev-backup", backup));
        let writer = self.writer.take().unwrap();
        let mut disk = writer.pause();
        self.transaction(&actions);
        let moment: Moment = disk.moment();
        drop(disk);
        self.writer = Some(writer);
        let copied = self.end_job();
        if incremental {
            assert!(copied <= moment.most(), "{name}: {copied} bytes, and the guest wrote {}", moment.most());
            self.run("block-dirty-bitmap-remove", json!({ "node": of, "name": "job" }));
        }
        self.writer().go_on(3);
        self.run("blockdev-del", json!({ "node-name": "target" }));
        moment.assert_is(&file);
        self.last = Some(file);
    }
}

/// `program` is asked for twice: it is killed in between. `survives`: a bitmap is usable after that.
fn story(program: fn() -> Command, survives: bool) {
    let folder = tempfile::tempdir().unwrap();
    let mut client = Client { folder, daemon: None, qmp: None, writer: None, last: None };
    let base = client.create("base", None);
    run("qemu-io", &["-f", "qcow2", "-c", &format!("write -q -P 7 0 {SIZE}"), base.to_str().unwrap()]);
    client.create("active", Some(&base));
    client.serve(program(), &["base", "active"]);
    client.writer = Some(Writer::start(client.guest(), vec![7; SIZE]));

    client.back_up("full", "active", &[]);
    client.writer().go_on(5);
    client.back_up("monday", "active", &[("active", "daily")]);

    client.job("block-stream", json!({ "device": "active" }), None);
    client.back_up("tuesday", "active", &[("active", "daily")]);

    // The overlay's bitmap begins with the overlay.
    let overlay = client.create("overlay", Some(&client.path("active")));
    client.run("blockdev-add", node("overlay", &overlay, None));
    client.transaction(&[
        action("blockdev-snapshot", json!({ "node": "active", "overlay": "overlay" })),
        action("block-dirty-bitmap-add", json!({ "node": "overlay", "name": "daily", "persistent": true })),
    ]);
    client.writer().go_on(5);
    client.back_up("wednesday", "overlay", &[("active", "daily"), ("overlay", "daily")]);
    client.writer().go_on(5);

    // The bitmap below has what was copied before, and what the job copied. As soon as that is all, it begins with what the overlay's
    // has, and records what the job goes on to write: that is what the guest writes from then on.
    let take_home = [
        action("block-dirty-bitmap-clear", json!({ "node": "active", "name": "daily" })),
        action(
            "block-dirty-bitmap-merge",
            json!({ "node": "active", "target": "daily", "bitmaps": [{ "node": "overlay", "name": "daily" }] }),
        ),
    ];
    client.job("block-commit", json!({ "device": "overlay" }), Some(&take_home));
    client.run("blockdev-del", json!({ "node-name": "overlay" }));
    client.back_up("thursday", "active", &[("active", "daily")]);

    // As soon as all is copied the new image gets a bitmap, which records what the guest writes from then on.
    let moved = client.create("moved", None);
    client.run("blockdev-add", node("moved", &moved, None));
    let take_along = [
        action("block-dirty-bitmap-add", json!({ "node": "moved", "name": "daily", "persistent": true })),
        action(
            "block-dirty-bitmap-merge",
            json!({ "node": "moved", "target": "daily", "bitmaps": [{ "node": "active", "name": "daily" }] }),
        ),
    ];
    let mirror = json!({ "device": "active", "target": "moved", "sync": "full" });
    client.job("blockdev-mirror", mirror, Some(&take_along));
    client.run("blockdev-del", json!({ "node-name": "active" }));
    client.back_up("friday", "moved", &[("moved", "daily")]);

    client.writer().go_on(5);
    let writer = client.writer.take().unwrap();
    let mut disk = writer.freeze(true);
    disk.guest.as_mut().unwrap().flush().unwrap();
    drop(disk);
    client.qmp = None;
    client.daemon.take().unwrap().kill();
    let before = writer.stop();
    client.serve(program(), &["moved"]);
    // QEMU writes bitmaps when an image is closed: there is none, or one that cannot be used.
    let found = client.daily("moved");
    assert_eq!(found.as_ref().is_some_and(|found| found["inconsistent"] != true), survives, "{found:?}");
    let writer = Writer::start(client.guest(), before.bytes);
    writer.pause().written.extend(before.written);
    client.writer = Some(writer);
    if survives {
        client.back_up("saturday", "moved", &[("moved", "daily")]);
    } else {
        if found.is_some() {
            client.run("block-dirty-bitmap-remove", json!({ "node": "moved", "name": "daily" }));
        }
        client.back_up("saturday", "moved", &[]);
    }
    client.back_up("sunday", "moved", &[("moved", "daily")]);

    drop(client.writer.take().unwrap().stop());
    client.run("quit", json!({}));
    assert!(client.daemon.take().unwrap().wait().success());
    run("qemu-img", &["check", "-q", moved.to_str().unwrap()]);
}

const TOOLS: &[&str] = &["qemu-img", "qemu-io"];

#[test]
fn a_client_that_knows_only_qemus_names_has_exact_backups_from_driveline() {
    if have("a_client_that_knows_only_qemus_names_has_exact_backups_from_driveline", TOOLS) {
        story(StorageDaemon::driveline, true);
    }
}

/// It is QEMU's semantics that the client keeps to: the story holds there, but for the bitmap after a crash.
#[test]
fn the_same_client_has_exact_backups_from_qemu() {
    let tools = [TOOLS, &["qemu-storage-daemon"]].concat();
    if have("the_same_client_has_exact_backups_from_qemu", &tools) {
        story(StorageDaemon::qemu, false);
    }
}

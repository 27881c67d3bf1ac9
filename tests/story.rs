//! The whole story of one drive under load: its images are streamed, snapshotted, committed, mirrored, the program is killed and
//! started again, and in between backups are taken. Every restore is what the guest had at that moment, byte for byte, and
//! no incremental has more than the guest wrote. A checkpoint at each backup knows the same as its bitmap.

mod qemu;

use crate::harness::{Daemon, GRANULE, Guest, Qmp, Writer, have, run, serve};
use serde_json::{Value, json};
use std::path::PathBuf;

const SIZE: usize = 256 * GRANULE;

/// The drive, its images and its backups.
struct Story {
    folder: tempfile::TempDir,
    daemon: Option<Daemon>,
    writer: Option<Writer>,
    backups: Vec<PathBuf>,
}

impl Story {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn qmp(&self) -> Qmp {
        self.daemon.as_ref().unwrap().qmp()
    }

    fn guest(&self) -> Guest {
        Guest::connect(&self.path("nbd.sock"), "vda")
    }

    fn writer(&self) -> &Writer {
        self.writer.as_ref().unwrap()
    }

    /// Serves the images of a chain, the lowest first.
    fn serve(&mut self, images: &[&str]) {
        let mut nodes = String::new();
        for (at, image) in images.iter().enumerate() {
            nodes += &format!("[node.n{at}]\ndriver = \"qcow2\"\nfile = \"{image}\"\n");
            nodes += &match at {
                0 => "backing = false\n".to_owned(),
                at => format!("backing = \"n{}\"\n", at - 1),
            };
            if at + 1 < images.len() {
                nodes += "read-only = true\n";
            }
        }
        let root = format!("n{}", images.len() - 1);
        let rest = serve(&root, "bitmaps = [{ name = \"daily\", persistent = true }]");
        self.daemon = Some(Daemon::start(self.folder.path(), &(nodes + &rest)));
    }

    fn job(&self, command: &str, arguments: Value) -> Value {
        let mut qmp = self.qmp();
        let id = arguments["job-id"].as_str().unwrap().to_owned();
        qmp.run(command, arguments);
        let done = qmp.wait_event("BLOCK_JOB_COMPLETED", &id);
        assert!(done.get("error").is_none(), "{command}: {done}");
        done
    }

    /// Takes a backup, and restores it at once.
    fn backup(&mut self, name: &str) {
        let file = self.text(name);
        let sync = match self.backups.last() {
            None => {
                run("qemu-img", &["create", "-q", "-f", "qcow2", &file, &SIZE.to_string()]);
                "full"
            }
            Some(last) => {
                let last = last.to_str().unwrap();
                run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", last, "-F", "qcow2", &file]);
                "incremental"
            }
        };
        let mut qmp = self.qmp();
        let mut data = json!({
            "device": "vda", "job-id": "backup", "target": file, "format": "qcow2", "mode": "existing", "sync": sync,
        });
        let mut actions = Vec::new();
        match sync {
            // The bitmap knows what changed since the full one.
            "full" => actions.push(
                json!({ "type": "block-dirty-bitmap-clear", "data": { "node": "vda", "name": "daily" } }),
            ),
            _ => data["bitmap"] = "daily".into(),
        }
        actions.push(json!({ "type": "drive-backup", "data": data }));
        let checkpoint = json!({ "name": name, "drives": ["vda"], "persistent": true });
        actions.push(json!({ "type": "x-driveline-checkpoint-create", "data": checkpoint }));
        let mut disk = self.writer().pause();
        qmp.run("transaction", json!({ "actions": actions }));
        let moment = disk.moment();
        drop(disk);
        let done = qmp.wait_event("BLOCK_JOB_COMPLETED", "backup");
        assert!(done.get("error").is_none(), "{name}: {done}");
        if let Some(last) = self.backups.last() {
            let (copied, most) = (done["len"].as_u64().unwrap(), moment.most());
            assert!(copied <= most, "{name} has {copied} bytes, and the guest wrote {most}");
            let from = last.file_name().unwrap().to_str();
            let delta = json!({ "drive": "vda", "from": from, "to": name });
            let delta = qmp.run("x-driveline-checkpoint-delta", delta);
            assert_eq!(delta["count"], copied, "what changed between the checkpoints {from:?} and {name}");
        }
        self.backups.push(self.path(name));
        self.writer().go_on(3);
        moment.assert_is(&self.path(name));
    }
}

#[test]
fn every_backup_of_a_drive_is_exact_whatever_happens_below_it() {
    let name = "every_backup_of_a_drive_is_exact_whatever_happens_below_it";
    if !have(name, &["qemu-img", "qemu-io"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut story = Story { folder, daemon: None, writer: None, backups: Vec::new() };
    let size = SIZE.to_string();
    run("qemu-img", &["create", "-q", "-f", "qcow2", &story.text("base.qcow2"), &size]);
    run("qemu-io", &["-f", "qcow2", "-c", &format!("write -q -P 7 0 {SIZE}"), &story.text("base.qcow2")]);
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            &story.text("base.qcow2"),
            "-F",
            "qcow2",
            &story.text("active.qcow2"),
        ],
    );
    story.serve(&["base.qcow2", "active.qcow2"]);
    story.writer = Some(Writer::start(story.guest(), vec![7; SIZE]));

    story.backup("full.qcow2");
    story.backup("monday.qcow2");

    story.job("block-stream", json!({ "device": "vda", "job-id": "stream" }));
    story.backup("tuesday.qcow2");

    let overlay = json!({ "device": "vda", "snapshot-file": story.text("overlay.qcow2"), "snapshot-node-name": "overlay", "format": "qcow2" });
    story.qmp().run("blockdev-snapshot-sync", overlay);
    story.writer().go_on(5);
    let mut qmp = story.qmp();
    qmp.run("block-commit", json!({ "device": "vda", "job-id": "commit" }));
    qmp.wait_event("BLOCK_JOB_READY", "commit");
    qmp.run("block-job-complete", json!({ "device": "commit" }));
    qmp.wait_event("BLOCK_JOB_COMPLETED", "commit");
    story.backup("wednesday.qcow2");

    run("qemu-img", &["create", "-q", "-f", "qcow2", &story.text("moved.qcow2"), &size]);
    let target = json!({ "driver": "qcow2", "node-name": "moved", "file": { "driver": "file", "filename": story.text("moved.qcow2") } });
    qmp.run("blockdev-add", target);
    qmp.run(
        "blockdev-mirror",
        json!({ "device": "vda", "job-id": "mirror", "target": "moved", "sync": "full" }),
    );
    qmp.wait_event("BLOCK_JOB_READY", "mirror");
    qmp.run("block-job-complete", json!({ "device": "mirror" }));
    qmp.wait_event("BLOCK_JOB_COMPLETED", "mirror");
    story.backup("thursday.qcow2");

    story.writer().go_on(5);
    let writer = story.writer.take().unwrap();
    let mut disk = writer.pause();
    disk.guest.as_mut().unwrap().flush().unwrap();
    // It is killed between two writes, or nobody knows what became of one.
    disk.frozen = true;
    drop((disk, qmp));
    story.daemon.take().unwrap().kill();
    let before = writer.stop();
    story.serve(&["moved.qcow2"]);
    let writer = Writer::start(story.guest(), before.bytes);
    writer.pause().written.extend(before.written);
    story.writer = Some(writer);
    story.backup("friday.qcow2");

    let disk = story.writer.take().unwrap().stop();
    drop(disk);
    assert!(story.daemon.take().unwrap().terminate().success());
    run("qemu-img", &["check", "-q", &story.text("moved.qcow2")]);
}

//! A tool that backs up machines, as far as the monitor and the agent see it.

use super::half::Machine;
use crate::harness::{Qmp, run};
use serde_json::{Value, json};
use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};

/// Connected to both sockets of a machine.
pub(super) struct Tool {
    qmp: Qmp,
    agent: BufReader<UnixStream>,
    folder: PathBuf,
    size: String,
    images: usize,
}

impl Tool {
    pub(super) fn connect(machine: &Machine, folder: &Path, size: usize) -> Self {
        let agent = BufReader::new(UnixStream::connect(machine.agent()).unwrap());
        let (folder, size) = (folder.to_owned(), size.to_string());
        Self { qmp: Qmp::connect(&machine.monitor()), agent, folder, size, images: 0 }
    }

    pub(super) fn monitor(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    fn ask_guest(&mut self, command: &str) {
        write!(self.agent.get_mut(), "{}", json!({ "execute": command })).unwrap();
        let mut answer = String::new();
        self.agent.read_line(&mut answer).unwrap();
        assert!(answer.contains("return"), "{answer}");
    }

    /// Adds a node over a new image.
    fn add_image(&mut self, node: &str) -> PathBuf {
        self.images += 1;
        let file = self.folder.join(format!("{node}-{}.qcow2", self.images));
        run("qemu-img", &["create", "-q", "-f", "qcow2", file.to_str().unwrap(), &self.size]);
        let below = json!({ "driver": "file", "filename": file });
        self.qmp.run("blockdev-add", json!({ "driver": "qcow2", "node-name": node, "file": below }));
        file
    }

    /// Takes a backup of the machine's only disk: `full` begins a chain, `inc` goes on with it, `copy` leaves it alone. Its image.
    pub(super) fn back_up(&mut self, level: &str, compress: bool) -> PathBuf {
        let drives = self.qmp.run("query-block", json!({}));
        let (device, node) = (&drives[0]["qdev"], &drives[0]["inserted"]["node-name"]);
        self.ask_guest("guest-fsfreeze-freeze");
        let target = self.add_image("backup-target");
        self.add_image("backup-fleece");
        let mut cbw = json!({
            "driver": "copy-before-write", "node-name": "backup-cbw", "file": node, "target": "backup-fleece",
            "on-cbw-error": "break-snapshot", "cbw-timeout": 45,
        });
        if level == "inc" {
            // What is not copied need not be kept.
            cbw["bitmap"] = json!({ "node": node, "name": "chain" });
        }
        self.qmp.run("blockdev-add", cbw);
        let plug = |node: &Value| json!({ "path": device, "property": "drive", "value": node });
        self.qmp.run("qom-set", plug(&json!("backup-cbw")));
        let snapshot =
            json!({ "driver": "snapshot-access", "file": "backup-cbw", "node-name": "backup-snap" });
        self.qmp.run("blockdev-add", snapshot);

        let action = |kind: &str, data: Value| json!({ "type": kind, "data": data });
        let backup = json!({
            "device": "backup-snap", "target": "backup-target", "job-id": "backup.disk", "sync": "full", "speed": 0,
            "compress": compress,
        });
        let actions = match level {
            "full" => vec![
                action(
                    "block-dirty-bitmap-add",
                    json!({ "node": node, "name": "chain", "persistent": true }),
                ),
                action("blockdev-backup", backup),
            ],
            "copy" => vec![action("blockdev-backup", backup)],
            _ => {
                let source = json!({ "node": node, "name": "chain" });
                let merge = json!({ "node": "backup-snap", "target": "chain", "bitmaps": [source] });
                let mut backup = backup;
                backup["sync"] = "incremental".into();
                backup["bitmap"] = "chain".into();
                vec![
                    action("block-dirty-bitmap-add", json!({ "node": "backup-snap", "name": "chain" })),
                    action("block-dirty-bitmap-merge", merge),
                    action("blockdev-backup", backup),
                    action("block-dirty-bitmap-clear", source),
                ]
            }
        };
        self.qmp.run("transaction", json!({ "actions": actions }));
        self.ask_guest("guest-fsfreeze-thaw");
        let done = self.qmp.wait_event("BLOCK_JOB_COMPLETED", "backup.disk");
        assert_eq!(done.get("error"), None, "{level}: {done}");

        // It looks for no other event: the job's users of the nodes are gone when it is said to be over.
        self.qmp.run("blockdev-del", json!({ "node-name": "backup-snap" }));
        self.qmp.run("qom-set", plug(node));
        for node in ["backup-cbw", "backup-target", "backup-fleece"] {
            self.qmp.run("blockdev-del", json!({ "node-name": node }));
        }
        target
    }
}

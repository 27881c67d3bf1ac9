//! Steps of several commands: jobs that copy, and what changes the chain.

use super::steps::{BITMAPS, Script, command, image};
use serde_json::{Value, json};

impl Script {
    fn job_id(&mut self) -> String {
        self.jobs += 1;
        format!("j{}", self.jobs)
    }

    fn source(&mut self) -> &'static str {
        if self.chance(80) { "n0" } else { self.one(&["n1", "n2", "n3", "t0", "s0", "nope"]) }
    }

    /// Where copies go: a qcow2 image, a raw one, a smaller one, one on the same image as `n0`.
    fn target(&mut self) -> &'static str {
        if self.chance(80) {
            self.one(&["t0", "t1"])
        } else {
            self.one(&["t2", "t3", "n0", "n2", "s0", "nope"])
        }
    }

    /// A mirror, what is written while it is ready, and how it ends.
    pub(super) fn mirror(&mut self) -> Value {
        let id = self.job_id();
        let mut start = json!({ "job-id": id, "sync": self.one(&["full", "full", "top", "none"]) });
        let name = if self.chance(75) {
            start["device"] = self.source().into();
            start["target"] = self.target().into();
            "blockdev-mirror"
        } else {
            start["device"] = self.source().into();
            self.drive_target(&mut start);
            if self.chance(50) {
                start["node-name"] = self.one(&["t9", "t9", "n1"]).into();
            }
            "drive-mirror"
        };
        if self.chance(50) {
            start["copy-mode"] = self.one(&["background", "write-blocking"]).into();
        }
        if self.chance(15) {
            start["granularity"] = self.one_of(&[512u32, 65536, 1000, 1 << 20]).into();
        }
        if self.chance(10) {
            start["filter-node-name"] = self.one(&["top", "n1"]).into();
        }
        if self.chance(15) {
            start["auto-finalize"] = true.into();
        }
        if self.chance(5) {
            start["replaces"] = self.one(&["n0", "n1", "nope"]).into();
        }
        if name == "blockdev-mirror" && self.chance(10) {
            start["target-is-zero"] = false.into();
        }
        let ends = [
            command("block-job-complete", json!({ "device": id })),
            command("job-complete", json!({ "id": id })),
            command("block-job-cancel", json!({ "device": id })),
            command("block-job-cancel", json!({ "device": id, "force": true })),
            command("job-cancel", json!({ "id": id })),
        ];
        let (at, write) = (self.random_below(ends.len()), self.write());
        self.queue.push_back(json!({ "ready": id }));
        // What a job that is ended by force has copied of it is chance.
        if at < 3 && self.chance(70) {
            self.queue.push_back(json!({ "qemu-io": write }));
        }
        if self.chance(15) {
            let mode = self.one(&["write-blocking", "background"]);
            self.queue.push_back(command(
                "block-job-change",
                json!({ "id": id, "type": "mirror", "copy-mode": mode }),
            ));
        }
        if self.chance(20) {
            let (pause, resume) = (json!({ "id": id }), json!({ "id": id }));
            self.queue.push_back(command("job-pause", pause));
            self.queue.push_back(command("job-resume", resume));
        }
        self.queue.push_back(ends[at].clone());
        self.queue.push_back(json!({ "end": [id] }));
        let mut start = command(name, start);
        start["hold"] = true.into();
        start
    }

    /// A file that a job makes or that is there.
    fn drive_target(&mut self, start: &mut Value) {
        let (file, format) = self.one_of(&[("d0.qcow2", "qcow2"), ("d1.raw", "raw")]);
        start["target"] = format!("{{dir}}/{file}").into();
        start["format"] = format.into();
        if self.chance(30) {
            // What reads through the image that was there opens its backing images again, which QEMU's locks refuse.
            let existing = start["sync"] == "full";
            start["mode"] =
                if existing { self.one(&["existing", "absolute-paths"]) } else { "absolute-paths" }.into();
        }
    }

    /// Arguments of a backup.
    fn backup_arguments(&mut self, id: &str) -> (&'static str, Value) {
        let sync =
            self.one(&["full", "full", "top", "none", "incremental", "incremental", "bitmap", "bitmap"]);
        let mut start = json!({ "job-id": id, "sync": sync, "device": self.source() });
        let name = if self.chance(75) {
            start["target"] = self.target().into();
            "blockdev-backup"
        } else {
            self.drive_target(&mut start);
            "drive-backup"
        };
        let wants = sync == "incremental" || sync == "bitmap";
        if wants && self.chance(90) || self.chance(15) {
            start["bitmap"] = self.one(&BITMAPS).into();
        }
        if sync == "bitmap" && self.chance(90) || self.chance(10) {
            start["bitmap-mode"] = self.one(&["on-success", "never", "always"]).into();
        }
        if self.chance(15) {
            start["filter-node-name"] = self.one(&["top", "n1"]).into();
        }
        // Over what a copy before has left QEMU's fails: see the table.
        if self.jobs == 1 && self.chance(20) {
            start["compress"] = true.into();
        }
        if self.chance(10) {
            start["discard-source"] = true.into();
        }
        if self.chance(10) {
            start["x-perf"] = json!({ "max-workers": self.one_of(&[0, 1, 8]), "max-chunk": self.one_of(&[0, 65536, 1000]) });
        }
        (name, start)
    }

    pub(super) fn backup(&mut self) -> Value {
        let id = self.job_id();
        let (name, mut start) = self.backup_arguments(&id);
        let endless = start["sync"] == "none";
        let held = self.chance(15);
        if held {
            start["auto-finalize"] = false.into();
        }
        if endless || held {
            let write = self.write();
            self.queue.push_back(json!({ "qemu-io": write }));
        }
        if held && !endless {
            self.queue.push_back(json!({ "event": "BLOCK_JOB_PENDING", "job": id }));
            self.queue.push_back(command("job-finalize", json!({ "id": id })));
        }
        if endless {
            self.queue.push_back(command("job-cancel", json!({ "id": id })));
        }
        self.queue.push_back(json!({ "end": [id] }));
        let mut start = command(name, start);
        start["hold"] = true.into();
        start
    }

    /// A commit of the image on top.
    pub(super) fn active_commit(&mut self) -> Value {
        let id = self.job_id();
        let mut start = json!({ "job-id": id, "device": "n0" });
        if self.chance(60) {
            start["base-node"] = self.one(&["n2", "n1"]).into();
        }
        let (write, force) = (self.write(), self.chance(30));
        self.queue.push_back(json!({ "ready": id }));
        if !force {
            self.queue.push_back(json!({ "qemu-io": write }));
        }
        let end = match !force && self.chance(60) {
            true => command("job-complete", json!({ "id": id })),
            false => command("block-job-cancel", json!({ "device": id, "force": force })),
        };
        self.queue.push_back(end);
        self.queue.push_back(json!({ "end": [id] }));
        let mut start = command("block-commit", start);
        start["hold"] = true.into();
        start
    }

    /// What changes what is where, as a command's or an action's name and arguments.
    fn snapshot_arguments(&mut self) -> (&'static str, Value) {
        match self.random_below(10) {
            0..4 => {
                let node = self.source();
                (
                    "blockdev-snapshot",
                    json!({ "node": node, "overlay": self.one(&["s0", "s1", "s1", "t1", "n2", "nope"]) }),
                )
            }
            // Without a user the overlay would go at once: see the table.
            4..7 if self.exported => {
                self.names += 1;
                let (file, node) = (format!("{{dir}}/ss{}.qcow2", self.names), format!("ss{}", self.names));
                let mut take = json!({ "node-name": "n0", "snapshot-file": file });
                if self.chance(80) {
                    take["snapshot-node-name"] = if self.chance(90) { node } else { "n1".into() }.into();
                }
                if self.chance(30) {
                    take["mode"] = self.one(&["existing", "absolute-paths"]).into();
                }
                if self.chance(10) {
                    take["format"] = self.one(&["raw", "qcow2", "spaghetti"]).into();
                }
                ("blockdev-snapshot-sync", take)
            }
            _ => {
                let (device, name) = (self.source(), self.one(&["one", "two", ""]));
                ("blockdev-snapshot-internal-sync", json!({ "device": device, "name": name }))
            }
        }
    }

    pub(super) fn snapshot(&mut self) -> Value {
        match self.random_below(8) {
            0 => {
                let (device, name) = (self.source(), self.one(&["one", "two", "nope"]));
                let mut delete = json!({ "device": device });
                if self.chance(90) {
                    delete["name"] = name.into();
                }
                if self.chance(20) {
                    delete["id"] = self.one(&["1", "2"]).into();
                }
                command("blockdev-snapshot-delete-internal-sync", delete)
            }
            1 => {
                let backing = if self.chance(50) { Value::Null } else { self.one(&["n0", "n2"]).into() };
                image(self.one(&["s0", "s1"]), self.one(&["s0.qcow2", "s1.qcow2"]), backing)
            }
            2 => command(
                "blockdev-del",
                json!({ "node-name": self.one(&["s0", "s1", "t0", "t1", "n0", "n2"]) }),
            ),
            _ => {
                let (name, arguments) = self.snapshot_arguments();
                command(name, arguments)
            }
        }
    }

    /// Jobs and snapshots as of one moment.
    pub(super) fn moment(&mut self) -> Value {
        let (mut actions, mut jobs) = (Vec::new(), Vec::new());
        let grouped = self.chance(40);
        for _ in 0..1 + self.random_below(3) {
            let (kind, data) = match self.random_below(6) {
                0 | 1 => {
                    let id = self.job_id();
                    let (name, data) = self.backup_arguments(&id);
                    if data["sync"] == "none" {
                        continue;
                    }
                    jobs.push(id);
                    (name, data)
                }
                2 => ("block-dirty-bitmap-add", json!({ "node": "n0", "name": self.one(&BITMAPS[..3]) })),
                3 => ("block-dirty-bitmap-clear", json!({ "node": "n0", "name": self.one(&BITMAPS[..3]) })),
                _ => self.snapshot_arguments(),
            };
            actions.push(json!({ "type": kind, "data": data }));
        }
        if self.chance(15) {
            actions.push(json!({ "type": "abort", "data": {} }));
        }
        let mut all = json!({ "actions": actions });
        if grouped {
            all["properties"] = json!({ "completion-mode": "grouped" });
        }
        self.queue.push_back(json!({ "end": jobs }));
        let mut all = command("transaction", all);
        all["hold"] = true.into();
        all
    }

    /// Options of a node that is there, and its size.
    pub(super) fn other_options(&mut self) -> Value {
        let node = self.one(&["n0", "n1", "n3", "t0", "s0", "nope"]);
        let size = self.one_of(&[2u64 << 20, 2 << 20, 3 << 20, 1 << 20, 512, 0]);
        match self.random_below(10) {
            0..3 => command("block_resize", json!({ "node-name": node, "size": size })),
            3 => command("block_resize", json!({ "node-name": self.one(&["n3", "t1"]), "size": size })),
            4 | 5 => {
                let mut options = json!({ "driver": "qcow2", "node-name": "n0", "file": "n0-file" });
                if self.chance(80) {
                    options["backing"] =
                        self.one_of(&[json!("n1"), json!("n1"), json!("n2"), json!("n0"), Value::Null]);
                }
                if self.chance(30) {
                    options["read-only"] = self.chance(70).into();
                }
                command("blockdev-reopen", json!({ "options": [options] }))
            }
            6 => {
                let mut options = json!({ "driver": self.one(&["raw", "raw", "qcow2"]), "node-name": "n3", "file": "n3-file" });
                if self.chance(50) {
                    options["read-only"] = self.chance(50).into();
                }
                if self.chance(10) {
                    options["nonsense"] = 1.into();
                }
                command("blockdev-reopen", json!({ "options": [options] }))
            }
            7 => command(
                "block-set-write-threshold",
                json!({ "node-name": node, "write-threshold": self.one_of(&[0, 65536]) }),
            ),
            8 => {
                let file = self.one(&["base.qcow2", "mid.qcow2"]);
                command(
                    "change-backing-file",
                    json!({ "device": "n0", "image-node-name": self.one(&["n0", "n1", "n3", "nope"]), "backing-file": file }),
                )
            }
            _ => command(
                "blockdev-set-active",
                json!({ "node-name": self.one(&["n3", "t0", "nope"]), "active": self.chance(70) }),
            ),
        }
    }
}

//! The whole story of one drive under load: its images are streamed, snapshotted, committed, mirrored, the program is killed and
//! started again, and in between backups are taken. Every restore is what the guest had at that moment, byte for byte, and
//! no incremental has more than the guest wrote.

use crate::harness::{Daemon, Guest, Qmp, have, run};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    thread::JoinHandle,
};

const GRANULE: usize = 65536;
const SIZE: usize = 256 * GRANULE;

/// What the guest knows: its disk, and what it wrote since the last backup.
struct Disk {
    guest: Option<Guest>,
    bytes: Vec<u8>,
    written: BTreeSet<usize>,
    writes: usize,
    ended: bool,
}

/// A guest that writes all the time. Whoever holds its lock has it between two writes.
struct Writer {
    disk: Arc<Mutex<Disk>>,
    thread: JoinHandle<()>,
}

impl Writer {
    fn start(socket: &Path, bytes: Vec<u8>) -> Self {
        let guest = Some(Guest::connect(socket, "vda"));
        let disk = Disk { guest, bytes, written: BTreeSet::new(), writes: 0, ended: false };
        let disk = Arc::new(Mutex::new(disk));
        let shared = disk.clone();
        let thread = std::thread::spawn(move || {
            let mut random = StdRng::seed_from_u64(4);
            loop {
                let mut disk = shared.lock().unwrap();
                if disk.ended {
                    return;
                }
                disk.write(&mut random);
                drop(disk);
                // A lock that is wanted is had: the guest is not the only one.
                std::thread::yield_now();
            }
        });
        Self { disk, thread }
    }

    fn pause(&self) -> MutexGuard<'_, Disk> {
        self.disk.lock().unwrap()
    }

    /// Lets the guest write for a while.
    fn go_on(&self, writes: usize) {
        let before = self.pause().writes;
        while self.pause().writes < before + writes {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    fn stop(self) -> Disk {
        self.pause().ended = true;
        self.thread.join().unwrap();
        Arc::into_inner(self.disk).unwrap().into_inner().unwrap()
    }
}

impl Disk {
    fn write(&mut self, random: &mut StdRng) {
        // Most of the disk stays as it is, so that an incremental is small.
        let at = random.random_range(0..SIZE / 4096 / 4) * 4096;
        let value = random.random::<u8>();
        let guest = self.guest.as_mut().unwrap();
        let answer = match random.random_range(0..8) {
            0 => {
                self.bytes[at..at + 4096].fill(0);
                guest.write_zeroes(at as u64, 4096)
            }
            _ => {
                self.bytes[at..at + 4096].fill(value);
                guest.write(at as u64, &[value; 4096])
            }
        };
        answer.expect("no request fails");
        self.written.insert(at / GRANULE);
        self.writes += 1;
    }
}

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
        let rest = format!(
            "[drive.vda]\nroot = \"n{}\"\nbitmaps = [{{ name = \"daily\", persistent = true }}]\n\
             [export.vda]\ntype = \"nbd\"\ndrive = \"vda\"\nsocket = \"vda.sock\"\nwritable = true\n\
             [monitor]\nqmp = \"qmp.sock\"\n",
            images.len() - 1
        );
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
        let mut disk = self.writer().pause();
        qmp.run("transaction", json!({ "actions": actions }));
        let (expected, written) = (disk.bytes.clone(), std::mem::take(&mut disk.written));
        drop(disk);
        let done = qmp.wait_event("BLOCK_JOB_COMPLETED", "backup");
        assert!(done.get("error").is_none(), "{name}: {done}");
        if sync == "incremental" {
            let copied = done["len"].as_u64().unwrap();
            let most = (written.len() * GRANULE) as u64;
            assert!(copied <= most, "{name} has {copied} bytes, and the guest wrote {most}");
        }
        self.backups.push(self.path(name));
        self.writer().go_on(3);
        let raw = self.text("restored.raw");
        run("qemu-img", &["convert", "-O", "raw", &file, &raw]);
        let restored = std::fs::read(&raw).unwrap();
        let wrong = restored.chunks(4096).zip(expected.chunks(4096)).position(|(is, was)| is != was);
        assert_eq!(
            (restored.len(), wrong.map(|at| at * 4096)),
            (SIZE, None),
            "{name} is restored byte for byte"
        );
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
    story.writer = Some(Writer::start(&story.path("vda.sock"), vec![7; SIZE]));

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
    drop(qmp);
    story.daemon.take().unwrap().kill();
    disk.ended = true;
    drop(disk);
    let before = writer.stop();
    story.serve(&["moved.qcow2"]);
    let writer = Writer::start(&story.path("vda.sock"), before.bytes);
    writer.pause().written.extend(before.written);
    story.writer = Some(writer);
    story.backup("friday.qcow2");

    let disk = story.writer.take().unwrap().stop();
    drop(disk);
    assert!(story.daemon.take().unwrap().terminate().success());
    run("qemu-img", &["check", "-q", &story.text("moved.qcow2")]);
}

//! A drive that went on with another image is not started from the one that it left: it would go back in time without a word.

use crate::harness::{Daemon, Guest, have, output, run};
use serde_json::json;
use std::path::{Path, PathBuf};

struct World {
    folder: tempfile::TempDir,
}

const BASE: &str = "[node.base]\ndriver = \"qcow2\"\nfile = \"base.qcow2\"\n";
const ACTIVE: &str = "[node.active]\ndriver = \"qcow2\"\nfile = \"active.qcow2\"\nbacking = \"base\"\n";

impl World {
    fn new(test: &str) -> Option<Self> {
        if !have(test, &["qemu-img", "qemu-io"]) {
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        run("qemu-img", &["create", "-q", "-f", "qcow2", &path("base.qcow2"), "8M"]);
        let base = path("base.qcow2");
        run("qemu-io", &["-c", "write -q -P 9 8192 4096", &base]);
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &path("active.qcow2")]);
        Some(Self { folder })
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    /// A file that says `nodes`, and which of them the drive shows.
    fn toml(&self, nodes: &[&str], root: &str) -> String {
        format!(
            "{}[drive.vda]\nroot = \"{root}\"\n[export.vda]\ntype = \"nbd\"\ndrive = \"vda\"\nsocket = \"vda.sock\"\n\
             writable = true\n[monitor]\nqmp = \"qmp.sock\"\n",
            nodes.concat()
        )
    }

    fn start(&self, nodes: &[&str], root: &str) -> Daemon {
        Daemon::start(self.folder.path(), &self.toml(nodes, root))
    }

    fn driveline(&self, words: &[&str]) -> (bool, String) {
        let mut all = words.to_vec();
        let socket = self.path("qmp.sock");
        if words[0] == "ctl" {
            all.splice(1..1, ["--socket", &*socket]);
        }
        let done = output(Daemon::program().to_str().unwrap(), &all);
        (done.status.success(), String::from_utf8([done.stdout, done.stderr].concat()).unwrap())
    }

    /// Neither `run` nor `check` takes the file, and both say this.
    fn refused(&self, nodes: &[&str], root: &str, expected: &str) {
        let file = self.path("refused.toml");
        std::fs::write(&file, self.toml(nodes, root)).unwrap();
        for command in ["check", "run"] {
            let (done, text) = self.driveline(&[command, &file]);
            assert!(!done && says(&text, expected), "{command}: expected {expected:?}, got {text}");
        }
    }

    fn guest(&self) -> Guest {
        Guest::connect(&self.folder.path().join("vda.sock"), "vda")
    }

    /// The guest writes one block of that, and flushes.
    fn write(&self, offset: u64, byte: u8) {
        let mut guest = self.guest();
        guest.write(offset, &[byte; 4096]).unwrap();
        guest.flush().unwrap();
    }

    fn has(&self, offset: u64, byte: u8) -> bool {
        self.guest().read(offset, 4096).unwrap() == [byte; 4096]
    }

    fn marks(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.folder.path()).unwrap().map(|entry| entry.unwrap().path());
        entries.filter(|path| path.extension().is_some_and(|ending| ending == "dlmoved")).collect()
    }
}

/// Reports are broken into lines to fit a terminal.
fn says(text: &str, expected: &str) -> bool {
    let plain = |text: &str| text.replace(|letter: char| letter.is_whitespace() || "|│".contains(letter), "");
    plain(text).contains(&plain(expected))
}

/// After a mirror's pivot, a restart with the file as it was served the old image without a word.
#[test]
fn a_drive_that_a_mirror_led_to_a_copy_is_not_started_from_the_old_image() {
    let Some(world) = World::new("a_drive_that_a_mirror_led_to_a_copy") else { return };
    let nodes = [BASE, ACTIVE];
    let daemon = world.start(&nodes, "active");
    world.write(0, 1);
    // The copy has nothing where that hides what the base has.
    world.write(8192, 0);
    let copy = world.path("copy.qcow2");
    let (done, said) = world.driveline(&["ctl", "mirror", "vda", &copy, "--pivot"]);
    let lines = |file| format!("driver = \"qcow2\", file = \"{file}\", backing = false");
    let line = format!("in its file: write {} and nothing else in [node.active]", lines(&*copy));
    assert!(done && said.contains(&line), "{said}");
    world.write(4096, 2);
    // The file as it was, given to the running daemon, would do the same.
    let file = world.path("drive.toml");
    let (done, text) = world.driveline(&["apply", &file]);
    assert!(!done && says(&text, "drive.toml:6: ") && says(&text, "went on with"), "{text}");
    daemon.kill();

    let write = format!("write {} and nothing else in [node.active]", lines("copy.qcow2"));
    let expected = "drive 'vda' went on with copy.qcow2; active.qcow2 is what it held before";
    world.refused(&nodes, "active", expected);
    world.refused(&nodes, "active", &write);
    world.refused(&nodes, "active", "active.qcow2\"");
    // Who changes the file's name alone would see the base where the copy has nothing.
    let wrong = ACTIVE.replace("active.qcow2", "copy.qcow2");
    world.refused(&[BASE, &wrong], "active", "went on with copy.qcow2, which has no backing and names none");
    let copied = format!("[node.active]\n{}\n", lines("copy.qcow2").replace(", ", "\n"));
    let daemon = world.start(&[BASE, &copied], "active");
    assert!(world.has(4096, 2) && world.has(8192, 0));
    assert!(daemon.terminate().success());

    // On purpose it goes back.
    let marks = world.marks();
    assert_eq!(marks, [PathBuf::from(world.path("active.qcow2.vda.dlmoved"))]);
    std::fs::remove_file(&marks[0]).unwrap();
    let daemon = world.start(&nodes, "active");
    assert!(world.has(4096, 0));
    assert!(daemon.terminate().success());
}

#[test]
fn a_drive_that_got_a_snapshot_or_was_committed_is_started_where_it_is_and_nowhere_else() {
    let Some(world) = World::new("a_drive_that_got_a_snapshot") else { return };
    let nodes = [BASE, ACTIVE];
    let daemon = world.start(&nodes, "active");
    let top = world.path("top.qcow2");
    let (done, said) = world.driveline(&["ctl", "snapshot", "vda", &top]);
    assert!(
        done && said.contains(&format!("write [node.NAME] with driver = \"qcow2\", file = \"{top}\", backing = \"active\", and root = \"NAME\" in [drive.vda]")),
        "{said}"
    );
    world.write(0, 3);
    daemon.kill();
    world.refused(&nodes, "active", "write [node.NAME] with driver = \"qcow2\", file = \"top.qcow2\", backing = \"active\", and root = \"NAME\"");

    let snapshot = "[node.top]\ndriver = \"qcow2\"\nfile = \"top.qcow2\"\nbacking = \"active\"\n";
    let all = [BASE, ACTIVE, snapshot];
    let daemon = world.start(&all, "top");
    let (done, said) = world.driveline(&["ctl", "commit", "vda", "--base", "base"]);
    assert!(done && said.contains("write root = \"base\" in [drive.vda]"), "{said}");
    assert!(world.has(0, 3));
    assert!(daemon.terminate().success());
    world.refused(&all, "top", "write root = \"base\" in [drive.vda]");
    let daemon = world.start(&[BASE], "base");
    assert!(world.has(0, 3));

    // Whoever leads it back while it runs has led it back.
    let mut qmp = daemon.qmp();
    let arguments = json!({ "device": "vda", "target": top, "sync": "full", "format": "qcow2", "mode": "absolute-paths",
        "job-id": "back", "node-name": "again" });
    qmp.run("drive-mirror", arguments);
    qmp.wait_event("BLOCK_JOB_READY", "back");
    qmp.run("job-complete", json!({ "id": "back" }));
    qmp.wait_event("BLOCK_JOB_COMPLETED", "back");
    assert!(!world.marks().iter().any(|mark| mark.ends_with("top.qcow2.vda.dlmoved")), "{:?}", world.marks());
    drop(qmp);
    assert!(daemon.terminate().success());
    let alone = snapshot.replace("backing = \"active\"\n", "");
    let daemon = world.start(&[&alone], "top");
    assert!(world.has(0, 3));
    assert!(daemon.terminate().success());
}

/// Who changes the file first, and has it applied, knows where the drive goes.
#[test]
fn a_drive_that_its_file_leads_elsewhere_may_come_back() {
    let Some(world) = World::new("a_drive_that_its_file_leads_elsewhere") else { return };
    let other = "[node.other]\ndriver = \"raw\"\nfile = \"other.raw\"\n";
    std::fs::File::create(Path::new(&world.path("other.raw"))).unwrap().set_len(8 << 20).unwrap();
    let nodes = [BASE, ACTIVE, other];
    let daemon = world.start(&nodes, "active");
    let file = world.path("drive.toml");
    for root in ["other", "active"] {
        std::fs::write(&file, world.toml(&nodes, root)).unwrap();
        let (done, text) = world.driveline(&["apply", &file]);
        assert!(done, "{text}");
    }
    assert!(daemon.terminate().success());
    assert_eq!(world.marks(), [""; 0].map(PathBuf::from));
    assert!(world.start(&nodes, "active").terminate().success());
}

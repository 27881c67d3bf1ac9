//! Bitmaps that outlive the program: ended in good order, killed, beside raw images and in qcow2 images, with QEMU in between.

use crate::harness::{Daemon, Guest, Qmp, dirty, have, output, run};
use serde_json::{Value, json};
use std::{collections::BTreeSet, fs, path::Path};

const GRANULARITY: u64 = 65536;
const SIZE: u64 = 32 << 20;

/// A drive in a directory, and what its user wrote.
struct World {
    directory: tempfile::TempDir,
    toml: String,
}

impl World {
    /// `nodes` define a node `top`; `drive` are more lines of the drive's table.
    fn new(nodes: &str, drive: &str) -> Self {
        let bitmap = "bitmaps = [{ name = \"daily\", granularity = \"64KiB\", persistent = true }]";
        Self::with_bitmaps(nodes, &format!("{bitmap}\n{drive}"), "bitmaps = [\"daily\"]")
    }

    fn with_bitmaps(nodes: &str, drive: &str, export: &str) -> Self {
        let toml = format!(
            "{nodes}\n[drive.vda]\nroot = \"top\"\n{drive}\n\
             [export.vda]\ntype = \"nbd\"\ndrive = \"vda\"\nsocket = \"vda.sock\"\nwritable = true\n{export}\n\
             [monitor]\nqmp = \"qmp.sock\"\n"
        );
        Self { directory: tempfile::tempdir().unwrap(), toml }
    }

    fn raw() -> Self {
        let world = Self::new("[node.top]\ndriver = \"raw\"\nfile = \"disk.raw\"\n", "");
        let disk = fs::File::create(world.path("disk.raw")).unwrap();
        disk.set_len(SIZE).unwrap();
        world
    }

    fn qcow2() -> Self {
        let world = Self::new("[node.top]\ndriver = \"qcow2\"\nfile = \"disk.qcow2\"\n", "");
        run("qemu-img", &["create", "-q", "-f", "qcow2", &world.text("disk.qcow2"), "32M"]);
        world
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn start(&self) -> Daemon {
        Daemon::start(self.directory.path(), &self.toml)
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///vda?socket={}", self.text("vda.sock"))
    }

    fn guest(&self) -> Guest {
        Guest::connect(&self.path("vda.sock"), "vda")
    }

    /// Writes granules, and says them.
    fn write(&self, granules: &[u64]) -> BTreeSet<u64> {
        let mut guest = self.guest();
        for granule in granules {
            guest.write(granule * GRANULARITY + 512, &[0x55; 512]).unwrap();
        }
        granules.iter().copied().collect()
    }

    fn dirty(&self, name: &str) -> BTreeSet<u64> {
        dirty(&self.uri(), name, GRANULARITY)
    }

    fn store(&self) -> &Path {
        self.directory.path()
    }
}

fn all() -> BTreeSet<u64> {
    (0..SIZE / GRANULARITY).collect()
}

/// What a drive's bitmap is, for a monitor.
fn bitmap(qmp: &mut Qmp, name: &str) -> Value {
    let drives = qmp.run("query-block", json!({}));
    let bitmaps = drives[0]["inserted"]["dirty-bitmaps"].as_array().cloned().unwrap_or_default();
    bitmaps.into_iter().find(|bitmap| bitmap["name"] == name).unwrap_or(Value::Null)
}

fn recovered(qmp: &mut Qmp) -> Vec<(String, String)> {
    let found = qmp.run("x-driveline-query-recovered-bitmaps", json!({}));
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    found.as_array().unwrap().iter().map(|found| (word(&found["name"]), word(&found["verdict"]))).collect()
}

fn names(directory: &Path, ending: &str) -> Vec<String> {
    let names =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.ends_with(ending)).collect()
}

#[test]
fn a_bitmap_beside_a_raw_image_outlives_every_end_of_the_program() {
    if !have("persistent", &["nbdinfo"]) {
        return;
    }
    let world = World::raw();
    let daemon = world.start();
    let mut written = world.write(&[1, 2, 40]);
    assert_eq!(world.dirty("daily"), written);
    assert_eq!(bitmap(&mut daemon.qmp(), "daily")["persistent"], true);
    assert!(daemon.terminate().success());
    assert_eq!(names(world.store(), ".dlbitmaps"), ["vda.dlbitmaps"]);

    let daemon = world.start();
    assert_eq!(recovered(&mut daemon.qmp()), [("daily".to_owned(), "exact".to_owned())]);
    assert_eq!(world.dirty("daily"), written);
    written.extend(world.write(&[7]));
    daemon.kill();

    let daemon = world.start();
    daemon.wait_log(|lines| lines.iter().any(|line| line == "driveline: bitmap vda/daily: recovered, exact"));
    assert_eq!(world.dirty("daily"), written);
    // A clear is as lasting as a mark.
    daemon.qmp().run("block-dirty-bitmap-clear", json!({ "node": "vda", "name": "daily" }));
    let written = world.write(&[9]);
    daemon.kill();
    let daemon = world.start();
    assert_eq!(world.dirty("daily"), written);
    assert!(daemon.terminate().success());
}

#[test]
fn a_raw_image_that_was_changed_from_outside_makes_its_bitmap_all_dirty() {
    if !have("persistent", &["nbdinfo"]) {
        return;
    }
    let world = World::raw();
    let daemon = world.start();
    world.write(&[1]);
    assert!(daemon.terminate().success());
    run("qemu-io", &["-f", "raw", "-c", "write 1M 64k", &world.text("disk.raw")]);
    let daemon = world.start();
    assert_eq!(world.dirty("daily"), all());
    let found = daemon.qmp().run("x-driveline-query-recovered-bitmaps", json!({}));
    assert_eq!(found[0]["verdict"], "all-dirty");
    assert!(found[0]["reason"].as_str().unwrap().contains("disk.raw"), "{found}");
    daemon.qmp().run("block-dirty-bitmap-clear", json!({ "node": "vda", "name": "daily" }));
    let written = world.write(&[2]);
    assert!(daemon.terminate().success());
    let daemon = world.start();
    assert_eq!(world.dirty("daily"), written, "and then it is exact again");
    drop(daemon);
}

#[test]
fn qemu_and_driveline_take_turns_with_one_bitmap() {
    if !have("persistent", &["nbdinfo"]) {
        return;
    }
    let world = World::qcow2();
    let image = world.text("disk.qcow2");
    let daemon = world.start();
    let mut written = world.write(&[1, 2, 40]);
    // While it is in use, QEMU sees that it is.
    let info: Value =
        serde_json::from_str(&run("qemu-img", &["info", "-U", "--output=json", &image])).unwrap();
    let stored = &info["format-specific"]["data"]["bitmaps"];
    assert_eq!(
        (&stored[0]["name"], &stored[0]["flags"]),
        (&json!("daily"), &json!(["in-use", "auto"])),
        "{info}"
    );
    assert!(daemon.terminate().success());
    assert_eq!(names(world.store(), ".dlbitmaps"), [""; 0], "it is in the image now");

    let info: Value = serde_json::from_str(&run("qemu-img", &["info", "--output=json", &image])).unwrap();
    let stored = &info["format-specific"]["data"]["bitmaps"];
    assert_eq!(stored, &json!([{ "name": "daily", "granularity": 65536, "flags": ["auto"] }]));
    run("qemu-img", &["check", "-q", &image]);
    // QEMU records on.
    run("qemu-io", &["-c", "write 512k 512", &image]);
    written.insert(8);
    let daemon = world.start();
    assert_eq!(recovered(&mut daemon.qmp()), [("daily".to_owned(), "exact".to_owned())]);
    assert_eq!(world.dirty("daily"), written);
    written.extend(world.write(&[100]));
    daemon.kill();
    assert_eq!(names(world.store(), ".dlbitmaps"), ["disk.qcow2.dlbitmaps"]);
    run("qemu-img", &["check", "-q", &image]);

    let daemon = world.start();
    assert_eq!(recovered(&mut daemon.qmp()), [("daily".to_owned(), "exact".to_owned())]);
    assert_eq!(world.dirty("daily"), written);
    daemon.kill();
    // After a crash, somebody writes who cannot know.
    run("qemu-io", &["-c", "write 4M 512", &image]);
    let daemon = world.start();
    assert_eq!(recovered(&mut daemon.qmp()), [("daily".to_owned(), "all-dirty".to_owned())]);
    assert_eq!(world.dirty("daily"), all());
    assert!(daemon.terminate().success());
    run("qemu-img", &["check", "-q", &image]);
}

#[test]
fn a_bitmap_that_a_monitor_adds_renames_and_removes_is_found_as_it_was_left() {
    if !have("persistent", &["nbdinfo"]) {
        return;
    }
    for world in [World::raw(), World::qcow2()] {
        let daemon = world.start();
        let mut qmp = daemon.qmp();
        let add = |name: &str| json!({ "node": "vda", "name": name, "persistent": true });
        qmp.run("block-dirty-bitmap-add", add("one"));
        qmp.run("block-dirty-bitmap-add", add("two"));
        let mut power = add("three");
        power["x-driveline-durability"] = json!("power");
        power["disabled"] = json!(true);
        qmp.run("block-dirty-bitmap-add", power);
        world.write(&[3]);
        qmp.run("block-dirty-bitmap-remove", json!({ "node": "vda", "name": "one" }));
        qmp.run(
            "x-driveline-block-dirty-bitmap-rename",
            json!({ "node": "vda", "name": "two", "new-name": "zwei" }),
        );
        qmp.run("block-dirty-bitmap-enable", json!({ "node": "vda", "name": "three" }));
        world.write(&[4]);
        qmp.run("block-dirty-bitmap-disable", json!({ "node": "vda", "name": "three" }));
        daemon.kill();
        let daemon = world.start();
        let mut qmp = daemon.qmp();
        let count = |qmp: &mut Qmp, name: &str| bitmap(qmp, name)["count"].as_u64();
        assert_eq!(count(&mut qmp, "one"), None);
        assert_eq!(count(&mut qmp, "zwei"), Some(2 * GRANULARITY));
        assert_eq!(count(&mut qmp, "three"), Some(GRANULARITY));
        assert_eq!(bitmap(&mut qmp, "three")["recording"], false);
        assert!(daemon.terminate().success());
        let daemon = world.start();
        let mut qmp = daemon.qmp();
        assert_eq!(count(&mut qmp, "zwei"), Some(2 * GRANULARITY));
        assert_eq!(bitmap(&mut qmp, "three")["recording"], false);
        assert!(daemon.terminate().success());
    }
}

#[test]
fn a_transient_bitmap_ends_with_the_program_and_a_drive_without_persistent_ones_leaves_no_file() {
    let world = World::raw();
    let plain = world.toml.replace(", persistent = true", "");
    let daemon = Daemon::start(world.directory.path(), &plain);
    assert_eq!(bitmap(&mut daemon.qmp(), "daily")["persistent"], false);
    assert_eq!(names(world.store(), ".dlbitmaps"), [""; 0]);
    assert!(daemon.terminate().success());
    assert_eq!(names(world.store(), ".dlbitmaps"), [""; 0]);
}

/// A backup tool's bitmaps of QEMU's that was killed: listed, and adopted or removed; never in the way.
#[test]
fn bitmaps_that_qemu_left_in_use_are_listed_and_adopted_or_removed() {
    if !have("persistent", &["nbdinfo"]) {
        return;
    }
    let world = World::qcow2();
    let image = world.text("disk.qcow2");
    for name in ["daily", "a", "b"] {
        run("qemu-img", &["bitmap", "--add", &image, name]);
    }
    // QEMU says that they are in use as soon as it can write, and is killed.
    let killed = output("qemu-io", &["-c", "write 0 512", "-c", "abort", &image]);
    assert!(!killed.status.success());
    let daemon = world.start();
    let mut qmp = daemon.qmp();
    let mut found = recovered(&mut qmp);
    found.sort();
    let expected = [("a", "lost"), ("b", "lost"), ("daily", "all-dirty")];
    assert_eq!(found, expected.map(|(name, verdict)| (name.to_owned(), verdict.to_owned())));
    assert_eq!(world.dirty("daily"), all(), "the configuration wants it, so it can be used");
    assert_eq!(bitmap(&mut qmp, "a")["inconsistent"], true);
    world.write(&[3]);
    qmp.run("x-driveline-block-dirty-bitmap-adopt", json!({ "node": "vda", "name": "a" }));
    qmp.run("block-dirty-bitmap-remove", json!({ "node": "vda", "name": "b" }));
    assert_eq!(bitmap(&mut qmp, "a")["count"], SIZE);
    assert!(daemon.terminate().success());
    let info: Value = serde_json::from_str(&run("qemu-img", &["info", "--output=json", &image])).unwrap();
    let stored = info["format-specific"]["data"]["bitmaps"].as_array().unwrap();
    let mut names: Vec<_> = stored.iter().map(|b| (b["name"].as_str().unwrap(), &b["flags"])).collect();
    names.sort_by_key(|(name, _)| *name);
    let auto = json!(["auto"]);
    assert_eq!(names, [("a", &auto), ("daily", &auto)]);
    run("qemu-img", &["check", "-q", &image]);
}

#[test]
fn images_that_are_opened_later_show_their_bitmaps_and_get_them_back() {
    let world = World::raw();
    let other = world.text("other.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", &other, "8M"]);
    run("qemu-img", &["bitmap", "--add", &other, "theirs"]);
    run("qemu-io", &["-c", "write 64k 64k", &other]);
    let daemon = world.start();
    let mut qmp = daemon.qmp();
    let node = json!({
        "driver": "qcow2", "node-name": "other", "file": { "driver": "file", "filename": other },
    });
    qmp.run("blockdev-add", node.clone());
    let shown = |qmp: &mut Qmp| {
        let nodes = qmp.run("query-named-block-nodes", json!({}));
        let node = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "other").cloned();
        node.unwrap()["dirty-bitmaps"][0].clone()
    };
    let theirs = shown(&mut qmp);
    assert_eq!((&theirs["name"], &theirs["count"]), (&json!("theirs"), &json!(65536)), "{theirs}");
    assert_eq!((&theirs["persistent"], &theirs["recording"]), (&json!(true), &json!(true)));
    qmp.run("block-dirty-bitmap-add", json!({ "node": "other", "name": "ours", "persistent": true }));
    qmp.run("blockdev-del", json!({ "node-name": "other" }));
    let info: Value = serde_json::from_str(&run("qemu-img", &["info", "--output=json", &other])).unwrap();
    let stored = info["format-specific"]["data"]["bitmaps"].as_array().unwrap();
    let flags: Vec<_> = stored.iter().map(|bitmap| bitmap["flags"].clone()).collect();
    assert_eq!(flags, [json!(["auto"]), json!(["auto"])], "{info}");
    assert_eq!(names(world.store(), "other.qcow2.dlbitmaps"), [""; 0]);
    // Read-only it shows them, and keeps nobody from anything.
    let mut read_only = node;
    read_only["read-only"] = json!(true);
    qmp.run("blockdev-add", read_only);
    assert_eq!(shown(&mut qmp)["count"], 65536);
    qmp.run("blockdev-del", json!({ "node-name": "other" }));
    assert!(daemon.terminate().success());
}

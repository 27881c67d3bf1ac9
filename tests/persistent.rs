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

/// Two images, the upper one with data of its own.
fn layers() -> World {
    let world = World::new("[node.top]\ndriver = \"qcow2\"\nfile = \"top.qcow2\"\n", "");
    let (base, top) = (world.text("base.qcow2"), world.text("top.qcow2"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", &base, "32M"]);
    run("qemu-io", &["-c", "write -P 1 0 8M", &base]);
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &top]);
    run("qemu-io", &["-c", "write -P 2 4M 8M", &top]);
    world
}

/// Waits until the bitmaps are in this file beside an image, and in no other.
fn wait_kept_in(world: &World, file: &str) {
    wait_kept_at(world, &[file]);
}

/// Waits until these are all the files with bitmaps.
fn wait_kept_at(world: &World, files: &[&str]) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        let mut found = names(world.store(), ".dlbitmaps");
        found.sort();
        if found == files {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "{found:?}");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
fn bitmaps_follow_their_drive_into_the_image_that_it_is_committed_to() {
    if !have("persistent", &["nbdinfo"]) {
        return;
    }
    for killed in [false, true] {
        let world = layers();
        let daemon = world.start();
        let mut qmp = daemon.qmp();
        let mut written = world.write(&[1, 100]);
        wait_kept_in(&world, "top.qcow2.dlbitmaps");
        qmp.run("block-commit", json!({ "job-id": "c", "device": "vda" }));
        qmp.wait_event("BLOCK_JOB_READY", "c");
        written.extend(world.write(&[101]));
        qmp.run("job-complete", json!({ "id": "c" }));
        qmp.wait_event("BLOCK_JOB_COMPLETED", "c");
        wait_kept_in(&world, "base.qcow2.dlbitmaps");
        written.extend(world.write(&[102]));
        let kept = qmp.run("x-driveline-block-dirty-bitmap-store", json!({ "node": "vda" }));
        assert!(kept["file"].as_str().unwrap().ends_with("/base.qcow2.dlbitmaps"), "{kept}");
        if killed {
            daemon.kill()
        } else {
            assert!(daemon.terminate().success())
        }
        for image in ["base.qcow2", "top.qcow2"] {
            let checked = output("qemu-img", &["check", &world.text(image)]);
            assert!(matches!(checked.status.code(), Some(0 | 3)), "{image}: {checked:?}");
        }
        // As README says, the file is changed after a commit.
        let toml = world.toml.replace("top.qcow2", "base.qcow2");
        let daemon = Daemon::start(world.directory.path(), &toml);
        assert_eq!(world.dirty("daily"), written, "killed: {killed}");
        assert!(daemon.terminate().success());
        let info = run("qemu-img", &["info", "--output=json", &world.text("base.qcow2")]);
        let info: Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["format-specific"]["data"]["bitmaps"][0]["name"], "daily", "{info}");
    }
}

/// Leftovers of interrupted runs kept backup tools from the next backup: "already exists", "busy".
#[test]
fn a_kill_in_the_middle_of_a_job_leaves_the_bitmap_at_home_and_nobodys() {
    if !have("persistent", &["nbdinfo"]) {
        return;
    }
    let world = layers();
    let daemon = world.start();
    let mut qmp = daemon.qmp();
    qmp.run("block-dirty-bitmap-add", json!({ "node": "vda", "name": "weekly", "persistent": true }));
    let mut written = world.write(&[1]);
    qmp.run("block-stream", json!({ "job-id": "s", "device": "vda", "speed": 65536 }));
    written.extend(world.write(&[2]));
    let nodes = qmp.run("query-named-block-nodes", json!({}));
    assert!(nodes.as_array().unwrap().iter().any(|node| node["drv"] == "bitmap-holder"), "it is parked");
    daemon.kill();
    let daemon = world.start();
    let mut qmp = daemon.qmp();
    let daily = bitmap(&mut qmp, "daily");
    assert_eq!((&daily["busy"], &daily["recording"]), (&json!(false), &json!(true)));
    assert_eq!(world.dirty("daily"), written);
    let weekly = json!({ "node": "vda", "name": "weekly" });
    qmp.run("block-dirty-bitmap-clear", weekly.clone());
    qmp.run("block-dirty-bitmap-remove", weekly);
    qmp.run("block-dirty-bitmap-add", json!({ "node": "vda", "name": "weekly", "persistent": true }));
    assert!(daemon.terminate().success());
}

#[test]
fn a_monitor_moves_bitmaps_to_another_place_and_brings_them_to_the_disk() {
    if !have("persistent", &["nbdinfo"]) {
        return;
    }
    let world = World::qcow2();
    let daemon = world.start();
    let mut qmp = daemon.qmp();
    let mut written = world.write(&[5]);
    let place = world.text("elsewhere.dlbitmaps");
    let arguments = json!({ "node": "vda", "store": format!("file:{place}"), "flush": true });
    let kept = qmp.run("x-driveline-block-dirty-bitmap-store", arguments);
    assert_eq!(kept, json!({ "store": format!("file:{place}"), "file": place }));
    assert_eq!(names(world.store(), ".dlbitmaps"), ["elsewhere.dlbitmaps"]);
    written.extend(world.write(&[6]));
    let refused = |qmp: &mut Qmp, store: &str| {
        let arguments = json!({ "node": "vda", "store": store });
        qmp.try_run("x-driveline-block-dirty-bitmap-store", arguments).unwrap_err()["desc"].clone()
    };
    assert!(refused(&mut qmp, "qcow2:nothing").as_str().unwrap().contains("nothing"));
    let text = refused(&mut qmp, &format!("file:{}", world.text("drive.toml")));
    assert!(text.as_str().unwrap().contains("is there already"), "{text}");
    assert!(daemon.terminate().success());
    let info: Value =
        serde_json::from_str(&run("qemu-img", &["info", "--output=json", &world.text("disk.qcow2")]))
            .unwrap();
    assert_eq!(info["format-specific"]["data"]["bitmaps"], Value::Null, "they are not in the image any more");

    let toml =
        world.toml.replace("root = \"top\"", "root = \"top\"\nbitmap-store = \"file:elsewhere.dlbitmaps\"");
    let daemon = Daemon::start(world.directory.path(), &toml);
    assert_eq!(world.dirty("daily"), written);
    let mut qmp = daemon.qmp();
    qmp.run("x-driveline-block-dirty-bitmap-store", json!({ "node": "vda", "store": "qcow2:top" }));
    written.extend(world.write(&[7]));
    assert_eq!(names(world.store(), ".dlbitmaps"), ["disk.qcow2.dlbitmaps"]);
    assert!(daemon.terminate().success());
    let daemon = world.start();
    assert_eq!(world.dirty("daily"), written);
    assert!(daemon.terminate().success());
}

#[test]
fn bitmaps_follow_a_resize_across_a_kill() {
    if !have("persistent", &["nbdinfo"]) {
        return;
    }
    for world in [World::raw(), World::qcow2()] {
        let daemon = world.start();
        let mut qmp = daemon.qmp();
        let written = world.write(&[1, 511]);
        qmp.run("block_resize", json!({ "device": "vda", "size": SIZE + 2 * GRANULARITY }));
        daemon.kill();
        let mut grown = written.clone();
        grown.extend([512, 513]);
        let daemon = world.start();
        assert_eq!(world.dirty("daily"), grown, "what has grown is new to the drive's reader");
        daemon.qmp().run("block_resize", json!({ "device": "vda", "size": SIZE / 2 }));
        daemon.kill();
        let daemon = world.start();
        assert_eq!(world.dirty("daily"), BTreeSet::from([1]));
        assert!(daemon.terminate().success());
    }
}

/// A full disk must neither kill the program nor lose a mark.
#[test]
fn a_store_that_cannot_be_made_is_an_error_that_says_where() {
    let world = World::raw();
    let toml =
        world.toml.replace("root = \"top\"", "root = \"top\"\nbitmap-store = \"file:no/such/directory\"");
    fs::write(world.path("drive.toml"), toml).unwrap();
    let ended = output(Daemon::program().to_str().unwrap(), &["run", &world.text("drive.toml")]);
    let text = String::from_utf8_lossy(&ended.stderr);
    assert!(!ended.status.success() && text.contains("no/such/directory"), "{text}");
}

/// Tools that know chains keep bitmaps in lower images too. They stay there, and record what a commit changes in theirs.
#[test]
fn an_image_that_has_bitmaps_of_its_own_keeps_both_kinds() {
    if !have("persistent", &["nbdinfo"]) {
        return;
    }
    for killed in [false, true] {
        let world = layers();
        run("qemu-img", &["bitmap", "--add", "-g", "64k", &world.text("base.qcow2"), "theirs"]);
        let daemon = world.start();
        let mut qmp = daemon.qmp();
        let mut written = world.write(&[1, 300]);
        qmp.run("block-commit", json!({ "job-id": "c", "device": "vda" }));
        qmp.wait_event("BLOCK_JOB_READY", "c");
        qmp.run("job-complete", json!({ "id": "c" }));
        qmp.wait_event("BLOCK_JOB_COMPLETED", "c");
        wait_kept_at(&world, &["base.qcow2.dlbitmaps", "vda.dlbitmaps"]);
        written.extend(world.write(&[301]));
        if killed {
            daemon.kill()
        } else {
            assert!(daemon.terminate().success())
        }
        let toml = world.toml.replace("top.qcow2", "base.qcow2");
        let daemon = Daemon::start(world.directory.path(), &toml);
        assert_eq!(world.dirty("daily"), written, "killed: {killed}");
        let theirs = bitmap(&mut daemon.qmp(), "theirs");
        // All that the upper image held, from 4 MiB to 12, and what the guest wrote.
        let changed = (8 << 20) + 3 * GRANULARITY;
        assert!(theirs["count"].as_u64().unwrap() >= changed, "killed: {killed}: {theirs}");
        assert!(daemon.terminate().success());
        run("qemu-img", &["check", "-q", &world.text("base.qcow2")]);
    }
}

/// Virtual machines keep their images in one directory, and all call their first drive the same.
#[test]
fn drives_of_one_name_in_one_directory_do_not_take_each_others_bitmaps() {
    if !have("persistent", &["nbdinfo"]) {
        return;
    }
    let one = World::qcow2();
    let image = one.text("other.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", &image, "32M"]);
    let other_toml = one.toml.replace("disk.qcow2", "other.qcow2");
    let daemon = one.start();
    let written = one.write(&[1, 2]);
    daemon.kill();
    let daemon = Daemon::start(one.directory.path(), &other_toml);
    assert_eq!(one.dirty("daily"), BTreeSet::new());
    let others = one.write(&[3]);
    daemon.kill();
    let daemon = one.start();
    assert_eq!(one.dirty("daily"), written);
    assert!(daemon.terminate().success());
    let daemon = Daemon::start(one.directory.path(), &other_toml);
    assert_eq!(one.dirty("daily"), others);
    assert!(daemon.terminate().success());
}

#[test]
fn another_place_in_the_configuration_is_where_the_bitmaps_go() {
    if !have("persistent", &["nbdinfo"]) {
        return;
    }
    let world = World::qcow2();
    let in_file = world.toml.replace("root = \"top\"", "root = \"top\"\nbitmap-store = \"file:place.dlbitmaps\"");
    let mut written = BTreeSet::new();
    for (turn, killed) in [false, true, false, true].into_iter().enumerate() {
        for toml in [&world.toml, &in_file] {
            let daemon = Daemon::start(world.directory.path(), toml);
            assert_eq!(world.dirty("daily"), written, "turn {turn}");
            written.extend(world.write(&[written.len() as u64]));
            if killed { daemon.kill() } else { assert!(daemon.terminate().success()) }
        }
    }
    run("qemu-img", &["check", "-q", &world.text("disk.qcow2")]);
}

//! Checkpoints of drives in use: a view of each is what the guest had at that moment, whatever it writes meanwhile, and says what
//! changed since an earlier one.

use crate::harness::{Daemon, Guest, Qmp, have, run};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const SIZE: usize = 8 << 20;
const GRANULE: usize = 65536;

/// Two empty drives that are served. `None`: tools are missing.
fn begin(test: &str, tools: &[&str]) -> Option<(TempDir, Daemon, Qmp)> {
    if !have(test, &[&["qemu-img"], tools].concat()) {
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    for image in ["a.qcow2", "b.qcow2"] {
        let path = folder.path().join(image);
        run("qemu-img", &["create", "-q", "-f", "qcow2", path.to_str().unwrap(), &SIZE.to_string()]);
    }
    let daemon = Daemon::start(folder.path(), &configuration());
    let qmp = daemon.qmp();
    Some((folder, daemon, qmp))
}

struct Drive {
    guest: Guest,
    bytes: Vec<u8>,
}

impl Drive {
    fn write(&mut self, granule: usize, value: u8) {
        let at = granule * GRANULE;
        self.guest.write(at as u64, &[value; 4096]).unwrap();
        self.bytes[at..at + 4096].fill(value);
    }

    fn trim(&mut self, granule: usize) {
        let at = granule * GRANULE;
        self.guest.write_zeroes(at as u64, GRANULE as u32).unwrap();
        self.bytes[at..at + GRANULE].fill(0);
    }
}

fn configuration() -> String {
    let drive = |name: &str, image: &str| {
        format!(
            "[node.{name}-disk]\ndriver = \"qcow2\"\nfile = \"{image}\"\n\
             [drive.{name}]\nroot = \"{name}-disk\"\n\
             [export.{name}]\ntype = \"nbd\"\ndrive = \"{name}\"\nsocket = \"nbd.sock\"\nwritable = true\n"
        )
    };
    drive("vda", "a.qcow2") + &drive("vdb", "b.qcow2") + "[monitor]\nqmp = \"qmp.sock\"\n"
}

fn copy(folder: &Path, export: &str) -> Vec<u8> {
    let to = folder.join(format!("{export}.raw"));
    let uri = format!("nbd+unix:///{export}?socket={}", folder.join("nbd.sock").display());
    run("nbdcopy", &[&uri, to.to_str().unwrap()]);
    std::fs::read(to).unwrap()
}

/// Areas of a context with a status that is not 0: granule and status.
fn map(folder: &Path, export: &str, context: &str) -> Vec<(usize, u64)> {
    let uri = format!("nbd+unix:///{export}?socket={}", folder.join("nbd.sock").display());
    let text = run("nbdinfo", &["--json", &format!("--map={context}"), &uri]);
    let areas: Value = serde_json::from_str(&text).unwrap();
    let mut granules = Vec::new();
    for area in areas.as_array().unwrap() {
        let number = |key: &str| area[key].as_u64().unwrap() as usize;
        let (start, end) = (number("offset"), number("offset") + number("length"));
        if area["type"] != 0 {
            granules.extend(
                (start / GRANULE..end.div_ceil(GRANULE)).map(|at| (at, area["type"].as_u64().unwrap())),
            );
        }
    }
    granules
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.extension().is_some_and(|end| end == "scratch")).collect()
}

#[test]
fn a_view_is_the_moment_of_all_drives_and_knows_what_changed() {
    let name = "a_view_is_the_moment_of_all_drives_and_knows_what_changed";
    let Some((folder, _daemon, mut qmp)) = begin(name, &["nbdcopy", "nbdinfo"]) else { return };
    let mut drives = ["vda", "vdb"].map(|name| Drive {
        guest: Guest::connect(&folder.path().join("nbd.sock"), name),
        bytes: vec![0; SIZE],
    });
    for granule in 0..40 {
        drives.iter_mut().for_each(|drive| drive.write(granule, granule as u8 + 1));
    }
    qmp.run("x-driveline-checkpoint-create", json!({ "name": "monday", "drives": ["vda", "vdb"] }));
    drives[0].write(3, 200);
    drives[0].trim(5);
    drives[1].write(7, 201);
    let wish = json!({ "name": "tuesday", "drives": ["vda", "vdb"], "view": { "base": "monday" } });
    let made = qmp.run("x-driveline-checkpoint-create", wish);
    let moment = [drives[0].bytes.clone(), drives[1].bytes.clone()];
    // The guest goes on, over what the view has and over what it has not.
    for granule in 0..60 {
        drives.iter_mut().for_each(|drive| drive.write(granule, 99));
    }
    drives[0].trim(20);
    let views = made["views"].as_array().unwrap();
    let exports: Vec<&str> = views.iter().map(|view| view["export"].as_str().unwrap()).collect();
    assert_eq!(exports, ["tuesday-vda", "tuesday-vdb"]);
    for (export, was) in exports.iter().zip(&moment) {
        let seen = copy(folder.path(), export);
        let wrong = seen.chunks(4096).zip(was.chunks(4096)).position(|(is, was)| is != was);
        assert_eq!((seen.len(), wrong), (SIZE, None), "{export}");
    }
    let context = "qemu:dirty-bitmap:since-monday";
    assert_eq!(map(folder.path(), "tuesday-vda", context), [(3, 1), (5, 1)]);
    assert_eq!(map(folder.path(), "tuesday-vdb", context), [(7, 1)]);
    // What was trimmed need not be copied.
    assert_eq!(map(folder.path(), "tuesday-vda", "driveline:backup:since-monday"), [(3, 1), (5, 2)]);
    // A scratch file has no name, so nothing stays of it.
    assert_eq!(files(folder.path()), Vec::<PathBuf>::new());
    let kept = qmp.run("x-driveline-query-checkpoints", json!({ "drive": "vda" }));
    assert_eq!((&kept[0]["view"], &kept[1]["view"]["export"]), (&Value::Null, &json!("tuesday-vda")));

    qmp.run("x-driveline-checkpoint-release", json!({ "name": "tuesday" }));
    let exports = qmp.run("query-block-exports", json!({}));
    assert_eq!(exports.as_array().unwrap().len(), 2);
    let nodes = qmp.run("query-named-block-nodes", json!({ "flat": true }));
    assert_eq!(nodes.as_array().unwrap().len(), 4, "images and their files are left: {nodes}");
    // The epochs went on all the time.
    let delta = qmp.run("x-driveline-checkpoint-delta", json!({ "drive": "vdb", "from": "tuesday" }));
    assert_eq!(delta["count"], 60 * GRANULE);
    for drive in &mut drives {
        let seen = drive.guest.read(0, SIZE as u32).unwrap();
        assert!(seen == drive.bytes, "the guest sees what it wrote");
    }
}

#[test]
fn a_view_that_cannot_be_served_leaves_nothing() {
    let name = "a_view_that_cannot_be_served_leaves_nothing";
    let Some((folder, daemon, mut qmp)) = begin(name, &[]) else { return };
    let before = qmp.run("query-named-block-nodes", json!({ "flat": true }));
    let mut refused = |view: Value, expected: &str| {
        let wish = json!({ "name": "monday", "drives": ["vda", "vdb"], "view": view });
        let error = qmp.try_run("x-driveline-checkpoint-create", wish).unwrap_err();
        assert!(error["desc"].as_str().unwrap().contains(expected), "{error}");
        assert_eq!(qmp.run("query-named-block-nodes", json!({ "flat": true })), before);
        assert_eq!(qmp.run("x-driveline-query-checkpoints", json!({})), json!([]));
        assert_eq!(files(folder.path()), Vec::<PathBuf>::new());
    };
    refused(json!({ "base": "sunday" }), "'vda' has no checkpoint 'sunday'");
    refused(json!({ "scratch": "/no/such/folder" }), "/no/such/folder");
    // The name of the second drive's export is taken.
    let taken = json!({ "type": "nbd", "id": "monday-vdb", "node-name": "vda", "name": "monday-vdb" });
    daemon.qmp().run("block-export-add", taken);
    refused(json!({}), "monday-vdb");
}

/// One in memory after one that is kept took what changed since with it, and the next one could not be made.
#[test]
fn a_checkpoint_after_one_that_is_kept_is_kept_as_well() {
    let name = "a_checkpoint_after_one_that_is_kept_is_kept_as_well";
    let Some((folder, daemon, mut qmp)) = begin(name, &[]) else { return };
    let mut drive =
        Drive { guest: Guest::connect(&folder.path().join("nbd.sock"), "vda"), bytes: vec![0; SIZE] };
    let create = |name: &str| json!({ "name": name, "drives": ["vda"] });
    let mut monday = create("monday");
    monday["persistent"] = true.into();
    qmp.run("x-driveline-checkpoint-create", monday);
    drive.write(3, 1);
    let mut in_memory = create("tuesday");
    in_memory["persistent"] = false.into();
    let refused = qmp.try_run("x-driveline-checkpoint-create", in_memory).unwrap_err();
    assert!(refused["desc"].as_str().unwrap().contains("after 'monday' of 'vda'"), "{refused}");
    qmp.run("x-driveline-checkpoint-create", create("tuesday"));
    drive.write(5, 1);
    drop((qmp, drive));
    daemon.kill();
    let daemon = Daemon::start(folder.path(), &configuration());
    let mut qmp = daemon.qmp();
    qmp.run("x-driveline-checkpoint-create", create("wednesday"));
    let asked = json!({ "drive": "vda", "from": "monday" });
    let delta = qmp.run("x-driveline-checkpoint-delta", asked);
    assert_eq!(delta["count"], 2 * GRANULE, "{delta}");
    drop(qmp);
    assert!(daemon.terminate().success());
}

/// The scratch of a view was full: reads said that they were not permitted, nothing but a line on stderr told of it, and that
/// named neither the view nor the drive.
#[test]
fn a_view_that_is_lost_says_so_wherever_somebody_looks() {
    let name = "a_view_that_is_lost_says_so_wherever_somebody_looks";
    if !have(name, &["qemu-img"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for image in ["a.qcow2", "b.qcow2"] {
        let path = folder.path().join(image);
        run("qemu-img", &["create", "-q", "-f", "qcow2", path.to_str().unwrap(), &SIZE.to_string()]);
    }
    let daemon = Daemon::start(folder.path(), &configuration());
    let mut qmp = daemon.qmp();
    let mut drive =
        Drive { guest: Guest::connect(&folder.path().join("nbd.sock"), "vda"), bytes: vec![0; SIZE] };
    drive.write(3, 1);
    let names = |qmp: &mut Qmp| -> Vec<String> {
        let nodes = qmp.run("query-named-block-nodes", json!({ "flat": true }));
        let files = nodes.as_array().unwrap().iter().filter(|node| node["drv"] == "file");
        files.map(|node| node["node-name"].as_str().unwrap().to_owned()).collect()
    };
    let before = names(&mut qmp);
    let wish = json!({ "name": "monday", "drives": ["vda"], "view": {} });
    qmp.run("x-driveline-checkpoint-create", wish);
    let scratch = names(&mut qmp).into_iter().find(|name| !before.contains(name)).unwrap();
    let view = |qmp: &mut Qmp| qmp.run("x-driveline-query-checkpoints", json!({}))[0]["view"].take();
    assert_eq!(view(&mut qmp)["state"], "serving");
    let mut past = Guest::connect(&folder.path().join("nbd.sock"), "monday-vda");
    assert_eq!(past.read(3 * GRANULE as u64, 4096).unwrap(), [1; 4096]);

    let full =
        json!({ "driver": "blkdebug", "node-name": "full", "rules": [{ "op": "write", "errno": "ENOSPC" }] });
    qmp.run("x-driveline-blockdev-insert-filter", json!({ "above": scratch, "options": full }));
    drive.write(3, 2);
    assert_eq!(drive.guest.read(3 * GRANULE as u64, 4096).unwrap(), [2; 4096], "the guest goes on");
    let error = past.read(0, 4096).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(5), "{error}");
    let lost = view(&mut qmp);
    assert_eq!(lost["state"], "lost");
    let reason = lost["reason"].as_str().unwrap();
    assert!(reason.contains("No space left on device"), "{reason}");
    assert!(reason.contains(folder.path().to_str().unwrap()), "{reason}");
    let told = qmp.take_events(|event| event["event"] == "X_DRIVELINE_CHECKPOINT_VIEW_LOST");
    let expected = json!({ "checkpoint": "monday", "drive": "vda", "node-name": lost["node-name"],
        "export": "monday-vda", "reason": reason });
    assert_eq!(told.iter().map(|event| &event["data"]).collect::<Vec<_>>(), [&expected]);
    let said = "checkpoint 'monday': the view 'monday-vda' of drive 'vda' is lost: ";
    daemon.wait_log(|lines| lines.iter().any(|line| line.contains(said)));
    let ctl = |words: &[&str]| {
        let socket = folder.path().join("qmp.sock");
        let words = [&["ctl", "--socket", socket.to_str().unwrap()], words].concat();
        run(Daemon::program().to_str().unwrap(), &words)
    };
    let listed = ctl(&["checkpoints"]);
    assert!(listed.lines().any(|line| line.ends_with("monday-vda  lost")), "{listed}");
    assert!(listed.contains("The view of vda at monday is lost: what a write overwrites"), "{listed}");
    let exports = ctl(&["exports"]);
    assert!(
        exports.lines().any(|line| line.starts_with("monday-vda") && line.ends_with("lost")),
        "{exports}"
    );

    drop(past);
    ctl(&["remove", "full"]);
    ctl(&["checkpoint", "release", "monday"]);
    assert_eq!(qmp.run("x-driveline-query-checkpoints", json!({}))[0]["view"], Value::Null);
    assert_eq!(names(&mut qmp), before);
}

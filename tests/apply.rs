//! `driveline apply`: a running daemon becomes what a file says, under load, or nothing changes.

use crate::harness::{Daemon, Guest, have, run};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    process::{Command, Output},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

struct World {
    daemon: Daemon,
    folder: tempfile::TempDir,
}

const NODES: &str = r#"
    [node.base]
    driver = "qcow2"
    file = "base.qcow2"
    read-only = true

    [node.active]
    driver = "qcow2"
    file = "active.qcow2"
    backing = "base"
"#;

const MONITOR: &str = "[monitor]\nqmp = \"qmp.sock\"\n";

fn drive(root: &str, bitmaps: &str) -> String {
    format!("[drive.vda]\nroot = \"{root}\"\nbitmaps = [{bitmaps}]\n")
}

fn export(id: &str, more: &str) -> String {
    format!(
        "[export.{id}]\ntype = \"nbd\"\ndrive = \"vda\"\nsocket = \"{id}.sock\"\nwritable = true\n{more}\n"
    )
}

const LIMIT: &str = "[node.limit]\ndriver = \"throttle\"\nchild = \"active\"\niops = 100000\n";

impl World {
    fn new() -> Option<Self> {
        if !have("apply", &["qemu-img"]) {
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        run("qemu-img", &["create", "-q", "-f", "qcow2", &path("base.qcow2"), "16M"]);
        run(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "-b", &path("base.qcow2"), "-F", "qcow2", &path("active.qcow2")],
        );
        let first = [NODES, &drive("active", "{ name = \"daily\" }"), &export("vda", ""), MONITOR].concat();
        let daemon = Daemon::start(folder.path(), &first);
        Some(Self { daemon, folder })
    }

    fn try_apply(&self, parts: &[&str], options: &[&str]) -> Output {
        let file = self.folder.path().join("drive.toml");
        std::fs::write(&file, parts.concat()).unwrap();
        Command::new(Daemon::program()).arg("apply").arg(&file).args(options).output().unwrap()
    }

    fn apply(&self, parts: &[&str], options: &[&str]) -> String {
        let output = self.try_apply(parts, options);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn root(&self) -> Value {
        self.daemon.qmp().run("query-block", json!({}))[0]["inserted"]["node-name"].take()
    }
}

#[test]
fn filters_bitmaps_and_exports_come_and_go_while_a_guest_writes() {
    let Some(world) = World::new() else { return };
    let mut guest = Guest::connect(world.daemon.path("vda.sock").as_ref(), "vda");
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let writer = std::thread::spawn(move || {
        let mut granules = BTreeSet::new();
        for at in (0u64..).map(|at| at * 7 % 256) {
            if stopped.load(Relaxed) && granules.len() > 50 {
                break;
            }
            guest.write(at << 16, &[at as u8; 4096]).expect("no request fails");
            granules.insert(at);
        }
        granules.len() as u64
    });
    let bitmaps = "{ name = \"daily\" }, { name = \"weekly\", granularity = \"1MiB\" }";
    let second = [NODES, LIMIT, &drive("limit", bitmaps), &export("vda", ""), &export("more", ""), MONITOR];
    let steps = [
        "  + node limit (throttle)",
        "  ~ drive vda  root: active -> limit",
        "  + bitmap vda/weekly  1MiB, clean",
        "  + export more  shows vda at ",
    ];
    let expected = steps.join("\n");
    let dry = world.apply(&second, &["--dry-run"]);
    assert!(dry.starts_with(&format!("would change:\n{expected}")), "{dry}");
    assert_eq!(world.root(), "active");
    let done = world.apply(&second, &[]);
    assert!(done.starts_with(&format!("changed:\n{expected}")), "{done}");
    assert_eq!(world.root(), "limit");
    assert_eq!(world.apply(&second, &[]), "nothing to change\n");
    run("qemu-img", &["info", &format!("nbd+unix:///more?socket={}", world.daemon.path("more.sock"))]);
    // Other options of a node: it is opened anew in its place.
    let slower = LIMIT.replace("100000", "90000");
    let third = [NODES, &slower, &drive("limit", bitmaps), &export("vda", ""), &export("more", ""), MONITOR];
    let done = world.apply(&third, &[]);
    assert_eq!(done, "changed:\n  ~ node limit, opened anew  iops: 100000 -> 90000\n");
    // Back again; the bitmap that the file does not name any more is kept, until it is to go.
    let first = [NODES, &drive("active", "{ name = \"daily\" }"), &export("vda", ""), MONITOR];
    let done = world.apply(&first, &[]);
    let expected = "changed:\n  ~ drive vda  root: limit -> active\n  - node limit (throttle)\n  - export more  clients are disconnected\n";
    assert_eq!(done, expected);
    assert!(!std::path::Path::new(&world.daemon.path("more.sock")).exists());
    assert_eq!(world.apply(&first, &["--prune-bitmaps"]), "changed:\n  - bitmap vda/weekly  for good\n");
    // No request of the guest failed, and the drive's bitmap knows all that it wrote.
    stop.store(true, Relaxed);
    let granules = writer.join().unwrap();
    let daily = world.daemon.qmp().run("query-block", json!({}))[0]["inserted"]["dirty-bitmaps"][0].take();
    assert_eq!((&daily["name"], &daily["count"]), (&json!("daily"), &json!(granules << 16)));
}

/// One that was put in without a name stayed, and `apply` said that there was nothing to change.
#[test]
fn a_filter_without_a_name_goes_and_one_that_a_view_needs_is_told_of() {
    let Some(world) = World::new() else { return };
    let mut qmp = world.daemon.qmp();
    let file = [NODES, &drive("active", "{ name = \"daily\" }"), &export("vda", ""), MONITOR];
    let delay = json!({ "above": "vda", "options": { "driver": "delay", "read": "1ms" } });
    let inserted = qmp.run("x-driveline-blockdev-insert-filter", delay.clone());
    let name = inserted["node-name"].as_str().unwrap();
    // The drive's bitmaps are on its uppermost filter then.
    qmp.run("block-dirty-bitmap-add", json!({ "node": "vda", "name": "weekly" }));
    let below = json!({ "above": "base", "options": { "driver": "delay", "read": "1ms" } });
    let lower = qmp.run("x-driveline-blockdev-insert-filter", below);
    let lower = lower["node-name"].as_str().unwrap();
    let done = world.apply(&file, &[]);
    let gone = [
        format!("  - node {name} (delay), which was put above vda"),
        format!("  - node {lower} (delay), which was put above base"),
    ];
    let mut lines: Vec<&str> = done.lines().skip(1).collect();
    lines.sort_unstable();
    assert_eq!(lines, gone, "{done}");
    assert_eq!(world.root(), "active");
    let bitmaps = qmp.run("query-block", json!({}))[0]["inserted"]["dirty-bitmaps"].take();
    assert_eq!(bitmaps.as_array().unwrap().len(), 2, "{bitmaps}");
    assert_eq!(world.apply(&file, &[]), "nothing to change\n");

    // If what follows fails, it is put in again.
    qmp.run("x-driveline-blockdev-insert-filter", delay.clone());
    let taken = "[export.second]\ntype = \"nbd\"\ndrive = \"vda\"\nsocket = \"no/such/folder.sock\"\n";
    assert!(!world.try_apply(&[&file[..], &[taken]].concat(), &[]).status.success());
    let root = world.root();
    assert!(root.as_str().unwrap().starts_with('#'), "{root}");
    world.apply(&file, &[]);

    // A checkpoint's view would show what is written now.
    qmp.run("x-driveline-checkpoint-create", json!({ "name": "monday", "drives": ["vda"], "view": {} }));
    let above = world.root();
    let done = world.apply(&file, &[]);
    let expected =
        format!("nothing to change\n  = node {} (copy-before-write) stays: node '", above.as_str().unwrap());
    assert!(done.starts_with(&expected) && done.contains("export 'monday-vda'"), "{done}");
    // Another root goes below it.
    let limited = [NODES, LIMIT, &drive("limit", "{ name = \"daily\" }"), &export("vda", ""), MONITOR];
    world.apply(&limited, &[]);
    assert_eq!(world.root(), above);
    let mut guest = Guest::connect(world.daemon.path("vda.sock").as_ref(), "vda");
    guest.write(0, &[9; 4096]).unwrap();
    let mut past = Guest::connect(world.daemon.path("vda.sock").as_ref(), "monday-vda");
    assert_eq!(past.read(0, 4096).unwrap(), [0; 4096]);
    drop(past);
    qmp.run("x-driveline-checkpoint-release", json!({ "name": "monday" }));
    assert_eq!(world.root(), "limit");
}

#[test]
fn what_cannot_be_done_changes_nothing() {
    let Some(world) = World::new() else { return };
    let before = world.daemon.qmp().run("query-named-block-nodes", json!({ "flat": true }));
    let missing = "[node.other]\ndriver = \"qcow2\"\nfile = \"nowhere.qcow2\"\n";
    let bitmap = "{ name = \"daily\" }, { name = \"new\" }";
    let refused = |parts: &[&str], expected: &str| {
        let output = world.try_apply(parts, &[]);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{errors}");
        assert!(errors.contains(expected), "{errors}");
        let after = world.daemon.qmp().run("query-named-block-nodes", json!({ "flat": true }));
        assert_eq!(after, before);
        assert_eq!(world.daemon.qmp().run("query-block-exports", json!({})).as_array().unwrap().len(), 1);
    };
    let export = export("vda", "");
    refused(&[NODES, missing, &drive("active", bitmap), &export, MONITOR], "nowhere.qcow2");
    // Another image under a drive whose bitmaps speak of the old one.
    let other = "[node.other]\ndriver = \"memory\"\nsize = \"16MiB\"\n";
    refused(&[NODES, other, &drive("other", bitmap), &export, MONITOR], "say nothing of the data of 'other'");
    refused(
        &[NODES, &drive("active", "{ name = \"daily\", granularity = \"4KiB\" }"), &export, MONITOR],
        "another granularity",
    );
    refused(&[NODES, &drive("activ", bitmap), &export, MONITOR], "did you mean");
    // Another backing file: where that is said, which nothing told.
    let path = |name: &str| world.folder.path().join(name).to_str().unwrap().to_owned();
    let nodes = NODES.replace("base.qcow2", "absent.qcow2");
    refused(&[&nodes, &drive("active", bitmap), &export, MONITOR], "drive.toml:4: 'file' of node 'base': ");
    run("qemu-img", &["create", "-q", "-f", "qcow2", &path("small.qcow2"), "1M"]);
    let nodes = NODES.replace("base.qcow2", "small.qcow2");
    world.apply(&[&nodes, &drive("active", bitmap), &export, MONITOR], &["--dry-run"]);
    // A socket that cannot be had: what the graph had become by then is taken back.
    let taken = "[export.second]\ntype = \"nbd\"\ndrive = \"vda\"\nsocket = \"no/such/folder.sock\"\n";
    refused(&[NODES, LIMIT, &drive("limit", bitmap), &export, taken, MONITOR], "folder.sock");
    // A job counts on what is there.
    world.daemon.qmp().run("block-stream", json!({ "device": "vda", "speed": 1, "auto-finalize": false }));
    refused_by_job(&world, &[NODES, LIMIT, &drive("limit", bitmap), &export, MONITOR]);
}

fn refused_by_job(world: &World, parts: &[&str]) {
    let output = world.try_apply(parts, &[]);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(errors.contains("job 'vda' is at work on drive 'vda'"), "{errors}");
}

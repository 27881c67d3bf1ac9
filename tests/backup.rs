//! Backups and fleecing as QEMU's clients do them, over QMP, with other people's tools as judges.

use crate::harness::{Daemon, Guest, Qmp, have, run};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use serde_json::{Value, json};
use std::{
    path::Path,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 24 * MIB;

const CONFIGURATION: &str = r#"
[node.active]
driver = "qcow2"
file = "active.qcow2"

[drive.vda]
root = "active"
bitmaps = [{ name = "daily", granularity = "64KiB" }]

[export.vda]
type = "nbd"
drive = "vda"
socket = "vda.sock"
writable = true

[monitor]
qmp = "qmp.sock"
"#;

struct World {
    directory: tempfile::TempDir,
    daemon: Daemon,
    qmp: Qmp,
}

impl World {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        image(directory.path(), "active.qcow2", &[]);
        let daemon = Daemon::start(directory.path(), CONFIGURATION);
        let qmp = daemon.qmp();
        let world = Self { directory, daemon, qmp };
        let mut guest = world.guest();
        let mut rng = SmallRng::seed_from_u64(1);
        for _ in 0..150 {
            scribble(&mut guest, &mut rng);
        }
        world
    }

    fn guest(&self) -> Guest {
        Guest::connect(&self.directory.path().join("vda.sock"), "vda")
    }

    fn path(&self, name: &str) -> String {
        self.daemon.path(name)
    }

    fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.path("vda.sock"))
    }

    /// What the drive holds now, as a raw file.
    fn keep(&self, name: &str) -> String {
        let kept = self.path(name);
        run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &self.uri("vda"), &kept]);
        kept
    }

    fn add(&mut self, node: Value) {
        self.qmp.run("blockdev-add", node);
    }

    /// Runs `work` while two guests write.
    fn under_load(&mut self, work: impl FnOnce(&mut Self)) {
        let stop = AtomicBool::new(false);
        let guests = [self.guest(), self.guest()];
        std::thread::scope(|scope| {
            for (number, mut guest) in guests.into_iter().enumerate() {
                let stop = &stop;
                scope.spawn(move || {
                    let mut rng = SmallRng::seed_from_u64(number as u64);
                    while !stop.load(SeqCst) {
                        scribble(&mut guest, &mut rng);
                    }
                });
            }
            work(self);
            stop.store(true, SeqCst);
        });
    }

    fn identical(&self, image: &str, format: &str, kept: &str) {
        let image = self.path(image);
        run("qemu-img", &["compare", "-f", format, "-F", "raw", &image, kept]);
        if format == "qcow2" {
            run("qemu-img", &["check", "-q", &image]);
        }
    }
}

fn image(directory: &Path, name: &str, more: &[&str]) {
    let (path, size) = (directory.join(name), SIZE.to_string());
    let mut arguments = vec!["create", "-q", "-f", "qcow2"];
    arguments.extend(more);
    arguments.extend([path.to_str().unwrap(), &size]);
    run("qemu-img", &arguments);
}

fn scribble(guest: &mut Guest, rng: &mut SmallRng) {
    let length: u32 = [512, 4096, 70000, 300000][rng.random_range(0..4)];
    let offset = rng.random_range(0..(SIZE - u64::from(length)) / 512) * 512;
    match rng.random_range(0..8) {
        0 => guest.write_zeroes(offset, length).unwrap(),
        1 => guest.trim(offset, length).unwrap(),
        _ => guest.write(offset, &vec![rng.random(); length as usize]).unwrap(),
    }
}

fn qcow2(world: &World, name: &str, backing: Option<&str>) -> Value {
    let file = json!({ "driver": "file", "filename": world.path(&format!("{name}.qcow2")) });
    let mut node = json!({ "driver": "qcow2", "node-name": name, "file": file });
    if let Some(backing) = backing {
        node["backing"] = backing.into();
    }
    node
}

#[test]
fn an_export_of_a_point_in_time_is_what_the_drive_was_while_the_guest_writes() {
    if !have("backup", &["qemu-img", "nbdcopy"]) {
        return;
    }
    let mut world = World::new();
    // The scratch image of fleecing: what is not copied is read through it from the drive itself.
    image(world.directory.path(), "scratch.qcow2", &["-F", "qcow2", "-b", "active.qcow2"]);
    let kept = world.keep("kept.raw");
    world.add(qcow2(&world, "scratch", Some("active")));
    let filter = json!({ "driver": "copy-before-write", "node-name": "cbw", "target": "scratch" });
    world.qmp.run("x-driveline-blockdev-insert-filter", json!({ "above": "active", "options": filter }));
    world.add(json!({ "driver": "snapshot-access", "node-name": "view", "file": "cbw" }));
    for node in ["view", "scratch"] {
        let export = json!({ "type": "nbd", "id": node, "node-name": node, "name": node });
        world.qmp.run("block-export-add", export);
    }
    world.under_load(|world| {
        for (export, copy) in [("view", "copy.raw"), ("scratch", "scratch.raw"), ("view", "again.raw")] {
            let copy = world.path(copy);
            run("nbdcopy", &[&world.uri(export), &copy]);
            run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &copy, &kept]);
        }
    });
    let refused = world.qmp.try_run("blockdev-del", json!({ "node-name": "cbw" })).unwrap_err();
    assert!(refused["desc"].as_str().unwrap().contains("in use"), "{refused}");
    for node in ["view", "scratch"] {
        world.qmp.run("block-export-del", json!({ "id": node, "mode": "hard" }));
        world.qmp.wait_event("BLOCK_EXPORT_DELETED", node);
    }
    world.qmp.run("blockdev-del", json!({ "node-name": "view" }));
    world.qmp.run("x-driveline-blockdev-remove-filter", json!({ "node-name": "cbw" }));
    world.qmp.run("blockdev-del", json!({ "node-name": "scratch" }));
    world.daemon.terminate();
}

#[test]
fn a_chain_of_backups_restores_to_each_moment() {
    if !have("backup", &["qemu-img"]) {
        return;
    }
    let mut world = World::new();
    image(world.directory.path(), "full.qcow2", &[]);
    image(world.directory.path(), "packed.qcow2", &[]);
    image(world.directory.path(), "more.qcow2", &["-F", "qcow2", "-b", "full.qcow2"]);
    let backup = |world: &mut World, name: &str, more: Value| {
        let kept = world.keep(&format!("{name}.raw"));
        let own = if name == "more" { Some("full") } else { None };
        world.add(qcow2(world, name, own));
        let mut arguments = json!({ "job-id": name, "device": "vda", "target": name });
        arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        world.qmp.run(
            "transaction",
            json!({
                "actions": [{ "type": "blockdev-backup", "data": arguments }],
                "properties": { "completion-mode": "grouped" },
            }),
        );
        world.under_load(|world| {
            let ended = world.qmp.wait_event("BLOCK_JOB_COMPLETED", name);
            assert_eq!(ended["data"].get("error"), None, "{ended}");
        });
        kept
    };
    let mode = json!({ "sync": "full", "bitmap": "daily", "bitmap-mode": "on-success" });
    let full = backup(&mut world, "full", mode);
    let more = backup(&mut world, "more", json!({ "sync": "incremental", "bitmap": "daily" }));
    let packed = backup(&mut world, "packed", json!({ "sync": "full", "compress": true }));
    for node in ["more", "full", "packed"] {
        world.qmp.run("blockdev-del", json!({ "node-name": node }));
    }
    world.identical("full.qcow2", "qcow2", &full);
    world.identical("more.qcow2", "qcow2", &more);
    world.identical("packed.qcow2", "qcow2", &packed);
    world.daemon.terminate();
}

#[test]
fn what_cannot_be_backed_up_is_refused_in_qemus_words() {
    let mut world = World::new();
    world.add(json!({ "driver": "null-co", "node-name": "same", "size": SIZE }));
    world.add(json!({ "driver": "null-co", "node-name": "other", "size": 2 * SIZE }));
    let mut refused = |more: Value| {
        let mut arguments = json!({ "job-id": "j", "device": "vda", "target": "same", "sync": "full" });
        arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let error = world.qmp.try_run("blockdev-backup", arguments).unwrap_err();
        assert_eq!(error["class"], "GenericError", "{error}");
        error["desc"].as_str().unwrap().to_owned()
    };
    for (more, text) in [
        (json!({ "target": "other" }), "Source and target image have different sizes"),
        (json!({ "target": "active" }), "Source and target cannot be the same"),
        (json!({ "device": "x" }), "Cannot find device='x' nor node-name='x'"),
        (json!({ "sync": "incremental" }), "must provide a valid bitmap name for 'incremental' sync mode"),
        (json!({ "bitmap": "daily" }), "Bitmap sync mode must be given when providing a bitmap"),
        (json!({ "bitmap-mode": "always" }), "Cannot specify bitmap sync mode without a bitmap"),
        (
            json!({ "sync": "none", "bitmap": "daily", "bitmap-mode": "always" }),
            "sync mode 'none' does not produce meaningful bitmap outputs",
        ),
        (
            json!({ "bitmap": "daily", "bitmap-mode": "never" }),
            "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode 'full'",
        ),
        (json!({ "sync": "incremental", "bitmap": "zz" }), "Bitmap 'zz' could not be found"),
        (json!({ "x-perf": { "max-workers": 0 } }), "max-workers must be between 1 and 2147483647"),
        (
            json!({ "x-perf": { "max-chunk": 1000 } }),
            "Required max-chunk (1000) is less than backup cluster size (65536)",
        ),
        (
            json!({ "x-perf": { "min-cluster-size": 1000 } }),
            "Could not create node: Cannot create block-copy-state: min-cluster-size needs to be a power of 2",
        ),
        (json!({ "speed": -1 }), "Parameter 'speed' expects a non-negative value"),
    ] {
        assert_eq!(refused(more), text);
    }
    let nodes = world.qmp.run("query-named-block-nodes", json!({}));
    let names = nodes.as_array().unwrap().iter().map(|node| node["drv"].as_str().unwrap());
    assert!(!names.into_iter().any(|driver| driver == "copy-before-write"), "nothing is left");
    world.daemon.terminate();
}

//! Bitmaps that outlive the program: ended in good order, killed, beside raw images and in qcow2 images, with QEMU in between.

mod ends;
mod museum;
mod outside;
mod places;
mod qemu;
mod snapshots;

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

    /// Waits until the locks of a program that was killed are gone from an image: its ring may outlive it by some milliseconds.
    fn unlocked(&self, image: &str) -> String {
        let image = self.text(image);
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !output("qemu-img", &["info", &image]).status.success() {
            assert!(std::time::Instant::now() < deadline, "{image} is locked");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        image
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

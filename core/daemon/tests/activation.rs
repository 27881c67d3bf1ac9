//! Images that another program may have for a while: their bitmaps are in them then, and come back as it left them.

use driveline_bitmap::{Durability, View};
use driveline_daemon::{config::Config, daemon::Daemon};
use serde_json::{Value, json};
use std::{
    path::{Path, PathBuf},
    process::Command,
};

const MIB: u64 = 1 << 20;

struct World {
    daemon: Daemon,
    folder: tempfile::TempDir,
}

/// The program's standard output.
#[track_caller]
fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

impl World {
    /// An image `disk.qcow2`, a configuration of it, and a server without exports.
    fn new(config: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk.qcow2");
        run("qemu-img", &["create", "-q", "-f", "qcow2", image.to_str().unwrap(), "1M"]);
        let (config, mistakes) = Config::parse(&folder.path().join("vm.toml"), config);
        let daemon = Daemon::start(&config, mistakes).map_err(|error| error.to_string()).unwrap();
        let world = Self { daemon, folder };
        let path = world.path("nbd.sock");
        world.ok("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": path } } }));
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    #[track_caller]
    fn ok(&self, command: &str, arguments: Value) -> Value {
        let done = self.daemon.execute(command, arguments.clone());
        done.unwrap_or_else(|error| panic!("{command} {arguments}: {}", error.desc))
    }

    fn export(&self, node: &str) {
        let export = json!({
            "type": "nbd", "id": "e", "name": "e", "node-name": node, "writable": true, "allow-inactive": true,
        });
        self.ok("block-export-add", export);
    }

    #[track_caller]
    fn set_active(&self, node: &str, active: bool) {
        self.ok("blockdev-set-active", json!({ "node-name": node, "active": active }));
    }

    /// A client of the export writes 64 KiB there.
    #[track_caller]
    fn write(&self, at: u64) {
        let url = format!("nbd+unix:///e?socket={}", self.path("nbd.sock").display());
        let said = run("qemu-io", &["-f", "raw", "-c", &format!("write -P 7 {at} 64k"), &url]);
        assert!(said.contains("wrote 65536"), "{said}");
    }

    fn dirty(&self, node: &str) -> u64 {
        let bitmap = self.daemon.graph().bitmap(node, "daily").unwrap();
        assert!(bitmap.is_persistent() && bitmap.is_recording());
        bitmap.bits().dirty_bytes()
    }
}

/// The flags of the image's bitmap `daily`, as QEMU tells them, which opens it alone.
#[track_caller]
fn flags(image: &Path) -> Vec<String> {
    let info: Value =
        serde_json::from_str(&run("qemu-img", &["info", "--output=json", image.to_str().unwrap()])).unwrap();
    let bitmaps = &info["format-specific"]["data"]["bitmaps"];
    assert_eq!(bitmaps[0]["name"], "daily", "{info}");
    bitmaps[0]["flags"].as_array().unwrap().iter().map(|flag| flag.as_str().unwrap().to_owned()).collect()
}

/// How much the image's bitmap `daily` has dirty: it is merged into an image of its own, and shown to a client there.
#[track_caller]
fn dirty_in(image: &Path) -> u64 {
    let target = image.with_extension("seen");
    std::fs::copy(image, &target).unwrap();
    let nbd = image.with_extension("sock");
    let path = target.to_str().unwrap();
    let shown = format!("nbd+unix:///?socket={}", nbd.display());
    let map = format!("nbdinfo --map=qemu:dirty-bitmap:daily '{shown}'; true");
    let said = run(
        "qemu-nbd",
        &[
            "-t",
            "-f",
            "qcow2",
            "-r",
            "-B",
            "daily",
            "-k",
            nbd.to_str().unwrap(),
            "--fork",
            "--pid-file",
            image.with_extension("pid").to_str().unwrap(),
            path,
        ],
    );
    assert!(said.is_empty(), "{said}");
    let map = run("sh", &["-c", &map]);
    let pid = std::fs::read_to_string(image.with_extension("pid")).unwrap();
    run("kill", &[pid.trim()]);
    let dirty = map.lines().filter(|line| line.contains("dirty"));
    dirty.map(|line| line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()).sum()
}

const NODE: &str = "[node.disk]\ndriver = \"qcow2\"\nfile = \"disk.qcow2\"\n";

/// With an export that may stay while its node is inactive the bitmaps were left beside the image, which said that they were in
/// use: its next user had none.
#[test]
fn an_image_that_is_inactive_below_an_export_has_its_bitmaps_and_gives_them_back() {
    let world = World::new(NODE);
    world.ok("block-dirty-bitmap-add", json!({ "node": "disk", "name": "daily", "persistent": true }));
    world.export("disk");
    let image = world.path("disk.qcow2");
    for cycle in 0..2 {
        world.write(cycle * 128 * 1024);
        assert_eq!(world.dirty("disk"), (cycle + 1) * 64 * 1024);
        world.set_active("disk", false);
        assert_eq!(flags(&image), ["auto"]);
        assert_eq!(dirty_in(&image), (cycle + 1) * 64 * 1024);
        assert!(!world.path("disk.qcow2.dlbitmaps").exists());
        assert!(world.daemon.graph().bitmap("disk", "daily").is_err());
        world.set_active("disk", true);
        assert_eq!(world.dirty("disk"), (cycle + 1) * 64 * 1024);
        assert!(flags_in_use(&image).contains(&"in-use".to_owned()));
    }
    world.daemon.stop().unwrap();
    assert_eq!((flags(&image), dirty_in(&image)), (vec!["auto".to_owned()], 128 * 1024));
}

/// The same, of an image that somebody has open.
fn flags_in_use(image: &Path) -> Vec<String> {
    let copy = image.with_extension("copy");
    std::fs::copy(image, &copy).unwrap();
    flags(&copy)
}

/// A drive's bitmaps are in its image, below a filter, which is its user like any other.
#[test]
fn an_image_that_is_inactive_below_a_filter_has_its_drives_bitmaps() {
    let filter = "[node.top]\ndriver = \"copy-on-read\"\nchild = \"disk\"\n";
    let drive = "[drive.vda]\nroot = \"top\"\nbitmaps = [{ name = \"daily\", persistent = true }, \
                 { name = \"log\", view = \"node\", durability = \"power\" }]\n";
    let world = World::new(&format!("{NODE}{filter}{drive}"));
    world.export("top");
    let image = world.path("disk.qcow2");
    for cycle in 0..2 {
        world.write(cycle * 128 * 1024);
        assert_eq!(world.dirty("vda"), (cycle + 1) * 64 * 1024);
        world.set_active("top", false);
        assert_eq!(flags(&image), ["auto"]);
        assert_eq!(dirty_in(&image), (cycle + 1) * 64 * 1024);
        world.set_active("top", true);
        assert_eq!(world.dirty("vda"), (cycle + 1) * 64 * 1024);
        // What an image cannot say of a bitmap is as it was.
        let log = world.daemon.graph().bitmap("vda", "log").unwrap();
        assert_eq!((log.view(), log.durability()), (View::Node, Some(Durability::Power)));
    }
    world.daemon.stop().unwrap();
    assert_eq!((flags(&image), dirty_in(&image)), (vec!["auto".to_owned()], 128 * 1024));
}

#[test]
fn what_another_program_does_with_bitmaps_of_an_inactive_image_is_found() {
    let world = World::new(NODE);
    let image = world.path("disk.qcow2");
    world.set_active("disk", false);
    let add = json!({ "node": "disk", "name": "early", "persistent": true });
    let refused = world.daemon.execute("block-dirty-bitmap-add", add).unwrap_err().desc;
    assert!(refused.contains("it is inactive"), "{refused}");
    run("qemu-img", &["bitmap", "--add", image.to_str().unwrap(), "daily"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write 0 64k", image.to_str().unwrap()]);
    world.set_active("disk", true);
    assert_eq!(world.dirty("disk"), 64 * 1024);
    world.export("disk");
    world.write(MIB / 2);
    world.daemon.stop().unwrap();
    assert_eq!(dirty_in(&image), 128 * 1024);
}

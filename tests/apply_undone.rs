//! `driveline apply` that cannot be carried out to its end: all is as it was, above all bitmaps.

use crate::harness::{Daemon, Guest, dirty, have, run};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::{Command, Output},
};

const TOOLS: [&str; 2] = ["qemu-img", "nbdinfo"];
const GRANULE: u64 = 64 << 10;

struct World {
    folder: tempfile::TempDir,
    daemon: Option<Daemon>,
}

/// An image as a drive of its name, without the drive's other lines.
fn image(name: &str, more: &str) -> String {
    format!(
        "[node.{name}]\ndriver = \"qcow2\"\nfile = \"{name}.qcow2\"\n[drive.{name}-drive]\nroot = \"{name}\"\n{more}\n"
    )
}

fn export(name: &str, more: &str) -> String {
    format!(
        "[export.{name}]\ntype = \"nbd\"\ndrive = \"{name}-drive\"\nsocket = \"{name}.sock\"\nwritable = true\n{more}\n"
    )
}

const MONITOR: &str = "[monitor]\nqmp = \"qmp.sock\"\n";
const DAILY: &str = "bitmaps = [{ name = \"daily\", granularity = \"64KiB\", persistent = true }]";
/// It is refused after all else was done: nobody may write there.
const REFUSED: &str = "[node.fixed]\ndriver = \"memory\"\nsize = \"1MiB\"\nread-only = true\n\
     [export.refused]\ntype = \"nbd\"\nnode = \"fixed\"\nsocket = \"refused.sock\"\nwritable = true\n";

impl World {
    fn start(parts: &[&str]) -> Option<Self> {
        if !have("apply_undone", &TOOLS) {
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        for name in ["a.qcow2", "b.qcow2"] {
            run(
                "qemu-img",
                &["create", "-q", "-f", "qcow2", folder.path().join(name).to_str().unwrap(), "16M"],
            );
        }
        let daemon = Some(Daemon::start(folder.path(), &parts.concat()));
        Some(Self { folder, daemon })
    }

    fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().unwrap()
    }

    fn again(&mut self, parts: &[&str]) {
        assert!(self.daemon.take().unwrap().terminate().success());
        self.daemon = Some(Daemon::start(self.folder.path(), &parts.concat()));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn guest(&self, name: &str) -> Guest {
        Guest::connect(&self.path(&format!("{name}.sock")), name)
    }

    fn write(&self, name: &str, granules: &[u64]) {
        let mut guest = self.guest(name);
        for granule in granules {
            guest.write(granule * GRANULE, &[7; 512]).unwrap();
        }
        guest.flush().unwrap();
    }

    fn dirty(&self, name: &str) -> BTreeSet<u64> {
        let socket = self.path(&format!("{name}.sock"));
        dirty(&format!("nbd+unix:///{name}?socket={}", socket.display()), "daily", GRANULE)
    }

    fn try_apply(&self, parts: &[&str], options: &[&str]) -> Output {
        let file = self.path("drive.toml");
        std::fs::write(&file, parts.concat()).unwrap();
        Command::new(Daemon::program()).arg("apply").arg(&file).args(options).output().unwrap()
    }

    fn apply(&self, parts: &[&str], options: &[&str]) -> String {
        let output = self.try_apply(parts, options);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn refused(&self, parts: &[&str], options: &[&str], expected: &str) {
        let output = self.try_apply(parts, options);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{errors}");
        assert!(errors.contains(expected), "{errors}");
    }

    /// Bitmaps that an image holds, by name, and whether somebody has them in use.
    fn in_image(&self, name: &str) -> Vec<(String, bool)> {
        let path = self.path(name);
        let info = run("qemu-img", &["info", "-U", "--output=json", path.to_str().unwrap()]);
        let info: Value = serde_json::from_str(&info).unwrap();
        let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
        let bitmap = |bitmap: &Value| {
            let flags = bitmap["flags"].as_array().unwrap();
            (bitmap["name"].as_str().unwrap().to_owned(), flags.contains(&json!("in-use")))
        };
        bitmaps.iter().map(bitmap).collect()
    }

    fn stores(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> =
            names.filter(|name| name.ends_with(".dlbitmaps") || name.ends_with(".bits")).collect();
        names.sort();
        names
    }
}

/// Bitmaps were removed first and the sockets bound last. When that failed, the way back made the bitmaps anew, and clean: the next
/// backup left out what the guest had written.
#[test]
fn bitmaps_that_were_to_be_pruned_are_what_they_were_if_something_else_fails() {
    let bitmaps = export("a", "bitmaps = [\"daily\"]");
    let Some(world) = World::start(&[&image("a", DAILY), &bitmaps, MONITOR]) else { return };
    world.write("a", &[1, 5, 9]);
    let without = [image("a", ""), export("a", "")].concat();
    let taken = export("a", "").replace("export.a]", "export.more]").replace("a.sock", "no/such/more.sock");
    world.refused(&[&without, &taken, MONITOR], &["--prune-bitmaps"], "more.sock");
    assert_eq!(world.dirty("a"), [1, 5, 9].into());
    world.refused(&[&without, REFUSED, MONITOR], &["--prune-bitmaps"], "fixed");
    assert_eq!(world.dirty("a"), [1, 5, 9].into());
    let done = world.apply(&[&without, MONITOR], &["--prune-bitmaps"]);
    assert!(done.contains("  - bitmap a-drive/daily  for good\n"), "{done}");
}

/// The place of before was not known when nobody had said one, so nothing was moved back. The next start, with the file of before,
/// found no bitmaps there.
#[test]
fn bitmaps_that_were_moved_to_another_store_come_back_if_something_else_fails() {
    let exports = export("a", "bitmaps = [\"daily\"]");
    let first = [&image("a", DAILY), &exports, MONITOR];
    let Some(mut world) = World::start(&first.map(|part: &str| part)) else { return };
    world.write("a", &[2, 3]);
    let elsewhere = image("a", &format!("{DAILY}\nbitmap-store = \"file:new.bits\""));
    world.refused(&[&elsewhere, &exports, REFUSED, MONITOR], &[], "fixed");
    assert_eq!(world.stores(), ["a.qcow2.dlbitmaps"]);
    world.write("a", &[4]);
    world.again(&first.map(|part: &str| part));
    assert_eq!(world.dirty("a"), [2, 3, 4].into());
}

#[test]
fn a_drive_that_is_new_goes_again_with_the_bitmaps_that_were_made_for_it() {
    let first = [image("a", ""), export("a", ""), MONITOR.to_owned()].concat();
    let Some(world) = World::start(&[&first]) else { return };
    world.refused(&[&first, &image("b", DAILY), REFUSED], &[], "fixed");
    assert_eq!(world.stores(), [""; 0]);
    assert_eq!(world.in_image("b.qcow2"), []);
    assert_eq!(world.daemon().qmp().run("query-block", json!({})).as_array().unwrap().len(), 1);
    // And nothing of it is in the way of the next one.
    world.apply(&[&first, &image("b", DAILY), &export("b", "bitmaps = [\"daily\"]")], &[]);
    world.write("b", &[6]);
    assert_eq!(world.dirty("b"), [6].into());
}

#[test]
fn a_drive_that_is_new_goes_again_and_what_was_found_of_it_is_put_back() {
    for store in ["", "bitmap-store = \"file:b.bits\""] {
        let (first, b) =
            ([image("a", ""), export("a", "")].concat(), image("b", &format!("{DAILY}\n{store}")));
        let exports = export("b", "bitmaps = [\"daily\"]");
        let Some(mut world) = World::start(&[&first, &b, &exports, MONITOR]) else { return };
        world.write("b", &[8, 20]);
        world.again(&[&first, MONITOR]);
        world.refused(&[&first, &b, REFUSED, MONITOR], &[], "fixed");
        let (in_image, stores) = (world.in_image("b.qcow2"), world.stores());
        match store {
            "" => assert_eq!((in_image, stores), (vec![("daily".to_owned(), false)], vec![])),
            _ => assert_eq!((in_image, stores), (vec![], vec!["b.bits".to_owned()])),
        }
        world.apply(&[&first, &b, &exports, MONITOR], &[]);
        assert_eq!(world.dirty("b"), [8, 20].into(), "{store}");
    }
}

/// What was asked for by `--dry-run` was refused by the same wish without it, and clients had been disconnected by then.
#[test]
fn what_is_refused_is_refused_by_a_dry_run_too_and_no_client_notices() {
    let first = [image("a", DAILY), MONITOR.to_owned()].concat();
    let Some(world) = World::start(&[&first, &export("a", "")]) else { return };
    let mut guest = world.guest("a");
    let changed = export("a", "description = \"another\"");
    let missing = "[node.other]\ndriver = \"qcow2\"\nfile = \"nowhere.qcow2\"\n";
    let taken = changed.replace("export.a]", "export.more]").replace("a.sock", "no/such/more.sock");
    let gone = [export("a", "").replace("drive = \"a-drive\"", "node = \"a\""), MONITOR.to_owned()].concat();
    let gone = format!("[node.a]\ndriver = \"qcow2\"\nfile = \"a.qcow2\"\n{gone}");
    for (parts, expected) in [
        (vec![&*first, &*changed, missing], "nowhere.qcow2"),
        (vec![&first, &changed, &taken], "more.sock"),
        (vec![&gone], "drive 'a-drive': it has bitmaps ('daily'), which would end with it"),
    ] {
        for options in [&["--dry-run"][..], &[]] {
            world.refused(&parts, options, expected);
            guest.write(0, &[1; 512]).expect("it is still connected");
        }
    }
    let done = world.apply(&[&gone], &["--prune-bitmaps"]);
    assert!(done.contains("  - bitmap a-drive/daily  for good\n  - drive a-drive\n"), "{done}");
    assert_eq!(world.stores(), [""; 0]);
    world.write("a", &[0]);
}

/// The rehearsal opens without locks, so a node's new name got a plan. The change itself was refused, with the clients disconnected.
#[test]
fn an_image_that_another_node_writes_to_is_refused_before_any_client_notices() {
    let Some(world) = World::start(&[&image("a", ""), &export("a", ""), MONITOR]) else { return };
    let mut guest = world.guest("a");
    let renamed = image("a", "").replace("node.a]", "node.c]").replace("root = \"a\"", "root = \"c\"");
    let twice = [image("a", ""), image("c", "").replace("c.qcow2", "a.qcow2")].concat();
    let changed = export("a", "description = \"another\"");
    for (nodes, expected) in [
        (&renamed, "is in use by node 'a', which is closed only afterwards"),
        (&twice, "is in use by node 'a'"),
    ] {
        for options in [&["--dry-run"][..], &[]] {
            world.refused(&[nodes, &changed, MONITOR], options, expected);
            guest.write(0, &[1; 512]).expect("it is still connected");
        }
    }
    // Who only looks at it, and says so, may.
    let shared = twice.replace("node.c]", "node.c]\nread-only = true\nforce-share = true");
    world.apply(&[&shared, &export("a", ""), MONITOR], &[]);
}

/// The rehearsal connected to the server of a new node and went away again: one that takes a single client ended, and the change
/// itself found nobody. A dry run alone ended it.
#[test]
fn a_server_notices_nothing_of_a_rehearsal() {
    let first = [image("a", ""), export("a", ""), MONITOR.to_owned()].concat();
    let Some(world) = World::start(&[&first]) else { return };
    if !have("apply_undone", &["qemu-nbd"]) {
        return;
    }
    let (socket, disk) = (world.path("remote.sock"), world.path("remote.raw"));
    std::fs::write(&disk, [5; 65536]).unwrap();
    let (socket, disk) = (socket.to_str().unwrap(), disk.to_str().unwrap());
    let mut server = Ended(Command::new("qemu-nbd").args(["-f", "raw", "-k", socket, disk]).spawn().unwrap());
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    // (Looked at in the kernel's list, because a connection would be the only one.)
    while !std::fs::read_to_string("/proc/net/unix").unwrap().contains(socket) {
        assert!(std::time::Instant::now() < deadline, "qemu-nbd does not listen");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let remote = "[node.remote]\ndriver = \"nbd\"\nserver = { type = \"unix\", path = \"remote.sock\" }\n\
         [node.slow]\ndriver = \"delay\"\nchild = \"remote\"\n[drive.r]\nroot = \"slow\"\nbitmaps = [{ name = \"x\" }]\n";
    let shown = export("r", "").replace("r-drive", "r");
    let second = [&*first, remote, &shown];
    let dry = world.apply(&second, &["--dry-run"]);
    assert!(dry.contains("  + node remote (nbd)\n  + node slow (delay)\n  + drive r  root slow\n"), "{dry}");
    let wrong = remote.replace("path = ", "pth = ");
    world.refused(&[&first, &wrong, &shown], &["--dry-run"], "path");
    assert!(server.0.try_wait().unwrap().is_none(), "nobody has been there");
    world.apply(&second, &[]);
    assert_eq!(world.guest("r").read(0, 512).unwrap(), [5; 512]);
    // What cannot be done without it is refused by the change itself, which is taken back.
    let nobody = remote.replace("remote.sock", "nobody.sock").replace("node.remote", "node.other");
    let nobody = nobody.replace("\"remote\"", "\"other\"").replace("node.slow]", "node.slower]");
    let nobody = nobody.replace("\"slow\"", "\"slower\"").replace("drive.r]", "drive.s]");
    world.apply(&[&first, remote, &shown, &nobody], &["--dry-run"]);
    world.refused(&[&first, remote, &shown, &nobody], &[], "nobody.sock");
    assert_eq!(world.apply(&second, &[]), "nothing to change\n");
}

#[test]
fn a_drive_goes_with_its_bitmaps_and_images_if_that_is_asked_for() {
    let first = [image("a", ""), export("a", ""), MONITOR.to_owned()].concat();
    let Some(world) = World::start(&[&first, &image("b", DAILY), &export("b", "")]) else { return };
    world.write("b", &[6]);
    let steps = "  - bitmap b-drive/daily  for good\n  - drive b-drive\n  - node b (qcow2)\n";
    let dry = world.apply(&[&first], &["--prune-bitmaps", "--dry-run"]);
    assert!(dry.contains(steps), "{dry}");
    let done = world.apply(&[&first], &["--prune-bitmaps"]);
    assert!(done.contains(steps), "{done}");
    assert_eq!((world.in_image("b.qcow2"), world.stores()), (vec![], vec![]));
    // Nobody has the image any more.
    run("qemu-img", &["resize", "-q", world.path("b.qcow2").to_str().unwrap(), "32M"]);
}

/// The place of a drive of before, which nobody needed any more, was found first: the bitmaps went to the file of before, and the next
/// start looked for them where the configuration says.
#[test]
fn a_drive_that_comes_again_has_its_bitmaps_where_it_says_now() {
    let first = [image("a", ""), export("a", ""), MONITOR.to_owned()].concat();
    let old = image("b", "bitmap-store = \"file:old.bits\"");
    let Some(mut world) = World::start(&[&first, &old]) else { return };
    world.apply(&[&first], &[]);
    let new = [
        first.clone(),
        image("b", &format!("{DAILY}\nbitmap-store = \"file:new.bits\"")),
        export("b", "bitmaps = [\"daily\"]"),
    ];
    world.apply(&new.each_ref().map(|part| &**part), &[]);
    world.write("b", &[11]);
    assert_eq!(world.stores(), ["new.bits"]);
    world.again(&new.each_ref().map(|part| &**part));
    assert_eq!(world.dirty("b"), [11].into());
    // Gone, and there again: nothing of it is in the way.
    world.apply(&[&first], &["--prune-bitmaps"]);
    assert_eq!(world.stores(), [""; 0]);
    world.apply(&[&first, &image("b", DAILY), &export("b", "bitmaps = [\"daily\"]")], &[]);
    world.write("b", &[12]);
    assert_eq!((world.dirty("b"), world.stores()), ([12].into(), vec!["b.qcow2.dlbitmaps".to_owned()]));
}

/// The same for nodes: the second one of a name wrote its bitmaps beside the image of the first.
#[test]
fn a_node_that_comes_again_keeps_bitmaps_beside_its_own_image() {
    let Some(world) = World::start(&[&image("a", ""), MONITOR]) else { return };
    let mut qmp = world.daemon().qmp();
    for name in ["one.qcow2", "two.qcow2"] {
        let path = world.path(name);
        let path = path.to_str().unwrap();
        run("qemu-img", &["create", "-q", "-f", "qcow2", path, "1M"]);
        let file = json!({ "driver": "file", "filename": path });
        qmp.run("blockdev-add", json!({ "driver": "qcow2", "node-name": "n", "file": file }));
        qmp.run("block-dirty-bitmap-add", json!({ "node": "n", "name": "x", "persistent": true }));
        assert_eq!(world.stores(), [format!("{name}.dlbitmaps")]);
        qmp.run("block-dirty-bitmap-remove", json!({ "node": "n", "name": "x" }));
        qmp.run("blockdev-del", json!({ "node-name": "n" }));
        assert_eq!(world.stores(), [""; 0]);
    }
}

/// They are bitmaps that no file names, and pruning took them.
#[test]
fn pruning_leaves_checkpoints() {
    let first = [image("a", DAILY), export("a", ""), MONITOR.to_owned()].concat();
    let Some(world) = World::start(&[&first]) else { return };
    let mut qmp = world.daemon().qmp();
    qmp.run("x-driveline-checkpoint-create", json!({ "name": "monday", "drives": ["a-drive"] }));
    world.write("a", &[3]);
    assert_eq!(world.apply(&[&first], &["--prune-bitmaps"]), "nothing to change\n");
    let delta = qmp.run("x-driveline-checkpoint-delta", json!({ "drive": "a-drive", "from": "monday" }));
    assert!(delta.to_string().contains("65536"), "{delta}");
    let gone = [image("b", ""), MONITOR.to_owned()].concat();
    world.refused(&[&gone], &["--prune-bitmaps"], "it has checkpoints ('monday')");
}

/// What the file leaves out was taken to be as it is.
#[test]
fn a_node_becomes_writable_when_its_file_does_not_say_read_only_any_more() {
    let read_only = image("a", "").replace("a.qcow2\"", "a.qcow2\"\nread-only = true");
    let show = export("a", "").replace("writable = true", "");
    let Some(world) = World::start(&[&read_only, &show, MONITOR]) else { return };
    let done = world.apply(&[&image("a", ""), &export("a", ""), MONITOR], &[]);
    assert!(done.contains("  ~ node a, opened anew  read-only: true -> false\n"), "{done}");
    world.write("a", &[0]);
    assert_eq!(world.apply(&[&image("a", ""), &export("a", ""), MONITOR], &[]), "nothing to change\n");
}

/// It was to be opened anew each time, because nobody who may write was there.
#[test]
fn a_node_that_is_read_only_by_itself_for_now_is_no_difference() {
    let auto = image("a", "").replace("a.qcow2\"", "a.qcow2\"\nread-only = false\nauto-read-only = true");
    let show = export("a", "").replace("writable = true", "");
    let Some(world) = World::start(&[&auto, &show, MONITOR]) else { return };
    assert_eq!(world.apply(&[&auto, &show, MONITOR], &[]), "nothing to change\n");
    let done = world.apply(&[&auto, &export("a", ""), MONITOR], &[]);
    assert!(!done.contains("node a"), "{done}");
    world.write("a", &[0]);
}

/// An image does not say whose changes a bitmap records, so it was the drive's after each orderly end.
#[test]
fn a_bitmap_in_an_image_has_the_view_that_the_configuration_says() {
    let bitmap = DAILY.replace("persistent", "view = \"node\", persistent");
    let file = [&*image("a", &bitmap), &*export("a", ""), MONITOR].concat();
    let Some(mut world) = World::start(&[&file]) else { return };
    world.again(&[&file]);
    assert_eq!(world.in_image("a.qcow2").len(), 1);
    assert_eq!(world.apply(&[&file], &[]), "nothing to change\n");
}

#[test]
fn a_holder_for_good_takes_the_bitmaps_that_are_there() {
    let Some(world) = World::start(&[&image("a", DAILY), &export("a", ""), MONITOR]) else { return };
    world.write("a", &[1]);
    let held = image("a", &format!("{DAILY}\nholder = \"permanent\""));
    world.apply(&[&held, &export("a", ""), MONITOR], &[]);
    let nodes = world.daemon().qmp().run("query-named-block-nodes", json!({ "flat": true }));
    let named =
        |name: &str| nodes.as_array().unwrap().iter().find(|node| node["node-name"] == name).unwrap().clone();
    assert_eq!(named("a-drive-holder")["dirty-bitmaps"][0]["count"], 65536, "{nodes}");
    assert_eq!(named("a")["dirty-bitmaps"], Value::Null);
}

/// The socket that a service manager passed was closed with the server, and nobody answered on it from then on.
#[test]
fn a_socket_that_was_passed_serves_on_when_its_export_changes() {
    if !have("apply_undone", &["qemu-img", "systemd-socket-activate"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    run("qemu-img", &["create", "-q", "-f", "qcow2", path("a.qcow2").to_str().unwrap(), "16M"]);
    let first = [image("a", ""), export("a", ""), MONITOR.to_owned()].concat();
    let file = path("drive.toml");
    std::fs::write(&file, &first).unwrap();
    let mut command = Command::new("systemd-socket-activate");
    command.arg("-l").arg(path("passed.sock")).arg(Daemon::program()).arg("run").arg(&file);
    let mut child = Ended(command.stdout(std::process::Stdio::null()).spawn().unwrap());
    read_once(&path("passed.sock"));
    let changed = first.replace("writable = true", "writable = true\ndescription = \"another\"");
    std::fs::write(&file, changed).unwrap();
    let applied = Command::new(Daemon::program()).arg("apply").arg(&file).output().unwrap();
    assert!(applied.status.success(), "{}", String::from_utf8_lossy(&applied.stderr));
    read_once(&path("passed.sock"));
    read_once(&path("a.sock"));
    assert!(child.0.try_wait().unwrap().is_none());
}

struct Ended(std::process::Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn read_once(socket: &Path) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        match Guest::try_connect(socket, "a") {
            Ok(mut guest) => return drop(guest.read(0, 512).unwrap()),
            Err(error) => assert!(std::time::Instant::now() < deadline, "{}: {error}", socket.display()),
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

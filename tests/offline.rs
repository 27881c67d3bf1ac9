//! Bitmaps between two runs of the program: `driveline bitmap` and `driveline map`, with QEMU's tools as referee.

use crate::harness::{Daemon, Guest, dirty, have, output, run};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader, Write},
    path::PathBuf,
    process::{Command, Output, Stdio},
    time::Duration,
};

const GRANULARITY: u64 = 65536;
const SIZE: u64 = 32 << 20;

/// A folder with one drive, `vda`, in an image or a raw file.
struct World {
    directory: tempfile::TempDir,
    toml: String,
}

impl World {
    fn new(driver: &str, file: &str) -> Self {
        let toml = format!(
            "[node.top]\ndriver = \"{driver}\"\nfile = \"{file}\"\n[drive.vda]\nroot = \"top\"\n\
             bitmaps = [{{ name = \"daily\", granularity = \"64KiB\", persistent = true }}]\n\
             [export.vda]\ntype = \"nbd\"\ndrive = \"vda\"\nsocket = \"vda.sock\"\nwritable = true\n\
             bitmaps = [\"daily\"]\n[monitor]\nqmp = \"qmp.sock\"\n"
        );
        let world = Self { directory: tempfile::tempdir().unwrap(), toml };
        match driver {
            "raw" => fs::File::create(world.path(file)).unwrap().set_len(SIZE).unwrap(),
            _ => world.image(file),
        }
        world
    }

    fn raw() -> Self {
        Self::new("raw", "disk.raw")
    }

    fn qcow2() -> Self {
        Self::new("qcow2", "disk.qcow2")
    }

    fn image(&self, name: &str) {
        run("qemu-img", &["create", "-q", "-f", "qcow2", &self.text(name), &SIZE.to_string()]);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn start(&self) -> Daemon {
        Daemon::start(self.directory.path(), &self.toml)
    }

    /// Writes granules as the drive's user, and says them.
    fn write(&self, granules: &[u64]) -> BTreeSet<u64> {
        let mut guest = Guest::connect(&self.path("vda.sock"), "vda");
        for granule in granules {
            guest.write(granule * GRANULARITY + 512, &[0x55; 512]).unwrap();
        }
        granules.iter().copied().collect()
    }

    /// What the daemon that runs says is dirty.
    fn served(&self) -> BTreeSet<u64> {
        let uri = format!("nbd+unix:///vda?socket={}", self.text("vda.sock"));
        dirty(&uri, "daily", GRANULARITY)
    }

    /// Runs the tool in the folder: words, of which the first one after the command is the file.
    fn try_tool(&self, line: &str) -> Output {
        let mut command = Command::new(Daemon::program());
        command.args(line.split(' ')).current_dir(self.directory.path()).output().unwrap()
    }

    fn tool(&self, line: &str) -> String {
        let output = self.try_tool(line);
        let (stdout, stderr) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{line}: {stdout}{stderr}");
        stdout.into_owned()
    }

    /// Runs the tool, which must fail with status 1, and returns what it says.
    fn refused(&self, line: &str) -> String {
        let output = self.try_tool(line);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!((output.status.code(), &*output.stdout), (Some(1), &b""[..]), "{line}: {message}");
        message
    }

    fn json(&self, line: &str) -> Value {
        serde_json::from_str(&self.tool(&format!("{line} --json"))).unwrap()
    }

    /// What the tool says of a bitmap; null if it is not there.
    fn entry(&self, file: &str, name: &str) -> Value {
        entry(&self.json(&format!("bitmap list {file}")), name)
    }

    fn verdict(&self, file: &str, name: &str) -> String {
        self.entry(file, name)["verdict"].as_str().unwrap_or("none").to_owned()
    }

    /// The granules that the tool says are dirty.
    fn map(&self, file: &str, name: &str) -> BTreeSet<u64> {
        let map = self.json(&format!("map {file} --bitmap {name}"));
        let number = |area: &Value, key: &str| area[key].as_u64().unwrap();
        let areas = map.as_array().unwrap().iter();
        let granules = areas.flat_map(|area| {
            let start = number(area, "offset");
            start / GRANULARITY..(start + number(area, "length")).div_ceil(GRANULARITY)
        });
        granules.collect()
    }

    /// The bitmaps of an image as QEMU lists them: name, granularity, flags.
    fn qemu(&self, image: &str) -> Value {
        run("qemu-img", &["check", "-q", &self.text(image)]);
        let info = run("qemu-img", &["info", "--output=json", &self.text(image)]);
        let info: Value = serde_json::from_str(&info).unwrap();
        info["format-specific"]["data"]["bitmaps"].clone()
    }

    /// Lets QEMU write, which records it in the bitmaps of the image.
    fn qemu_writes(&self, image: &str, granule: u64) {
        run("qemu-io", &["-c", &format!("write {} 512", granule * GRANULARITY), &self.text(image)]);
    }

    /// QEMU is killed while it has an image.
    fn qemu_dies(&self, image: &str) {
        let killed = output("qemu-io", &["-c", "write 0 512", "-c", "abort", &self.text(image)]);
        assert!(!killed.status.success());
    }

    fn files(&self, ending: &str) -> Vec<String> {
        let entries = fs::read_dir(self.directory.path()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.filter(|name| name.ends_with(ending)).collect();
        names.sort();
        names
    }
}

fn entry(list: &Value, name: &str) -> Value {
    let bitmaps = list["bitmaps"].as_array().unwrap();
    bitmaps.iter().find(|bitmap| bitmap["name"] == name).cloned().unwrap_or(Value::Null)
}

fn set(granules: &[u64]) -> BTreeSet<u64> {
    granules.iter().copied().collect()
}

fn all() -> BTreeSet<u64> {
    (0..SIZE / GRANULARITY).collect()
}

#[test]
fn what_the_tool_does_to_an_image_is_what_qemu_does_to_its_twin() {
    if !have("offline", &["qemu-img", "qemu-io"]) {
        return;
    }
    let world = World::qcow2();
    world.image("twin.qcow2");
    let twin = world.text("twin.qcow2");
    let both = |ours: &str, theirs: &[&str]| {
        let (command, rest) = ours.split_once(' ').unwrap_or((ours, ""));
        world.tool(&format!("bitmap {command} disk.qcow2 {rest}"));
        run(
            "qemu-img",
            &[&["bitmap"], &theirs[..theirs.len() - 1], &[&twin, theirs[theirs.len() - 1]]].concat(),
        );
        assert_eq!(world.qemu("disk.qcow2"), world.qemu("twin.qcow2"), "{ours}");
    };
    let write = |granule| {
        world.qemu_writes("disk.qcow2", granule);
        world.qemu_writes("twin.qcow2", granule);
    };
    let same = |name: &str| {
        let (ours, theirs) = (world.map("disk.qcow2", name), world.map("twin.qcow2", name));
        assert_eq!(ours, theirs, "{name}");
        ours
    };
    both("add one", &["--add", "one"]);
    both("add two --granularity 1MiB --disabled", &["--add", "-g", "1M", "--disable", "two"]);
    both("add three --granularity 4KiB", &["--add", "-g", "4k", "three"]);
    write(20);
    assert_eq!(same("one"), set(&[20]));
    assert_eq!(same("two"), set(&[]));
    both("merge one three --into two", &["--merge", "one", "--merge", "three", "two"]);
    assert_eq!(same("two"), (16..32).collect(), "a coarser one has more");
    both("disable one", &["--disable", "one"]);
    write(40);
    assert_eq!(same("one"), set(&[20]));
    both("enable one", &["--enable", "one"]);
    both("clear three", &["--clear", "three"]);
    assert_eq!(same("three"), set(&[]));
    both("remove two", &["--remove", "two"]);
    write(41);
    assert_eq!(same("one"), set(&[20, 41]));
}

#[test]
fn daemon_and_tool_take_turns_with_the_bitmaps_of_an_image() {
    if !have("offline", &["qemu-img", "qemu-io", "nbdinfo"]) {
        return;
    }
    let world = World::qcow2();
    let daemon = world.start();
    let mut written = world.write(&[1, 2, 40]);
    // Nobody else gets at it meanwhile, not even to look.
    for line in ["bitmap list disk.qcow2", "bitmap clear disk.qcow2 daily", "map disk.qcow2 --bitmap daily"] {
        let message = world.refused(line);
        assert!(message.contains("disk.qcow2' is in use") && message.contains("no daemon"), "{message}");
    }
    assert!(daemon.terminate().success());
    assert_eq!(world.map("disk.qcow2", "daily"), written);
    world.tool("bitmap add disk.qcow2 extra");
    world.image("old.qcow2");
    world.tool("bitmap add old.qcow2 daily --granularity 32KiB");
    world.qemu_writes("old.qcow2", 7);
    world.tool("bitmap merge disk.qcow2 old.qcow2:daily --into daily");
    written.insert(7);

    let daemon = world.start();
    assert_eq!(world.served(), written, "the daemon goes on with what the tool changed");
    written.extend(world.write(&[100]));
    assert!(daemon.terminate().success());
    assert_eq!(world.map("disk.qcow2", "daily"), written);
    assert_eq!(world.map("disk.qcow2", "extra"), set(&[100]));
    world.tool("bitmap clear disk.qcow2 daily");
    let daemon = world.start();
    assert_eq!(world.served(), set(&[]));
    drop(daemon);
}

#[test]
fn what_a_killed_daemon_left_beside_its_image_is_judged_as_at_its_next_start_and_comes_home() {
    if !have("offline", &["qemu-img", "qemu-io", "nbdinfo"]) {
        return;
    }
    let world = World::qcow2();
    let daemon = world.start();
    let written = world.write(&[1, 2, 40]);
    daemon.kill();
    let left = fs::read(world.path("disk.qcow2.dlbitmaps")).unwrap();
    let image = fs::read(world.path("disk.qcow2")).unwrap();
    let list = world.json("bitmap list disk.qcow2");
    let found = entry(&list, "daily");
    assert_eq!((&found["verdict"], &found["durability"]), (&json!("exact"), &json!("process")), "{list}");
    assert!(found["in"].as_str().unwrap().ends_with("disk.qcow2.dlbitmaps"), "{list}");
    assert!(list["notes"][0].as_str().unwrap().contains("was killed"), "{list}");
    assert_eq!(world.map("disk.qcow2", "daily"), written);
    let message = world.refused("bitmap list disk.qcow2.dlbitmaps");
    assert!(message.contains("it has the bitmaps of disk.qcow2"), "{message}");
    // What fails brings nothing home either.
    let message = world.refused("bitmap clear disk.qcow2 dialy");
    assert!(message.contains("did you mean 'daily'?"), "{message}");
    assert!(fs::read(world.path("disk.qcow2")).unwrap() == image);
    assert!(fs::read(world.path("disk.qcow2.dlbitmaps")).unwrap() == left);

    world.tool("bitmap add disk.qcow2 other");
    assert_eq!(world.files(".dlbitmaps"), [""; 0]);
    let names: Vec<Value> =
        world.qemu("disk.qcow2").as_array().unwrap().iter().map(|b| json!([b["name"], b["flags"]])).collect();
    assert_eq!(names, [json!(["daily", ["auto"]]), json!(["other", ["auto"]])]);
    assert_eq!(world.map("disk.qcow2", "daily"), written);

    // Killed, and then somebody writes who cannot know.
    let daemon = world.start();
    assert_eq!(world.served(), written);
    daemon.kill();
    world.qemu_writes("disk.qcow2", 50);
    let found = world.entry("disk.qcow2", "daily");
    assert_eq!(found["verdict"], "all-dirty");
    assert!(found["reason"].as_str().unwrap().contains("another program"), "{found}");
    assert_eq!(world.map("disk.qcow2", "daily"), all());
    let output = world.try_tool("bitmap disable disk.qcow2 other");
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && message.contains("'daily' was found all dirty"), "{message}");
    assert_eq!((world.verdict("disk.qcow2", "daily"), world.files(".dlbitmaps")), ("exact".into(), vec![]));
    let daemon = world.start();
    assert_eq!(world.served(), all());
    drop(daemon);
}

#[test]
fn what_an_image_refuses_to_hold_leaves_it_and_what_lies_beside_it_as_good_as_it_was() {
    if !have("offline", &["qemu-img", "nbdinfo"]) {
        return;
    }
    let world = World::qcow2();
    run("qemu-img", &["resize", "-q", &world.text("disk.qcow2"), "4T"]);
    let daemon = world.start();
    let written = world.write(&[1, 2, 40]);
    daemon.kill();
    let message = world.refused("bitmap add disk.qcow2 fine --granularity 512");
    assert!(
        message.contains("'fine' cannot be stored") && message.contains("expected 536870912"),
        "{message}"
    );
    assert_eq!(
        (world.verdict("disk.qcow2", "daily"), world.map("disk.qcow2", "daily")),
        ("exact".into(), written.clone())
    );
    let daemon = world.start();
    daemon.wait_log(|lines| lines.iter().any(|line| line == "driveline: bitmap vda/daily: recovered, exact"));
    assert_eq!(world.served(), written);
    assert!(daemon.terminate().success());
    run("qemu-img", &["check", "-q", &world.text("disk.qcow2")]);
}

#[test]
fn a_sidecar_of_a_raw_drive_stays_exact_through_changes_of_the_tool() {
    if !have("offline", &["qemu-io", "nbdinfo"]) {
        return;
    }
    let world = World::raw();
    let daemon = world.start();
    let mut written = world.write(&[3, 4]);
    let message = world.refused("bitmap list vda.dlbitmaps");
    assert!(message.contains("vda.dlbitmaps: it is in use"), "{message}");
    assert!(world.refused("bitmap clear vda.dlbitmaps daily").contains("is in use"));
    assert!(daemon.terminate().success());
    let message = world.refused("bitmap list disk.raw");
    assert!(message.contains("neither") && message.contains("vda.dlbitmaps"), "{message}");

    let found = world.entry("vda.dlbitmaps", "daily");
    assert_eq!((&found["verdict"], &found["count"]), (&json!("exact"), &json!(2 * GRANULARITY)));
    assert_eq!(world.map("vda.dlbitmaps", "daily"), written);
    world.tool("bitmap add vda.dlbitmaps power --durability power --granularity 4KiB");
    world.tool("bitmap merge vda.dlbitmaps daily --into power");
    world.tool("bitmap add vda.dlbitmaps gone");
    world.tool("bitmap remove vda.dlbitmaps gone");
    world.tool("bitmap disable vda.dlbitmaps power");
    let list = world.json("bitmap list vda.dlbitmaps");
    assert_eq!(list["bitmaps"].as_array().unwrap().len(), 2, "{list}");
    let power = entry(&list, "power");
    assert_eq!((&power["durability"], &power["recording"]), (&json!("power"), &json!(false)));
    assert_eq!(power["count"], 2 * GRANULARITY);

    let daemon = world.start();
    assert_eq!(world.served(), written, "the images are as they were");
    written.extend(world.write(&[9]));
    assert!(daemon.terminate().success());
    assert_eq!(world.map("vda.dlbitmaps", "daily"), written);
    assert_eq!(world.map("vda.dlbitmaps", "power"), set(&[3, 4]), "it does not record");

    // Somebody else writes to the image: known to the tool as to the daemon, and a later clear is true again.
    run("qemu-io", &["-f", "raw", "-c", "write 1M 64k", &world.text("disk.raw")]);
    let found = world.entry("vda.dlbitmaps", "daily");
    assert_eq!(found["verdict"], "all-dirty");
    assert!(found["reason"].as_str().unwrap().contains("disk.raw"), "{found}");
    world.tool("bitmap clear vda.dlbitmaps daily");
    assert_eq!(world.map("vda.dlbitmaps", "power"), all());
    let daemon = world.start();
    assert_eq!(world.served(), set(&[]));
    drop(daemon);
}

#[test]
fn a_sidecar_of_a_killed_daemon_keeps_its_doubts_through_a_change() {
    if !have("offline", &["qemu-io", "nbdinfo"]) {
        return;
    }
    let world = World::raw();
    let daemon = world.start();
    let written = world.write(&[3, 4]);
    daemon.kill();
    let list = world.json("bitmap list vda.dlbitmaps");
    assert_eq!(entry(&list, "daily")["verdict"], "exact");
    assert!(list["notes"][0].as_str().unwrap().contains("drive 'vda' is served again"), "{list}");
    world.tool("bitmap add vda.dlbitmaps other");
    let daemon = world.start();
    daemon.wait_log(|lines| lines.iter().any(|line| line == "driveline: bitmap vda/daily: recovered, exact"));
    assert_eq!(world.served(), written);
    daemon.kill();

    // Changed after the daemon's last sign of life, by far: no change by the tool may hide that.
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(3600);
    fs::File::options().write(true).open(world.path("disk.raw")).unwrap().set_modified(later).unwrap();
    world.tool("bitmap clear vda.dlbitmaps daily");
    let daemon = world.start();
    assert_eq!(world.served(), all());
    drop(daemon);
}

#[test]
fn a_bitmap_moves_between_images_and_sidecars_and_goes_on_there() {
    if !have("offline", &["qemu-img", "qemu-io", "nbdinfo"]) {
        return;
    }
    let world = World::raw();
    world.image("from.qcow2");
    world.tool("bitmap add from.qcow2 daily");
    world.tool("bitmap add from.qcow2 still --disabled");
    world.qemu_writes("from.qcow2", 12);
    world.tool("bitmap move from.qcow2 daily --to vda.dlbitmaps");
    world.tool("bitmap move from.qcow2 still --to vda.dlbitmaps");
    assert_eq!(world.qemu("from.qcow2"), Value::Null);
    let daemon = world.start();
    assert_eq!(world.served(), set(&[12]));
    let written = world.write(&[12, 13]);
    assert!(daemon.terminate().success());
    assert_eq!(world.entry("vda.dlbitmaps", "still")["recording"], false);
    // And back.
    world.tool("bitmap move vda.dlbitmaps daily --to from.qcow2");
    assert_eq!(world.map("from.qcow2", "daily"), written);
    assert_eq!(world.entry("vda.dlbitmaps", "daily"), Value::Null);
    assert_eq!(
        world.qemu("from.qcow2"),
        json!([{ "name": "daily", "granularity": 65536, "flags": ["auto"] }])
    );

    // From file to file it stays what it is.
    world.tool("bitmap add vda.dlbitmaps power --durability power");
    let object = world.json("bitmap move vda.dlbitmaps power --to vdb.dlbitmaps");
    assert_eq!(entry(&object, "power"), Value::Null, "what is printed is how the file is afterwards");
    assert_eq!(world.entry("vdb.dlbitmaps", "power")["durability"], "power");
    fs::remove_file(world.path("vdb.dlbitmaps")).unwrap();

    // What cannot move stays, and makes nothing.
    run("qemu-img", &["create", "-q", "-f", "qcow2", &world.text("small.qcow2"), "8M"]);
    world.image("to.qcow2");
    world.tool("bitmap add to.qcow2 daily");
    let before = world.json("bitmap list from.qcow2");
    for (to, expected) in [
        ("small.qcow2", "is of a drive of 32MiB, expected 8MiB"),
        ("to.qcow2", "a bitmap 'daily' exists already"),
        ("from.qcow2", "the same one"),
        ("gone.qcow2", "there is no such file"),
        ("to.qcow2.dlbitmaps", "where the bitmaps of to.qcow2 are while it is in use"),
    ] {
        let message = world.refused(&format!("bitmap move from.qcow2 daily --to {to}"));
        assert!(message.contains(to) && message.contains(expected), "{message}");
    }
    let message = world.refused("bitmap move from.qcow2 dayly --to new.dlbitmaps");
    assert!(message.contains("did you mean 'daily'?"), "{message}");
    assert_eq!(world.json("bitmap list from.qcow2"), before);
    assert_eq!(world.files(".dlbitmaps"), ["vda.dlbitmaps"]);
}

#[test]
fn bitmaps_that_qemu_left_in_use_are_listed_adopted_and_removed() {
    if !have("offline", &["qemu-img", "qemu-io"]) {
        return;
    }
    let world = World::qcow2();
    for name in ["daily", "old"] {
        world.tool(&format!("bitmap add disk.qcow2 {name}"));
    }
    world.qemu_dies("disk.qcow2");
    let found = world.entry("disk.qcow2", "daily");
    assert_eq!((&found["verdict"], &found["count"]), (&json!("lost"), &Value::Null), "{found}");
    assert!(found["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{found}");
    assert!(world.tool("bitmap list disk.qcow2").contains("adopt it as all dirty, or remove it"));
    for line in [
        "bitmap clear disk.qcow2 daily",
        "bitmap merge disk.qcow2 old --into daily",
        "bitmap export disk.qcow2 daily --output bits",
        "bitmap move disk.qcow2 daily --to vda.dlbitmaps",
        "map disk.qcow2 --bitmap daily",
    ] {
        let message = world.refused(line);
        assert!(message.contains("are lost") && message.contains("adopt"), "{line}: {message}");
    }
    assert!(!world.path("bits").exists() && world.files(".dlbitmaps").is_empty());
    // What is done with one leaves the other as it is.
    world.tool("bitmap add disk.qcow2 new");
    world.tool("bitmap adopt disk.qcow2 daily");
    assert_eq!(
        (world.verdict("disk.qcow2", "old"), world.map("disk.qcow2", "daily")),
        ("lost".into(), all())
    );
    assert!(world.refused("bitmap adopt disk.qcow2 daily").contains("are valid"));
    world.tool("bitmap remove disk.qcow2 old");
    let names: Vec<Value> =
        world.qemu("disk.qcow2").as_array().unwrap().iter().map(|b| json!([b["name"], b["flags"]])).collect();
    assert_eq!(names, [json!(["daily", ["auto"]]), json!(["new", ["auto"]])]);
}

/// A file that nobody can read is kept, an entry that is no bitmap is in the way of changes until it is removed.
#[test]
fn what_cannot_be_read_is_never_lost_by_the_way() {
    if !have("offline", &["qemu-img", "qemu-io"]) {
        return;
    }
    let world = World::qcow2();
    let daemon = world.start();
    world.write(&[1]);
    daemon.kill();
    fs::write(world.path("disk.qcow2.dlbitmaps"), [0; 8192]).unwrap();
    let list = world.json("bitmap list disk.qcow2");
    assert_eq!(entry(&list, "daily")["verdict"], "lost");
    assert!(list["notes"][1].as_str().unwrap().contains("nothing but zeros"), "{list}");
    world.tool("bitmap add disk.qcow2 other");
    assert_eq!(world.files(".damaged"), ["disk.qcow2.dlbitmaps.damaged"]);
    assert_eq!(world.verdict("disk.qcow2", "daily"), "lost");
    world.tool("bitmap adopt disk.qcow2 daily");
    assert_eq!(world.map("disk.qcow2", "daily"), all());

    // Its granularity is no power that there is. Source: QEMU docs/interop/qcow2.txt, "Bitmap directory".
    let mut image = fs::read(world.path("disk.qcow2")).unwrap();
    let name = image.windows(5).rposition(|bytes| bytes == b"other").unwrap();
    image[name - 24 + 17] = 77;
    fs::write(world.path("disk.qcow2"), &image).unwrap();
    let list = world.json("bitmap list disk.qcow2");
    assert!(
        list["notes"][0].as_str().unwrap().contains("'other' is none (its granularity is 2^77"),
        "{list}"
    );
    let message = world.refused("bitmap clear disk.qcow2 daily");
    assert!(message.contains("bitmap 'other' would be lost") && message.contains("remove that first"));
    assert!(fs::read(world.path("disk.qcow2")).unwrap() == image);
    world.tool("bitmap remove disk.qcow2 other");
    world.tool("bitmap clear disk.qcow2 daily");
    assert_eq!(
        world.qemu("disk.qcow2"),
        json!([{ "name": "daily", "granularity": 65536, "flags": ["auto"] }])
    );
}

#[test]
fn an_image_whose_list_of_bitmaps_is_damaged_is_not_given_another_one() {
    if !have("offline", &["qemu-img"]) {
        return;
    }
    let world = World::qcow2();
    world.tool("bitmap add disk.qcow2 daily");
    let mut image = fs::read(world.path("disk.qcow2")).unwrap();
    // The reserved field of the header extension. Source: QEMU docs/interop/qcow2.txt, "Bitmaps extension".
    let extension = image.windows(4).position(|bytes| bytes == [0x23, 0x85, 0x28, 0x75]).unwrap();
    image[extension + 12] = 1;
    fs::write(world.path("disk.qcow2"), &image).unwrap();
    let list = world.json("bitmap list disk.qcow2");
    assert!(list["notes"][0].as_str().unwrap().contains("reserved field"), "{list}");
    let message = world.refused("bitmap add disk.qcow2 other");
    assert!(message.contains("would be lost") && message.contains("reserved field"), "{message}");
    assert!(fs::read(world.path("disk.qcow2")).unwrap() == image);
}

#[test]
fn no_kill_of_the_tool_costs_a_bitmap_a_write() {
    if !have("offline", &["qemu-img"]) {
        return;
    }
    let seed = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    println!("seed {seed}");
    let mut rng = SmallRng::seed_from_u64(seed);
    let image = World::qcow2();
    let daemon = image.start();
    let written = image.write(&[1, 5, 300]);
    daemon.kill();
    let raw = World::raw();
    let daemon = raw.start();
    raw.write(&[1, 5, 300]);
    assert!(daemon.terminate().success());
    raw.tool("bitmap add vda.dlbitmaps other");
    for (world, line, file, left) in [
        (&image, "bitmap add disk.qcow2 other", "disk.qcow2", "disk.qcow2.dlbitmaps"),
        (&raw, "bitmap merge vda.dlbitmaps other --into daily", "vda.dlbitmaps", "vda.dlbitmaps"),
    ] {
        let before = [file, left].map(|name| (name, fs::read(world.path(name)).unwrap()));
        for _ in 0..20 {
            let mut command = Command::new(Daemon::program());
            command.args(line.split(' ')).current_dir(world.directory.path()).stdout(Stdio::null());
            let mut child = command.spawn().unwrap();
            // Anywhere in what it does, or after it.
            std::thread::sleep(Duration::from_micros(rng.random_range(0..12_000)));
            child.kill().unwrap();
            child.wait().unwrap();
            let (verdict, map) = (world.verdict(file, "daily"), world.map(file, "daily"));
            match &*verdict {
                "exact" => assert_eq!(map, written, "{line}"),
                _ => assert_eq!((&*verdict, map), ("all-dirty", all()), "{line}"),
            }
            if file.ends_with("qcow2") {
                // Clusters that leak are all that a kill may cost.
                let checked = output("qemu-img", &["check", "-q", &world.text(file)]);
                assert!([Some(0), Some(3)].contains(&checked.status.code()), "{checked:?}");
            }
            before.iter().for_each(|(name, bytes)| fs::write(world.path(name), bytes).unwrap());
        }
    }
}

#[test]
fn a_link_to_an_image_leads_to_what_lies_beside_the_image() {
    if !have("offline", &["qemu-img"]) {
        return;
    }
    let world = World::qcow2();
    let daemon = world.start();
    let written = world.write(&[1, 5]);
    daemon.kill();
    fs::create_dir(world.path("links")).unwrap();
    std::os::unix::fs::symlink("../disk.qcow2", world.path("links/vda")).unwrap();
    assert_eq!(world.map("links/vda", "daily"), written);
    world.tool("bitmap disable links/vda daily");
    assert_eq!(world.files(".dlbitmaps"), [""; 0]);
    assert_eq!(
        (world.map("disk.qcow2", "daily"), world.verdict("disk.qcow2", "daily")),
        (written, "exact".into())
    );
}

#[test]
fn an_export_is_bits_or_json_and_overwrites_nothing() {
    let world = World::qcow2();
    world.tool("bitmap add disk.qcow2 daily");
    for granule in [0, 9, 10] {
        world.qemu_writes("disk.qcow2", granule);
    }
    world.tool("bitmap export disk.qcow2 daily --output bits");
    let mut expected = vec![0; (SIZE / GRANULARITY / 8) as usize];
    (expected[0], expected[1]) = (1, 6);
    assert_eq!(fs::read(world.path("bits")).unwrap(), expected);
    let object = world.tool("bitmap export disk.qcow2 daily --output - --format json");
    let area = |offset: u64, length: u64| json!({ "offset": offset * 65536, "length": length * 65536 });
    let dirty = json!([area(0, 1), area(9, 2)]);
    let expected = json!({ "name": "daily", "granularity": 65536, "size": SIZE, "dirty": dirty });
    assert_eq!(serde_json::from_str::<Value>(&object).unwrap(), expected);
    assert_eq!(world.json("map disk.qcow2 --bitmap daily"), dirty);
    for taken in ["bits", "disk.qcow2"] {
        let before = fs::read(world.path(taken)).unwrap();
        let message = world.refused(&format!("bitmap export disk.qcow2 daily --output {taken}"));
        assert!(message.contains("there already"), "{message}");
        assert!(fs::read(world.path(taken)).unwrap() == before);
    }
}

#[test]
fn what_makes_no_sense_is_refused_by_name_and_changes_nothing() {
    let world = World::qcow2();
    world.tool("bitmap add disk.qcow2 daily");
    run("qemu-img", &["create", "-q", "-f", "qcow2", &world.text("small.qcow2"), "8M"]);
    world.tool("bitmap add small.qcow2 theirs");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "compat=0.10", &world.text("two.qcow2"), "8M"]);
    fs::write(world.path("text"), "hello, bitmaps").unwrap();
    let before = fs::read(world.path("disk.qcow2")).unwrap();
    let long = "x".repeat(1024);
    for (line, expected) in [
        ("bitmap add disk.qcow2 daily", "a bitmap 'daily' exists already"),
        (&*format!("bitmap add disk.qcow2 {long}"), "expected 1 to 1023"),
        ("bitmap add disk.qcow2 new --durability power", "expected no --durability"),
        ("bitmap remove disk.qcow2 daly", "did you mean 'daily'?"),
        ("bitmap enable disk.qcow2 weekly", "expected one of 'daily'"),
        ("bitmap merge disk.qcow2 small.qcow2:theirs --into daily", "expected equal lengths"),
        ("bitmap merge disk.qcow2 gone.qcow2:a --into daily", "gone.qcow2: No such file"),
        ("bitmap merge disk.qcow2 weekly --into daily", "there is no bitmap 'weekly'"),
        ("bitmap add two.qcow2 daily", "version 2"),
        ("bitmap list text", "text: it is neither a qcow2 image nor a file of bitmaps"),
        ("bitmap list gone", "gone: No such file"),
        ("map disk.qcow2 --bitmap daly", "did you mean 'daily'?"),
    ] {
        let message = world.refused(line);
        assert!(message.contains(expected), "{line}: {message}");
        assert!(fs::read(world.path("disk.qcow2")).unwrap() == before, "{line}");
    }
    assert_eq!(fs::read(world.path("text")).unwrap(), b"hello, bitmaps");
}

/// QEMU has it: its locks count like those of a daemon.
#[test]
fn an_image_that_qemu_has_is_left_alone() {
    if !have("offline", &["qemu-io"]) {
        return;
    }
    let world = World::qcow2();
    world.tool("bitmap add disk.qcow2 daily");
    let mut qemu = Command::new("qemu-io")
        .arg(world.path("disk.qcow2"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // It answers once the image is open.
    qemu.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
    let mut answer = String::new();
    BufReader::new(qemu.stdout.take().unwrap()).read_line(&mut answer).unwrap();
    for line in ["bitmap list disk.qcow2", "bitmap remove disk.qcow2 daily"] {
        let message = world.refused(line);
        assert!(message.contains("is in use") && message.contains("qemu-io"), "{message}");
    }
    drop(qemu.stdin.take());
    qemu.wait().unwrap();
    assert_eq!(world.verdict("disk.qcow2", "daily"), "exact");
}

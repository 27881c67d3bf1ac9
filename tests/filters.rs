//! The shipped filters in the running program: their libraries, its threads and its clock.

mod qemu;

use crate::harness::{Daemon, Guest, have, run};
use std::{
    fs,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

const MIB: u64 = 1 << 20;

/// All filters that are shipped, by the names of their folders.
fn shipped() -> Vec<String> {
    let folders =
        fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("filters")).unwrap();
    let mut names: Vec<_> =
        folders.map(|folder| folder.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn every_shipped_filter_is_found_beside_the_program() {
    let program = Daemon::program();
    let listed = run(program.to_str().unwrap(), &["plugin", "list"]);
    for name in shipped() {
        assert!(
            listed.lines().any(|line| line.split_whitespace().next() == Some(&name)),
            "{name} in\n{listed}"
        );
        let library = format!("libdriveline_filter_{}.so", name.replace('-', "_"));
        run(
            program.to_str().unwrap(),
            &["plugin", "check", program.with_file_name(library).to_str().unwrap()],
        );
    }
}

#[test]
fn the_examples_of_the_readmes_have_no_mistakes() {
    if !have("the_examples_of_the_readmes_have_no_mistakes", &["qemu-img"]) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    for name in ["disk.img", "a.img", "b.img", "base.raw"] {
        fs::File::create_new(path(name)).unwrap().set_len(MIB).unwrap();
    }
    fs::create_dir(path("control")).unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", path("image.qcow2").to_str().unwrap(), "1M"]);
    for name in shipped() {
        let readme = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("filters").join(&name);
        let readme = fs::read_to_string(readme.join("README.md")).unwrap();
        let (_, rest) = readme.split_once("```toml\n").expect("a README has an example");
        let (example, _) = rest.split_once("```").unwrap();
        let file = path(&format!("{name}.toml"));
        fs::write(&file, example).unwrap();
        let mut check = Command::new(Daemon::program());
        let output = check.arg("check").arg(&file).current_dir(&directory).output().unwrap();
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// All of them in one drive. `CONTROL` stands for a directory.
const STACK: &str = r#"
[node.image]
driver = "qcow2"
file = "image.qcow2"

[node.keep]
driver = "copy-on-read"
child = "image"

[node.limit]
driver = "throttle"
child = "keep"
iops-read = 200

[node.faulty]
driver = "blkdebug"
child = "limit"
control = "CONTROL"

[[node.faulty.rules]]
op = "write"
offset = "1MiB"
length = 512
once = true
errno = "ENOSPC"

[[node.faulty.rules]]
op = "flush"
once = true
suspend = "first-flush"

[node.slow]
driver = "delay"
child = "faulty"
write = "30ms"

[node.watch]
driver = "log"
child = "slow"

[node.holder]
driver = "bitmap-holder"
child = "watch"

[drive.vda]
root = "holder"
bitmaps = [{ name = "daily", granularity = "64KiB" }]

[export.vda]
type = "nbd"
drive = "vda"
socket = "vda.sock"
writable = true
bitmaps = ["daily"]
"#;

#[test]
fn all_filters_in_one_drive_do_what_they_say() {
    if !have("all_filters_in_one_drive_do_what_they_say", &["qemu-img", "nbdinfo"]) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("base.raw"), vec![7; 4 * MIB as usize]).unwrap();
    let chain = ["-b", &path("base.raw"), "-F", "raw", &path("image.qcow2")];
    run("qemu-img", &[&["create", "-q", "-f", "qcow2"], &chain[..]].concat());
    fs::create_dir(path("control")).unwrap();
    let daemon = Daemon::start(directory.path(), &STACK.replace("CONTROL", &path("control")));
    let mut guest = Guest::connect(Path::new(&path("vda.sock")), "vda");

    // copy-on-read keeps what is read.
    assert_eq!(guest.read(100_000, 10).unwrap(), [7; 10]);

    // blkdebug fails one write, delay holds both.
    let start = Instant::now();
    assert_eq!(guest.write(MIB, &[9; 4096]).unwrap_err().raw_os_error(), Some(28));
    guest.write(MIB, &[9; 4096]).unwrap();
    assert!(start.elapsed() >= Duration::from_millis(60), "{:?}", start.elapsed());
    assert_eq!(guest.read(MIB, 4096).unwrap(), [9; 4096]);

    // throttle lets a tenth of a second's worth pass at once, and then no more than its rate.
    let start = Instant::now();
    for _ in 0..60 {
        guest.read(0, 512).unwrap();
    }
    assert!(start.elapsed() >= Duration::from_millis(180), "{:?}", start.elapsed());

    // blkdebug suspends the first flush until its file is removed.
    let suspended = path("control/first-flush");
    let flush = thread::spawn(move || {
        guest.flush().unwrap();
        guest
    });
    while !Path::new(&suspended).exists() {
        thread::sleep(Duration::from_millis(1));
    }
    assert!(!flush.is_finished());
    fs::remove_file(&suspended).unwrap();
    flush.join().unwrap().flush().unwrap();

    // The bitmap has what the guest wrote, and nothing of what copy-on-read did.
    let uri = format!("nbd+unix:///vda?socket={}", path("vda.sock"));
    let map = run("nbdinfo", &["--map=qemu:dirty-bitmap:daily", "--json", &uri]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let dirty: Vec<_> = map.as_array().unwrap().iter().filter(|extent| extent["type"] == 1).collect();
    assert_eq!(dirty.len(), 1, "{map}");
    assert_eq!((dirty[0]["offset"].as_u64(), dirty[0]["length"].as_u64()), (Some(MIB), Some(65536)));

    assert!(daemon.terminate().success());
    let map = run("qemu-img", &["map", "--output=json", &path("image.qcow2")]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let kept = map.as_array().unwrap().iter().filter(|extent| extent["depth"] == 0);
    let starts: Vec<_> = kept.map(|extent| extent["start"].as_u64().unwrap()).collect();
    assert_eq!(starts, [0, 65536, MIB], "two clusters that were read, and one that was written: {map}");
}

const GROUP: &str = r#"
[node.memory-a]
driver = "memory"
size = "1MiB"

[node.memory-b]
driver = "memory"
size = "1MiB"

[node.limit-a]
driver = "throttle"
child = "memory-a"
group = "both"
iops = 500

[node.limit-b]
driver = "throttle"
child = "memory-b"
group = "both"

[export.a]
type = "nbd"
node = "limit-a"
socket = "nbd.sock"
writable = true

[export.b]
type = "nbd"
node = "limit-b"
socket = "nbd.sock"
writable = true
"#;

#[test]
fn drives_of_a_group_share_its_limit_evenly_on_all_threads() {
    let directory = tempfile::tempdir().unwrap();
    let _daemon = Daemon::start(directory.path(), GROUP);
    let socket = directory.path().join("nbd.sock");
    let run_for = Duration::from_millis(1500);
    let start = Instant::now();
    // Eight clients against one.
    let clients = (0..9).map(|number| {
        let mut guest = Guest::connect(&socket, if number < 8 { "a" } else { "b" });
        thread::spawn(move || {
            let mut done = 0;
            while start.elapsed() < run_for {
                guest.write(0, &[1; 512]).unwrap();
                done += 1;
            }
            done
        })
    });
    let clients: Vec<_> = clients.collect();
    let done: Vec<u32> = clients.into_iter().map(|client| client.join().unwrap()).collect();
    let elapsed = start.elapsed().as_secs_f64();
    let (many, few) = (done[..8].iter().sum::<u32>(), done[8]);
    let total = f64::from(many + few);
    assert!(total <= 500.0 * elapsed + 50.0 + 10.0, "{total} in {elapsed} s");
    // Who has one request at a time misses a turn when its client is late, on a busy machine.
    let share = f64::from(few) / total;
    assert!((0.25..=0.6).contains(&share), "{few} of {total}");
}

//! The real job: chains of three qcow2 images made and filled by QEMU's tools, served with a throttle between, while
//! guests write and a stream, an intermediate and an active commit run. Afterwards other people's tools say that the
//! bitmap is exact, the content right and every image clean.

use crate::harness::{Daemon, Guest, dirty, have, output, run};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 48 * MIB;
const GRANULE: u64 = 65536;
const GUESTS: u64 = 3;

/// The file of the README, with a middle image and with the drive's own name for the socket.
const CONFIGURATION: &str = r#"
# guest -> vda (nbd) -> limit (throttle) -> active (qcow2) -> mid (qcow2) -> base (qcow2)
[node.base]
driver = "qcow2"
file = "base.qcow2"
read-only = true

[node.mid]
driver = "qcow2"
file = "mid.qcow2"
backing = "base"
read-only = true

[node.active]
driver = "qcow2"
file = { driver = "file", path = "active.qcow2", cache = "writeback" }
backing = "mid"

[node.limit]
driver = "throttle"
child = "active"
iops = 50000

[drive.vda]
root = "limit"
bitmaps = [{ name = "daily", granularity = "64KiB" }]

[export.vda]
type = "nbd"
drive = "vda"
socket = "vda.sock"
writable = true
bitmaps = ["daily"]

[monitor]
qmp = "qmp.sock"
"#;

const TOOLS: [&str; 3] = ["qemu-img", "qemu-io", "nbdinfo"];

/// Makes three images, each over the one before, with data at places of its own; and a raw file of what a reader sees.
fn make_chain(directory: &Path) {
    let path = |name: &str| directory.join(name).to_str().unwrap().to_owned();
    let mut below: Option<&str> = None;
    for (byte, name) in [(1, "base.qcow2"), (2, "mid.qcow2"), (3, "active.qcow2")] {
        let image = path(name);
        match below {
            None => run("qemu-img", &["create", "-q", "-f", "qcow2", &image, &SIZE.to_string()]),
            Some(below) => {
                run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", &image])
            }
        };
        let writes: Vec<String> = (0..12)
            .map(|i| {
                let offset = (i * 7 + byte * 3) % 47 * MIB + byte * 4096;
                match (i + byte) % 5 {
                    0 => format!("write -z {offset} 300k"),
                    _ => format!("write -P {} {offset} 700k", byte * 16 + i),
                }
            })
            .collect();
        let mut arguments = vec!["-f", "qcow2"];
        writes.iter().for_each(|write| arguments.extend(["-c", write]));
        arguments.push(&image);
        run("qemu-io", &arguments);
        below = Some(name);
    }
    run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", &path("active.qcow2"), &path("oracle.raw")]);
}

/// What the guests did: the drive's content in a raw file, and the granules that they wrote.
struct Oracle {
    file: std::fs::File,
    granules: Mutex<BTreeSet<u64>>,
}

impl Oracle {
    fn wrote(&self, offset: u64, data: &[u8]) {
        use std::os::unix::fs::FileExt;
        self.file.write_all_at(data, offset).unwrap();
        let granules = offset / GRANULE..(offset + data.len() as u64).div_ceil(GRANULE);
        self.granules.lock().unwrap().extend(granules);
    }
}

/// A guest that writes at random places of its own until it is told to stop.
fn write_until(stop: &AtomicBool, socket: &Path, number: u64, oracle: &Oracle, count: &AtomicU64) {
    let mut rng = SmallRng::seed_from_u64(number);
    let mut guest = Guest::connect(socket, "vda");
    assert_eq!(guest.size, SIZE);
    while !stop.load(SeqCst) {
        // Guests take turns of 32 KiB, so two share most granules and never a byte.
        let turn = rng.random_range(0..SIZE / 32768 / GUESTS / 6) * GUESTS + number;
        let offset = turn * 32768 + rng.random_range(0..32) * 512;
        let length = rng.random_range(1..=32) * 512;
        if rng.random_range(0..5) == 0 {
            guest.write_zeroes(offset, length as u32).unwrap();
            oracle.wrote(offset, &vec![0; length as usize]);
        } else {
            let data = vec![rng.random(); length as usize];
            guest.write(offset, &data).unwrap();
            oracle.wrote(offset, &data);
            assert!(guest.read(offset, length as u32).unwrap() == data, "a guest reads what it wrote");
        }
        count.fetch_add(1, SeqCst);
    }
    guest.flush().unwrap();
}

/// Runs `job` (started and awaited over QMP) while guests write, and checks everything that can be checked from outside.
fn story(configuration: &str, job: impl FnOnce(&Daemon, &AtomicU64), chain_after: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    make_chain(directory.path());
    let daemon = Daemon::start(directory.path(), configuration);
    let socket = directory.path().join("vda.sock");
    let uri = format!("nbd+unix:///vda?socket={}", socket.display());
    let oracle =
        std::fs::File::options().read(true).write(true).open(directory.path().join("oracle.raw")).unwrap();
    let oracle = Arc::new(Oracle { file: oracle, granules: Mutex::default() });
    let (stop, count) = (AtomicBool::new(false), AtomicU64::new(0));
    assert_eq!(dirty(&uri, "daily", GRANULE), BTreeSet::new(), "a new bitmap is clean");
    std::thread::scope(|scope| {
        for number in 0..GUESTS {
            let (stop, socket, oracle, count) = (&stop, &socket, &oracle, &count);
            scope.spawn(move || write_until(stop, socket, number, oracle, count));
        }
        // However it ends, the guests are told.
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, SeqCst);
            }
        }
        let stop = Stop(&stop);
        job(&daemon, &count);
        drop(stop);
    });
    assert!(count.load(SeqCst) > 20, "the guests got on: {} writes", count.load(SeqCst));

    let written = oracle.granules.lock().unwrap().clone();
    assert_eq!(
        dirty(&uri, "daily", GRANULE),
        written,
        "the bitmap says what the guests wrote, to the granule"
    );
    let raw = daemon.path("oracle.raw");
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &raw, &uri]);

    let mut qmp = daemon.qmp();
    let nodes = qmp.run("query-named-block-nodes", json!({ "flat": true }));
    let names: Vec<&str> =
        nodes.as_array().unwrap().iter().filter_map(|node| node["node-name"].as_str()).collect();
    assert!(!names.iter().any(|name| name.contains("holder")), "the holder is gone: {names:?}");
    let node = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "limit").unwrap();
    assert_eq!(node["dirty-bitmaps"][0]["name"], "daily", "the bitmap sits on the drive's root: {node}");
    drop(qmp);
    assert!(daemon.terminate().success());

    for image in ["base.qcow2", "mid.qcow2", "active.qcow2"] {
        let image = directory.path().join(image);
        let checked = output("qemu-img", &["check", "-q", image.to_str().unwrap()]);
        assert!(checked.status.success(), "{}: {checked:?}", image.display());
    }
    let top = directory.path().join(chain_after[0]);
    let info = run("qemu-img", &["info", "--output=json", "--backing-chain", top.to_str().unwrap()]);
    let info: Value = serde_json::from_str(&info).unwrap();
    let file = |image: &Value| Path::new(image["filename"].as_str().unwrap()).file_name().unwrap().to_owned();
    let chain: Vec<_> = info.as_array().unwrap().iter().map(file).collect();
    assert_eq!(chain, chain_after, "the chain on disk");
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &raw, top.to_str().unwrap()]);
}

/// Waits until the guests have written some more.
fn let_guests_write(count: &AtomicU64) {
    let until = count.load(SeqCst) + 30;
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while count.load(SeqCst) < until {
        assert!(std::time::Instant::now() < deadline, "the guests get on");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

#[test]
fn a_bitmap_is_exact_through_a_stream_of_the_whole_chain() {
    if !have("a_bitmap_is_exact_through_a_stream_of_the_whole_chain", &TOOLS) {
        return;
    }
    let job = |daemon: &Daemon, count: &AtomicU64| {
        let mut qmp = daemon.qmp();
        let_guests_write(count);
        qmp.run("block-stream", json!({ "job-id": "s0", "device": "vda", "speed": 8 * MIB }));
        let_guests_write(count);
        qmp.run("block-job-set-speed", json!({ "device": "s0", "speed": 0 }));
        let ended = qmp.wait_event("BLOCK_JOB_COMPLETED", "s0");
        assert!(ended.get("error").is_none(), "{ended}");
        let_guests_write(count);
    };
    story(CONFIGURATION, job, &["active.qcow2"]);
}

#[test]
fn a_bitmap_is_exact_on_the_fallback_engine_too() {
    if !have("a_bitmap_is_exact_on_the_fallback_engine_too", &TOOLS) {
        return;
    }
    let job = |daemon: &Daemon, count: &AtomicU64| {
        let mut qmp = daemon.qmp();
        qmp.run("block-stream", json!({ "job-id": "s0", "device": "vda", "base-node": "base" }));
        let ended = qmp.wait_event("BLOCK_JOB_COMPLETED", "s0");
        assert!(ended.get("error").is_none(), "{ended}");
        qmp.run("block-commit", json!({ "job-id": "c0", "device": "vda" }));
        qmp.wait_event("BLOCK_JOB_READY", "c0");
        let_guests_write(count);
        qmp.run("job-complete", json!({ "id": "c0" }));
        qmp.wait_event("BLOCK_JOB_COMPLETED", "c0");
        let_guests_write(count);
    };
    let configuration = format!("{CONFIGURATION}\n[engine]\nbackend = \"epoll\"\n");
    story(&configuration, job, &["base.qcow2"]);
}

#[test]
fn a_bitmap_is_exact_through_a_stream_to_a_base() {
    if !have("a_bitmap_is_exact_through_a_stream_to_a_base", &TOOLS) {
        return;
    }
    let job = |daemon: &Daemon, count: &AtomicU64| {
        let mut qmp = daemon.qmp();
        let arguments = json!({ "job-id": "s0", "device": "active", "base-node": "base", "speed": 16 * MIB });
        qmp.run("block-stream", arguments);
        let_guests_write(count);
        let ended = qmp.wait_event("BLOCK_JOB_COMPLETED", "s0");
        assert!(ended.get("error").is_none(), "{ended}");
    };
    story(CONFIGURATION, job, &["active.qcow2", "base.qcow2"]);
}

#[test]
fn a_bitmap_is_exact_through_an_intermediate_commit() {
    if !have("a_bitmap_is_exact_through_an_intermediate_commit", &TOOLS) {
        return;
    }
    let job = |daemon: &Daemon, count: &AtomicU64| {
        let mut qmp = daemon.qmp();
        let arguments = json!({ "job-id": "c0", "device": "vda", "top-node": "mid", "base-node": "base", "speed": 8 * MIB });
        qmp.run("block-commit", arguments);
        let_guests_write(count);
        let ended = qmp.wait_event("BLOCK_JOB_COMPLETED", "c0");
        assert!(ended.get("error").is_none(), "{ended}");
    };
    story(CONFIGURATION, job, &["active.qcow2", "base.qcow2"]);
}

#[test]
fn a_bitmap_is_exact_through_an_active_commit() {
    if !have("a_bitmap_is_exact_through_an_active_commit", &TOOLS) {
        return;
    }
    let job = |daemon: &Daemon, count: &AtomicU64| {
        let mut qmp = daemon.qmp();
        let_guests_write(count);
        qmp.run("block-commit", json!({ "job-id": "c0", "device": "vda", "base-node": "mid" }));
        qmp.wait_event("BLOCK_JOB_READY", "c0");
        let_guests_write(count);
        qmp.run("block-job-complete", json!({ "device": "c0" }));
        let ended = qmp.wait_event("BLOCK_JOB_COMPLETED", "c0");
        assert!(ended.get("error").is_none(), "{ended}");
        let_guests_write(count);
    };
    story(CONFIGURATION, job, &["mid.qcow2", "base.qcow2"]);
}

#[test]
fn a_bitmap_is_exact_through_stream_then_commits_in_one_life() {
    if !have("a_bitmap_is_exact_through_stream_then_commits_in_one_life", &TOOLS) {
        return;
    }
    let job = |daemon: &Daemon, count: &AtomicU64| {
        let mut qmp = daemon.qmp();
        // Cancelled half-way: nothing has changed but where some data is.
        qmp.run("block-stream", json!({ "job-id": "s0", "device": "vda", "speed": 2 * MIB }));
        let_guests_write(count);
        qmp.run("block-job-cancel", json!({ "device": "s0" }));
        qmp.wait_event("BLOCK_JOB_CANCELLED", "s0");
        qmp.run("block-commit", json!({ "job-id": "c0", "device": "vda", "top-node": "mid" }));
        qmp.wait_event("BLOCK_JOB_COMPLETED", "c0");
        let_guests_write(count);
        qmp.run("block-commit", json!({ "job-id": "c1", "device": "vda" }));
        qmp.wait_event("BLOCK_JOB_READY", "c1");
        let_guests_write(count);
        qmp.run("job-complete", json!({ "id": "c1" }));
        let ended = qmp.wait_event("BLOCK_JOB_COMPLETED", "c1");
        assert!(ended.get("error").is_none(), "{ended}");
        let_guests_write(count);
    };
    story(CONFIGURATION, job, &["base.qcow2"]);
}

#[test]
fn a_program_that_ends_during_a_job_brings_the_bitmaps_home_and_leaves_clean_images() {
    if !have("a_program_that_ends_during_a_job", &TOOLS) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    make_chain(directory.path());
    let daemon = Daemon::start(directory.path(), CONFIGURATION);
    let mut qmp = daemon.qmp();
    qmp.run("block-stream", json!({ "job-id": "s0", "device": "vda", "speed": MIB }));
    assert!(daemon.terminate().success());
    let top = directory.path().join("active.qcow2");
    run("qemu-img", &["check", "-q", top.to_str().unwrap()]);
    let raw = directory.path().join("oracle.raw");
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", raw.to_str().unwrap(), top.to_str().unwrap()]);
}

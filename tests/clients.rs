//! Clients that others wrote, against the program: an image over an image, a throttle, a bitmap.

use crate::harness::{Daemon, dirty, extents, have, run};
use serde_json::Value;
use std::{collections::BTreeSet, process::Command};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 32 * MIB;
const GRANULE: u64 = 65536;

const CONFIGURATION: &str = r#"
[node.base]
driver = "qcow2"
file = "base.qcow2"
read-only = true

[node.active]
driver = "qcow2"
file = "active.qcow2"
backing = "base"

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
allocation-depth = true
description = "the drive"

[export.tcp]
type = "nbd"
drive = "vda"
listen = "127.0.0.1:0"
writable = true
bitmaps = ["daily"]
"#;

/// The drive: 4 MiB of data in the base, 2 MiB in the image above, of which one lies over the base's.
struct Served {
    daemon: Daemon,
    unix: String,
    tcp: String,
    directory: TempDir,
}

impl Served {
    /// `None`: the tools are missing.
    fn start(test: &str, tools: &[&str]) -> Option<Self> {
        let tools: Vec<&str> = ["qemu-img", "qemu-io", "nbdinfo"].iter().chain(tools).copied().collect();
        if !have(test, &tools) {
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        let (base, active) = (path("base.qcow2"), path("active.qcow2"));
        run("qemu-img", &["create", "-q", "-f", "qcow2", &base, &SIZE.to_string()]);
        run("qemu-io", &["-f", "qcow2", "-c", "write -P 1 1M 4M", &base]);
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", &active]);
        run("qemu-io", &["-f", "qcow2", "-c", "write -P 2 4M 2M", &active]);
        run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", &active, &path("before.raw")]);
        let daemon = Daemon::start(directory.path(), CONFIGURATION);
        let uri = |id: &str| {
            let line = daemon.exports.iter().find_map(|line| line.strip_prefix(&format!("{id}: ")));
            line.expect("one line per export").to_owned()
        };
        let (unix, tcp) = (uri("vda"), uri("tcp"));
        Some(Self { daemon, unix, tcp, directory })
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().unwrap().to_owned()
    }

    fn same(&self, left: &str, right: &str) {
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", left, right]);
    }

    fn dirty(&self) -> BTreeSet<u64> {
        dirty(&self.unix, "daily", GRANULE)
    }

    /// The images are as others want them.
    fn end(self) -> TempDir {
        assert!(self.daemon.terminate().success());
        for image in ["base.qcow2", "active.qcow2"] {
            let image = self.directory.path().join(image);
            run("qemu-img", &["check", "-q", image.to_str().unwrap()]);
        }
        self.directory
    }
}

fn granules(range: std::ops::Range<u64>) -> BTreeSet<u64> {
    (range.start / GRANULE..range.end.div_ceil(GRANULE)).collect()
}

#[test]
fn fio_reads_what_it_wrote_at_depth_16() {
    let Some(served) = Served::start("fio_reads_what_it_wrote_at_depth_16", &["fio"]) else { return };
    let uri = format!("--uri={}", served.unix);
    let job = ["--name=verify", "--ioengine=nbd", &uri, "--iodepth=16", "--bsrange=512-16k", "--size=8M"];
    let verify = ["--rw=randwrite", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--randseed=7"];
    let whole = [&job[..], &verify, &["--direct=0", "--bs_unaligned=0"]].concat();
    // fio leaves files with its state where it runs.
    let output = Command::new("fio").args(&whole).current_dir(&served.directory).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(served.dirty(), granules(0..8 * MIB), "it wrote all of its file, and nothing else");
    served.end();
}

#[test]
fn nbdcopy_copies_from_and_to_a_drive() {
    let Some(served) = Served::start("nbdcopy_copies_from_and_to_a_drive", &["nbdcopy"]) else { return };
    let (before, copy, new) = (served.path("before.raw"), served.path("copy.raw"), served.path("new.raw"));
    run("nbdcopy", &[&served.unix, &copy]);
    served.same(&copy, &before);
    assert_eq!(served.dirty(), BTreeSet::new(), "reading is no change");

    let data: Vec<u8> = (0..SIZE / 2).map(|at| (at / 4096 % 251) as u8).collect();
    std::fs::write(&new, data).unwrap();
    std::fs::File::options().write(true).open(&new).unwrap().set_len(SIZE).unwrap();
    run("nbdcopy", &["--connections=4", "--requests=32", "--flush", &new, &served.unix]);
    served.same(&new, &served.unix);
    run("nbdcopy", &["--synchronous", "--allocated", &served.unix, &copy]);
    served.same(&copy, &new);
    assert_eq!(served.dirty(), granules(0..SIZE), "all was written, or zeroed");
    let directory = served.end();
    let active = directory.path().join("active.qcow2");
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &new, active.to_str().unwrap()]);
}

#[test]
fn qemu_img_converts_compares_and_maps() {
    let Some(served) = Served::start("qemu_img_converts_compares_and_maps", &[]) else { return };
    let (before, copy) = (served.path("before.raw"), served.path("copy.qcow2"));
    served.same(&served.unix, &before);
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", "-m", "8", "-W", &served.unix, &copy]);
    run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", &copy, &before]);
    let map = run("qemu-img", &["map", "--output=json", "-f", "raw", &served.unix]);
    let map: Value = serde_json::from_str(&map).unwrap();
    let data: u64 = map
        .as_array()
        .unwrap()
        .iter()
        .filter(|e| e["data"] == true)
        .map(|e| e["length"].as_u64().unwrap())
        .sum();
    assert_eq!(data, 5 * MIB, "what is in the images is data, the rest is known to be zeroes");
    assert_eq!(served.dirty(), BTreeSet::new());

    // And back, over a drive that holds something else.
    run("qemu-io", &["-f", "raw", "-c", "write -P 9 0 16M", &served.unix]);
    run("qemu-img", &["convert", "-n", "-f", "qcow2", "-O", "raw", &copy, &served.unix]);
    served.same(&served.unix, &before);
    served.end();
}

#[test]
fn qemu_io_writes_zeroes_discards_and_flushes() {
    let Some(served) = Served::start("qemu_io_writes_zeroes_discards_and_flushes", &[]) else { return };
    let commands = [
        "write -P 5 0 64k",
        "write -f -P 6 100k 1k",
        "aio_write -P 7 1M 1M",
        "aio_write -P 8 3M 1M",
        "aio_flush",
        "writev -P 10 8M 4k 8k 512",
        "write -z 1536k 256k",
        "write -z -u 3M 128k",
        "discard 8M 64k",
        "flush",
        "read -P 5 0 64k",
        "read -P 6 100k 1k",
        "read -P 7 1M 512k",
        "read -P 0 1536k 256k",
        "read -P 0 3M 128k",
        "read -P 8 3200k 896k",
        "readv -P 2 4M 64k 64k",
        "read -P 0 20M 1M",
    ];
    let mut arguments = vec!["-f", "raw"];
    commands.iter().for_each(|command| arguments.extend(["-c", command]));
    arguments.push(&served.unix);
    let said = run("qemu-io", &arguments);
    assert!(!said.contains("ailed"), "{said}");
    let written = [0..65536, 102_400..103_424, MIB..2 * MIB, 3 * MIB..4 * MIB, 8 * MIB..8 * MIB + 65536];
    assert_eq!(served.dirty(), written.into_iter().flat_map(granules).collect());
    served.end();
}

#[test]
fn nbdinfo_lists_what_is_served_and_its_contexts() {
    let Some(served) = Served::start("nbdinfo_lists_what_is_served_and_its_contexts", &[]) else { return };
    let list = |uri: &str| -> Value {
        let uri = uri.replace("///vda", "///").replace("/tcp", "/");
        serde_json::from_str(&run("nbdinfo", &["--json", "--list", &uri])).unwrap()
    };
    let list = (list(&served.unix), list(&served.tcp));
    let exports = (list.0["exports"].as_array().unwrap(), list.1["exports"].as_array().unwrap());
    assert_eq!((exports.0.len(), exports.1.len()), (1, 1), "{list:?}");
    let vda = &exports.0[0];
    assert_eq!(vda["export-name"], "vda");
    assert_eq!(vda["description"], "the drive");
    assert_eq!(vda["export-size"], SIZE);
    let contexts: BTreeSet<&str> =
        vda["contexts"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    let expected =
        ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:daily", "driveline:backup:daily"];
    assert_eq!(contexts, BTreeSet::from(expected));
    for can in
        ["can_flush", "can_fua", "can_trim", "can_zero", "can_cache", "can_multi_conn", "can_fast_zero"]
    {
        assert_eq!(vda[can], true, "{can}");
    }
    assert_eq!(vda["is_read_only"], false);
    assert_eq!(exports.1[0]["export-name"], "tcp");
    let depth = extents(&served.unix, "qemu:allocation-depth");
    let expected = [(0, MIB, 0), (MIB, 3 * MIB, 2), (4 * MIB, 2 * MIB, 1), (6 * MIB, SIZE - 6 * MIB, 0)];
    assert_eq!(depth, expected, "the image is 1 deep, its base 2");
    served.end();
}

const SCRIPT: &str = r#"
contexts = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:daily"]
for context in contexts:
    h.add_meta_context(context)
h.connect_uri("URI")
assert h.get_structured_replies_negotiated()
assert all(h.can_meta_context(context) for context in contexts)
def status():
    found = {}
    def extent(context, offset, entries, error):
        at = offset
        for length, flags in zip(entries[::2], entries[1::2]):
            if found.get(context) and found[context][-1][2] == flags:
                found[context][-1][1] += length
            else:
                found.setdefault(context, []).append([at, length, flags])
            at += length
    offset = 0
    while offset < 8 << 20:
        h.block_status(1 << 20, offset, extent)
        offset += 1 << 20
    return found
m = 1 << 20
assert status()["qemu:dirty-bitmap:daily"] == [[0, 8 * m, 0]]
h.pwrite(b"x" * 4096, 65536 + 512, nbd.CMD_FLAG_FUA)
h.zero(65536, 4 * m, nbd.CMD_FLAG_NO_HOLE)
h.trim(131072, 6 * m)
h.cache(m, m)
h.flush()
assert h.pread(4096, 65536 + 512) == b"x" * 4096
assert h.pread_structured(65536, 4 * m, lambda *_: None) == bytes(65536)
found = status()
assert found["qemu:dirty-bitmap:daily"] == [
    [0, 65536, 0], [65536, 65536, 1], [131072, 4 * m - 131072, 0],
    [4 * m, 65536, 1], [4 * m + 65536, 2 * m - 65536, 0], [6 * m, 131072, 1], [6 * m + 131072, 2 * m - 131072, 0],
], found
# Many requests at once, answered in any order.
buffers = [nbd.Buffer(4096) for _ in range(64)]
cookies = [h.aio_pread(buffer, at * 4096 + m) for at, buffer in enumerate(buffers)]
while h.aio_in_flight():
    h.poll(-1)
assert all(h.aio_command_completed(cookie) for cookie in cookies)
assert all(buffer.to_bytearray() == b"\x01" * 4096 for buffer in buffers)
for bad in (lambda: h.pread(1, 1 << 40), lambda: h.pwrite(b"x", 32 * m)):
    try:
        bad()
        raise SystemExit("a request past the end was answered")
    except nbd.Error:
        pass
h.shutdown()
"#;

#[test]
fn nbdsh_asks_for_three_contexts_at_once() {
    let Some(served) = Served::start("nbdsh_asks_for_three_contexts_at_once", &["nbdsh"]) else { return };
    let script = SCRIPT.replace("URI", &served.unix);
    // It is a script for the system's Python, whichever other ones there are.
    let system = format!("/usr/bin:{}", std::env::var("PATH").unwrap_or_default());
    let output = Command::new("nbdsh").args(["-c", &script]).env("PATH", system).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    served.end();
}

#[test]
fn nbdkit_serves_a_drive_to_its_own_clients() {
    let Some(served) = Served::start("nbdkit_serves_a_drive_to_its_own_clients", &["nbdkit", "nbdcopy"])
    else {
        return;
    };
    let (before, copy, new) = (served.path("before.raw"), served.path("copy.raw"), served.path("new.raw"));
    let socket = format!("socket={}", served.path("vda.sock"));
    let through = |command: &str| {
        run("nbdkit", &["-U", "-", "nbd", &socket, "export=vda", "shared=1", "--run", command]);
    };
    through(&format!("nbdcopy \"$uri\" {copy}"));
    served.same(&copy, &before);
    std::fs::write(&new, vec![0x5a; SIZE as usize / 4]).unwrap();
    through(&format!("nbdcopy {new} \"$uri\""));
    let whole = std::fs::read(&copy).unwrap();
    let mut expected = std::fs::read(&new).unwrap();
    expected.extend(&whole[expected.len()..]);
    std::fs::write(&copy, expected).unwrap();
    served.same(&copy, &served.unix);
    assert_eq!(served.dirty(), granules(0..SIZE / 4));
    served.end();
}

#[test]
fn tcp_clients_see_the_same_drive() {
    let Some(served) = Served::start("tcp_clients_see_the_same_drive", &["nbdcopy"]) else { return };
    assert!(served.tcp.starts_with("nbd://127.0.0.1:"), "{}", served.tcp);
    assert_eq!(run("nbdinfo", &["--size", &served.tcp]).trim(), SIZE.to_string());
    let copy = served.path("copy.raw");
    run("nbdcopy", &[&served.tcp, &copy]);
    served.same(&copy, &served.path("before.raw"));
    run("qemu-io", &["-f", "raw", "-c", "write -P 3 10M 1M", &served.tcp]);
    run("qemu-io", &["-f", "raw", "-c", "read -P 3 10M 1M", &served.unix]);
    assert_eq!(dirty(&served.tcp, "daily", GRANULE), granules(10 * MIB..11 * MIB));
    served.end();
}

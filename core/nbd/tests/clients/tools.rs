//! What each tool sees and does.

use std::fs;

use driveline_nbd::{Address, ServerOptions};
use serde_json::Value;

use crate::fixture::{Fixture, output, run, text};

const MIB: u64 = 1 << 20;

#[test]
fn nbdinfo_sees_every_export_and_what_it_can_do() {
    let fixture = Fixture::disk(64 * MIB);
    fixture.add_disk("second", MIB);
    let Some(listed) = output("nbdinfo", &["--json", "--list", &fixture.uri("")]) else { return };
    let listed: Value = serde_json::from_str(&listed).unwrap();
    let exports = listed["exports"].as_array().unwrap();
    let names: Vec<_> = exports.iter().map(|export| export["export-name"].as_str().unwrap()).collect();
    assert_eq!(names, ["disk", "second"]);
    let disk = &exports[0];
    assert_eq!(disk["description"], "the disk disk");
    assert_eq!(disk["export-size"], 64 * MIB);
    let contexts =
        ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:daily", "driveline:backup:daily"];
    assert_eq!(disk["contexts"], serde_json::json!(contexts));
    for can in [
        "can_cache",
        "can_df",
        "can_fast_zero",
        "can_flush",
        "can_fua",
        "can_multi_conn",
        "can_trim",
        "can_zero",
    ] {
        assert_eq!(disk[can], true, "{can}");
    }
    assert_eq!(
        (&disk["is_read_only"], &disk["block_size_maximum"]),
        (&Value::from(false), &Value::from(32 * MIB))
    );
}

#[test]
fn the_default_export_is_the_only_one() {
    let fixture = Fixture::disk(MIB);
    let Some(size) = output("nbdinfo", &["--size", &fixture.uri("")]) else { return };
    assert_eq!(size.trim(), MIB.to_string());
    fixture.add_disk("second", MIB);
    assert!(!run("nbdinfo", &["--size", &fixture.uri("")]).unwrap().status.success());
}

#[test]
fn nbdcopy_copies_there_and_back_over_many_connections() {
    let fixture = Fixture::disk(64 * MIB);
    let address = Address::Tcp("127.0.0.1:0".parse().unwrap());
    let Address::Tcp(tcp) = fixture.server.listen(&address).unwrap() else { unreachable!() };
    let source = fixture.random_file("source", 64 << 20);
    let copy = fixture.path("copy");
    let nbd = fixture.uri("disk");
    let many = ["--connections=4", "--requests=64"];
    let Some(_) = output("nbdcopy", &[many[0], many[1], text(&source), &nbd]) else { return };
    output("nbdcopy", &[many[0], &format!("nbd://{tcp}/disk"), text(&copy)]);
    assert!(fs::read(&source).unwrap() == fs::read(&copy).unwrap());
    // Not asynchronous, with larger requests.
    output("nbdcopy", &["--synchronous", "--request-size=33554432", &nbd, text(&copy)]);
    assert!(fs::read(&source).unwrap() == fs::read(&copy).unwrap());
}

#[test]
fn qemu_img_converts_compares_and_maps() {
    let fixture = Fixture::disk(64 * MIB);
    let source = fixture.random_file("source", 64 << 20);
    let (nbd, options) = (fixture.uri("disk"), fixture.image_options("disk"));
    let convert = ["convert", "-n", "-f", "raw", "-O", "raw", "-m", "16", "-W", text(&source), &nbd];
    let Some(_) = output("qemu-img", &convert) else { return };
    let compared = output("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&source), &nbd]).unwrap();
    assert!(compared.contains("identical"), "{compared}");
    let mapped = output("qemu-img", &["map", "--output=json", "--image-opts", &options]).unwrap();
    let mapped: Vec<Value> = serde_json::from_str(&mapped).unwrap();
    let data: u64 = mapped.iter().filter(|e| e["data"] == true).map(|e| e["length"].as_u64().unwrap()).sum();
    assert_eq!(data, 32 * MIB, "holes are told apart");
    let info = output("qemu-img", &["info", "--image-opts", &options]).unwrap();
    assert!(info.contains("64 MiB (67108864 bytes)"), "{info}");
}

#[test]
fn a_dirty_bitmap_tells_exactly_what_qemu_io_wrote() {
    let fixture = Fixture::disk(16 * MIB);
    let nbd = fixture.uri("disk");
    let commands = [
        "write -P 5 1M 100k",
        "write -z 4M 64k",
        "discard 6M 128k",
        "write -f -P 7 8M 1",
        "flush",
        "read -P 5 1M 100k",
    ];
    let mut arguments = vec!["-f", "raw"];
    commands.iter().for_each(|command| arguments.extend(["-c", command]));
    arguments.push(&nbd);
    let Some(printed) = output("qemu-io", &arguments) else { return };
    assert!(!printed.contains("failed"), "{printed}");
    let map = output("nbdinfo", &["--json", "--map=qemu:dirty-bitmap:daily", &nbd]).unwrap();
    let map: Vec<Value> = serde_json::from_str(&map).unwrap();
    let dirty: Vec<_> = map
        .iter()
        .filter(|extent| extent["type"] == 1)
        .map(|extent| (extent["offset"].as_u64().unwrap() >> 16, extent["length"].as_u64().unwrap() >> 16))
        .collect();
    assert_eq!(dirty, [(16, 2), (64, 1), (96, 2), (128, 1)]);
    // A bitmap that clients look at can be cleared.
    fixture.graph.bitmap("disk", "daily").unwrap().clear().unwrap();
    let map = output("nbdinfo", &["--json", "--map=qemu:dirty-bitmap:daily", &nbd]).unwrap();
    let map: Vec<Value> = serde_json::from_str(&map).unwrap();
    assert_eq!(map.len(), 1, "{map:?}");
}

/// A client that asks for things that others never do. `h` is connected when `script` begins, after `before`.
fn nbdsh(fixture: &Fixture, before: &str, script: &str) -> Option<String> {
    let connect = format!("h.connect_uri({:?})", fixture.uri("disk"));
    output("nbdsh", &["-c", "import errno", "-c", before, "-c", &connect, "-c", script])
}

#[test]
fn nbdsh_reads_what_it_wrote_in_simple_and_structured_form() {
    for structured in ["False", "True"] {
        let fixture = Fixture::disk(MIB);
        let printed = nbdsh(
            &fixture,
            &format!("h.set_request_structured_replies({structured})"),
            "
assert h.get_structured_replies_negotiated() == h.get_request_structured_replies()
h.pwrite(b'1' * 1000, 5, nbd.CMD_FLAG_FUA)
assert h.pread(1000, 5) == b'1' * 1000
h.zero(500, 5, nbd.CMD_FLAG_FAST_ZERO)
h.zero(100, 505, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(1000, 5) == bytes(600) + b'1' * 400
h.trim(4096, 0); h.cache(4096, 0); h.flush()
if h.get_structured_replies_negotiated():
    got = []
    assert h.pread_structured(4096, 0, lambda data, *a: got.append((len(data), a[0], a[1])), nbd.CMD_FLAG_DF)
    assert got == [(4096, 0, nbd.READ_DATA)], got
h.set_strict_mode(0)
for (call, expected) in [
    (lambda: h.pread(1, 1 << 20), errno.EINVAL),
    (lambda: h.pwrite(b'1', 1 << 20), errno.ENOSPC),
    (lambda: h.zero(1, 1 << 20), errno.ENOSPC),
    (lambda: h.trim(1, 1 << 20), errno.EINVAL),
    (lambda: h.flush(1 << 15), errno.EINVAL),
    (lambda: h.pread(1, 0, nbd.CMD_FLAG_REQ_ONE), errno.EINVAL),
    (lambda: h.pread((64 << 20), 0), errno.EINVAL),
]:
    try:
        call()
        assert False, 'it should have failed'
    except nbd.Error as e:
        assert e.errnum == expected, (e.errnum, expected, e.string)
assert h.pread(1, 0) == b'\\0'
print('all of it')
",
        );
        let Some(printed) = printed else { return };
        assert!(printed.contains("all of it"));
    }
}

#[test]
fn nbdsh_keeps_64_requests_in_flight() {
    let fixture = Fixture::disk(64 * MIB);
    let script = "
blocks = 256
buffers = [nbd.Buffer.from_bytearray(bytearray([i % 251] * 65536)) for i in range(blocks)]
done = [0]
def completed(*_):
    done[0] += 1
    return 1
for (i, b) in enumerate(buffers):
    h.aio_pwrite(b, i * 65536, completed)
    while h.aio_in_flight() >= 64: h.poll(-1)
while h.aio_in_flight() > 0: h.poll(-1)
for i in range(blocks):
    assert h.pread(65536, i * 65536) == bytes([i % 251]) * 65536, i
print(done[0])
";
    let Some(printed) = nbdsh(&fixture, "", script) else { return };
    assert_eq!(printed.trim(), "256");
    assert_eq!(fixture.graph.bitmap("disk", "daily").unwrap().bits().dirty_bytes(), 16 * MIB);
}

#[test]
fn a_read_only_export_cannot_be_written() {
    let fixture = Fixture::new(ServerOptions::default());
    let (root, _) = fixture.add_disk("writable", MIB);
    fixture.server.add_export("disk", driveline_nbd::Export::new(root)).unwrap();
    let script = "
assert h.is_read_only()
h.set_strict_mode(0)
for call in [lambda: h.pwrite(b'1', 0), lambda: h.trim(1, 0), lambda: h.zero(1, 0)]:
    try:
        call()
        assert False
    except nbd.Error as e:
        assert e.errnum == errno.EPERM, e.string
";
    let _ = nbdsh(&fixture, "", script);
}

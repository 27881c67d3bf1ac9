//! The filters that QEMU has too, beside QEMU's own: the same graph, the same requests, the same outcome.

use crate::harness::{Daemon, Guest, have, output, run};
use serde_json::{Value, json};
use std::{fs, path::Path};

const MIB: u64 = 1 << 20;

/// A directory with the paths in it as texts.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    fn raw(&self, name: &str, bytes: u64) {
        fs::File::create_new(self.path(name)).unwrap().set_len(bytes).unwrap();
    }

    fn qcow2(&self, name: &str) {
        run("qemu-img", &["create", "-q", "-f", "qcow2", &self.path(name), "4M"]);
    }

    /// A running program with `nodes`, the last of which is called `top` and served.
    fn serve(&self, nodes: &str) -> Daemon {
        let export =
            "\n[export.top]\ntype = \"nbd\"\nnode = \"top\"\nsocket = \"nbd.sock\"\nwritable = true\n";
        Daemon::start(self.0.path(), &format!("{nodes}{export}"))
    }

    fn guest(&self) -> Guest {
        Guest::connect(&self.0.path().join("nbd.sock"), "top")
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///top?socket={}", self.path("nbd.sock"))
    }
}

/// What qemu-io says of commands, one line each: how it went, and how much.
fn qemu_io(image: &str, commands: &[&str]) -> Vec<String> {
    // Written back, or each write would be durable by itself.
    let mut arguments = vec!["-t", "writeback"];
    if !image.starts_with("json:") {
        arguments.extend(["-f", "raw"]);
    }
    for command in commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(image);
    let output = output("qemu-io", &arguments);
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let told =
        |line: &&str| line.contains("failed") || line.starts_with("read ") || line.starts_with("wrote ");
    text.lines().filter(told).map(str::to_owned).collect()
}

#[test]
fn blkdebug_fails_the_requests_that_it_fails_in_qemu() {
    if !have("blkdebug_fails_the_requests_that_it_fails_in_qemu", &["qemu-img", "qemu-io"]) {
        return;
    }
    let error = |event: &str, errno: u64| json!({ "event": event, "errno": errno, "once": true });
    let cases: [(&str, Value, Value, &[&str]); 7] = [
        ("a table cannot be loaded", json!([error("l2_load", 5)]), json!([]), &["read 0 64k", "read 0 64k"]),
        ("data cannot be read", json!([error("read_aio", 5)]), json!([]), &["read 0 64k", "read 0 64k"]),
        (
            "data cannot be written",
            json!([error("write_aio", 28)]),
            json!([]),
            &["write -P 3 0 64k", "write -P 3 0 64k", "read -P 3 0 64k"],
        ),
        (
            "there is no room for a cluster",
            json!([error("cluster_alloc", 28)]),
            json!([]),
            &["write -P 4 2M 64k", "write -P 4 2M 64k", "read -P 4 2M 64k"],
        ),
        (
            "an old part of a cluster cannot be read",
            json!([{ "event": "cow_read", "errno": 5, "once": true, "iotype": "read" }]),
            json!([]),
            &["write -P 5 0 512", "write -P 5 0 512", "read -P 5 0 512", "read -P 1 512 1k"],
        ),
        (
            "the second write, and not before",
            json!([{ "event": "write_aio", "state": 2, "errno": 5, "once": true }]),
            json!([{ "event": "write_aio", "state": 1, "new_state": 2 }]),
            &["write -P 6 0 4k", "write -P 6 4k 4k", "write -P 6 4k 4k"],
        ),
        (
            "one kind of request",
            json!([{ "event": "none", "errno": 28, "iotype": "write", "once": true }]),
            json!([]),
            &["read 0 4k", "write 0 4k", "write 0 4k"],
        ),
    ];
    for (name, errors, states, commands) in cases {
        let place = Place::new();
        place.qcow2("ours.qcow2");
        run("qemu-io", &["-c", "write -P 1 0 1M", &place.path("ours.qcow2")]);
        if name.starts_with("an old part") {
            // Its clusters are shared, so the first write to one copies the rest.
            run("qemu-img", &["snapshot", "-c", "old", &place.path("ours.qcow2")]);
        }
        fs::copy(place.path("ours.qcow2"), place.path("theirs.qcow2")).unwrap();
        let mut theirs = json!({
            "driver": "qcow2",
            "file": {
                "driver": "blkdebug",
                "image": { "driver": "file", "filename": place.path("theirs.qcow2") },
                "inject-error": errors,
            },
        });
        if states != json!([]) {
            theirs["file"]["set-state"] = states.clone();
        }
        let expected = qemu_io(&format!("json:{theirs}"), commands);
        assert!(expected.iter().any(|line| line.contains("failed")), "{name}: {expected:?}");

        // JSON's lists of objects, as TOML writes them.
        let table = |value: &Value| {
            let value: toml::Value = serde_json::from_value(value.clone()).unwrap();
            value.to_string()
        };
        let daemon = place.serve(&format!(
            "[node.disk]\ndriver = \"file\"\npath = \"ours.qcow2\"\n\
             [node.faulty]\ndriver = \"blkdebug\"\nimage = \"disk\"\ninject-error = {}\nset-state = {}\n\
             [node.top]\ndriver = \"qcow2\"\nfile = \"faulty\"\n",
            table(&errors),
            table(&states)
        ));
        let found = qemu_io(&place.uri(), commands);
        assert_eq!(found, expected, "{name}");
        assert!(daemon.terminate().success());
    }
}

#[test]
fn blklogwrites_writes_the_log_that_qemu_writes() {
    if !have("blklogwrites_writes_the_log_that_qemu_writes", &["qemu-io"]) {
        return;
    }
    let commands = [
        "write -P 1 0 4k",
        "write -P 2 1M 64k",
        "flush",
        "write -z 8k 16k",
        "write -P 3 512 512",
        "discard 1M 4k",
        "flush",
    ];
    let place = Place::new();
    for name in ["ours", "theirs"] {
        place.raw(&format!("{name}.img"), 2 * MIB);
        place.raw(&format!("{name}.log"), 0);
    }
    let file = |name: &str| json!({ "driver": "file", "filename": place.path(name), "discard": "unmap" });
    let theirs = json!({ "driver": "blklogwrites", "file": file("theirs.img"), "log": file("theirs.log") });
    qemu_io(&format!("json:{theirs}"), &commands);

    let daemon = place.serve(
        "[node.disk]\ndriver = \"file\"\npath = \"ours.img\"\n[node.log]\ndriver = \"file\"\npath = \"ours.log\"\n\
         [node.top]\ndriver = \"blklogwrites\"\nfile = \"disk\"\nlog = \"log\"\n",
    );
    qemu_io(&place.uri(), &commands);
    assert!(daemon.terminate().success());
    assert!(place.bytes("ours.img") == place.bytes("theirs.img"));

    // Each may have flushed once more at its end.
    let (ours, theirs) = (Log::read(&place.bytes("ours.log")), Log::read(&place.bytes("theirs.log")));
    assert_eq!(ours.without_last_flushes(), theirs.without_last_flushes());
    let mut again = vec![0; 2 * MIB as usize];
    ours.replay(&mut again);
    assert!(again == place.bytes("ours.img"), "the log tells how the disk came to be");
}

/// A log as the kernel's tools read it.
#[derive(Debug)]
struct Log(Vec<Entry>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    sector: u64,
    sectors: u64,
    flags: u64,
    data: Vec<u8>,
}

impl Log {
    fn read(log: &[u8]) -> Self {
        let word = |at: usize| u64::from_le_bytes(log[at..at + 8].try_into().unwrap());
        assert_eq!((word(0), word(8), log[24..28].to_vec()), (0x6a_7366_7773_6872, 1, vec![0, 2, 0, 0]));
        let (mut at, mut entries) = (512, Vec::new());
        for _ in 0..word(16) {
            let (sector, sectors, flags) = (word(at), word(at + 8), word(at + 16));
            at += 512;
            let length = if flags & 4 == 0 { sectors as usize * 512 } else { 0 };
            // What is zero at the end of a log need not be there.
            let data = (at..at + length).map(|at| log.get(at).copied().unwrap_or(0)).collect();
            at += length;
            entries.push(Entry { sector, sectors, flags, data });
        }
        Self(entries)
    }

    fn without_last_flushes(&self) -> &[Entry] {
        let end = self.0.iter().rposition(|entry| entry.flags != 1).map_or(0, |at| at + 1);
        &self.0[..end]
    }

    fn replay(&self, disk: &mut [u8]) {
        for entry in &self.0 {
            let at = entry.sector as usize * 512;
            if entry.flags & 4 != 0 {
                disk[at..at + entry.sectors as usize * 512].fill(0); // as a hole reads
            }
            disk[at..at + entry.data.len()].copy_from_slice(&entry.data);
        }
    }
}

#[test]
fn a_throttle_group_is_made_named_changed_and_ended_as_in_qemu() {
    let place = Place::new();
    let daemon = place.serve(
        "[monitor]\nqmp = \"qmp.sock\"\n[node.top]\ndriver = \"memory\"\nsize = \"1MiB\"\n\
         [node.below]\ndriver = \"memory\"\nsize = \"1MiB\"\n",
    );
    let mut qmp = daemon.qmp();
    let throttle =
        json!({ "driver": "throttle", "node-name": "slow", "file": "below", "throttle-group": "tenant" });
    let refused = |answer: Result<Value, Value>| answer.unwrap_err()["desc"].as_str().unwrap().to_owned();
    let missing = refused(qmp.try_run("blockdev-add", throttle.clone()));
    assert!(missing.contains("Throttle group 'tenant' does not exist"), "{missing}");
    let group = json!({ "qom-type": "throttle-group", "id": "tenant", "limits": { "iops-total": 5 } });
    qmp.run("object-add", group);
    qmp.run("blockdev-add", throttle);
    let limits = json!({ "path": "/objects/tenant", "property": "limits", "value": { "iops-total": 1000 } });
    qmp.run("qom-set", limits);
    let found = qmp.run("qom-get", json!({ "path": "/objects/tenant", "property": "limits" }));
    assert_eq!(found["iops-total"], 1000);
    let busy = refused(qmp.try_run("object-del", json!({ "id": "tenant" })));
    assert_eq!(busy, "object 'tenant' is in use, can not be deleted");
    qmp.run("blockdev-del", json!({ "node-name": "slow" }));
    qmp.run("object-del", json!({ "id": "tenant" }));
    assert!(daemon.terminate().success());
}

#[test]
fn blkverify_finds_what_differs_and_names_it() {
    if !have("blkverify_finds_what_differs_and_names_it", &["qemu-img"]) {
        return;
    }
    let place = Place::new();
    place.qcow2("image.qcow2");
    place.raw("raw.img", 4 * MIB);
    let daemon = place.serve(
        "[node.trusted]\ndriver = \"file\"\npath = \"raw.img\"\n[node.tested]\ndriver = \"qcow2\"\nfile = \"image.qcow2\"\n\
         [node.top]\ndriver = \"blkverify\"\nraw = \"trusted\"\ntest = \"tested\"\n",
    );
    let mut guest = place.guest();
    guest.write(MIB, &[7; 8192]).unwrap();
    assert_eq!(guest.read(0, 2 * MIB as u32).unwrap()[MIB as usize..][..8192], [7; 8192]);
    guest.write_zeroes(MIB, 4096).unwrap();
    assert_eq!(guest.read(MIB, 4096).unwrap(), [0; 4096]);
    // Somebody changes one byte of what is trusted.
    let raw = fs::File::options().write(true).open(place.path("raw.img")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&raw, &[8], MIB + 5000).unwrap();
    assert_eq!(guest.read(MIB, 8192).unwrap_err().raw_os_error(), Some(5));
    let place_of_it = format!("contents mismatch at offset {}", MIB + 5000);
    daemon.wait_log(|lines| lines.iter().any(|line| line.contains(&place_of_it)));
    assert!(guest.read(0, 4096).is_ok(), "the rest can be read");
    drop(guest);
    assert!(daemon.terminate().success());
}

#[test]
fn compress_stores_clusters_that_qemu_reads() {
    if !have("compress_stores_clusters_that_qemu_reads", &["qemu-img"]) {
        return;
    }
    let place = Place::new();
    place.qcow2("image.qcow2");
    place.raw("model.img", 4 * MIB);
    let daemon = place.serve(
        "[node.image]\ndriver = \"qcow2\"\nfile = \"image.qcow2\"\n[node.top]\ndriver = \"compress\"\nfile = \"image\"\n",
    );
    let mut guest = place.guest();
    let text: Vec<u8> = (0..2 * MIB).map(|at| (at / 1000) as u8).collect();
    for (offset, data) in [(0, &text[..]), (100_000, &text[..70_000]), (3 * MIB + 512, &text[..1024])] {
        guest.write(offset, data).unwrap();
        let model = fs::File::options().write(true).open(place.path("model.img")).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&model, data, offset).unwrap();
    }
    drop(guest);
    assert!(daemon.terminate().success());
    run("qemu-img", &["compare", &place.path("image.qcow2"), &place.path("model.img")]);
    let checked: Value =
        serde_json::from_str(&run("qemu-img", &["check", "--output=json", &place.path("image.qcow2")]))
            .unwrap();
    assert_eq!((&checked["allocated-clusters"], &checked["compressed-clusters"]), (&json!(33), &json!(33)));
    assert!(place.bytes("image.qcow2").len() < 700_000, "{}", place.bytes("image.qcow2").len());
}

#[test]
fn preallocate_reserves_ahead_and_leaves_the_file_as_long_as_without_it() {
    if !have("preallocate_reserves_ahead_and_leaves_the_file_as_long_as_without_it", &["qemu-img"]) {
        return;
    }
    let mut lengths = Vec::new();
    for ahead in [false, true] {
        let place = Place::new();
        place.qcow2("image.qcow2");
        let filter = if ahead {
            "[node.ahead]\ndriver = \"preallocate\"\nfile = \"disk\"\nprealloc-size = \"8MiB\"\n"
        } else {
            "[node.ahead]\ndriver = \"raw\"\nfile = \"disk\"\n"
        };
        let daemon = place.serve(&format!(
            "[node.disk]\ndriver = \"file\"\npath = \"image.qcow2\"\n{filter}\
             [node.top]\ndriver = \"qcow2\"\nfile = \"ahead\"\n"
        ));
        let mut guest = place.guest();
        for cluster in 0..20 {
            guest.write(cluster * 65536, &[cluster as u8 + 1; 65536]).unwrap();
        }
        guest.flush().unwrap();
        let while_open = fs::metadata(place.path("image.qcow2")).unwrap().len();
        assert_eq!(while_open >= 8 * MIB, ahead, "{while_open}");
        drop(guest);
        assert!(daemon.terminate().success());
        run("qemu-img", &["check", &place.path("image.qcow2")]);
        lengths.push(fs::metadata(place.path("image.qcow2")).unwrap().len());
        let disk = place.path("copy.raw");
        run("qemu-img", &["convert", "-O", "raw", &place.path("image.qcow2"), &disk]);
        assert_eq!(fs::read(Path::new(&disk)).unwrap()[19 * 65536..20 * 65536], [20; 65536]);
    }
    assert_eq!(lengths[0], lengths[1]);
}

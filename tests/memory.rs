//! What the program holds in memory.

use crate::harness::{Daemon, Guest, have, run};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

#[test]
fn the_idle_program_takes_less_than_30_mib() {
    if !have("the_idle_program_takes_less_than_30_mib", &["qemu-img"]) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let graph = include_str!("../examples/graphs/vm-disk.toml");
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    run("qemu-img", &["create", "-q", "-f", "qcow2", &path("base.qcow2"), "10G"]);
    let active = path("active.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", &active]);
    let daemon = Daemon::start(directory.path(), graph);
    // A client that came and went, and one that has nothing to say.
    drop(Guest::connect(&directory.path().join("vda.sock"), "vda"));
    let _idle = Guest::connect(&directory.path().join("vda.sock"), "vda");
    let (resident, anonymous) = (daemon.resident_bytes(), daemon.anonymous_bytes());
    eprintln!("resident: {} KiB, of which {} KiB are no file's", resident / 1024, anonymous / 1024);
    assert!(anonymous < 8 * MIB, "{} KiB", anonymous / 1024);
    // A debug build has several times the code.
    assert!(cfg!(debug_assertions) || resident < 30 * MIB, "{} KiB", resident / 1024);
}

#[test]
fn a_clean_bitmap_over_a_pebibyte_takes_less_than_a_mebibyte() {
    const PIB: u64 = 1 << 50;
    let graph = r#"
        [node.huge]
        driver = "null"
        size = "1PiB"
        [drive.vda]
        root = "huge"
        [export.vda]
        type = "nbd"
        drive = "vda"
        socket = "vda.sock"
        writable = true
        [monitor]
        qmp = "qmp.sock"
    "#;
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(directory.path(), graph);
    let mut guest = Guest::connect(&directory.path().join("vda.sock"), "vda");
    assert_eq!(guest.size, PIB);
    let mut qmp = daemon.qmp();
    let bitmap = |name: &str| json!({ "node": "vda", "name": name, "granularity": 65536 });
    // What every connection and the first of anything takes is not the bitmap's.
    qmp.run("block-dirty-bitmap-add", bitmap("first"));
    guest.write(0, &[1; 512]).unwrap();
    qmp.run("block-dirty-bitmap-remove", json!({ "node": "vda", "name": "first" }));
    let before = daemon.resident_bytes();
    qmp.run("block-dirty-bitmap-add", bitmap("daily"));
    let clean = daemon.resident_bytes() - before.min(daemon.resident_bytes());
    assert!(clean < MIB, "{clean} bytes");

    // And what is dirty is what it costs.
    guest.write(PIB - 512, &[1; 512]).unwrap();
    guest.write(PIB / 2, &[1; 512]).unwrap();
    let nodes = qmp.run("query-named-block-nodes", json!({}));
    let node = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "huge").unwrap();
    let daily: Option<&Value> =
        node["dirty-bitmaps"].as_array().unwrap().iter().find(|b| b["name"] == "daily");
    assert_eq!(daily.unwrap()["count"], 2 * 65536);
    let dirty = daemon.resident_bytes() - before.min(daemon.resident_bytes());
    assert!(dirty < MIB, "{dirty} bytes");
}

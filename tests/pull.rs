//! Backups that a client pulls, with the commands that libvirt sends for one (its `backup-begin` in pull mode): a scratch image on the
//! disk's node takes what is written over, a job with `sync=none` fills it, and an export of it is the moment of the transaction.

use crate::harness::{Daemon, Guest, dirty, have, run, serve};
use serde_json::json;
use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
};

const GRANULE: u64 = 64 << 10;
const GRANULES: u64 = 256;

const NODE: &str = "[node.disk]\ndriver = \"qcow2\"\nfile = \"disk.qcow2\"\n";

fn write(guest: &mut Guest, granules: &[u64], byte: u8) {
    granules.iter().for_each(|at| guest.write(at * GRANULE, &vec![byte; GRANULE as usize]).unwrap());
}

#[test]
fn a_backup_as_libvirt_pulls_it_is_its_moment_and_knows_what_changed() {
    let tools = ["qemu-img", "nbdcopy", "nbdinfo"];
    if !have("a_backup_as_libvirt_pulls_it_is_its_moment_and_knows_what_changed", &tools) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let size = (GRANULES * GRANULE).to_string();
    run("qemu-img", &["create", "-q", "-f", "qcow2", &path("disk.qcow2"), &size]);
    let daemon = Daemon::start(folder.path(), &(NODE.to_owned() + &serve("disk", "")));
    let mut qmp = daemon.qmp();
    let socket = folder.path().join("nbd.sock");
    let uri = |export: &str| format!("nbd+unix:///{export}?socket={}", socket.display());
    let mut guest = Guest::connect(&socket, "vda");
    let all: Vec<u64> = (0..GRANULES).collect();
    write(&mut guest, &all[..200], 1);

    // The checkpoint of the backup before, and what the guest wrote since.
    qmp.run("block-dirty-bitmap-add", json!({ "node": "disk", "name": "before", "persistent": true }));
    let changed = [3, 4, 77, 210, 255];
    write(&mut guest, &changed, 2);
    guest.flush().unwrap();
    run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri("vda"), &path("moment.raw")]);

    let file = json!({ "driver": "qcow2", "file": "scratch-file", "size": GRANULES * GRANULE,
        "backing-file": path("disk.qcow2"), "backing-fmt": "qcow2" });
    std::fs::write(path("scratch.qcow2"), []).unwrap();
    qmp.run(
        "blockdev-add",
        json!({ "driver": "file", "node-name": "scratch-file", "filename": path("scratch.qcow2") }),
    );
    qmp.run("blockdev-create", json!({ "job-id": "create", "options": file }));
    qmp.wait_event("JOB_STATUS_CHANGE", "create");
    while qmp.run("query-jobs", json!({}))[0]["status"] != "concluded" {
        qmp.wait_event("JOB_STATUS_CHANGE", "create");
    }
    assert_eq!(qmp.run("query-jobs", json!({}))[0].get("error"), None);
    qmp.run("job-dismiss", json!({ "id": "create" }));
    qmp.run(
        "blockdev-add",
        json!({ "driver": "qcow2", "node-name": "scratch", "file": "scratch-file", "backing": "disk" }),
    );
    let action = |kind: &str, data: serde_json::Value| json!({ "type": kind, "data": data });
    let actions = [
        action("block-dirty-bitmap-add", json!({ "node": "disk", "name": "now", "persistent": true })),
        action("block-dirty-bitmap-add", json!({ "node": "disk", "name": "backup-vda", "disabled": true })),
        action(
            "block-dirty-bitmap-merge",
            json!({ "node": "disk", "target": "backup-vda", "bitmaps": ["before"] }),
        ),
        action("block-dirty-bitmap-disable", json!({ "node": "disk", "name": "before" })),
        action(
            "blockdev-backup",
            json!({ "job-id": "backup-vda", "device": "disk", "target": "scratch", "sync": "none", "auto-dismiss": false }),
        ),
    ];
    qmp.run("transaction", json!({ "actions": actions }));
    qmp.run(
        "block-export-add",
        json!({ "type": "nbd", "id": "pull", "node-name": "scratch", "name": "pull", "writable": false,
            "bitmaps": [{ "node": "disk", "name": "backup-vda" }] }),
    );

    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let stop = &stop;
        scope.spawn(|| {
            for round in 3u8.. {
                write(&mut guest, &all, round.max(3));
                if stop.load(SeqCst) {
                    break;
                }
            }
        });
        for _ in 0..2 {
            run("nbdcopy", &[&uri("pull"), &path("pulled.raw")]);
            run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &path("pulled.raw"), &path("moment.raw")]);
        }
        assert_eq!(dirty(&uri("pull"), "backup-vda", GRANULE), BTreeSet::from(changed));
        stop.store(true, SeqCst);
    });

    qmp.run("job-cancel", json!({ "id": "backup-vda" }));
    let end = qmp.wait_event("BLOCK_JOB_CANCELLED", "backup-vda");
    assert_eq!(end["type"], "backup");
    while qmp.run("query-jobs", json!({}))[0]["status"] != "concluded" {
        qmp.wait_event("JOB_STATUS_CHANGE", "backup-vda");
    }
    qmp.run("job-dismiss", json!({ "id": "backup-vda" }));
    qmp.run("block-export-del", json!({ "id": "pull" }));
    qmp.wait_event("BLOCK_EXPORT_DELETED", "pull");
    for node in ["scratch", "scratch-file"] {
        qmp.run("blockdev-del", json!({ "node-name": node }));
    }
    qmp.run("block-dirty-bitmap-remove", json!({ "node": "disk", "name": "backup-vda" }));
    let nodes = qmp.run("query-named-block-nodes", json!({ "flat": true }));
    let disk = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "disk").unwrap();
    let count = |name: &str| {
        let bitmaps = disk["dirty-bitmaps"].as_array().unwrap();
        bitmaps.iter().find(|bitmap| bitmap["name"] == name).unwrap()["count"].as_u64().unwrap() / GRANULE
    };
    assert_eq!((count("before"), count("now")), (changed.len() as u64, GRANULES));
}

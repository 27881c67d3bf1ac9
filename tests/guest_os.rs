//! A guest's operating system on a drive: files that it writes while the graph below is being changed.

use crate::harness::{Daemon, Vm, have, run};
use serde_json::json;

const CONFIGURATION: &str = r#"
    [node.base]
    driver = "qcow2"
    file = "base.qcow2"
    read-only = true

    [node.active]
    driver = "qcow2"
    file = "active.qcow2"
    backing = "base"

    [drive.vda]
    root = "active"
    bitmaps = [{ name = "daily" }]

    [export.vda]
    type = "nbd"
    drive = "vda"
    socket = "vda.sock"
    writable = true
    bitmaps = ["daily"]

    [monitor]
    qmp = "qmp.sock"
"#;

#[test]
fn a_file_system_lives_through_what_is_done_below_it_and_is_restored_from_backups() {
    let name = "a_file_system_lives_through_what_is_done_below_it_and_is_restored_from_backups";
    if !have(name, &["qemu-img"]) || !Vm::have(name) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = |file: &str| folder.path().join(file).to_str().unwrap().to_owned();
    run("qemu-img", &["create", "-q", "-f", "qcow2", &path("base.qcow2"), "256M"]);
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-b", &path("base.qcow2"), "-F", "qcow2", &path("active.qcow2")],
    );
    let daemon = Daemon::start(folder.path(), CONFIGURATION);
    let mut qmp = daemon.qmp();
    let disk = format!("nbd+unix:///vda?socket={}", path("vda.sock"));
    let mut vm = Vm::boot(folder.path(), &disk);
    vm.run("mke2fs -q /dev/vda > /dev/null && mount -t ext4 -o discard /dev/vda /mnt");
    let write = |vm: &mut Vm, file: &str, mib: u32| {
        vm.run(&format!("dd if=/dev/urandom of=/mnt/{file} bs=1M count={mib} 2> /dev/null && sync"));
        vm.run(&format!("sha256sum /mnt/{file}"))
    };
    let mut hashes = vec![write(&mut vm, "before", 8)];
    qmp.run("block-stream", json!({ "device": "vda", "job-id": "stream", "speed": 64 << 20 }));
    hashes.push(write(&mut vm, "during", 8));
    let full = json!({ "device": "vda", "job-id": "backup", "target": path("full.qcow2"), "format": "qcow2", "sync": "full" });
    let clear = json!({ "node": "vda", "name": "daily" });
    let actions = json!([
        { "type": "block-dirty-bitmap-clear", "data": clear },
        { "type": "drive-backup", "data": full },
    ]);
    qmp.run("transaction", json!({ "actions": actions }));
    assert!(qmp.wait_event("BLOCK_JOB_COMPLETED", "backup").get("error").is_none());
    let slow = json!({ "driver": "delay", "node-name": "slow", "write": "100us" });
    qmp.run("x-driveline-blockdev-insert-filter", json!({ "above": "vda", "options": slow }));
    hashes.push(write(&mut vm, "filtered", 4));
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            &path("full.qcow2"),
            "-F",
            "qcow2",
            &path("incremental.qcow2"),
        ],
    );
    let incremental = json!({
        "device": "vda", "job-id": "backup", "target": path("incremental.qcow2"), "format": "qcow2", "mode": "existing",
        "sync": "incremental", "bitmap": "daily",
    });
    qmp.run("drive-backup", incremental);
    assert!(qmp.wait_event("BLOCK_JOB_COMPLETED", "backup").get("error").is_none());
    vm.run("rm /mnt/before && sync");
    qmp.run("x-driveline-blockdev-remove-filter", json!({ "node-name": "slow" }));
    hashes.push(write(&mut vm, "after", 4));
    vm.run("umount /mnt");
    vm.power_off();
    drop(qmp);
    assert!(daemon.terminate().success());
    run("qemu-img", &["check", &path("active.qcow2")]);
    // Another boot, of what is on the disk and with nothing of Driveline: the files are what they were.
    run("qemu-img", &["convert", "-O", "raw", &path("active.qcow2"), &path("copy.raw")]);
    let mut vm = Vm::boot(folder.path(), &path("copy.raw"));
    vm.run("mount -t ext4 -o ro /dev/vda /mnt");
    let found: Vec<String> =
        ["during", "filtered", "after"].map(|file| vm.run(&format!("sha256sum /mnt/{file}"))).into();
    assert_eq!(found, hashes[1..]);
    vm.run("test ! -e /mnt/before");
    vm.power_off();
    // And of the backups: what was there when the last one was taken.
    run("qemu-img", &["convert", "-O", "raw", &path("incremental.qcow2"), &path("restored.raw")]);
    let mut vm = Vm::boot(folder.path(), &path("restored.raw"));
    vm.run("mount -t ext4 -o ro /dev/vda /mnt");
    let found: Vec<String> =
        ["before", "during", "filtered"].map(|file| vm.run(&format!("sha256sum /mnt/{file}"))).into();
    assert_eq!(found, hashes[..3]);
    vm.run("test ! -e /mnt/after");
    vm.power_off();
}

//! An image is handed from one program to another and back, as when a machine moves to another host: it is inactive where it is not
//! used, and one that becomes active finds what the other wrote, and the bitmap. Each of the two programs may be QEMU's. Clients keep
//! their export meanwhile, or it goes and comes with the image.

use crate::harness::{GRANULE, Guest, Qmp, StorageDaemon, have, run};
use serde_json::{Value, json};
use std::{path::Path, process::Command};

const GRANULES: usize = 64;

/// One of the programs, with the image as node `disk`.
struct Host {
    /// The export is there while the image is inactive, too.
    export_stays: bool,
    folder: tempfile::TempDir,
    daemon: StorageDaemon,
    qmp: Qmp,
}

impl Host {
    fn start(program: Command, image: &Path, active: bool, export_stays: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = json!({ "driver": "file", "node-name": "file", "filename": image, "active": active });
        let disk = json!({ "driver": "qcow2", "node-name": "disk", "file": "file", "active": active });
        let (file, disk) = (file.to_string(), disk.to_string());
        let server = format!("addr.type=unix,addr.path={}", folder.path().join("nbd.sock").display());
        let arguments = ["--blockdev", &file, "--blockdev", &disk, "--nbd-server", &server];
        let daemon = StorageDaemon::start(program, folder.path(), &arguments);
        let qmp = daemon.qmp();
        let mut host = Self { export_stays, folder, daemon, qmp };
        if active || export_stays {
            host.export();
        }
        host
    }

    fn export(&mut self) {
        let waits = self.export_stays;
        let export = json!({ "type": "nbd", "id": "disk", "name": "disk", "node-name": "disk", "writable": true, "allow-inactive": waits });
        self.qmp.run("block-export-add", export);
    }

    fn guest(&self) -> Guest {
        Guest::connect(&self.folder.path().join("nbd.sock"), "disk")
    }

    fn set_active(&mut self, active: bool) {
        if !active && !self.export_stays {
            self.qmp.run("block-export-del", json!({ "id": "disk", "mode": "hard" }));
            self.qmp.wait_event("BLOCK_EXPORT_DELETED", "disk");
        }
        self.qmp.run("blockdev-set-active", json!({ "active": active }));
        if active && !self.export_stays {
            self.export();
        }
    }

    /// Writes to granules, of which `bytes` knows the content.
    fn write(&self, bytes: &mut [u8], granules: &[usize], value: u8) {
        let mut guest = self.guest();
        for granule in granules {
            let range = granule * GRANULE..(granule + 1) * GRANULE;
            guest.write(range.start as u64, &vec![value; GRANULE]).unwrap();
            bytes[range].fill(value);
        }
        guest.flush().unwrap();
    }

    /// It has what was written anywhere, and the bitmap, if there is one, knows how many granules that were.
    fn check(&mut self, bytes: &[u8], dirty: Option<usize>) {
        assert!(self.guest().read(0, bytes.len() as u32).unwrap() == bytes, "what the other one wrote");
        let Some(dirty) = dirty else { return };
        let nodes = self.qmp.run("query-named-block-nodes", json!({ "flat": true }));
        let disk = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "disk").unwrap();
        let bitmap = &disk["dirty-bitmaps"][0];
        let said = ["name", "count", "recording", "persistent"].map(|key| bitmap[key].clone());
        assert_eq!(said, [json!("daily"), json!(dirty * GRANULE), json!(true), json!(true)], "{bitmap}");
    }

    fn end(mut self) {
        self.qmp.run("quit", json!({}));
        drop(self.qmp);
        assert!(self.daemon.wait().success());
    }
}

fn hand_over_and_back(one: fn() -> Command, other: fn() -> Command) {
    hand_over(one(), other(), false);
    hand_over(one(), other(), true);
}

fn hand_over(one: Command, other: Command, export_stays: bool) {
    // The bitmap goes into the image when nobody uses it any more.
    let dirty = |granules: usize| (!export_stays).then_some(granules);
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.qcow2");
    let mut bytes = vec![0; GRANULES * GRANULE];
    run("qemu-img", &["create", "-q", "-f", "qcow2", image.to_str().unwrap(), &bytes.len().to_string()]);
    let mut one = Host::start(one, &image, true, export_stays);
    if !export_stays {
        let daily = json!({ "node": "disk", "name": "daily", "persistent": true });
        one.qmp.run("block-dirty-bitmap-add", daily);
    }
    one.write(&mut bytes, &[3, 7, 11], 1);
    let mut other = Host::start(other, &image, false, export_stays);
    one.set_active(false);
    if export_stays {
        let refused = one.guest().write(0, &[1; 512]);
        assert!(refused.is_err(), "an image that somebody else may have is not written to");
    }
    other.set_active(true);
    other.check(&bytes, dirty(3));
    other.write(&mut bytes, &[7, 20], 2);
    other.check(&bytes, dirty(4));
    other.set_active(false);
    one.set_active(true);
    one.check(&bytes, dirty(4));
    one.write(&mut bytes, &[30], 3);
    one.check(&bytes, dirty(5));
    other.end();
    one.end();
    run("qemu-img", &["check", "-q", image.to_str().unwrap()]);
    if export_stays {
        return;
    }
    let info = run("qemu-img", &["info", "--output=json", image.to_str().unwrap()]);
    let info: Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["format-specific"]["data"]["bitmaps"][0]["name"], "daily");
}

#[test]
fn an_image_is_handed_to_another_driveline_and_back() {
    if have("an_image_is_handed_to_another_driveline_and_back", &["qemu-img"]) {
        hand_over_and_back(StorageDaemon::driveline, StorageDaemon::driveline);
    }
}

#[test]
fn an_image_is_handed_to_qemu_and_back() {
    if have("an_image_is_handed_to_qemu_and_back", &["qemu-img", "qemu-storage-daemon"]) {
        hand_over_and_back(StorageDaemon::driveline, StorageDaemon::qemu);
    }
}

#[test]
fn an_image_is_taken_from_qemu_and_handed_back() {
    if have("an_image_is_taken_from_qemu_and_handed_back", &["qemu-img", "qemu-storage-daemon"]) {
        hand_over_and_back(StorageDaemon::qemu, StorageDaemon::driveline);
    }
}

//! Bitmaps go along when another image is put on top of a drive.

use super::*;

#[test]
fn bitmaps_of_a_drive_survive_a_snapshot_and_a_kill_right_after_it() {
    if !have("persistent", &["nbdinfo"]) {
        return;
    }
    for (settled, killed) in [(true, true), (true, false), (false, true)] {
        let case = format!("settled: {settled}, killed: {killed}");
        let world = World::qcow2();
        let daemon = world.start();
        let mut qmp = daemon.qmp();
        let mut written = world.write(&[1, 100]);
        wait_kept_in(&world, "disk.qcow2.dlbitmaps");
        let over = world.text("over.qcow2");
        qmp.run(
            "blockdev-snapshot-sync",
            json!({ "device": "vda", "snapshot-file": over, "snapshot-node-name": "over" }),
        );
        written.extend(world.write(&[101]));
        if settled {
            wait_kept_in(&world, "over.qcow2.dlbitmaps");
            written.extend(world.write(&[102]));
        }
        if killed {
            daemon.kill()
        } else {
            assert!(daemon.terminate().success(), "{case}")
        }
        // As README says, the file is changed after a snapshot.
        let toml = world.toml.replace("disk.qcow2", "over.qcow2");
        for image in ["disk.qcow2", "over.qcow2"] {
            let checked = output("qemu-img", &["check", &world.unlocked(image)]);
            assert!(matches!(checked.status.code(), Some(0 | 3)), "{case}: {image}: {checked:?}");
        }
        let daemon = Daemon::start(world.directory.path(), &toml);
        assert_eq!(world.dirty("daily"), written, "{case}");
        written.extend(world.write(&[200]));
        assert_eq!(world.dirty("daily"), written, "{case}");
        assert!(daemon.terminate().success(), "{case}");
        let bitmaps = |image: &str| {
            let info = run("qemu-img", &["info", "--output=json", &world.text(image)]);
            let info: Value = serde_json::from_str(&info).unwrap();
            info["format-specific"]["data"]["bitmaps"].clone()
        };
        assert_eq!(bitmaps("over.qcow2")[0]["name"], "daily", "{case}");
        if settled {
            assert_eq!(bitmaps("disk.qcow2"), Value::Null, "{case}: none is left behind");
        }
    }
}

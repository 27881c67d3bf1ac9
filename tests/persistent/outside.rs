//! Images that are not what the bitmaps knew, after a crash: each of these was once "recovered, exact".

use super::*;

fn verdicts(daemon: &Daemon) -> Vec<String> {
    recovered(&mut daemon.qmp()).into_iter().map(|(_, verdict)| verdict).collect()
}

/// The operator restores a backup of the image after the crash: what was written and backed up since then is gone again.
#[test]
fn a_restored_image_is_not_the_one_that_the_bitmaps_knew() {
    if !have("persistent", &["nbdinfo", "qemu-img", "qemu-io"]) {
        return;
    }
    let restores: [fn(&World); 2] = [
        |world| fs::rename(world.path("older.raw"), world.path("disk.raw")).unwrap(),
        |world| drop(run("cp", &["-a", &world.text("older.raw"), &world.text("disk.raw")])),
    ];
    for restore in restores {
        let world = World::raw();
        run("touch", &["-d", "2 hours ago", &world.text("disk.raw")]);
        run("cp", &["-a", &world.text("disk.raw"), &world.text("older.raw")]);
        for granule in [30, 31] {
            let daemon = world.start();
            daemon.qmp().run("block-dirty-bitmap-clear", json!({ "node": "vda", "name": "daily" }));
            world.write(&[granule]);
            if granule == 30 { assert!(daemon.terminate().success()) } else { daemon.kill() }
        }
        restore(&world);
        let daemon = world.start();
        assert_eq!(verdicts(&daemon), ["all-dirty"]);
    }
}

#[test]
fn a_copied_qcow2_image_carries_a_witness_that_counts_for_nothing() {
    if !have("persistent", &["nbdinfo", "qemu-img", "qemu-io"]) {
        return;
    }
    let world = World::qcow2();
    let daemon = world.start();
    world.write(&[1]);
    world.guest().flush().unwrap();
    run("cp", &[&world.text("disk.qcow2"), &world.text("copy.qcow2")]);
    world.write(&[2]);
    daemon.kill();
    fs::rename(world.path("copy.qcow2"), world.path("disk.qcow2")).unwrap();
    let daemon = world.start();
    assert_eq!(verdicts(&daemon), ["all-dirty"]);
}

#[test]
fn a_backing_image_that_changes_after_a_crash_is_noticed() {
    if !have("persistent", &["nbdinfo", "qemu-img", "qemu-io"]) {
        return;
    }
    let world = layers();
    let daemon = world.start();
    world.write(&[1]);
    daemon.kill();
    let base = world.unlocked("base.qcow2");
    run("qemu-io", &["-c", "write -P 9 30M 64k", &base]);
    // As if that had been done a while after the crash.
    run("touch", &["-d", "now + 1 hour", &base]);
    let daemon = world.start();
    assert_eq!(verdicts(&daemon), ["all-dirty"]);
}

/// Two machines in one directory call their first drive the same, and have raw images: one place for two drives' bitmaps.
#[test]
fn the_place_of_another_drive_of_the_same_name_is_refused() {
    if !have("persistent", &["nbdinfo", "qemu-img", "qemu-io"]) {
        return;
    }
    let world = World::raw();
    let other = world.text("other.raw");
    fs::File::create(&other).unwrap().set_len(SIZE).unwrap();
    let daemon = world.start();
    let written = world.write(&[3]);
    fs::write(world.path("other.toml"), world.toml.replace("disk.raw", "other.raw")).unwrap();
    daemon.kill();
    let ended = output(Daemon::program().to_str().unwrap(), &["run", &world.text("other.toml")]);
    let text = String::from_utf8_lossy(&ended.stderr);
    assert!(!ended.status.success(), "{text}");
    for part in ["vda.dlbitmaps has the bitmaps of drive 'vda' in", "disk.raw", "in [drive.vda]"] {
        assert!(text.contains(part), "{text}");
    }
    let daemon = world.start();
    assert_eq!((verdicts(&daemon), world.dirty("daily")), (vec!["exact".to_owned()], written));
}

/// The configuration was not changed after a commit: it shows old data over new.
#[test]
fn an_upper_image_that_was_committed_away_makes_the_bitmap_all_dirty() {
    if !have("persistent", &["nbdinfo", "qemu-img", "qemu-io"]) {
        return;
    }
    let world = layers();
    let daemon = world.start();
    let mut qmp = daemon.qmp();
    world.write(&[1]);
    qmp.run("block-commit", json!({ "job-id": "c", "device": "vda" }));
    qmp.wait_event("BLOCK_JOB_READY", "c");
    qmp.run("job-complete", json!({ "id": "c" }));
    qmp.wait_event("BLOCK_JOB_COMPLETED", "c");
    wait_kept_in(&world, "base.qcow2.dlbitmaps");
    qmp.run("x-driveline-block-dirty-bitmap-store", json!({ "node": "vda" }));
    world.write(&[200]);
    daemon.kill();
    // Who wants that removes what keeps him from it.
    fs::remove_file(world.path("top.qcow2.vda.dlmoved")).unwrap();
    let daemon = world.start();
    assert_eq!(verdicts(&daemon), ["all-dirty"]);
}

/// The message about the recovery must not prevent it: on a full disk nothing can be written to a log.
#[test]
fn a_program_whose_stderr_is_full_recovers_all_the_same() {
    if !have("persistent", &["nbdinfo", "qemu-img", "qemu-io"]) {
        return;
    }
    let world = World::raw();
    let daemon = world.start();
    let written = world.write(&[5]);
    daemon.kill();
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut daemon = Daemon::start_with(world.directory.path(), &world.toml, full.into());
    assert_eq!(world.dirty("daily"), written);
    assert!(daemon.is_alive());
}

#[test]
fn a_file_of_another_kind_in_the_place_of_bitmaps_is_put_aside() {
    if !have("persistent", &["nbdinfo", "qemu-img", "qemu-io"]) {
        return;
    }
    let world = World::raw();
    let daemon = world.start();
    world.write(&[5]);
    daemon.kill();
    fs::write(world.path("vda.dlbitmaps"), "something else").unwrap();
    let daemon = world.start();
    assert_eq!(world.dirty("daily"), all());
    assert_eq!(fs::read(world.path("vda.dlbitmaps.damaged")).unwrap(), b"something else");
    drop(daemon);
}

/// Two machines stand on one image: it is in the chain of both, and their bitmaps are in one place if their own images can
/// hold none.
#[test]
fn a_shared_backing_image_makes_no_drive_the_other() {
    if !have("persistent", &["nbdinfo", "qemu-img", "qemu-io"]) {
        return;
    }
    let world = World::new("[node.top]\ndriver = \"qcow2\"\nfile = \"one.qcow2\"\n", "");
    let golden = world.text("golden.raw");
    fs::File::create(&golden).unwrap().set_len(SIZE).unwrap();
    for name in ["one.qcow2", "two.qcow2"] {
        let image = world.text(name);
        let old = ["create", "-q", "-f", "qcow2", "-o", "compat=0.10", "-b", &golden, "-F", "raw", &image];
        run("qemu-img", &old);
    }
    let daemon = world.start();
    let written = world.write(&[3]);
    daemon.kill();
    fs::write(world.path("two.toml"), world.toml.replace("one.qcow2", "two.qcow2")).unwrap();
    let ended = output(Daemon::program().to_str().unwrap(), &["run", &world.text("two.toml")]);
    let text = String::from_utf8_lossy(&ended.stderr);
    assert!(!ended.status.success() && text.contains("one.qcow2; expected another place"), "{text}");
    let daemon = world.start();
    assert_eq!((verdicts(&daemon), world.dirty("daily")), (vec!["exact".to_owned()], written));
}

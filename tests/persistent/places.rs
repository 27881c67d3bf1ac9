//! Where bitmaps are kept, and how they come there.

use super::*;

#[test]
fn bitmaps_follow_their_drive_into_the_image_that_it_is_committed_to() {
    if !have("persistent", &["nbdinfo"]) {
        return;
    }
    for killed in [false, true] {
        let world = layers();
        let daemon = world.start();
        let mut qmp = daemon.qmp();
        let mut written = world.write(&[1, 100]);
        wait_kept_in(&world, "top.qcow2.dlbitmaps");
        qmp.run("block-commit", json!({ "job-id": "c", "device": "vda" }));
        qmp.wait_event("BLOCK_JOB_READY", "c");
        written.extend(world.write(&[101]));
        qmp.run("job-complete", json!({ "id": "c" }));
        qmp.wait_event("BLOCK_JOB_COMPLETED", "c");
        wait_kept_in(&world, "base.qcow2.dlbitmaps");
        written.extend(world.write(&[102]));
        let kept = qmp.run("x-driveline-block-dirty-bitmap-store", json!({ "node": "vda" }));
        assert!(kept["file"].as_str().unwrap().ends_with("/base.qcow2.dlbitmaps"), "{kept}");
        if killed {
            daemon.kill()
        } else {
            assert!(daemon.terminate().success())
        }
        for image in ["base.qcow2", "top.qcow2"] {
            let checked = output("qemu-img", &["check", &world.unlocked(image)]);
            assert!(matches!(checked.status.code(), Some(0 | 3)), "{image}: {checked:?}");
        }
        // As README says, the file is changed after a commit.
        let toml = world.toml.replace("top.qcow2", "base.qcow2");
        let daemon = Daemon::start(world.directory.path(), &toml);
        assert_eq!(world.dirty("daily"), written, "killed: {killed}");
        assert!(daemon.terminate().success());
        let info = run("qemu-img", &["info", "--output=json", &world.text("base.qcow2")]);
        let info: Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["format-specific"]["data"]["bitmaps"][0]["name"], "daily", "{info}");
    }
}

/// Tools that know chains keep bitmaps in lower images too. They stay there, and record what a commit changes in theirs.
#[test]
fn an_image_that_has_bitmaps_of_its_own_keeps_both_kinds() {
    if !have("persistent", &["nbdinfo"]) {
        return;
    }
    for killed in [false, true] {
        let world = layers();
        run("qemu-img", &["bitmap", "--add", "-g", "64k", &world.text("base.qcow2"), "theirs"]);
        let daemon = world.start();
        let mut qmp = daemon.qmp();
        let mut written = world.write(&[1, 300]);
        qmp.run("block-commit", json!({ "job-id": "c", "device": "vda" }));
        qmp.wait_event("BLOCK_JOB_READY", "c");
        qmp.run("job-complete", json!({ "id": "c" }));
        qmp.wait_event("BLOCK_JOB_COMPLETED", "c");
        wait_kept_at(&world, &["base.qcow2.dlbitmaps", "vda.dlbitmaps"]);
        written.extend(world.write(&[301]));
        if killed {
            daemon.kill()
        } else {
            assert!(daemon.terminate().success())
        }
        let toml = world.toml.replace("top.qcow2", "base.qcow2");
        let daemon = Daemon::start(world.directory.path(), &toml);
        assert_eq!(world.dirty("daily"), written, "killed: {killed}");
        let theirs = bitmap(&mut daemon.qmp(), "theirs");
        // All that the upper image held, from 4 MiB to 12, and what the guest wrote.
        let changed = (8 << 20) + 3 * GRANULARITY;
        assert!(theirs["count"].as_u64().unwrap() >= changed, "killed: {killed}: {theirs}");
        assert!(daemon.terminate().success());
        run("qemu-img", &["check", "-q", &world.text("base.qcow2")]);
    }
}

#[test]
fn a_monitor_moves_bitmaps_to_another_place_and_brings_them_to_the_disk() {
    if !have("persistent", &["nbdinfo"]) {
        return;
    }
    let world = World::qcow2();
    let daemon = world.start();
    let mut qmp = daemon.qmp();
    let mut written = world.write(&[5]);
    let place = world.text("elsewhere.dlbitmaps");
    let arguments = json!({ "node": "vda", "store": format!("file:{place}"), "flush": true });
    let kept = qmp.run("x-driveline-block-dirty-bitmap-store", arguments);
    assert_eq!(kept, json!({ "store": format!("file:{place}"), "file": place }));
    assert_eq!(names(world.store(), ".dlbitmaps"), ["elsewhere.dlbitmaps"]);
    written.extend(world.write(&[6]));
    let refused = |qmp: &mut Qmp, store: &str| {
        let arguments = json!({ "node": "vda", "store": store });
        qmp.try_run("x-driveline-block-dirty-bitmap-store", arguments).unwrap_err()["desc"].clone()
    };
    assert!(refused(&mut qmp, "qcow2:nothing").as_str().unwrap().contains("nothing"));
    let text = refused(&mut qmp, &format!("file:{}", world.text("drive.toml")));
    assert!(text.as_str().unwrap().contains("is there already"), "{text}");
    assert!(daemon.terminate().success());
    let info: Value =
        serde_json::from_str(&run("qemu-img", &["info", "--output=json", &world.text("disk.qcow2")]))
            .unwrap();
    assert_eq!(info["format-specific"]["data"]["bitmaps"], Value::Null, "they are not in the image any more");

    let toml =
        world.toml.replace("root = \"top\"", "root = \"top\"\nbitmap-store = \"file:elsewhere.dlbitmaps\"");
    let daemon = Daemon::start(world.directory.path(), &toml);
    assert_eq!(world.dirty("daily"), written);
    let mut qmp = daemon.qmp();
    qmp.run("x-driveline-block-dirty-bitmap-store", json!({ "node": "vda", "store": "qcow2:top" }));
    written.extend(world.write(&[7]));
    assert_eq!(names(world.store(), ".dlbitmaps"), ["disk.qcow2.dlbitmaps"]);
    assert!(daemon.terminate().success());
    let daemon = world.start();
    assert_eq!(world.dirty("daily"), written);
    assert!(daemon.terminate().success());
}

#[test]
fn another_place_in_the_configuration_is_where_the_bitmaps_go() {
    if !have("persistent", &["nbdinfo"]) {
        return;
    }
    let world = World::qcow2();
    let in_file =
        world.toml.replace("root = \"top\"", "root = \"top\"\nbitmap-store = \"file:place.dlbitmaps\"");
    let mut written = BTreeSet::new();
    for (turn, killed) in [false, true, false, true].into_iter().enumerate() {
        for toml in [&world.toml, &in_file] {
            let daemon = Daemon::start(world.directory.path(), toml);
            assert_eq!(world.dirty("daily"), written, "turn {turn}");
            written.extend(world.write(&[written.len() as u64]));
            if killed { daemon.kill() } else { assert!(daemon.terminate().success()) }
        }
    }
    run("qemu-img", &["check", "-q", &world.unlocked("disk.qcow2")]);
}

/// Virtual machines keep their images in one directory, and all call their first drive the same.
#[test]
fn drives_of_one_name_in_one_directory_do_not_take_each_others_bitmaps() {
    if !have("persistent", &["nbdinfo"]) {
        return;
    }
    let one = World::qcow2();
    let image = one.text("other.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", &image, "32M"]);
    let other_toml = one.toml.replace("disk.qcow2", "other.qcow2");
    let daemon = one.start();
    let written = one.write(&[1, 2]);
    daemon.kill();
    let daemon = Daemon::start(one.directory.path(), &other_toml);
    assert_eq!(one.dirty("daily"), BTreeSet::new());
    let others = one.write(&[3]);
    daemon.kill();
    let daemon = one.start();
    assert_eq!(one.dirty("daily"), written);
    assert!(daemon.terminate().success());
    let daemon = Daemon::start(one.directory.path(), &other_toml);
    assert_eq!(one.dirty("daily"), others);
    assert!(daemon.terminate().success());
}

/// A full disk must neither kill the program nor lose a mark.
#[test]
fn a_store_that_cannot_be_made_is_an_error_that_says_where() {
    let world = World::raw();
    let toml =
        world.toml.replace("root = \"top\"", "root = \"top\"\nbitmap-store = \"file:no/such/directory\"");
    fs::write(world.path("drive.toml"), toml).unwrap();
    let ended = output(Daemon::program().to_str().unwrap(), &["run", &world.text("drive.toml")]);
    let text = String::from_utf8_lossy(&ended.stderr);
    assert!(!ended.status.success() && text.contains("no/such/directory"), "{text}");
}

#[test]
fn a_drive_without_a_file_says_that_it_needs_a_place() {
    let world = World::new("[node.top]\ndriver = \"memory\"\nsize = \"32MiB\"\n", "");
    fs::write(world.path("drive.toml"), &world.toml).unwrap();
    let program = Daemon::program();
    let ended = output(program.to_str().unwrap(), &["run", &world.text("drive.toml")]);
    let text = String::from_utf8_lossy(&ended.stderr);
    assert!(
        !ended.status.success() && text.contains("bitmap-store = \"file:PATH\" in [drive.vda]"),
        "{text}"
    );
    let checked = run(program.to_str().unwrap(), &["check", &world.text("drive.toml")]);
    assert!(checked.contains("bitmap      vda/daily, 64KiB, persistent (process)"), "{checked}");
}

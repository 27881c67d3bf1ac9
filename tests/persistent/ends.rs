//! What is found after each end of the program.

use super::*;

#[test]
fn a_bitmap_beside_a_raw_image_outlives_every_end_of_the_program() {
    if !have("persistent", &["nbdinfo"]) {
        return;
    }
    let world = World::raw();
    let daemon = world.start();
    let mut written = world.write(&[1, 2, 40]);
    assert_eq!(world.dirty("daily"), written);
    assert_eq!(bitmap(&mut daemon.qmp(), "daily")["persistent"], true);
    assert!(daemon.terminate().success());
    assert_eq!(names(world.store(), ".dlbitmaps"), ["vda.dlbitmaps"]);

    let daemon = world.start();
    assert_eq!(recovered(&mut daemon.qmp()), [("daily".to_owned(), "exact".to_owned())]);
    assert_eq!(world.dirty("daily"), written);
    written.extend(world.write(&[7]));
    daemon.kill();

    let daemon = world.start();
    daemon.wait_log(|lines| lines.iter().any(|line| line == "driveline: bitmap vda/daily: recovered, exact"));
    assert_eq!(world.dirty("daily"), written);
    // Whoever connects first hears of it without asking.
    let event = daemon.qmp().wait_event("X_DRIVELINE_BITMAP_RECOVERED", "daily");
    assert_eq!(event, json!({ "node": "vda", "name": "daily", "verdict": "exact" }));
    // A clear is as lasting as a mark.
    daemon.qmp().run("block-dirty-bitmap-clear", json!({ "node": "vda", "name": "daily" }));
    let written = world.write(&[9]);
    daemon.kill();
    let daemon = world.start();
    assert_eq!(world.dirty("daily"), written);
    assert!(daemon.terminate().success());
}

#[test]
fn a_bitmap_that_a_monitor_adds_renames_and_removes_is_found_as_it_was_left() {
    if !have("persistent", &["nbdinfo"]) {
        return;
    }
    for world in [World::raw(), World::qcow2()] {
        let daemon = world.start();
        let mut qmp = daemon.qmp();
        let add = |name: &str| json!({ "node": "vda", "name": name, "persistent": true });
        qmp.run("block-dirty-bitmap-add", add("one"));
        qmp.run("block-dirty-bitmap-add", add("two"));
        let mut power = add("three");
        power["x-driveline-durability"] = json!("power");
        power["disabled"] = json!(true);
        qmp.run("block-dirty-bitmap-add", power);
        world.write(&[3]);
        qmp.run("block-dirty-bitmap-remove", json!({ "node": "vda", "name": "one" }));
        qmp.run(
            "x-driveline-block-dirty-bitmap-rename",
            json!({ "node": "vda", "name": "two", "new-name": "zwei" }),
        );
        qmp.run("block-dirty-bitmap-enable", json!({ "node": "vda", "name": "three" }));
        world.write(&[4]);
        qmp.run("block-dirty-bitmap-disable", json!({ "node": "vda", "name": "three" }));
        daemon.kill();
        let daemon = world.start();
        let mut qmp = daemon.qmp();
        let count = |qmp: &mut Qmp, name: &str| bitmap(qmp, name)["count"].as_u64();
        assert_eq!(count(&mut qmp, "one"), None);
        assert_eq!(count(&mut qmp, "zwei"), Some(2 * GRANULARITY));
        assert_eq!(count(&mut qmp, "three"), Some(GRANULARITY));
        assert_eq!(bitmap(&mut qmp, "three")["recording"], false);
        assert!(daemon.terminate().success());
        let daemon = world.start();
        let mut qmp = daemon.qmp();
        assert_eq!(count(&mut qmp, "zwei"), Some(2 * GRANULARITY));
        assert_eq!(bitmap(&mut qmp, "three")["recording"], false);
        assert!(daemon.terminate().success());
    }
}

#[test]
fn a_transient_bitmap_ends_with_the_program_and_a_drive_without_persistent_ones_leaves_no_file() {
    let world = World::raw();
    let plain = world.toml.replace(", persistent = true", "");
    let daemon = Daemon::start(world.directory.path(), &plain);
    assert_eq!(bitmap(&mut daemon.qmp(), "daily")["persistent"], false);
    assert_eq!(names(world.store(), ".dlbitmaps"), [""; 0]);
    assert!(daemon.terminate().success());
    assert_eq!(names(world.store(), ".dlbitmaps"), [""; 0]);
}

/// Leftovers of interrupted runs kept backup tools from the next backup: "already exists", "busy".
#[test]
fn a_kill_in_the_middle_of_a_job_leaves_the_bitmap_at_home_and_nobodys() {
    if !have("persistent", &["nbdinfo"]) {
        return;
    }
    let world = layers();
    let daemon = world.start();
    let mut qmp = daemon.qmp();
    qmp.run("block-dirty-bitmap-add", json!({ "node": "vda", "name": "weekly", "persistent": true }));
    let mut written = world.write(&[1]);
    qmp.run("block-stream", json!({ "job-id": "s", "device": "vda", "speed": 65536 }));
    written.extend(world.write(&[2]));
    let nodes = qmp.run("query-named-block-nodes", json!({}));
    assert!(nodes.as_array().unwrap().iter().any(|node| node["drv"] == "bitmap-holder"), "it is parked");
    daemon.kill();
    let daemon = world.start();
    let mut qmp = daemon.qmp();
    let daily = bitmap(&mut qmp, "daily");
    assert_eq!((&daily["busy"], &daily["recording"]), (&json!(false), &json!(true)));
    assert_eq!(world.dirty("daily"), written);
    let weekly = json!({ "node": "vda", "name": "weekly" });
    qmp.run("block-dirty-bitmap-clear", weekly.clone());
    qmp.run("block-dirty-bitmap-remove", weekly);
    qmp.run("block-dirty-bitmap-add", json!({ "node": "vda", "name": "weekly", "persistent": true }));
    assert!(daemon.terminate().success());
}

#[test]
fn bitmaps_follow_a_resize_across_a_kill() {
    if !have("persistent", &["nbdinfo"]) {
        return;
    }
    for world in [World::raw(), World::qcow2()] {
        let daemon = world.start();
        let mut qmp = daemon.qmp();
        let written = world.write(&[1, 511]);
        qmp.run("block_resize", json!({ "device": "vda", "size": SIZE + 2 * GRANULARITY }));
        daemon.kill();
        let mut grown = written.clone();
        grown.extend([512, 513]);
        let daemon = world.start();
        assert_eq!(world.dirty("daily"), grown, "what has grown is new to the drive's reader");
        daemon.qmp().run("block_resize", json!({ "device": "vda", "size": SIZE / 2 }));
        daemon.kill();
        let daemon = world.start();
        assert_eq!(world.dirty("daily"), BTreeSet::from([1]));
        assert!(daemon.terminate().success());
    }
}

#[test]
fn a_raw_image_that_was_changed_from_outside_makes_its_bitmap_all_dirty() {
    if !have("persistent", &["nbdinfo"]) {
        return;
    }
    let world = World::raw();
    let daemon = world.start();
    world.write(&[1]);
    assert!(daemon.terminate().success());
    run("qemu-io", &["-f", "raw", "-c", "write 1M 64k", &world.text("disk.raw")]);
    let daemon = world.start();
    assert_eq!(world.dirty("daily"), all());
    let found = daemon.qmp().run("x-driveline-query-recovered-bitmaps", json!({}));
    assert_eq!(found[0]["verdict"], "all-dirty");
    assert!(found[0]["reason"].as_str().unwrap().contains("disk.raw"), "{found}");
    daemon.qmp().run("block-dirty-bitmap-clear", json!({ "node": "vda", "name": "daily" }));
    let written = world.write(&[2]);
    assert!(daemon.terminate().success());
    let daemon = world.start();
    assert_eq!(world.dirty("daily"), written, "and then it is exact again");
    drop(daemon);
}

/// A start that failed took away the mark that nobody else had written to the image: after the next one everything was dirty.
#[test]
fn a_start_that_fails_after_a_crash_costs_no_bitmap_its_exactness() {
    if !have("persistent", &["nbdinfo", "qemu-img"]) {
        return;
    }
    let world = World::qcow2();
    let daemon = world.start();
    let mut written = world.write(&[1, 2, 40]);
    daemon.kill();
    // It is opened last.
    let broken = format!("{}\n[node.zz]\ndriver = \"qcow2\"\nfile = \"nowhere.qcow2\"\n", world.toml);
    let file = world.path("broken.toml");
    std::fs::write(&file, broken).unwrap();
    for _ in 0..2 {
        let run = std::process::Command::new(Daemon::program()).arg("run").arg(&file).output().unwrap();
        let said = String::from_utf8_lossy(&run.stderr);
        assert!(!run.status.success() && said.contains("nowhere.qcow2"), "{said}");
    }
    let daemon = world.start();
    assert_eq!(recovered(&mut daemon.qmp()), [("daily".to_owned(), "exact".to_owned())]);
    assert_eq!(world.dirty("daily"), written);
    written.extend(world.write(&[7]));
    daemon.kill();
    let daemon = world.start();
    assert_eq!(world.dirty("daily"), written);
    assert!(daemon.terminate().success());
}

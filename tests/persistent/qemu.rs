//! Bitmaps in qcow2 images, with QEMU before, after and in between.

use super::*;

#[test]
fn qemu_and_driveline_take_turns_with_one_bitmap() {
    if !have("persistent", &["nbdinfo"]) {
        return;
    }
    let world = World::qcow2();
    let image = world.text("disk.qcow2");
    let daemon = world.start();
    let mut written = world.write(&[1, 2, 40]);
    // While it is in use, QEMU sees that it is.
    let info: Value =
        serde_json::from_str(&run("qemu-img", &["info", "-U", "--output=json", &image])).unwrap();
    let stored = &info["format-specific"]["data"]["bitmaps"];
    assert_eq!(
        (&stored[0]["name"], &stored[0]["flags"]),
        (&json!("daily"), &json!(["in-use", "auto"])),
        "{info}"
    );
    assert!(daemon.terminate().success());
    assert_eq!(names(world.store(), ".dlbitmaps"), [""; 0], "it is in the image now");

    let info: Value = serde_json::from_str(&run("qemu-img", &["info", "--output=json", &image])).unwrap();
    let stored = &info["format-specific"]["data"]["bitmaps"];
    assert_eq!(stored, &json!([{ "name": "daily", "granularity": 65536, "flags": ["auto"] }]));
    run("qemu-img", &["check", "-q", &image]);
    // QEMU records on.
    run("qemu-io", &["-c", "write 512k 512", &image]);
    written.insert(8);
    let daemon = world.start();
    assert_eq!(recovered(&mut daemon.qmp()), [("daily".to_owned(), "exact".to_owned())]);
    assert_eq!(world.dirty("daily"), written);
    written.extend(world.write(&[100]));
    daemon.kill();
    assert_eq!(names(world.store(), ".dlbitmaps"), ["disk.qcow2.dlbitmaps"]);
    run("qemu-img", &["check", "-q", &world.unlocked("disk.qcow2")]);

    let daemon = world.start();
    assert_eq!(recovered(&mut daemon.qmp()), [("daily".to_owned(), "exact".to_owned())]);
    assert_eq!(world.dirty("daily"), written);
    daemon.kill();
    // After a crash, somebody writes who cannot know.
    run("qemu-io", &["-c", "write 4M 512", &world.unlocked("disk.qcow2")]);
    let daemon = world.start();
    assert_eq!(recovered(&mut daemon.qmp()), [("daily".to_owned(), "all-dirty".to_owned())]);
    assert_eq!(world.dirty("daily"), all());
    assert!(daemon.terminate().success());
    run("qemu-img", &["check", "-q", &image]);
}

/// A backup tool's bitmaps of QEMU's that was killed: listed, and adopted or removed; never in the way.
#[test]
fn bitmaps_that_qemu_left_in_use_are_listed_and_adopted_or_removed() {
    if !have("persistent", &["nbdinfo"]) {
        return;
    }
    let world = World::qcow2();
    let image = world.text("disk.qcow2");
    for name in ["daily", "a", "b"] {
        run("qemu-img", &["bitmap", "--add", &image, name]);
    }
    // QEMU says that they are in use as soon as it can write, and is killed.
    let killed = output("qemu-io", &["-c", "write 0 512", "-c", "abort", &image]);
    assert!(!killed.status.success());
    let daemon = world.start();
    let mut qmp = daemon.qmp();
    let mut found = recovered(&mut qmp);
    found.sort();
    let expected = [("a", "lost"), ("b", "lost"), ("daily", "all-dirty")];
    assert_eq!(found, expected.map(|(name, verdict)| (name.to_owned(), verdict.to_owned())));
    assert_eq!(world.dirty("daily"), all(), "the configuration wants it, so it can be used");
    assert_eq!(bitmap(&mut qmp, "a")["inconsistent"], true);
    world.write(&[3]);
    qmp.run("x-driveline-block-dirty-bitmap-adopt", json!({ "node": "vda", "name": "a" }));
    qmp.run("block-dirty-bitmap-remove", json!({ "node": "vda", "name": "b" }));
    assert_eq!(bitmap(&mut qmp, "a")["count"], SIZE);
    assert!(daemon.terminate().success());
    let info: Value = serde_json::from_str(&run("qemu-img", &["info", "--output=json", &image])).unwrap();
    let stored = info["format-specific"]["data"]["bitmaps"].as_array().unwrap();
    let mut names: Vec<_> = stored.iter().map(|b| (b["name"].as_str().unwrap(), &b["flags"])).collect();
    names.sort_by_key(|(name, _)| *name);
    let auto = json!(["auto"]);
    assert_eq!(names, [("a", &auto), ("daily", &auto)]);
    run("qemu-img", &["check", "-q", &image]);
}

#[test]
fn images_that_are_opened_later_show_their_bitmaps_and_get_them_back() {
    let world = World::raw();
    let other = world.text("other.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", &other, "8M"]);
    run("qemu-img", &["bitmap", "--add", &other, "theirs"]);
    run("qemu-io", &["-c", "write 64k 64k", &other]);
    let daemon = world.start();
    let mut qmp = daemon.qmp();
    let node = json!({
        "driver": "qcow2", "node-name": "other", "file": { "driver": "file", "filename": other },
    });
    qmp.run("blockdev-add", node.clone());
    let shown = |qmp: &mut Qmp| {
        let nodes = qmp.run("query-named-block-nodes", json!({}));
        let node = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "other").cloned();
        node.unwrap()["dirty-bitmaps"][0].clone()
    };
    let theirs = shown(&mut qmp);
    assert_eq!((&theirs["name"], &theirs["count"]), (&json!("theirs"), &json!(65536)), "{theirs}");
    assert_eq!((&theirs["persistent"], &theirs["recording"]), (&json!(true), &json!(true)));
    qmp.run("block-dirty-bitmap-add", json!({ "node": "other", "name": "ours", "persistent": true }));
    qmp.run("blockdev-del", json!({ "node-name": "other" }));
    let info: Value = serde_json::from_str(&run("qemu-img", &["info", "--output=json", &other])).unwrap();
    let stored = info["format-specific"]["data"]["bitmaps"].as_array().unwrap();
    let flags: Vec<_> = stored.iter().map(|bitmap| bitmap["flags"].clone()).collect();
    assert_eq!(flags, [json!(["auto"]), json!(["auto"])], "{info}");
    assert_eq!(names(world.store(), "other.qcow2.dlbitmaps"), [""; 0]);
    // Read-only it shows them, and keeps nobody from anything.
    let mut read_only = node;
    read_only["read-only"] = json!(true);
    qmp.run("blockdev-add", read_only);
    assert_eq!(shown(&mut qmp)["count"], 65536);
    qmp.run("blockdev-del", json!({ "node-name": "other" }));
    assert!(daemon.terminate().success());
}

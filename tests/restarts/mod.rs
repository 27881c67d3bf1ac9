//! The program is killed in the middle of jobs, under a writer, and started again: the jobs go on by themselves where they were,
//! and what they make is what it would have been.

mod decisions;
mod moments;
mod starts;
mod world;

use self::world::{MIB, SIZE, SPEED, World};
use crate::harness::{have, run};
use serde_json::{Value, json};

const TOOLS: [&str; 4] = ["qemu-img", "qemu-io", "nbdinfo", "nbdcopy"];

/// A qcow2 image of the drive's size, and its node.
fn qcow2_target(world: &mut World, more: &[&str]) {
    let (path, size) = (world.path("copy.qcow2"), SIZE.to_string());
    let mut arguments = vec!["create", "-q", "-f", "qcow2"];
    arguments.extend(more);
    arguments.extend([&*path, &size]);
    run("qemu-img", &arguments);
    let file = json!({ "driver": "file", "filename": path });
    let mut node = json!({ "driver": "qcow2", "node-name": "copy", "file": file });
    if !more.is_empty() {
        node["backing"] = json!("mid");
    }
    world.qmp.run("blockdev-add", node);
}

fn raw_target(world: &mut World) {
    let path = world.path("copy.raw");
    std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
    let file = json!({ "driver": "file", "filename": path });
    world.qmp.run("blockdev-add", json!({ "driver": "raw", "node-name": "copy", "file": file }));
}

/// What the drive holds now, as a file.
fn keep(world: &World) -> String {
    let kept = world.path("kept.raw");
    run("nbdcopy", &["--", &world.uri(), &kept]);
    kept
}

/// Kills the program twice in the middle of a job under a writer; it goes on each time, with less to do. Returns with the guest
/// at work and the job in a hurry.
fn interrupt_twice(world: &mut World, command: &str, mut arguments: Value) {
    arguments["job-id"] = json!("work");
    arguments["speed"] = json!(SPEED);
    world.qmp.run(command, arguments);
    world.begin_to_write();
    assert_eq!(world.journals().len(), 1);
    world.kill_midway("work");
    let left = world.start_and_resume("work");
    let is_counted = left != u64::MAX;
    assert!(!is_counted || left < SIZE - 2 * MIB, "{left} bytes are left, as if nothing had been done");
    world.wait_progress("work", MIB);
    world.kill();
    let again = world.start_and_resume("work");
    assert!(!is_counted || again < SIZE - 2 * MIB, "{again} bytes are left after the second kill");
    world.hurry("work");
}

fn mirror(world: &mut World, arguments: Value, format: &str) {
    interrupt_twice(world, "blockdev-mirror", arguments);
    world.qmp.wait_event("BLOCK_JOB_READY", "work");
    world.stop_writing();
    world.assert_bitmap_is_exact();
    world.assert_data_is_the_guests();
    let kept = keep(world);
    world.qmp.run("block-job-cancel", json!({ "device": "work" }));
    world.wait_completed("work");
    world.qmp.run("blockdev-del", json!({ "node-name": "copy" }));
    world.end();
    let copy = world.path(&format!("copy.{format}"));
    run("qemu-img", &["compare", "-f", format, "-F", "raw", &copy, &kept]);
}

#[test]
fn a_mirror_goes_on_after_kills_and_ends_equal_to_its_drive() {
    if !have("restarts", &TOOLS) {
        return;
    }
    let mut world = World::raw(1);
    raw_target(&mut world);
    mirror(&mut world, json!({ "device": "vda", "target": "copy", "sync": "full" }), "raw");
}

/// Both images hold back their tables until a flush: what is not flushed in either must be copied again.
#[test]
fn a_write_blocking_mirror_of_a_top_image_goes_on_after_kills() {
    if !have("restarts", &TOOLS) {
        return;
    }
    let mut world = World::chain(2, 0);
    let backing = world.path("mid.qcow2");
    qcow2_target(&mut world, &["-b", &backing, "-F", "qcow2"]);
    let arguments =
        json!({ "device": "vda", "target": "copy", "sync": "top", "copy-mode": "write-blocking" });
    mirror(&mut world, arguments, "qcow2");
}

#[test]
fn a_drive_mirror_opens_its_target_again_and_takes_the_drives_place() {
    if !have("restarts", &TOOLS) {
        return;
    }
    let mut world = World::raw(3);
    let arguments =
        json!({ "device": "vda", "target": world.path("copy.qcow2"), "format": "qcow2", "sync": "full" });
    interrupt_twice(&mut world, "drive-mirror", arguments);
    world.qmp.wait_event("BLOCK_JOB_READY", "work");
    world.qmp.run("block-job-complete", json!({ "device": "work" }));
    world.wait_completed("work");
    world.stop_writing();
    world.assert_bitmap_is_exact();
    world.assert_data_is_the_guests();
    let kept = keep(&world);
    world.end();
    run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", &world.path("copy.qcow2"), &kept]);
}

#[test]
fn a_stream_goes_on_after_kills() {
    if !have("restarts", &TOOLS) {
        return;
    }
    let mut world = World::chain(4, 20);
    interrupt_twice(&mut world, "block-stream", json!({ "device": "vda", "base-node": "base" }));
    world.wait_completed("work");
    world.stop_writing();
    world.assert_bitmap_is_exact();
    world.assert_data_is_the_guests();
    world.end();
    let info: Value =
        serde_json::from_str(&run("qemu-img", &["info", "--output=json", &world.path("top.qcow2")])).unwrap();
    assert_eq!(info["full-backing-filename"], world.path("base.qcow2"));
}

#[test]
fn an_intermediate_commit_goes_on_after_kills() {
    if !have("restarts", &TOOLS) {
        return;
    }
    let mut world = World::chain(5, 20);
    let arguments = json!({ "device": "vda", "top-node": "mid", "base-node": "base" });
    interrupt_twice(&mut world, "block-commit", arguments);
    world.wait_completed("work");
    world.stop_writing();
    world.assert_bitmap_is_exact();
    world.assert_data_is_the_guests();
    world.end();
    run("qemu-img", &["check", "-q", &world.path("base.qcow2")]);
}

#[test]
fn an_active_commit_goes_on_after_kills_and_is_completed() {
    if !have("restarts", &TOOLS) {
        return;
    }
    let mut world = World::chain(6, 12);
    interrupt_twice(&mut world, "block-commit", json!({ "device": "vda", "base-node": "base" }));
    world.qmp.wait_event("BLOCK_JOB_READY", "work");
    world.qmp.run("block-job-complete", json!({ "device": "work" }));
    world.wait_completed("work");
    world.stop_writing();
    world.assert_bitmap_is_exact();
    world.assert_data_is_the_guests();
    let kept = keep(&world);
    world.end();
    run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", &world.path("base.qcow2"), &kept]);
}

fn backup(mut world: World, arguments: Value, format: &str) {
    let kept = keep(&world);
    interrupt_twice(&mut world, "blockdev-backup", arguments);
    world.wait_completed("work");
    world.stop_writing();
    world.assert_bitmap_is_exact();
    world.assert_data_is_the_guests();
    world.qmp.run("blockdev-del", json!({ "node-name": "copy" }));
    let copy = world.path(&format!("copy.{format}"));
    run("qemu-img", &["compare", "-f", format, "-F", "raw", &copy, &kept]);
    world.end();
}

fn backup_in_full(world: fn() -> World, make_target: impl FnOnce(&mut World), format: &str) {
    if !have("restarts", &TOOLS) {
        return;
    }
    let mut world = world();
    make_target(&mut world);
    backup(world, json!({ "device": "vda", "target": "copy", "sync": "full" }), format);
}

#[test]
fn a_backup_keeps_its_point_in_time_through_kills() {
    backup_in_full(|| World::raw(7), raw_target, "raw");
}

/// The old data of what the guest overwrites is in tables of the target that are held back until a flush.
#[test]
fn a_backup_into_a_qcow2_image_keeps_its_point_in_time_through_kills() {
    backup_in_full(|| World::chain(8, 12), |world| qcow2_target(world, &[]), "qcow2");
}

/// The bitmap is frozen when the program is killed, and afterwards says what was written since the backup began.
#[test]
fn an_incremental_backup_goes_on_after_kills_and_leaves_what_was_written_since_it_began() {
    if !have("restarts", &TOOLS) {
        return;
    }
    let mut world = World::chain(9, 12);
    qcow2_target(&mut world, &[]);
    let full = json!({ "device": "vda", "target": "copy", "sync": "full", "job-id": "full" });
    world.qmp.run("blockdev-backup", full);
    world.qmp.wait_event("BLOCK_JOB_COMPLETED", "full");
    // Every other granule changes, so that there is enough to copy.
    let mut guest = crate::harness::Guest::connect(&world.directory.path().join("vda.sock"), "vda");
    for at in (0..SIZE).step_by(2 * world::GRANULE as usize) {
        guest.write(at, &[0x11; 4096]).unwrap();
    }
    guest.flush().unwrap();
    drop(guest);
    world.forget_written();
    let arguments = json!({ "device": "vda", "target": "copy", "sync": "incremental", "bitmap": "daily" });
    backup(world, arguments, "qcow2");
}

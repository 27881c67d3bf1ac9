//! Jobs that cannot be taken up at the start: it fails, or their images come later.

use super::{TOOLS, raw_target, world::*};
use crate::harness::have;
use serde_json::json;

/// The sockets were bound last. Somebody else had one of them: the jobs that had gone on by then were cancelled, and what was written
/// down of them was removed.
#[test]
fn a_start_that_fails_leaves_interrupted_jobs_to_the_next_one() {
    if !have("restarts", &TOOLS) {
        return;
    }
    let mut world = World::raw(21);
    raw_target(&mut world);
    world.begin_to_write();
    let arguments =
        json!({ "device": "vda", "job-id": "work", "target": "copy", "sync": "full", "speed": SPEED });
    world.qmp.run("blockdev-mirror", arguments);
    world.kill_midway("work");
    let socket = world.path("vda.sock");
    std::fs::remove_file(&socket).unwrap();
    let somebody_else = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let output = world.try_start();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && errors.contains("cannot listen"), "{errors}");
    assert_eq!(world.journals(), ["disk.raw.work.dljob"]);
    drop(somebody_else);
    std::fs::remove_file(&socket).unwrap();
    let left = world.start_and_resume("work");
    assert!(left < SIZE, "it knows what it had copied: {left}");
    world.hurry("work");
    world.qmp.wait_event("BLOCK_JOB_READY", "work");
    world.stop_writing();
    world.qmp.run("block-job-cancel", json!({ "device": "work" }));
    world.wait_completed("work");
    world.end();
}

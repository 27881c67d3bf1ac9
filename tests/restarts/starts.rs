//! Jobs that cannot be taken up at the start: it fails, or their images come later.

use super::{TOOLS, keep, raw_target, world::*};
use crate::harness::{Daemon, Qmp, have, run};
use serde_json::{Value, json};
use std::{
    path::Path,
    process::{Child, Command, Stdio},
};

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

/// A server that took the connection and said nothing held the start for ever, signals or not.
#[test]
fn a_signal_ends_a_start_that_waits_for_the_target_of_a_job_and_the_job_is_kept() {
    if !have("restarts", &TOOLS) {
        return;
    }
    let mut world = World::raw(26);
    let there = tempfile::tempdir().unwrap();
    std::fs::File::create(there.path().join("copy.raw")).unwrap().set_len(SIZE).unwrap();
    let nodes = "[node.copy]\ndriver = \"raw\"\nfile = \"copy.raw\"\n[drive.out]\nroot = \"copy\"\n\
        [export.copy]\ntype = \"nbd\"\ndrive = \"out\"\nsocket = \"copy.sock\"\nwritable = true\n\
        [monitor]\nqmp = \"qmp.sock\"\n";
    let server = Daemon::start(there.path(), nodes);
    let socket = there.path().join("copy.sock");
    let address = json!({ "type": "unix", "path": socket });
    world.qmp.run(
        "blockdev-add",
        json!({ "driver": "nbd", "node-name": "copy", "server": address, "export": "copy" }),
    );
    world.begin_to_write();
    let arguments =
        json!({ "device": "vda", "job-id": "work", "target": "copy", "sync": "full", "speed": SPEED });
    world.qmp.run("blockdev-mirror", arguments);
    world.kill_midway("work");
    server.kill();
    std::fs::remove_file(&socket).unwrap();
    let silent = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let mut program = Command::new(Daemon::program());
    let mut program = program.arg("run").arg(world.path("drive.toml")).stderr(Stdio::null()).spawn().unwrap();
    let connection = silent.accept().unwrap();
    Command::new("kill").args(["-TERM", &program.id().to_string()]).status().unwrap();
    assert!(!program.wait().unwrap().success(), "it served nothing");
    assert_eq!(world.journals(), ["disk.raw.work.dljob"]);
    drop((connection, silent));
    std::fs::remove_file(&socket).unwrap();
    let _server = Daemon::start(there.path(), nodes);
    world.start_and_resume("work");
    world.hurry("work");
    world.qmp.wait_event("BLOCK_JOB_READY", "work");
    world.stop_writing();
    world.assert_bitmap_is_exact();
    world.qmp.run("block-job-cancel", json!({ "device": "work" }));
    world.wait_completed("work");
    world.end();
}

/// The jobs that had gone on by then were cancelled, and what was written down of them was removed.
#[test]
fn a_signal_that_ends_a_start_leaves_jobs_that_went_on_already_as_they_were() {
    if !have("restarts", &TOOLS) {
        return;
    }
    let mut world = World::raw(27);
    let there = tempfile::tempdir().unwrap();
    std::fs::File::create(there.path().join("copy.raw")).unwrap().set_len(SIZE).unwrap();
    let nodes = "[node.copy]\ndriver = \"raw\"\nfile = \"copy.raw\"\n[drive.out]\nroot = \"copy\"\n\
        [export.copy]\ntype = \"nbd\"\ndrive = \"out\"\nsocket = \"copy.sock\"\nwritable = true\n\
        [monitor]\nqmp = \"qmp.sock\"\n";
    let server = Daemon::start(there.path(), nodes);
    let socket = there.path().join("copy.sock");
    let address = json!({ "type": "unix", "path": socket });
    world.qmp.run(
        "blockdev-add",
        json!({ "driver": "nbd", "node-name": "copy", "server": address, "export": "copy" }),
    );
    let kept = keep(&world);
    let first = world.path("first.raw");
    let backup = json!({
        "device": "vda", "target": first, "sync": "full", "format": "raw", "job-id": "first", "speed": SPEED,
    });
    world.qmp.run("drive-backup", backup);
    let arguments =
        json!({ "device": "vda", "job-id": "work", "target": "copy", "sync": "full", "speed": SPEED });
    world.qmp.run("blockdev-backup", arguments);
    world.begin_to_write();
    world.kill_midway("first");
    server.kill();
    std::fs::remove_file(&socket).unwrap();
    let silent = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let mut program = Command::new(Daemon::program());
    let mut program = program.arg("run").arg(world.path("drive.toml")).stderr(Stdio::null()).spawn().unwrap();
    let connection = silent.accept().unwrap();
    Command::new("kill").args(["-TERM", &program.id().to_string()]).status().unwrap();
    assert_eq!(program.wait().unwrap().code(), Some(1), "it served nothing");
    let mut journals = world.journals();
    journals.sort();
    assert_eq!(journals, ["disk.raw.first.dljob", "disk.raw.work.dljob"]);
    drop((connection, silent));
    std::fs::remove_file(&socket).unwrap();
    let _server = Daemon::start(there.path(), nodes);
    let jobs = world.start();
    assert!(jobs.len() == 2 && jobs.iter().all(|job| job["outcome"] == "resumed"), "{jobs:?}");
    for id in ["first", "work"] {
        world.hurry(id);
        let done = world.qmp.wait_event("BLOCK_JOB_COMPLETED", id);
        assert_eq!(done["error"], Value::Null, "{done}");
    }
    world.end();
    run("cmp", &[&first, &kept]);
    run("cmp", &[there.path().join("copy.raw").to_str().unwrap(), &kept]);
}

struct StorageDaemon(Child);

impl StorageDaemon {
    fn start(directory: &Path) -> (Self, Qmp) {
        let socket = directory.join("storage.sock");
        let _ = std::fs::remove_file(&socket);
        let chardev = format!("socket,path={},server=on,wait=off,id=c", socket.display());
        let mut command = Command::new(Daemon::program());
        command.args(["storage-daemon", "--chardev", &chardev, "--monitor", "chardev=c"]);
        let child = command.stderr(Stdio::null()).spawn().unwrap();
        (Self(child), Qmp::connect(&socket))
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn add(qmp: &mut Qmp, directory: &Path, name: &str) {
    let file = json!({ "driver": "file", "filename": directory.join(format!("{name}.raw")) });
    qmp.run("blockdev-add", json!({ "driver": "raw", "node-name": name, "file": file }));
}

/// A monitor adds the images after the start. Nobody looked for jobs then: they could neither go on nor be dropped, and a later program
/// let them go on as if nobody had written since.
#[test]
fn jobs_whose_images_come_after_the_start_wait_for_a_decision() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    std::fs::write(path.join("source.raw"), vec![0x11; 8 << 20]).unwrap();
    std::fs::write(path.join("target.raw"), vec![0; 8 << 20]).unwrap();
    let mirror = json!({
        "device": "source", "job-id": "j", "target": "target", "sync": "full", "speed": 1 << 20,
    });
    {
        let (_program, mut qmp) = StorageDaemon::start(path);
        add(&mut qmp, path, "source");
        add(&mut qmp, path, "target");
        qmp.run("blockdev-mirror", mirror.clone());
    }
    let journal = path.join("source.raw.j.dljob");
    assert!(journal.exists());
    let interrupted = |qmp: &mut Qmp| qmp.run("x-driveline-query-interrupted-jobs", json!({}));
    {
        let (_program, mut qmp) = StorageDaemon::start(path);
        assert_eq!(interrupted(&mut qmp), json!([]));
        add(&mut qmp, path, "source");
        let found = interrupted(&mut qmp);
        assert_eq!((&found[0]["id"], &found[0]["outcome"]), (&json!("j"), &json!("failed")), "{found}");
        let told = qmp.wait_event("X_DRIVELINE_JOB_INTERRUPTED", "j");
        assert_eq!(told, found[0]);
        // Once is enough.
        add(&mut qmp, path, "target");
        assert_eq!(interrupted(&mut qmp).as_array().unwrap().len(), 1);
        let refused = qmp.try_run("blockdev-mirror", mirror.clone()).unwrap_err();
        assert!(refused["desc"].as_str().unwrap().contains("resume or drop it first"), "{refused}");
        // What guests write here is written down by nobody.
        std::fs::write(path.join("note"), "").unwrap();
    }
    {
        let (_program, mut qmp) = StorageDaemon::start(path);
        add(&mut qmp, path, "source");
        add(&mut qmp, path, "target");
        qmp.run("x-driveline-interrupted-job-resume", json!({ "id": "j" }));
        qmp.run("block-job-set-speed", json!({ "device": "j", "speed": 0 }));
        qmp.wait_event("BLOCK_JOB_READY", "j");
        let jobs: Value = qmp.run("query-jobs", json!({}));
        assert!(
            jobs[0]["current-progress"].as_u64().unwrap() >= 8 << 20,
            "all of it is copied again: {jobs}"
        );
    }
    {
        let (_program, mut qmp) = StorageDaemon::start(path);
        add(&mut qmp, path, "source");
        add(&mut qmp, path, "target");
        qmp.run("x-driveline-interrupted-job-drop", json!({ "id": "j" }));
        assert!(!journal.exists());
        qmp.run("blockdev-mirror", mirror);
    }
}

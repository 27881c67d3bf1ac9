//! What becomes of jobs that do not go on by themselves: by their user's wish, or because they cannot.

use super::{TOOLS, keep, qcow2_target, raw_target, world::*};
use crate::harness::{Daemon, Guest, StorageDaemon, have, output, run};
use serde_json::{Value, json};

fn begin(world: &mut World, command: &str, mut arguments: Value) {
    arguments["job-id"] = json!("work");
    arguments["speed"] = json!(SPEED);
    world.begin_to_write();
    world.qmp.run(command, arguments);
}

#[test]
fn a_job_is_dropped_after_a_kill_if_its_user_said_so() {
    if !have("restarts", &TOOLS) {
        return;
    }
    let mut world = World::raw(11);
    raw_target(&mut world);
    let arguments = json!({
        "device": "vda", "target": "copy", "sync": "full", "x-driveline-on-restart": "drop",
    });
    begin(&mut world, "blockdev-mirror", arguments);
    world.kill_midway("work");
    let jobs = world.start();
    assert_eq!(jobs.len(), 1, "{jobs:?}");
    assert_eq!((&jobs[0]["outcome"], &jobs[0]["type"]), (&json!("dropped"), &json!("mirror")));
    assert!(world.job("work").is_none());
    assert_eq!(world.journals(), [""; 0]);
    world.assert_bitmap_is_exact();
    world.assert_data_is_the_guests();
    world.end();
    assert!(world.start().is_empty(), "it is told of once");
}

/// Without its target it waits; with it, it goes on, and nothing that the guest wrote meanwhile is lost.
#[test]
fn a_mirror_whose_target_is_missing_waits_for_it_and_its_drive_is_served() {
    if !have("restarts", &TOOLS) {
        return;
    }
    let mut world = World::raw(12);
    raw_target(&mut world);
    begin(&mut world, "blockdev-mirror", json!({ "device": "vda", "target": "copy", "sync": "full" }));
    world.kill_midway("work");
    let (copy, away) = (world.path("copy.raw"), world.path("away"));
    std::fs::rename(&copy, &away).unwrap();
    let jobs = world.start();
    assert_eq!(jobs[0]["outcome"], "failed");
    assert!(jobs[0]["reason"].as_str().unwrap().contains("copy.raw"), "{jobs:?}");
    let journals = world.journals();
    assert_eq!(journals.len(), 1, "what is known of it is kept");
    let still = world.qmp.try_run("x-driveline-interrupted-job-resume", json!({ "id": "work" })).unwrap_err();
    assert!(still["desc"].as_str().unwrap().contains("copy.raw"), "{still}");
    raw_target(&mut world);
    let arguments = json!({ "device": "vda", "job-id": "work", "target": "copy", "sync": "full" });
    let taken = world.qmp.try_run("blockdev-mirror", arguments).unwrap_err();
    let expected = "a job 'work' was interrupted";
    assert!(taken["desc"].as_str().unwrap().starts_with(expected), "{taken}");
    world.qmp.run("blockdev-del", json!({ "node-name": "copy" }));
    std::fs::remove_file(&copy).unwrap();
    // Nobody marks for the job what is written here, whatever ends the program meanwhile.
    world.begin_to_write();
    world.wait_written(20);
    world.kill();
    assert_eq!(world.start()[0]["outcome"], "failed");
    world.begin_to_write();
    std::fs::rename(&away, &copy).unwrap();
    world.qmp.run("x-driveline-interrupted-job-resume", json!({ "id": "work" }));
    world.hurry("work");
    world.qmp.wait_event("BLOCK_JOB_READY", "work");
    world.stop_writing();
    world.assert_bitmap_is_exact();
    let kept = keep(&world);
    world.qmp.run("block-job-cancel", json!({ "device": "work" }));
    world.wait_completed("work");
    run("cmp", &[&copy, &kept]);
    world.end();
}

/// It was listed by its file's name, went on by its own, and nothing was said of it.
#[test]
fn a_person_is_told_of_a_job_that_gets_its_name_back_when_it_goes_on() {
    if !have("restarts", &TOOLS) {
        return;
    }
    let mut world = World::raw(27);
    raw_target(&mut world);
    begin(&mut world, "blockdev-mirror", json!({ "device": "vda", "target": "copy", "sync": "full" }));
    world.kill_midway("work");
    let (record, whole) = (world.path("disk.raw.work.dljob"), world.path("whole"));
    std::fs::rename(&record, &whole).unwrap();
    std::fs::write(&record, "damaged").unwrap();
    let jobs = world.start();
    assert_eq!(
        (&jobs[0]["id"], &jobs[0]["outcome"]),
        (&json!("disk.raw.work"), &json!("failed")),
        "{jobs:?}"
    );
    std::fs::rename(&whole, &record).unwrap();
    let socket = world.path("qmp.sock");
    let words = ["ctl", "--socket", &*socket, "job", "resume", "disk.raw.work"];
    let said = output(Daemon::program().to_str().unwrap(), &words);
    assert_eq!(String::from_utf8_lossy(&said.stdout), "work: resumed\n", "{said:?}");
    world.hurry("work");
    world.qmp.wait_event("BLOCK_JOB_READY", "work");
    world.qmp.run("block-job-cancel", json!({ "device": "work" }));
    world.wait_completed("work");
    world.end();
}

/// A lock on its record kept it from going on, the drive was served, and resumed it knew nothing of what guests had written until then.
#[test]
fn a_mirror_whose_record_was_locked_at_the_start_copies_what_guests_wrote_until_it_went_on() {
    if !have("restarts", &TOOLS) {
        return;
    }
    let mut world = World::raw(25);
    raw_target(&mut world);
    begin(&mut world, "blockdev-mirror", json!({ "device": "vda", "target": "copy", "sync": "full" }));
    world.kill_midway("work");
    let record = std::fs::File::open(world.path(&world.journals()[0])).unwrap();
    record.lock().unwrap();
    let jobs = world.start();
    assert_eq!((&jobs[0]["id"], &jobs[0]["outcome"]), (&json!("work"), &json!("failed")), "{jobs:?}");
    world.begin_to_write();
    world.wait_written(40);
    // What it wrote later would be copied anyway, and with it what is near.
    world.stop_writing();
    drop(record);
    world.qmp.run("x-driveline-interrupted-job-resume", json!({ "id": "work" }));
    world.hurry("work");
    world.qmp.wait_event("BLOCK_JOB_READY", "work");
    world.assert_bitmap_is_exact();
    let kept = keep(&world);
    world.qmp.run("block-job-cancel", json!({ "device": "work" }));
    world.wait_completed("work");
    run("cmp", &[&world.path("copy.raw"), &kept]);
    world.end();
}

/// Only QMP could decide about such a job, with names that nobody guesses; and what became of it was printed twice.
#[test]
fn a_person_tries_again_or_gives_up_what_was_interrupted_and_is_told_of_it_once() {
    if !have("restarts", &TOOLS) {
        return;
    }
    let mut world = World::raw(16);
    raw_target(&mut world);
    begin(&mut world, "blockdev-mirror", json!({ "device": "vda", "target": "copy", "sync": "full" }));
    world.kill_midway("work");
    let (copy, away) = (world.path("copy.raw"), world.path("away"));
    std::fs::rename(&copy, &away).unwrap();
    assert_eq!(world.start()[0]["outcome"], "failed");
    let of_job = |line: &&String| line.contains("was interrupted");
    let log = world.daemon().wait_log(|lines| lines.iter().any(|line| line.contains("was interrupted")));
    assert_eq!(log.iter().filter(of_job).count(), 1, "{log:#?}");
    assert!(log.iter().any(|line| line.starts_with("driveline: job 'work' (mirror) was interrupted: ")));

    let ctl = |world: &World, words: &[&str]| {
        let socket = world.path("qmp.sock");
        let words = [&["ctl", "--socket", &socket], words].concat();
        output(Daemon::program().to_str().unwrap(), &words)
    };
    let says = |world: &World, words: &[&str]| {
        let output = ctl(world, words);
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let listed = says(&world, &["jobs"]);
    assert!(listed.contains("`driveline ctl job resume work` tries again"), "{listed}");
    let still = ctl(&world, &["job", "resume", "work"]);
    assert_eq!(still.status.code(), Some(1), "{still:?}");
    assert!(String::from_utf8_lossy(&still.stderr).contains("copy.raw"), "{still:?}");
    std::fs::rename(&away, &copy).unwrap();
    assert_eq!(says(&world, &["job", "resume", "work"]), "work: resumed\n");
    assert!(world.job("work").is_some());
    // Of one that lives it means what it always did.
    says(&world, &["job", "pause", "work"]);
    assert_eq!(says(&world, &["job", "resume", "work"]), "");

    world.kill();
    std::fs::rename(&copy, &away).unwrap();
    assert_eq!(world.start()[0]["outcome"], "failed");
    let dropped: Value = serde_json::from_str(&says(&world, &["--json", "job", "drop", "work"])).unwrap();
    assert_eq!((&dropped["id"], &dropped["outcome"]), (&json!("work"), &json!("dropped")));
    assert_eq!(world.journals(), [""; 0]);
    let known: Value = serde_json::from_str(&says(&world, &["--json", "interrupted"])).unwrap();
    assert_eq!(known[0]["outcome"], "dropped");
    assert_eq!(ctl(&world, &["job", "drop", "work"]).status.code(), Some(1), "it is decided");
    world.end();
}

#[test]
fn a_backup_whose_target_is_missing_is_dropped_because_its_drive_is_served_without_it() {
    if !have("restarts", &TOOLS) {
        return;
    }
    let mut world = World::chain(13, 12);
    qcow2_target(&mut world, &[]);
    begin(&mut world, "blockdev-backup", json!({ "device": "vda", "target": "copy", "sync": "full" }));
    world.kill_midway("work");
    std::fs::remove_file(world.path("copy.qcow2")).unwrap();
    let jobs = world.start();
    assert_eq!(jobs[0]["outcome"], "dropped", "{jobs:?}");
    let reason = jobs[0]["reason"].as_str().unwrap();
    assert!(reason.contains("copy.qcow2") && reason.contains("its point in time is lost"), "{reason}");
    let unknown = world.qmp.try_run("x-driveline-interrupted-job-drop", json!({ "id": "work" })).unwrap_err();
    assert_eq!(unknown["desc"], "no job 'work' was interrupted and waits for a decision");
    assert_eq!(world.journals(), [""; 0]);
    world.assert_bitmap_is_exact();
    world.assert_data_is_the_guests();
    world.end();
}

#[test]
fn a_record_that_cannot_be_read_is_kept_and_told_of() {
    if !have("restarts", &TOOLS) {
        return;
    }
    let mut world = World::raw(14);
    raw_target(&mut world);
    begin(&mut world, "blockdev-mirror", json!({ "device": "vda", "target": "copy", "sync": "full" }));
    world.kill_midway("work");
    let journal = world.path(&world.journals()[0]);
    std::fs::write(&journal, b"nothing that anybody wrote").unwrap();
    // Another program's jobs are nobody's business here.
    std::fs::write(world.path("other.qcow2.x.dljob"), b"").unwrap();
    let jobs = world.start();
    assert_eq!(jobs.len(), 1, "{jobs:?}");
    assert_eq!((&jobs[0]["id"], &jobs[0]["outcome"]), (&json!("disk.raw.work"), &json!("failed")));
    assert!(std::fs::read(&journal).unwrap().starts_with(b"nothing"));
    world.assert_bitmap_is_exact();
    world.qmp.run("x-driveline-interrupted-job-drop", json!({ "id": "disk.raw.work" }));
    assert_eq!(world.journals(), ["other.qcow2.x.dljob"]);
    world.end();
}

/// Nothing is known of what was written since, but the layers say what they hold.
#[test]
fn a_commit_whose_images_were_changed_meanwhile_looks_again_for_what_there_is_to_do() {
    if !have("restarts", &TOOLS) {
        return;
    }
    let mut world = World::chain(20, 12);
    begin(&mut world, "block-commit", json!({ "device": "vda", "base-node": "base" }));
    world.kill_midway("work");
    let late = std::time::SystemTime::now() + std::time::Duration::from_secs(60);
    let file = std::fs::OpenOptions::new().write(true).open(world.path("mid.qcow2")).unwrap();
    file.set_modified(late).unwrap();
    world.start_and_resume("work");
    // Once more, while it looks or works.
    world.kill();
    world.start_and_resume("work");
    world.hurry("work");
    world.qmp.wait_event("BLOCK_JOB_READY", "work");
    world.qmp.run("block-job-complete", json!({ "device": "work" }));
    world.wait_completed("work");
    world.stop_writing();
    world.assert_data_is_the_guests();
    let kept = keep(&world);
    world.end();
    run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", &world.path("base.qcow2"), &kept]);
}

#[test]
fn after_a_power_cut_a_mirror_copies_everything_again_and_a_backup_is_dropped() {
    if !have("restarts", &TOOLS) {
        return;
    }
    let mut world = World::raw(16);
    raw_target(&mut world);
    begin(&mut world, "blockdev-mirror", json!({ "device": "vda", "target": "copy", "sync": "full" }));
    let path = world.path("backup.raw");
    let backup = json!({
        "device": "vda", "target": path, "sync": "full", "format": "raw", "job-id": "backup", "speed": SPEED,
    });
    world.qmp.run("drive-backup", backup);
    world.kill_midway("work");
    let Some(jobs) = world.start_after_power_cut() else {
        eprintln!("SKIPPED restarts: no mount namespace can be made here");
        return;
    };
    let of = |id: &str| jobs.iter().find(|job| job["id"] == id).cloned().unwrap();
    let (mirror, backup) = (of("work"), of("backup"));
    assert_eq!(backup["outcome"], "dropped", "{backup}");
    assert_eq!(backup["reason"], "its point in time is lost: the machine went down");
    assert_eq!((&mirror["outcome"], &mirror["left"]), (&json!("resumed"), &json!(SIZE)), "{mirror}");
    world.begin_to_write();
    world.hurry("work");
    world.qmp.wait_event("BLOCK_JOB_READY", "work");
    world.stop_writing();
    let kept = keep(&world);
    world.qmp.run("block-job-cancel", json!({ "device": "work" }));
    world.wait_completed("work");
    run("cmp", &[&world.path("copy.raw"), &kept]);
    world.end();
}

/// Two backups of one transaction end together, before and after.
#[test]
fn jobs_that_end_together_go_on_together() {
    if !have("restarts", &TOOLS) {
        return;
    }
    let mut world = World::raw(17);
    let kept = keep(&world);
    let action = |id: &str| {
        let target = world.path(&format!("{id}.raw"));
        let data = json!({
            "device": "vda", "target": target, "sync": "full", "format": "raw", "job-id": id, "speed": SPEED,
        });
        json!({ "type": "drive-backup", "data": data })
    };
    let actions = json!([action("one"), action("two")]);
    let arguments = json!({ "actions": actions, "properties": { "completion-mode": "grouped" } });
    world.qmp.run("transaction", arguments);
    world.begin_to_write();
    world.kill_midway("one");
    let jobs = world.start();
    assert!(jobs.len() == 2 && jobs.iter().all(|job| job["outcome"] == "resumed"), "{jobs:?}");
    world.begin_to_write();
    world.hurry("one");
    // The other one is not done.
    let one = world.qmp.wait_event("JOB_STATUS_CHANGE", "one");
    assert_eq!(one["status"], "waiting");
    world.hurry("two");
    world.qmp.wait_event("BLOCK_JOB_COMPLETED", "one");
    world.qmp.wait_event("BLOCK_JOB_COMPLETED", "two");
    world.stop_writing();
    world.end();
    for id in ["one", "two"] {
        run("cmp", &[&world.path(&format!("{id}.raw")), &kept]);
    }
}

/// One of their records was locked by another program: the other backup was dropped, with its file.
#[test]
fn of_jobs_that_end_together_none_is_dropped_because_the_record_of_one_is_locked() {
    if !have("restarts", &TOOLS) {
        return;
    }
    let mut world = World::raw(28);
    let action = |id: &str| {
        let target = world.path(&format!("{id}.raw"));
        let data = json!({
            "device": "vda", "target": target, "sync": "full", "format": "raw", "job-id": id, "speed": SPEED,
        });
        json!({ "type": "drive-backup", "data": data })
    };
    let actions = json!([action("one"), action("two")]);
    let arguments = json!({ "actions": actions, "properties": { "completion-mode": "grouped" } });
    world.qmp.run("transaction", arguments);
    world.kill_midway("one");
    let record = std::fs::File::open(world.path("disk.raw.two.dljob")).unwrap();
    record.lock().unwrap();
    let jobs = world.start();
    assert!(jobs.len() == 2 && jobs.iter().all(|job| job["outcome"] == "failed"), "{jobs:?}");
    let one = jobs.iter().find(|job| job["id"] == "one").unwrap();
    assert_eq!(one["reason"], "it ends together with job 'two', which another program has");
    assert_eq!(world.journals().len(), 2, "their user decides");
    drop(record);
    for id in ["one", "two"] {
        world.qmp.run("x-driveline-interrupted-job-drop", json!({ "id": id }));
    }
    assert_eq!(world.journals(), [""; 0]);
    world.end();
}

#[test]
fn a_drive_says_what_becomes_of_its_jobs() {
    if !have("restarts", &TOOLS) {
        return;
    }
    let mut world = World::raw(18);
    world.end();
    world.set_drive("on-restart = \"drop\"");
    world.start();
    raw_target(&mut world);
    begin(&mut world, "blockdev-mirror", json!({ "device": "vda", "target": "copy", "sync": "full" }));
    let backup = json!({
        "device": "vda", "target": world.path("backup.raw"), "sync": "full", "format": "raw", "job-id": "backup",
        "speed": SPEED, "x-driveline-on-restart": "resume",
    });
    world.qmp.run("drive-backup", backup);
    world.kill_midway("work");
    let jobs = world.start();
    let of = |id: &str| jobs.iter().find(|job| job["id"] == id).cloned().unwrap()["outcome"].clone();
    assert_eq!((of("work"), of("backup")), (json!("dropped"), json!("resumed")), "{jobs:?}");
    world.end();
}

/// Its filter is on top, where the mirror's could not be put any more: they went on in the order of their names.
#[test]
fn a_backup_goes_on_after_a_mirror_whatever_their_names_are() {
    if !have("restarts", &TOOLS) {
        return;
    }
    let mut world = World::raw(19);
    raw_target(&mut world);
    begin(&mut world, "blockdev-mirror", json!({ "device": "vda", "target": "copy", "sync": "full" }));
    let backup = json!({
        "device": "vda", "target": world.path("backup.raw"), "sync": "full", "format": "raw", "job-id": "a-backup",
        "speed": SPEED,
    });
    world.qmp.run("drive-backup", backup);
    world.kill_midway("work");
    let jobs = world.start();
    assert!(jobs.len() == 2 && jobs.iter().all(|job| job["outcome"] == "resumed"), "{jobs:?}");
    world.end();
}

/// There are no drives there, and nodes come one after the other.
#[test]
fn a_job_of_the_storage_daemon_goes_on_with_the_same_command_line() {
    if !have("restarts", &TOOLS) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("disk.raw"), vec![0x11; SIZE as usize]).unwrap();
    let blockdev = format!("raw,node-name=top,file.driver=file,file.filename={}", path("disk.raw"));
    let server = format!("addr.type=unix,addr.path={}", path("nbd.sock"));
    let start = || {
        let arguments = ["--blockdev", &blockdev, "--nbd-server", &server];
        let arguments = [&arguments, &["--export", "nbd,id=top,node-name=top,writable=on"][..]].concat();
        let daemon = StorageDaemon::start(StorageDaemon::driveline(), directory.path(), &arguments);
        let qmp = daemon.qmp();
        (daemon, qmp)
    };
    let (daemon, mut qmp) = start();
    let arguments = json!({
        "device": "top", "target": path("copy.qcow2"), "sync": "full", "format": "qcow2", "job-id": "work",
        "speed": SPEED,
    });
    qmp.run("drive-backup", arguments);
    let mut guest = Guest::connect(&directory.path().join("nbd.sock"), "top");
    // Not all of it, or the job is over.
    for at in (0..SIZE / 2).step_by(GRANULE as usize) {
        guest.write(at, &[1; 4096]).unwrap();
    }
    daemon.kill();
    let (daemon, mut qmp) = start();
    let jobs = qmp.run("x-driveline-query-interrupted-jobs", json!({}));
    assert_eq!((&jobs[0]["id"], &jobs[0]["outcome"]), (&json!("work"), &json!("resumed")), "{jobs}");
    assert!(jobs[0]["left"].as_u64().unwrap() <= SIZE / 2, "what was overwritten was copied before");
    if let Ok(_running) = qmp.try_run("block-job-set-speed", json!({ "device": "work", "speed": 0 })) {
        qmp.wait_event("BLOCK_JOB_COMPLETED", "work");
    }
    qmp.run("quit", json!({}));
    assert!(daemon.wait().success());
    std::fs::write(path("was.raw"), vec![0x11; SIZE as usize]).unwrap();
    run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", &path("copy.qcow2"), &path("was.raw")]);
}

/// The end of a stream takes effect before it is noted: killed in between, the images say it. That of a commit of the top, or of a
/// mirror, is noted before: a record that says no word of it is of one whose target is not equal, whatever the drive was led to.
#[test]
fn that_a_job_had_ended_is_known_by_its_images_or_by_its_record() {
    if !have("restarts", &TOOLS) {
        return;
    }
    let base = "[node.base]\ndriver = \"qcow2\"\nfile = \"base.qcow2\"\n";
    let stream = format!("{base}[node.top]\ndriver = \"qcow2\"\nfile = \"top.qcow2\"\nbacking = \"base\"\n");
    let commit = "[node.top]\ndriver = \"qcow2\"\nfile = \"base.qcow2\"\n";
    let mirror = "[node.top]\ndriver = \"qcow2\"\nfile = \"copy.qcow2\"\n";
    let arguments = |world: &World| {
        [
            ("block-stream", json!({ "device": "vda", "base-node": "base" }), stream.as_str()),
            ("block-commit", json!({ "device": "vda", "base-node": "base" }), commit),
            (
                "drive-mirror",
                json!({ "device": "vda", "sync": "full", "target": world.path("copy.qcow2"), "format": "qcow2" }),
                mirror,
            ),
        ]
    };
    for at in 0..3 {
        let mut world = World::chain(19, 12);
        let (command, arguments, nodes) = arguments(&world)[at].clone();
        begin(&mut world, command, arguments);
        let journal = world.path(&world.journals()[0]);
        // As it was at work, and as if the end had never been noted.
        world.wait_progress("work", MIB);
        let before = std::fs::read(&journal).unwrap();
        world.hurry("work");
        if command != "block-stream" {
            world.qmp.wait_event("BLOCK_JOB_READY", "work");
            world.qmp.run("block-job-complete", json!({ "device": "work" }));
        }
        world.wait_completed("work");
        world.stop_writing();
        world.end();
        std::fs::write(&journal, before).unwrap();
        world.set_nodes(nodes);
        let jobs = world.start();
        assert_eq!(jobs.len(), 1, "{command}: {jobs:?}");
        let (outcome, reason) = match command {
            "block-stream" => ("finished", "has nothing between it and its base any more"),
            _ => ("dropped", "which was not copied to its end"),
        };
        assert_eq!(jobs[0]["outcome"], outcome, "{command}: {jobs:?}");
        assert!(jobs[0]["reason"].as_str().unwrap().ends_with(reason), "{command}: {jobs:?}");
        assert_eq!(world.journals(), [""; 0]);
        world.assert_data_is_the_guests();
        world.end();
    }
}

/// What somebody else has put into the target was copied over as soon as the program was started.
#[test]
fn a_mirror_asks_before_it_copies_over_a_target_that_somebody_else_has_changed() {
    if !have("restarts", &TOOLS) {
        return;
    }
    let mut world = World::raw(20);
    raw_target(&mut world);
    begin(&mut world, "blockdev-mirror", json!({ "device": "vda", "target": "copy", "sync": "full" }));
    world.kill_midway("work");
    let copy = world.path("copy.raw");
    std::fs::write(&copy, vec![0x77; SIZE as usize]).unwrap();
    // Long after the program was seen alive.
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(60);
    std::fs::File::options().write(true).open(&copy).unwrap().set_modified(later).unwrap();
    for _ in 0..2 {
        let jobs = world.start();
        assert_eq!(jobs[0]["outcome"], "failed", "{jobs:?}");
        let reason = jobs[0]["reason"].as_str().unwrap();
        assert!(reason.contains("copy.raw") && reason.contains("somebody else has changed"), "{reason}");
        assert!(std::fs::read(&copy).unwrap().iter().all(|byte| *byte == 0x77));
        world.begin_to_write();
        world.wait_written(20);
        world.kill();
    }
    world.start();
    world.begin_to_write();
    world.qmp.run("x-driveline-interrupted-job-resume", json!({ "id": "work" }));
    world.hurry("work");
    world.qmp.wait_event("BLOCK_JOB_READY", "work");
    world.stop_writing();
    let kept = keep(&world);
    world.qmp.run("block-job-cancel", json!({ "device": "work" }));
    world.wait_completed("work");
    run("cmp", &[&copy, &kept]);
    world.end();
}

/// A job that its user resumed had left its group: it ended without the others, which could not go on any more.
#[test]
fn jobs_that_end_together_are_resumed_together() {
    if !have("restarts", &TOOLS) {
        return;
    }
    let nodes = "[node.top]\ndriver = \"raw\"\nfile = \"disk.raw\"\n[node.more]\ndriver = \"raw\"\nfile = \"more.raw\"\n";
    let mut world = World::new(21, nodes, "top", |directory| {
        for name in ["disk.raw", "more.raw"] {
            std::fs::write(directory.join(name), vec![0x11; SIZE as usize]).unwrap();
        }
    });
    raw_target(&mut world);
    let (copy, away, other) = (world.path("copy.raw"), world.path("away"), world.path("other.raw"));
    std::fs::File::create(&other).unwrap().set_len(SIZE).unwrap();
    let file = json!({ "driver": "file", "filename": other });
    world.qmp.run("blockdev-add", json!({ "driver": "raw", "node-name": "other", "file": file }));
    let action = |id: &str, device: &str, target: &str| {
        let data =
            json!({ "device": device, "target": target, "sync": "full", "job-id": id, "speed": SPEED });
        json!({ "type": "blockdev-mirror", "data": data })
    };
    let actions = json!([action("one", "vda", "copy"), action("two", "more", "other")]);
    let arguments = json!({ "actions": actions, "properties": { "completion-mode": "grouped" } });
    world.qmp.run("transaction", arguments);
    world.kill_midway("one");
    std::fs::rename(&copy, &away).unwrap();
    let jobs = world.start();
    assert!(jobs.len() == 2 && jobs.iter().all(|job| job["outcome"] == "failed"), "{jobs:?}");
    std::fs::rename(&away, &copy).unwrap();
    world.qmp.run("x-driveline-interrupted-job-resume", json!({ "id": "two" }));
    let jobs = world.qmp.run("x-driveline-query-interrupted-jobs", json!({}));
    assert!(jobs.as_array().unwrap().iter().all(|job| job["outcome"] == "resumed"), "{jobs}");
    world.qmp.run("job-cancel", json!({ "id": "two" }));
    world.qmp.wait_event("BLOCK_JOB_CANCELLED", "two");
    world.qmp.wait_event("BLOCK_JOB_CANCELLED", "one");
    world.end();
}

/// A job went on as it was started, at full speed on a busy machine, though its user had slowed it down, or stopped it.
#[test]
fn what_its_user_changed_of_a_job_comes_back_with_it() {
    if !have("restarts", &TOOLS) {
        return;
    }
    let mut world = World::raw(13);
    raw_target(&mut world);
    begin(&mut world, "blockdev-mirror", json!({ "device": "vda", "target": "copy", "sync": "full" }));
    world.wait_progress("work", 2 * MIB);
    world.qmp.run("block-job-set-speed", json!({ "device": "work", "speed": 3 * MIB }));
    let mode = json!({ "id": "work", "type": "mirror", "copy-mode": "write-blocking" });
    world.qmp.run("block-job-change", mode);
    world.qmp.run("job-pause", json!({ "id": "work" }));
    for paused in [true, false] {
        world.kill();
        world.start_and_resume("work");
        let jobs = world.qmp.run("query-block-jobs", json!({}));
        assert_eq!((&jobs[0]["speed"], &jobs[0]["paused"]), (&json!(3 * MIB), &json!(paused)), "{jobs}");
        let record = std::fs::read(world.path(&world.journals()[0])).unwrap();
        assert!(String::from_utf8_lossy(&record).contains("write-blocking"));
        if paused {
            world.qmp.run("job-resume", json!({ "id": "work" }));
        }
    }
    world.hurry("work");
    world.qmp.wait_event("BLOCK_JOB_READY", "work");
    world.qmp.run("block-job-cancel", json!({ "device": "work" }));
    world.wait_completed("work");
    world.stop_writing();
    world.assert_bitmap_is_exact();
    world.end();
}

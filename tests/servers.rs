//! Jobs over a server of somebody else's that fails and dawdles: nbdkit with its filters.

use crate::harness::{Daemon, Guest, Qmp, have, run, serve};
use serde_json::{Value, json};
use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 8 * MIB;

const NODE: &str = "[node.disk]\ndriver = \"raw\"\nfile = \"disk.raw\"\n";
const BITMAPS: &str = "bitmaps = [{ name = \"daily\", granularity = \"64KiB\" }]";

/// nbdkit, until the test is over.
struct Kit(Child);

impl Kit {
    /// Stops it, as a machine does that hangs: it answers nothing, and its connections stay.
    fn stop(&self) {
        run("kill", &["-s", "STOP", &self.0.id().to_string()]);
    }
}

impl Drop for Kit {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A drive full of data, and a server with an empty disk of the same size as node `far`. What the server is told fails while there is
/// a file `trouble`.
struct World {
    qmp: Qmp,
    daemon: Daemon,
    kit: Kit,
    folder: TempDir,
}

impl World {
    fn new(filters: &[&str], settings: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("disk.raw"), vec![0; SIZE as usize]).unwrap();
        let socket = folder.path().join("kit.sock");
        let mut kit = Command::new("nbdkit");
        kit.args(["--foreground", "--exit-with-parent", "--unix"]).arg(&socket);
        kit.args(filters.iter().map(|filter| format!("--filter={filter}")));
        kit.arg("memory").arg(SIZE.to_string()).args(settings);
        kit.arg(format!("error-file={}", folder.path().join("trouble").display()));
        let kit = Kit(kit.stdin(Stdio::null()).spawn().unwrap());
        let deadline = Instant::now() + Duration::from_secs(30);
        while !socket.exists() {
            assert!(Instant::now() < deadline, "nbdkit starts");
            std::thread::sleep(Duration::from_millis(5));
        }
        let daemon = Daemon::start(folder.path(), &(NODE.to_owned() + &serve("disk", BITMAPS)));
        let mut guest = Guest::connect(&folder.path().join("nbd.sock"), "vda");
        for at in 0..SIZE / MIB {
            guest.write(at * MIB, &vec![at as u8 + 1; MIB as usize]).unwrap();
        }
        let mut qmp = daemon.qmp();
        let server = json!({ "type": "unix", "path": socket });
        qmp.run("blockdev-add", json!({ "driver": "nbd", "node-name": "far", "server": server }));
        Self { qmp, daemon, kit, folder }
    }

    fn trouble(&self) -> PathBuf {
        self.folder.path().join("trouble")
    }

    fn start(&mut self, command: &str, more: Value) {
        let mut arguments = json!({ "job-id": "j", "device": "vda", "target": "far", "sync": "full" });
        arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.qmp.run(command, arguments);
    }

    /// The job's end: its error.
    fn end(&mut self) -> Option<String> {
        let end = self.qmp.wait_event("BLOCK_JOB_COMPLETED", "j");
        while self.qmp.wait_event("JOB_STATUS_CHANGE", "j")["status"] != "null" {}
        end.get("error").and_then(|error| error.as_str()).map(str::to_owned)
    }

    fn status(&mut self) -> Value {
        self.qmp.run("query-block-jobs", json!({}))[0].clone()
    }

    /// The server has what the drive has.
    fn check_copy(&self) {
        let path = |name: &str| self.folder.path().join(name).to_str().unwrap().to_owned();
        let uri = |socket: &str, export: &str| format!("nbd+unix:///{export}?socket={}", path(socket));
        run("nbdcopy", &[&uri("kit.sock", ""), &path("copy.raw")]);
        run("nbdcopy", &[&uri("nbd.sock", "vda"), &path("drive.raw")]);
        let read = |name: &str| std::fs::read(Path::new(&path(name))).unwrap();
        assert!(read("copy.raw") == read("drive.raw"), "the copy is the drive");
    }
}

const TOOLS: &[&str] = &["nbdkit", "nbdcopy"];

#[test]
fn a_job_to_a_server_that_fails_stops_is_resumed_and_is_whole() {
    if !have("a_job_to_a_server_that_fails_stops_is_resumed_and_is_whole", TOOLS) {
        return;
    }
    for (error, policy, nospace) in [("EIO", "stop", false), ("ENOSPC", "enospc", true)] {
        let settings =
            [format!("error={error}"), "error-pwrite-rate=100%".into(), "error-zero-rate=100%".into()];
        let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
        let mut world = World::new(&["error"], &settings);
        std::fs::write(world.trouble(), []).unwrap();
        world.start("blockdev-backup", json!({ "on-target-error": policy }));
        let told = world.qmp.wait_event("BLOCK_JOB_ERROR", "j");
        assert_eq!((&told["action"], &told["operation"]), (&json!("stop"), &json!("write")), "{told}");
        while world.status()["status"] != "paused" {
            world.qmp.wait_event("JOB_STATUS_CHANGE", "j");
        }
        assert_eq!(world.status()["io-status"], if nospace { "nospace" } else { "failed" });
        std::fs::remove_file(world.trouble()).unwrap();
        world.qmp.run("job-resume", json!({ "id": "j" }));
        assert_eq!(world.end(), None);
        world.check_copy();
    }
}

#[test]
fn a_job_to_a_server_that_fails_ends_with_its_error_and_the_bitmap_keeps_all() {
    if !have("a_job_to_a_server_that_fails_ends_with_its_error_and_the_bitmap_keeps_all", TOOLS) {
        return;
    }
    for (error, policy, text) in [
        ("EIO", "report", "Input/output error"),
        ("EIO", "enospc", "Input/output error"),
        ("ENOSPC", "report", "No space left on device"),
    ] {
        let settings =
            [format!("error={error}"), "error-pwrite-rate=100%".into(), "error-zero-rate=100%".into()];
        let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
        let mut world = World::new(&["error"], &settings);
        std::fs::write(world.trouble(), []).unwrap();
        let more = json!({ "sync": "incremental", "bitmap": "daily", "on-target-error": policy });
        world.start("blockdev-backup", more);
        let told = world.qmp.wait_event("BLOCK_JOB_ERROR", "j");
        assert_eq!(told["action"], "report", "{told}");
        assert!(world.end().is_some_and(|error| error.contains(text)), "{error} {policy}");
        std::fs::remove_file(world.trouble()).unwrap();
        // All is still dirty: the same again is a whole copy.
        world.start("blockdev-backup", json!({ "sync": "incremental", "bitmap": "daily", "job-id": "j" }));
        assert_eq!(world.end(), None);
        world.check_copy();
    }
}

#[test]
fn errors_that_are_ignored_are_told_of_and_a_mirror_goes_on_when_they_end() {
    if !have("errors_that_are_ignored_are_told_of_and_a_mirror_goes_on_when_they_end", TOOLS) {
        return;
    }
    let mut world = World::new(&["delay", "error"], &["error=EIO", "error-pwrite-rate=100%", "wdelay=2ms"]);
    std::fs::write(world.trouble(), []).unwrap();
    world.start("blockdev-mirror", json!({ "on-target-error": "ignore" }));
    let told = world.qmp.wait_event("BLOCK_JOB_ERROR", "j");
    assert_eq!((&told["action"], &told["operation"]), (&json!("ignore"), &json!("write")), "{told}");
    std::fs::remove_file(world.trouble()).unwrap();
    world.qmp.wait_event("BLOCK_JOB_READY", "j");
    world.qmp.run("block-job-cancel", json!({ "device": "j" }));
    assert_eq!(world.end(), None);
    world.check_copy();
}

#[test]
fn a_server_that_tries_again_hides_its_errors_from_a_job() {
    if !have("a_server_that_tries_again_hides_its_errors_from_a_job", TOOLS) {
        return;
    }
    let settings =
        ["error=EIO", "error-pwrite-rate=10%", "retry-delay=1", "retry-exponential=no", "retries=50"];
    let mut world = World::new(&["retry", "error"], &settings);
    std::fs::write(world.trouble(), []).unwrap();
    world.start("blockdev-backup", json!({}));
    assert_eq!(world.end(), None);
    assert!(world.qmp.events().iter().all(|event| event["event"] != "BLOCK_JOB_ERROR"));
    std::fs::remove_file(world.trouble()).unwrap();
    world.check_copy();
}

/// `cbw-timeout` was over, and the guest hung as long as the server did. What waits for the copy can be ended, too.
#[test]
fn a_guest_is_answered_in_time_though_the_target_of_its_copies_hangs() {
    if !have("a_guest_is_answered_in_time_though_the_target_of_its_copies_hangs", TOOLS) {
        return;
    }
    let World { mut qmp, daemon, kit, folder } = World::new(&["error"], &[]);
    let cbw = json!({
        "driver": "copy-before-write", "node-name": "cbw", "target": "far",
        "cbw-timeout": 1, "on-cbw-error": "break-guest-write",
    });
    qmp.run("x-driveline-blockdev-insert-filter", json!({ "options": cbw, "above": "vda" }));
    let mut guest = Guest::connect(&folder.path().join("nbd.sock"), "vda");
    kit.stop();
    let begun = Instant::now();
    guest.write(0, &[1; 4096]).unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(30), "it waited for the server");
    guest.read(0, 4096).unwrap();
    // The filter cannot go before its copy has ended: who asks waits, and somebody else ends that.
    qmp.send("x-driveline-blockdev-remove-filter", json!({ "node-name": "cbw" }));
    let mut other = daemon.qmp();
    other.run("x-driveline-yank", json!({ "node-name": "far" }));
    qmp.answer().unwrap();
    guest.write(0, &[1; 4096]).unwrap();
    let refused = other.try_run("x-driveline-yank", json!({ "node-name": "disk" })).unwrap_err();
    assert!(refused["desc"].as_str().unwrap().contains("no connection that could be cut"), "{refused}");
    let unknown = other.try_run("x-driveline-yank", json!({ "node-name": "nobody" })).unwrap_err();
    assert_eq!(unknown["desc"], "Failed to find node with node-name='nobody'");
}

/// A cancel with force, and the end of the program, waited for ever for a target that never answers.
#[test]
fn a_job_whose_target_never_answers_is_ended_by_a_yank_and_by_the_end_of_the_program() {
    if !have("a_job_whose_target_never_answers_is_ended_by_a_yank_and_by_the_end_of_the_program", TOOLS) {
        return;
    }
    for by_yank in [true, false] {
        let mut world = World::new(&["error"], &[]);
        world.kit.stop();
        world.start("blockdev-backup", json!({}));
        while world.qmp.run("query-block-jobs", json!({}))[0]["offset"].is_null() {}
        if by_yank {
            world.qmp.run("block-job-cancel", json!({ "device": "j", "force": true }));
            assert_eq!(world.status()["device"], "j", "it waits for what was asked");
            world.qmp.run("x-driveline-yank", json!({ "node-name": "far" }));
            world.qmp.wait_event("BLOCK_JOB_CANCELLED", "j");
            assert!(world.daemon.terminate().success());
        } else {
            let status = world.daemon.terminate_within(Duration::from_secs(90));
            assert!(status.success(), "{status}");
        }
    }
}

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
    _daemon: Daemon,
    _kit: Kit,
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
        Self { qmp, _daemon: daemon, _kit: kit, folder }
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

//! `driveline ctl` against a running daemon, as a person at a terminal has it.

use crate::harness::{Daemon, Guest, have, run};
use serde_json::{Value, json};
use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::{UnixListener, UnixStream},
    process::{Command, Output},
};

const CONFIGURATION: &str = r#"
    [node.base]
    driver = "qcow2"
    file = "base.qcow2"
    read-only = true

    [node.active]
    driver = "qcow2"
    file = "active.qcow2"
    backing = "base"

    [drive.vda]
    root = "active"
    bitmaps = [{ name = "daily" }]

    [export.vda]
    type = "nbd"
    drive = "vda"
    socket = "vda.sock"
    writable = true

    [monitor]
    qmp = "qmp.sock"
"#;

struct World {
    daemon: Daemon,
    folder: tempfile::TempDir,
}

impl World {
    /// A drive of two layers, the lower one full of data.
    fn new() -> Option<Self> {
        if !have("ctl", &["qemu-img", "qemu-io"]) {
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let make = |program: &str, arguments: &[&str]| {
            let status = Command::new(program).args(arguments).current_dir(&folder).output().unwrap();
            assert!(status.status.success(), "{status:?}");
        };
        make("qemu-img", &["create", "-q", "-f", "qcow2", "base.qcow2", "8M"]);
        make("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 8M", "base.qcow2"]);
        make("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "active.qcow2"]);
        let daemon = Daemon::start(folder.path(), CONFIGURATION);
        Some(Self { daemon, folder })
    }

    fn ctl(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(Daemon::program());
        command.arg("ctl").args(arguments).current_dir(&self.folder).env_remove("DRIVELINE_SOCKET");
        command.output().unwrap()
    }

    fn says(&self, arguments: &[&str]) -> String {
        let output = self.ctl(arguments);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "ctl {arguments:?}: {errors}");
        assert_eq!(errors, "", "ctl {arguments:?} has nothing to complain of");
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.says(arguments)).unwrap()
    }
}

#[test]
fn a_person_sees_nodes_drives_bitmaps_and_exports() {
    let Some(world) = World::new() else { return };
    let drives = world.says(&["drives"]);
    assert_eq!(drives, "drive  root     size  access    bitmaps\nvda    active  8 MiB  writable  daily\n");
    let nodes = world.says(&["nodes"]);
    assert!(nodes.starts_with("node"), "{nodes}");
    assert!(nodes.lines().any(|line| line.starts_with("base") && line.contains("read-only")), "{nodes}");
    let bitmaps = world.says(&["bitmaps", "vda"]);
    assert!(bitmaps.ends_with("vda  daily        64 KiB    0 B  recording\n"), "{bitmaps}");
    assert_eq!(world.says(&["exports"]), "export  type  shows   state\nvda     nbd   active  serving\n");
    assert_eq!(world.says(&["jobs"]), "no jobs\n");
    assert_eq!(world.json(&["drives", "--json"])[0]["device"], "vda");
}

#[test]
fn bitmaps_and_filters_change_under_a_running_daemon() {
    let Some(world) = World::new() else { return };
    assert_eq!(world.says(&["bitmap", "add", "vda", "weekly", "--granularity", "1MiB"]), "");
    assert_eq!(world.says(&["bitmap", "rename", "vda", "weekly", "monthly"]), "");
    assert_eq!(world.says(&["bitmap", "merge", "vda", "daily", "--into", "monthly"]), "");
    let names: Vec<String> = world
        .json(&["bitmaps", "vda", "--json"])
        .as_array()
        .unwrap()
        .iter()
        .map(|bitmap| bitmap["name"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(names, ["daily", "monthly"]);
    assert_eq!(world.says(&["insert", "delay", "--above", "vda", "--name", "slow", "read=1ms"]), "slow\n");
    assert!(world.says(&["drives"]).contains("slow"));
    assert_eq!(world.says(&["remove", "slow"]), "");
    assert!(!world.says(&["drives"]).contains("slow"));
}

#[test]
fn a_job_is_waited_for_and_says_how_it_ended() {
    let Some(world) = World::new() else { return };
    let todo = "before the next start, in its file: write backing = false in [node.active]\n";
    assert_eq!(world.says(&["stream", "vda"]), format!("vda: done, 8 MiB\n{todo}"));
    assert_eq!(world.says(&["jobs"]), "no jobs\n");
    assert!(world.says(&["bitmaps", "vda"]).contains("0 B  recording"), "the drive has not changed");
    let failed = world.ctl(&["commit", "vda"]);
    assert_eq!(failed.status.code(), Some(1), "there is nothing below any more: {failed:?}");
    // One that is left running is found by its id, and can be steered.
    assert_eq!(world.says(&["export", "add", "active", "--name", "second"]), "");
    assert!(world.says(&["exports"]).contains("second"));
    assert_eq!(world.says(&["export", "remove", "second"]), "");
}

/// A job that goes by itself was gone when it was asked for: nothing was said, and the exit code was that of success.
#[test]
fn a_job_that_ends_badly_while_it_is_waited_for_says_so() {
    let ends = [
        (json!({ "event": "BLOCK_JOB_CANCELLED", "data": { "device": "j" } }), "job j was cancelled", 1),
        (
            json!({ "event": "BLOCK_JOB_COMPLETED", "data": { "device": "j", "error": "it is full" } }),
            "it is full",
            1,
        ),
        (json!({ "event": "BLOCK_JOB_COMPLETED", "data": { "device": "j" } }), "j: done", 0),
    ];
    for (end, expected, code) in ends {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("qmp.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let server = std::thread::spawn(move || ends_a_job(listener.accept().unwrap().0, &end));
        let mut command = Command::new(Daemon::program());
        let waited =
            command.args(["ctl", "job", "wait", "j"]).env("DRIVELINE_SOCKET", &socket).output().unwrap();
        server.join().unwrap();
        let said = [waited.stdout, waited.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert_eq!(waited.status.code(), Some(code), "{said}");
        assert!(said.contains(expected), "{said}");
    }
}

/// A daemon whose one job is there twice when it is asked for, and then ends.
fn ends_a_job(mut client: UnixStream, end: &Value) {
    let lines = BufReader::new(client.try_clone().unwrap()).lines();
    let mut say = |message: Value| writeln!(client, "{message}").unwrap();
    say(json!({ "QMP": {} }));
    let job = json!({ "id": "j", "status": "running", "current-progress": 1, "total-progress": 2 });
    let mut asked = 0;
    for line in lines.map_while(Result::ok) {
        let command: Value = serde_json::from_str(&line).unwrap();
        let mut answer = json!({});
        if command["execute"] == "query-jobs" {
            asked += 1;
            answer = if asked > 2 { json!([]) } else { json!([job]) };
        }
        if asked == 3 {
            say(end.clone());
        }
        say(json!({ "return": answer, "id": command["id"] }));
    }
}

#[test]
fn checkpoints_are_made_looked_at_and_compared() {
    let Some(world) = World::new() else { return };
    assert_eq!(world.says(&["checkpoint", "create", "monday", "vda"]), "");
    assert_eq!(
        world.says(&["checkpoint", "create", "tuesday", "vda", "--view", "--base", "monday"]),
        "vda: tuesday-vda\n"
    );
    let listed = world.says(&["checkpoint", "list"]);
    let lines: Vec<&str> = listed.lines().collect();
    assert_eq!(lines[1], "vda    monday                         0 B  closed");
    assert_eq!(lines[2], "vda    tuesday                        0 B  recording  tuesday-vda  serving");
    assert_eq!(world.says(&["checkpoints", "vda"]), listed);
    assert_eq!(world.says(&["checkpoint", "delta", "vda", "monday"]), "0 B changed\n");
    assert_eq!(world.json(&["--json", "checkpoint", "delta", "vda", "monday", "tuesday"])["count"], 0);
    assert_eq!(world.says(&["checkpoint", "release", "tuesday"]), "");
    assert_eq!(world.says(&["checkpoint", "delete", "monday"]), "");
    assert_eq!(world.json(&["--json", "checkpoint", "list"]).as_array().unwrap().len(), 1);
}

#[test]
fn a_drive_is_backed_up_to_a_file_that_the_daemon_makes() {
    let Some(world) = World::new() else { return };
    assert_eq!(world.says(&["backup", "vda", "copy.qcow2"]), "vda: done, 8 MiB\n");
    let path = |name: &str| world.folder.path().join(name).to_str().unwrap().to_owned();
    let compare = ["compare", "-U", &path("copy.qcow2"), &path("active.qcow2")];
    assert!(run("qemu-img", &compare).contains("identical"));
}

#[test]
fn what_is_wrong_is_told_by_the_exit_status() {
    let Some(world) = World::new() else { return };
    let refused = world.ctl(&["bitmap", "clear", "vda", "dayly"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("dayly"), "{refused:?}");
    let nobody = world.ctl(&["-s", "nobody.sock", "jobs"]);
    assert_eq!(nobody.status.code(), Some(3));
    let text = String::from_utf8_lossy(&nobody.stderr).into_owned();
    assert!(text.starts_with("driveline: cannot connect to nobody.sock: "), "{text}");
    assert_eq!(world.ctl(&["nothing"]).status.code(), Some(2));
    assert_eq!(world.json(&["--config", "drive.toml", "qmp", "query-version"])["qemu"]["major"], 10);
}

#[test]
fn watch_prints_a_line_for_each_event_until_the_daemon_ends() {
    let Some(world) = World::new() else { return };
    let mut command = Command::new(Daemon::program());
    command.args(["ctl", "watch"]).current_dir(&world.folder).stdout(std::process::Stdio::piped());
    let mut watch = command.spawn().unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(watch.stdout.take().unwrap()));
    // Whoever is connected hears of it; so it is repeated until somebody is.
    let (told, hear) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        let first = lines.next().unwrap().unwrap();
        told.send(first).unwrap();
        lines.map_while(Result::ok).last()
    });
    let first = loop {
        world.says(&["stream", "vda"]);
        match hear.recv_timeout(std::time::Duration::from_millis(10)) {
            Ok(line) => break line,
            Err(_) => continue,
        }
    };
    assert!(first.contains("JOB_STATUS_CHANGE"), "{first}");
    let World { daemon, folder } = world;
    assert!(daemon.terminate().success());
    let last = reader.join().unwrap().unwrap();
    assert!(last.contains("SHUTDOWN  guest=false reason=host-signal"), "{last}");
    assert!(watch.wait().unwrap().success());
    drop(folder);
}

#[test]
fn the_shell_completes_names_of_the_running_daemon() {
    let Some(world) = World::new() else { return };
    let complete = |words: &[&str]| {
        let mut command = Command::new(Daemon::program());
        command.env("COMPLETE", "bash").env("_CLAP_COMPLETE_INDEX", (words.len() - 1).to_string());
        command
            .env("_CLAP_COMPLETE_COMP_TYPE", "9")
            .env("_CLAP_COMPLETE_SPACE", "false")
            .env("_CLAP_IFS", "\n");
        command.arg("--").args(words).current_dir(&world.folder).env_remove("DRIVELINE_SOCKET");
        String::from_utf8(command.output().unwrap().stdout).unwrap()
    };
    assert_eq!(complete(&["driveline", "ctl", "bitmaps", "vd"]).trim(), "vda");
    assert_eq!(complete(&["driveline", "ctl", "bitmap", "clear", "vda", "d"]).trim(), "daily");
    let script = Command::new(Daemon::program()).args(["completions", "bash"]).output().unwrap();
    assert!(String::from_utf8_lossy(&script.stdout).contains("COMPLETE"));
}

/// It was removed by `apply`, but not by hand once the drive had got a bitmap meanwhile.
#[test]
fn a_filter_goes_although_its_drive_got_a_bitmap_meanwhile_which_goes_home() {
    let Some(world) = World::new() else { return };
    world.says(&["insert", "delay", "--above", "vda", "--name", "slow", "read=1ms"]);
    world.says(&["bitmap", "add", "vda", "weekly"]);
    let mut guest = Guest::connect(&world.folder.path().join("vda.sock"), "vda");
    guest.write(0, &[1; 4096]).unwrap();
    assert_eq!(world.says(&["remove", "slow"]), "");
    guest.write(1 << 20, &[1; 4096]).unwrap();
    let weekly = &world.json(&["bitmaps", "vda", "--json"])[1];
    assert_eq!((&weekly["name"], &weekly["count"]), (&json!("weekly"), &json!(131072)));
    assert_eq!(world.says(&["bitmaps"]).matches("weekly").count(), 1);
    // One that somebody has put onto the filter itself is not moved by the way.
    world.says(&["insert", "delay", "--above", "vda", "--name", "slow", "read=1ms"]);
    world.says(&["bitmap", "add", "slow", "own"]);
    let refused = world.ctl(&["remove", "slow"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("'own'"), "{refused:?}");
    world.says(&["bitmap", "remove", "slow", "own"]);
    world.says(&["remove", "slow"]);
}

/// A bitmap on its holder was listed at the drive, at its home and at the holder, and epochs of checkpoints by their raw names.
#[test]
fn bitmaps_are_listed_at_their_drive_once_while_a_job_has_them_on_a_holder() {
    let Some(world) = World::new() else { return };
    world.says(&["checkpoint", "create", "monday", "vda"]);
    world.says(&["stream", "vda", "--speed", "64KiB", "--detach"]);
    let nodes = world.says(&["nodes"]);
    assert!(nodes.contains("bitmap-holder"), "{nodes}");
    let listed = world.says(&["bitmaps"]);
    let of: Vec<&str> = listed.lines().skip(1).map(|line| line.split("   ").next().unwrap()).collect();
    assert_eq!(of.len(), 2, "{listed}");
    assert!(listed.contains("vda  daily") && listed.contains("vda  (checkpoint monday)"), "{listed}");
    let graph = world.says(&["graph"]);
    assert_eq!(graph.matches("bitmap daily").count(), 1, "{graph}");
    assert!(graph.lines().any(|line| line.contains("drive vda  bitmap daily")), "{graph}");
    world.says(&["job", "cancel", "vda", "--force"]);
}

#[test]
fn what_is_refused_says_what_to_do() {
    let Some(world) = World::new() else { return };
    let refused = |arguments: &[&str]| {
        let output = world.ctl(arguments);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let text = refused(&["insert", "dela", "--above", "vda"]);
    assert!(text.contains("does not accept value 'dela'; did you mean 'delay'?"), "{text}");
    world.says(&["stream", "vda", "--speed", "64KiB", "--detach"]);
    let text = refused(&["backup", "vda", "copy.qcow2"]);
    assert!(text.contains("`--job-id` gives this one another"), "{text}");
    world.says(&["job", "cancel", "vda", "--force"]);
    while world.says(&["jobs"]) != "no jobs\n" {}
    // A target that fills up: the job's own text is QEMU's, which names nothing.
    let target = world.folder.path().join("copy.raw");
    std::fs::File::create(&target).unwrap().set_len(8 << 20).unwrap();
    let path = target.to_str().unwrap();
    world.says(&[
        "qmp",
        "blockdev-add",
        &json!({ "driver": "raw", "node-name": "copy", "file": { "driver": "file", "filename": path } })
            .to_string(),
    ]);
    world.says(&[
        "insert",
        "blkdebug",
        "--above",
        "copy",
        "--name",
        "full",
        "rules=[{\"op\": \"write\", \"errno\": \"ENOSPC\"}]",
    ]);
    let text = refused(&["backup", "vda", "--to-node", "full"]);
    assert_eq!(text, "driveline: job vda: No space left on device (it copied to full)\n");
}

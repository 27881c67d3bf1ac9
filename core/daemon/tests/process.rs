//! The program as its users run it.

mod common;

use common::{driveline, examples, program, program_with_filters, text};
use driveline_drivers::qcow2::{CreateOptions, create_file};
use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    os::unix::net::UnixStream,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant, SystemTime},
};

const DISK: &str = r#"
[node.disk]
driver = "memory"
size = "16MiB"

[drive.vda]
root = "disk"
bitmaps = [{ name = "daily" }]

[export.vda]
type = "nbd"
drive = "vda"
socket = "vda.sock"
writable = true
bitmaps = ["daily"]

[export.other]
type = "nbd"
node = "disk"
listen = "127.0.0.1:0"

[monitor]
qmp = "qmp.sock"
"#;

struct Running {
    child: Child,
    lines: Vec<String>,
}

/// Runs a file, and waits until it serves.
fn run(program: &Path, file: &Path, exports: usize) -> Running {
    let mut child = Command::new(program).arg("run").arg(file).stdout(Stdio::piped()).spawn().unwrap();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    let lines: Vec<String> = stdout.lines().take(exports).map_while(Result::ok).collect();
    assert_eq!(lines.len(), exports, "it serves");
    Running { child, lines }
}

impl Running {
    fn signal(&self, signal: &str) {
        Command::new("kill").arg(signal).arg(self.child.id().to_string()).status().unwrap();
    }

    fn ended(&mut self) -> ExitStatus {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it ends in time");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn greeting(mut stream: impl Read) -> [u8; 8] {
    let mut magic = [0; 8];
    stream.read_exact(&mut magic).unwrap();
    magic
}

#[test]
fn a_file_is_served_until_sigterm_and_nothing_stays_behind() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("vm.toml");
    fs::write(&file, DISK).unwrap();
    for signal in ["-TERM", "-INT"] {
        let mut running = run(program(), &file, 2);
        let socket = directory.path().join("vda.sock");
        let uri = format!("vda: nbd+unix:///vda?socket={}", socket.display());
        assert!(running.lines.contains(&uri), "{:?}", running.lines);
        let tcp = running.lines.iter().find_map(|line| line.strip_prefix("other: nbd://")).unwrap();
        let address = tcp.strip_suffix("/other").unwrap();
        assert_eq!(&greeting(TcpStream::connect(address).unwrap()), b"NBDMAGIC");
        // A client that stays connected does not hold the end up.
        let mut client = UnixStream::connect(&socket).unwrap();
        assert_eq!(&greeting(&mut client), b"NBDMAGIC");
        running.signal(signal);
        assert_eq!(running.ended().code(), Some(0), "{signal}");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "the sockets are gone");
    }
}

#[test]
fn a_monitor_adds_an_export_and_ends_the_program() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("vm.toml");
    fs::write(&file, DISK).unwrap();
    let mut running = run(program(), &file, 2);
    let mut monitor = UnixStream::connect(directory.path().join("qmp.sock")).unwrap();
    let mut lines = BufReader::new(monitor.try_clone().unwrap()).lines().map(Result::unwrap);
    let mut ask = |command: &str| {
        monitor.write_all(command.as_bytes()).unwrap();
        lines.find(|line| line.contains("\"return\"") || line.contains("\"error\"")).unwrap()
    };
    ask(r#"{"execute":"qmp_capabilities"}"#);
    let new = directory.path().join("new.sock");
    let start = format!(
        r#"{{"execute":"nbd-server-start","arguments":{{"addr":{{"type":"unix","data":{{"path":"{}"}}}}}}}}"#,
        new.display()
    );
    assert!(ask(&start).contains("return"));
    let add =
        r#"{"execute":"block-export-add","arguments":{"type":"nbd","id":"e","node-name":"vda","name":"e"}}"#;
    assert!(ask(add).contains("return"));
    assert!(ask(add).contains("error"), "its id is taken");
    assert!(ask(r#"{"execute":"query-block-exports"}"#).contains(r#""id":"e""#));
    assert_eq!(&greeting(UnixStream::connect(&new).unwrap()), b"NBDMAGIC");
    assert!(ask(r#"{"execute":"block-export-del","arguments":{"id":"e"}}"#).contains("return"));
    assert!(ask(r#"{"execute":"nbd-server-stop"}"#).contains("return"));
    assert!(!new.exists());
    assert!(ask(r#"{"execute":"quit"}"#).contains("return"));
    assert_eq!(running.ended().code(), Some(0));
}

#[test]
fn what_fails_at_the_start_undoes_what_was_started() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("vm.toml");
    let blocked = DISK.replace("listen = \"127.0.0.1:0\"", "socket = \"zzz.sock\"");
    fs::write(&file, blocked).unwrap();
    fs::write(directory.path().join("zzz.sock"), "not a socket").unwrap();
    let output = driveline(&["run", file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(text(&output.stdout), "", "nothing is said to be served");
    let errors = text(&output.stderr);
    assert!(errors.contains("zzz.sock: Address already in use"), "{errors}");
    let mut left: Vec<_> = fs::read_dir(directory.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["vm.toml", "zzz.sock"]);
}

/// `timeout` signals a program, and then its group.
#[test]
fn the_same_signal_twice_at_once_is_one_wish() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("vm.toml");
    fs::write(&file, DISK).unwrap();
    for _ in 0..5 {
        let mut running = run(program(), &file, 2);
        running.signal("-TERM");
        running.signal("-TERM");
        assert_eq!(running.ended().code(), Some(0));
    }
}

/// A client that takes no answers holds the end up for a while; who does not want to wait says so again.
#[test]
fn a_second_signal_ends_it_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("vm.toml");
    fs::write(&file, DISK).unwrap();
    let mut running = run(program(), &file, 2);
    let mut client = UnixStream::connect(directory.path().join("vda.sock")).unwrap();
    let mut greeting = [0; 18];
    client.read_exact(&mut greeting).unwrap();
    // Fixed newstyle without zeroes; option EXPORT_NAME "vda"; then reads of 8 MiB that nobody fetches.
    let mut out = b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x03vda".to_vec();
    for cookie in 0..8_u64 {
        out.extend_from_slice(&[0x25, 0x60, 0x95, 0x13, 0, 0, 0, 0]);
        out.extend_from_slice(&cookie.to_be_bytes());
        out.extend_from_slice(&0_u64.to_be_bytes());
        out.extend_from_slice(&(8_u32 << 20).to_be_bytes());
    }
    client.write_all(&out).unwrap();
    let mut reply = [0; 26];
    client.read_exact(&mut reply).unwrap();
    // Two kinds, as two of one kind could be taken for one.
    running.signal("-TERM");
    running.signal("-INT");
    let start = Instant::now();
    assert_eq!(running.ended().code(), Some(1));
    assert!(start.elapsed() < Duration::from_millis(1500), "it does not wait for the client");
}

/// It waited without a word, as if it served something.
#[test]
fn who_serves_nothing_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("empty.toml");
    let says = |text: &str| {
        fs::write(&file, text).unwrap();
        let mut child = Command::new(program()).arg("run").arg(&file).stderr(Stdio::piped()).spawn().unwrap();
        let line = BufReader::new(child.stderr.take().unwrap()).lines().next().unwrap().unwrap();
        drop(Running { child, lines: Vec::new() });
        line
    };
    assert!(says("").contains("it has no [export.NAME], so nothing is served; it has no [monitor] either"));
    let monitor = says("[monitor]\nqmp = \"qmp.sock\"\n");
    assert!(monitor.contains("until somebody says so on the control socket"), "{monitor}");
}

#[test]
fn a_plugin_path_that_is_not_there_is_a_mistake() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("vm.toml");
    fs::write(&file, "[plugins]\npath = [\"filters\"]\n").unwrap();
    let output = driveline(&["check", file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    let errors = text(&output.stderr);
    assert!(errors.contains("vm.toml:2:9]") && errors.contains("no such directory"), "{errors}");
}

#[test]
fn filters_are_found_where_the_file_and_the_environment_say() {
    let filters = program_with_filters().parent().unwrap().to_owned();
    let directory = tempfile::tempdir().unwrap();
    // Alone in a folder, the program has no filters beside it.
    let alone = directory.path().join("driveline");
    // By another process: a file that this one has open for writing, and a child of another test for a moment too, cannot
    // be run ("text file busy").
    assert!(Command::new("cp").arg(program()).arg(&alone).status().unwrap().success());
    let file = directory.path().join("vm.toml");
    let text_of = |path: &str| {
        let node =
            "[node.a]\ndriver = \"memory\"\nsize = 4096\n[node.b]\ndriver = \"throttle\"\nchild = \"a\"\n";
        format!("[plugins]\npath = [{path}]\n{node}")
    };
    let check = |environment: &str| {
        let mut command = Command::new(&alone);
        command.arg("check").arg(&file).env("DRIVELINE_PLUGIN_PATH", environment);
        command.output().unwrap().status.success()
    };
    fs::write(&file, text_of("")).unwrap();
    assert!(!check(""));
    assert!(check(filters.to_str().unwrap()));
    fs::write(&file, text_of(&format!("{filters:?}"))).unwrap();
    assert!(check(""));
    let library = filters.join("libdriveline_filter_throttle.so");
    fs::write(&file, text_of(&format!("{library:?}"))).unwrap();
    assert!(check(""), "a library can be named, too");
}

#[test]
fn an_image_that_cannot_be_opened_has_its_place_in_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("vm.toml");
    fs::write(&file, "[node.image]\ndriver = \"qcow2\"\nfile = \"gone.qcow2\"\n").unwrap();
    for command in ["run", "check"] {
        let output = driveline(&[command, file.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(1), "{command}");
        let errors = text(&output.stderr);
        for part in ["'file.path' of node 'image'", "No such file", "vm.toml:3:8]", "file = \"gone.qcow2\""] {
            assert!(errors.contains(part), "{command} says {part}: {errors}");
        }
    }
}

/// The images of the example `vm-disk.toml`, and the file itself.
fn vm_disk(directory: &Path) -> std::path::PathBuf {
    let file = directory.join("vm-disk.toml");
    fs::copy(examples().join("vm-disk.toml"), &file).unwrap();
    let mut options = CreateOptions::new(1 << 30);
    create_file(&directory.join("base.qcow2"), &options).unwrap();
    options.backing = Some(("base.qcow2".into(), "qcow2".into()));
    create_file(&directory.join("active.qcow2"), &options).unwrap();
    file
}

fn state(directory: &Path) -> BTreeMap<String, (Vec<u8>, SystemTime)> {
    let entries = fs::read_dir(directory).unwrap().map(Result::unwrap);
    let files = entries.filter(|entry| entry.file_type().unwrap().is_file());
    let state = |entry: fs::DirEntry| {
        let (name, modified) =
            (entry.file_name().into_string().unwrap(), entry.metadata().unwrap().modified().unwrap());
        (name, (fs::read(entry.path()).unwrap(), modified))
    };
    files.map(state).collect()
}

/// What is copied before it is overwritten goes into a target. The rehearsal opens all of it read-only, and then said that the target
/// has to be written.
#[test]
fn check_takes_a_target_that_run_would_write() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("vm.toml");
    let text = r#"
        [node.old]
        driver = "memory"
        size = "1MiB"
        [node.disk]
        driver = "memory"
        size = "1MiB"
        [node.top]
        driver = "copy-before-write"
        file = "disk"
        target = "old"
        [export.top]
        type = "nbd"
        node = "top"
        socket = "top.sock"
        writable = true
    "#;
    fs::write(&file, text).unwrap();
    let output = Command::new(program_with_filters()).arg("check").arg(&file).output().unwrap();
    assert!(output.status.success(), "{}", text_of(&output));
    run(program_with_filters(), &file, 1).signal("-TERM");
}

fn text_of(output: &std::process::Output) -> String {
    [text(&output.stdout), text(&output.stderr)].concat()
}

/// Signals were looked at once all was open.
#[test]
fn a_start_that_waits_for_a_server_that_says_nothing_can_be_ended() {
    let directory = tempfile::tempdir().unwrap();
    let silent = std::os::unix::net::UnixListener::bind(directory.path().join("silent.sock")).unwrap();
    let file = directory.path().join("vm.toml");
    let text = r#"
        [node.far]
        driver = "nbd"
        server = { type = "unix", path = "silent.sock" }
    "#;
    fs::write(&file, text).unwrap();
    let mut command = Command::new(program_with_filters());
    command.arg("run").arg(&file).current_dir(&directory).stdout(Stdio::null()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let _client = silent.accept().unwrap();
    Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    assert!(text_of(&ended).contains("it was ended while it opened its images"), "{}", text_of(&ended));
}

#[test]
fn check_has_no_effect_and_can_be_asked_while_the_file_is_in_use() {
    let directory = tempfile::tempdir().unwrap();
    let file = vm_disk(directory.path());
    let before = state(directory.path());
    let check = |running: bool| {
        let output = Command::new(program_with_filters()).arg("check").arg(&file).output().unwrap();
        assert!(output.status.success(), "running: {running}: {}", text(&output.stderr));
        let said = text(&output.stdout);
        for part in
            ["no mistakes", "vda, 1GiB, root limit", "vda/daily, 64KiB", "vda.sock, writable", "qmp.sock"]
        {
            assert!(said.contains(part), "{part}: {said}");
        }
    };
    check(false);
    assert_eq!(state(directory.path()), before);
    assert!(!directory.path().join("vda.sock").exists());
    let mut running = run(program_with_filters(), &file, 1);
    check(true);
    running.signal("-TERM");
    assert_eq!(running.ended().code(), Some(0));
}

/// An NBD client that has chosen `vda`.
fn nbd(socket: &Path) -> UnixStream {
    let mut client = UnixStream::connect(socket).unwrap();
    client.read_exact(&mut [0; 18]).unwrap();
    client.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x03vda").unwrap();
    client.read_exact(&mut [0; 10]).unwrap();
    client
}

/// One request on offset 0: 0 reads, 1 writes.
fn request(client: &mut UnixStream, command: u8, data: &mut [u8]) {
    let mut out = vec![0x25, 0x60, 0x95, 0x13, 0, 0, 0, command];
    out.extend_from_slice(&[0; 16]);
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    if command == 1 {
        out.extend_from_slice(data);
    }
    client.write_all(&out).unwrap();
    let mut reply = [0; 16];
    client.read_exact(&mut reply).unwrap();
    assert_eq!(reply[4..8], [0; 4], "no error");
    if command == 0 {
        client.read_exact(data).unwrap();
    }
}

#[test]
fn a_signal_cancels_a_job_and_the_data_is_all_there() {
    let directory = tempfile::tempdir().unwrap();
    let file = vm_disk(directory.path());
    let socket = directory.path().join("vda.sock");
    let mut data: Vec<u8> = (0..4_u32 << 20).map(|i| (i * 7 / 3) as u8).collect();
    let mut running = run(program_with_filters(), &file, 1);
    let mut client = nbd(&socket);
    request(&mut client, 1, &mut data);
    let mut monitor = UnixStream::connect(directory.path().join("qmp.sock")).unwrap();
    let commit = r#"{"execute":"block-commit","arguments":{"device":"vda","job-id":"slow","speed":1}}"#;
    monitor.write_all(format!("{{\"execute\":\"qmp_capabilities\"}}{commit}").as_bytes()).unwrap();
    let mut lines = BufReader::new(monitor).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.contains("JOB_STATUS_CHANGE") && line.contains("running")));
    running.signal("-TERM");
    assert_eq!(running.ended().code(), Some(0));
    let rest: Vec<String> = lines.collect();
    assert!(rest.iter().any(|line| line.contains("BLOCK_JOB_CANCELLED")), "{rest:?}");
    assert!(rest.iter().any(|line| line.contains("SHUTDOWN")), "{rest:?}");
    let mut running = run(program_with_filters(), &file, 1);
    let mut found = vec![0; data.len()];
    request(&mut nbd(&socket), 0, &mut found);
    assert!(found == data, "what was written is there");
    running.signal("-TERM");
    assert_eq!(running.ended().code(), Some(0));
}

#[test]
fn every_example_graph_is_right() {
    let mut count = 0;
    for entry in fs::read_dir(examples()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        let output = Command::new(program_with_filters()).arg("graph").arg(&path).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        count += 1;
    }
    assert!(count >= 4, "{count} examples");
}

#[test]
fn the_demo_finds_the_drive_bitmap_exact() {
    let output = Command::new(program_with_filters()).arg("demo").output().unwrap();
    let (said, errors) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{said}{errors}");
    assert!(said.contains("drive bitmap and guest are equal"), "{said}");
    assert!(said.contains("exactly that"), "{said}");
}

#[test]
fn plugins_are_listed_inspected_and_checked() {
    let filters = program_with_filters().parent().unwrap().to_owned();
    let throttle = filters.join("libdriveline_filter_throttle.so");
    let listed = text(&driveline(&["plugin", "list"]).stdout);
    assert!(listed.contains("throttle") && listed.contains(throttle.to_str().unwrap()), "{listed}");
    let inspected = text(&driveline(&["plugin", "inspect", throttle.to_str().unwrap()]).stdout);
    assert!(inspected.contains("iops"), "{inspected}");
    let good = driveline(&["plugin", "check", throttle.to_str().unwrap()]);
    assert_eq!(good.status.code(), Some(0), "{}", text(&good.stderr));
    let directory = tempfile::tempdir().unwrap();
    let truncated = directory.path().join("libdriveline_filter_half.so");
    let whole = fs::read(&throttle).unwrap();
    fs::write(&truncated, &whole[..whole.len() / 3]).unwrap();
    let bad = driveline(&["plugin", "check", truncated.to_str().unwrap()]);
    assert_eq!(bad.status.code(), Some(1));
    assert!(text(&bad.stderr).contains("libdriveline_filter_half.so"), "{}", text(&bad.stderr));
    let list = driveline(&["plugin", "list", truncated.to_str().unwrap()]);
    assert_eq!(list.status.code(), Some(1), "what was asked for by path must be good");
}

#[test]
fn the_command_line_explains_itself() {
    let help = text(&driveline(&["--help"]).stdout);
    for part in ["run", "check", "graph", "demo", "plugin", "completions", "Examples:", "DRIVELINE_LOG"] {
        assert!(help.contains(part), "{part}: {help}");
    }
    assert!(text(&driveline(&["--version"]).stdout).starts_with("driveline "));
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = driveline(&["completions", shell]);
        assert!(output.status.success() && text(&output.stdout).contains("COMPLETE"), "{shell}");
    }
    assert_eq!(driveline(&["serve"]).status.code(), Some(2));
    assert_eq!(driveline(&["run"]).status.code(), Some(2));
    assert_eq!(driveline(&["--log", "driveline=loud", "demo"]).status.code(), Some(2));
    assert_eq!(driveline(&["run", "/nowhere.toml"]).status.code(), Some(1));
}

//! `driveline storage-daemon` as clients of qemu-storage-daemon use it, beside the real one where it is installed.

mod common;

use common::{program, text};
use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::{net::UnixStream, process::CommandExt},
    path::Path,
    process::{Command, Output, Stdio},
};

const QEMU: &str = "qemu-storage-daemon";

/// The program under QEMU's name.
fn ours() -> Command {
    let mut command = Command::new(program());
    command.arg0(QEMU).stdin(Stdio::null());
    command
}

/// Whether a tool is there; if not, that is said.
fn is_installed(tool: &str) -> bool {
    let there = Command::new(tool).arg("--version").output().is_ok();
    if !there {
        eprintln!("SKIPPED: {tool} is not installed");
    }
    there
}

fn outcome(output: &Output) -> (Option<i32>, String) {
    (output.status.code(), text(&output.stderr))
}

/// Command lines that fail.
#[rustfmt::skip]
const WRONG: &[&[&str]] = &[
    &["--bogus"], &["--blockdev"], &["--nbd"], &["foo"], &["--daemonize=3"], &["-x"],
    &["--blockdev", "driver=foo,node-name=a"], &["--blockdev", "foo,node-name=a"], &["--blockdev", "node-name=a"],
    &["--blockdev", "null-co"], &["--blockdev", "null-co,node-name=a,size=1G"], &["--blockdev", "null-co,node-name=a,read-only=maybe"],
    &["--blockdev", "null-co,node-name=a,bogus=1"], &["--blockdev", "null-co,node-name=a,size=5,bla"],
    &["--blockdev", "null-co,node-name=a,=4"], &["--blockdev", "null-co,node-name=a,x.y=4,x=3"], &["--blockdev", "null-co,a..b=4"],
    &["--blockdev", "null-co,node-name=1a"], &["--blockdev", "null-co,node-name=a", "--blockdev", "null-co,node-name=a"],
    &["--blockdev", r#"{"driver":"null-co","node-name":"a""#], &["--blockdev", r#"{"driver":"null-co","node-name":4}"#],
    &["--blockdev", r#"{"driver":"null-co","node-name":"a"} x"#], &["--blockdev", ""], &["--blockdev", "help"],
    &["--blockdev", "raw,node-name=a"], &["--blockdev", "raw,node-name=a,file=nope"],
    &["--blockdev", "raw,node-name=a,file.driver=null-co,file.bogus=1"],
    &["--chardev", "foo,id=a"], &["--chardev", "foo"], &["--chardev", "socket,path=/nope/x,id=a"],
    &["--chardev", "socket,path=/nope/x,id=a,server=on,wait=off"], &["--chardev", "socket,path=/nope/x,server=on,wait=off"],
    &["--chardev", "socket,path=/nope/x,id=a,server=maybe"], &["--chardev", "null,id=a,bogus=maybe"],
    &["--chardev", "socket,path=/nope/x,id=a,wait=off"], &["--chardev", "socket,path=/nope/x,id=a,server=on,reconnect=3"],
    &["--chardev", "socket,host=localhost,id=a,server=on"], &["--chardev", "socket,host=localhost,port=1,id=a"],
    &["--chardev", "stdio,id=a", "--chardev", "stdio,id=b"],
    &["--monitor", "foo"], &["--monitor", "chardev=foo"], &["--chardev", "null,id=a", "--monitor", "chardev=a,mode=readline"],
    &["--chardev", "null,id=a", "--monitor", "chardev=a,mode=foo"], &["--chardev", "null,id=a", "--monitor", "chardev=a,bogus=foo"],
    &["--chardev", "null,id=a", "--monitor", "a", "--monitor", "a"], &["--chardev", "null,id=a", "--monitor", "a,pretty=x"],
    &["--monitor", r#"{"id":"x"}"#],
    &["--nbd-server", "foo"], &["--nbd-server", "addr.type=unix"], &["--nbd-server", "addr.type=unix,addr.path=/nope/x"],
    &["--nbd-server", "addr.type=inet,addr.host=localhost"], &["--nbd-server", "addr.type=fd,addr.str=77"],
    &["--nbd-server", "addr.type=fd,addr.str=foo"], &["--nbd-server", "addr.type=unix,addr.path=n.sock,max-connections=foo"],
    &["--nbd-server", "addr.type=unix,addr.path=n.sock,tls-creds=x"], &["--nbd-server", "addr.type=unix,addr.path=n.sock,bogus=x"],
    &["--nbd-server", "addr.type=unix,addr.path=n.sock", "--nbd-server", "addr.type=unix,addr.path=n2.sock"],
    &["--export", "nbd,id=a,node-name=x"], &["--blockdev", "null-co,node-name=x", "--export", "nbd,id=a,node-name=x"],
    &["--blockdev", "null-co,node-name=x", "--export", "foo,id=a,node-name=x"],
    &["--blockdev", "null-co,node-name=x", "--export", "nbd,node-name=x"], &["--blockdev", "null-co,node-name=x", "--export", "nbd,id=1,node-name=x"],
    &["--blockdev", "null-co,node-name=x", "--export", "nbd,id=a"], &["--blockdev", "null-co,node-name=x", "--export", "nbd,id=a,node-name=x,bitmap=foo"],
    &["--blockdev", "null-co,node-name=x", "--export", "nbd,id=a,node-name=x,iothread=foo"],
    &["--object", "foo,id=a"], &["--object", "iothread"], &["--object", "iothread,id=a,bogus=1"], &["--object", "secret,id=a"],
    &["--object", "iothread,id=a", "--object", "iothread,id=a"], &["--object", "iothread,id=a,poll-max-ns=x"],
    &["--object", "throttle-group,id=a,limits.iops-read=4K"], &["--pidfile", "/nope/x"], &["--pidfile"], &["--trace", "bogus=3"],
];

#[test]
fn what_is_wrong_is_said_in_qemus_words_and_changes_nothing() {
    if !is_installed(QEMU) {
        return;
    }
    let (folder, of_qemu) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut differences = String::new();
    for arguments in WRONG {
        let run = |mut command: Command, folder: &Path| {
            outcome(&command.args(*arguments).current_dir(folder).stdin(Stdio::null()).output().unwrap())
        };
        let expected = run(Command::new(QEMU), of_qemu.path());
        let found = run(ours(), folder.path());
        if expected != found {
            differences += &format!("{arguments:?}\n  QEMU {expected:?}\n  ours {found:?}\n");
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "{arguments:?} leaves nothing behind");
    }
    assert!(differences.is_empty(), "{differences}");
}

#[test]
fn a_monitor_on_standard_input_answers_all_that_was_asked_before_the_end() {
    let mut child = ours()
        .args([
            "--blockdev",
            "null-co,node-name=n,size=0x100000",
            "--chardev",
            "stdio,id=m",
            "--monitor",
            "m",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    for command in ["qmp_capabilities", "query-named-block-nodes", "quit"] {
        writeln!(input, r#"{{"execute":"{command}"}}"#).unwrap();
    }
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let said = text(&output.stdout);
    assert!(said.starts_with(r#"{"QMP":"#), "{said}");
    assert!(said.contains(r#""node-name":"n""#), "{said}");
    let returns = said.lines().filter(|line| line.starts_with(r#"{"return""#)).count();
    assert_eq!(returns, 3, "{said}");
}

/// Says `quit`, and reads to the end.
fn quit(socket: &Path) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"quit\"}").unwrap();
    BufReader::new(stream).lines().map_while(Result::ok).collect::<Vec<_>>().join("\n")
}

#[test]
fn in_the_background_it_is_there_when_the_parent_ends_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let status = ours()
        .args(["--daemonize", "--pidfile", "pid", "--blockdev", "null-co,node-name=n"])
        .args([
            "--nbd-server",
            "addr.type=unix,addr.path=nbd.sock",
            "--export",
            "nbd,id=e,node-name=n,writable=on",
        ])
        .args(["--chardev", "socket,id=a,path=a.sock,server=on,wait=off", "--monitor", "a"])
        .args(["--chardev", "socket,id=b,path=b.sock,server=on,wait=off", "--monitor", "b,pretty=on"])
        .current_dir(folder.path())
        .status()
        .unwrap();
    assert!(status.success());
    let pid: u32 = fs::read_to_string(at("pid")).unwrap().trim().parse().unwrap();
    assert!(Path::new(&format!("/proc/{pid}")).exists());
    assert_eq!(fs::read_link(format!("/proc/{pid}/cwd")).unwrap(), Path::new("/"));
    UnixStream::connect(at("nbd.sock")).unwrap();
    let mut greeting = String::new();
    BufReader::new(UnixStream::connect(at("b.sock")).unwrap()).read_line(&mut greeting).unwrap();
    assert_eq!(greeting, "{\n", "a pretty monitor has line breaks");
    let said = quit(&at("a.sock"));
    assert!(said.contains(r#""return":{}"#), "{said}");
    // Its sockets and the file go before it does.
    while Path::new(&format!("/proc/{pid}/fd/0")).exists() {
        std::thread::yield_now();
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn what_fails_in_the_background_is_said_by_the_parent() {
    let output = ours().args(["--daemonize", "--blockdev", "foo,node-name=a"]).output().unwrap();
    let expected =
        "qemu-storage-daemon: --blockdev foo,node-name=a: Parameter 'driver' does not accept value 'foo'\n";
    assert_eq!(outcome(&output), (Some(1), expected.to_owned()));
}

#[test]
fn sockets_that_are_passed_are_served() {
    if !is_installed("nbdinfo") {
        return;
    }
    let nbdinfo = |arguments: &[&str]| {
        let mut command = Command::new("nbdinfo");
        let output =
            command.args(["--size", "--", "["]).arg(program()).args(arguments).arg("]").output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        // What the program itself prints comes first.
        text(&output.stdout).lines().next_back().unwrap_or_default().to_owned()
    };
    let node = ["storage-daemon", "--blockdev", "null-co,node-name=n,size=1048576"];
    let rest = ["--nbd-server", "addr.type=fd,addr.str=3", "--export", "nbd,id=e,node-name=n,name="];
    assert_eq!(nbdinfo(&[&node[..], &rest[..]].concat()), "1048576");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vm.toml");
    let graph = "[node.disk]\ndriver = \"memory\"\nsize = \"2MiB\"\n\
        [export.disk]\ntype = \"nbd\"\nnode = \"disk\"\nsocket = \"disk.sock\"\n";
    fs::write(&file, graph).unwrap();
    assert_eq!(nbdinfo(&["run", file.to_str().unwrap()]), "2097152");
}

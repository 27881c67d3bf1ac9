//! Locks of the file driver, between nodes and against QEMU's tools.

use driveline_drivers::{FileDriver, conformance::OpenNodeArgs};
use driveline_graph::{Graph, GraphOptions, Kind, OpenChild, Permissions, Result, RootOptions};
use futures::{FutureExt, executor::block_on};
use serde_json::{Value, json};
use std::{
    fs,
    io::{Read, Write},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tempfile::TempDir;

const READ: Permissions = Permissions::CONSISTENT_READ;
const WRITE: Permissions = Permissions::WRITE;
const ALL: Permissions = Permissions::ALL;

/// A folder with an image, for one test at a time: a program that another test starts would hold our locks from its
/// fork until it runs.
struct Folder {
    folder: TempDir,
    _turn: MutexGuard<'static, ()>,
}

impl Folder {
    fn path(&self) -> &Path {
        self.folder.path()
    }
}

fn image() -> Folder {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("a.img"), [0; 4096]).unwrap();
    Folder { folder, _turn }
}

fn open(folder: &Folder, options: Value, read_only: bool) -> Result<OpenChild> {
    let mut all = json!({ "path": "a.img" });
    all.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
    let args = OpenNodeArgs { directory: folder.path().to_owned(), read_only, ..OpenNodeArgs::default() };
    block_on(args.open(&FileDriver::default(), all, vec![]))
}

#[test]
fn a_second_writer_is_kept_out_and_told_why() {
    let folder = image();
    let first = open(&folder, json!({}), false).unwrap();
    block_on(first.node.set_permissions(READ.or(WRITE), READ)).unwrap();
    let error = open(&folder, json!({}), false).map(drop).unwrap_err();
    assert_eq!(error.kind(), Kind::Busy);
    let path = folder.path().join("a.img").display().to_string();
    for part in [&path, "failed to get \"write\" lock", "another node of this process does not share it"] {
        assert!(error.message().contains(part), "{error}");
    }
    let reader = open(&folder, json!({}), true).unwrap();
    let error = block_on(reader.node.set_permissions(READ, READ)).unwrap_err();
    assert!(error.message().contains("failed to get shared \"write\" lock"), "{error}");
    block_on(reader.node.set_permissions(READ, ALL)).unwrap();
    open(&folder, json!({ "locking": "off" }), false).unwrap();
    // The first is given back when it is closed, whoever still holds an edge to it.
    block_on(first.node.close(&[])).unwrap();
    open(&folder, json!({}), false).unwrap();
}

#[test]
fn a_refused_change_leaves_the_locks_as_they_were() {
    let folder = image();
    let one = open(&folder, json!({}), false).unwrap();
    block_on(one.node.set_permissions(READ, ALL)).unwrap();
    let other = open(&folder, json!({}), false).unwrap();
    block_on(other.node.set_permissions(READ, ALL)).unwrap();
    block_on(one.node.set_permissions(READ.or(WRITE), ALL)).unwrap();
    let before = other.node.details()["locks"].clone();
    assert_eq!(block_on(other.node.set_permissions(READ.or(WRITE), ALL)).unwrap_err().kind(), Kind::Busy);
    assert_eq!(other.node.details()["locks"], before);
    // What the refused change had locked for a moment is free again.
    block_on(one.node.set_permissions(READ, ALL)).unwrap();
    block_on(one.node.set_permissions(READ.or(WRITE), READ)).unwrap();
    block_on(one.node.set_permissions(Permissions::NONE, ALL)).unwrap();
    block_on(other.node.set_permissions(READ.or(WRITE), READ)).unwrap();
}

#[test]
fn another_access_mode_keeps_the_locks() {
    let folder = image();
    let node = open(&folder, json!({}), true).unwrap();
    block_on(node.node.set_permissions(READ, READ)).unwrap();
    for read_only in [false, true, false] {
        block_on(node.node.set_read_only(&[], read_only)).unwrap();
        let other = open(&folder, json!({}), false).map(drop).unwrap_err();
        assert!(other.message().contains("failed to get \"write\" lock"), "{other}");
    }
    drop(node);
    open(&folder, json!({}), false).unwrap();
}

#[test]
fn a_file_does_not_become_writable_beside_another_writer() {
    let folder = image();
    let reader = open(&folder, json!({}), true).unwrap();
    block_on(reader.node.set_permissions(READ, ALL)).unwrap();
    let before = reader.node.details()["locks"].clone();
    let writer = open(&folder, json!({}), false).unwrap();
    block_on(writer.node.set_permissions(READ.or(WRITE), READ)).unwrap();
    let refused = block_on(reader.node.set_read_only(&[], false)).unwrap_err();
    assert_eq!(refused.kind(), Kind::Busy, "{refused}");
    assert_eq!(reader.node.details()["locks"], before);
    block_on(writer.node.close(&[])).unwrap();
    block_on(reader.node.set_read_only(&[], false)).unwrap();
    // Even before anybody is said to write, nobody else gets to write.
    assert_eq!(open(&folder, json!({}), false).map(drop).unwrap_err().kind(), Kind::Busy);
    block_on(reader.node.set_read_only(&[], true)).unwrap();
    assert_eq!(reader.node.details()["locks"], before);
    let other = open(&folder, json!({}), false).unwrap();
    block_on(other.node.set_permissions(READ.or(WRITE), READ)).unwrap();
}

fn qemu(program: &str) -> Option<Command> {
    let there = Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success());
    if !there {
        eprintln!("SKIPPED: {program} is not installed");
        assert!(std::env::var_os("CI").is_none(), "in CI no test is skipped: {program} is not installed");
    }
    there.then(|| Command::new(program))
}

/// Runs a tool to its end; what it said, and whether it succeeded.
fn ended(mut command: Command) -> (bool, String) {
    let output = command.output().unwrap();
    (output.status.success(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

/// A qemu-io that has the image open while it lives.
struct QemuIo(Child);

impl QemuIo {
    fn open(arguments: &[&str], path: &Path) -> Option<Self> {
        let mut command = qemu("qemu-io")?;
        let mut child =
            command.args(arguments).arg(path).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        // The prompt comes when the image is open.
        let mut prompt = [0; 8];
        child.stdout.as_mut().unwrap().read_exact(&mut prompt).unwrap();
        assert_eq!(&prompt, b"qemu-io>");
        Some(Self(child))
    }

    fn quit(mut self) {
        self.0.stdin.take().unwrap().write_all(b"quit\n").unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn qemu_keeps_us_out() {
    let folder = image();
    let path = folder.path().join("a.img");
    let Some(mut create) = qemu("qemu-img") else { return };
    create.args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("1M");
    assert!(ended(create).0);
    let Some(writer) = QemuIo::open(&["-f", "qcow2"], &path) else { return };
    let error = open(&folder, json!({ "locking": "on" }), false).map(drop).unwrap_err();
    let who = format!("qemu-io (process {})", writer.0.id());
    for part in ["failed to get \"write\" lock", &who, "does not share it"] {
        assert!(error.message().contains(part), "{error}");
    }
    let reader = open(&folder, json!({}), true).unwrap();
    let error = block_on(reader.node.set_permissions(READ, READ)).unwrap_err();
    assert!(error.message().contains("shared \"write\" lock") && error.message().contains(&who), "{error}");
    writer.quit();
    block_on(reader.node.set_permissions(READ, READ)).unwrap();
    drop(reader);
    block_on(open(&folder, json!({}), false).unwrap().node.set_permissions(READ.or(WRITE), READ)).unwrap();
}

/// A node that nobody uses was reopened as writable. For that it takes the lock of a writer, and it kept it: no other program
/// could write to the file, although nothing here did.
#[test]
fn a_node_that_has_become_writable_lets_others_write_while_nobody_uses_it() {
    let folder = image();
    let graph = Graph::new(GraphOptions::default());
    graph.register(Arc::new(FileDriver::default())).unwrap();
    let node = json!({ "driver": "file", "node-name": "f", "path": "a.img", "read-only": true });
    block_on(async {
        let mut change = graph.change().await;
        change.set_directory(folder.path());
        let definition = graph.parse(node.as_object().unwrap().clone(), &[]).unwrap();
        change.add_node(definition).await.unwrap();
        change.commit().await.unwrap();
        let mut change = graph.change().await;
        change.set_read_only("f", false).unwrap();
        change.commit().await.unwrap();
    });
    let other = open(&folder, json!({}), false).expect("nobody writes here");
    block_on(other.node.set_permissions(READ.or(WRITE), READ)).unwrap();
    let guest = || block_on(graph.open_root("f", RootOptions::writer("a guest")));
    let busy = guest().unwrap_err();
    assert_eq!(busy.kind(), Kind::Busy, "{busy}");
    drop(other);
    guest().unwrap();
    block_on(graph.close()).unwrap();
}

#[test]
fn we_keep_qemu_out() {
    let folder = image();
    let path = folder.path().join("a.img");
    let node = open(&folder, json!({}), false).unwrap();
    let write = || {
        let mut command = qemu("qemu-io")?;
        command.args(["-f", "raw", "-c", "write 0 512"]).arg(&path);
        Some(ended(command))
    };
    for shares in [READ, ALL] {
        // What is shared within the graph is not shared with another program.
        block_on(node.node.set_permissions(READ.or(WRITE), shares)).unwrap();
        let Some((done, said)) = write() else { return };
        assert!(!done && said.contains("Failed to get \"write\" lock"), "{said}");
    }
    block_on(node.node.set_permissions(READ, ALL)).unwrap();
    assert!(write().unwrap().0);
    // To convert it, nobody may write.
    let convert = || {
        let mut command = qemu("qemu-img")?;
        command.args(["convert", "-f", "raw", "-O", "raw"]).arg(&path).arg(folder.path().join("b.img"));
        Some(ended(command))
    };
    block_on(node.node.set_permissions(READ, READ)).unwrap();
    assert!(convert().unwrap().0);
    block_on(node.node.set_permissions(READ.or(WRITE), WRITE.or(Permissions::RESIZE))).unwrap();
    let (done, said) = convert().unwrap();
    assert!(!done && said.contains("Failed to get \"consistent read\" lock"), "{said}");
}

#[test]
fn the_storage_daemon_and_we_keep_each_other_out() {
    let folder = image();
    let path = folder.path().join("a.img").display().to_string();
    let blockdev = format!("driver=file,node-name=f,filename={path}");
    let serve = || {
        let mut command = qemu("qemu-storage-daemon")?;
        let socket = folder.path().join("nbd.sock").display().to_string();
        command
            .args(["--blockdev", &blockdev])
            .args(["--nbd-server", &format!("addr.type=unix,addr.path={socket}")])
            .args(["--export", "type=nbd,id=e,node-name=f,writable=on"])
            .args(["--chardev", "stdio,id=m", "--monitor", "chardev=m"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Some(command.spawn().unwrap())
    };
    let node = open(&folder, json!({}), false).unwrap();
    block_on(node.node.set_permissions(READ.or(WRITE), READ)).unwrap();
    let Some(refused) = serve() else { return };
    let output = refused.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("Failed to get \"write\" lock"), "{said}");
    drop(node);
    let mut daemon = serve().unwrap();
    let mut greeting = [0; 8];
    daemon.stdout.as_mut().unwrap().read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"{\"QMP\": ");
    let error = open(&folder, json!({}), false).map(drop).unwrap_err();
    let who = format!("(process {}) holds \"write\"", daemon.id());
    assert!(error.message().contains("shared \"write\" lock") && error.message().contains(&who), "{error}");
    drop(daemon.stdin.take());
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}

/// A file that was closed is locked for as long as the kernel's ring has it, some milliseconds. Who opened it then waited for
/// that, and who became its writer was refused.
#[test]
fn a_lock_that_lingers_is_waited_for_by_new_users_too() {
    let folder = image();
    let node = open(&folder, json!({}), true).unwrap();
    let lingers = |then: &dyn Fn() -> Result<()>| {
        // A machine that is busy may give the other thread its turn too late; not every time.
        (0..10).any(|_| {
            block_on(node.node.set_permissions(READ, ALL)).unwrap();
            let other = open(&folder, json!({}), false).unwrap();
            block_on(other.node.set_permissions(READ.or(WRITE), READ)).unwrap();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    std::thread::sleep(std::time::Duration::from_millis(20));
                    block_on(other.node.close(&[])).unwrap();
                });
                then().is_ok()
            })
        })
    };
    assert!(lingers(&|| block_on(node.node.set_permissions(READ, READ))));
    assert!(lingers(&|| block_on(node.node.set_read_only(&[], false))));
}

/// The story: who waited for a lock slept on the thread that all requests of an export may be on.
#[test]
fn waiting_for_a_lock_leaves_the_thread_to_others() {
    let folder = image();
    let node = open(&folder, json!({}), true).unwrap();
    block_on(node.node.set_permissions(READ, ALL)).unwrap();
    let other = open(&folder, json!({}), false).unwrap();
    block_on(other.node.set_permissions(READ.or(WRITE), READ)).unwrap();
    let mut waits = node.node.set_permissions(READ, READ);
    assert!((&mut waits).now_or_never().is_none());
    block_on(other.node.close(&[])).unwrap();
    block_on(waits).unwrap();
}

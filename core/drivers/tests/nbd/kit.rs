//! Servers to test with, and a node that uses them.

use driveline_drivers::{
    NbdDriver,
    conformance::{OpenNodeArgs, open_node},
};
use driveline_engine::{Config, Engine};
use driveline_graph::{OpenChild, Result};
use driveline_op::{Answer, Ask, Buffer, Call, op};
use serde_json::{Value, json};
use std::{
    hash::{BuildHasher, Hasher, RandomState},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

pub(crate) fn engine() -> Engine {
    Engine::start(Config { threads: 2, ..Config::default() }).unwrap()
}

/// Is the program there? In CI nothing is skipped.
pub(crate) fn have(program: &str) -> bool {
    let there = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if there.is_err() {
        eprintln!("SKIPPED: {program} is not installed");
        assert!(std::env::var_os("CI").is_none(), "in CI no test is skipped: {program} is not installed");
    }
    there.is_ok()
}

/// A server in a process of its own, killed when it is dropped.
pub(crate) struct Server(Child);

impl Server {
    pub(crate) fn start(program: &str, arguments: &[&str]) -> Server {
        let child = Command::new(program).args(arguments).stdin(Stdio::null()).stderr(Stdio::null()).spawn();
        Server(child.unwrap())
    }

    /// nbdkit on a socket, in the foreground.
    pub(crate) fn nbdkit(socket: &Path, arguments: &[&str]) -> Server {
        let mut all = vec!["-f", "-U", text(socket)];
        all.extend(arguments);
        Server::start("nbdkit", &all)
    }

    /// qemu-nbd of a raw image.
    pub(crate) fn qemu_nbd(socket: &Path, arguments: &[&str]) -> Server {
        let mut all = vec!["--persistent", "-k", text(socket)];
        all.extend(arguments);
        Server::start("qemu-nbd", &all)
    }

    /// As a power cut would: no farewell. The socket's name goes, too, so that the next can have it.
    pub(crate) fn kill(mut self, socket: &Path) {
        self.end();
        let _ = std::fs::remove_file(socket);
    }

    /// Stops it for a while, or lets it go on.
    pub(crate) fn signal(&self, name: &str) {
        let number = self.0.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &number]).status().unwrap().success());
    }

    fn end(&mut self) {
        let _ = self.0.kill();
        self.0.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A folder with a name for a socket in it.
pub(crate) struct Folder(pub(crate) tempfile::TempDir);

impl Folder {
    pub(crate) fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path("s")
    }

    /// Options of a node at the socket. It waits for the server to be there.
    pub(crate) fn options(&self, more: Value) -> Value {
        let mut options = json!({ "server": { "type": "unix", "path": self.socket() }, "open-timeout": 30 });
        for (key, value) in more.as_object().unwrap() {
            options[key] = value.clone();
        }
        options
    }
}

pub(crate) async fn open(options: Value) -> Result<OpenChild> {
    open_with(&NbdDriver::default(), options).await
}

pub(crate) async fn open_with(driver: &NbdDriver, options: Value) -> Result<OpenChild> {
    open_node(driver, options, vec![]).await
}

pub(crate) async fn open_read_only(options: Value) -> Result<OpenChild> {
    OpenNodeArgs { read_only: true, ..OpenNodeArgs::default() }
        .open(&NbdDriver::default(), options, vec![])
        .await
}

/// One request.
pub(crate) async fn ask(node: &OpenChild, op: u32, offset: u64, length: u64, flags: u32) -> Answer {
    let buffer = if op == op::READ { Buffer::new(length as usize) } else { Buffer::default() };
    Call::new(node.edge.clone(), Ask { op, flags, offset, length, ..Ask::default() }, buffer).await
}

pub(crate) async fn write(node: &OpenChild, offset: u64, data: &[u8], flags: u32) -> Answer {
    let ask = Ask { op: op::WRITE, flags, offset, length: data.len() as u64, ..Ask::default() };
    Call::new(node.edge.clone(), ask, Buffer::from(data)).await
}

pub(crate) fn errno(answer: &Answer) -> i32 {
    answer.result.as_ref().err().map_or(0, driveline_op::Error::code)
}

/// Where random choices begin; printed, and repeated by `DRIVELINE_SEED`.
pub(crate) fn seed() -> u64 {
    let given = std::env::var("DRIVELINE_SEED").ok().and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(|| RandomState::new().build_hasher().finish());
    println!("DRIVELINE_SEED={seed}");
    seed
}

//! Other people's programs: the Python client of QEMU, and qemu-storage-daemon, which must say the same.

use crate::kit::{Client, World, has};
use serde_json::{Value, json};
use std::{
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// A monitor of qemu-storage-daemon with a node `disk`.
pub(crate) struct Qsd {
    child: Child,
    pub(crate) client: Client,
    _folder: tempfile::TempDir,
}

impl Qsd {
    pub(crate) fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (socket, ready) = (folder.path().join("qsd.sock"), folder.path().join("qsd.pid"));
        let chardev = format!("socket,id=c,server=on,wait=off,path={}", socket.display());
        let child = Command::new("qemu-storage-daemon")
            .args(["--blockdev", "null-co,node-name=disk,size=1048576", "--chardev", &chardev])
            .args(["--monitor", "chardev=c", "--pidfile", ready.to_str().unwrap()])
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        // It writes the file when all of it is there. Who comes between its socket and its monitor may never be answered.
        wait_for(&ready);
        let mut client = Client::connect(&socket);
        client.ok("qmp_capabilities", json!({}));
        Self { child, client, _folder: folder }
    }
}

impl Drop for Qsd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait_for(path: &Path) {
    let end = Instant::now() + Duration::from_secs(20);
    while !path.exists() {
        assert!(Instant::now() < end, "{} does not appear", path.display());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Input that is wrong in the same way for both.
const WRONG: &[&str] = &[
    r#"{"execute": "nope"}"#,
    r#"{"exec": "nope"}"#,
    r#"{"execute": 5}"#,
    r#"{}"#,
    r#"[1]"#,
    r#"}"#,
    r#"{"execute": "quit", "execute": "quit"}"#,
    r#"{"execute": "query-version", "arguments": []}"#,
    r#"{"execute": "query-version", "arguments": {"a": 1}}"#,
    r#"{"execute": "qmp_capabilities"}"#,
    r#"{"execute": "block-dirty-bitmap-add"}"#,
    r#"{"execute": "block-dirty-bitmap-add", "arguments": {"node": "disk"}}"#,
    r#"{"execute": "block-dirty-bitmap-add", "arguments": {"node": "disk", "name": 5}}"#,
    r#"{"execute": "block-dirty-bitmap-add", "arguments": {"node": "disk", "name": "b", "x": 1}}"#,
    r#"{"execute": "block-dirty-bitmap-add", "arguments": {"node": "disk", "name": "b", "granularity": "5"}}"#,
    r#"{"execute": "block-dirty-bitmap-add", "arguments": {"node": "disk", "name": "b", "granularity": -5}}"#,
    r#"{"execute": "block-dirty-bitmap-add", "arguments": {"node": "disk", "name": "b", "granularity": 5}}"#,
    r#"{"execute": "block-dirty-bitmap-add", "arguments": {"node": "disk", "name": ""}}"#,
    r#"{"execute": "block-dirty-bitmap-add", "arguments": {"node": "disk", "name": "there"}}"#,
    r#"{"execute": "block-dirty-bitmap-add", "arguments": {"node": "nope", "name": "b"}}"#,
    r#"{"execute": "block-dirty-bitmap-add", "arguments": {"node": "disk", "name": "b", "disabled": 1}}"#,
    r#"{"execute": "block-dirty-bitmap-remove", "arguments": {"node": "disk", "name": "nope"}}"#,
    r#"{"execute": "block-dirty-bitmap-merge", "arguments": {"node": "disk", "target": "there", "bitmaps": "b"}}"#,
    r#"{"execute": "block-dirty-bitmap-merge", "arguments": {"node": "disk", "target": "there", "bitmaps": [{"node": "disk"}]}}"#,
    r#"{"execute": "block-dirty-bitmap-merge", "arguments": {"node": "disk", "target": "there", "bitmaps": [{"node": "disk", "name": "b", "z": 1}]}}"#,
    r#"{"execute": "transaction", "arguments": {"actions": [{"type": "block-dirty-bitmap-clear", "data": {"node": "disk"}}]}}"#,
    r#"{"execute": "transaction", "arguments": {"actions": [{"type": "abort", "data": {}}]}}"#,
    r#"{"execute": "blockdev-add", "arguments": {"node-name": "n"}}"#,
    r#"{"execute": "blockdev-add", "arguments": {"driver": "null-co"}}"#,
    r#"{"execute": "blockdev-add", "arguments": {"driver": "zz", "node-name": "n"}}"#,
    r#"{"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "disk"}}"#,
    r#"{"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "n", "zzz": 1}}"#,
    r#"{"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "1n"}}"#,
    r#"{"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "r"}}"#,
    r#"{"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "r", "file": "nofile"}}"#,
    r#"{"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "r", "file": {"driver": "null-co", "zz": 1}}}"#,
    r#"{"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "r", "file": "disk", "cache": {"zz": 1}}}"#,
    r#"{"execute": "blockdev-del", "arguments": {"node-name": "nope"}}"#,
    r#"{"execute": "block_resize", "arguments": {"node-name": "disk"}}"#,
    r#"{"execute": "block_resize", "arguments": {"node-name": "nope", "size": 512}}"#,
    r#"{"execute": "block_resize", "arguments": {"node-name": "disk", "size": -5}}"#,
    r#"{"execute": "job-pause", "arguments": {"id": "j"}}"#,
    r#"{"execute": "block-job-pause", "arguments": {"device": "j"}}"#,
    r#"{"execute": "block-job-dismiss", "arguments": {"id": "j"}}"#,
    r#"{"execute": "block-stream", "arguments": {"device": "zz"}}"#,
    r#"{"execute": "block-stream", "arguments": {"device": "disk", "job-id": "1 2"}}"#,
    r#"{"execute": "block-stream", "arguments": {"device": "disk", "job-id": "j", "on-error": "zz"}}"#,
    r#"{"execute": "block-stream", "arguments": {"device": "disk", "job-id": "j", "base": "x", "base-node": "y"}}"#,
    r#"{"execute": "block-commit", "arguments": {"device": "zz", "job-id": "j"}}"#,
    r#"{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "e", "node-name": "disk"}}"#,
    r#"{"execute": "block-export-add", "arguments": {"type": "zz", "id": "e", "node-name": "disk"}}"#,
    r#"{"execute": "block-export-del", "arguments": {"id": "e"}}"#,
    r#"{"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "path": "x"}}}"#,
    r#"{"execute": "query-named-block-nodes", "arguments": {"flat": 1}}"#,
];

#[test]
fn wrong_input_gets_the_same_errors_as_from_qemu_storage_daemon() {
    if !has("qemu-storage-daemon", Command::new("qemu-storage-daemon").arg("--version")) {
        return;
    }
    let mut qsd = Qsd::start();
    let world = World::new();
    let mut ours = world.client();
    ours.ok("blockdev-add", json!({ "driver": "null-co", "node-name": "disk", "size": 1 << 20 }));
    for client in [&mut qsd.client, &mut ours] {
        client.ok("block-dirty-bitmap-add", json!({ "node": "disk", "name": "there" }));
    }
    let mut differences = Vec::new();
    for input in WRONG {
        // A new line, after which QEMU looks for a new message.
        let (theirs, ours) = (qsd.client.raw(format!("{input}\n")), ours.raw(format!("{input}\n")));
        assert!(theirs.get("error").is_some(), "{input}: {theirs}");
        if theirs != ours {
            differences.push(format!("{input}\n  qemu: {}\n  ours: {}", theirs["error"], ours));
        }
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[test]
fn every_field_that_we_show_is_in_qemus_schema() {
    if !has("qemu-storage-daemon", Command::new("qemu-storage-daemon").arg("--version")) {
        return;
    }
    let mut qsd = Qsd::start();
    let schema = qsd.client.ok("query-qmp-schema", json!({}));
    let entity = |name: &Value| {
        schema.as_array().unwrap().iter().find(|entity| entity["name"] == *name).cloned().unwrap()
    };
    let (_world, mut client) = World::with_disk();
    client.ok("block-dirty-bitmap-add", json!({ "node": "disk", "name": "b" }));
    for command in ["query-version", "query-commands", "query-block", "query-named-block-nodes"] {
        let reply = client.ok(command, json!({}));
        let returns = entity(&json!(command))["ret-type"].clone();
        fits(&reply, &entity(&returns), &entity, command);
    }
}

/// Checks a value against a type of the schema; fields that begin with `x-driveline-` are ours.
fn fits(value: &Value, entity: &Value, find: &dyn Fn(&Value) -> Value, at: &str) {
    match entity["meta-type"].as_str().unwrap() {
        "array" => {
            for element in value.as_array().unwrap_or_else(|| panic!("{at}: no list")) {
                fits(element, &find(&entity["element-type"]), find, at);
            }
        }
        "object" => {
            let members = entity["members"].as_array().unwrap();
            let object = value.as_object().unwrap_or_else(|| panic!("{at}: no object"));
            for member in members {
                let name = member["name"].as_str().unwrap();
                match object.get(name) {
                    Some(value) => fits(value, &find(&member["type"]), find, &format!("{at}.{name}")),
                    None => assert!(member.get("default").is_some(), "{at}.{name} is missing"),
                }
            }
            for name in object.keys().filter(|name| !name.starts_with("x-driveline-")) {
                assert!(
                    members.iter().any(|member| member["name"] == **name),
                    "{at}.{name} is not in the schema"
                );
            }
        }
        "builtin" => {
            let fits = match entity["json-type"].as_str().unwrap() {
                "string" => value.is_string(),
                "int" => value.is_i64() || value.is_u64(),
                "boolean" => value.is_boolean(),
                other => panic!("{at}: a {other}"),
            };
            assert!(fits, "{at}: {value}");
        }
        "enum" => {
            let values = entity["members"].as_array().unwrap();
            assert!(values.iter().any(|member| member["name"] == *value), "{at}: {value}");
        }
        other => panic!("{at}: a type that is {other}"),
    }
}

/// What the Python client does: connects, asks, hears of an event, is refused, quits.
const SCRIPT: &str = r#"
import asyncio, sys
from qemu.qmp import QMPClient, EventListener
from qemu.qmp.qmp_client import ExecuteError

async def main():
    qmp = QMPClient('test')
    await qmp.connect(sys.argv[1])
    assert qmp.greeting.QMP.version['qemu']['major'] == 10
    names = [c['name'] for c in await qmp.execute('query-commands')]
    assert 'block-stream' in names
    await qmp.execute('blockdev-add', {'driver': 'null-co', 'node-name': 'n', 'size': 4096})
    nodes = await qmp.execute('query-named-block-nodes', {'flat': True})
    assert [n['node-name'] for n in nodes] == ['n'], nodes
    try:
        await qmp.execute('blockdev-del', {'node-name': 'nope'})
        assert False
    except ExecuteError as error:
        assert error.error_class == 'GenericError' and 'nope' in str(error)
    with qmp.listener('SHUTDOWN') as listener:
        await qmp.execute('quit')
        event = await listener.get()
        assert event['data']['reason'] == 'host-qmp-quit'
    await qmp.disconnect()

asyncio.run(main())
print('done')
"#;

#[test]
fn the_python_client_of_qemu_works() {
    if !has("python3", Command::new("python3").arg("--version")) {
        return;
    }
    let packages = Path::new(env!("CARGO_TARGET_TMPDIR")).join("qemu.qmp");
    if !packages.join("qemu").is_dir() {
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "install", "--quiet", "--target"]).arg(&packages).arg("qemu.qmp");
        if !has("the Python package qemu.qmp", &mut pip) {
            return;
        }
    }
    let world = World::new();
    let run = Command::new("python3")
        .args(["-c", SCRIPT])
        .arg(world.socket())
        .env("PYTHONPATH", &packages)
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    assert_eq!(*world.program.quits.lock(), 1);
}

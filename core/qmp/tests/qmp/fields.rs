//! What queries say of nodes, field by field, against qemu-storage-daemon with the same nodes on the same images.

use crate::{
    interop::Qsd,
    kit::{Client, World, has},
};
use serde_json::{Map, Value, json};
use std::{
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Images that both only read.
fn make_images(world: &World) {
    let path = |name: &str| world.path(name);
    run("qemu-img", &["create", "-q", "-f", "raw", &path("a.raw"), "1M"]);
    run("qemu-img", &["create", "-q", "-f", "raw", &path("b.raw"), "1M"]);
    run("qemu-img", &["create", "-q", "-f", "raw", &path("c.raw"), "1M"]);
    run("qemu-img", &["create", "-q", "-f", "qcow2", &path("base.qcow2"), "1M"]);
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", &path("top.qcow2")]);
    run("qemu-img", &["bitmap", "--add", &path("top.qcow2"), "kept"]);
    run("qemu-img", &["snapshot", "-c", "before", &path("top.qcow2")]);
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "compat=0.10", &path("old.qcow2"), "1M"]);
    let data_file = format!("data_file={},data_file_raw=on", path("data.raw"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &data_file, &path("ext.qcow2"), "1M"]);
}

/// A server of `c.raw` for both.
struct Server(Child);

impl Server {
    fn start(world: &World) -> Self {
        let (socket, ready) = (world.path("nbd.sock"), world.path("nbd.pid"));
        let child = Command::new("qemu-nbd")
            .args(["-f", "raw", "-x", "e", "-e", "2", "-t", "-r", "-k", &socket, "--pid-file", &ready])
            .arg(world.path("c.raw"))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let end = Instant::now() + Duration::from_secs(20);
        while !std::path::Path::new(&ready).exists() {
            assert!(Instant::now() < end, "qemu-nbd starts");
            std::thread::sleep(Duration::from_millis(5));
        }
        Self(child)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn add_nodes(client: &mut Client, world: &World) {
    let file =
        |name: &str, node: &str| json!({ "driver": "file", "filename": world.path(name), "node-name": node });
    let qcow2 = |name: &str, file: Value| json!({ "driver": "qcow2", "node-name": name, "read-only": true, "file": file });
    let mut suppressed = qcow2("alone", file("top.qcow2", "alone-file"));
    suppressed["backing"] = Value::Null;
    let mut over = qcow2("over", file("old.qcow2", "over-file"));
    over["backing"] = json!("raw");
    for node in [
        json!({ "driver": "raw", "node-name": "raw", "detect-zeroes": "on", "read-only": true,
            "cache": { "no-flush": true }, "file": file("a.raw", "raw-file") }),
        qcow2("top", file("top.qcow2", "top-file")),
        qcow2("old", file("old.qcow2", "old-file")),
        qcow2("ext", file("ext.qcow2", "ext-file")),
        suppressed,
        over,
        json!({ "driver": "file", "filename": world.path("b.raw"), "node-name": "q0", "read-only": true }),
        json!({ "driver": "null-co", "size": 1 << 20, "node-name": "q1" }),
        json!({ "driver": "quorum", "node-name": "quorum", "read-only": true, "vote-threshold": 2, "children": ["q0", "q1"] }),
        json!({ "driver": "null-co", "size": 1 << 20, "read-zeroes": true, "node-name": "zeroes" }),
        json!({ "driver": "raw", "node-name": "window", "file": "zeroes", "offset": 4096, "size": 8192 }),
        json!({ "driver": "raw", "node-name": "raw-on-raw", "file": "window" }),
        json!({ "driver": "null-co", "size": 1 << 20, "node-name": "target" }),
        json!({ "driver": "copy-before-write", "node-name": "cbw", "file": "top", "target": "target" }),
        json!({ "driver": "snapshot-access", "node-name": "past", "file": "cbw" }),
        json!({ "driver": "nbd", "node-name": "nbd", "export": "e", "read-only": true,
            "server": { "type": "unix", "path": world.path("nbd.sock") } }),
    ] {
        client.ok("blockdev-add", node);
    }
    client.ok("block-dirty-bitmap-add", json!({ "node": "raw", "name": "b" }));
    client.ok("block-set-write-threshold", json!({ "node-name": "zeroes", "write-threshold": 512 }));
}

/// Nodes that were given names, by them; those that were not, by what they are.
fn by_name(reply: &Value) -> Map<String, Value> {
    let key = |node: &Value| match node["node-name"].as_str().unwrap() {
        name if name.starts_with('#') => format!("{} {}", node["drv"], node["file"]),
        name => name.to_owned(),
    };
    reply.as_array().unwrap().iter().map(|node| (key(node), neutral(node))).collect()
}

/// Without what is different in every run, and with `json:` texts as what they say.
fn neutral(value: &Value) -> Value {
    match value {
        Value::Object(object) => {
            // The name that was made up, what is only Driveline's, what QEMU's filter keeps its notes in, and bitmaps of an
            // image, which a program around the monitor would bring.
            let left_out = |key: &str, value: &Value| {
                key.starts_with("x-driveline-")
                    || key == "node-name" && value.as_str().is_some_and(|name| name.starts_with('#'))
                    || key == "dirty-bitmaps" && object["drv"] == "copy-before-write"
                    || key == "dirty-bitmaps" && value[0]["name"] == "kept"
            };
            let kept = object.iter().filter(|(key, value)| !left_out(key, value));
            Value::Object(kept.map(|(key, value)| (key.clone(), neutral(value))).collect())
        }
        Value::Array(list) => list.iter().map(neutral).collect(),
        Value::String(text) => match text.strip_prefix("json:") {
            Some(json) => json!({ "json": serde_json::from_str::<Value>(json).unwrap() }),
            None => value.clone(),
        },
        other => other.clone(),
    }
}

/// How the second differs from the first, a line each.
fn differences(path: &str, theirs: &Value, ours: &Value, found: &mut Vec<String>) {
    match (theirs, ours) {
        (Value::Object(theirs), Value::Object(ours)) => {
            for key in theirs.keys().chain(ours.keys().filter(|key| !theirs.contains_key(*key))) {
                let [theirs, ours] = [theirs, ours].map(|object| object.get(key).unwrap_or(&Value::Null));
                differences(&format!("{path}.{key}"), theirs, ours, found);
            }
        }
        (Value::Array(theirs), Value::Array(ours)) if theirs.len() == ours.len() => {
            theirs.iter().zip(ours).for_each(|(theirs, ours)| differences(path, theirs, ours, found));
        }
        _ if theirs == ours => {}
        // QEMU rounds the sizes of files up to whole sectors.
        _ if path.ends_with(".virtual-size")
            && theirs.as_u64() == ours.as_u64().map(|n| n.next_multiple_of(512)) => {}
        _ => found.push(format!("{path}: qemu {theirs}, ours {ours}")),
    }
}

#[test]
fn queries_say_of_every_node_what_qemus_say() {
    if !has("qemu-storage-daemon", Command::new("qemu-storage-daemon").arg("--version")) {
        return;
    }
    let world = World::new();
    make_images(&world);
    let _server = Server::start(&world);
    let mut qsd = Qsd::start();
    let mut ours = world.client();
    qsd.client.ok("blockdev-del", json!({ "node-name": "disk" }));
    for client in [&mut qsd.client, &mut ours] {
        add_nodes(client, &world);
    }
    let mut found = Vec::new();
    for (command, arguments) in [
        ("query-named-block-nodes", json!({})),
        ("query-named-block-nodes", json!({ "flat": true })),
        ("query-block", json!({})),
    ] {
        let [theirs, ours] = [&mut qsd.client, &mut ours]
            .map(|client| Value::Object(by_name(&client.ok(command, arguments.clone()))));
        differences(&format!("{command} {arguments}"), &theirs, &ours, &mut found);
    }
    let [theirs, ours] = [&mut qsd.client, &mut ours].map(|client| {
        let stats = client.ok("query-blockstats", json!({ "query-nodes": true }));
        let named = |node: &&Value| !node["node-name"].as_str().unwrap().starts_with('#');
        let by_name = |node: &Value| (node["node-name"].as_str().unwrap().to_owned(), neutral(node));
        Value::Object(stats.as_array().unwrap().iter().filter(named).map(by_name).collect())
    });
    differences("query-blockstats", &theirs, &ours, &mut found);
    assert!(found.is_empty(), "{}", found.join("\n"));
}

//! Options and errors of commands on nodes, side by side with QEMU's storage daemon: the same JSON to both.

use crate::kit::{Client, World, has};
use serde_json::{Value, json};
use std::process::Command;

/// Where the text of an error differs, and why. The class is always the same, and so is whether there is an error.
const OTHER_WORDS: [(&str, &str); 3] = [
    ("driver of node", "QEMU says which of the old driver's options has no default"),
    ("del in use", "the users are named"),
    ("negative interval", "a number without a sign is expected"),
];

/// Where one says yes and the other no, and why.
const OTHER_OUTCOMES: [(&str, &str); 2] = [
    ("long name", "names may have 127 characters here"),
    ("writable", "a file that was not asked to be read-only does not become it with its format"),
];

fn script() -> Vec<(&'static str, &'static str, Value)> {
    let add = |what, options| (what, "blockdev-add", options);
    let reopen = |what, options: Value| (what, "blockdev-reopen", json!({ "options": [options] }));
    let raw = |path: &str| json!({ "driver": "file", "filename": path });
    let q = |extra: Value| {
        let mut node = json!({ "driver": "qcow2", "node-name": "w", "file": raw("FOLDER/q.qcow2") });
        node.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        node
    };
    vec![
        add("unmap alone", json!({ "driver": "null-co", "node-name": "w", "detect-zeroes": "unmap" })),
        add("detect word", json!({ "driver": "null-co", "node-name": "w", "detect-zeroes": "maybe" })),
        add("discard word", json!({ "driver": "null-co", "node-name": "w", "discard": "maybe" })),
        add("force share", json!({ "driver": "null-co", "node-name": "w", "force-share": true })),
        add("driver", json!({ "driver": "nullco", "node-name": "w" })),
        add("unknown", json!({ "driver": "null-co", "node-name": "w", "bogus": 1 })),
        add("bad name", json!({ "driver": "null-co", "node-name": "0n" })),
        add("long name", json!({ "driver": "null-co", "node-name": "n".repeat(40) })),
        add("no name", json!({ "driver": "null-co" })),
        add("no driver", json!({ "node-name": "w" })),
        add("direct word", json!({ "driver": "null-co", "node-name": "w", "cache": { "direct": "on" } })),
        add("cache key", json!({ "driver": "null-co", "node-name": "w", "cache": { "bogus": true } })),
        add("read-only word", json!({ "driver": "null-co", "node-name": "w", "read-only": "on" })),
        add("no filename", json!({ "driver": "file", "node-name": "w" })),
        add("no file", json!({ "driver": "file", "node-name": "w", "filename": "/no/such" })),
        add("empty filename", json!({ "driver": "file", "node-name": "w", "filename": "" })),
        add("no device", json!({ "driver": "host_device", "node-name": "w", "filename": "FOLDER/d.raw" })),
        add(
            "aio native",
            json!({ "driver": "file", "node-name": "w", "filename": "FOLDER/d.raw", "aio": "native" }),
        ),
        add(
            "aio word",
            json!({ "driver": "file", "node-name": "w", "filename": "FOLDER/d.raw", "aio": "uring" }),
        ),
        add(
            "locking word",
            json!({ "driver": "file", "node-name": "w", "filename": "FOLDER/d.raw", "locking": "x" }),
        ),
        add(
            "drop-cache",
            json!({ "driver": "file", "node-name": "w", "filename": "FOLDER/d.raw", "drop-cache": 5 }),
        ),
        add("no child", json!({ "driver": "raw", "node-name": "w" })),
        add("unknown child", json!({ "driver": "raw", "node-name": "w", "file": "nope" })),
        add("number as child", json!({ "driver": "raw", "node-name": "w", "file": 5 })),
        add("null as child", json!({ "driver": "raw", "node-name": "w", "file": null })),
        add("overlap word", q(json!({ "overlap-check": "most" }))),
        add("entry size", q(json!({ "l2-cache-entry-size": 513 }))),
        add("l2 over all", q(json!({ "cache-size": 65536, "l2-cache-size": 131_072 }))),
        add(
            "three sizes",
            q(json!({ "cache-size": 131_072, "l2-cache-size": 65536, "refcount-cache-size": 65536 })),
        ),
        add("negative interval", q(json!({ "cache-clean-interval": -1 }))),
        add("encrypt", q(json!({ "encrypt": { "format": "luks", "key-secret": "x" } }))),
        add("unknown data file", q(json!({ "data-file": "nope" }))),
        add("unknown backing", q(json!({ "backing": "nope" }))),
        add("number as backing", q(json!({ "backing": 5 }))),
        add("lazy word", q(json!({ "lazy-refcounts": "on" }))),
        // What stays.
        add(
            "f",
            json!({ "driver": "file", "node-name": "f", "filename": "FOLDER/d.raw", "discard": "unmap",
            "detect-zeroes": "unmap" }),
        ),
        add(
            "all of file",
            json!({ "driver": "file", "node-name": "g", "filename": "FOLDER/e.raw", "drop-cache": true,
            "aio": "threads", "locking": "auto", "auto-read-only": true, "cache": { "no-flush": true } }),
        ),
        add("r", json!({ "driver": "raw", "node-name": "r", "file": "f" })),
        add("n", json!({ "driver": "null-co", "node-name": "n", "size": 1 << 20 })),
        add("m", json!({ "driver": "null-aio", "node-name": "m", "size": 1 << 20, "read-zeroes": true })),
        add(
            "q",
            json!({ "driver": "qcow2", "node-name": "q", "file": raw("FOLDER/q.qcow2"), "backing": null,
            "cache-size": 1, "lazy-refcounts": true, "pass-discard-request": true, "overlap-check": "cached" }),
        ),
        add(
            "b",
            json!({ "driver": "qcow2", "node-name": "b", "file": { "driver": "file",
            "filename": "FOLDER/b.qcow2", "node-name": "bf" } }),
        ),
        add("duplicate", json!({ "driver": "null-co", "node-name": "n" })),
        reopen("reopen without name", raw("FOLDER/d.raw")),
        reopen("reopen nothing", json!({ "driver": "file", "node-name": "zz", "filename": "FOLDER/d.raw" })),
        reopen("reopen without file", json!({ "driver": "file", "node-name": "f" })),
        reopen("another file", json!({ "driver": "file", "node-name": "f", "filename": "FOLDER/q.qcow2" })),
        reopen(
            "other locking",
            json!({ "driver": "file", "node-name": "f", "filename": "FOLDER/d.raw", "locking": "off" }),
        ),
        reopen("driver of node", json!({ "driver": "raw", "node-name": "f", "file": "n" })),
        reopen("defaults", json!({ "driver": "file", "node-name": "f", "filename": "FOLDER/d.raw" })),
        reopen("window", json!({ "driver": "raw", "node-name": "r", "file": "f", "offset": 512 })),
        reopen("missing file", json!({ "driver": "raw", "node-name": "r" })),
        reopen("itself", json!({ "driver": "raw", "node-name": "r", "file": "r" })),
        reopen("other child", json!({ "driver": "raw", "node-name": "r", "file": "n" })),
        reopen("in place", json!({ "driver": "raw", "node-name": "r", "file": { "driver": "null-co" } })),
        reopen("size", json!({ "driver": "null-co", "node-name": "n", "size": 512 })),
        reopen("backing", json!({ "driver": "qcow2", "node-name": "b", "file": "bf", "backing": "m" })),
        reopen("no backing said", json!({ "driver": "qcow2", "node-name": "b", "file": "bf" })),
        reopen("backing cycle", json!({ "driver": "qcow2", "node-name": "b", "file": "bf", "backing": "b" })),
        reopen("backing off", json!({ "driver": "qcow2", "node-name": "b", "file": "bf", "backing": null })),
        reopen("read-only", json!({ "driver": "qcow2", "node-name": "b", "file": "bf", "read-only": true })),
        reopen("writable", json!({ "driver": "qcow2", "node-name": "b", "file": "bf" })),
        ("resize negative", "block_resize", json!({ "node-name": "n", "size": -1 })),
        ("resize nothing", "block_resize", json!({ "node-name": "zz", "size": 1 })),
        (
            "backing of nobody",
            "change-backing-file",
            json!({ "device": "zz", "image-node-name": "q", "backing-file": "x" }),
        ),
        (
            "backing in nothing",
            "change-backing-file",
            json!({ "device": "q", "image-node-name": "zz", "backing-file": "x" }),
        ),
        (
            "backing of file",
            "change-backing-file",
            json!({ "device": "q", "image-node-name": "f", "backing-file": "x" }),
        ),
        (
            "threshold of nothing",
            "block-set-write-threshold",
            json!({ "node-name": "zz", "write-threshold": 1 }),
        ),
        ("threshold", "block-set-write-threshold", json!({ "node-name": "n", "write-threshold": 4096 })),
        (
            "threshold of 64 bits",
            "block-set-write-threshold",
            json!({ "node-name": "n", "write-threshold": u64::MAX }),
        ),
        (
            "threshold without a sign",
            "block-set-write-threshold",
            json!({ "node-name": "n", "write-threshold": -1 }),
        ),
        ("thread of nothing", "x-blockdev-set-iothread", json!({ "node-name": "zz", "iothread": null })),
        ("no thread", "x-blockdev-set-iothread", json!({ "node-name": "n", "iothread": "io" })),
        ("any thread", "x-blockdev-set-iothread", json!({ "node-name": "n", "iothread": null })),
        ("child of nobody", "x-blockdev-change", json!({ "parent": "zz", "node": "n" })),
        ("neither", "x-blockdev-change", json!({ "parent": "n" })),
        ("both", "x-blockdev-change", json!({ "parent": "n", "child": "x", "node": "m" })),
        ("add child", "x-blockdev-change", json!({ "parent": "n", "node": "m" })),
        ("no such child", "x-blockdev-change", json!({ "parent": "n", "child": "m" })),
        ("remove child", "x-blockdev-change", json!({ "parent": "b", "child": "file" })),
        ("active nothing", "blockdev-set-active", json!({ "node-name": "zz", "active": false })),
        ("active parent", "blockdev-set-active", json!({ "node-name": "bf", "active": false })),
        ("inactive", "blockdev-set-active", json!({ "node-name": "b", "active": false })),
        ("above inactive", "blockdev-add", json!({ "driver": "raw", "node-name": "w", "file": "b" })),
        ("active", "blockdev-set-active", json!({ "node-name": "b", "active": true })),
        ("all inactive", "blockdev-set-active", json!({ "active": false })),
        ("all active", "blockdev-set-active", json!({ "active": true })),
        ("del nothing", "blockdev-del", json!({ "node-name": "zz" })),
        ("del in use", "blockdev-del", json!({ "node-name": "n" })),
        ("del", "blockdev-del", json!({ "node-name": "q" })),
    ]
}

#[test]
fn options_and_errors_are_those_of_qemus_storage_daemon() {
    if !has("qemu-storage-daemon", Command::new("qemu-storage-daemon").arg("--version")) {
        return;
    }
    let (world, theirs) = (World::new(), tempfile::tempdir().unwrap());
    let socket = theirs.path().join("qmp.sock");
    let chardev = format!("socket,id=m,path={},server=on,wait=off", socket.display());
    let pid = theirs.path().join("pid");
    let started = Command::new("qemu-storage-daemon")
        .args(["--chardev", &chardev, "--monitor", "chardev=m", "--daemonize", "--pidfile"])
        .arg(&pid)
        .status();
    assert!(started.unwrap().success());
    let mut clients = [(Client::connect(&socket), theirs.path()), (world.client(), world.folder.path())];
    clients[0].0.ok("qmp_capabilities", json!({}));
    for (_, folder) in &clients {
        for file in ["d.raw", "e.raw"] {
            std::fs::write(folder.join(file), vec![0; 1 << 20]).unwrap();
        }
        for image in ["q.qcow2", "b.qcow2"] {
            let made = Command::new("qemu-img")
                .args(["create", "-q", "-f", "qcow2"])
                .arg(folder.join(image))
                .arg("1M")
                .status();
            assert!(made.unwrap().success());
        }
    }
    let mut wrong = Vec::new();
    for (what, command, arguments) in script() {
        let [qemu, ours] = clients.each_mut().map(|(client, folder)| {
            let folder = folder.to_str().unwrap();
            let arguments: Value =
                serde_json::from_str(&arguments.to_string().replace("FOLDER", folder)).unwrap();
            let reply = client.execute(command, arguments).to_string();
            serde_json::from_str::<Value>(&reply.replace(folder, "FOLDER")).unwrap()
        });
        let listed = |list: &[(&str, &str)]| list.iter().any(|(name, _)| *name == what);
        let same = match (&qemu["error"], &ours["error"]) {
            (Value::Null, Value::Null) => true,
            (Value::Null, _) | (_, Value::Null) => listed(&OTHER_OUTCOMES),
            (a, b) => a["class"] == b["class"] && (a["desc"] == b["desc"] || listed(&OTHER_WORDS)),
        };
        if !same {
            wrong.push(format!("{what}: QEMU {qemu}, here {ours}"));
        }
    }
    clients[0].0.send(r#"{ "execute": "quit" }"#);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

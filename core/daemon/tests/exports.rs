//! Exports as monitors add them: in transactions they come and go with the rest, or not at all; and what is inactive.

use driveline_daemon::{config::Config, daemon::Daemon};
use serde_json::{Value, json};
use std::path::Path;

struct World {
    daemon: Daemon,
    _folder: tempfile::TempDir,
}

impl World {
    /// A node `disk`, and a server without exports.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let text = "[node.disk]\ndriver = \"memory\"\nsize = \"1MiB\"\n";
        let (config, mistakes) = Config::parse(&folder.path().join("vm.toml"), text);
        let daemon = Daemon::start(&config, mistakes).map_err(|error| error.to_string()).unwrap();
        let world = Self { daemon, _folder: folder };
        let path = world.path("nbd.sock");
        world.ok("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": path } } }));
        world
    }

    fn path(&self, name: &str) -> String {
        let folder: &Path = self._folder.path();
        folder.join(name).to_str().unwrap().to_owned()
    }

    #[track_caller]
    fn ok(&self, command: &str, arguments: Value) -> Value {
        let done = self.daemon.execute(command, arguments.clone());
        done.unwrap_or_else(|error| panic!("{command} {arguments}: {}", error.desc))
    }

    /// The actions, and the text of the error that they must end with.
    #[track_caller]
    fn wrong(&self, actions: &[Value]) -> String {
        self.daemon.execute("transaction", json!({ "actions": actions })).unwrap_err().desc
    }

    fn exports(&self) -> Vec<String> {
        let exports = self.ok("query-block-exports", json!({}));
        exports.as_array().unwrap().iter().map(|export| export["id"].as_str().unwrap().to_owned()).collect()
    }

    fn end(self) {
        self.daemon.stop().unwrap();
    }
}

fn action(kind: &str, data: Value) -> Value {
    json!({ "type": kind, "data": data })
}

fn export(id: &str, node: &str) -> Value {
    action("block-export-add", json!({ "type": "nbd", "id": id, "node-name": node, "writable": true }))
}

fn abort() -> Value {
    action("abort", json!({}))
}

#[test]
fn an_export_comes_with_the_node_that_it_shows() {
    let world = World::new();
    let mut shows = export("e", "new");
    shows["data"]["bitmaps"] = json!([{ "node": "disk", "name": "b" }]);
    world.ok("block-dirty-bitmap-add", json!({ "node": "disk", "name": "b" }));
    let new = json!({ "driver": "memory", "node-name": "new", "size": 1 << 20 });
    let actions = [action("blockdev-add", new), shows];
    world.ok("transaction", json!({ "actions": actions }));
    assert_eq!(world.exports(), ["e"]);
    let error = world.daemon.execute("blockdev-del", json!({ "node-name": "new" })).unwrap_err();
    assert!(error.desc.contains("export 'e'"), "{}", error.desc);
    world.ok("block-export-del", json!({ "id": "e" }));
    world.end();
}

#[test]
fn a_transaction_that_fails_leaves_no_export_and_takes_none() {
    let world = World::new();
    assert_eq!(world.wrong(&[export("e", "disk"), abort()]), "Transaction aborted using Abort action");
    assert_eq!(world.exports(), Vec::<String>::new());
    // Id, name and node are free again.
    world.ok("transaction", json!({ "actions": [export("e", "disk")] }));
    assert_eq!(world.exports(), ["e"]);
    let del = action("block-export-del", json!({ "id": "e" }));
    assert_eq!(world.wrong(&[del.clone(), abort()]), "Transaction aborted using Abort action");
    assert_eq!(world.exports(), ["e"]);
    world.ok("transaction", json!({ "actions": [del] }));
    assert_eq!(world.exports(), Vec::<String>::new());
    world.ok("blockdev-add", json!({ "driver": "memory", "node-name": "n", "size": 512 }));
    world.ok("transaction", json!({ "actions": [action("blockdev-del", json!({ "node-name": "n" }))] }));
    world.end();
}

#[test]
fn what_cannot_be_exported_is_said_before_anything_is_done() {
    let world = World::new();
    let twice = world.wrong(&[export("e", "disk"), export("e", "disk")]);
    assert!(twice.contains("'e' exists already"), "{twice}");
    let same_name =
        action("block-export-add", json!({ "type": "nbd", "id": "f", "node-name": "disk", "name": "disk" }));
    assert_eq!(world.wrong(&[export("e", "disk"), same_name]), "NBD server already has export named 'disk'");
    assert_eq!(world.wrong(&[export("e", "nope")]), "Cannot find device='' nor node-name='nope'");
    let gone = action("block-export-del", json!({ "id": "e" }));
    assert_eq!(world.wrong(std::slice::from_ref(&gone)), "Export 'e' is not found");
    world.ok("transaction", json!({ "actions": [export("e", "disk")] }));
    assert_eq!(world.wrong(&[gone.clone(), gone]), "Export 'e' is not found");
    assert_eq!(world.exports(), ["e"]);
    world.end();
}

#[test]
fn what_is_exported_becomes_active_unless_the_export_may_wait() {
    let world = World::new();
    let active = |expected: bool| {
        let nodes = world.ok("query-named-block-nodes", json!({}));
        let node = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "n").unwrap();
        assert_eq!(node["active"], expected);
    };
    let set = |active: bool| {
        world.daemon.execute("blockdev-set-active", json!({ "node-name": "n", "active": active }))
    };
    let new = json!({ "driver": "memory", "node-name": "n", "size": 1 << 20, "active": false });
    world.ok("blockdev-add", new);
    world.ok("block-export-add", export("e", "n")["data"].clone());
    active(true);
    let error = set(false).unwrap_err().desc;
    assert!(error.contains("it is inactive, and export 'e' needs write"), "{error}");
    world.ok("block-export-del", json!({ "id": "e" }));
    set(false).unwrap();

    let mut waits = export("w", "n");
    waits["data"]["allow-inactive"] = json!(true);
    world.ok("transaction", json!({ "actions": [waits] }));
    active(false);
    set(true).unwrap();
    set(false).unwrap();
    world.end();
}

/// What an export of a node showed could be cleared under its client's eyes, given to a backup, and shown once more: QEMU refuses it.
#[test]
fn what_an_export_of_a_node_shows_is_busy_and_a_drives_bitmaps_live_on() {
    let world = World::new();
    let bitmap = |name: &str| json!({ "node": "disk", "name": name });
    for name in ["b", "c"] {
        world.ok("block-dirty-bitmap-add", bitmap(name));
    }
    let shows = |id: &str, node: &str, writable: bool| json!({ "type": "nbd", "id": id, "name": id, "node-name": node, "writable": writable, "bitmaps": ["b"] });
    let refused =
        |command: &str, arguments: Value| world.daemon.execute(command, arguments).unwrap_err().desc;
    let enabled = refused("block-export-add", shows("e", "disk", false));
    assert_eq!(enabled, "Enabled bitmap 'b' incompatible with readonly export");
    world.ok("block-export-add", shows("e", "disk", true));
    for change in ["clear", "disable", "enable", "remove"] {
        let said = refused(&format!("block-dirty-bitmap-{change}"), bitmap("b"));
        assert!(said.contains("busy (in use by export 'e')"), "{change}: {said}");
    }
    for (source, target) in [("b", "c"), ("c", "b")] {
        let merge = json!({ "node": "disk", "target": target, "bitmaps": [source] });
        let said = refused("block-dirty-bitmap-merge", merge);
        assert!(said.contains("busy (in use by export 'e')"), "{said}");
    }
    let again = refused("block-export-add", shows("f", "disk", true));
    let expected = "Bitmap 'b' is currently in use by another operation and cannot be used (export 'e')";
    assert_eq!(again, expected);
    world.ok("blockdev-add", json!({ "driver": "memory", "node-name": "copy", "size": 1 << 20 }));
    let backup = json!({ "device": "disk", "target": "copy", "sync": "incremental", "bitmap": "b" });
    let said = refused("blockdev-backup", backup);
    assert!(said.contains("busy (in use by export 'e')"), "{said}");
    let nodes = world.ok("query-named-block-nodes", json!({}));
    let disk = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "disk").unwrap();
    assert_eq!(
        (&disk["dirty-bitmaps"][0]["name"], &disk["dirty-bitmaps"][0]["busy"]),
        (&json!("b"), &json!(true))
    );
    world.ok("block-export-del", json!({ "id": "e" }));
    world.ok("block-dirty-bitmap-clear", bitmap("b"));

    // In a transaction it is the same.
    let action = action("block-export-add", shows("e", "disk", true));
    world.ok("transaction", json!({ "actions": [action] }));
    assert!(refused("block-dirty-bitmap-clear", bitmap("b")).contains("busy"));
    world.ok("block-export-del", json!({ "id": "e" }));

    // A bitmap of an image below is found, too, and a drive's is shown as it lives on.
    world.ok("blockdev-add", json!({ "driver": "raw", "node-name": "top", "file": "disk" }));
    let not_found = refused("block-export-add", shows("g", "top", false));
    assert_eq!(not_found, "Bitmap 'b' is not found", "a format is no filter");
    world.daemon.engine().block_on_local(|| async {
        let mut change = world.daemon.graph().change().await;
        change.set_drive("vda", "disk").unwrap();
        change.commit().await.unwrap();
    });
    world.ok("block-export-add", shows("h", "vda", false));
    world.ok("block-dirty-bitmap-clear", bitmap("b"));
    assert!(refused("block-dirty-bitmap-remove", bitmap("b")).contains("shown by export 'h'"));
    world.ok("block-export-del", json!({ "id": "h" }));
    world.end();
}

/// Is somebody there who speaks NBD?
fn greets(mut stream: impl std::io::Read) -> bool {
    let mut greeting = [0; 8];
    stream.read_exact(&mut greeting).is_ok() && greeting == *b"NBDMAGIC"
}

#[test]
fn a_server_listens_where_it_was_told_on_one_of_several_ports_of_one_family_or_on_an_abstract_name() {
    let world = World::new();
    let start = |kind: &str, data: Value| {
        let _ = world.daemon.execute("nbd-server-stop", json!({}));
        let started =
            world.daemon.execute("nbd-server-start", json!({ "addr": { "type": kind, "data": data } }));
        started.map_err(|error| error.desc)
    };
    // Two neighbours, the first of them taken.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let inet = |more: Value| {
        let mut data = json!({ "host": "127.0.0.1", "port": port.to_string() });
        data.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        start("inet", data)
    };
    let no_port = "Failed to find an available port: Address already in use";
    assert_eq!(inet(json!({})).unwrap_err(), no_port);
    assert_eq!(inet(json!({ "to": 1 })).unwrap_err(), no_port);
    let ports = port + 1..=port.saturating_add(20);
    inet(json!({ "to": ports.end(), "keep-alive": true, "ipv4": true })).unwrap();
    let mut reached = ports.filter_map(|port| std::net::TcpStream::connect(("127.0.0.1", port)).ok());
    assert!(reached.any(greets));
    for wrong in [json!({ "ipv4": false }), json!({ "ipv6": true })] {
        let text = format!(
            "address resolution failed for 127.0.0.1:{port}: Address family for hostname not supported"
        );
        assert_eq!(inet(wrong).unwrap_err(), text);
    }
    let name = format!("driveline-{}", std::process::id());
    start("unix", json!({ "path": name, "abstract": true })).unwrap();
    let address =
        <std::os::unix::net::SocketAddr as std::os::linux::net::SocketAddrExt>::from_abstract_name(name);
    assert!(greets(std::os::unix::net::UnixStream::connect_addr(&address.unwrap()).unwrap()));
    world.end();
}

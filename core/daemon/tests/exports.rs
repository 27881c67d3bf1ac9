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

//! Exports: what the program is asked for, and what never reaches it.

use crate::kit::World;
use driveline_qmp::{Address, NbdExport, NbdServer};
use serde_json::json;

#[test]
fn exports_reach_the_program_as_they_were_meant() {
    let (world, mut client) = World::with_disk();
    let unix = json!({ "type": "unix", "data": { "path": "/tmp/x.sock" } });
    client.ok("nbd-server-start", json!({ "addr": unix, "max-connections": 7 }));
    let expected = NbdServer {
        address: Address::Unix("/tmp/x.sock".into()),
        max_connections: 7,
        handshake_max_seconds: 10,
    };
    assert_eq!(*world.program.server.lock(), Some(expected));

    client.ok("block-dirty-bitmap-add", json!({ "node": "vda", "name": "b" }));
    let export = json!({ "type": "nbd", "id": "e", "node-name": "vda", "writable": true, "description": "a disk",
        "bitmaps": ["b", { "node": "disk", "name": "b" }], "allocation-depth": true });
    client.ok("block-export-add", export);
    let expected = NbdExport {
        id: "e".into(),
        node_name: "vda".into(),
        name: "vda".into(),
        description: Some("a disk".into()),
        writable: true,
        bitmaps: vec![(None, "b".into()), (Some("disk".into()), "b".into())],
        allocation_depth: true,
    };
    assert_eq!(*world.program.exports.lock(), [expected]);
    let info = json!({ "id": "e", "type": "nbd", "node-name": "vda", "shutting-down": false });
    assert_eq!(client.ok("query-block-exports", json!({})), json!([info]));

    client.ok("block-export-add", json!({ "type": "nbd", "id": "used", "node-name": "disk", "name": "n" }));
    assert!(client.wrong("block-export-del", json!({ "id": "used" })).contains("in use"));
    client.ok("block-export-del", json!({ "id": "used", "mode": "hard" }));
    client.ok("nbd-server-stop", json!({}));
    assert_eq!(client.ok("query-block-exports", json!({})), json!([]));

    let inet = json!({ "type": "inet", "data": { "host": "::1", "port": "10809" } });
    client.ok("nbd-server-start", json!({ "addr": inet }));
    let address = world.program.server.lock().as_ref().map(|server| server.address.clone());
    assert_eq!(address, Some(Address::Inet("::1".into(), 10809)));
}

#[test]
fn wrong_exports_do_not_reach_it() {
    let (world, mut client) = World::with_disk();
    let unix = json!({ "type": "unix", "data": { "path": "/tmp/x.sock" } });
    client.ok("nbd-server-start", json!({ "addr": unix }));
    let add = |mut extra: serde_json::Value| {
        let object = extra.as_object_mut().unwrap();
        for (key, value) in [("type", "nbd"), ("id", "e"), ("node-name", "vda")] {
            object.entry(key).or_insert(value.into());
        }
        extra
    };
    let wrong = [
        (json!({ "type": "fuse" }), "Parameter 'type' does not accept value 'fuse'"),
        (json!({ "node-name": "nope" }), "Cannot find device='nope' nor node-name='nope'"),
        (json!({ "bitmaps": ["nope"] }), "Bitmap 'nope' is not found"),
        (
            json!({ "bitmaps": [5] }),
            "Invalid parameter type for 'bitmaps[0]', expected: BlockDirtyBitmapOrStr",
        ),
        (json!({ "writethrough": true }), "Parameter 'writethrough' does not accept value 'true'"),
        (json!({ "description": "x".repeat(5000) }), "description is longer than 4096 bytes"),
        (json!({ "iothread": "t" }), "Parameter 'iothread' is unexpected"),
    ];
    for (extra, expected) in wrong {
        assert_eq!(client.wrong("block-export-add", add(extra)), expected);
    }
    let start = |addr: serde_json::Value| json!({ "addr": addr });
    let wrong = [
        (json!({ "type": "vsock", "data": {} }), "Parameter 'addr.type' does not accept value 'vsock'"),
        (json!({ "type": "unix", "data": {} }), "Parameter 'addr.data.path' is missing"),
        (json!({ "type": "unix", "path": "x" }), "Parameter 'addr.data' is missing"),
        (
            json!({ "type": "inet", "data": { "host": "h", "port": "http" } }),
            "Parameter 'addr.data.port' does not accept value 'http'",
        ),
    ];
    for (addr, expected) in wrong {
        assert_eq!(client.wrong("nbd-server-start", start(addr)), expected);
    }
    assert_eq!(client.wrong("block-export-del", json!({ "id": "e" })), "Export 'e' is not found");
    assert!(world.program.exports.lock().is_empty());
}

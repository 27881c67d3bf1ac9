//! Exports: what the program is asked for, and what never reaches it.

use crate::kit::World;
use driveline_qmp::{Address, Inet, NbdExport, NbdServer};
use serde_json::json;

#[test]
fn exports_reach_the_program_as_they_were_meant() {
    let (world, mut client) = World::with_disk();
    let unix = json!({ "type": "unix", "data": { "path": "/tmp/x.sock" } });
    client.ok("nbd-server-start", json!({ "addr": unix, "max-connections": 7 }));
    let expected = NbdServer {
        address: Address::Unix("/tmp/x.sock".into()),
        tls: None,
        authz: None,
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
        writethrough: false,
        thread: None,
        allow_inactive: false,
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

    let inet = |more: serde_json::Value| {
        let mut data = json!({ "host": "::1", "port": "10809" });
        data.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({ "type": "inet", "data": data })
    };
    let unix = |more: serde_json::Value| {
        let mut data = json!({ "path": "name", "abstract": true });
        data.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({ "type": "unix", "data": data })
    };
    let plain = Inet { host: "::1".into(), port: 10809, ..Inet::default() };
    let mut filled_up = b"name".to_vec();
    filled_up.resize(107, 0);
    for (addr, expected) in [
        (inet(json!({})), Address::Inet(plain.clone())),
        (inet(json!({ "to": 10812 })), Address::Inet(Inet { to: Some(10812), ..plain.clone() })),
        (
            inet(json!({ "ipv4": false, "ipv6": true, "keep-alive": true })),
            Address::Inet(Inet { ipv4: Some(false), ipv6: Some(true), keep_alive: true, ..plain }),
        ),
        (unix(json!({})), Address::Abstract(b"name".to_vec())),
        (unix(json!({ "tight": false })), Address::Abstract(filled_up)),
        (unix(json!({ "abstract": false, "tight": false })), Address::Unix("name".into())),
    ] {
        client.ok("nbd-server-start", json!({ "addr": addr }));
        let address = world.program.server.lock().as_ref().map(|server| server.address.clone());
        assert_eq!(address, Some(expected));
        client.ok("nbd-server-stop", json!({}));
    }
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
        (json!({ "node-name": "nope" }), "Cannot find device='' nor node-name='nope'"),
        (json!({ "bitmaps": ["nope"] }), "Bitmap 'nope' is not found"),
        (
            json!({ "bitmaps": [5] }),
            "Invalid parameter type for 'bitmaps[0]', expected: BlockDirtyBitmapOrStr",
        ),
        (json!({ "id": "1e" }), "Invalid block export id"),
        (json!({ "iothread": "t" }), "iothread \"t\" not found"),
    ];
    for (extra, expected) in wrong {
        assert_eq!(client.wrong("block-export-add", add(extra)), expected);
    }
    let long = client.wrong("block-export-add", add(json!({ "description": "x".repeat(5000) })));
    assert!(long.starts_with("description 'xxx") && long.ends_with("' too long"));
    client.ok("object-add", json!({ "qom-type": "iothread", "id": "t" }));
    let fixed = add(json!({ "id": "on-t", "iothread": "t", "fixed-iothread": true }));
    client.ok("block-export-add", fixed);
    let added = world.program.exports.lock().pop();
    assert_eq!(added.map(|export| export.thread), Some(Some(0)));
    let start = |addr: serde_json::Value| json!({ "addr": addr });
    let wrong = [
        (json!({ "type": "vsock", "data": {} }), "Parameter 'addr.type' does not accept value 'vsock'"),
        (json!({ "type": "unix", "data": {} }), "Parameter 'addr.data.path' is missing"),
        (json!({ "type": "fd", "data": {} }), "Parameter 'addr.data.str' is missing"),
        (json!({ "type": "unix", "path": "x" }), "Parameter 'addr.data' is missing"),
        (
            json!({ "type": "inet", "data": { "host": "h", "port": "http" } }),
            "Parameter 'addr.data.port' does not accept value 'http'",
        ),
    ];
    let long = "x".repeat(108);
    let too_long = format!("UNIX socket path '{long}' is too long");
    let wrong = wrong.into_iter().chain([
        (
            json!({ "type": "inet", "data": { "host": "h", "port": "1", "ipv4": false, "ipv6": false } }),
            "Cannot disable IPv4 and IPv6 at same time",
        ),
        (
            json!({ "type": "inet", "data": { "host": "h", "port": "1", "mptcp": true } }),
            "Parameter 'addr.data.mptcp' is not supported",
        ),
        (json!({ "type": "unix", "data": { "path": long, "abstract": true } }), &too_long),
    ]);
    for (addr, expected) in wrong {
        assert_eq!(client.wrong("nbd-server-start", start(addr)), expected);
    }
    assert_eq!(client.wrong("block-export-del", json!({ "id": "e" })), "Export 'e' is not found");
    assert!(world.program.exports.lock().is_empty());
}

#[test]
fn the_older_commands_make_exports_whose_ids_are_their_names() {
    let (world, mut client) = World::with_disk();
    client.ok(
        "blockdev-add",
        json!({ "driver": "null-co", "node-name": "ro", "size": 512, "read-only": true }),
    );
    client.ok("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": "/tmp/x.sock" } } }));
    client.ok("nbd-server-add", json!({ "device": "vda", "writable": true, "description": "d" }));
    client.ok("nbd-server-add", json!({ "device": "ro", "name": "n", "writable": true }));
    let taken = "Block export id 'vda' is already in use";
    assert_eq!(client.wrong("nbd-server-add", json!({ "device": "vda" })), taken);
    let nope = "Cannot find device='nope' nor node-name='nope'";
    assert_eq!(client.wrong("nbd-server-add", json!({ "device": "nope" })), nope);
    let bitmap = json!({ "device": "ro", "name": "b", "bitmap": "nope" });
    assert_eq!(client.wrong("nbd-server-add", bitmap), "Bitmap 'nope' is not found");
    let seen: Vec<_> = world.program.exports.lock().iter().map(|e| (e.id.clone(), e.writable)).collect();
    assert_eq!(seen, [("vda".to_owned(), true), ("n".to_owned(), false)]);
    let read_only = json!({ "type": "nbd", "id": "w", "node-name": "ro", "writable": true });
    assert_eq!(client.wrong("block-export-add", read_only), "Cannot export read-only node as writable");
    client.ok("nbd-server-remove", json!({ "name": "n", "mode": "hard" }));
    assert_eq!(client.wrong("nbd-server-remove", json!({ "name": "n" })), "Export 'n' is not found");
}

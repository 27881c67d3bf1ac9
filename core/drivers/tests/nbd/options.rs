//! What a node is opened with.

use crate::kit::{engine, open};
use driveline_drivers::{NbdDriver, conformance::options_of};
use driveline_graph::{Driver, Kind};
use serde_json::{Value, json};

#[test]
fn the_description_lists_every_option() {
    let samples = json!({
        "server": { "type": "inet", "host": "localhost", "port": "10809" },
        "export": "disk",
        "tls-creds": "tls0",
        "tls-hostname": "localhost",
        "x-dirty-bitmap": "qemu:dirty-bitmap:daily",
        "reconnect-delay": 10,
        "open-timeout": 10,
    });
    options_of(&NbdDriver::default(), samples);
}

#[test]
fn wrong_options_are_named() {
    let inet = |more: Value| {
        let mut server = json!({ "type": "inet", "host": "h", "port": "1" });
        server.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({ "server": server })
    };
    for (options, says) in [
        (json!({}), "NBD server address missing"),
        (json!({ "server": { "type": "unix" } }), "path"),
        (json!({ "server": { "type": "pigeon", "path": "/x" } }), "pigeon"),
        (json!({ "server": { "type": "unix", "path": "/x", "abstract": true } }), "server.abstract"),
        (json!({ "server": { "type": "fd", "str": "3" } }), "descriptor"),
        (json!({ "server": { "type": "vsock", "cid": "1", "port": "2" } }), "vsock"),
        (inet(json!({ "port": "http" })), "server.port"),
        (inet(json!({ "mptcp": true })), "server.mptcp"),
        (inet(json!({ "to": 5 })), "server.to"),
        (inet(json!({ "numeric": true })), "server.host"),
        (inet(json!({ "ipv4": false, "ipv6": false })), "server.ipv4"),
        (
            json!({ "server": { "type": "unix", "path": "/x" }, "export": "x".repeat(4097) }),
            "export name too long",
        ),
        (json!({ "server": { "type": "unix", "path": "/x" }, "tls-hostname": "h" }), "tls-creds"),
        (json!({ "server": { "type": "unix", "path": "/x" }, "reconnect-delay": -1 }), "reconnect-delay"),
    ] {
        let error = NbdDriver::default().check(options.as_object().unwrap()).unwrap_err().to_string();
        assert!(error.contains(says), "{options}: {error}");
    }
}

#[test]
fn a_server_that_is_not_there_is_an_error_with_its_address() {
    let engine = engine();
    engine.block_on_local(|| async {
        let error = open(json!({ "server": { "type": "unix", "path": "/nowhere/s" } })).await.unwrap_err();
        assert_eq!(error.to_string(), "Failed to connect to '/nowhere/s': No such file or directory");
        assert_eq!(error.kind(), Kind::NotFound);
        let error = open(json!({
            "server": { "type": "unix", "path": "/nowhere/s" },
            "tls-creds": "tls0",
            "tls-hostname": "h",
        }));
        assert!(error.await.unwrap_err().to_string().contains("No TLS credentials with id 'tls0'"));
    });
}

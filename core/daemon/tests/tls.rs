//! TLS from a file: what is wrong is said with its place, and what is right protects a socket.

#[path = "../../transport/tests/kit/mod.rs"]
mod certificates;

use certificates::{Creds, Time};
use driveline_daemon::{config::Config, daemon::Daemon};
use std::path::Path;

fn start(directory: &Path, text: &str) -> Result<Daemon, String> {
    let (config, mistakes) = Config::parse(&directory.join("vm.toml"), text);
    Daemon::start(&config, mistakes).map_err(|error| error.to_string())
}

fn file(tls: &str, more: &str) -> String {
    format!(
        r#"
        [tls.guests]
        dir = "."
        endpoint = "server"
        [tls.upstream]
        dir = "."
        [node.disk]
        driver = "memory"
        size = "1MiB"
        [export.disk]
        type = "nbd"
        node = "disk"
        socket = "s"
        tls = "{tls}"
        {more}
        "#
    )
}

#[test]
fn mistakes_about_tls_are_told_before_anything_is_served() {
    let creds = Creds::whole();
    for (text, says) in [
        (file("guest", ""), "has TLS credentials 'guest' that there are not"),
        (file("upstream", ""), "needs credentials for a server"),
        (
            file("guests", "[export.other]\ntype = \"nbd\"\nnode = \"disk\"\nsocket = \"s\""),
            "share a socket, but not 'tls'",
        ),
        (file("guests", "[tls.none]\nendpoint = \"server\""), "has no 'dir'"),
        (
            file("guests", "[tls.far]\ndir = \"/nowhere\""),
            "Unable to access credentials /nowhere/ca-cert.pem",
        ),
    ] {
        let error = start(creds.dir(), &text).map(drop).unwrap_err();
        assert!(error.contains(says), "{error}");
    }
    creds.add("server", "server", &[], Time::Past);
    let error = start(creds.dir(), &file("guests", "")).map(drop).unwrap_err();
    assert!(error.contains("server-cert.pem has expired"), "{error}");
}

/// A daemon in front, whose node is the export of one behind.
#[test]
fn a_node_is_an_export_of_another_daemon_over_tls() {
    let creds = Creds::whole();
    let behind = start(creds.dir(), &file("guests", "")).unwrap();
    assert!(behind.exports()[0].uri.starts_with("nbds+unix:///disk?socket="), "{:?}", behind.exports());
    let front = r#"
        [tls.upstream]
        dir = "."
        [node.far]
        driver = "nbd"
        server = { type = "unix", path = "s" }
        export = "disk"
        tls-creds = "upstream"
        tls-hostname = "localhost"
        read-only = true
    "#;
    let daemon = start(creds.dir(), front).unwrap();
    assert_eq!(daemon.graph().nodes().len(), 1);
    daemon.stop().unwrap();
    let plain = front.replace("tls-creds", "# tls-creds").replace("tls-hostname", "# tls-hostname");
    let error = start(creds.dir(), &plain).map(drop).unwrap_err();
    assert!(error.contains("Server requires TLS"), "{error}");
    behind.stop().unwrap();
}

/// Certificates that a monitor names: for a server, with `nbdinfo` as its client, and for a node.
#[test]
fn objects_of_a_monitor_protect_a_server_and_a_node_that_is_its_client() {
    use serde_json::json;
    let creds = Creds::whole();
    let daemon = start(creds.dir(), "[node.disk]\ndriver = \"memory\"\nsize = \"1MiB\"\n").unwrap();
    let run = |command: &str, arguments: serde_json::Value| {
        daemon.execute(command, arguments).map_err(|error| error.desc)
    };
    let object = |id: &str, endpoint: &str, dir: &Path| json!({ "qom-type": "tls-creds-x509", "id": id, "endpoint": endpoint, "dir": dir });
    let error = run("object-add", object("far", "client", Path::new("/nowhere"))).unwrap_err();
    assert!(error.contains("Unable to access credentials /nowhere/ca-cert.pem"), "{error}");
    run("object-add", object("for-server", "server", creds.dir())).unwrap();
    run("object-add", object("for-client", "client", creds.dir())).unwrap();
    let socket = creds.dir().join("nbd.sock");
    let address = json!({ "type": "unix", "data": { "path": socket } });
    run("nbd-server-start", json!({ "addr": address, "tls-creds": "for-server" })).unwrap();
    run("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "disk", "writable": true }))
        .unwrap();

    let node = |creds: &str| {
        json!({ "driver": "nbd", "node-name": "near", "export": "disk", "tls-creds": creds, "tls-hostname": "localhost",
            "server": { "type": "unix", "path": socket } })
    };
    let error = run("blockdev-add", node("nobody")).unwrap_err();
    assert!(error.contains("No TLS credentials with id 'nobody'"), "{error}");
    let error = run("blockdev-add", node("for-server")).unwrap_err();
    assert!(error.contains("Expected TLS credentials for a client endpoint"), "{error}");
    run("blockdev-add", node("for-client")).unwrap();
    assert_eq!(daemon.graph().node("near").unwrap().info().size_bytes, 1 << 20);
    // They are what the object was: one that is gone is not found, and whoever has them keeps them.
    run("object-del", json!({ "id": "for-client" })).unwrap();
    run("blockdev-del", json!({ "node-name": "near" })).unwrap();
    run("blockdev-add", node("for-client")).unwrap_err();

    let uri = format!(
        "nbds+unix:///disk?socket={}&tls-certificates={}&tls-hostname=localhost",
        socket.display(),
        creds.dir().display()
    );
    match std::process::Command::new("nbdinfo").args(["--size", &uri]).output() {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr);
            assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "1048576", "{text}");
        }
        Err(error) => {
            assert!(std::env::var_os("CI").is_none(), "nbdinfo: {error}");
            eprintln!("SKIPPED: nbdinfo: {error}");
        }
    }
    daemon.stop().unwrap();
}

/// Who may connect is said by an object, which is asked when a client comes: whoever is refused is disconnected in TLS already.
#[test]
fn a_server_lets_in_only_those_whom_its_object_allows() {
    use serde_json::json;
    let creds = Creds::whole();
    let daemon = start(creds.dir(), "[node.disk]\ndriver = \"memory\"\nsize = \"1MiB\"\n").unwrap();
    let run = |command: &str, arguments: serde_json::Value| {
        daemon.execute(command, arguments).map_err(|error| error.desc)
    };
    let tls = |id: &str, endpoint: &str, verify: bool| {
        json!({ "qom-type": "tls-creds-x509", "id": id, "endpoint": endpoint,
        "dir": creds.dir(), "verify-peer": verify })
    };
    run("object-add", tls("for-server", "server", true)).unwrap();
    run("object-add", tls("for-anybody", "server", false)).unwrap();
    run("object-add", tls("for-client", "client", true)).unwrap();
    let socket = creds.dir().join("nbd.sock");
    let serve = |more: serde_json::Value| {
        let mut arguments =
            json!({ "addr": { "type": "unix", "data": { "path": socket } }, "tls-authz": "who" });
        arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        run("nbd-server-start", arguments)
    };
    for nameless in [json!({}), json!({ "tls-creds": "for-anybody" })] {
        let error = serve(nameless).unwrap_err();
        assert!(error.starts_with("Parameter 'tls-authz' needs 'tls-creds' with 'verify-peer'"), "{error}");
    }
    serve(json!({ "tls-creds": "for-server" })).unwrap();
    run("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "disk" })).unwrap();
    let comes = || {
        let node = json!({ "driver": "nbd", "node-name": "near", "export": "disk", "tls-creds": "for-client",
            "tls-hostname": "localhost", "server": { "type": "unix", "path": socket }, "read-only": true });
        let came = run("blockdev-add", node);
        if came.is_ok() {
            run("blockdev-del", json!({ "node-name": "near" })).unwrap();
        }
        came.map(drop)
    };
    comes().unwrap_err();
    run("object-add", json!({ "qom-type": "authz-simple", "id": "who", "identity": "CN=nobody" })).unwrap();
    comes().unwrap_err();
    run("qom-set", json!({ "path": "who", "property": "identity", "value": "CN=somebody" })).unwrap();
    comes().unwrap();
    // Nobody holds it: another may take its place.
    run("object-del", json!({ "id": "who" })).unwrap();
    comes().unwrap_err();
    let rules = json!([{ "match": "CN=some*", "policy": "allow", "format": "glob" }]);
    run("object-add", json!({ "qom-type": "authz-list", "id": "who", "rules": rules })).unwrap();
    comes().unwrap();
    daemon.stop().unwrap();
}

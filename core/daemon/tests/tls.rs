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

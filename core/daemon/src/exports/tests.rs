use super::*;

#[test]
fn a_bitmap_stays_as_long_as_an_export_shows_it() {
    let folder = tempfile::tempdir().unwrap();
    let text = r#"
        [node.disk]
        driver = "memory"
        size = "1MiB"
        [drive.vda]
        root = "disk"
        bitmaps = [{ name = "daily" }]
        [export.vda]
        type = "nbd"
        drive = "vda"
        socket = "vda.sock"
        bitmaps = ["daily"]
    "#;
    let (config, mistakes) = crate::config::Config::parse(&folder.path().join("vm.toml"), text);
    let daemon = crate::daemon::Daemon::start(&config, mistakes).unwrap();
    let remove = || async {
        let mut change = daemon.graph().change().await;
        change.remove_bitmap("vda", "daily")?;
        change.commit().await
    };
    daemon.engine().block_on_local(|| async {
        let refused = remove().await.unwrap_err().to_string();
        assert!(refused.contains("shown by export 'vda'"), "{refused}");
        daemon.inner().exports.remove("vda", true).await.unwrap();
        remove().await.unwrap();
    });
    daemon.stop().unwrap();
}

/// Monitors live on while bitmaps are put away at the end. An export that one of them added then took writes that no bitmap
/// recorded any more.
#[test]
fn nothing_is_served_any_more_once_the_end_has_begun() {
    let folder = tempfile::tempdir().unwrap();
    let disk = "[node.disk]\ndriver = \"memory\"\nsize = \"1MiB\"\n";
    let (config, mistakes) = crate::config::Config::parse(&folder.path().join("vm.toml"), disk);
    let daemon = crate::daemon::Daemon::start(&config, mistakes).unwrap();
    let socket = folder.path().join("nbd.sock");
    daemon.engine().block_on_local(|| async {
        let exports = &daemon.inner().exports;
        let address = Address::Unix(socket.clone());
        exports.start_server(address.clone(), ServerOptions::default()).await.unwrap();
        assert!(exports.close().await.is_empty());
        let refused = exports.start_server(address.clone(), ServerOptions::default()).await;
        assert_eq!(refused.unwrap_err().to_string(), "the program is ending");
        let new = NewExport {
            id: "vda".into(),
            target: "disk".into(),
            name: "vda".into(),
            description: String::new(),
            writable: true,
            writethrough: false,
            bitmaps: Vec::new(),
            allocation_depth: false,
            tls: None,
            allow_inactive: false,
            thread: None,
        };
        let refused = exports.start(vec![(address, new.clone())], Reserved::default()).await;
        assert_eq!(refused.unwrap_err().to_string(), "the program is ending");
        assert_eq!(exports.add(new).await.unwrap_err().to_string(), "the program is ending");
    });
    assert!(!socket.exists());
    daemon.stop().unwrap();
}

#[test]
fn a_uri_escapes_what_clients_would_take_apart() {
    let unix = Socket::Unix("/run/a b?/x.sock".into());
    assert_eq!(uri(&unix, "v&da"), "nbd+unix:///v%26da?socket=/run/a%20b%3F/x.sock");
    assert_eq!(uri(&Socket::Tcp("0.0.0.0:10809".parse().unwrap()), ""), "nbd://127.0.0.1:10809/");
    assert_eq!(uri(&Socket::Tcp("[::1]:1".parse().unwrap()), "d"), "nbd://[::1]:1/d");
}

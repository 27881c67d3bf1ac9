use super::*;

/// A writable export of that name.
fn export_of(target: &str, id: &str) -> NewExport {
    NewExport {
        id: id.into(),
        target: target.into(),
        name: id.into(),
        description: String::new(),
        writable: true,
        writethrough: false,
        bitmaps: Vec::new(),
        live_bitmaps: false,
        allocation_depth: false,
        tls: None,
        allow_inactive: false,
        thread: None,
    }
}

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
        let new = export_of("disk", "vda");
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

/// An export that could not be served took the others with it by dropping their servers: what clients that were quick had open
/// stayed open, and files stayed locked for writers that were gone.
#[test]
fn a_start_that_fails_leaves_no_user_of_the_exports_that_had_come() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("a.img"), [0; 4096]).unwrap();
    let disk = "[node.disk]\ndriver = \"raw\"\nfile = \"a.img\"\n";
    let (config, mistakes) = crate::config::Config::parse(&folder.path().join("vm.toml"), disk);
    let daemon = crate::daemon::Daemon::start(&config, mistakes).unwrap();
    let new = |id: &str| export_of("disk", id);
    let locks = || {
        let nodes = daemon.graph().nodes();
        let file = nodes.iter().find(|view| view.node.driver_name() == "file").unwrap();
        file.node.open_node().details()["locks"].clone()
    };
    let before = locks();
    // In the order of their addresses: the first one listens by the time that the second cannot.
    let (good, bad) = (folder.path().join("a.sock"), folder.path().join("nowhere/b.sock"));
    daemon.engine().block_on_local(|| async {
        let exports = &daemon.inner().exports;
        let both = vec![(Address::Unix(good.clone()), new("a")), (Address::Unix(bad), new("b"))];
        let refused = exports.start(both, Reserved::default()).await.unwrap_err().to_string();
        assert!(refused.contains("nowhere/b.sock"), "{refused}");
        assert!(exports.list().is_empty());
        assert_eq!(locks(), before, "nobody writes any more");
        let users = daemon.graph().edges();
        assert!(!users.iter().any(|edge| format!("{:?}", edge.parent).contains("export")), "{users:?}");
        assert!(!good.exists());
        exports.start(vec![(Address::Unix(good.clone()), new("a"))], Reserved::default()).await.unwrap();
    });
    daemon.stop().unwrap();
}

/// It looked whether its id was free, and then waited for the graph. A transaction that held the graph meanwhile published an export of
/// that id, which was served for ever afterwards: its entry was the other one's by then.
#[test]
fn an_export_that_waits_for_the_graph_keeps_its_id_and_name() {
    let folder = tempfile::tempdir().unwrap();
    let disk = "[node.disk]\ndriver = \"memory\"\nsize = \"1MiB\"\n";
    let (config, mistakes) = crate::config::Config::parse(&folder.path().join("vm.toml"), disk);
    let daemon = crate::daemon::Daemon::start(&config, mistakes).unwrap();
    let address = Address::Unix(folder.path().join("nbd.sock"));
    daemon.engine().block_on_local(|| async {
        let exports = &daemon.inner().exports;
        exports.start_server(address.clone(), ServerOptions::default()).await.unwrap();
        for by_a_file in [false, true] {
            let mut change = daemon.graph().change().await;
            let new = export_of("disk", "vda");
            let mut waiting: std::pin::Pin<Box<dyn Future<Output = Result<()>>>> = match by_a_file {
                false => Box::pin(exports.add(new)),
                true => Box::pin(exports.start(vec![(address.clone(), new)], Reserved::default())),
            };
            assert!(futures::poll!(&mut waiting).is_pending(), "the graph is being changed");
            for (id, name) in [("vda", "other"), ("other", "vda")] {
                let other = NewExport { name: name.into(), ..export_of("disk", id) };
                assert!(Coming::prepare(daemon.inner().clone(), &mut change, other, &[]).is_err(), "{id}");
            }
            change.give_up().await;
            waiting.await.unwrap();
            assert_eq!(exports.list().len(), 1);
            exports.remove("vda", false).await.unwrap();
            // Nothing is kept free any more.
            exports.add(export_of("disk", "vda")).await.unwrap();
            exports.remove("vda", false).await.unwrap();
        }
    });
    daemon.stop().unwrap();
}

//! The servers of others, with everything that they can leave out.

use crate::kit::{Folder, Server, ask, engine, errno, have, open, open_read_only, text, write};
use driveline_bitmap::{Bitmap, BitmapName};
use driveline_drivers::{
    MemoryDriver, NbdDriver,
    conformance::{Check, check},
};
use driveline_engine::Engine;
use driveline_graph::{Graph, GraphOptions, Kind, RootOptions};
use driveline_nbd::{Address, Export, ServerOptions};
use driveline_op::{flag, info, op, status};
use serde_json::{Value, json};
use std::{fs, sync::Arc};

const MIB: u64 = 1 << 20;

fn conforms(engine: &Engine, seed: u64, options: Value) -> Value {
    engine.block_on_local(|| async move {
        let node = open(options).await.unwrap();
        let check_ = Check { seed, steps: 60, size_bytes_max: MIB, ..Check::default() };
        check(&node.edge, check_).await;
        let details = node.node.details();
        node.node.close(&[]).await.unwrap();
        details
    })
}

#[test]
fn nbdkit_conforms_whatever_it_leaves_out() {
    if !have("nbdkit") {
        return;
    }
    let engine = engine();
    for (seed, arguments) in [
        &["memory", "2M"][..],
        &["--no-sr", "memory", "2M"],
        &["--filter=noextents", "memory", "2M"],
        &["--filter=nozero", "memory", "2M"],
        &["--filter=nozero", "--filter=fua", "memory", "2M"],
        &["--filter=fua", "memory", "2M", "fuamode=emulate"],
        &["--filter=nozero", "--filter=nocache", "memory", "2M", "zeromode=notrim", "cachemode=none"],
        &[
            "--filter=blocksize-policy",
            "memory",
            "2M",
            "blocksize-minimum=4K",
            "blocksize-preferred=4K",
            "blocksize-maximum=64K",
            "blocksize-error-policy=error",
        ],
        &["--filter=multi-conn", "memory", "2M", "multi-conn-mode=disable"],
        &["--filter=delay", "memory", "2M", "rdelay=1ms", "wdelay=1ms"],
        &["-t", "1", "memory", "1000001"],
    ]
    .into_iter()
    .enumerate()
    {
        let folder = Folder::new();
        let _server = Server::nbdkit(&folder.socket(), arguments);
        let details = conforms(&engine, seed as u64, folder.options(json!({})));
        assert_eq!(details["structured-replies"], arguments[0] != "--no-sr", "{arguments:?}");
        let status = details["block-status"] == "base:allocation";
        assert_eq!(status, arguments[0] != "--no-sr", "{arguments:?}");
    }
}

#[test]
fn qemu_conforms_and_extended_headers_are_used() {
    if !have("qemu-nbd") {
        return;
    }
    let (engine, folder) = (engine(), Folder::new());
    let image = folder.path("disk");
    fs::File::create(&image).unwrap().set_len(2 * MIB).unwrap();
    let _server =
        Server::qemu_nbd(&folder.socket(), &["-f", "raw", "-e", "4", "--discard=unmap", text(&image)]);
    let details = conforms(&engine, 1, folder.options(json!({})));
    assert_eq!(details["extended-headers"], true);
    assert!(details["filename"].as_str().unwrap().starts_with("nbd+unix:///?socket="));
}

/// A disk of ours on a server of ours.
async fn serve(
    engine: &Engine,
    folder: &Folder,
    writable: bool,
    bitmap: Option<Arc<Bitmap>>,
) -> (driveline_nbd::Server, Graph) {
    let graph = Graph::new(GraphOptions::default());
    graph.register(Arc::new(MemoryDriver::default())).unwrap();
    let disk = json!({ "driver": "memory", "size": "2MiB", "node-name": "disk" });
    let mut change = graph.change().await;
    change.add_node(graph.parse(disk.as_object().unwrap().clone(), &[]).unwrap()).await.unwrap();
    change.commit().await.unwrap();
    let root = graph.open_root("disk", RootOptions::writer("export")).await.unwrap();
    let server = driveline_nbd::Server::new(engine.handle(), ServerOptions::default());
    let mut export = Export::new(root).writable(writable);
    export.bitmaps.extend(bitmap);
    server.add_export("disk", export).unwrap();
    server.listen(&Address::Unix(folder.socket())).unwrap();
    (server, graph)
}

#[test]
fn our_own_server_conforms_on_several_connections() {
    let (engine, folder) = (engine(), Folder::new());
    let (server, graph) = engine.block_on(serve(&engine, &folder, true, None));
    let options = folder.options(json!({ "export": "disk" }));
    conforms(&engine, 2, options.clone());
    // From both threads of the engine at once: each has a connection of its own in the end.
    let node = engine.block_on_local(|| open(options)).unwrap();
    let mut round = 0;
    while node.node.details()["connections"] != 2 {
        round += 1;
        assert!(round < 10_000, "the second thread connects");
        let tasks = [0, 1].map(|thread| {
            let node = node.clone();
            engine.handle().spawn_on(thread, move || async move {
                let offset = thread as u64 * MIB;
                let data = vec![round as u8; 4096];
                assert_eq!(errno(&write(&node, offset, &data, 0).await), 0);
                let answer = ask(&node, op::READ, offset, 4096, 0).await;
                assert!(answer.result.is_ok() && answer.buffer[..] == data[..]);
            })
        });
        tasks.into_iter().for_each(|task| engine.block_on(task).unwrap());
    }
    engine.block_on(async {
        node.node.close(&[]).await.unwrap();
        assert_eq!(errno(&ask(&node, op::READ, 0, 1, 0).await), 5, "a closed node fails");
        server.close().await;
        graph.close().await.unwrap();
    });
}

#[test]
fn a_bitmap_can_stand_for_block_status() {
    let (engine, folder) = (engine(), Folder::new());
    let bitmap = Arc::new(Bitmap::new(BitmapName::new("daily").unwrap(), "64KiB".parse().unwrap(), 2 * MIB));
    bitmap.mark(128 << 10..192 << 10);
    let (server, graph) = engine.block_on(serve(&engine, &folder, false, Some(bitmap)));
    let options = |context: &str| folder.options(json!({ "export": "disk", "x-dirty-bitmap": context }));
    let (daily, nothing) = (options("qemu:dirty-bitmap:daily"), options("qemu:dirty-bitmap:weekly"));
    let nothing =
        json!({ "server": nothing["server"], "export": "disk", "x-dirty-bitmap": nothing["x-dirty-bitmap"] });
    engine.block_on_local(|| async move {
        let node = open_read_only(daily).await.unwrap();
        let (mut at, mut dirty) = (0, Vec::new());
        while at < 2 * MIB {
            let status = ask(&node, op::BLOCK_STATUS, at, 2 * MIB - at, 0).await.status;
            if status.flags & status::DATA == 0 {
                dirty.push((at, status.length));
            }
            at += status.length;
        }
        assert_eq!(dirty, [(128 << 10, 64 << 10)], "as in QEMU, what is dirty is no data");
        node.node.close(&[]).await.unwrap();
        let error = open_read_only(nothing).await.unwrap_err().to_string();
        assert_eq!(error, "requested x-dirty-bitmap qemu:dirty-bitmap:weekly not found");
        server.close().await;
        graph.close().await.unwrap();
    });
}

/// The story: with `read-only: false` beside it, as clients send it that spell out every default, `auto-read-only` was forgotten.
#[test]
fn auto_read_only_makes_a_node_of_a_read_only_export_read_only() {
    if !have("nbdkit") {
        return;
    }
    let (engine, folder) = (engine(), Folder::new());
    let _server = Server::nbdkit(&folder.socket(), &["-r", "memory", "1M"]);
    engine.block_on_local(|| async move {
        let graph = Graph::new(GraphOptions::default());
        graph.register(Arc::new(NbdDriver::default())).unwrap();
        let add = async |more: Value| {
            let mut options = folder.options(more);
            (options["driver"], options["node-name"]) = (json!("nbd"), json!("n"));
            let mut change = graph.change().await;
            change.add_node(graph.parse(options.as_object().unwrap().clone(), &[]).unwrap()).await?;
            change.commit().await
        };
        for refused in [json!({}), json!({ "read-only": false, "auto-read-only": false })] {
            let error = add(refused).await.unwrap_err();
            assert_eq!((error.kind(), error.message()), (Kind::NotPermitted, "NBD export is read-only"));
        }
        for taken in
            [json!({ "auto-read-only": true }), json!({ "auto-read-only": true, "read-only": false })]
        {
            add(taken).await.unwrap();
            assert!(graph.view_node("n").unwrap().read_only);
            let error = graph.open_root("n", RootOptions::writer("a writer")).await.unwrap_err();
            assert_eq!(error.kind(), Kind::NotPermitted, "{error}");
            let mut change = graph.change().await;
            change.set_read_only("n", false).unwrap();
            let error = change.commit().await.unwrap_err();
            assert_eq!(error.message(), "Can't reopen read-only NBD mount as read/write");
            let mut change = graph.change().await;
            change.remove_node("n").unwrap();
            change.commit().await.unwrap();
        }
    });
}

#[test]
fn a_read_only_export_is_opened_read_only() {
    if !have("nbdkit") {
        return;
    }
    let (engine, folder) = (engine(), Folder::new());
    let _server =
        Server::nbdkit(&folder.socket(), &["-r", "--filter=protect", "memory", "1M", "protect=0-100"]);
    let options = folder.options(json!({}));
    engine.block_on_local(|| async move {
        let error = open(options.clone()).await.unwrap_err();
        assert_eq!((error.kind(), error.message()), (Kind::NotPermitted, "NBD export is read-only"));
        let node = open_read_only(options).await.unwrap();
        assert_ne!(node.edge.info().flags & info::READ_ONLY, 0);
        assert_eq!(errno(&write(&node, 0, &[1], 0).await), libc::EPERM);
        assert!(node.node.set_read_only(&[], false).await.is_err());
        assert_eq!(errno(&ask(&node, op::READ, 0, 512, 0).await), 0);
        assert_eq!(node.node.resize(&[], MIB).await.map_err(|error| error.kind()), Ok(()));
        assert_eq!(node.node.resize(&[], 0).await.unwrap_err().message(), "Cannot resize NBD nodes");
        node.node.close(&[]).await.unwrap();
    });
}

#[test]
fn the_server_s_errors_arrive_as_they_are() {
    if !have("nbdkit") {
        return;
    }
    let (engine, folder) = (engine(), Folder::new());
    let arguments = [
        "--filter=error",
        "memory",
        "1M",
        "error-pread=EIO",
        "error-pread-rate=100%",
        "error-pwrite=ENOSPC",
        "error-pwrite-rate=100%",
        "error-zero=EINVAL",
        "error-zero-rate=100%",
        "error-extents=EPERM",
        "error-extents-rate=100%",
    ];
    let _server = Server::nbdkit(&folder.socket(), &arguments);
    let options = folder.options(json!({}));
    engine.block_on_local(|| async move {
        let node = open(options).await.unwrap();
        assert_eq!(errno(&ask(&node, op::READ, 0, 512, 0).await), libc::EIO);
        assert_eq!(errno(&write(&node, 0, &[1; 512], flag::FUA).await), libc::ENOSPC);
        assert_eq!(errno(&ask(&node, op::WRITE_ZEROES, 0, 512, 0).await), libc::EINVAL);
        assert_eq!(errno(&ask(&node, op::BLOCK_STATUS, 0, 512, 0).await), libc::EPERM);
        assert_eq!(errno(&ask(&node, op::FLUSH, 0, 0, 0).await), 0, "it goes on");
        assert_eq!(errno(&ask(&node, op::READ, MIB - 1, 2, 0).await), libc::EINVAL);
        assert_eq!(errno(&write(&node, MIB, &[1], 0).await), libc::ENOSPC);
        node.node.close(&[]).await.unwrap();
    });
}

#[test]
fn an_export_that_is_not_there_is_named() {
    let (engine, folder) = (engine(), Folder::new());
    let (server, graph) = engine.block_on(serve(&engine, &folder, true, None));
    let options = json!({ "server": { "type": "unix", "path": folder.socket() }, "export": "other" });
    engine.block_on_local(|| async move {
        let error = open(options).await.unwrap_err().to_string();
        assert!(error.starts_with("Requested export not available"), "{error}");
        server.close().await;
        graph.close().await.unwrap();
    });
}

//! Who waits for whom.

use super::*;
use driveline_graph::{GraphOptions, RootOptions};
use futures::FutureExt;

fn world() -> (tempfile::TempDir, Graph, Arc<Stores>) {
    let graph = Graph::new(GraphOptions::default());
    let stores = Stores::new(&graph).unwrap();
    (tempfile::tempdir().unwrap(), graph, stores)
}

/// Whoever followed the graph told an image that its bitmaps are in use beside it, while a removal of its node had just put
/// them into it, and was about to remove what is beside it.
#[test]
fn bitmaps_are_found_followed_and_released_by_one_at_a_time() {
    let (_directory, _graph, stores) = world();
    let turn = stores.turn.try_lock().unwrap();
    let nodes = ["image".to_owned()];
    let mut going = Box::pin(stores.going(&nodes));
    assert!(going.as_mut().now_or_never().is_none(), "it waits for its turn");
    let kept = stores.add(Owner::Node("image".into()), Place::File("image.dlbitmaps".into()), true);
    let mut find = Box::pin(stores.find_for(&kept, None));
    assert!(find.as_mut().now_or_never().is_none(), "it waits for its turn");
    drop(turn);
    drop(going.now_or_never().expect("it is its turn").unwrap());
}

/// A store that was opened in the middle of another change had no batch open, so the end of that change's batch was an error of
/// it, and the change (perhaps the end of a job) was undone.
#[test]
fn a_store_that_is_found_in_the_middle_of_a_change_is_no_error_of_that() {
    let (directory, _graph, stores) = world();
    let place = Place::File(directory.path().join("vda.dlbitmaps"));
    let add = || stores.add(Owner::Drive("vda".into()), place.clone(), true);
    let before = add();
    before.store(&stores, 1 << 20).unwrap();
    before.inner.lock().store.take().unwrap().close_clean().unwrap();

    for early in [true, false] {
        let kept = early.then(add);
        let clerk = stores.clerk();
        clerk.begin_batch();
        let kept = kept.unwrap_or_else(add);
        let (mut opened, _) = stores.open_stores(&kept, &place).unwrap();
        stores.take_store(&kept, opened.remove(0), None, &mut Vec::new()).unwrap();
        clerk.end_batch().unwrap();
        let store = kept.inner.lock().store.take().expect("it keeps the bitmaps");
        store.close_clean().expect("no batch is open");
    }
}

#[test]
fn a_flush_waits_for_the_change_that_is_being_made() {
    let (directory, graph, stores) = world();
    let kept =
        stores.add(Owner::Drive("vda".into()), Place::File(directory.path().join("vda.dlbitmaps")), true);
    kept.store(&stores, 1 << 20).unwrap();
    let change = graph.change().now_or_never().unwrap();
    let mut flush = Box::pin(stores.flush("vda"));
    assert!(flush.as_mut().now_or_never().is_none(), "a change has a batch open, or may soon");
    drop(change);
    flush.now_or_never().expect("nothing is in its way").unwrap();
}

/// A client that came after the bitmaps of an image were put into it, and before its node was removed, kept that: the bitmaps were
/// found again, without what the client had written meanwhile.
#[test]
fn whoever_comes_while_a_node_goes_finds_it_whole_or_not_at_all() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("a.qcow2");
    let options = driveline_drivers::qcow2::CreateOptions::new(1 << 20);
    driveline_drivers::qcow2::create_file(&image, &options).unwrap();
    let text = "[node.image]\ndriver = \"qcow2\"\nfile = \"a.qcow2\"\n";
    let (config, mistakes) = crate::config::Config::parse(&directory.path().join("vm.toml"), text);
    let daemon = crate::daemon::Daemon::start(&config, mistakes).unwrap();
    let add = serde_json::json!({ "node": "image", "name": "daily", "persistent": true });
    daemon.execute("block-dirty-bitmap-add", add).unwrap();
    daemon.engine().block_on_local(|| async {
        let (graph, monitor) = (daemon.graph(), daemon.inner().monitor());
        let change = graph.change().await;
        let del = serde_json::json!({ "node-name": "image" });
        let mut del = Box::pin(monitor.execute("blockdev-del", del));
        assert!(del.as_mut().now_or_never().is_none(), "a change is under way");
        let guest = async {
            let root = graph.open_root("image", RootOptions::writer("a guest")).await?;
            root.write(0, &[1; 512], 0).await
        };
        // Somebody else has added a node, and looks for bitmaps.
        let mut looks = Box::pin(daemon.inner().stores.find_added());
        assert!(looks.as_mut().now_or_never().is_none(), "the bitmaps are on their way");
        let mut guest = Box::pin(guest);
        assert!(guest.as_mut().now_or_never().is_none(), "a change is under way");
        drop(change);
        let (gone, written, _) = futures::join!(del, guest, looks);
        match graph.bitmap("image", "daily") {
            Ok(bitmap) => assert_eq!(bitmap.bits().dirty_bytes() > 0, written.is_ok(), "{gone:?}"),
            Err(_) => assert!(gone.is_ok() && written.is_err(), "{gone:?} {written:?}"),
        }
    });
    daemon.stop().unwrap();
}

/// A change that failed after the bitmaps had been put into their image left that as if nobody recorded any more: after a kill it was
/// believed, without what was written meanwhile.
#[test]
fn a_node_that_does_not_go_after_all_has_its_bitmaps_and_its_image_knows_them_in_use() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("a.qcow2");
    let options = driveline_drivers::qcow2::CreateOptions::new(1 << 20);
    driveline_drivers::qcow2::create_file(&image, &options).unwrap();
    let text = "[node.image]\ndriver = \"qcow2\"\nfile = \"a.qcow2\"\n";
    let (config, mistakes) = crate::config::Config::parse(&directory.path().join("vm.toml"), text);
    let daemon = crate::daemon::Daemon::start(&config, mistakes).unwrap();
    let add = serde_json::json!({ "node": "image", "name": "daily", "persistent": true });
    daemon.execute("block-dirty-bitmap-add", add).unwrap();
    let in_use = |stored: driveline_graph::StoredBitmaps| stored.bitmaps[0].in_use;
    for inactive in [false, true] {
        daemon.engine().block_on_local(|| async {
            let (graph, stores) = (daemon.graph(), &daemon.inner().stores);
            let nodes = if inactive { Vec::new() } else { vec!["image".to_owned()] };
            let mut going = stores.going(&nodes).await.unwrap();
            let mut change = graph.change().await;
            if inactive {
                driveline_qmp::NodesGoing::stage_inactive(&mut going, &mut change, "image").unwrap();
            } else {
                assert!(going.put_away(&mut change, "image").unwrap());
            }
            let fails = move |open: Arc<dyn driveline_graph::OpenNode>, children: Vec<_>| {
                let fails = async move {
                    assert!(!in_use(open.stored_bitmaps(&children).await?), "they are put away by then");
                    Err(Error::io(5, "the disk"))
                };
                Box::pin(fails) as driveline_graph::BoxFuture<'static, Result<()>>
            };
            change.visit("image", fails).unwrap();
            let error = change.commit().await.unwrap_err();
            // Before anybody else has said it.
            let looks = graph.change().await;
            let (open, children) = looks.look_at("image").unwrap();
            assert!(in_use(open.stored_bitmaps(&children).await.unwrap()), "{error}");
            looks.give_up().await;
            going.end(false).await.unwrap();
            assert!(graph.bitmap("image", "daily").unwrap().is_recording());
            assert!(directory.path().join("a.qcow2.dlbitmaps").exists());
        });
    }
    daemon.execute("blockdev-del", serde_json::json!({ "node-name": "image" })).unwrap();
    daemon.stop().unwrap();
}

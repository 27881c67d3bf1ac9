//! Who waits for whom.

use super::*;
use driveline_graph::GraphOptions;
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
    let mut release = Box::pin(stores.release("image"));
    assert!(release.as_mut().now_or_never().is_none(), "it waits for its turn");
    let kept = stores.add(Owner::Node("image".into()), Place::File("image.dlbitmaps".into()), true);
    let mut find = Box::pin(stores.find_for(&kept, None));
    assert!(find.as_mut().now_or_never().is_none(), "it waits for its turn");
    drop(turn);
    release.now_or_never().expect("it is its turn").unwrap();
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

/// Between the moment when an image had its bitmaps back and the removal of its node, another monitor that added a node looked for
/// bitmaps, and found these again: then the node could not be removed, or the image was left with bitmaps that are in use.
#[test]
fn bitmaps_that_were_released_are_not_found_again_before_their_node_goes() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("a.qcow2");
    let options = driveline_drivers::qcow2::CreateOptions::new(1 << 20);
    driveline_drivers::qcow2::create_file(&image, &options).unwrap();
    let text = "[node.image]\ndriver = \"qcow2\"\nfile = \"a.qcow2\"\n";
    let (config, mistakes) = crate::config::Config::parse(&directory.path().join("vm.toml"), text);
    let daemon = crate::daemon::Daemon::start(&config, mistakes).unwrap();
    let add = serde_json::json!({ "node": "image", "name": "daily", "persistent": true });
    daemon.execute("block-dirty-bitmap-add", add).unwrap();
    let has = || daemon.graph().bitmap("image", "daily").is_ok();
    daemon.engine().block_on_local(|| async {
        let stores = &daemon.inner().stores;
        stores.release("image").await.unwrap();
        assert!(!has());
        // Somebody else adds a node.
        stores.find_added().await;
        assert!(!has(), "it is about to go");
        // It could not be removed after all.
        stores.stays("image");
        stores.find_added().await;
        assert!(has());
    });
    daemon.execute("blockdev-del", serde_json::json!({ "node-name": "image" })).unwrap();
    daemon.stop().unwrap();
}

//! A change of the graph drains what is above it: filters that hold requests back are told, if they are made for that.

use super::{sets::library, world::World};
use crate::harness::Daemon;
use driveline_graph::Result;
use futures::{
    FutureExt,
    executor::block_on,
    future::{join, join_all},
};
use serde_json::json;
use std::time::{Duration, Instant};

/// A change that drains `filter`.
async fn resize(world: &World) -> Result<()> {
    let mut change = world.graph.change().await;
    change.visit("filter", |_, _| Box::pin(async { Ok(()) }))?;
    change.commit().await
}

/// The story: a change above a throttle waited until all that it held had passed at its rate, and so did the guest.
#[test]
fn a_change_does_not_wait_for_the_queue_of_a_throttle() {
    let throttle = Daemon::program().with_file_name("libdriveline_filter_throttle.so");
    let world = World::new(&[&throttle]);
    let root = world.filter("throttle", json!({ "iops": 1 }));
    let started = Instant::now();
    let data = [7; 512];
    block_on(async {
        root.write(0, &data, 0).await.unwrap();
        let mut ten = Box::pin(join_all((1..=10).map(|at| root.write(at * 512, &data, 0))));
        // They are in its queue now, the first for most of a second yet.
        assert!(ten.as_mut().now_or_never().is_none());
        let (written, changed) = join(ten, resize(&world)).await;
        assert!(written.into_iter().all(|written| written.is_ok()));
        changed.unwrap();
    });
    assert_eq!(world.seen().len(), 11);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    // They were let go, not let off: who comes now is behind all of them.
    let mut next = Box::pin(root.write(0, &data, 0));
    assert!(next.as_mut().now_or_never().is_none());
    assert!(world.failures().is_empty(), "{:?}", world.failures());
}

#[test]
fn a_plugin_that_is_older_than_being_told_of_a_drain_is_waited_for() {
    let world = World::new(&[&library("old-1-2", "old-1-2")]);
    let root = world.filter("old-1-2", json!({}));
    block_on(async {
        let mut write = Box::pin(root.write(0, b"data", 0));
        assert!(write.as_mut().now_or_never().is_none());
        let (written, changed) = join(write, resize(&world)).await;
        written.unwrap();
        changed.unwrap();
        assert_eq!(&root.read(0..4).await.unwrap()[..], b"data");
    });
    assert_eq!(world.seen(), ["write 0+4", "read 0+4"]);
    assert!(world.failures().is_empty(), "{:?}", world.failures());
}

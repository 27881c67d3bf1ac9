//! Checkpoints: kept moments, and what changed between them.

use crate::kit::World;
use driveline_op::{Ask, Buffer, op};
use futures::FutureExt;
use serde_json::json;

#[test]
fn what_changed_between_two_checkpoints_is_told_and_shown_as_a_bitmap() {
    let (world, mut client) = World::with_disk();
    for (at, name) in ["monday", "tuesday", "wednesday"].into_iter().enumerate() {
        client.ok("x-driveline-checkpoint-create", json!({ "name": name, "drives": ["vda"] }));
        world.write("vda", (at as u64) << 17, &[1; 512]);
    }
    let delta = client
        .ok("x-driveline-checkpoint-delta", json!({ "drive": "vda", "from": "monday", "to": "wednesday" }));
    let area = |offset: u64| json!({ "offset": offset, "length": 65536 });
    let expected = json!({ "count": 131072, "granularity": 65536, "areas": [area(0), area(131072)] });
    assert_eq!(delta, expected);
    let rest = json!({ "drive": "vda", "from": "monday", "start": 131072, "bitmap": "since-monday" });
    let rest = client.ok("x-driveline-checkpoint-delta", rest);
    assert_eq!((&rest["count"], &rest["areas"]), (&json!(196608), &json!([area(131072), area(262144)])));
    let kept = client.ok("x-driveline-query-checkpoints", json!({}));
    let names: Vec<_> = kept.as_array().unwrap().iter().map(|kept| kept["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["monday", "tuesday", "wednesday"]);
    assert_eq!((&kept[0]["count"], &kept[2]["recording"]), (&json!(65536), &json!(true)));
    client.ok("x-driveline-checkpoint-delete", json!({ "name": "tuesday" }));
    let delta = client
        .ok("x-driveline-checkpoint-delta", json!({ "drive": "vda", "from": "monday", "to": "wednesday" }));
    assert_eq!(delta, expected);
}

/// The reply was counted before the change that makes the bitmap had drained the drive: a write in between was in the bitmap, and
/// not in the reply.
#[test]
fn what_is_told_is_what_the_bitmap_has() {
    let (world, mut client) = World::with_disk();
    client.ok("x-driveline-checkpoint-create", json!({ "name": "monday", "drives": ["vda"] }));
    let options = driveline_graph::RootOptions::writer("a guest");
    let guest = world.engine.block_on(world.graph.open_root("vda", options)).unwrap();
    let busy = world.engine.block_on(guest.enter());
    let told = std::thread::scope(|scope| {
        let ask = json!({ "drive": "vda", "from": "monday", "bitmap": "since-monday" });
        let told = scope.spawn(move || client.ok("x-driveline-checkpoint-delta", ask));
        // Nobody else comes in once the change drains the drive.
        while guest.enter().now_or_never().is_some() {
            std::thread::yield_now();
        }
        let ask = Ask { op: op::WRITE, ..Ask::default() };
        world.engine.block_on(busy.submit(ask, Buffer::new(512))).result.unwrap();
        drop(busy);
        told.join().unwrap()
    });
    assert_eq!(told["count"], 65536);
    assert_eq!(world.graph.bitmap("vda", "since-monday").unwrap().bits().dirty_bytes(), 65536);
}

#[test]
fn nobody_else_changes_the_bitmaps_of_checkpoints() {
    let (_world, mut client) = World::with_disk();
    client.ok("x-driveline-checkpoint-create", json!({ "name": "monday", "drives": ["vda"] }));
    let kept = client.ok("x-driveline-query-checkpoints", json!({ "drive": "vda" }));
    let bitmap = json!({ "node": "vda", "name": kept[0]["bitmap"] });
    for command in ["clear", "remove", "disable"] {
        let refused = client.wrong(&format!("block-dirty-bitmap-{command}"), bitmap.clone());
        assert!(refused.contains("belongs to checkpoint 'monday'"), "{refused}");
    }
    // A job that would make it clean is no better.
    let by = json!({ "device": "vda", "target": "disk", "sync": "incremental", "bitmap": kept[0]["bitmap"] });
    for command in ["blockdev-backup", "blockdev-mirror"] {
        let refused = client.wrong(command, by.clone());
        assert!(refused.contains("belongs to checkpoint 'monday'"), "{command}: {refused}");
    }
    for (command, arguments, expected) in [
        ("create", json!({ "name": "monday", "drives": ["vda"] }), "'vda' has a checkpoint 'monday' already"),
        ("create", json!({ "name": "x", "drives": [] }), "Parameter 'drives' expects at least one drive"),
        ("create", json!({ "name": "x", "drives": ["vdx"] }), "Cannot find device='vdx' nor node-name='vdx'"),
        ("delete", json!({ "name": "nonday" }), "Checkpoint 'nonday' not found"),
        (
            "delta",
            json!({ "drive": "vda", "from": "nonday" }),
            "'vda' has no checkpoint 'nonday'; did you mean 'monday'?",
        ),
    ] {
        let refused = client.wrong(&format!("x-driveline-checkpoint-{command}"), arguments);
        assert_eq!(refused, expected);
    }
    // One moment with other things, or none.
    let actions = json!({ "actions": [
        { "type": "x-driveline-checkpoint-create", "data": { "name": "tuesday", "drives": ["vda"] } },
        { "type": "abort", "data": {} },
    ] });
    client.wrong("transaction", actions);
    let action = |name: &str| json!({ "type": "x-driveline-checkpoint-create", "data": { "name": name, "drives": ["vda"] } });
    let twice = client.wrong("transaction", json!({ "actions": [action("a"), action("b")] }));
    assert_eq!(twice, "A transaction has at most one action on checkpoints of 'vda'");
    assert_eq!(client.ok("x-driveline-query-checkpoints", json!({})).as_array().unwrap().len(), 1);
}

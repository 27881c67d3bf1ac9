//! Checkpoints: kept moments, and what changed between them.

use crate::kit::World;
use driveline_op::{Ask, Buffer, op};
use futures::FutureExt;
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::sync::Arc;

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

fn create(name: &str, drive: &str) -> Value {
    json!({ "type": "x-driveline-checkpoint-create", "data": { "name": name, "drives": [drive] } })
}

/// By the name of its drive and by that of its node two checkpoints came into one transaction: both ended the same epoch, and what
/// was written afterwards was in both of theirs.
#[test]
fn the_second_name_of_a_drive_makes_no_second_action_on_its_checkpoints() {
    let (_world, mut client) = World::with_disk();
    client.ok("x-driveline-checkpoint-create", json!({ "name": "monday", "drives": ["vda"] }));
    let idle = json!({ "options": { "driver": "idle", "node-name": "idle" }, "above": "vda" });
    client.ok("x-driveline-blockdev-insert-filter", idle);
    for (one, other) in [("vda", "disk"), ("idle", "vda")] {
        let twice = client.wrong("transaction", json!({ "actions": [create("a", one), create("b", other)] }));
        assert_eq!(twice, format!("A transaction has at most one action on checkpoints of '{other}'"));
    }
    let both = json!({ "name": "a", "drives": ["vda", "disk"] });
    let twice = client.wrong("x-driveline-checkpoint-create", both);
    assert_eq!(twice, "A transaction has at most one action on checkpoints of 'disk'");
    assert_eq!(client.ok("x-driveline-query-checkpoints", json!({})).as_array().unwrap().len(), 1);
}

/// A client gave a bitmap the name of an epoch: then it was one, and no further checkpoint could be made after its number.
#[test]
fn a_client_makes_no_epoch_by_giving_a_bitmap_its_name() {
    let (_world, mut client) = World::with_disk();
    client.ok("x-driveline-checkpoint-create", json!({ "name": "monday", "drives": ["vda"] }));
    client.ok("block-dirty-bitmap-add", json!({ "node": "vda", "name": "plain" }));
    let forged = "checkpoint:18446744073709551615:0:1:forged";
    let expected = format!("Bitmap name '{forged}' is not allowed: only checkpoints have such names");
    let rename = json!({ "node": "vda", "name": "plain", "new-name": forged });
    assert_eq!(client.wrong("x-driveline-block-dirty-bitmap-rename", rename), expected);
    let delta = json!({ "drive": "vda", "from": "monday", "bitmap": forged });
    assert_eq!(client.wrong("x-driveline-checkpoint-delta", delta), expected);
    client.wrong("block-dirty-bitmap-add", json!({ "node": "vda", "name": forged }));
    client.ok("x-driveline-checkpoint-create", json!({ "name": "tuesday", "drives": ["vda"] }));
}

/// With a view of `monday` that one was deleted, and another `monday` made: it was shown with the view of the first, whose data were
/// another moment's.
#[test]
fn a_checkpoint_with_a_view_is_released_before_it_is_deleted() {
    let (world, mut client) = World::with_disk();
    let viewed = json!({ "name": "monday", "drives": ["vda"], "view": { "scratch": world.folder.path(), "export": false } });
    client.ok("x-driveline-checkpoint-create", viewed);
    for drives in [json!({}), json!({ "drives": ["vda"] }), json!({ "drives": ["disk"] })] {
        let mut delete = json!({ "name": "monday" });
        delete.as_object_mut().unwrap().extend(drives.as_object().unwrap().clone());
        let refused = client.wrong("x-driveline-checkpoint-delete", delete);
        assert!(refused.starts_with("Checkpoint 'monday' has a view: release it first"), "{refused}");
    }
    client.ok("x-driveline-checkpoint-release", json!({ "name": "monday" }));
    client.ok("x-driveline-checkpoint-delete", json!({ "name": "monday" }));
    client.ok("x-driveline-checkpoint-create", json!({ "name": "monday", "drives": ["vda"] }));
    assert_eq!(client.ok("x-driveline-query-checkpoints", json!({}))[0].get("view"), None);
}

/// The export of a view was refused, and its nodes could not be taken away then: they stayed, and nobody could release them.
#[test]
fn a_view_that_cannot_be_taken_back_can_be_released() {
    let (world, mut client) = World::with_disk();
    client.ok("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": "/tmp/x.sock" } } }));
    client.ok("x-driveline-checkpoint-create", json!({ "name": "sunday", "drives": ["vda"] }));
    let (graph, used) = (world.graph.clone(), Arc::new(Mutex::new(None)));
    let user = used.clone();
    *world.program.refuses.lock() = Some(Box::new(move |export| {
        let bitmap = graph.bitmap(&export.node_name, "since-sunday").unwrap();
        *user.lock() = Some(bitmap.begin_use("somebody").unwrap());
    }));
    let viewed = json!({ "name": "monday", "drives": ["vda"],
        "view": { "scratch": world.folder.path(), "base": "sunday" } });
    assert_eq!(client.wrong("x-driveline-checkpoint-create", viewed), "no more exports");
    let shown = client.ok("x-driveline-query-checkpoints", json!({}));
    assert!(shown[1]["view"].is_object(), "{shown}");
    *used.lock() = None;
    client.ok("x-driveline-checkpoint-release", json!({ "name": "monday" }));
    assert_eq!(client.ok("query-named-block-nodes", json!({})).as_array().unwrap().len(), 1);
}

//! Bitmaps, alone and in transactions.

use crate::kit::{Client, World};
use serde_json::{Value, json};

/// The bitmaps of `disk`: name, dirty bytes, recording.
fn bitmaps(client: &mut Client, node: &str) -> Vec<(String, u64, bool)> {
    let nodes = client.ok("query-named-block-nodes", json!({ "flat": true }));
    let node = nodes.as_array().unwrap().iter().find(|n| n["node-name"] == node).unwrap();
    let bitmap = |b: &Value| {
        let name = b["name"].as_str().unwrap().to_owned();
        (name, b["count"].as_u64().unwrap(), b["recording"].as_bool().unwrap())
    };
    node["dirty-bitmaps"].as_array().map(|all| all.iter().map(bitmap).collect()).unwrap_or_default()
}

fn named(name: &str, count: u64, recording: bool) -> (String, u64, bool) {
    (name.to_owned(), count, recording)
}

#[test]
fn a_bitmap_is_added_records_and_is_removed() {
    let (world, mut client) = World::with_disk();
    client.ok("block-dirty-bitmap-add", json!({ "node": "disk", "name": "b", "granularity": 4096 }));
    client.ok(
        "block-dirty-bitmap-add",
        json!({ "node": "vda", "name": "off", "disabled": true, "persistent": false }),
    );
    world.write("vda", 5000, &[1; 5000]);
    assert_eq!(bitmaps(&mut client, "disk"), [named("b", 8192, true), named("off", 0, false)]);

    let both = |name: &str| json!({ "node": "vda", "name": name });
    client.ok("block-dirty-bitmap-enable", both("off"));
    client.ok("block-dirty-bitmap-disable", both("b"));
    world.write("vda", 0, &[1; 512]);
    assert_eq!(bitmaps(&mut client, "disk"), [named("b", 8192, false), named("off", 65536, true)]);

    client.ok("block-dirty-bitmap-clear", both("off"));
    let merge = json!({ "node": "disk", "target": "off", "bitmaps": ["b", { "node": "vda", "name": "b" }] });
    client.ok("block-dirty-bitmap-merge", merge);
    let rename = json!({ "node": "vda", "name": "off", "new-name": "weekly" });
    let taken = json!({ "node": "vda", "name": "off", "new-name": "b" });
    let said = client.wrong("x-driveline-block-dirty-bitmap-rename", taken);
    assert_eq!(said, "Bitmap already exists: b", "it is the new name that is taken");
    client.ok("x-driveline-block-dirty-bitmap-rename", rename);
    client.ok("block-dirty-bitmap-remove", both("b"));
    assert_eq!(bitmaps(&mut client, "disk"), [named("weekly", 65536, true)]);

    client.ok("x-driveline-block-dirty-bitmap-populate", both("weekly"));
    let drive = client.ok("query-block", json!({}));
    let inserted = &drive[0]["inserted"];
    assert_eq!((&drive[0]["device"], &inserted["node-name"]), (&json!("vda"), &json!("disk")));
    // All of a memory node is allocated.
    let expected = json!({ "name": "weekly", "count": 1 << 20, "granularity": 65536, "recording": true, "busy": false,
        "persistent": false, "x-driveline-view": "drive" });
    assert_eq!(inserted["dirty-bitmaps"], json!([expected]));
}

#[test]
fn a_bitmap_moves_to_a_filter_and_back() {
    let (world, mut client) = World::with_disk();
    client.ok("block-dirty-bitmap-add", json!({ "node": "vda", "name": "daily" }));
    let filter = json!({ "options": { "driver": "idle", "node-name": "f" }, "above": "vda" });
    client.ok("x-driveline-blockdev-insert-filter", filter);
    client
        .ok("x-driveline-block-dirty-bitmap-move", json!({ "node": "disk", "name": "daily", "target": "f" }));
    world.write("vda", 0, &[1; 512]);
    assert_eq!(
        (bitmaps(&mut client, "f"), bitmaps(&mut client, "disk")),
        (vec![named("daily", 65536, true)], vec![])
    );
    client.ok(
        "x-driveline-block-dirty-bitmap-move",
        json!({ "node": "vda", "name": "daily", "target": "disk" }),
    );
    client.ok("x-driveline-blockdev-remove-filter", json!({ "node-name": "f" }));
    assert_eq!(bitmaps(&mut client, "disk"), [named("daily", 65536, true)]);
}

#[test]
fn a_transaction_does_all_of_it_or_nothing() {
    let (world, mut client) = World::with_disk();
    for name in ["a", "b"] {
        client.ok("block-dirty-bitmap-add", json!({ "node": "vda", "name": name }));
    }
    world.write("vda", 0, &[1; 512]);
    let act = |kind: &str, data: Value| json!({ "type": kind, "data": data });
    let of = |name: &str| json!({ "node": "disk", "name": name });
    let good = json!([
        act("block-dirty-bitmap-add", json!({ "node": "vda", "name": "c", "disabled": true })),
        act("block-dirty-bitmap-merge", json!({ "node": "vda", "target": "c", "bitmaps": ["a"] })),
        act("block-dirty-bitmap-clear", of("a")),
        act("block-dirty-bitmap-disable", of("b")),
        act("block-dirty-bitmap-enable", of("c")),
    ]);

    // Each of these is wrong at the end of actions that would do much.
    let wrong = [
        (act("block-dirty-bitmap-clear", of("nope")), "'disk' has no bitmap 'nope'"),
        (
            act("block-dirty-bitmap-clear", json!({ "node": "nope", "name": "a" })),
            "Cannot find device='nope'",
        ),
        (
            act("block-dirty-bitmap-clear", json!({ "node": "disk" })),
            "Parameter 'actions[5].data.name' is missing",
        ),
        (act("block-dirty-bitmap-add", of("a")), "'a' exists already"),
        (act("blockdev-backup", json!({})), "Parameter 'actions[5].data.device' is missing"),
        (act("nonsense", json!({})), "Parameter 'actions[5].type' does not accept value 'nonsense'"),
        (act("abort", json!({})), "Transaction aborted using Abort action"),
    ];
    let before = [named("a", 65536, true), named("b", 65536, true)];
    for (action, expected) in wrong {
        let mut actions = good.clone();
        actions.as_array_mut().unwrap().push(action);
        let text = client.wrong("transaction", json!({ "actions": actions }));
        assert!(text.contains(expected), "{text}");
        assert_eq!(bitmaps(&mut client, "disk"), before, "{text}");
    }

    let properties = json!({ "completion-mode": "grouped" });
    client.ok("transaction", json!({ "actions": good, "properties": properties }));
    let after = [named("a", 0, true), named("b", 65536, false), named("c", 65536, true)];
    assert_eq!(bitmaps(&mut client, "disk"), after);

    let rest = json!([
        act("x-driveline-block-dirty-bitmap-rename", json!({ "node": "vda", "name": "a", "new-name": "z" })),
        act("block-dirty-bitmap-remove", of("b")),
        act("block-dirty-bitmap-remove", of("c")),
    ]);
    client.ok("transaction", json!({ "actions": rest }));
    assert_eq!(bitmaps(&mut client, "disk"), [named("z", 0, true)]);
}

#[test]
fn wrong_arguments_are_named_and_change_nothing() {
    let (_world, mut client) = World::with_disk();
    let with = |extra: Value| {
        let mut arguments = json!({ "node": "vda", "name": "b" });
        arguments.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        arguments
    };
    let wrong = [
        (json!({ "granularity": 5 }), "Granularity must be power of 2 and at least 512"),
        (json!({ "granularity": "64KiB" }), "Parameter 'granularity' expects uint64"),
        // The program around this graph keeps none.
        (json!({ "persistent": true }), "nothing keeps persistent bitmaps"),
        (json!({ "x-driveline-durability": "power" }), "needs 'persistent' to be true"),
        (
            json!({ "persistent": true, "x-driveline-durability": "forever" }),
            "Parameter 'x-driveline-durability' does not accept value 'forever'",
        ),
        (
            json!({ "x-driveline-view": "guest" }),
            "Parameter 'x-driveline-view' does not accept value 'guest'",
        ),
        (json!({ "name": "" }), "Bitmap name cannot be empty"),
        (json!({ "name": "x".repeat(1024) }), "1024 bytes, expected 1 to 1023"),
        (json!({ "z": 1 }), "Parameter 'z' is unexpected"),
    ];
    for (extra, expected) in wrong {
        let text = client.wrong("block-dirty-bitmap-add", with(extra));
        assert!(text.contains(expected), "{text}");
    }
    assert_eq!(bitmaps(&mut client, "disk"), []);
    let store = |store: &str| json!({ "node": "vda", "store": store });
    let text = client.wrong("x-driveline-block-dirty-bitmap-store", store("nowhere"));
    assert!(text.contains("expected qcow2:NODE or file:PATH"), "{text}");
    let text = client.wrong("x-driveline-block-dirty-bitmap-store", store("file:/x"));
    assert_eq!(text, "This program keeps no persistent bitmaps");
    client.ok("block-dirty-bitmap-add", with(json!({})));
    let text = client.wrong("x-driveline-block-dirty-bitmap-adopt", with(json!({})));
    assert_eq!(text, "node 'disk': bitmap 'b' is not inconsistent");
}

/// A bitmap action on a node that the same transaction removes was a panic half-way: what came before it stayed done.
#[test]
fn a_bitmap_on_a_node_that_goes_in_the_same_transaction_undoes_all_of_it() {
    let (world, mut client) = World::with_disk();
    client.ok("block-dirty-bitmap-add", json!({ "node": "vda", "name": "daily" }));
    world.write("vda", 0, &[1; 512]);
    client.ok("blockdev-add", json!({ "driver": "memory", "node-name": "goes", "size": 65536 }));
    let actions = json!([
        { "type": "block-dirty-bitmap-clear", "data": { "node": "vda", "name": "daily" } },
        { "type": "block-dirty-bitmap-add", "data": { "node": "goes", "name": "b" } },
        { "type": "blockdev-del", "data": { "node-name": "goes" } },
    ]);
    client.wrong("transaction", json!({ "actions": actions }));
    assert_eq!(bitmaps(&mut client, "disk"), [named("daily", 65536, true)]);
    assert_eq!(bitmaps(&mut client, "goes"), []);
    // In the other order each is what it says.
    let actions = json!([{ "type": "blockdev-del", "data": { "node-name": "goes" } }]);
    client.ok("transaction", json!({ "actions": actions }));
}

/// A backup program takes the node away that it put bitmaps on, as QEMU lets it: it was told to remove them first.
#[test]
fn a_node_goes_with_its_own_bitmaps_in_memory_and_not_with_those_of_a_drive() {
    let (_world, mut client) = World::with_disk();
    let node = json!({ "driver": "null-co", "node-name": "n", "size": 65536 });
    client.ok("blockdev-add", node.clone());
    client.ok("block-dirty-bitmap-add", json!({ "node": "n", "name": "mine" }));
    client.ok("blockdev-del", json!({ "node-name": "n" }));
    client.ok("blockdev-add", node);
    assert_eq!(bitmaps(&mut client, "n"), []);
    client.ok(
        "block-dirty-bitmap-add",
        json!({ "node": "n", "name": "a drive's", "x-driveline-view": "drive" }),
    );
    client.ok("block-dirty-bitmap-add", json!({ "node": "n", "name": "mine" }));
    let refused = client.wrong("blockdev-del", json!({ "node-name": "n" }));
    assert!(refused.contains("it has bitmaps ('a drive's', 'mine')"), "{refused}");
    assert_eq!(bitmaps(&mut client, "n").len(), 2, "none is gone");
}

//! Rules by events.

use crate::{Blkdebug, config};
use driveline_sdk::{
    Claim, permission,
    testing::{self, Leaf, Node, Value, json},
};
use std::fs;

fn open(options: Value) -> (Node, Leaf) {
    let below = testing::memory(1 << 20);
    (testing::open::<Blkdebug>(options, &below).unwrap(), below)
}

async fn read(node: &Node, offset: u64) -> i32 {
    node.read(offset..offset + 512).await.map_or_else(|error| error.code(), |_| 0)
}

async fn write(node: &Node, offset: u64) -> i32 {
    node.write(offset, &[1; 512]).await.map_or_else(|error| error.code(), |()| 0)
}

#[test]
fn an_error_is_active_from_its_event_on_until_others_are() {
    let (node, below) = open(json!({ "inject-error": [
        { "event": "l2_load", "errno": 28 },
        { "event": "l2_update", "errno": "EBUSY", "iotype": "write", "sector": 3 },
        { "event": "l2_update", "errno": 5, "iotype": "flush" },
    ] }));
    testing::block_on(async {
        node.event("reftable_load").await.unwrap();
        assert_eq!((read(&node, 0).await, write(&node, 0).await), (0, 0));
        node.event("l2_load").await.unwrap();
        assert_eq!((read(&node, 0).await, write(&node, 0).await, read(&node, 512).await), (28, 28, 28));
        assert!(node.block_status(0..512).await.is_ok(), "questions are not meant");
        node.event("l2_update").await.unwrap();
        assert_eq!((read(&node, 0).await, write(&node, 0).await), (0, 0));
        assert_eq!((write(&node, 1024).await, write(&node, 1536).await, read(&node, 1536).await), (0, 16, 0));
        assert_eq!(node.flush().await.unwrap_err().code(), 5);
    });
    assert!(below.seen().contains(&"event l2_load".to_owned()), "others below hear of it too");
}

#[test]
fn once_is_once_even_if_its_event_comes_again() {
    let (node, _) = open(json!({ "inject-error": [
        { "event": "none", "once": true },
        { "event": "none", "errno": 28, "once": true },
        { "event": "none", "errno": 12, "immediately": true, "iotype": "write" },
    ] }));
    testing::block_on(async {
        assert_eq!((read(&node, 0).await, read(&node, 0).await, read(&node, 0).await), (5, 28, 0));
        assert_eq!((write(&node, 0).await, write(&node, 0).await), (12, 12));
    });
}

#[test]
fn states_decide_which_rules_count() {
    let (node, _) = open(json!({
        "set-state": [
            { "event": "write_aio", "state": 1, "new_state": 2 },
            { "event": "write_aio", "state": 2, "new_state": 3 },
            { "event": "flush_to_disk", "new_state": 1 },
        ],
        "inject-error": [{ "event": "write_aio", "state": 3, "errno": 28, "iotype": "write", "once": true }],
    }));
    testing::block_on(async {
        assert_eq!((write(&node, 0).await, write(&node, 0).await, write(&node, 0).await), (0, 0, 28));
        node.flush().await.unwrap();
        assert_eq!((write(&node, 0).await, write(&node, 0).await, write(&node, 0).await), (0, 0, 0), "once");
    });
}

#[test]
fn a_parent_that_tells_its_events_is_not_guessed_at() {
    let rules = json!({ "inject-error": [{ "event": "read_aio" }] });
    let (node, _) = open(rules.clone());
    assert_eq!(testing::block_on(read(&node, 0)), 5, "a read stands for itself");
    let (node, _) = open(rules);
    testing::block_on(async {
        node.event("none").await.unwrap();
        assert_eq!(read(&node, 0).await, 0, "it is metadata");
        node.event("read_aio").await.unwrap();
        assert_eq!(read(&node, 0).await, 5);
    });
}

#[test]
fn limits_split_zeroes_and_discards_as_a_device_would_want_them() {
    let (node, below) = open(json!({
        "align": 512, "max-transfer": "64KiB", "opt-write-zero": 4096, "max-write-zero": 8192,
        "opt-discard": 1024, "max-discard": 2048,
    }));
    assert_eq!((node.info().request_alignment, node.info().transfer_bytes_max), (512, 65536));
    testing::block_on(async {
        node.write_zeroes(512..20480).await.unwrap();
        assert_eq!(
            below.seen(),
            ["write 512+3584", "write_zeroes 4096+8192 may-unmap", "write_zeroes 12288+8192 may-unmap"]
        );
        node.discard(512..5632).await.unwrap();
        assert_eq!(below.seen(), ["discard 1024+2048", "discard 3072+2048"]);
    });
}

#[test]
fn permissions_are_those_that_are_asked_for() {
    let (node, _) = open(json!({
        "take-child-perms": ["write", "resize"], "unshare-child-perms": ["consistent-read"],
    }));
    let claim = Claim { takes: permission::WRITE | permission::RESIZE, denies: permission::CONSISTENT_READ };
    assert_eq!(node.permissions(0), claim);
}

/// What qemu-storage-daemon 10.0.2 answers to the same.
#[test]
fn limits_that_cannot_be_are_refused_in_the_words_of_qemu() {
    for (options, key, text) in [
        (json!({ "align": 3 }), "align", "Cannot meet constraints with align 3"),
        (
            json!({ "align": 4096, "max-transfer": 1000 }),
            "max-transfer",
            "Cannot meet constraints with max-transfer 1000",
        ),
        (
            json!({ "opt-discard": 1024, "max-discard": 1500 }),
            "max-discard",
            "Cannot meet constraints with max-discard 1500",
        ),
    ] {
        let error = testing::check::<Blkdebug>(options).unwrap_err();
        assert_eq!((error.key(), error.message()), (Some(key), Some(text)));
    }
    testing::check::<Blkdebug>(json!({ "opt-write-zero": 100, "max-write-zero": 200 })).unwrap();
}

#[test]
fn events_that_there_are_not_and_that_never_come_are_refused() {
    let refusal = |event: &str| {
        let error = testing::check::<Blkdebug>(json!({ "inject-error": [{ "event": event }] })).unwrap_err();
        (error.key().unwrap().to_owned(), error.message().unwrap().to_owned())
    };
    let (key, text) = refusal("foo");
    assert!(key == "inject-error[0].event" && text.contains("foo"), "{key}: {text}");
    assert!(refusal("vmstate_load").1.contains("never comes"), "{:?}", refusal("vmstate_load"));
}

/// The same files and words as with qemu-storage-daemon 10.0.2.
#[test]
fn a_file_is_read_and_refused_as_qemu_does() {
    for (text, refusal) in [
        ("[inject-error]\nevent = \"foo\"\n", "invalid parameter value: foo"),
        ("[inject-error]\nevnt = \"foo\"\n", "Invalid parameter 'evnt'"),
        ("[injct-error]\nevent = \"foo\"\n", "There is no option group 'injct-error'"),
        ("[inject-error]\nstate=\"1\"\n", "Invalid parameter 'state=\"1\"'"),
        ("[inject-error]\nevent = l2_load\n", "invalid parameter value: "),
        ("x\n", "no group defined"),
        ("[inject-error]\nevent = \"l2_load\"\niotype=\"foo\"\n", "Invalid parameter 'iotype=\"foo\"'"),
    ] {
        assert_eq!(config::parse(text).unwrap_err(), refusal, "{text}");
    }
    let text = "# a comment\n[set-state]\nevent = \"l2_load\"\n\n[inject-error]\nevent = \"read_aio\"\nerrno = \"28\"\nsector = \"2\"\nonce = \"on\"\n";
    let found = config::parse(text).unwrap();
    assert_eq!((found.states.len(), found.errors.len()), (1, 1));
    assert_eq!((found.states[0].new_state, found.errors[0].errno.0, found.errors[0].sector), (0, 28, 2));

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rules.conf");
    let missing = testing::open::<Blkdebug>(json!({ "config": path }), &testing::memory(512)).unwrap_err();
    assert_eq!(missing.message(), Some("Could not read blkdebug config file: No such file or directory"));
    fs::write(&path, text).unwrap();
    let (node, _) = open(json!({ "config": path }));
    testing::block_on(async {
        assert_eq!((read(&node, 0).await, read(&node, 1024).await, read(&node, 1024).await), (0, 28, 0));
    });
}

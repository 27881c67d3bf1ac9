use super::Blkdebug;
use driveline_drivers::conformance::{Check, check};
use driveline_sdk::{
    now, sleep,
    testing::{self, Below, Leaf, Node, Value, json},
};
use std::{cell::Cell, fs, pin::Pin, time::Duration};

fn open(options: Value) -> (Node, Leaf) {
    let below = testing::memory(1 << 20);
    (testing::open::<Blkdebug>(options, &below).unwrap(), below)
}

fn rules(rules: Value) -> (Node, Leaf) {
    open(json!({ "rules": rules }))
}

/// What so many reads of the first sector end with, 0 or an errno.
async fn reads(node: &Node, count: usize) -> Vec<i32> {
    let mut ends = Vec::new();
    for _ in 0..count {
        ends.push(node.read(0..512).await.map_or_else(|error| error.code(), |_| 0));
    }
    ends
}

#[test]
fn the_operation_and_the_range_choose_what_fails() {
    let (node, below) = rules(json!([
        { "op": "write", "offset": "4KiB", "length": 512, "errno": "ENOSPC" },
        { "op": "write-zeroes", "errno": 5 },
        { "op": "flush", "errno": "EROFS" },
        { "offset": "64KiB", "errno": "EBUSY" },
    ]));
    testing::block_on(async {
        assert_eq!(node.write(4096 + 511, b"xy").await.unwrap_err().code(), 28);
        assert_eq!(node.write_zeroes(0..1).await.unwrap_err().code(), 5);
        assert_eq!(node.flush().await.unwrap_err().code(), 30);
        assert_eq!(node.discard(65535..65537).await.unwrap_err().code(), 16);
        assert_eq!(node.block_status(65536..65537).await.unwrap_err().code(), 16);
        assert_eq!(node.cache(1 << 17..1 << 18).await.unwrap_err().code(), 16);
        assert_eq!(node.read(1 << 17..1 << 18).await.unwrap_err().code(), 16);
        assert!(below.seen().is_empty());

        node.write(4094, b"xy").await.unwrap();
        node.write(4096 + 512, b"xy").await.unwrap();
        node.read(4096..4608).await.unwrap();
        node.discard(0..65536).await.unwrap();
    });
    assert_eq!(below.seen(), ["write 4094+2", "write 4608+2", "read 4096+512", "discard 0+65536"]);
}

#[test]
fn after_and_count_choose_when() {
    testing::block_on(async {
        let (node, _) = rules(json!([{ "op": "read", "after": 2, "count": 3, "errno": "EIO" }]));
        assert_eq!(reads(&node, 7).await, [0, 0, 5, 5, 5, 0, 0]);
        let (node, _) = rules(json!([{ "once": true, "errno": "EIO" }, { "once": true, "errno": "ENOMEM" }]));
        assert_eq!(reads(&node, 4).await, [5, 12, 0, 0]);
    });
}

#[test]
fn chance_is_the_same_for_the_same_seed() {
    testing::block_on(async {
        let mut runs = Vec::new();
        for seed in [42, 42, 43] {
            let (node, _) = rules(json!([{ "probability": 0.1, "seed": seed, "errno": "EIO" }]));
            runs.push(reads(&node, 1000).await);
        }
        assert_eq!(runs[0], runs[1]);
        assert_ne!(runs[0], runs[2]);
        for run in runs {
            let failed = run.iter().filter(|errno| **errno == 5).count();
            assert!((60..140).contains(&failed), "{failed} of 1000");
        }
        let (node, _) = rules(json!([{ "probability": 0.0, "errno": 1 }, { "probability": 1, "errno": 2 }]));
        assert_eq!(reads(&node, 3).await, [2, 2, 2]);
    });
}

#[test]
fn a_short_write_is_done_in_part() {
    let (node, below) = rules(json!([{ "op": "write", "errno": "EIO", "short": 512, "once": true }]));
    testing::block_on(async {
        assert_eq!(node.write(1024, &[7; 1024]).await.unwrap_err().code(), 5);
    });
    assert_eq!(below.seen(), ["write 1024+512"]);
    assert_eq!(below.data(1024..1537), [&[7; 512][..], &[0]].concat());
}

#[test]
fn a_request_is_suspended_while_its_file_exists() {
    let control = tempfile::tempdir().unwrap();
    let file = control.path().join("first-write");
    fs::write(&file, "left by an earlier run").unwrap();
    let (node, below) = open(json!({
        "control": control.path(),
        "rules": [
            { "op": "write", "suspend": "first-write", "count": 2 },
            { "op": "write", "errno": "EIO", "once": true },
        ],
    }));
    assert!(!file.exists());
    let ended = Cell::new(Duration::ZERO);
    testing::block_on(async {
        let write = async {
            assert_eq!(node.write(0, b"data").await.unwrap_err().code(), 5, "then the next rules are asked");
            ended.set(now());
        };
        let test = async {
            sleep(Duration::from_millis(50)).await;
            assert!(file.exists());
            node.read(0..512).await.unwrap(); // others pass
            assert_eq!(below.seen(), ["read 0+512"]);
            fs::remove_file(&file).unwrap();
        };
        let both: [Pin<Box<dyn Future<Output = ()> + '_>>; 2] = [Box::pin(write), Box::pin(test)];
        testing::join(both).await;
        assert!((50..=51).contains(&ended.get().as_millis()), "{:?}", ended.get());
    });
}

#[test]
fn impossible_options_are_refused_by_name() {
    for (rule, key, text) in [
        (json!({ "op": "read" }), "rules[0]", "nothing would happen by it, expected 'errno' or 'suspend'"),
        (json!({ "op": "flush", "length": 1, "errno": 5 }), "rules[0].length", "a flush has no range"),
        (json!({ "length": 0, "errno": 5 }), "rules[0].length", "no request is in it, expected at least 1"),
        (
            json!({ "errno": 5, "once": true, "count": 1 }),
            "rules[0].once",
            "it is the same as 'count = 1', so only one of them can be given",
        ),
        (json!({ "errno": 5, "count": 0 }), "rules[0].count", "it would never apply, expected at least 1"),
        (json!({ "errno": 5, "probability": 2 }), "rules[0].probability", "expected a number from 0 to 1"),
        (json!({ "errno": 5, "seed": 1 }), "rules[0].seed", "nothing is random without 'probability'"),
        (
            json!({ "op": "read", "errno": 5, "short": 1 }),
            "rules[0].short",
            "only a write that fails can be short: it needs 'op = \"write\"' and 'errno'",
        ),
        (
            json!({ "suspend": "../a" }),
            "rules[0].suspend",
            "it names a file, expected letters, digits, '-' and '_'",
        ),
        (
            json!({ "suspend": "a" }),
            "rules[0].suspend",
            "nothing could resume it, expected the option 'control' of the node",
        ),
        (
            json!({ "errno": "EWHAT" }),
            "rules[0].errno",
            "invalid value: string \"EWHAT\", expected the name of an error, such as \"EIO\" or \"ENOSPC\", or its \
             number from 1 to 4095",
        ),
    ] {
        let refused = testing::check::<Blkdebug>(json!({ "rules": [rule] })).unwrap_err();
        assert_eq!((refused.key(), refused.message()), (Some(key), Some(text)));
    }
    let missing = json!({ "control": "/no/such/directory" });
    let refused = testing::open::<Blkdebug>(missing, &testing::memory(512)).unwrap_err();
    assert_eq!(refused.key(), Some("control"));
}

#[test]
fn the_readme_is_true() {
    let readme = include_str!("../README.md");
    testing::check_readme::<Blkdebug>(readme, |text| toml::from_str(text).unwrap());
    // What a rule accepts is told by the refusal of what it does not.
    let refused = testing::check::<Blkdebug>(json!({ "rules": [{ "": 0 }] })).unwrap_err();
    let (_, expected) = refused.message().unwrap().split_once("expected").unwrap();
    let accepted: Vec<_> = expected.split('`').skip(1).step_by(2).collect();
    assert_eq!(testing::readme_table(readme, "of a rule"), accepted);
}

#[test]
fn it_conforms() {
    let (node, _) = rules(json!([{ "probability": 0, "errno": "EIO" }]));
    testing::block_on(check(&node.edge(), Check { steps: 100, ..Check::default() }));
}

use super::{Ends, Preallocate};
use driveline_drivers::conformance::{Check, check};
use driveline_sdk::{
    Info, RangeLock,
    prelude::*,
    testing::{self, Below, Leaf, Node, json},
};
use std::sync::Mutex;

const KIB: u64 = 1024;

fn world() -> (Leaf, Node) {
    let below = testing::growing(64 * KIB);
    let options = json!({ "prealloc-align": "64KiB", "prealloc-size": "256KiB" });
    let node = testing::open::<Preallocate>(options, &below).unwrap();
    (below, node)
}

#[test]
fn the_readme_is_true() {
    testing::check_readme::<Preallocate>(include_str!("../README.md"), |text| toml::from_str(text).unwrap());
}

#[test]
fn it_conforms() {
    let node = testing::open::<Preallocate>(json!({}), &testing::memory(1 << 20)).unwrap();
    testing::block_on(check(&node.edge(), Check { steps: 40, ..Check::default() }));
}

#[test]
fn space_is_reserved_once_for_many_writes_and_given_back_at_the_end() {
    let (below, node) = world();
    testing::block_on(async {
        node.write(0, &[1; 512]).await.unwrap();
        assert_eq!(below.seen(), ["write 0+512"], "inside, nothing is done");
        for i in 0..10 {
            node.write(64 * KIB + i * 4 * KIB, &[2; 4096]).await.unwrap();
        }
        let seen = below.seen();
        assert_eq!(seen[0], "write_zeroes 65536+327680 no-fallback");
        assert_eq!(seen.iter().filter(|seen| seen.starts_with("write_zeroes")).count(), 1);
        assert_eq!(below.size_bytes(), 384 * KIB);
        node.settle().await.unwrap();
    });
    assert_eq!(below.size_bytes(), 104 * KIB);
}

#[test]
fn writes_at_the_same_time_reserve_once_and_lose_nothing() {
    let (below, node) = world();
    below.set_latency(std::time::Duration::from_millis(1));
    let node = &node;
    testing::block_on(testing::join((0..32).map(|i| async move {
        node.write((96 - i) * KIB, &[i as u8 + 1; 1024]).await.unwrap();
    })));
    assert_eq!(below.seen().iter().filter(|seen| seen.starts_with("write_zeroes")).count(), 1);
    for i in 0..32 {
        assert_eq!(below.data((96 - i) * KIB..(97 - i) * KIB), vec![i as u8 + 1; 1024]);
    }
    testing::block_on(node.settle()).unwrap();
    assert_eq!(below.size_bytes(), 97 * KIB);
}

#[test]
fn a_new_size_inside_what_is_reserved_costs_nothing_and_reads_as_zeroes() {
    let (below, node) = world();
    testing::block_on(async {
        node.write(64 * KIB, &[2; 1024]).await.unwrap();
        below.seen();
        node.resize(100 * KIB).await.unwrap();
        assert!(below.seen().is_empty());
        assert_eq!(node.read(65 * KIB..100 * KIB).await.unwrap(), vec![0; 35 * 1024]);
        below.seen();
        node.resize(1000 * KIB).await.unwrap();
        node.resize(10 * KIB).await.unwrap();
        assert_eq!(below.seen(), ["resize 1024000", "resize 10240"]);
        node.settle().await.unwrap();
    });
    assert_eq!(below.size_bytes(), 10 * KIB);
}

#[test]
fn where_nothing_can_be_reserved_writes_go_on() {
    let (below, node) = world();
    below.fail("write_zeroes", 0..u64::MAX, 95, 1);
    testing::block_on(node.write(64 * KIB, &[2; 1024])).unwrap();
    assert_eq!(below.size_bytes(), 65 * KIB);
}

/// What was not reserved by one write, the next one must not reserve over it while it is on its way.
#[test]
fn a_reservation_never_zeroes_what_a_write_before_it_stores() {
    let (below, node) = world();
    below.set_latency(std::time::Duration::from_millis(1));
    below.fail("write_zeroes", 0..u64::MAX, 28, 1);
    let node = &node;
    testing::block_on(testing::join((0..4).map(|i| async move {
        node.write((64 + i) * KIB, &[i as u8 + 1; 1024]).await.unwrap();
    })));
    for i in 0..4 {
        assert_eq!(below.data((64 + i) * KIB..(65 + i) * KIB), vec![i as u8 + 1; 1024]);
    }
}

#[test]
fn steps_that_cannot_be_are_refused() {
    for (options, text) in [
        (
            json!({ "prealloc-align": 1000 }),
            "option 'prealloc-align': prealloc-align parameter of preallocate filter is not aligned to 512",
        ),
        (json!({ "prealloc-size": u64::MAX }), "option 'prealloc-size': it is more than a file can have"),
    ] {
        assert_eq!(testing::check::<Preallocate>(options).unwrap_err().to_string(), text);
    }
}

/// Wires are looked at while requests run, so that an old size is shown late. It was taken for somebody else's: what had been written
/// since was behind the end.
#[test]
fn a_size_of_its_own_making_that_is_shown_late_is_not_somebody_elses() {
    let ends = Ends { data: 100 * KIB, file: 384 * KIB, ours: (64 * KIB, 384 * KIB), at_work: 0 };
    let node =
        Preallocate { align: 64 * KIB, size: 256 * KIB, ends: Mutex::new(ends), growing: RangeLock::new() };
    let shows = |size_bytes| node.info(&[], Info { size_bytes, ..Info::default() }).size_bytes;
    assert_eq!([64 * KIB, 384 * KIB, 80 * KIB].map(shows), [100 * KIB; 3]);
    assert_eq!(shows(32 * KIB), 32 * KIB, "it was never that short");
}

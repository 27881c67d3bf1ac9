use super::Throttle;
use driveline_drivers::conformance::{Check, check};
use driveline_sdk::{
    now, sleep,
    testing::{self, Below, Node, Value, json},
};
use std::{cell::Cell, pin::Pin, time::Duration};

fn node(options: Value) -> Node {
    testing::open::<Throttle>(options, &testing::memory(1 << 20)).unwrap()
}

/// How many milliseconds something takes, in virtual time. (Times are rounded down to nanoseconds where they are made.)
async fn took(what: impl Future) -> u128 {
    let start = now();
    what.await;
    (now() - start).as_nanos().div_ceil(1000) / 1000
}

async fn read(node: &Node, length: u64) {
    node.read(0..length).await.unwrap();
}

async fn write(node: &Node, length: usize) {
    node.write(0, &vec![1; length]).await.unwrap();
}

#[test]
fn operations_keep_to_their_rate() {
    let node = node(json!({ "iops": 1000 }));
    testing::block_on(async {
        // A tenth of a second's worth passes at once; one more, as the bucket then is just full.
        assert_eq!(took(testing::join((0..101).map(|_| read(&node, 512)))).await, 0);
        let mixed = took(async {
            for _ in 0..500 {
                read(&node, 512).await;
                write(&node, 512).await;
            }
        });
        assert_eq!(mixed.await, 1000);
    });
}

#[test]
fn bytes_keep_to_their_rate() {
    let node = node(json!({ "bps": "10MiB" }));
    testing::block_on(async {
        read(&node, 1 << 20).await; // as much as passes at once
        read(&node, 1 << 20).await;
        assert_eq!(took(testing::join((0..10).map(|_| read(&node, 1 << 20)))).await, 1000);
        assert_eq!(took(node.flush()).await, 0, "flushes are not limited");
    });
}

#[test]
fn directions_have_limits_of_their_own() {
    let node = node(json!({ "iops-read": 100, "bps-write": "1MiB" }));
    testing::block_on(async {
        testing::join((0..11).map(|_| read(&node, 512))).await;
        write(&node, 1 << 20).await;
        assert_eq!(took(testing::join((0..10).map(|_| read(&node, 1 << 20)))).await, 100);
        assert_eq!(
            took(write(&node, 1)).await,
            800,
            "a MiB was paid for, less what passes at once, and those 100 ms"
        );
    });
}

#[test]
fn zeroes_and_discards_are_writes_without_bytes() {
    let node = node(json!({ "iops-write": 10, "bps-write": 1000 }));
    testing::block_on(async {
        write(&node, 1).await;
        node.write_zeroes(0..1 << 20).await.unwrap();
        assert_eq!(took(node.discard(0..1 << 20)).await, 100);
        assert_eq!(took(node.write_zeroes(0..1 << 20)).await, 100);
        assert_eq!(took(read(&node, 1 << 20)).await, 0);
    });
}

#[test]
fn large_requests_count_as_several() {
    let node = node(json!({ "iops": 100, "iops-size": "4KiB" }));
    testing::block_on(async {
        read(&node, 44 << 10).await;
        assert_eq!(took(read(&node, 512)).await, 10);
        assert_eq!(took(read(&node, 512)).await, 10, "a small one counts as one");
        read(&node, 6 << 10).await;
        assert_eq!(took(read(&node, 512)).await, 15, "one and a half");
    });
}

#[test]
fn bursts_exceed_the_rate_for_their_length() {
    let options = json!({ "iops": 100, "iops-max": 1000, "iops-max-length": "10s" });
    let node = node(options);
    testing::block_on(async {
        let passed = Cell::new(0);
        let stop = Duration::from_secs(5);
        testing::join((0..4).map(async |_| {
            while now() < stop {
                read(&node, 512).await;
                passed.set(passed.get() + 1);
            }
        }))
        .await;
        assert!((5095..=5110).contains(&passed.get()), "{}", passed.get());
    });
}

#[test]
fn limits_of_a_group_hold_for_its_nodes_together_and_they_take_turns() {
    let (busy, calm) = (node(json!({ "group": "turns", "iops": 1000 })), node(json!({ "group": "turns" })));
    testing::block_on(async {
        testing::join((0..101).map(|_| read(&busy, 512))).await;
        let (stop, done) = (now() + Duration::from_secs(1), [Cell::new(0), Cell::new(0)]);
        let clients = (0..17).map(|number| (number < 16).then_some(()).map_or((&calm, 1), |()| (&busy, 0)));
        testing::join(clients.map(async |(node, which)| {
            while now() < stop {
                if which == 0 {
                    read(node, 512).await
                } else {
                    write(node, 512).await
                }
                done[which].set(done[which].get() + 1);
            }
        }))
        .await;
        let [many, few]: [i32; 2] = done.map(|count| count.get());
        // 16 requests at a time against one: half for each all the same.
        assert!((990..=1070).contains(&(many + few)), "{many} and {few}");
        assert!(many.abs_diff(few) <= 70, "{many} and {few}");
    });
}

type Work<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;

/// The story: a change of the graph waited for all that a node held back, at the node's rate.
#[test]
fn a_drained_node_lets_go_what_it_holds_and_later_requests_pay_for_it() {
    let node = node(json!({ "iops": 1 }));
    testing::block_on(async {
        read(&node, 512).await;
        let mut work: Vec<Work<'_>> = Vec::new();
        for _ in 0..5 {
            work.push(Box::pin(read(&node, 512)));
            work.push(Box::pin(write(&node, 512)));
        }
        work.push(Box::pin(async {
            sleep(Duration::from_millis(500)).await;
            node.drained(true);
            assert_eq!(took(read(&node, 512)).await, 0, "what comes while it is drained passes as well");
        }));
        assert_eq!(took(testing::join(work)).await, 500);
        node.drained(true);
        node.drained(false);
        assert_eq!(took(read(&node, 512)).await, 0, "one drain is not over yet");
        node.drained(false);
        // Thirteen have passed and are paid for, but for the half second that is over, and the tenth that passes at once.
        assert_eq!(took(read(&node, 512)).await, 12_400);
        assert_eq!(took(read(&node, 512)).await, 1000);
    });
}

#[test]
fn a_drained_node_leaves_the_others_of_its_group_waiting() {
    let (drained, other) =
        (node(json!({ "group": "drained", "iops": 10 })), node(json!({ "group": "drained" })));
    testing::block_on(async {
        read(&drained, 512).await;
        read(&drained, 512).await;
        let work: [Work<'_>; 3] = [
            Box::pin(async { assert_eq!(took(read(&drained, 512)).await, 0) }),
            // It would have come next, after 200 ms; what was let go costs it nothing more than it would have.
            Box::pin(async { assert_eq!(took(read(&other, 512)).await, 200) }),
            Box::pin(async {
                drained.drained(true);
                drained.drained(false);
            }),
        ];
        testing::join(work).await;
    });
}

#[test]
fn a_group_has_one_set_of_limits() {
    let first = node(json!({ "group": "agreed" }));
    let second = node(json!({ "group": "agreed", "iops": 100 }));
    let third = node(json!({ "group": "agreed", "iops-total": 100 }));
    let open = |options| testing::open::<Throttle>(options, &testing::memory(512));
    let refused = open(json!({ "group": "agreed", "iops": 200 })).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "option 'group': other limits are in force in this group, expected the same ones or none"
    );
    drop((second, third));
    assert!(open(json!({ "group": "agreed", "iops": 200 })).is_err(), "they stay as long as anyone is in it");
    drop(first);
    drop(open(json!({ "group": "agreed", "iops": 200 })).unwrap());
}

#[test]
fn a_request_that_is_given_up_makes_room() {
    let node = node(json!({ "iops": 10 }));
    testing::block_on(async {
        read(&node, 512).await;
        read(&node, 512).await;
        // Four wait; two of them, the first among them, are cancelled.
        let mut calls: Vec<_> = (0..4).map(|_| Some(Box::pin(read(&node, 512)))).collect();
        std::future::poll_fn(|cx| {
            for call in calls.iter_mut().flatten() {
                assert!(call.as_mut().poll(cx).is_pending());
            }
            std::task::Poll::Ready(())
        })
        .await;
        (calls[0], calls[2]) = (None, None);
        assert_eq!(took(testing::join(calls.into_iter().flatten())).await, 200);
    });
}

#[test]
fn nothing_is_limited_without_limits() {
    for options in [json!({}), json!({ "group": "free" }), json!({ "iops": 0, "bps": 0 })] {
        let node = node(options);
        testing::block_on(async {
            assert_eq!(took(testing::join((0..1000).map(|_| read(&node, 4096)))).await, 0);
        });
    }
}

#[test]
fn impossible_options_are_refused_by_name() {
    for (options, key, text) in [
        (json!({ "iops": 1, "iops-read": 1 }), "iops-read", "it cannot be used together with 'iops-total'"),
        (json!({ "bps": 1, "bps-write": 1 }), "bps-write", "it cannot be used together with 'bps-total'"),
        (json!({ "bps-max": 1 }), "bps-total-max", "a burst exceeds a limit, so it needs 'bps-total'"),
        (
            json!({ "iops-read": 9, "iops-read-max": 8 }),
            "iops-read-max",
            "a burst is faster than 'iops-read', expected at least 9",
        ),
        (json!({ "iops": 9, "iops-max-length": 3 }), "iops-total-max-length", "it needs 'iops-total-max'"),
        (
            json!({ "iops": 9, "iops-max": 9, "iops-max-length": 0 }),
            "iops-total-max-length",
            "a burst takes some time, expected more than 0",
        ),
        (
            json!({ "bps": 9, "iops-size": 512 }),
            "iops-size",
            "it says what an operation is, so it needs an 'iops-' limit",
        ),
        (
            json!({ "bps-read": "1PiB" }),
            "bps-read",
            "1125899906842624 is too much, expected at most 1000000000000000",
        ),
        (json!({ "group": "" }), "group", "a group has a name"),
        (
            json!({ "iops": 9, "iops-max": 9, "iops-max-length": "5" }),
            "iops-max-length",
            "'5' is not a length of time: expected a number and its unit, such as \"250us\", \"5ms\" or \"1s\"",
        ),
    ] {
        let refused = testing::check::<Throttle>(options).unwrap_err();
        assert_eq!((refused.key(), refused.message()), (Some(key), Some(text)));
    }
}

#[test]
fn the_readme_is_true() {
    testing::check_readme::<Throttle>(include_str!("../README.md"), |text| toml::from_str(text).unwrap());
}

#[test]
fn it_conforms() {
    let options = json!({ "bps": "100MiB", "iops": 500, "iops-size": "4KiB", "iops-max": 1000 });
    testing::block_on(check(&node(options).edge(), Check { steps: 40, ..Check::default() }));
}

#[test]
fn a_limit_is_given_by_one_of_its_names() {
    let refused = testing::check::<Throttle>(json!({ "iops": 1, "iops-total": 2 })).unwrap_err();
    assert_eq!(refused.to_string(), "option 'iops-total': it is given twice, by two of its names");
}

use super::Delay;
use driveline_drivers::conformance::{Check, check};
use driveline_sdk::{
    Result, now,
    testing::{self, Below, Node, json},
};
use std::time::Duration;

/// How long an operation takes, in virtual time.
async fn took(operation: impl Future<Output = Result<()>>) -> Duration {
    let start = now();
    operation.await.unwrap();
    now() - start
}

fn slow() -> Node {
    let options = json!({
        "read": "1ms", "write": "2ms", "flush": "3ms", "discard": "4ms", "write-zeroes": "5ms", "block-status": "6ms",
    });
    testing::open::<Delay>(options, &testing::memory(1 << 20)).unwrap()
}

#[test]
fn each_operation_waits_its_own_time() {
    let node = slow();
    testing::block_on(async {
        let each = [
            took(async { node.read(0..512).await.map(drop) }).await,
            took(node.write(0, b"data")).await,
            took(node.flush()).await,
            took(node.discard(0..512)).await,
            took(node.write_zeroes(0..512)).await,
            took(async { node.block_status(0..512).await.map(drop) }).await,
        ];
        assert_eq!(each.map(|time| time.as_millis()), [1, 2, 3, 4, 5, 6]);
        assert_eq!(took(node.cache(0..512)).await, Duration::ZERO);
    });
}

#[test]
fn requests_at_the_same_time_wait_at_the_same_time() {
    let node = slow();
    testing::block_on(async {
        let start = now();
        testing::join((0..100).map(|number| node.write(number * 512, b"data"))).await;
        assert_eq!((now() - start).as_millis(), 2);
    });
}

#[test]
fn without_options_nothing_waits() {
    let below = testing::memory(1 << 20);
    let node = testing::open::<Delay>(json!({}), &below).unwrap();
    testing::block_on(async {
        assert_eq!(took(node.flush()).await, Duration::ZERO);
        assert_eq!(took(node.write(0, b"data")).await, Duration::ZERO);
    });
    assert_eq!(below.seen(), ["flush", "write 0+4"]);
}

#[test]
fn a_time_has_a_unit() {
    let refused = testing::check::<Delay>(json!({ "write-zeroes": 5 })).unwrap_err();
    assert_eq!(refused.key(), Some("write-zeroes"), "{refused}");
}

#[test]
fn the_readme_is_true() {
    testing::check_readme::<Delay>(include_str!("../README.md"), |text| toml::from_str(text).unwrap());
}

#[test]
fn it_conforms() {
    testing::block_on(check(&slow().edge(), Check { steps: 100, ..Check::default() }));
}

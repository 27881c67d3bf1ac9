use super::Protect;
use driveline_sdk::testing::{self, json};

#[test]
fn what_lies_in_the_range_does_not_change() {
    let below = testing::memory(1 << 20);
    let node = testing::open::<Protect>(json!({ "offset": "4KiB", "length": 512 }), &below).unwrap();
    testing::block_on(async {
        assert_eq!(node.write(4096 + 511, b"xy").await.unwrap_err().code(), 1);
        assert_eq!(node.write_zeroes(0..8192).await.unwrap_err().code(), 1);
        assert_eq!(node.discard(4096..4097).await.unwrap_err().code(), 1);
        assert!(below.seen().is_empty());

        node.write(4094, b"xy").await.unwrap();
        node.write(4096 + 512, b"xy").await.unwrap();
        node.read(4096..4608).await.unwrap();
        assert_eq!(below.seen(), ["write 4094+2", "write 4608+2", "read 4096+512"]);
    });
}

#[test]
fn an_impossible_range_is_refused_by_name() {
    let refused =
        testing::open::<Protect>(json!({ "offset": "15EiB", "length": "15EiB" }), &testing::memory(0));
    assert_eq!(refused.unwrap_err().to_string(), "option 'length': it ends beyond all offsets");
}

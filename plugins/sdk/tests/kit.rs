//! The test kit: what filters under test see of the world, and what tests see of the filters.

use driveline_sdk::{
    ChildId, RangeLock,
    prelude::*,
    status,
    testing::{self, block_on, join, json, memory},
};
use std::time::Duration;

/// Copies writes to a target, one after the other for each range.
struct Tee {
    target: ChildId,
    ranges: RangeLock,
}

#[filter(name = "tee", default = "pass", children("target"), effects(own_writes))]
impl Filter for Tee {
    type Options = NoOptions;

    fn open(_: NoOptions, cx: &OpenCx<'_>) -> Result<Self> {
        Ok(Tee { target: cx.child("target")?, ranges: RangeLock::new() })
    }

    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        let _locked = self.ranges.lock(request.range()).await;
        next.write(request).await?;
        next.child(self.target).write(request).await
    }
}

/// Reads only, and half of what is there.
struct Half;

#[options]
struct HalfOptions {
    #[serde(default)]
    panics: bool,
    #[serde(default)]
    mode: Mode,
}

#[options]
#[derive(Default, PartialEq)]
enum Mode {
    #[default]
    LowerHalf,
    UpperHalf,
}

#[filter(name = "half", default = "deny", effects(changes_offsets))]
impl Filter for Half {
    type Options = HalfOptions;

    fn check(options: &HalfOptions) -> Result<()> {
        match options.mode {
            Mode::LowerHalf => Ok(()),
            Mode::UpperHalf => Err(Error::option("mode", "not yet")),
        }
    }

    fn open(options: HalfOptions, cx: &OpenCx<'_>) -> Result<Self> {
        assert!(!options.panics, "as it was told");
        assert_eq!(cx.node_name(), "test");
        Ok(Half)
    }

    fn size(&self, child_size_bytes: u64) -> u64 {
        child_size_bytes / 2
    }

    async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        assert!(request.offset() != 13, "an unlucky number");
        next.read(request).await
    }
}

#[test]
fn a_filter_calls_all_its_children() {
    let (child, target) = (memory(8192), memory(8192));
    let tee = testing::open_with::<Tee>(json!({}), &child, &[("target", &target)]).unwrap();
    block_on(tee.write(512, b"twice")).unwrap();
    assert_eq!((child.data(512..517), target.data(512..517)), (b"twice".to_vec(), b"twice".to_vec()));
    let missing = testing::open::<Tee>(json!({}), &child).unwrap_err();
    assert_eq!(missing.to_string(), "option 'target': this child is needed");
}

#[test]
fn virtual_time_shows_what_waits_for_what() {
    let (child, target) = (memory(8192), memory(8192));
    child.set_latency(Duration::from_secs(10));
    let tee = testing::open_with::<Tee>(json!({}), &child, &[("target", &target)]).unwrap();
    block_on(async {
        let begun = now();
        join([tee.write(0, &[1; 512]), tee.write(512, &[2; 512]), tee.write(1024, &[3; 512])]).await;
        assert_eq!((now() - begun).as_secs(), 10, "apart: together");
        let begun = now();
        join([tee.write(0, &[1; 512]), tee.write(256, &[2; 512]), tee.write(512, &[3; 512])]).await;
        assert_eq!((now() - begun).as_secs(), 30, "overlapping: one by one");
    });
    assert_eq!(target.data(511..514), [2, 3, 3]);
}

#[test]
fn what_is_denied_is_refused_by_the_kit() {
    let child = memory(8192);
    let half = testing::open::<Half>(json!({}), &child).unwrap();
    assert_eq!(half.info().size_bytes, 4096);
    block_on(async {
        assert_eq!(half.read(0..2).await.unwrap(), [0, 0]);
        assert_eq!(half.write(0, b"x").await.unwrap_err().code(), 95);
        assert_eq!(half.discard(0..1).await.unwrap_err().code(), 95);
        half.flush().await.unwrap();
    });
    assert_eq!(child.seen(), ["read 0+2", "flush"]);
}

#[test]
fn panics_are_errors_and_remembered() {
    let half = testing::open::<Half>(json!({}), &memory(8192)).unwrap();
    assert_eq!(block_on(half.read(13..14)).unwrap_err().code(), 5);
    assert_eq!(half.failures(), ["it panicked: an unlucky number"]);
    let refused = testing::open::<Half>(json!({ "panics": true }), &memory(0)).unwrap_err();
    assert!(refused.to_string().starts_with("it panicked: as it was told"), "{refused}");
}

#[test]
fn options_can_be_checked_alone() {
    assert!(testing::check::<Half>(json!({ "mode": "lower-half" })).is_ok());
    let refusal = |options| testing::check::<Half>(options).unwrap_err().to_string();
    assert_eq!(refusal(json!({ "mode": "upper-half" })), "option 'mode': not yet");
    assert_eq!(
        refusal(json!({ "mode": "sideways" })),
        "option 'mode': unknown variant `sideways`, expected `lower-half` or `upper-half`"
    );
    assert_eq!(testing::option_names::<Half>(), ["panics", "mode"]);
}

#[test]
fn a_leaf_fails_where_and_as_often_as_it_is_told() {
    let leaf = memory(8192);
    leaf.fail("write", 4096..8192, 28, 1);
    let (child, target) = (memory(8192), leaf.clone());
    let tee = testing::open_with::<Tee>(json!({}), &child, &[("target", &target)]).unwrap();
    block_on(async {
        tee.write(0, &[1; 512]).await.unwrap();
        assert_eq!(tee.write(4096, &[1; 512]).await.unwrap_err().code(), 28);
        tee.write(4096, &[1; 512]).await.unwrap();
        let extent = tee.block_status(0..8192).await.unwrap();
        assert_eq!((extent.flags, extent.length), (status::DATA, 512));
    });
}

#[test]
#[should_panic(expected = "nothing will ever wake it")]
fn a_future_that_waits_for_ever_is_found_out() {
    block_on(std::future::pending::<()>());
}

#[test]
fn filters_stand_on_filters() {
    let (leaf, target) = (memory(8192), memory(8192));
    let tee = testing::open_with::<Tee>(json!({}), &leaf, &[("target", &target)]).unwrap();
    let half = testing::open::<Half>(json!({}), &tee).unwrap();
    block_on(half.read(0..1)).unwrap();
    assert_eq!(leaf.seen(), ["read 0+1"]);
}

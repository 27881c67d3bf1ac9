use super::BitmapHolder;
use driveline_drivers::conformance::{Check, check};
use driveline_sdk::{
    export::Exported,
    flag,
    testing::{self, Below, json},
};

#[test]
fn it_changes_no_operation() {
    assert!(BitmapHolder::OPERATIONS.slots().iter().all(Option::is_none));
}

#[test]
fn everything_passes_as_it_is() {
    let below = testing::memory(1 << 20);
    let holder = testing::open::<BitmapHolder>(json!({}), &below).unwrap();
    testing::block_on(async {
        holder.write_with(512, b"data", flag::UNCHANGED | flag::FUA).await.unwrap();
        assert_eq!(holder.read(512..516).await.unwrap(), b"data");
        holder.flush().await.unwrap();
        holder.discard(0..512).await.unwrap();
        holder.write_zeroes(512..1024).await.unwrap();
        holder.block_status(0..4096).await.unwrap();
        holder.cache(0..4096).await.unwrap();
    });
    assert_eq!(
        below.seen(),
        [
            "write 512+4 fua unchanged",
            "read 512+4",
            "flush",
            "discard 0+512",
            "write_zeroes 512+512 may-unmap",
            "block_status 0+4096",
            "cache 0+4096",
        ]
    );
    assert_eq!(holder.info(), testing::open::<BitmapHolder>(json!({}), &holder).unwrap().info());
}

#[test]
fn it_has_no_options() {
    let refused = testing::check::<BitmapHolder>(json!({ "granularity": 512 })).unwrap_err();
    assert_eq!(refused.to_string(), "option 'granularity': there is no such option; it takes none");
}

#[test]
fn the_readme_is_true() {
    testing::check_readme::<BitmapHolder>(include_str!("../README.md"), |text| toml::from_str(text).unwrap());
}

#[test]
fn it_conforms() {
    let holder = testing::open::<BitmapHolder>(json!({}), &testing::memory(1 << 20)).unwrap();
    testing::block_on(check(&holder.edge(), Check { steps: 100, ..Check::default() }));
}

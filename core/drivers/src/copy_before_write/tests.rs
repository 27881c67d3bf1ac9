use super::{CopyBeforeWriteDriver, CopyingFilter, Settings};
use crate::conformance::options_of;
use driveline_graph::Driver;
use serde_json::json;

#[test]
fn the_options_that_are_listed_are_those_that_are_accepted() {
    let samples = json!({
        "bitmap": { "node": "active", "name": "daily" },
        "on-cbw-error": "break-snapshot",
        "cbw-timeout": 45,
        "min-cluster-size": "1MiB",
    });
    options_of(&CopyBeforeWriteDriver::default(), samples);
}

#[test]
fn a_cluster_that_can_be_none_is_refused_before_anything_is_opened() {
    let driver = CopyBeforeWriteDriver::default();
    for bytes in [1000, 3 << 20, 1 << 31] {
        let options = json!({ "min-cluster-size": bytes });
        let error = driver.check(options.as_object().unwrap()).unwrap_err();
        assert_eq!(error.option(), Some("min-cluster-size"), "{error}");
        let settings = Settings { cluster_bytes_min: bytes, ..Settings::default() };
        assert!(CopyingFilter::new(settings).is_err());
    }
}

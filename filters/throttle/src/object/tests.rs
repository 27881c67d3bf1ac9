use crate::Throttle;
use driveline_sdk::{
    Error, ObjectCall, now,
    testing::{self, Value, json},
};
use std::time::Duration;

const KIND: &str = "throttle-group";

fn object(name: &str, call: ObjectCall) -> Result<Value, Error> {
    testing::object::<Throttle>(KIND, name, call)
}

fn refused(properties: Value) -> String {
    let error = object("refused", ObjectCall::Check(properties)).unwrap_err();
    error.message().unwrap().to_owned()
}

/// What qemu-storage-daemon 10.0.2 answers to the same.
#[test]
fn what_is_refused_is_refused_in_the_words_of_qemu() {
    let both = "bps/iops/max total values and read/write values cannot be used at the same time";
    for (properties, text) in [
        (json!({ "x-iops-total": 100, "x-iops-read": 5 }), both),
        (json!({ "limits": { "bps-total": 100, "bps-write": 5 } }), both),
        (json!({ "x-iops-total-max": 5 }), "bps_max/iops_max require corresponding bps/iops values"),
        (
            json!({ "limits": { "iops-total": 5, "iops-total-max": 3 } }),
            "bps_max/iops_max cannot be lower than bps/iops",
        ),
        (
            json!({ "limits": { "iops-total": 5, "iops-total-max-length": 3 } }),
            "burst length set without burst rate",
        ),
        (
            json!({ "limits": { "iops-total": 5, "iops-total-max": 30, "iops-total-max-length": 0 } }),
            "the burst length cannot be 0",
        ),
        (json!({ "limits": { "iops-size": 5 } }), "iops size requires an iops value to be set"),
        (
            json!({ "limits": { "iops-total": 1_000_000_000_000_001_u64 } }),
            "bps/iops/max values must be within [0, 1000000000000000]",
        ),
        (
            json!({ "limits": { "iops-total": -7 } }),
            "bps/iops/max values must be within [0, 1000000000000000]",
        ),
        (json!({ "limits": { "iops-totl": 7 } }), "Parameter 'limits.iops-totl' is unexpected"),
        (json!({ "limits": 5 }), "Invalid parameter type for 'limits', expected: object"),
        (json!({ "x-foo": 9 }), "Parameter 'x-foo' is unexpected"),
    ] {
        assert_eq!(refused(properties.clone()), text, "{properties}");
    }
}

#[test]
fn properties_are_all_told_and_some_can_be_changed() {
    let limits =
        json!({ "iops-total": 5, "iops-total-max": 10, "iops-total-max-length": 3, "iops-size": 512 });
    let told = object("told", ObjectCall::Create(json!({ "limits": limits }))).unwrap();
    assert_eq!(told["limits"].as_object().unwrap().len(), 19);
    assert_eq!(told.as_object().unwrap().len(), 20);
    assert_eq!(told["limits"]["iops-total-max-length"], 3);
    assert_eq!((&told["x-iops-size"], &told["limits"]["bps-read-max-length"]), (&json!(512), &json!(1)));
    assert_eq!(object("told", ObjectCall::Get).unwrap(), told);

    let twice = object("told", ObjectCall::Create(json!({}))).unwrap_err();
    assert_eq!(twice.code(), 17);
    let late = object("told", ObjectCall::Set(json!({ "x-iops-total": 5 }))).unwrap_err();
    assert_eq!(late.message(), Some("Property cannot be set after initialization"));
    let set =
        object("told", ObjectCall::Set(json!({ "limits": { "bps-read": 9, "iops-total": 7 } }))).unwrap();
    assert_eq!((&set["limits"]["iops-total"], &set["limits"]["bps-read"]), (&json!(7), &json!(9)));
    assert_eq!(set["limits"]["iops-total-max"], 10, "what is not said stays");
    object("told", ObjectCall::Set(json!({ "limits": { "iops-read": 7 } }))).unwrap_err();
    assert_eq!(object("told", ObjectCall::Get).unwrap(), set, "a change that is refused changes nothing");
    object("told", ObjectCall::Delete).unwrap();
    assert_eq!(object("told", ObjectCall::Get).unwrap_err().code(), 2);
}

#[test]
fn a_group_that_nodes_use_cannot_go_and_one_that_is_not_there_cannot_be_used() {
    let open = || testing::open::<Throttle>(json!({ "throttle-group": "used" }), &testing::memory(4096));
    let missing = open().unwrap_err();
    assert_eq!(missing.message(), Some("Throttle group 'used' does not exist"));
    object("used", ObjectCall::Create(json!({}))).unwrap();
    let node = open().unwrap();
    let busy = object("used", ObjectCall::Delete).unwrap_err();
    assert_eq!((busy.code(), busy.message()), (16, Some("object 'used' is in use, can not be deleted")));
    drop(node);
    object("used", ObjectCall::Delete).unwrap();
}

#[test]
fn new_limits_hold_for_those_who_wait_already() {
    object("live", ObjectCall::Create(json!({ "x-iops-total": 1 }))).unwrap();
    let options = json!({ "throttle-group": "live" });
    let node = testing::open::<Throttle>(options, &testing::memory(4096)).unwrap();
    testing::block_on(async {
        let start = now();
        let reads = testing::join((0..12).map(|i| {
            let node = &node;
            async move {
                if i == 11 {
                    driveline_sdk::sleep(Duration::from_millis(500)).await;
                    object("live", ObjectCall::Set(json!({ "limits": { "iops-total": 1000 } }))).unwrap();
                } else {
                    node.read(0..512).await.unwrap();
                }
            }
        }));
        reads.await;
        let took = now() - start;
        assert!(took < Duration::from_millis(600), "{took:?}");
        // None at all.
        object("live", ObjectCall::Set(json!({ "limits": { "iops-total": 0 } }))).unwrap();
        let start = now();
        for _ in 0..5000 {
            node.read(0..512).await.unwrap();
        }
        assert_eq!(now(), start);
    });
    drop(node);
    object("live", ObjectCall::Delete).unwrap();
}

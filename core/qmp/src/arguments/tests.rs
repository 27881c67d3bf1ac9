use super::*;
use serde::Deserialize;
use serde_json::json;

#[derive(Debug, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Outer {
    name: String,
    count: Option<u32>,
    size: Option<i64>,
    flag: Option<bool>,
    mode: Option<Mode>,
    inner_list: Option<Vec<Inner>>,
}

#[derive(Debug, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Mode {
    VerySafe,
    Hard,
}

#[derive(Debug, PartialEq, Deserialize)]
struct Inner {
    node: String,
}

fn read(value: Value) -> Result<Outer, String> {
    parse(value, "").map_err(|error| error.desc)
}

#[test]
fn right_arguments_are_taken() {
    let value = json!({
        "inner-list": [{ "node": "n" }], "name": "x", "count": 4294967295u32, "size": -1, "flag": true,
        "mode": "very-safe",
    });
    let expected = Outer {
        name: "x".into(),
        count: Some(u32::MAX),
        size: Some(-1),
        flag: Some(true),
        mode: Some(Mode::VerySafe),
        inner_list: Some(vec![Inner { node: "n".into() }]),
    };
    assert_eq!(read(value), Ok(expected));
}

#[test]
fn wrong_ones_are_named_with_what_was_expected() {
    let wrong = [
        (json!({}), "Parameter 'name' is missing"),
        (json!({ "x": 1 }), "Parameter 'name' is missing"),
        (json!({ "x": 1, "name": "n" }), "Parameter 'x' is unexpected"),
        (json!({ "name": 5 }), "Invalid parameter type for 'name', expected: string"),
        (json!({ "name": null }), "Invalid parameter type for 'name', expected: string"),
        (json!({ "name": "n", "count": "5" }), "Parameter 'count' expects uint64"),
        (json!({ "name": "n", "count": 1.5 }), "Parameter 'count' expects uint64"),
        (json!({ "name": "n", "count": -5 }), "Parameter 'count' expects uint32_t"),
        (json!({ "name": "n", "count": 4294967296u64 }), "Parameter 'count' expects uint32_t"),
        (json!({ "name": "n", "size": "5" }), "Invalid parameter type for 'size', expected: integer"),
        (json!({ "name": "n", "size": u64::MAX }), "Invalid parameter type for 'size', expected: integer"),
        (json!({ "name": "n", "flag": null }), "Invalid parameter type for 'flag', expected: boolean"),
        (json!({ "name": "n", "mode": "soft" }), "Parameter 'mode' does not accept value 'soft'"),
        (json!({ "name": "n", "mode": 1 }), "Invalid parameter type for 'mode', expected: string"),
        (
            json!({ "name": "n", "inner-list": {} }),
            "Invalid parameter type for 'inner-list', expected: array",
        ),
        (
            json!({ "name": "n", "inner-list": [5] }),
            "Invalid parameter type for 'inner-list[0]', expected: object",
        ),
        (
            json!({ "name": "n", "inner-list": [{ "node": "a" }, {}] }),
            "Parameter 'inner-list[1].node' is missing",
        ),
        (
            json!({ "name": "n", "inner-list": [{ "node": "a", "b": 1 }] }),
            "Parameter 'inner-list[0].b' is unexpected",
        ),
    ];
    for (value, expected) in wrong {
        assert_eq!(read(value.clone()), Err(expected.to_owned()), "{value}");
    }
}

#[test]
fn the_place_of_the_whole_is_part_of_the_name() {
    let error = parse::<Inner>(json!({}), "actions[2].data").unwrap_err();
    assert_eq!(error.desc, "Parameter 'actions[2].data.node' is missing");
    let error = parse::<Inner>(json!(1), "actions[2].data").unwrap_err();
    assert_eq!(error.desc, "Invalid parameter type for 'actions[2].data', expected: object");
}

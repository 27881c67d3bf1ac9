use super::*;
use driveline_drivers::{MemoryDriver, NullDriver, RawDriver};
use driveline_graph::{BoxFuture, GraphOptions, OpenArgs, OpenNode};
use serde_json::json;
use std::sync::Arc;

fn graph() -> Graph {
    let graph = Graph::new(GraphOptions::default());
    for null in NullDriver::of_qemu() {
        graph.register(Arc::new(null)).unwrap();
    }
    graph.register(Arc::new(MemoryDriver::default())).unwrap();
    graph.register(Arc::new(RawDriver::default())).unwrap();
    graph.register(Arc::new(Debug::default())).unwrap();
    graph
}

/// A filter for whose child QEMU has a word of its own.
struct Debug(Description);

impl Default for Debug {
    fn default() -> Self {
        let mut debug = Description::builtin("blkdebug", DriverKind::Filter, "for tests");
        debug.children = vec![ChildSpec::required("child", Role::Filtered)];
        debug.child_words = vec!["image".into()];
        Self(debug)
    }
}

impl Driver for Debug {
    fn description(&self) -> &Description {
        &self.0
    }
    fn check(&self, _: &Options) -> driveline_graph::Result<()> {
        Ok(())
    }
    fn open<'a>(&'a self, _: OpenArgs<'a>) -> BoxFuture<'a, driveline_graph::Result<Arc<dyn OpenNode>>> {
        unreachable!("definitions are only looked at")
    }
}

fn translate(options: Value) -> Result<Value, String> {
    let Value::Object(options) = options else { panic!("an object") };
    let graph = graph();
    let change = futures::executor::block_on(graph.change());
    let node = Translator::in_change(&graph, &change).node(options);
    node.map(Value::from).map_err(|error| error.desc)
}

#[test]
fn what_is_right_stays_as_it_is() {
    let qemu = json!({ "driver": "null-co", "node-name": "n", "size": 512, "read-only": true, "discard": "unmap",
        "detect-zeroes": "unmap", "force-share": true, "active": false, "auto-read-only": true,
        "cache": { "direct": false, "no-flush": true } });
    assert_eq!(translate(qemu.clone()), Ok(qemu));
}

#[test]
fn flattened_keys_are_nested_again() {
    let flat = json!({ "driver": "raw", "file.driver": "raw", "file.file.driver": "null-co", "file.file.size": 512,
        "cache.direct": true });
    let nested = json!({ "driver": "raw", "file": { "driver": "raw", "file": { "driver": "null-co", "size": 512 } },
            "cache": { "direct": true }, "discard": "ignore" });
    assert_eq!(translate(flat), Ok(nested));
    let lists = nested_of(json!({ "rule.0.event": "read", "rule.1.event": "write", "deep.er.0": 1 }));
    assert_eq!(lists, json!({ "rule": [{ "event": "read" }, { "event": "write" }], "deep": { "er": [1] } }));
    let error = translate(json!({ "driver": "raw", "file": "x", "file.driver": "null-co" })).unwrap_err();
    assert_eq!(error, "Parameter 'file.driver' is given in two ways");
}

fn nested_of(value: Value) -> Value {
    let Value::Object(options) = value else { panic!("an object") };
    nested(options).unwrap().into()
}

/// QEMU's default. Guests' discards gave space back, and what they discarded was lost, where nobody had asked for that.
#[test]
fn discards_are_ignored_unless_something_is_said() {
    let below = json!({ "driver": "null-co" });
    for (said, means) in [(json!(null), "ignore"), (json!("unmap"), "unmap"), (json!("off"), "off")] {
        let mut options = json!({ "driver": "raw", "file": below });
        if said.is_string() {
            options["discard"] = said;
        }
        let node = translate(options).unwrap();
        assert_eq!(
            (&node["discard"], &node["file"]),
            (&json!(means), &below),
            "below it, the parent decides"
        );
    }
}

/// `image` of blkdebug was unexpected, and `file` missing, which QEMU does not know there.
#[test]
fn a_filters_child_has_the_word_that_qemu_has_for_it() {
    let below = json!({ "driver": "null-co", "size": 512 });
    for options in [
        json!({ "driver": "blkdebug", "image": below }),
        json!({ "driver": "blkdebug", "image.driver": "null-co", "image.size": 512 }),
    ] {
        assert_eq!(translate(options).unwrap()["child"], below);
    }
    for (options, expected) in [
        (json!({ "driver": "blkdebug" }), "Parameter 'image' is missing"),
        (json!({ "driver": "blkdebug", "image": {} }), "Parameter 'image.driver' is missing"),
        (
            json!({ "driver": "blkdebug", "image": 3 }),
            "Invalid parameter type for 'image', expected: BlockdevRef",
        ),
    ] {
        assert_eq!(translate(options.clone()), Err(expected.to_owned()), "{options}");
    }
}

#[test]
fn what_we_do_not_have_is_refused_by_name() {
    let wrong = [
        (json!({}), "Parameter 'driver' is missing"),
        (json!({ "driver": 1 }), "Invalid parameter type for 'driver', expected: string"),
        (json!({ "driver": "quorum" }), "Parameter 'driver' does not accept value 'quorum'"),
        (json!({ "driver": "null-co", "node-name": "1n" }), "Invalid node-name: '1n'"),
        (json!({ "driver": "null-co", "no-such-option": 1 }), "Parameter 'no-such-option' is unexpected"),
        (json!({ "driver": "raw" }), "Parameter 'file' is missing"),
        (json!({ "driver": "raw", "file": 1 }), "Invalid parameter type for 'file', expected: BlockdevRef"),
        (json!({ "driver": "raw", "file": "nofile" }), "Cannot find device='nofile' nor node-name='nofile'"),
        (json!({ "driver": "raw", "file": {} }), "Parameter 'file.driver' is missing"),
        (
            json!({ "driver": "raw", "file": { "driver": "null-co", "zz": 1 } }),
            "Parameter 'file.zz' is unexpected",
        ),
        (json!({ "driver": "null-co", "cache": { "zz": 1 } }), "Parameter 'cache.zz' is unexpected"),
        (json!({ "driver": "null-co", "cache": 1 }), "Invalid parameter type for 'cache', expected: object"),
        (
            json!({ "driver": "null-co", "cache": { "no-flush": 1 } }),
            "Invalid parameter type for 'cache.no-flush', expected: boolean",
        ),
        (
            json!({ "driver": "null-co", "detect-zeroes": "maybe" }),
            "Parameter 'detect-zeroes' does not accept value 'maybe'",
        ),
        (
            json!({ "driver": "null-co", "discard": "maybe" }),
            "Parameter 'discard' does not accept value 'maybe'",
        ),
        (
            json!({ "driver": "null-co", "read-only": 1 }),
            "Invalid parameter type for 'read-only', expected: boolean",
        ),
    ];
    for (options, expected) in wrong {
        assert_eq!(translate(options.clone()), Err(expected.to_owned()), "{options}");
    }
}

//! Faults of the graph that a reading found, each with its story.

#![allow(unreachable_pub, missing_debug_implementations, missing_docs, dead_code)]

mod kit;

use driveline_bitmap::View;
use driveline_graph::NewBitmap;
use kit::Bench;
use serde_json::json;

fn on_node(name: &str) -> NewBitmap {
    NewBitmap { view: View::Node, granularity: Some(4096), ..NewBitmap::named(name) }
}

/// A file that a format writes behind its end grows, and so does a filter between the two. The filter's bitmaps did not, and lost
/// what was written there: the next change of the graph made them longer, and clean there.
#[test]
fn a_bitmap_of_a_filter_on_a_file_records_what_is_written_behind_its_end() {
    let bench = Bench::new();
    let file = json!({ "driver": "memory", "node-name": "disk", "size": 4096 });
    let filter = json!({ "driver": "pass", "node-name": "filter", "child": file });
    bench.add(json!([{ "driver": "growing", "node-name": "image", "file": filter }])).unwrap();
    bench.change(|change| change.add_bitmap("filter", on_node("b"))).unwrap();
    bench.change(|change| change.add_bitmap("image", on_node("b"))).unwrap();
    bench.run(bench.root("image").write(0, &[1], 0)).unwrap();
    assert_eq!(bench.dirty("filter", "b"), [(4096, 4097)]);
    assert_eq!(bench.dirty("image", "b"), [(0, 4096)], "a format has a size of its own");
}

//! Faults of the graph that a reading found, each with its story.

#![allow(unreachable_pub, missing_debug_implementations, missing_docs, dead_code)]

mod kit;

use driveline_bitmap::View;
use driveline_graph::{Kind, NewBitmap};
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

/// While a job keeps a bitmap on its holder, another one at its home was given its name. When the job ended the two were merged,
/// and one of them was gone.
#[test]
fn no_bitmap_is_given_the_name_of_one_that_a_job_keeps_away() {
    let bench = Bench::new();
    bench.add(json!([{ "driver": "memory", "node-name": "disk" }])).unwrap();
    bench.change(|change| change.set_drive("vda", "disk")).unwrap();
    for (node, name) in [("vda", "kept"), ("disk", "other")] {
        bench.change(|change| change.add_bitmap(node, on_node(name))).unwrap();
    }
    bench.insert("holder", "keeps", "vda").unwrap();
    let kept = bench.graph.bitmap("disk", "kept").unwrap();
    bench.change(|change| change.park_bitmap(&kept, "keeps")).unwrap();
    for (name, new) in [("other", "kept"), ("kept", "other")] {
        let error = bench.change(|change| change.rename_bitmap("disk", name, new)).unwrap_err();
        assert_eq!(error.kind(), Kind::Exists, "{error}");
    }
    bench.change(|change| change.rename_bitmap("disk", "kept", "free")).unwrap();
    bench.change(|change| change.bring_home("keeps", "free", "vda")).unwrap();
    for name in ["free", "other"] {
        bench.graph.bitmap("disk", name).unwrap();
    }
}

//! Faults of the graph that a reading found, each with its story.

#![allow(unreachable_pub, missing_debug_implementations, missing_docs, dead_code)]

mod kit;

use driveline_bitmap::View;
use driveline_graph::{Filenames, Kind, NewBitmap, Role, RootOptions};
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

/// A filter that wants whole blocks of 4096 bytes stood on an image that ends in the middle of one. What was in the last block
/// could not be read, because the image was asked for what is behind its end; and a writer was let in whose writes there failed.
#[test]
fn the_end_of_a_node_that_is_no_whole_block_can_be_read_and_who_would_write_it_is_refused() {
    let bench = Bench::new();
    let file = json!({ "driver": "memory", "node-name": "file", "size": 4096 + 512 });
    let image = json!({ "driver": "overlay", "node-name": "image", "file": file });
    bench
        .add(json!([{ "driver": "pass", "node-name": "blocks", "alignment": 4096, "child": image }]))
        .unwrap();
    bench.run(async {
        let image = bench.graph.open_root("image", RootOptions::writer("a guest")).await.unwrap();
        image.write(4096, &[7; 512], 0).await.unwrap();
        image.close().await.unwrap();
        bench.take_log();
        let reader = bench.graph.open_root("blocks", RootOptions::reader("a reader")).await.unwrap();
        assert_eq!(&reader.read(4100..4608).await.unwrap()[..], &[7; 508]);
        assert_eq!(reader.block_status(4100..4608).await.unwrap().length, 508);
        assert_eq!(bench.take_log()[0], "blocks.read");
        let error = bench.graph.open_root("blocks", RootOptions::writer("a guest")).await.unwrap_err();
        assert_eq!((error.kind(), error.node()), (Kind::NotPermitted, Some("blocks")));
        assert!(error.to_string().contains("Image size is not a multiple of request alignment"), "{error}");
        // Below a format that grows its file the size does not matter.
        let file = json!({ "driver": "memory", "node-name": "odd", "size": 4096 + 512, "alignment": 4096 });
        let odd = json!({ "driver": "overlay", "node-name": "top", "file": file });
        let mut change = bench.graph.change().await;
        change.add_node(bench.graph.parse(odd.as_object().unwrap().clone(), &[]).unwrap()).await.unwrap();
        change.commit().await.unwrap();
        bench.graph.open_root("top", RootOptions::writer("a guest")).await.unwrap();
    });
}

/// The name of an image on a filter went into headers with our own word for the filter's child, which no other program knows.
#[test]
fn a_definition_that_is_a_name_has_the_words_that_other_programs_have() {
    let bench = Bench::new();
    let file = json!({ "driver": "throttle", "child": { "driver": "memory", "node-name": "disk" } });
    bench.add(json!([{ "driver": "growing", "node-name": "image", "file": file }])).unwrap();
    let names = Filenames::of(bench.graph.nodes());
    assert_eq!(
        names.filename(names.get("image").unwrap()),
        r#"json:{"driver":"growing","file":{"driver":"throttle","file":{"driver":"memory"}}}"#
    );
    let description = bench.graph.driver("debug").unwrap().description().clone();
    assert_eq!(description.word("child", Role::Filtered), "image");
}

/// The story: an image over a bitmap-holder was named by a definition with that filter, also in the headers of others, and no
/// program but this one could open those.
#[test]
fn a_filter_that_only_we_have_and_that_changes_no_data_is_in_no_name() {
    let bench = Bench::new();
    let file = |filter: &str| {
        let inner = json!({ "driver": "holder", "child": { "driver": "memory", "size": 512 } });
        json!({ "driver": "growing", "node-name": filter, "file": { "driver": filter, "child": inner } })
    };
    bench.add(json!([file("holder"), file("throttle"), file("shifted")])).unwrap();
    let over = json!({ "driver": "holder", "node-name": "over", "child": "holder" });
    bench.add(json!([over])).unwrap();
    let names = Filenames::of(bench.graph.nodes());
    let name = |node: &str| names.filename(names.get(node).unwrap());
    let below = r#"{"driver":"memory","size":512}"#;
    assert_eq!(name("holder"), format!(r#"json:{{"driver":"growing","file":{below}}}"#));
    assert_eq!(name("over"), name("holder"));
    for filter in ["throttle", "shifted"] {
        let expected =
            format!(r#"json:{{"driver":"growing","file":{{"driver":"{filter}","file":{below}}}}}"#);
        assert_eq!(name(filter), expected);
    }
}

/// A node that is defined in place could be given another name by a reopen: it kept the one that it had, and nobody said so.
#[test]
fn a_reopen_that_gives_a_child_another_name_is_refused() {
    let bench = Bench::new();
    let file = json!({ "driver": "memory", "node-name": "disk" });
    bench.add(json!([{ "driver": "growing", "node-name": "image", "file": file }])).unwrap();
    for (name, refused) in [("disk", false), ("other", true)] {
        let file = json!({ "driver": "memory", "node-name": name });
        let image = json!({ "driver": "growing", "node-name": "image", "file": file });
        let definition = bench.graph.parse(image.as_object().unwrap().clone(), &[]).unwrap();
        let done = bench.change(|change| change.reopen(definition));
        let said = done.err().map(|error| error.message().to_owned());
        assert_eq!(said.as_deref(), refused.then_some("Cannot change the option 'node-name'"));
    }
}

/// A file that grows below a format was served with the size that it had when the export began: what came behind was cut off.
#[test]
fn what_grows_below_a_format_is_not_served() {
    let bench = Bench::new();
    let file = json!({ "driver": "memory", "node-name": "file" });
    bench.add(json!([{ "driver": "overlay", "node-name": "image", "file": file }])).unwrap();
    bench.insert("holder", "filter", "file").unwrap();
    bench.run(async {
        for node in ["file", "filter"] {
            let serve = bench.graph.open_following_root(node, RootOptions::reader("export 'e'"));
            let error = serve.await.unwrap_err();
            assert_eq!(error.kind(), Kind::NotPermitted, "{error}");
            assert!(error.to_string().contains("resize"), "{error}");
        }
        // Whoever knows what he looks at may.
        bench.graph.open_root("file", RootOptions::reader("a reader")).await.unwrap();
        let mut change = bench.graph.change().await;
        change.set_read_only("image", true).unwrap();
        change.commit().await.unwrap();
        bench.graph.open_following_root("file", RootOptions::reader("export 'e'")).await.unwrap();
    });
}

//! Checkpoints against what was written: any delta is exact, whatever was made and deleted before.

use driveline_checkpoints::{self as checkpoints, NewCheckpoint};
use driveline_graph::{Graph, GraphOptions, Kind, Root, RootOptions};
use futures::executor::block_on;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{collections::BTreeSet, sync::Arc};

const GRANULE: u64 = 65536;
const GRANULES: u64 = 64;

async fn graph() -> Graph {
    let graph = Graph::new(GraphOptions::default());
    graph.register(Arc::new(driveline_drivers::MemoryDriver::default())).unwrap();
    let mut change = graph.change().await;
    for (node, drive) in [("a", "vda"), ("b", "vdb")] {
        let size = GRANULE * GRANULES;
        let disk = serde_json::json!({ "driver": "memory", "node-name": node, "size": size });
        change.add_node(graph.parse(disk.as_object().unwrap().clone(), &[]).unwrap()).await.unwrap();
        change.set_drive(drive, node).unwrap();
    }
    change.commit().await.unwrap();
    graph
}

async fn create(graph: &Graph, name: &str, drives: &[&str]) -> driveline_graph::Result<()> {
    let mut change = graph.change().await;
    let drives = drives.iter().map(|&drive| drive.to_owned()).collect();
    let new = NewCheckpoint { drives, ..NewCheckpoint::named(name, "") };
    checkpoints::create(graph, &mut change, &new)?;
    change.commit().await
}

async fn delete(graph: &Graph, drive: &str, name: &str) -> driveline_graph::Result<()> {
    let mut change = graph.change().await;
    checkpoints::delete(graph, &mut change, drive, name)?;
    change.commit().await
}

async fn write(guest: &Root, granule: u64) {
    guest.write(granule * GRANULE, &[1; 512], 0).await.unwrap();
}

fn dirty(bits: &driveline_bitmap::Bits) -> BTreeSet<u64> {
    bits.iter_dirty().flat_map(|range| (range.start / GRANULE)..(range.end / GRANULE)).collect()
}

#[test]
fn any_delta_is_what_was_written_between() {
    block_on(async {
        for seed in 0..30 {
            println!("seed {seed}");
            let mut random = StdRng::seed_from_u64(seed);
            let graph = graph().await;
            let guest = graph.open_root("vda", RootOptions::writer("a guest")).await.unwrap();
            // Writes and checkpoints that are kept, in the order in which they came.
            let (mut writes, mut kept): (Vec<u64>, Vec<(String, usize)>) = Default::default();
            for step in 0..120 {
                match random.random_range(0..10) {
                    0 | 1 => {
                        let name = format!("c{step}");
                        create(&graph, &name, &["vda", "vdb"]).await.unwrap();
                        kept.push((name, writes.len()));
                    }
                    2 if !kept.is_empty() => {
                        let (name, _) = kept.remove(random.random_range(0..kept.len()));
                        delete(&graph, "vda", &name).await.unwrap();
                    }
                    _ => {
                        writes.push(random.random_range(0..GRANULES));
                        write(&guest, *writes.last().unwrap()).await;
                    }
                }
                let names: Vec<_> = checkpoints::of_drive(&graph, "vda").unwrap();
                let names: Vec<_> = names.iter().map(|there| there.epoch.checkpoint.clone()).collect();
                assert_eq!(names, kept.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>());
                if let Some(from) = (!kept.is_empty()).then(|| random.random_range(0..kept.len())) {
                    let to = random.random_range(from..=kept.len());
                    let (end, until) = match kept.get(to) {
                        Some((name, at)) => (Some(name.as_str()), *at),
                        None => (None, writes.len()),
                    };
                    let bits = checkpoints::delta(&graph, "vda", &kept[from].0, end).unwrap();
                    let expected: BTreeSet<u64> = writes[kept[from].1..until].iter().copied().collect();
                    assert_eq!(dirty(&bits), expected, "from {} to {end:?}", kept[from].0);
                }
            }
        }
    });
}

#[test]
fn one_bitmap_records_whatever_the_number_of_checkpoints() {
    block_on(async {
        let graph = graph().await;
        for at in 0..50 {
            create(&graph, &format!("c{at}"), &["vda"]).await.unwrap();
        }
        let recording = graph.bitmaps("vda").unwrap().iter().filter(|bitmap| bitmap.is_recording()).count();
        assert_eq!(recording, 1);
    });
}

#[test]
fn a_delta_that_is_not_known_is_refused() {
    block_on(async {
        let graph = graph().await;
        let guest = graph.open_root("vda", RootOptions::writer("a guest")).await.unwrap();
        for at in 0..4 {
            create(&graph, &format!("c{at}"), &["vda"]).await.unwrap();
            write(&guest, at).await;
        }
        let removed = checkpoints::of_drive(&graph, "vda").unwrap()[1].bitmap.name();
        let mut change = graph.change().await;
        change.remove_bitmap("vda", removed.as_str()).unwrap();
        change.commit().await.unwrap();
        let refused = |from: &str, to: Option<&str>| {
            let error = checkpoints::delta(&graph, "vda", from, to).unwrap_err().to_string();
            assert!(error.contains("before checkpoint 'c2' is not known"), "{error}");
        };
        refused("c0", None);
        refused("c0", Some("c2"));
        refused("c0", Some("c3"));
        assert_eq!(dirty(&checkpoints::delta(&graph, "vda", "c2", None).unwrap()), [2, 3].into());
        // The gap stays one when its neighbours go.
        delete(&graph, "vda", "c2").await.unwrap();
        let error = checkpoints::delta(&graph, "vda", "c0", None).unwrap_err().to_string();
        assert!(error.contains("before checkpoint 'c3' is not known"), "{error}");
        let mut change = graph.change().await;
        let last = checkpoints::of_drive(&graph, "vda").unwrap().pop().unwrap().bitmap.name();
        change.disable_bitmap("vda", last.as_str()).unwrap();
        change.commit().await.unwrap();
        let error = checkpoints::delta(&graph, "vda", "c3", None).unwrap_err().to_string();
        assert!(error.contains("does not record"), "{error}");
        assert!(create(&graph, "c4", &["vda"]).await.is_err());
    });
}

#[test]
fn a_checkpoint_of_several_drives_is_made_for_all_or_for_none() {
    block_on(async {
        let graph = graph().await;
        create(&graph, "first", &["vdb"]).await.unwrap();
        let error = create(&graph, "first", &["vda", "vdb"]).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Exists);
        assert_eq!(checkpoints::of_drive(&graph, "vda").unwrap().len(), 0);
        create(&graph, "second", &["vda", "vdb"]).await.unwrap();
        assert_eq!(checkpoints::of_drive(&graph, "vda").unwrap().len(), 1);
        assert_eq!(create(&graph, "third", &["vda", "vda"]).await.unwrap_err().kind(), Kind::Invalid);
        assert_eq!(create(&graph, "", &["vda"]).await.unwrap_err().kind(), Kind::Invalid);
        let missing = delete(&graph, "vda", "secnod").await.unwrap_err().to_string();
        assert!(missing.contains("did you mean 'second'?"), "{missing}");
    });
}

#[test]
fn a_delta_can_be_a_bitmap_of_the_graph() {
    block_on(async {
        let graph = graph().await;
        let guest = graph.open_root("vda", RootOptions::writer("a guest")).await.unwrap();
        create(&graph, "a", &["vda"]).await.unwrap();
        write(&guest, 3).await;
        create(&graph, "b", &["vda"]).await.unwrap();
        write(&guest, 5).await;
        let mut change = graph.change().await;
        checkpoints::add_delta(&graph, &mut change, ("vda", "a", Some("b")), ("vda", "shown")).unwrap();
        change.commit().await.unwrap();
        write(&guest, 7).await;
        let shown = graph.bitmap("vda", "shown").unwrap();
        assert_eq!((dirty(shown.bits()), shown.is_recording()), ([3].into(), false));
    });
}

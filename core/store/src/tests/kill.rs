//! kill -9: what is in the page cache survives, and nothing else has to.

use std::sync::Arc;

use driveline_bitmap::Granularity;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::model::*;
use crate::{Durability, OpenOptions, Options, Store, Verdict};

/// A step that every state of a bitmap allows, or the next best thing.
pub(crate) fn step(model: &mut Model, random: &mut SmallRng) -> driveline_bitmap::Result<()> {
    let at = random.random_range(0..model.record.length.max(1));
    match random.random_range(0..15) {
        0 if !model.record.frozen => model.clear(),
        1 if !model.record.frozen => model.freeze(),
        0 | 1 if model.record.frozen => model.abdicate(),
        2 if model.record.frozen => model.reclaim(),
        3 => model.set_recording(random.random_bool(0.8)),
        4 => model.resize(random.random_range(0..12 << 20)),
        5 => {
            model.unmark(at..at + random.random_range(1..600_000));
            Ok(())
        }
        _ => {
            model.mark(at..at + random.random_range(1..300_000));
            Ok(())
        }
    }
}

#[test]
fn a_killed_process_leaves_exactly_what_was_marked() {
    for seed in 0..40 {
        let mut random = SmallRng::seed_from_u64(seed);
        let (disk, store) = create();
        let mut models = Vec::new();
        for (at, durability) in
            [Durability::Process, Durability::Power, Durability::Process].into_iter().enumerate()
        {
            let mut spec = spec(&format!("b{at}"), durability, 5 << 20);
            spec.granularity = Granularity::new(GRANULE << (2 * at)).unwrap();
            models.push(Model::new(store.add(&spec).unwrap(), &spec));
        }
        let mut store = store;
        for round in 0..4 {
            for _ in 0..random.random_range(0..25) {
                let at = random.random_range(0..models.len());
                step(&mut models[at], &mut random).unwrap();
            }
            let expected: Vec<_> = models.iter().map(Model::dirty).collect();
            let records: Vec<_> = models.iter().map(|model| model.record.clone()).collect();
            let since = models.iter().map(|model| model.record.frozen.then(|| model.dirty_in_recorder()));
            let mut expected_since = since.collect::<Vec<_>>().into_iter();
            drop((models, store));
            let opened = open(&disk, BOOT).unwrap();
            models = Vec::new();
            for ((found, expected), record) in opened.bitmaps.into_iter().zip(expected).zip(records) {
                assert_eq!(found.verdict, Verdict::Exact);
                assert_eq!(dirty(&found), expected, "seed {seed}, round {round}, {record:?}");
                let since: Option<Vec<u64>> = found.since.as_ref().map(|since| granules_of(&found, since));
                assert_eq!(since, expected_since.next().unwrap(), "seed {seed}, round {round}, {record:?}");
                assert_eq!(found.record, driveline_bitmap::Record { frozen: false, ..record });
                models.push(Model::found(found));
            }
            assert_eq!(models.len(), 3);
            store = opened.store;
        }
    }
}

#[test]
fn threads_that_mark_at_once_lose_nothing_to_each_other_nor_to_the_control_path() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vda.bitmaps");
    let store = Store::create(&path, &Options { log: Default::default(), ..options() }).unwrap();
    let spec = spec("daily", Durability::Power, 4096 * GRANULE);
    let daily = store.add(&spec).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let daily = Arc::clone(&daily);
            scope.spawn(move || {
                for granule in (0..1000).map(|at| at * 4 + thread) {
                    daily.mark(driveline_bitmap::Half::First, granule..granule + 1);
                    if granule % 97 == 0 {
                        let bytes = granule * GRANULE..(granule + 1) * GRANULE;
                        let safe = core::future::poll_fn;
                        futures::executor::block_on(safe(|context| {
                            daily.poll_safe(bytes.clone(), context.waker())
                        }))
                        .unwrap();
                    }
                }
            });
        }
        for turn in 0..10 {
            daily.reserve((4096 + turn * 600_000) * GRANULE).unwrap();
            store.set_owner(&[turn as u8]).unwrap();
            daily.take_down(&spec.record).unwrap();
        }
    });
    drop((daily, store));
    let opened = Store::open(&path, &OpenOptions::new(BOOT)).unwrap();
    assert_eq!(opened.owner.unwrap(), [9]);
    assert_eq!(opened.bitmaps[0].verdict, Verdict::Exact);
    assert_eq!(dirty(&opened.bitmaps[0]), (0..4000).collect::<Vec<_>>());
}

#[test]
fn threads_that_share_a_log_that_is_much_too_small_all_come_through() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::create(&folder.path().join("vda.bitmaps"), &options()).unwrap();
    let spec = spec("daily", Durability::Power, 1000 * LOG.extent_bytes);
    let daily = store.add(&spec).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..6 {
            let daily = Arc::clone(&daily);
            scope.spawn(move || {
                let mut random = SmallRng::seed_from_u64(thread);
                for _ in 0..50 {
                    // Now and then more extents than the log has.
                    let extents = if random.random_bool(0.1) { 20 } else { 1 };
                    let start = random.random_range(0..900) * LOG.extent_bytes;
                    let bytes = start..start + extents * LOG.extent_bytes;
                    daily.mark(driveline_bitmap::Half::First, bytes.start / GRANULE..bytes.end / GRANULE);
                    let safe =
                        core::future::poll_fn(|context| daily.poll_safe(bytes.clone(), context.waker()));
                    futures::executor::block_on(safe).unwrap();
                }
            });
        }
    });
}

#[test]
fn a_closed_store_is_exact_whatever_its_bitmaps_survive() {
    for boot in [BOOT, OTHER_BOOT] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vda.bitmaps");
        let store = Store::create(&path, &options()).unwrap();
        for (name, durability) in
            [("v", Durability::Volatile), ("p", Durability::Process), ("w", Durability::Power)]
        {
            let spec = spec(name, durability, 100 * GRANULE);
            let mut model = Model::new(store.add(&spec).unwrap(), &spec);
            model.mark(5 * GRANULE..7 * GRANULE);
            model.freeze().unwrap();
            model.mark(9 * GRANULE..9 * GRANULE + 1);
        }
        store.close_clean().unwrap();
        let opened = Store::open(&path, &OpenOptions::new(boot)).unwrap();
        assert!(opened.clean);
        for found in &opened.bitmaps {
            assert_eq!(
                (&found.verdict, dirty(found)),
                (&Verdict::Exact, vec![5, 6, 9]),
                "{:?}",
                found.record
            );
        }
        // It is open now: what a crash leaves is judged anew.
        drop(opened);
        let opened = Store::open(&path, &OpenOptions::new(BOOT)).unwrap();
        let all_dirty = |found: &crate::Found| matches!(found.verdict, Verdict::AllDirty { .. });
        let process = boot != BOOT;
        assert_eq!(opened.bitmaps.iter().map(all_dirty).collect::<Vec<_>>(), [true, process, false]);
        assert_eq!(dirty(&opened.bitmaps[0]).len(), 100);
        assert_eq!(dirty(&opened.bitmaps[2]), [5, 6, 9]);
    }
}

#[test]
fn a_second_opener_is_kept_out_as_long_as_a_ledger_lives() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vda.bitmaps");
    let store = Store::create(&path, &options()).unwrap();
    let daily = store.add(&spec("daily", Durability::Process, GRANULE)).unwrap();
    let error = Store::open(&path, &OpenOptions::new(BOOT)).unwrap_err().to_string();
    assert!(error.contains("vda.bitmaps is in use"), "{error}");
    drop(store);
    assert!(Store::open(&path, &OpenOptions::new(BOOT)).is_err());
    drop(daily);
    assert!(Store::open(&path, &OpenOptions::new(BOOT)).is_ok());
    assert!(Store::create(&path, &options()).is_err());
}

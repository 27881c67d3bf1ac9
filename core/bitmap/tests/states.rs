//! What a bitmap's state allows, the laws of the successor, and sets of bitmaps.
#![expect(clippy::single_range_in_vec_init, reason = "a list of ranges may hold one")]

use std::sync::{Arc, Barrier};
use std::thread;

use driveline_bitmap::{
    Bitmap, BitmapName, BitmapSet, Bits, Error, Granularity, Operation, StoreBinding, View,
};
use proptest::prelude::*;

const LENGTH: u64 = 1 << 20;

fn name(name: &str) -> BitmapName {
    BitmapName::new(name).unwrap()
}

fn bitmap(text: &str) -> Arc<Bitmap> {
    Arc::new(Bitmap::new(name(text), Granularity::MIN, LENGTH))
}

fn dirty(bits: &Bits) -> Vec<u64> {
    bits.iter_dirty()
        .flat_map(|range| (range.start >> 9..range.end.div_ceil(512)).collect::<Vec<_>>())
        .collect()
}

fn mark(bitmap: &Bitmap, granule: u64) {
    bitmap.mark(granule << 9..(granule << 9) + 1);
}

#[test]
fn only_a_recording_bitmap_is_marked() {
    let daily = bitmap("daily");
    mark(&daily, 1);
    daily.disable().unwrap();
    mark(&daily, 2);
    assert_eq!(dirty(daily.bits()), [1]);
    daily.mark_unconditionally(1024..1025);
    daily.enable().unwrap();
    mark(&daily, 3);
    assert_eq!(dirty(daily.bits()), [1, 2, 3]);
    daily.clear().unwrap();
    assert!(daily.bits().is_clean() && daily.is_recording());
}

/// The table of QEMU's check masks.
#[test]
fn each_state_refuses_what_qemu_refuses() {
    use Operation::{Clear, Disable, Enable, Freeze, MergeFrom, MergeInto, Populate, Remove, Rename, Use};
    let all = [Remove, Clear, Enable, Disable, MergeInto, MergeFrom, Populate, Rename, Freeze, Use];
    let refused = |bitmap: &Bitmap| -> Vec<Operation> {
        all.into_iter().filter(|&operation| bitmap.check(operation).is_err()).collect()
    };
    let daily = bitmap("daily");
    assert_eq!(refused(&daily), []);

    let used = daily.begin_use("mirror job7").unwrap();
    assert_eq!(refused(&daily), [Remove, Clear, Enable, Disable, MergeInto, MergeFrom, Populate, Freeze]);
    assert_eq!(
        daily.clear().unwrap_err().to_string(),
        "cannot clear bitmap 'daily': it is busy (in use by mirror job7), expected one that nobody uses"
    );
    drop(used);

    daily.set_readonly(true);
    assert_eq!(refused(&daily), [Remove, Clear, MergeInto, Populate, Rename, Freeze]);
    let error = daily.clear().unwrap_err().to_string();
    assert!(error.contains("readonly") && error.contains("expected one that may be changed"), "{error}");

    let lost = Bitmap::new(name("lost"), Granularity::MIN, LENGTH).with_lost_contents();
    assert_eq!(refused(&lost), [Clear, Enable, Disable, MergeInto, MergeFrom, Populate, Freeze, Use]);
    assert!(!lost.is_recording() && lost.info().inconsistent);
    assert!(lost.enable().unwrap_err().to_string().contains("expected one whose contents are valid"));
}

#[test]
fn a_bitmap_is_busy_until_its_last_user_goes() {
    let daily = bitmap("daily");
    let (one, two) = (daily.begin_use("job0").unwrap(), daily.begin_use("job0").unwrap());
    assert_eq!(daily.users(), ["job0", "job0"]);
    drop(one);
    assert!(daily.is_busy() && two.bitmap().id() == daily.id());
    drop(two);
    assert!(!daily.is_busy());
}

/// An export showed a bitmap that was removed meanwhile. It recorded no more, and a backup by it would have lacked
/// what was written since.
#[test]
fn a_bitmap_that_is_shown_can_be_changed_but_not_removed() {
    let mut set = BitmapSet::new();
    set.add(bitmap("daily")).unwrap();
    let daily = set.get("daily").unwrap().clone();
    let (one, two) = (daily.keep("export 'a'"), daily.keep("export 'b'"));
    assert!(!daily.is_busy() && one.bitmap().id() == daily.id());
    daily.clear().unwrap();
    set.rename("daily", name("weekly")).unwrap();
    let refused = set.remove("weekly").unwrap_err().to_string();
    assert!(refused.contains("shown by export 'a', export 'b'"), "{refused}");
    drop(one);
    assert!(set.remove("weekly").is_err());
    drop(two);
    set.remove("weekly").unwrap();
}

#[test]
fn a_refused_merge_names_the_bitmap_at_fault() {
    let (daily, weekly) = (bitmap("daily"), bitmap("weekly"));
    mark(&daily, 4);
    let used = daily.begin_use("job0").unwrap();
    assert!(weekly.merge_from(&daily).unwrap_err().to_string().contains("cannot merge from bitmap 'daily'"));
    assert!(daily.merge_from(&weekly).unwrap_err().to_string().contains("cannot merge into bitmap 'daily'"));
    drop(used);
    weekly.merge_from(&daily).unwrap();
    daily.merge_from(&daily).unwrap();
    assert_eq!((dirty(weekly.bits()), dirty(daily.bits())), (vec![4], vec![4]));

    let longer = Bitmap::new(name("longer"), Granularity::MIN, LENGTH + 1);
    assert_eq!(
        weekly.merge_from(&longer).unwrap_err().to_string(),
        "cannot merge bitmap 'longer' of 1048577 bytes into 'weekly' of 1048576 bytes, expected equal lengths"
    );
}

#[test]
fn a_clear_can_be_undone() {
    let daily = bitmap("daily");
    mark(&daily, 9);
    let saved = daily.bits().clone();
    daily.clear().unwrap();
    mark(&daily, 1);
    daily.restore(&saved).unwrap();
    assert_eq!(dirty(daily.bits()), [9]);
    assert!(daily.restore(&Bits::new(Granularity::MIN, 5)).is_err());
    assert_eq!(dirty(daily.bits()), [9], "what does not fit changes nothing");
}

#[test]
fn a_resize_dirties_what_grows_for_the_drive_only() {
    let recording = bitmap("recording");
    let node = Bitmap::new(name("node"), Granularity::MIN, LENGTH).with_view(View::Node);
    let disabled = Bitmap::new(name("disabled"), Granularity::MIN, LENGTH).with_recording(false);
    for bitmap in [&*recording, &node, &disabled] {
        bitmap.resize(LENGTH + 1024);
        assert_eq!(bitmap.length(), LENGTH + 1024);
    }
    assert_eq!(recording.bits().iter_dirty().collect::<Vec<_>>(), [LENGTH..LENGTH + 1024]);
    assert!(node.bits().is_clean() && disabled.bits().is_clean());

    // Frozen bits follow, the successor records the growth.
    let frozen = recording.freeze("backup").unwrap();
    recording.resize(LENGTH + 512);
    recording.resize(LENGTH + 2048);
    assert_eq!(frozen.bits().iter_dirty().collect::<Vec<_>>(), [LENGTH..LENGTH + 512]);
    frozen.abdicate();
    assert_eq!(recording.bits().iter_dirty().collect::<Vec<_>>(), [LENGTH + 512..LENGTH + 2048]);
}

/// A client read a bitmap while a backup failed: the part that it had not reached yet was merged into the other half and
/// cleared, and was told as clean.
#[test]
fn who_reads_while_a_freeze_ends_reads_again() {
    for success in [false, true] {
        let daily = bitmap("daily");
        mark(&daily, 1);
        let mut frozen = Some(daily.freeze("backup").unwrap());
        mark(&daily, 2);
        let mut reads = 0;
        let found = daily.read(|bits| {
            reads += 1;
            match frozen.take() {
                Some(frozen) if success => frozen.abdicate(),
                Some(frozen) => frozen.reclaim(),
                None => {}
            }
            dirty(bits)
        });
        assert_eq!((found, reads), (if success { vec![2] } else { vec![1, 2] }, 2));
    }
}

#[test]
fn a_bitmap_that_grows_never_gets_shorter() {
    let node = Bitmap::new(name("node"), Granularity::MIN, 512).with_view(View::Node);
    node.grow(4096);
    node.mark(3584..4096);
    node.grow(1024);
    assert_eq!((node.length(), node.bits().iter_dirty().collect::<Vec<_>>()), (4096, [3584..4096].into()));
}

#[test]
fn a_frozen_bitmap_keeps_its_identity_its_name_and_its_bits() {
    let daily = bitmap("daily");
    let before = daily.info();
    mark(&daily, 1);
    let frozen = daily.freeze("backup of vda").unwrap();
    mark(&daily, 2);
    assert_eq!(dirty(frozen.bits()), [1]);
    assert_eq!(dirty(daily.bits()), [1], "a reader sees what stands still");
    assert_eq!(dirty(daily.recording_bits()), [2]);
    let info = daily.info();
    assert_eq!((info.id, &info.name, info.count), (before.id, &before.name, 512));
    assert!(info.busy && info.recording && daily.is_frozen());
    assert_eq!(info.users, ["backup of vda"]);
    assert!(daily.freeze("another").unwrap_err().to_string().contains("in use by backup of vda"));
    assert!(daily.clear().is_err() && daily.disable().is_err());

    frozen.abdicate();
    assert_eq!(dirty(daily.bits()), [2]);
    assert!(!daily.is_busy() && !daily.is_frozen());

    let frozen = daily.freeze("backup of vda").unwrap();
    mark(&daily, 3);
    frozen.reclaim();
    assert_eq!(dirty(daily.bits()), [2, 3]);

    drop(daily.freeze("a backup that dies").unwrap());
    assert_eq!(dirty(daily.bits()), [2, 3], "an unfinished backup loses nothing");
    assert!(!daily.is_busy());
}

#[test]
fn a_disabled_bitmap_has_a_successor_that_does_not_record() {
    let daily = bitmap("daily");
    mark(&daily, 1);
    daily.disable().unwrap();
    let frozen = daily.freeze("backup").unwrap();
    mark(&daily, 2);
    assert!(!daily.is_recording() && daily.recording_bits().is_clean());
    frozen.reclaim();
    assert_eq!(dirty(daily.bits()), [1]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() })]

    /// Marks between freezes end up where a success or a failure of each puts them.
    #[test]
    fn any_row_of_backups_keeps_exactly_what_was_not_backed_up(
        backups in prop::collection::vec(
            (prop::collection::btree_set(0..64_u64, 0..8), prop::collection::btree_set(0..64_u64, 0..8), any::<bool>()),
            1..8,
        ),
    ) {
        let daily = bitmap("daily");
        let mut expected = std::collections::BTreeSet::new();
        for (before, during, success) in backups {
            before.iter().for_each(|&granule| mark(&daily, granule));
            expected.extend(before);
            let frozen = daily.freeze("backup").unwrap();
            during.iter().for_each(|&granule| mark(&daily, granule));
            prop_assert_eq!(dirty(frozen.bits()), expected.iter().copied().collect::<Vec<_>>());
            if success {
                expected.clear();
                frozen.abdicate();
            } else {
                frozen.reclaim();
            }
            expected.extend(during);
            prop_assert_eq!(dirty(daily.bits()), expected.iter().copied().collect::<Vec<_>>());
        }
    }
}

/// Every mark is in some backup or still in the bitmap: neither end of a freeze drops one that races with it.
#[test]
fn marks_that_race_with_the_end_of_a_freeze_are_kept() {
    let daily = bitmap("daily");
    let start = Barrier::new(2);
    thread::scope(|scope| {
        let (daily, start) = (&daily, &start);
        scope.spawn(move || {
            start.wait();
            (0..LENGTH >> 9).for_each(|granule| mark(daily, granule));
        });
        let frozen = daily.freeze("backup").unwrap();
        start.wait();
        frozen.abdicate();
    });
    assert_eq!(daily.bits().dirty_bytes(), LENGTH);
}

#[test]
fn names_are_unique_in_a_set_and_errors_tell_what_is_there() {
    let mut set = BitmapSet::new();
    assert_eq!(
        set.find("daily").unwrap_err().to_string(),
        "there is no bitmap 'daily', expected none: no bitmap is attached here"
    );
    let (daily, weekly) = (bitmap("daily"), bitmap("weekly"));
    set.add(Arc::clone(&daily)).unwrap();
    set.add(Arc::clone(&weekly)).unwrap();
    assert_eq!(set.add(bitmap("daily")), Err(Error::NameTaken { name: "daily".into() }));
    assert_eq!(
        set.find("monthly").unwrap_err().to_string(),
        "there is no bitmap 'monthly', expected one of 'daily', 'weekly'"
    );
    assert_eq!(set.rename("daily", name("weekly")), Err(Error::NameTaken { name: "weekly".into() }));

    let used = daily.begin_use("export").unwrap();
    set.rename("daily", name("monday")).unwrap();
    set.rename("monday", name("monday")).unwrap();
    assert_eq!(daily.name(), "monday");
    assert!(set.get("daily").is_none() && set.get_id(daily.id()).is_some());
    assert!(set.remove("monday").is_err());
    drop(used);
    assert_eq!(set.remove("monday").unwrap().id(), daily.id());
    assert_eq!(set.iter().map(|bitmap| bitmap.name().to_string()).collect::<Vec<_>>(), ["weekly"]);
}

#[test]
fn a_snapshot_does_not_follow_the_set() {
    let mut set = BitmapSet::new();
    set.add(bitmap("daily")).unwrap();
    let snapshot = set.snapshot();
    set.remove("daily").unwrap();
    assert_eq!((snapshot.len(), set.len(), set.is_empty()), (1, 0, true));
}

#[test]
fn a_moved_bitmap_takes_the_place_of_its_namesake_and_its_bits() {
    let store = StoreBinding::Sidecar { path: "daily.bits".into() };
    let present = Arc::new(
        Bitmap::new(name("daily"), Granularity::new(4096).unwrap(), LENGTH).with_store(store.clone()),
    );
    present.mark(0..1);
    let (mut home, mut away) = (BitmapSet::new(), BitmapSet::new());
    home.add(Arc::clone(&present)).unwrap();
    home.add(bitmap("weekly")).unwrap();
    let moved = bitmap("daily");
    away.add(Arc::clone(&moved)).unwrap();
    mark(&moved, 100);
    // Its users go along.
    let used = moved.begin_use("job0").unwrap();

    let taken = away.take(moved.id()).unwrap();
    let gave_way = home.put(taken).unwrap().unwrap();
    assert_eq!(gave_way.id(), present.id());
    let names: Vec<_> = home.iter().map(|bitmap| (bitmap.id(), bitmap.name().to_string())).collect();
    assert_eq!(names[0], (moved.id(), "daily".to_owned()));
    assert_eq!(dirty(moved.bits()), [0, 1, 2, 3, 4, 5, 6, 7, 100]);
    assert_eq!((moved.store(), moved.is_persistent()), (Some(store), true));
    drop(used);

    assert!(home.put(Arc::clone(&moved)).unwrap().is_none(), "what is here already stays");
    assert_eq!(home.len(), 2);
}

#[test]
fn a_refused_move_changes_nothing() {
    let mut home = BitmapSet::new();
    let present = bitmap("daily");
    home.add(Arc::clone(&present)).unwrap();
    let moved = bitmap("daily");
    mark(&present, 1);
    let used = present.begin_use("job0").unwrap();
    assert!(matches!(home.put(Arc::clone(&moved)), Err(Error::Refused { .. })));
    drop(used);
    let longer = Arc::new(Bitmap::new(name("daily"), Granularity::MIN, LENGTH * 2));
    assert!(matches!(home.put(longer), Err(Error::LengthsDiffer { .. })));
    assert!(moved.bits().is_clean());
    assert_eq!(home.get("daily").unwrap().id(), present.id());
}

//! Bugs that change trackers of others had, each with its story, and none of them here.

use core::task::Poll;

use driveline_bitmap::Half;
use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::model::*;
use crate::{Durability, Fingerprint, OpenOptions, Store, Verdict};

/// dm-era, 2021: after a crash the set that had been committed was ignored, and a resize wiped it. Backups missed what
/// had changed before the crash.
#[test]
fn the_committed_set_survives_a_crash_and_a_resize() {
    let (disk, store) = create();
    let spec = spec("daily", Durability::Power, 100 * GRANULE);
    let mut daily = Model::new(store.add(&spec).unwrap(), &spec);
    daily.mark(5 * GRANULE..6 * GRANULE);
    assert!(poll(&*daily.ledger, 5 * GRANULE..6 * GRANULE).is_pending());
    commit(&store);
    drop((daily, store));
    let mut opened = open_bytes(&disk.after_power_cut(&mut SmallRng::seed_from_u64(0)), OTHER_BOOT).unwrap();
    let found = opened.bitmaps.remove(0);
    assert!(matches!(found.verdict, Verdict::Superset { extents: 1, .. }));
    let mut daily = Model::found(found);
    let before = daily.dirty();
    assert!(before.contains(&5));
    for length in [90 * GRANULE, 700_000 * GRANULE, 95 * GRANULE] {
        daily.resize(length).unwrap();
    }
    let after = daily.dirty();
    assert!(before.iter().all(|granule| after.contains(granule)));
    assert!((90..95).all(|granule| after.contains(&granule)));
}

/// dm-era and librbd (tracker 16176): the bit in memory was set first and the disk was written after. A second writer saw the
/// bit, took it for durable, and its data reached the disk before the mark.
#[test]
fn a_second_writer_does_not_slip_past_a_mark_that_is_not_durable() {
    let (disk, store) = create();
    let spec = spec("daily", Durability::Power, 100 * GRANULE);
    let mut daily = Model::new(store.add(&spec).unwrap(), &spec);
    let write = GRANULE..2 * GRANULE;
    daily.mark(write.clone());
    assert!(poll(&*daily.ledger, write.clone()).is_pending());
    // The second one comes at each operation of the flight of the first: its own bit is set, and nothing is durable.
    let ledger = daily.ledger.clone();
    let syncs = disk.syncs();
    disk.set_witness(Some(Box::new(move |disk| {
        ledger.mark(Half::First, 1..2);
        let second = poll(&*ledger, GRANULE..GRANULE + 4096);
        assert!(second.is_pending() || disk.syncs() > syncs, "{second:?}");
    })));
    let log = store.shared.core().log.clone().unwrap();
    assert!(log.commit());
    disk.set_witness(None);
    assert!(matches!(poll(&*daily.ledger, write), Poll::Ready(Ok(()))));
    // Nor does one that comes when the extent has just been let go.
    for extent in 1..20 {
        let write = extent * LOG.extent_bytes..extent * LOG.extent_bytes + 1;
        daily.mark(write.start..write.start + 1);
        let _ = poll(&*daily.ledger, write);
        commit(&store);
    }
    assert!(poll(&*daily.ledger, GRANULE..GRANULE + 1).is_pending());
}

/// qmpbackup #25, OpenNebula #7092: a backup died, its bitmap stayed busy or in use, and no later backup could be made.
#[test]
fn what_a_dead_backup_had_frozen_is_usable_and_whole() {
    let (disk, store) = create();
    let spec = spec("daily", Durability::Process, 100 * GRANULE);
    let mut daily = Model::new(store.add(&spec).unwrap(), &spec);
    daily.mark(0..GRANULE);
    daily.freeze().unwrap();
    daily.mark(9 * GRANULE..10 * GRANULE);
    drop((daily, store));
    let mut opened = open(&disk, BOOT).unwrap();
    let mut daily = Model::found(opened.bitmaps.remove(0));
    assert!(!daily.record.frozen);
    assert_eq!(daily.dirty(), [0, 9]);
    daily.freeze().unwrap();
    daily.abdicate().unwrap();
    drop((daily, opened));
    assert_eq!(dirty(&open(&disk, BOOT).unwrap().bitmaps[0]), [] as [u64; 0]);
}

/// qcow2's autoclear bits exist since tools without bitmap support write to images. A file beside the image has no such
/// bit: what it remembers of the image must tell.
#[test]
fn an_image_that_was_changed_outside_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let (path, image) = (folder.path().join("vda.bitmaps"), folder.path().join("active.qcow2"));
    std::fs::write(&image, "data").unwrap();
    let store = Store::create(&path, &options()).unwrap();
    let changed = std::fs::metadata(&image).unwrap().modified().unwrap();
    store.set_owner(&Fingerprint::take(&[&image]).unwrap().encode()).unwrap();
    store.heartbeat(changed);
    store.close_clean().unwrap();
    let later = changed + std::time::Duration::from_secs(3);
    std::fs::File::options().write(true).open(&image).unwrap().set_modified(later).unwrap();
    let opened = Store::open(&path, &OpenOptions::new(BOOT)).unwrap();
    let before = Fingerprint::decode(&opened.owner.unwrap()).unwrap();
    let now = Fingerprint::take(&[&image]).unwrap();
    let told = before.differences(&now);
    assert!(
        told.len() == 1 && told[0].contains("active.qcow2 was changed at ") && told[0].contains(", after ")
    );
    assert_eq!(now.changed_after(opened.heartbeat.unwrap()).len(), 1);
    assert!(before.changed_after(opened.heartbeat.unwrap()).is_empty());
}

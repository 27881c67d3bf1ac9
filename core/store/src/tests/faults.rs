//! Disks that are full or broken for a while.

use core::task::Poll;

use driveline_bitmap::{Error as BitmapError, Half};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rustix::io::Errno;

use super::disk::Op;
use super::model::*;
use crate::header::HEARTBEAT;
use crate::{Durability, Error, Verdict};

fn errno<T: core::fmt::Debug>(result: Poll<driveline_bitmap::Result<T>>) -> i32 {
    match result {
        Poll::Ready(Err(BitmapError::Store { errno, .. })) => errno,
        other => panic!("{other:?} is no error of a store"),
    }
}

#[test]
fn everyone_who_waits_for_a_failed_flight_is_told_and_the_next_flight_tries_again() {
    for op in [Op::Write, Op::Sync] {
        let (disk, store) = create();
        let spec = spec("daily", Durability::Power, 8 << 20);
        let mut daily = Model::new(store.add(&spec).unwrap(), &spec);
        disk.set_rule(Some(Box::new(move |found, _| (found == op).then_some(Errno::IO))));
        let writes = [0..GRANULE, GRANULE * 40..GRANULE * 41, 0..8 << 20];
        for _ in 0..3 {
            for write in &writes {
                daily.mark(write.clone());
                assert!(poll(&*daily.ledger, write.clone()).is_pending());
            }
            commit(&store);
            for write in &writes {
                assert_eq!(errno(poll(&*daily.ledger, write.clone())), Errno::IO.raw_os_error());
            }
        }
        // Nothing became active by that.
        assert!(poll(&*daily.ledger, writes[0].clone()).is_pending());
        disk.set_rule(None);
        commit(&store);
        for write in &writes {
            if poll(&*daily.ledger, write.clone()).is_pending() {
                commit(&store);
                assert!(poll(&*daily.ledger, write.clone()).is_ready());
            }
        }
        let opened = open_bytes(&disk.after_power_cut(&mut SmallRng::seed_from_u64(0)), OTHER_BOOT).unwrap();
        assert_eq!(dirty(&opened.bitmaps[0]).len(), 128, "{op:?}");
    }
}

#[test]
fn what_a_failed_sync_lost_is_written_by_the_next_one() {
    let (disk, store) = create();
    let spec = spec("daily", Durability::Power, 8 << 20);
    let mut daily = Model::new(store.add(&spec).unwrap(), &spec);
    // Too much for the log, so that its bits alone make it safe.
    let write = 0..8 << 20;
    daily.mark(write.clone());
    let mut syncs = 0;
    disk.set_rule(Some(Box::new(move |op, _| {
        syncs += usize::from(op == Op::Sync);
        (op == Op::Sync && syncs == 1).then_some(Errno::IO)
    })));
    assert!(poll(&*daily.ledger, write.clone()).is_pending());
    commit(&store);
    assert_eq!(errno(poll(&*daily.ledger, write.clone())), Errno::IO.raw_os_error());
    assert!(poll(&*daily.ledger, write.clone()).is_pending());
    commit(&store);
    assert!(poll(&*daily.ledger, write).is_ready());
    for seed in 0..10 {
        let opened =
            open_bytes(&disk.after_power_cut(&mut SmallRng::seed_from_u64(seed)), OTHER_BOOT).unwrap();
        assert_eq!(dirty(&opened.bitmaps[0]).len(), 128);
    }
}

#[test]
fn a_record_that_cannot_be_settled_leaves_the_one_before_whatever_fails() {
    for seed in 0..150 {
        let mut random = SmallRng::seed_from_u64(seed);
        let (disk, store) = create();
        let durability = if seed % 2 == 0 { Durability::Power } else { Durability::Process };
        let spec = spec("daily", durability, 5 << 20);
        let mut daily = Model::new(store.add(&spec).unwrap(), &spec);
        for _ in 0..12 {
            // One operation fails, or all from there on, until the step is over.
            let (mut at, for_ever) = (random.random_range(0..6), random.random_bool(0.3));
            let error = [Errno::IO, Errno::NOSPC][random.random_range(0..2)];
            disk.set_rule(Some(Box::new(move |_, _| {
                at -= 1;
                (at == -1 || for_ever && at < 0).then_some(error)
            })));
            let before = (daily.record.clone(), daily.dirty());
            let step = super::kill::step(&mut daily, &mut random);
            if let Err(error) = step {
                assert!(matches!(&error, BitmapError::Store { name, .. } if name == "daily"), "{error}");
                assert_eq!(before, (daily.record.clone(), daily.dirty()), "seed {seed}");
            }
            // As long as nobody knows what the header says, no data may be written.
            let doubt = store.shared.core().volume.in_doubt();
            if doubt && for_ever {
                assert_eq!(errno(poll(&*daily.ledger, 0..1)), error.raw_os_error(), "seed {seed}");
            }
            disk.set_rule(None);
            let safe = poll(&*daily.ledger, 0..1);
            assert!(!matches!(safe, Poll::Ready(Err(_))), "seed {seed}: {safe:?}");
            assert!(!store.shared.core().volume.in_doubt());
        }
        let expected = daily.dirty();
        let record = daily.record.clone();
        drop((daily, store));
        let opened = open(&disk, BOOT).unwrap();
        assert_eq!(opened.bitmaps[0].verdict, Verdict::Exact);
        assert_eq!(dirty(&opened.bitmaps[0]), expected, "seed {seed}, {record:?}");
    }
}

#[test]
fn a_full_disk_is_an_error_of_whoever_needs_room_and_changes_nothing() {
    let (disk, store) = create();
    let spec = spec("daily", Durability::Process, 5 << 20);
    let mut daily = Model::new(store.add(&spec).unwrap(), &spec);
    daily.mark(0..1);
    let full = |op, _| (op == Op::Reserve).then_some(Errno::NOSPC);
    disk.set_rule(Some(Box::new(full)));
    let nospc = Errno::NOSPC.raw_os_error();
    // The second half is reserved when it is first needed, and a longer drive before it is longer.
    assert_eq!(errno(Poll::Ready(daily.freeze())), nospc);
    assert_eq!(errno(Poll::Ready(daily.resize(1 << 40))), nospc);
    let error = store.add(&super::model::spec("weekly", Durability::Process, 1)).unwrap_err();
    assert!(matches!(&error, Error::Io { source, .. } if source.raw_os_error() == Some(nospc)), "{error}");
    assert_eq!(daily.dirty(), [0]);
    daily.mark(1 << 20..(1 << 20) + 1);
    // What has its room already needs no more.
    daily.resize(6 << 20).unwrap();
    disk.set_rule(None);
    daily.freeze().unwrap();
    daily.mark(2 << 20..(2 << 20) + 1);
    drop(daily);
    drop(store);
    let opened = open(&disk, BOOT).unwrap();
    assert_eq!(opened.bitmaps.len(), 1);
    assert_eq!(dirty(&opened.bitmaps[0]), (0..1).chain([16, 32]).chain(80..96).collect::<Vec<_>>());
}

#[test]
fn a_batch_is_settled_as_a_whole_or_not_at_all() {
    for fails in [false, true] {
        let (disk, store) = create();
        let names = ["a", "b"].map(|name| spec(name, Durability::Process, 5 << 20));
        let mut both = names.map(|spec| Model::new(store.add(&spec).unwrap(), &spec));
        both.iter_mut().for_each(|model| model.mark(0..1));
        let cut = |disk: &super::disk::TestDisk| {
            let opened = open_bytes(&disk.memory.bytes(), BOOT).unwrap();
            (opened.bitmaps.iter().map(dirty).collect::<Vec<_>>(), opened.owner.unwrap())
        };
        let before = cut(&disk);
        assert_eq!(before, (vec![vec![0], vec![0]], b"vda".to_vec()));
        store.begin_batch().unwrap();
        assert!(store.begin_batch().is_err());
        both[0].clear().unwrap();
        both[1].freeze().unwrap();
        both[1].mark(GRANULE..GRANULE + 1);
        let added = store.add(&spec("c", Durability::Process, 1)).unwrap();
        both[1].ledger.forget().unwrap();
        both[1].ledger.take_down(&both[1].record).unwrap();
        store.set_owner(b"new").unwrap();
        assert_eq!(cut(&disk), before, "nothing is settled, and nothing that counts was wiped");
        if fails {
            disk.set_rule(Some(Box::new(|op, _| (op == Op::Write).then_some(Errno::IO))));
            store.end_batch().unwrap_err();
            disk.set_rule(None);
            assert!(matches!(poll(&*added, 0..1), Poll::Ready(Ok(()))));
            assert_eq!(cut(&disk), before);
        } else {
            store.end_batch().unwrap();
            assert_eq!(cut(&disk), (vec![vec![], vec![0, 1], vec![]], b"new".to_vec()));
            assert!(!both[0].ledger.counts(Half::First) && both[1].ledger.counts(Half::First));
        }
    }
}

#[test]
fn room_of_a_bitmap_that_is_gone_is_given_back_and_used_again() {
    let (disk, store) = create();
    let spec = spec("daily", Durability::Process, 5 << 20);
    let length = |disk: &super::disk::TestDisk| disk.memory.bytes().len();
    let before = length(&disk);
    for _ in 0..5 {
        let daily = store.add(&spec).unwrap();
        daily.mark(Half::First, 3..5);
        daily.forget().unwrap();
        // As long as it may be taken down again, its bits stay.
        daily.take_down(&spec.record).unwrap();
        assert_eq!(dirty(&open_bytes(&disk.memory.bytes(), BOOT).unwrap().bitmaps[0]), [3, 4]);
        daily.forget().unwrap();
        drop(daily);
        store.flush().unwrap();
        assert!(disk.memory.bytes()[before..].iter().all(|&byte| byte == 0), "its bits are gone");
    }
    assert_eq!(length(&disk), before + crate::region::ALIGN as usize);
    store.heartbeat(std::time::SystemTime::now());
    assert_ne!(disk.memory.bytes()[HEARTBEAT as usize..][..8], [0; 8]);
}

#[test]
fn a_steady_random_load_costs_one_sync_a_batch() {
    let (disk, store) = create();
    let spec = spec("daily", Durability::Power, 8 << 20);
    let mut random = SmallRng::seed_from_u64(0);
    let daily = Model::new(store.add(&spec).unwrap(), &spec);
    let before = disk.syncs();
    for _ in 0..200 {
        let start = random.random_range(0..8 << 20_u64) / 4096 * 4096;
        let ready = poll(&*daily.ledger, start..start + 4096).is_ready();
        let log = store.shared.core().log.clone().unwrap();
        assert_ne!(log.commit(), ready);
        assert!(ready || poll(&*daily.ledger, start..start + 4096).is_ready(), "one flight is enough");
    }
    assert!(disk.syncs() - before <= 200);
}

#[test]
fn an_answer_for_bits_that_were_cleared_since_says_nothing_of_those_set_after() {
    let (_, store) = create();
    let spec = spec("daily", Durability::Power, 8 << 20);
    let mut daily = Model::new(store.add(&spec).unwrap(), &spec);
    // Too much for the log, so that nothing becomes active by it.
    let write = 0..8 << 20;
    daily.mark(write.clone());
    assert!(poll(&*daily.ledger, write.clone()).is_pending());
    commit(&store);
    daily.clear().unwrap();
    daily.mark(write.clone());
    assert!(poll(&*daily.ledger, write.clone()).is_pending(), "its new bits are not on disk");
    commit(&store);
    assert!(poll(&*daily.ledger, write).is_ready());
}

#[test]
fn a_flush_brings_everything_to_disk_and_a_closed_store_says_so() {
    let (disk, store) = create();
    let spec = spec("daily", Durability::Power, 8 << 20);
    let mut daily = Model::new(store.add(&spec).unwrap(), &spec);
    daily.mark(GRANULE..2 * GRANULE);
    store.flush().unwrap();
    for seed in 0..5 {
        let opened =
            open_bytes(&disk.after_power_cut(&mut SmallRng::seed_from_u64(seed)), OTHER_BOOT).unwrap();
        assert_eq!(opened.bitmaps[0].verdict, Verdict::Superset { extents: 0, bytes: 0 });
        assert_eq!(dirty(&opened.bitmaps[0]), [1]);
    }
    store.begin_batch().unwrap();
    assert!(store.flush().is_err());
    store.end_batch().unwrap();
    let process = store.add(&super::model::spec("process", Durability::Process, 8 << 20)).unwrap();
    assert!(matches!(poll(&*process, 0..1), Poll::Ready(Ok(()))));
    store.close_clean().unwrap();
    assert!(matches!(poll(&*process, 0..1), Poll::Ready(Err(_))));
    for refused in [daily.freeze(), daily.ledger.reserve(1 << 30), daily.ledger.forget()] {
        let error = refused.unwrap_err().to_string();
        assert!(error.contains("cannot keep bitmap 'daily': the store was closed"), "{error}");
    }
    assert!(matches!(poll(&*daily.ledger, 7 << 20..8 << 20), Poll::Ready(Err(_))));
}

#[test]
fn what_does_not_fit_the_header_is_refused_before_anything_is_written() {
    let (disk, store) = create();
    assert!(store.set_owner(&vec![0; crate::OWNER_BYTES_MAX + 1]).is_err());
    let long = "x".repeat(1000);
    let mut ledgers = Vec::new();
    let error = loop {
        match store.add(&spec(&long, Durability::Volatile, 1)) {
            Ok(ledger) => ledgers.push(ledger),
            Err(error) => break error,
        }
        if ledgers.len() == 7 {
            break Error::HeaderFull { path: "".into(), found: 0, expected: 0 };
        }
    };
    assert!(matches!(error, Error::HeaderFull { .. } | Error::Io { .. }), "{error}");
    drop((ledgers, store));
    assert!(open(&disk, BOOT).unwrap().bitmaps.len() >= 5);
}

//! The log's states by themselves, with flights that fail at random, and the ring that they leave.

use super::*;
use crate::Uuid;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, BTreeSet};

/// A log without a disk: `ring` is what is on it.
struct Bench {
    table: Table,
    state: State,
    ring: Ring,
    bytes: Vec<u8>,
}

fn bench(slots: u32) -> Bench {
    let ring = Ring::new(Uuid([3; 16]), 1, slots, 0);
    let (bytes, sequence, seal) = ring.blank();
    Bench { table: Table::new(slots as usize), state: State::new(ring.clone(), sequence, seal), ring, bytes }
}

impl Bench {
    fn poll(&mut self, extents: (u64, u64)) -> Poll<Result<(), Fault>> {
        let bytes = extents.0..extents.1 + 1;
        let waker = Waker::noop().clone();
        self.state.poll(&self.table, Waiter { entry: 1, stamp: 0, bytes, extents, waker })
    }

    /// One flight; a failed one may have written any of its sectors.
    fn fly(&mut self, fails: bool, random: &mut SmallRng) {
        let Some(blocks) = self.state.begin(&self.table) else { return };
        for (place, block) in blocks {
            for (at, sector) in (place as usize..).step_by(512).zip(block.chunks(512)) {
                if !fails || random.random_bool(0.8) {
                    self.bytes[at..at + 512].copy_from_slice(sector);
                }
            }
        }
        let fault = fails.then(|| Fault { text: "no".to_owned(), errno: 5 });
        self.state.finish(&self.table, fault);
    }

    fn active(&self) -> BTreeSet<u64> {
        (0..4096).filter(|&extent| self.table.contains(extent)).collect()
    }
}

#[test]
fn the_ring_names_every_active_extent_whatever_failed_before() {
    // With many slots a flight has several blocks, of which a failed one leaves any.
    for (seed, slots, extents, most) in
        (0..30).map(|seed| (seed, 8, 64, 2)).chain((0..6).map(|seed| (seed, 1024, 3900, 100)))
    {
        let mut random = SmallRng::seed_from_u64(seed);
        let mut bench = bench(slots);
        for _ in 0..60 {
            for _ in 0..random.random_range(1..4) {
                let first = random.random_range(0..extents);
                let _ = bench.poll((first, first + random.random_range(0..most)));
            }
            let fails = random.random_bool(0.3);
            bench.fly(fails, &mut random);
            let told: BTreeSet<u64> = bench.ring.replay(&bench.bytes).unwrap().into_iter().collect();
            let active = bench.active();
            assert!(active.is_subset(&told), "seed {seed}: {:?} are missing", active.difference(&told));
            assert!(told.len() <= slots as usize);
        }
    }
}

#[test]
fn a_slot_is_given_away_only_after_a_sync_that_began_when_its_extent_was_gone() {
    let mut given = 0;
    for seed in 0..30 {
        let mut random = SmallRng::seed_from_u64(seed);
        let mut bench = bench(8);
        // Extents that a sync found gone from the table, and what each slot held.
        let (mut durable, mut held) = (BTreeSet::new(), BTreeMap::new());
        for _ in 0..100 {
            let first = random.random_range(0..64);
            let _ = bench.poll((first, first));
            let Some(_) = bench.state.begin(&bench.table) else { continue };
            let flight = bench.state.flight.as_ref().unwrap();
            for &slot in &flight.entering {
                let extent = bench.state.slots[slot as usize].extent;
                if let Some(before) = held.insert(slot, extent) {
                    assert!(durable.contains(&(slot, before)), "seed {seed}: {before} may not be durable");
                    given += 1;
                }
                durable.remove(&(slot, extent));
            }
            let gone: Vec<_> = held.iter().map(|(&slot, &extent)| (slot, extent)).collect();
            let gone: Vec<_> =
                gone.into_iter().filter(|(_, extent)| !bench.table.contains(*extent)).collect();
            let entering = flight.entering.clone();
            let fails = random.random_bool(0.3);
            bench.state.finish(&bench.table, fails.then(|| Fault { text: String::new(), errno: 5 }));
            for (slot, extent) in gone {
                // What enters was never active before, so nothing relied on it.
                if !fails || entering.contains(&slot) {
                    durable.insert((slot, extent));
                }
            }
            // What came back, or became active, has bits again that nobody wrote.
            durable.retain(|(slot, extent)| {
                bench.state.slot_of.get(extent) != Some(slot) || !bench.table.contains(*extent)
            });
        }
    }
    assert!(given > 500, "{given}");
}

#[test]
fn the_table_never_finds_what_is_not_there_and_stays_quick() {
    let mut random = SmallRng::seed_from_u64(0);
    let table = Table::new(16);
    let mut expected = BTreeSet::new();
    for _ in 0..20_000 {
        let extent = random.random_range(0..40);
        if expected.contains(&extent) {
            expected.remove(&extent);
            table.remove(extent);
        } else if expected.len() < 16 {
            expected.insert(extent);
            if !table.insert(extent) {
                table.rebuild(expected.iter().copied());
            }
        }
        assert!((0..40).all(|extent| table.contains(extent) == expected.contains(&extent)));
    }
}

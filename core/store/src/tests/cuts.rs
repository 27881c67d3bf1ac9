//! Power cuts at every moment, with whatever a disk may have kept.

use std::sync::Arc;

use driveline_bitmap::Granularity;
use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeSet;

use super::disk::TestDisk;
use super::model::*;
use crate::{Durability, Store, Verdict};

/// What one bitmap must and may say after a cut.
#[derive(Clone, Debug, Default)]
struct Bounds {
    /// Granules of which data may have reached the disk since the last clear that succeeded or was tried.
    must: BTreeSet<u64>,
    /// Granules that were marked since the last clear that succeeded.
    may: BTreeSet<u64>,
    /// The shortest length that may be found.
    length: u64,
}

/// What a cut left, and what it had to leave.
struct Cut {
    platter: Vec<u8>,
    bounds: Vec<Bounds>,
}

/// A guest that writes, and its bitmaps, above a disk whose power is cut again and again.
struct Machine {
    seed: u64,
    random: SmallRng,
    store: Store,
    disk: Arc<TestDisk>,
    models: Vec<Model>,
    bounds: Arc<Mutex<Vec<Bounds>>>,
    cuts: Arc<Mutex<Vec<Cut>>>,
}

const GRANULARITIES: [u64; 2] = [GRANULE, GRANULE << 1];

impl Machine {
    fn new(seed: u64) -> Self {
        let (disk, store) = create();
        let mut models = Vec::new();
        for (at, granularity) in GRANULARITIES.into_iter().enumerate() {
            let mut spec = spec(&format!("b{at}"), Durability::Power, 4 << 20);
            spec.granularity = Granularity::new(granularity).unwrap();
            models.push(Model::new(store.add(&spec).unwrap(), &spec));
        }
        let length = 4 << 20;
        let bounds = vec![Bounds { length, ..Bounds::default() }; models.len()];
        let (bounds, cuts) = (Arc::new(Mutex::new(bounds)), Arc::default());
        let machine =
            Machine { seed, random: SmallRng::seed_from_u64(seed), store, disk, models, bounds, cuts };
        machine.cut_at_operations();
        machine
    }

    /// Lets every few operations of the disk see a cut before it, or after it and before its caller knows.
    fn cut_at_operations(&self) {
        let mut random = SmallRng::seed_from_u64(self.seed ^ 1);
        let (bounds, cuts) = (Arc::clone(&self.bounds), Arc::clone(&self.cuts));
        self.disk.set_witness(Some(Box::new(move |disk| {
            if random.random_bool(0.2) {
                let platter = disk.after_power_cut(&mut random);
                cuts.lock().push(Cut { platter, bounds: bounds.lock().clone() });
            } else if random.random_bool(0.1) {
                disk.write_back();
            }
        })));
    }

    /// Some writes at once: marked first, and submitted when all bitmaps say that it is safe.
    fn write(&mut self) {
        let count = self.random.random_range(1..6);
        let mut writes: Vec<_> = (0..count)
            .map(|_| {
                let start = self.random.random_range(0..4 << 20_u64);
                // Now and then a range of more extents than are worth slots.
                let most = if self.random.random_bool(0.05) { 4 << 20 } else { 100_000 };
                start..start + self.random.random_range(1..most)
            })
            .collect();
        for write in &writes {
            for (model, bounds) in self.models.iter_mut().zip(&mut *self.bounds.lock()) {
                bounds.may.extend(model.touched(write));
                model.mark(write.clone());
            }
        }
        for _ in 0..20 {
            writes.retain(|write| {
                let ready = |model: &Model| match poll(&*model.ledger, write.clone()) {
                    core::task::Poll::Pending => false,
                    core::task::Poll::Ready(safe) => {
                        safe.unwrap();
                        true
                    }
                };
                let safe = self.models.iter().map(ready).fold(true, |all, one| all & one);
                if safe {
                    for (model, bounds) in self.models.iter().zip(&mut *self.bounds.lock()) {
                        bounds.must.extend(model.touched(write));
                    }
                }
                !safe
            });
            commit(&self.store);
        }
        assert!(writes.is_empty(), "seed {}: somebody waits for ever", self.seed);
    }

    fn control(&mut self) {
        let at = self.random.random_range(0..self.models.len());
        let model = &mut self.models[at];
        let bounds = |change: &dyn Fn(&mut Bounds)| change(&mut self.bounds.lock()[at]);
        match self.random.random_range(0..6) {
            0 if !model.record.frozen => {
                bounds(&|bounds| bounds.must.clear());
                model.clear().unwrap();
                bounds(&|bounds| bounds.may.clear());
            }
            1 if !model.record.frozen => model.freeze().unwrap(),
            1 | 2 if model.record.frozen => model.reclaim().unwrap(),
            3 if model.record.frozen => {
                let still = model.halves[crate::header::index(model.record.recorder)].clone();
                let set = |granule: &u64| still.get(*granule as usize) == Some(&true);
                bounds(&|bounds| bounds.must.retain(set));
                model.abdicate().unwrap();
                bounds(&|bounds| bounds.may.retain(set));
            }
            4 => {
                let length = self.random.random_range(3 << 20..6 << 20_u64);
                let (before, granules) =
                    (model.record.length, |bytes: u64| bytes.div_ceil(model.granularity.bytes()));
                // Whatever is cut off counts no more from now on, and what grows may count from now on.
                let (shorter, longer) = (granules(before.min(length)), granules(before.max(length)));
                bounds(&|bounds| {
                    bounds.must.retain(|&granule| granule < shorter);
                    bounds.may.extend(shorter.saturating_sub(1)..longer);
                    bounds.length = before.min(length);
                });
                model.resize(length).unwrap();
                bounds(&|bounds| bounds.length = length);
            }
            _ => self.store.set_owner(&[at as u8]).unwrap(),
        }
    }

    fn cut(&mut self) {
        let platter = self.disk.after_power_cut(&mut self.random);
        self.cuts.lock().push(Cut { platter, bounds: self.bounds.lock().clone() });
    }

    /// Opens what each cut left.
    fn check(&self) -> usize {
        let cuts = core::mem::take(&mut *self.cuts.lock());
        for (number, Cut { platter, bounds }) in cuts.iter().enumerate() {
            let case = format!("seed {}, cut {number}", self.seed);
            let opened = open_bytes(platter, OTHER_BOOT).unwrap_or_else(|error| panic!("{case}: {error}"));
            assert_eq!(opened.bitmaps.len(), bounds.len(), "{case}");
            for (found, bounds) in opened.bitmaps.iter().zip(bounds) {
                let Verdict::Superset { extents, .. } = found.verdict else {
                    panic!("{case}: {:?}", found.verdict)
                };
                assert!(extents <= LOG.extents.into(), "{case}");
                assert!(found.record.length >= bounds.length, "{case}");
                let dirty: BTreeSet<u64> = dirty(found).into_iter().collect();
                let lost: Vec<_> = bounds.must.difference(&dirty).collect();
                assert!(lost.is_empty(), "{case}: {lost:?} of {} changed and are clean", found.record.name);
                let more = dirty.difference(&bounds.may).count() as u64 * found.granularity.bytes();
                assert!(more <= u64::from(LOG.extents) * LOG.extent_bytes, "{case}: {more} bytes too many");
            }
        }
        cuts.len()
    }
}

#[test]
fn after_a_power_cut_no_changed_block_is_clean_and_few_others_are_dirty() {
    let seeds = std::env::var("DRIVELINE_CUT_SEED").ok().and_then(|seed| seed.parse().ok());
    let seeds = seeds.map_or(0..40, |seed: u64| seed..seed + 1);
    let mut cuts = 0;
    for seed in seeds.clone() {
        println!("DRIVELINE_CUT_SEED={seed}");
        let mut machine = Machine::new(seed);
        for _ in 0..12 {
            for _ in 0..machine.random.random_range(1..4) {
                machine.write();
            }
            machine.cut();
            machine.control();
            machine.cut();
        }
        cuts += machine.check();
    }
    println!("{cuts} cuts");
    assert!(cuts > 2000 || seeds.end - seeds.start == 1, "{cuts} cuts are few");
}

//! A bitmap as its owner keeps it: flags in memory, and a ledger that is told first.

use core::ops::Range;
use core::task::{Poll, Waker};
use std::sync::Arc;

use driveline_bitmap::{BitmapName, Bits, Granularity, Half, Ledger, Record, View};

use super::disk::TestDisk;
use crate::header::{granules, index};
use crate::volume::Volume;
use crate::{BootId, Durability, Found, LogOptions, OpenOptions, Opened, Options, Result, Spec, Store};

pub(crate) const GRANULE: u64 = 64 << 10;
pub(crate) const BOOT: BootId = BootId([1; 16]);
pub(crate) const OTHER_BOOT: BootId = BootId([2; 16]);
pub(crate) const LOG: LogOptions = LogOptions { extent_bytes: 256 << 10, extents: 8 };
pub(crate) const DISK_BYTES: usize = 1 << 20;

pub(crate) fn name(name: &str) -> BitmapName {
    BitmapName::new(name).unwrap()
}

pub(crate) fn spec(called: &str, durability: Durability, length: u64) -> Spec {
    let record = Record { name: name(called), recording: true, length, recorder: Half::First, frozen: false };
    Spec { record, granularity: Granularity::default(), view: View::Drive, durability }
}

pub(crate) fn options() -> Options {
    Options { drive_size: 8 << 20, boot_id: BOOT, owner: b"vda".to_vec(), log: LOG }
}

pub(crate) fn volume(disk: &Arc<TestDisk>) -> Arc<Volume> {
    Arc::new(Volume::new("vda.bitmaps".as_ref(), Arc::clone(disk) as _))
}

/// A new store on a new disk, whose log the test commits.
pub(crate) fn create() -> (Arc<TestDisk>, Store) {
    let disk = Arc::new(TestDisk::new(DISK_BYTES, &[]));
    let store = Store::create_on(volume(&disk), &options(), false).unwrap();
    (disk, store)
}

pub(crate) fn open(disk: &Arc<TestDisk>, boot: BootId) -> Result<Opened> {
    Store::open_on(volume(disk), &OpenOptions::new(boot), false)
}

/// Opens what a disk holds, on a new one.
pub(crate) fn open_bytes(bytes: &[u8], boot: BootId) -> Result<Opened> {
    open(&Arc::new(TestDisk::new(DISK_BYTES, bytes)), boot)
}

/// Makes flights until nobody waits.
pub(crate) fn commit(store: &Store) {
    let log = store.shared.core().log.clone();
    while log.as_ref().is_some_and(|log| log.commit()) {}
}

pub(crate) fn poll(ledger: &dyn Ledger, bytes: Range<u64>) -> Poll<driveline_bitmap::Result<()>> {
    ledger.poll_safe(bytes, Waker::noop())
}

/// The dirty granules of what was found.
pub(crate) fn dirty(found: &Found) -> Vec<u64> {
    granules_of(found, &found.bits)
}

/// Those of other bits of it.
pub(crate) fn granules_of(found: &Found, bits: &Bits) -> Vec<u64> {
    let shift = found.granularity.shift();
    bits.iter_dirty().flat_map(|bytes| bytes.start >> shift..granules(found.granularity, bytes.end)).collect()
}

/// A bitmap and its ledger.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) ledger: Arc<dyn Ledger>,
    pub(crate) record: Record,
    pub(crate) granularity: Granularity,
    pub(crate) halves: [Vec<bool>; 2],
}

impl Model {
    pub(crate) fn new(ledger: Arc<dyn Ledger>, spec: &Spec) -> Self {
        let mut model = Model {
            ledger,
            record: spec.record.clone(),
            granularity: spec.granularity,
            halves: Default::default(),
        };
        model.fit();
        model
    }

    pub(crate) fn found(found: Found) -> Self {
        let dirty = dirty(&found);
        let mut model = Model {
            ledger: found.ledger,
            record: found.record,
            granularity: found.granularity,
            halves: Default::default(),
        };
        model.fit();
        let half = index(model.record.recorder);
        dirty.into_iter().for_each(|granule| model.halves[half][granule as usize] = true);
        model
    }

    fn fit(&mut self) {
        let count = granules(self.granularity, self.record.length) as usize;
        self.halves.iter_mut().for_each(|half| half.resize(count, false));
    }

    /// What was marked since the freeze, if it is frozen.
    pub(crate) fn dirty_in_recorder(&self) -> Vec<u64> {
        let half = &self.halves[index(self.record.recorder)];
        (0..half.len()).filter(|&at| half[at]).map(|at| at as u64).collect()
    }

    /// What a crash has to find.
    pub(crate) fn dirty(&self) -> Vec<u64> {
        let counts = |half: Half| crate::header::counts(&self.record, half);
        let count = self.halves[0].len();
        (0..count)
            .filter(|&at| Half::BOTH.into_iter().any(|half| counts(half) && self.halves[index(half)][at]))
            .map(|at| at as u64)
            .collect()
    }

    pub(crate) fn touched(&self, bytes: &Range<u64>) -> Range<u64> {
        let end = bytes.end.min(self.record.length);
        bytes.start >> self.granularity.shift()..granules(self.granularity, end)
    }

    pub(crate) fn mark(&mut self, bytes: Range<u64>) {
        let touched = self.touched(&bytes);
        if self.record.recording {
            self.ledger.mark(self.record.recorder, touched.clone());
            let half = &mut self.halves[index(self.record.recorder)];
            touched.for_each(|granule| half[granule as usize] = true);
        }
    }

    /// Makes the granules that these bytes touch clean.
    pub(crate) fn unmark(&mut self, bytes: Range<u64>) {
        let touched = self.touched(&bytes);
        self.ledger.unmark(self.record.recorder, touched.clone());
        let half = &mut self.halves[index(self.record.recorder)];
        touched.for_each(|granule| half[granule as usize] = false);
    }

    fn take_down(&mut self, record: Record) -> driveline_bitmap::Result<()> {
        self.ledger.take_down(&record)?;
        self.record = record;
        self.fit();
        Ok(())
    }

    fn wipe(&mut self, half: Half) {
        self.ledger.wipe(half);
        self.halves[index(half)].fill(false);
    }

    pub(crate) fn set_recording(&mut self, recording: bool) -> driveline_bitmap::Result<()> {
        self.take_down(Record { recording, ..self.record.clone() })
    }

    pub(crate) fn clear(&mut self) -> driveline_bitmap::Result<()> {
        assert!(!self.record.frozen);
        let before = self.record.recorder;
        if self.ledger.counts(before) {
            self.take_down(Record { recorder: before.other(), ..self.record.clone() })?;
        }
        self.wipe(before);
        Ok(())
    }

    pub(crate) fn freeze(&mut self) -> driveline_bitmap::Result<()> {
        let recorder = self.record.recorder.other();
        self.take_down(Record { recorder, frozen: true, ..self.record.clone() })
    }

    pub(crate) fn abdicate(&mut self) -> driveline_bitmap::Result<()> {
        self.take_down(Record { frozen: false, ..self.record.clone() })?;
        self.wipe(self.record.recorder.other());
        Ok(())
    }

    pub(crate) fn reclaim(&mut self) -> driveline_bitmap::Result<()> {
        let (recorder, frozen) = (self.record.recorder, self.record.recorder.other());
        for granule in 0..self.halves[0].len() {
            if self.halves[index(frozen)][granule] {
                self.ledger.mark(recorder, granule as u64..granule as u64 + 1);
                self.halves[index(recorder)][granule] = true;
            }
        }
        self.abdicate()
    }

    pub(crate) fn resize(&mut self, length: u64) -> driveline_bitmap::Result<()> {
        let before = self.record.length;
        if length > before {
            self.ledger.reserve(length)?;
        }
        let record = Record { length, ..self.record.clone() };
        self.take_down(record)?;
        match length > before {
            true => self.mark(before..length),
            false => self.ledger.cut(granules(self.granularity, length)),
        }
        Ok(())
    }
}

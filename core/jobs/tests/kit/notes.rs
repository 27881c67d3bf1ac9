//! A journal in memory: what of a job would be found if the program were killed now.

use driveline_bitmap::{Bitmap, Bits, Durability, Granularity, Half, Ledger, Record, StoreBinding, View};
use driveline_graph::{Error, Kind, Result};
use driveline_jobs::{FoundBitmap, FoundJob, JobRecord, Journal, OnRestart, Page, Phase};
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::Arc,
    task::{Poll, Waker},
};

/// Cheap to clone; all clones are the same journal.
#[derive(Clone, Debug, Default)]
pub struct Notes(Arc<Mutex<BTreeMap<String, Arc<Sheet>>>>, Arc<Mutex<Stop>>);

/// When the program is killed.
#[derive(Debug, Default)]
struct Stop {
    /// The last step that is done: a record is written, or goes. Whoever asked for it is not told any more.
    after: Option<u64>,
    steps: u64,
    /// The job has been told, and takes itself out.
    is_aborted: bool,
}

#[derive(Debug)]
pub struct Sheet {
    notes: Notes,
    record: Mutex<JobRecord>,
    kept: Mutex<Vec<Kept>>,
}

#[derive(Clone, Debug)]
struct Kept {
    record: Record,
    granularity: Granularity,
    dirty: Arc<Disk>,
}

/// The granules that a bitmap's store says are dirty.
#[derive(Debug, Default)]
struct Disk(Mutex<BTreeSet<u64>>);

impl Notes {
    /// Nothing is written down any more after so many steps. The last of them is done, and said to have failed.
    pub fn stop_after(&self, steps: u64) {
        *self.1.lock() = Stop { after: Some(steps), ..Stop::default() };
    }

    /// Have so many steps come?
    pub fn has_stopped(&self) -> bool {
        let stop = self.1.lock();
        stop.after.is_some_and(|after| stop.steps >= after)
    }

    /// What is written down now is written.
    pub fn go_on(&self) {
        *self.1.lock() = Stop::default();
    }

    fn step(&self, is_abort: bool, step: impl FnOnce()) -> Result<()> {
        let mut stop = self.1.lock();
        stop.steps += 1;
        stop.is_aborted |= is_abort;
        let left = stop.after.map(|after| (after + 1).saturating_sub(stop.steps));
        if left != Some(0) {
            step();
        }
        match left {
            Some(0 | 1) if !stop.is_aborted => Err(Error::new(Kind::Io, "the program was killed")),
            _ => Ok(()),
        }
    }

    pub fn has(&self, id: &str) -> bool {
        self.0.lock().contains_key(id)
    }

    /// What is dirty in a bitmap of a job, as it would be found.
    pub fn bits(&self, id: &str, bitmap: &str) -> Bits {
        let sheet = self.0.lock()[id].clone();
        let kept = sheet.kept.lock();
        kept.iter().find(|kept| kept.record.name.as_str() == bitmap).unwrap().bits()
    }

    /// A copy of what would be found of a job. It does not change with the job.
    pub fn found(&self, id: &str) -> FoundJob {
        let sheet = self.0.lock()[id].clone();
        let copy = |kept: &Kept| {
            let dirty = Arc::new(Disk(Mutex::new(kept.dirty.0.lock().clone())));
            Kept { dirty, ..kept.clone() }
        };
        let kept: Vec<Kept> = sheet.kept.lock().iter().map(copy).collect();
        let record = sheet.record.lock().clone();
        let bitmaps = kept.iter().map(|kept| FoundBitmap {
            ledger: kept.dirty.clone(),
            record: kept.record.clone(),
            granularity: kept.granularity,
            bits: kept.bits(),
        });
        let bitmaps = bitmaps.collect();
        let page = Sheet { notes: self.clone(), record: Mutex::new(record.clone()), kept: Mutex::new(kept) };
        FoundJob { record, page: Arc::new(page), bitmaps, since: None, lost: None }
    }
}

impl Kept {
    fn bits(&self) -> Bits {
        let (bits, granule) = (Bits::new(self.granularity, self.record.length), self.granularity.bytes());
        self.dirty.0.lock().iter().for_each(|at| bits.mark(at * granule..(at + 1) * granule));
        bits
    }
}

impl Journal for Notes {
    fn on_restart(&self, _: &str) -> OnRestart {
        OnRestart::Resume
    }

    fn begin(&self, record: &JobRecord) -> Result<Arc<dyn Page>> {
        let (notes, kept) = (self.clone(), Mutex::default());
        let sheet = Arc::new(Sheet { notes, record: Mutex::new(record.clone()), kept });
        let mut sheets = self.0.lock();
        if sheets.contains_key(&record.id) {
            return Err(Error::new(Kind::Exists, "it is there"));
        }
        sheets.insert(record.id.clone(), sheet.clone());
        Ok(sheet)
    }
}

impl Page for Sheet {
    fn write(&self, record: &JobRecord) -> Result<()> {
        self.notes.step(record.phase == Phase::Cancelled, || *self.record.lock() = record.clone())
    }

    fn keep(&self, bitmap: &Bitmap) -> Result<Arc<dyn Ledger>> {
        assert_eq!(bitmap.view(), View::Node);
        let dirty = Arc::<Disk>::default();
        let (record, granularity) = (bitmap.record(), bitmap.granularity());
        self.kept.lock().push(Kept { record, granularity, dirty: dirty.clone() });
        Ok(dirty)
    }

    fn remove(&self) -> Result<()> {
        self.notes.step(false, || drop(self.notes.0.lock().remove(&self.record.lock().id)))
    }
}

impl Ledger for Disk {
    fn mark(&self, _: Half, granules: Range<u64>) {
        self.0.lock().extend(granules);
    }
    fn unmark(&self, _: Half, granules: Range<u64>) {
        self.0.lock().retain(|granule| !granules.contains(granule));
    }
    fn wipe(&self, _: Half) {}
    fn cut(&self, _: u64) {}
    fn counts(&self, half: Half) -> bool {
        half == Half::First
    }
    fn durability(&self) -> Durability {
        Durability::Process
    }
    fn waits(&self) -> bool {
        false
    }
    fn poll_safe(&self, _: Range<u64>, _: &Waker) -> Poll<driveline_bitmap::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn take_down(&self, _: &Record) -> driveline_bitmap::Result<()> {
        Ok(())
    }
    fn reserve(&self, _: u64) -> driveline_bitmap::Result<()> {
        Ok(())
    }
    fn forget(&self) -> driveline_bitmap::Result<()> {
        Ok(())
    }
    fn binding(&self) -> StoreBinding {
        StoreBinding::Sidecar { path: "disk.job.dljob".into() }
    }
}

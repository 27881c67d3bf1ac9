//! A bitmap and what keeps it: after a crash at any time, what is found is what was there.
#![expect(clippy::single_range_in_vec_init, reason = "a list of ranges may hold one")]

use core::ops::Range;
use core::task::{Poll, Waker};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard};

use driveline_bitmap::{
    Bitmap, BitmapName, BitmapSet, Bits, Durability, Error, Frozen, Granularity, Half, Ledger, Record,
    Result, StoreBinding,
};
use proptest::prelude::*;

const GRANULES: u64 = 64;
const LENGTH: u64 = GRANULES << 9;

/// A ledger that does what the contract says and no more, as a store would across a crash.
#[derive(Debug, Default)]
struct Paper(Mutex<Sheet>);

#[derive(Debug, Default)]
struct Sheet {
    settled: Option<Record>,
    halves: [BTreeSet<u64>; 2],
    /// Wiped, but counted by what is settled.
    wipe_later: [bool; 2],
    room: u64,
    /// Nothing can be taken down.
    broken: bool,
}

impl Sheet {
    fn counts(&self, half: Half) -> bool {
        self.settled.as_ref().is_some_and(|record| record.recorder == half || record.frozen)
    }

    /// What is found after a crash.
    fn found(&self) -> Option<(Record, BTreeSet<u64>)> {
        let record = self.settled.clone()?;
        let end = record.length.div_ceil(512);
        let counted = Half::BOTH.into_iter().filter(|half| self.counts(*half));
        let dirty = counted.flat_map(|half| self.halves[half as usize].iter().copied());
        Some((record, dirty.filter(|granule| *granule < end).collect()))
    }
}

impl Paper {
    fn sheet(&self) -> MutexGuard<'_, Sheet> {
        self.0.lock().unwrap()
    }

    fn refuse<T>(&self) -> Result<T> {
        Err(Error::Store { name: "daily".into(), text: "no paper".into(), errno: 28 })
    }
}

impl Ledger for Paper {
    fn mark(&self, half: Half, granules: Range<u64>) {
        let mut sheet = self.sheet();
        assert!(granules.end <= sheet.room.div_ceil(512), "room was reserved for {granules:?}");
        sheet.halves[half as usize].extend(granules);
    }

    fn unmark(&self, half: Half, granules: Range<u64>) {
        self.sheet().halves[half as usize].retain(|granule| !granules.contains(granule));
    }

    fn wipe(&self, half: Half) {
        let mut sheet = self.sheet();
        if sheet.counts(half) {
            sheet.wipe_later[half as usize] = true;
        } else {
            sheet.halves[half as usize].clear();
        }
    }

    fn cut(&self, first: u64) {
        self.sheet().halves.iter_mut().for_each(|half| half.retain(|granule| *granule < first));
    }

    fn counts(&self, half: Half) -> bool {
        self.sheet().counts(half)
    }

    fn durability(&self) -> Durability {
        Durability::Process
    }

    fn waits(&self) -> bool {
        false
    }

    fn poll_safe(&self, _: Range<u64>, _: &Waker) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn take_down(&self, record: &Record) -> Result<()> {
        let mut sheet = self.sheet();
        if sheet.broken {
            return self.refuse();
        }
        sheet.settled = Some(record.clone());
        for half in Half::BOTH {
            if sheet.wipe_later[half as usize] && !sheet.counts(half) {
                sheet.wipe_later[half as usize] = false;
                sheet.halves[half as usize].clear();
            }
        }
        Ok(())
    }

    fn reserve(&self, length: u64) -> Result<()> {
        let mut sheet = self.sheet();
        if sheet.broken && length > sheet.room {
            return self.refuse();
        }
        sheet.room = sheet.room.max(length);
        Ok(())
    }

    fn forget(&self) -> Result<()> {
        self.sheet().settled = None;
        Ok(())
    }

    fn binding(&self) -> StoreBinding {
        StoreBinding::Sidecar { path: "daily.dlbitmaps".into() }
    }
}

fn kept() -> (Arc<Bitmap>, Arc<Paper>) {
    let paper = Arc::new(Paper::default());
    let daily = Bitmap::new(BitmapName::new("daily").unwrap(), Granularity::MIN, LENGTH);
    daily.keep_in(paper.clone()).unwrap();
    (Arc::new(daily), paper)
}

fn granules(bits: &Bits) -> BTreeSet<u64> {
    bits.iter_dirty().flat_map(|range| range.start >> 9..range.end.div_ceil(512)).collect()
}

/// All that the bitmap holds, whether it is frozen or not.
fn held(bitmap: &Bitmap) -> BTreeSet<u64> {
    &granules(bitmap.bits()) | &granules(bitmap.recording_bits())
}

#[test]
fn a_bitmap_that_is_found_again_goes_on_where_it_was() {
    let (daily, paper) = kept();
    daily.mark(0..1024);
    daily.clear().unwrap();
    daily.mark(5120..5121);
    let (record, dirty) = paper.sheet().found().unwrap();
    assert_eq!((record.recorder, dirty), (Half::Second, BTreeSet::from([10])), "a clear is a turn");
    drop(daily);

    let bits = Bits::new(Granularity::MIN, LENGTH);
    bits.mark(5120..5121);
    let again = Bitmap::new(record.name.clone(), Granularity::MIN, record.length);
    let again = again.found(paper.clone(), &record, &bits);
    again.mark(0..1);
    assert_eq!(held(&again), BTreeSet::from([0, 10]));
    assert_eq!(paper.sheet().found().unwrap().1, held(&again));
    assert!(again.is_persistent() && again.store() == Some(paper.binding()));
    assert_eq!(again.record(), record);
}

#[test]
fn what_cannot_be_taken_down_does_not_happen() {
    let (daily, paper) = kept();
    daily.mark(0..512);
    paper.sheet().broken = true;
    assert!(matches!(daily.clear(), Err(Error::Store { errno: 28, .. })));
    assert!(daily.disable().is_err() && daily.is_recording());
    assert!(daily.freeze("backup").is_err() && !daily.is_frozen() && !daily.is_busy());
    let mut set = BitmapSet::new();
    set.add(daily.clone()).unwrap();
    assert!(set.rename("daily", BitmapName::new("weekly").unwrap()).is_err());
    assert_eq!((daily.name().as_str(), held(&daily)), ("daily", BTreeSet::from([0])));
    daily.mark(1024..1025);
    assert_eq!(paper.sheet().found().unwrap().1, BTreeSet::from([0, 2]), "marks need no record");
    paper.sheet().broken = false;
    daily.clear().unwrap();
    assert_eq!(paper.sheet().found().unwrap().1, BTreeSet::new());
}

/// The end of a freeze cannot fail. What it could not take down is too much after a crash, until the next record.
#[test]
fn the_end_of_a_freeze_loses_nothing_though_it_cannot_be_taken_down() {
    let (daily, paper) = kept();
    daily.mark(0..512);
    let frozen = daily.freeze("backup").unwrap();
    daily.mark(512..1024);
    paper.sheet().broken = true;
    frozen.abdicate();
    assert_eq!(held(&daily), BTreeSet::from([1]));
    assert_eq!(paper.sheet().found().unwrap().1, BTreeSet::from([0, 1]));
    assert!(daily.freeze("another").is_err(), "its successor would not begin clean");
    paper.sheet().broken = false;
    let frozen = daily.freeze("another").unwrap();
    daily.mark(1024..1025);
    frozen.abdicate();
    assert_eq!(paper.sheet().found().unwrap().1, BTreeSet::from([2]));
}

#[test]
fn without_room_a_bitmap_that_grows_is_kept_no_more_and_loses_nothing() {
    let (daily, paper) = kept();
    daily.mark(0..512);
    paper.sheet().broken = true;
    daily.resize(LENGTH * 2);
    assert!(!daily.is_persistent() && daily.ledger().is_none());
    assert_eq!(held(&daily).len() as u64, 1 + GRANULES);
}

#[test]
fn a_namesake_hands_its_ledger_over_or_is_forgotten() {
    let (present, paper) = kept();
    present.mark(0..512);
    let mut home = BitmapSet::new();
    home.add(present.clone()).unwrap();
    let moved = Arc::new(Bitmap::new(BitmapName::new("daily").unwrap(), Granularity::MIN, LENGTH));
    moved.mark(512..1024);
    home.put(moved.clone()).unwrap();
    assert!(moved.is_persistent() && present.ledger().is_none());
    assert_eq!(paper.sheet().found().unwrap().1, BTreeSet::from([0, 1]));

    let (third, third_paper) = kept();
    home.put(third.clone()).unwrap();
    assert!(paper.sheet().found().is_none(), "one of a name is enough");
    assert_eq!(third_paper.sheet().found().unwrap().1, BTreeSet::from([0, 1]));
}

#[test]
fn a_mark_that_another_thread_finds_in_memory_is_in_the_ledger() {
    for round in 0..200_u64 {
        let (daily, paper) = kept();
        let granule = round % GRANULES;
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    daily.mark(granule << 9..(granule << 9) + 1);
                    // Whoever of the two came second did not touch the ledger.
                    assert!(paper.sheet().halves[0].contains(&granule));
                });
            }
        });
    }
}

#[derive(Clone, Debug)]
enum Step {
    Mark(u64, u64),
    Clear,
    Record(bool),
    Freeze,
    Thaw(bool),
    Merge(u64, u64),
    Undo,
    Resize(u64),
    Break(bool),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..GRANULES + 8, 1..9_u64).prop_map(|(at, count)| Step::Mark(at, count)),
        2 => Just(Step::Clear),
        1 => any::<bool>().prop_map(Step::Record),
        2 => Just(Step::Freeze),
        2 => any::<bool>().prop_map(Step::Thaw),
        1 => (0..GRANULES, 1..9_u64).prop_map(|(at, count)| Step::Merge(at, count)),
        1 => Just(Step::Undo),
        1 => (1..GRANULES + 8).prop_map(Step::Resize),
        1 => any::<bool>().prop_map(Step::Break),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Nothing is ever missing in the ledger; and as long as it can be written, nothing is too much.
    #[test]
    fn the_ledger_holds_what_memory_holds(steps in proptest::collection::vec(step(), 1..60)) {
        let (daily, paper) = kept();
        let mut frozen: Option<Frozen> = None;
        let mut saved = daily.bits().clone();
        let mut ever_broken = false;
        for step in steps {
            match step {
                Step::Mark(at, count) => daily.mark(at << 9..(at + count) << 9),
                Step::Clear => drop(daily.clear()),
                Step::Record(true) => drop(daily.enable()),
                Step::Record(false) => drop(daily.disable()),
                Step::Freeze if frozen.is_none() => frozen = daily.freeze("backup").ok(),
                Step::Freeze => {}
                Step::Thaw(success) => match frozen.take() {
                    Some(frozen) if success => frozen.abdicate(),
                    other => drop(other),
                },
                Step::Merge(at, count) => {
                    saved = daily.bits().clone();
                    let other = Bitmap::new(BitmapName::new("o").unwrap(), Granularity::MIN, daily.length());
                    other.mark(at << 9..(at + count) << 9);
                    drop(daily.merge_from(&other));
                }
                // As a transaction does, which changed nothing that is frozen.
                Step::Undo if frozen.is_none() => drop(daily.restore(&saved)),
                Step::Undo => {}
                Step::Resize(granules) => {
                    if !paper.sheet().broken || granules << 9 <= paper.sheet().room {
                        daily.resize(granules << 9);
                    }
                }
                Step::Break(broken) => {
                    ever_broken |= broken;
                    paper.sheet().broken = broken;
                }
            }
            let (record, found) = paper.sheet().found().unwrap();
            let held = held(&daily);
            if ever_broken {
                let end = record.length.div_ceil(512);
                let lost = held.iter().any(|granule| *granule < end && !found.contains(granule));
                prop_assert!(!lost, "held {held:?}, found {found:?}");
            } else {
                prop_assert_eq!(&found, &held);
                prop_assert_eq!(record, daily.record());
            }
        }
    }
}

/// Ranges of an empty ledger: a bitmap that was clean is found clean.
#[test]
fn a_clean_bitmap_is_found_clean() {
    let (daily, paper) = kept();
    assert_eq!(paper.sheet().found().unwrap(), (daily.record(), BTreeSet::new()));
    daily.mark(0..LENGTH);
    assert_eq!(daily.bits().iter_dirty().collect::<Vec<_>>(), [0..LENGTH]);
    daily.forget().unwrap();
    assert!(paper.sheet().found().is_none());
    daily.remember().unwrap();
    assert_eq!(paper.sheet().found().unwrap().1.len() as u64, GRANULES);
}

/// A mirror clears what it is about to copy. Killed before the copy is safe, it must find that dirty again.
#[test]
fn what_was_cleared_in_memory_is_found_dirty_until_it_is_settled() {
    let (daily, paper) = kept();
    daily.mark_unconditionally(0..5 * 512);
    daily.bits().clear_range(512..4 * 512);
    let dirty = |paper: &Paper| paper.sheet().found().unwrap().1;
    assert_eq!(dirty(&paper), BTreeSet::from([0, 1, 2, 3, 4]));
    // The first granule is dirty, and the last one is cut off by the range.
    daily.settle_clean(0..3 * 512 + 1);
    assert_eq!(dirty(&paper), BTreeSet::from([0, 3, 4]));
    daily.mark_unconditionally(2 * 512..2 * 512 + 1);
    daily.settle_clean(0..LENGTH);
    assert_eq!(dirty(&paper), BTreeSet::from([0, 2, 4]));
}

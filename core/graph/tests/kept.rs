//! Persistent bitmaps in a graph: writes wait for what must be safe first, and changes are all or nothing on paper too.

#![allow(unreachable_pub, missing_debug_implementations, missing_docs, dead_code)]

mod kit;

use driveline_bitmap::{Bitmap, Durability, Half, Ledger, Record, StoreBinding};
use driveline_graph::{Error, Keeper, Kind, NewBitmap, Result};
use futures::FutureExt;
use kit::Bench;
use parking_lot::Mutex;
use serde_json::json;
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    pin::pin,
    sync::Arc,
    task::{Poll, Waker},
};

/// A keeper on paper: what each ledger holds, and what of it is settled.
#[derive(Debug, Default)]
struct Office(Mutex<Desk>);

#[derive(Debug, Default)]
struct Desk {
    /// By bitmap: the record in hand, and the settled one.
    records: BTreeMap<u64, (Option<Record>, Option<Record>)>,
    marks: BTreeSet<(u64, u64)>,
    batches: u32,
    settled: u32,
    /// Ranges of bytes that are safe.
    safe: Vec<Range<u64>>,
    waiting: Vec<Waker>,
    refuses_batch: bool,
    refuses_room: bool,
    fails_waiters: bool,
}

#[derive(Debug)]
struct Page(Arc<Office>, u64, bool);

impl Keeper for Clerk {
    fn new_ledger(&self, target: &str, bitmap: &Bitmap, durability: Durability) -> Result<Arc<dyn Ledger>> {
        if target == "nowhere" {
            return Err(Error::new(Kind::NotSupported, "no store"));
        }
        Ok(Arc::new(Page(self.0.clone(), bitmap.id().get(), durability == Durability::Power)))
    }

    fn begin_batch(&self) {
        self.0.0.lock().batches += 1;
    }

    fn end_batch(&self) -> Result<()> {
        let mut desk = self.0.0.lock();
        desk.batches -= 1;
        if desk.refuses_batch {
            return Err(Error::io(28, "settling"));
        }
        desk.settled += 1;
        desk.records.values_mut().for_each(|(hand, settled)| settled.clone_from(hand));
        Ok(())
    }
}

/// The office, as the graph has it.
#[derive(Debug)]
struct Clerk(Arc<Office>);

impl Page {
    fn no(&self, errno: i32) -> driveline_bitmap::Error {
        driveline_bitmap::Error::Store { name: "daily".into(), text: "the paper burns".into(), errno }
    }
}

impl Ledger for Page {
    fn mark(&self, _: Half, granules: Range<u64>) {
        self.0.0.lock().marks.extend(granules.map(|granule| (self.1, granule)));
    }
    fn unmark(&self, _: Half, _: Range<u64>) {}
    fn wipe(&self, _: Half) {}
    fn cut(&self, _: u64) {}
    fn counts(&self, half: Half) -> bool {
        let desk = self.0.0.lock();
        let settled = desk.records.get(&self.1).and_then(|record| record.1.as_ref());
        settled.is_some_and(|record| record.recorder == half || record.frozen)
    }
    fn durability(&self) -> Durability {
        Durability::Process
    }

    fn waits(&self) -> bool {
        self.2
    }
    fn poll_safe(&self, bytes: Range<u64>, waker: &Waker) -> Poll<driveline_bitmap::Result<()>> {
        let mut desk = self.0.0.lock();
        if desk.fails_waiters {
            return Poll::Ready(Err(self.no(5)));
        }
        if desk.safe.iter().any(|safe| safe.start <= bytes.start && bytes.end <= safe.end) {
            return Poll::Ready(Ok(()));
        }
        desk.waiting.push(waker.clone());
        Poll::Pending
    }
    fn take_down(&self, record: &Record) -> driveline_bitmap::Result<()> {
        let mut desk = self.0.0.lock();
        let at_once = desk.batches == 0;
        let entry = desk.records.entry(self.1).or_default();
        entry.0 = Some(record.clone());
        if at_once {
            entry.1.clone_from(&entry.0);
        }
        Ok(())
    }
    fn reserve(&self, length: u64) -> driveline_bitmap::Result<()> {
        if self.0.0.lock().refuses_room && length > 1 << 20 { Err(self.no(28)) } else { Ok(()) }
    }
    fn forget(&self) -> driveline_bitmap::Result<()> {
        let mut desk = self.0.0.lock();
        desk.records.entry(self.1).or_default().0 = None;
        Ok(())
    }
    fn binding(&self) -> StoreBinding {
        StoreBinding::Sidecar { path: "paper".into() }
    }
}

fn kept(durability: Durability) -> (Bench, Arc<Office>) {
    let bench = Bench::new();
    bench.add(json!([{ "driver": "memory", "node-name": "disk" }])).unwrap();
    bench.change(|change| change.set_drive("vda", "disk")).unwrap();
    let office = Arc::new(Office::default());
    bench.graph.set_keeper(Arc::new(Clerk(office.clone())));
    let new = NewBitmap { durability: Some(durability), ..NewBitmap::named("daily") };
    bench.change(|change| change.add_bitmap("vda", new)).unwrap();
    (bench, office)
}

fn settled(office: &Office) -> Vec<(String, bool)> {
    let desk = office.0.lock();
    let records = desk.records.values().filter_map(|record| record.1.as_ref());
    records.map(|record| (record.name.to_string(), record.recording)).collect()
}

#[test]
fn a_persistent_bitmap_needs_a_keeper() {
    let bench = Bench::new();
    bench.add(json!([{ "driver": "memory", "node-name": "disk" }])).unwrap();
    let new = NewBitmap { durability: Some(Durability::Process), ..NewBitmap::named("daily") };
    let error = bench.change(|change| change.add_bitmap("disk", new)).unwrap_err();
    assert_eq!(error.to_string(), "node 'disk': bitmap 'daily': nothing keeps persistent bitmaps");
}

/// A bug that was found in two trackers: a second writer, who found the bit set in memory, went on before it was durable.
#[test]
fn no_write_reaches_the_driver_before_its_mark_is_safe_not_even_the_second() {
    let (bench, office) = kept(Durability::Power);
    let guest = bench.root("vda");
    bench.take_log();
    let mut first = pin!(guest.write(4096, &[1; 512], 0));
    let mut second = pin!(guest.write(4608, &[2; 512], 0));
    let mut zeroes = pin!(guest.write_zeroes(8192..8704, 0));
    let mut discard = pin!(guest.discard(8192..8704, 0));
    for _ in 0..2 {
        assert!(first.as_mut().now_or_never().is_none());
        assert!(second.as_mut().now_or_never().is_none());
        assert!(zeroes.as_mut().now_or_never().is_none());
        assert!(discard.as_mut().now_or_never().is_none());
    }
    assert_eq!(bench.take_log(), [""; 0]);
    assert_eq!(office.0.lock().marks.len(), 1, "it is marked already, and a crash would find it");
    office.0.lock().safe.push(4096..8192);
    bench.run(async { (first.await.unwrap(), second.await.unwrap()) });
    assert_eq!(bench.take_log(), ["write 4096+512 flags 0", "write 4608+512 flags 0"]);
    office.0.lock().safe.push(8192..12288);
    bench.run(async { (zeroes.await.unwrap(), discard.await.unwrap()) });
}

#[test]
fn a_write_whose_mark_cannot_be_made_safe_fails_and_reaches_nothing() {
    let (bench, office) = kept(Durability::Power);
    let guest = bench.root("vda");
    bench.take_log();
    office.0.lock().fails_waiters = true;
    let error = bench.run(guest.write(0, &[1; 512], 0)).unwrap_err();
    assert_eq!(error.errno_code(), 5);
    assert_eq!(bench.take_log(), [""; 0]);
    // Data that do not change what the drive shows need no mark, and wait for none.
    bench.run(guest.write(0, &[1; 512], driveline_op::flag::UNCHANGED)).unwrap();
    bench.change(|change| change.disable_bitmap("vda", "daily")).unwrap();
    bench.run(guest.write(0, &[1; 512], 0)).unwrap();
}

#[test]
fn a_change_is_settled_as_a_whole_or_undone() {
    let (bench, office) = kept(Durability::Process);
    assert_eq!(settled(&office), [("daily".to_owned(), true)]);
    let rotate = |change: &mut driveline_graph::Change| {
        change.disable_bitmap("vda", "daily")?;
        let new = NewBitmap { durability: Some(Durability::Process), ..NewBitmap::named("next") };
        change.add_bitmap("vda", new)
    };
    let before = office.0.lock().settled;
    office.0.lock().refuses_batch = true;
    assert_eq!(bench.change(rotate).unwrap_err().errno_code(), 28);
    office.0.lock().refuses_batch = false;
    assert!(bench.graph.bitmap("vda", "daily").unwrap().is_recording());
    assert!(bench.graph.bitmap("vda", "next").is_err());
    bench.change(rotate).unwrap();
    assert_eq!(office.0.lock().settled - before, 2, "one for the change, and an empty one behind it");
    assert_eq!(settled(&office), [("daily".to_owned(), false), ("next".to_owned(), true)]);

    // The second action fails, so the first is undone on paper too.
    let fails = |change: &mut driveline_graph::Change| {
        change.remove_bitmap("vda", "daily")?;
        change.rename_bitmap("vda", "none", "other")
    };
    bench.change(fails).unwrap_err();
    assert_eq!(settled(&office), [("daily".to_owned(), false), ("next".to_owned(), true)]);
    bench.change(|change| change.remove_bitmap("vda", "daily")).unwrap();
    assert_eq!(settled(&office), [("next".to_owned(), true)]);
    assert_eq!(office.0.lock().batches, 0);
}

#[test]
fn a_resize_for_which_there_is_no_room_on_paper_changes_nothing() {
    let (bench, office) = kept(Durability::Process);
    office.0.lock().refuses_room = true;
    let error = bench.change(|change| change.resize("vda", 2 << 20)).unwrap_err();
    assert_eq!((error.errno_code(), bench.graph.size_bytes("vda").unwrap()), (28, 1 << 20));
    assert!(bench.graph.bitmap("vda", "daily").unwrap().is_persistent());
    office.0.lock().refuses_room = false;
    bench.change(|change| change.resize("vda", 2 << 20)).unwrap();
    assert_eq!(bench.dirty("vda", "daily"), [(1 << 20, 2 << 20)]);
    assert_eq!(office.0.lock().records.values().next().unwrap().1.as_ref().unwrap().length, 2 << 20);
}

#[test]
fn a_bitmap_that_was_found_is_attached_and_takes_the_size_of_its_drive() {
    let (bench, office) = kept(Durability::Process);
    let found = bench.graph.bitmap("vda", "daily").unwrap();
    found.mark(0..1);
    let record = found.record();
    let bits = found.bits().clone();
    let again = Bench::new();
    again.add(json!([{ "driver": "memory", "node-name": "disk", "size": 2 << 20 }])).unwrap();
    again.change(|change| change.set_drive("vda", "disk")).unwrap();
    let page: Arc<dyn Ledger> = Arc::new(Page(office, found.id().get(), false));
    let bitmap = Bitmap::new(record.name.clone(), found.granularity(), record.length);
    let bitmap = Arc::new(bitmap.found(page, &record, &bits));
    again.change(|change| change.attach_bitmap("vda", bitmap)).unwrap();
    assert_eq!(again.dirty("vda", "daily"), [(0, 65536), (1 << 20, 2 << 20)]);
}

//! What marks, waits and opening cost, and how many flights a log takes. `cargo bench -p driveline-store`
#![expect(missing_docs, reason = "criterion_group! makes a public function")]

use core::future::poll_fn;
use core::hint::black_box;
use core::ops::Range;
use core::task::Waker;
use std::path::Path;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use driveline_bitmap::{BitmapName, Granularity, Half, Ledger, Record, View};
use driveline_store::{BootId, Durability, LogOptions, OpenOptions, Options, Spec, Store};
use futures::executor::block_on;

const BOOT: BootId = BootId([1; 16]);
const GRANULE: u64 = 64 << 10;
const TIB: u64 = 1 << 40;

fn create(path: &Path, log: LogOptions) -> Store {
    let options = Options { drive_size: 16 * TIB, boot_id: BOOT, owner: Vec::new(), log };
    Store::create(path, &options).unwrap()
}

fn add(store: &Store, name: &str, durability: Durability, length: u64) -> Arc<dyn Ledger> {
    let name = BitmapName::new(name).unwrap();
    let record = Record { name, recording: true, length, recorder: Half::First, frozen: false };
    let spec = Spec { record, granularity: Granularity::default(), view: View::Drive, durability };
    store.add(&spec).unwrap()
}

/// Random numbers that do not need a random generator in the loop.
fn numbers() -> impl FnMut() -> u64 {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    }
}

fn mark(c: &mut Criterion) {
    let folder = tempfile::tempdir().unwrap();
    let store = create(&folder.path().join("mark"), LogOptions::default());
    let daily = add(&store, "daily", Durability::Power, TIB);
    let mut group = c.benchmark_group("mark");
    group.bench_function("one granule, dirty already", |b| {
        b.iter(|| daily.mark(Half::First, black_box(7..8)));
    });
    let mut next = numbers();
    let places: Vec<u64> = (0..4096).map(|_| next() % (TIB / GRANULE)).collect();
    places.iter().for_each(|&place| daily.mark(Half::First, place..place + 1));
    let mut at = 0;
    group.bench_function("random over 1 TiB, dirty already", |b| {
        b.iter(|| {
            at = (at + 1) % places.len();
            daily.mark(Half::First, black_box(places[at]..places[at] + 1));
        });
    });
    group.bench_function("4096 granules, clean, in mapped pages", |b| {
        let run = |()| (0..4096_u64).for_each(|place| daily.mark(Half::First, place..place + 1));
        b.iter_batched(|| daily.cut(0), run, BatchSize::PerIteration);
    });
    group.finish();

    let bytes = 4096..8192;
    block_on(poll_fn(|context| daily.poll_safe(bytes.clone(), context.waker()))).unwrap();
    c.bench_function("poll_safe, active", |b| {
        b.iter(|| assert!(daily.poll_safe(black_box(bytes.clone()), Waker::noop()).is_ready()));
    });
    let process = add(&store, "process", Durability::Process, TIB);
    c.bench_function("poll_safe, process", |b| {
        b.iter(|| assert!(process.poll_safe(black_box(bytes.clone()), Waker::noop()).is_ready()));
    });
    let mut place = 0;
    c.bench_function("poll_safe, a flight for one, with its fdatasync", |b| {
        b.iter(|| {
            place = (place + (1 << 30) + (4 << 20)) % TIB;
            daily.mark(Half::First, place / GRANULE..place / GRANULE + 1);
            block_on(poll_fn(|context| daily.poll_safe(place..place + 4096, context.waker()))).unwrap();
        });
    });
}

fn open(c: &mut Criterion) {
    let folder = tempfile::tempdir().unwrap();
    let mut group = c.benchmark_group("open, 16 TiB");
    group.sample_size(10);
    for (name, step) in [("sparse", 100_003), ("every 2nd granule", 2)] {
        let path = folder.path().join(name);
        let store = create(&path, LogOptions::default());
        let daily = add(&store, "daily", Durability::Process, 16 * TIB);
        (0..16 * TIB / GRANULE).step_by(step).for_each(|place| daily.mark(Half::First, place..place + 1));
        store.flush().unwrap();
        drop((daily, store));
        group.bench_function(name, |b| b.iter(|| Store::open(&path, &OpenOptions::new(BOOT)).unwrap()));
    }
    group.finish();
}

/// How many of 1000 writes, one at a time, have to wait for a flight: the reason for the defaults.
fn flights(_: &mut Criterion) {
    const DRIVE: u64 = 100 << 30;
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let mut next = numbers();
    let mut write = |kind: &str, at: u64| -> Range<u64> {
        let start = match kind {
            "uniform 4 KiB" => next() % DRIVE,
            "90 % in 5 % of the drive" if next() % 10 < 9 => next() % (DRIVE / 20),
            "90 % in 5 % of the drive" => next() % DRIVE,
            _ => at * GRANULE % DRIVE,
        };
        start / 4096 * 4096..start / 4096 * 4096 + 4096
    };
    for (extents, extent_bytes) in [(256, 4 << 20), (1024, 4 << 20), (1024, 16 << 20), (4096, 4 << 20)] {
        for kind in ["uniform 4 KiB", "90 % in 5 % of the drive", "sequential 64 KiB"] {
            let path = folder.path().join("flights");
            let store = create(&path, LogOptions { extent_bytes, extents });
            let daily = add(&store, "daily", Durability::Power, DRIVE);
            let mut waits = 0;
            for at in 0..20_000 {
                let bytes = write(kind, at);
                daily.mark(Half::First, bytes.start / GRANULE..bytes.start / GRANULE + 1);
                let mut first = true;
                let safe = poll_fn(|context| {
                    let polled = daily.poll_safe(bytes.clone(), context.waker());
                    waits += u64::from(core::mem::take(&mut first) && polled.is_pending());
                    polled
                });
                block_on(safe).unwrap();
            }
            println!(
                "{extents} extents of {} MiB, {kind}: {} of 1000 writes wait",
                extent_bytes >> 20,
                waits / 20
            );
            drop((daily, store));
            std::fs::remove_file(&path).unwrap();
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(core::time::Duration::from_millis(300))
        .measurement_time(core::time::Duration::from_secs(1));
    targets = mark, open, flights
}
criterion_main!(benches);

//! What marks, merges and walks cost. `cargo bench -p driveline-bitmap`
#![expect(missing_docs, reason = "criterion_group! makes a public function")]

use core::hint::black_box;
use core::ops::Range;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use driveline_bitmap::{Bitmap, BitmapName, Bits, Granularity};

const TIB: u64 = 1 << 40;

/// A tebibyte at 64 KiB: 2^24 granules.
fn bitmap() -> Arc<Bitmap> {
    Arc::new(Bitmap::new(BitmapName::new("daily").unwrap(), Granularity::default(), TIB))
}

/// Every `step`-th granule dirty.
fn every(step: u64) -> Bits {
    let bits = Bits::new(Granularity::default(), TIB);
    for offset in (0..TIB).step_by((step << 16) as usize) {
        bits.mark(offset..offset + 1);
    }
    bits
}

/// Random 4 KiB writes that do not need a random generator in the loop.
fn writes() -> Vec<Range<u64>> {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed % (TIB >> 12)) << 12
    };
    (0..4096).map(|_| next()).map(|offset| offset..offset + 4096).collect()
}

fn mark(c: &mut Criterion) {
    let mut group = c.benchmark_group("mark");
    let daily = bitmap();
    group.bench_function("one granule, dirty already", |b| b.iter(|| daily.mark(black_box(4096..8192))));

    let writes = writes();
    writes.iter().for_each(|write| daily.mark(write.clone()));
    let mut at = 0;
    group.bench_function("random 4 KiB over 1 TiB, dirty already", |b| {
        b.iter(|| {
            at = (at + 1) % writes.len();
            daily.mark(black_box(writes[at].clone()));
        });
    });

    // Leaves are allocated by the first marks in them, so this is the price of 4096 first marks and of 16 leaves.
    let fresh = || Bits::new(Granularity::default(), TIB);
    group.throughput(Throughput::Elements(4096));
    group.bench_function("4096 granules, clean, in 16 new leaves", |b| {
        let run = |bits: Bits| {
            for granule in 0..4096_u64 {
                let offset = granule << 20;
                bits.mark(black_box(offset..offset + 4096));
            }
            bits
        };
        b.iter_batched(fresh, run, BatchSize::SmallInput);
    });
    group.throughput(Throughput::Elements(1));
    let range = (5 << 20) + 512..(6 << 20) + 512;
    group.bench_function("1 MiB, dirty already", |b| b.iter(|| daily.mark(black_box(range.clone()))));
    group.bench_function("1 MiB, clean, and its clear", |b| {
        b.iter(|| {
            daily.recording_bits().clear_range(black_box(5 << 20..7 << 20));
            daily.mark(black_box(range.clone()));
        });
    });
    group.bench_function("1 TiB, clean", |b| {
        let run = |bits: Bits| {
            bits.mark(black_box(4096..TIB - 4096));
            bits
        };
        b.iter_batched(fresh, run, BatchSize::SmallInput);
    });

    let disabled =
        Bitmap::new(BitmapName::new("off").unwrap(), Granularity::default(), TIB).with_recording(false);
    group.bench_function("not recording", |b| b.iter(|| disabled.mark(black_box(4096..8192))));
    group.finish();
}

fn merge(c: &mut Criterion) {
    let mut group = c.benchmark_group("merge, 1 TiB");
    for (name, step) in [("every 2nd granule", 2), ("every 1000th granule", 1000)] {
        let source = every(step);
        let same = Bits::new(Granularity::default(), TIB);
        group.bench_function(name, |b| b.iter(|| same.merge_from(black_box(&source))));
    }
    let source = every(1000);
    let finer = Bits::new(Granularity::new(4096).unwrap(), TIB);
    group.bench_function("every 1000th granule, into 4 KiB", |b| {
        b.iter(|| finer.merge_from(black_box(&source)))
    });
    group.finish();
}

fn walk(c: &mut Criterion) {
    let mut group = c.benchmark_group("walk, 1 TiB");
    group.sample_size(20);
    for (name, step) in [("every 2nd granule", 2), ("every 1000th granule", 1000)] {
        let bits = every(step);
        let runs = bits.iter_dirty().count();
        group.bench_function(format!("{name}, {runs} ranges"), |b| {
            b.iter(|| black_box(&bits).iter_dirty().map(|range| range.end).sum::<u64>());
        });
        group.bench_function(format!("count, {name}"), |b| b.iter(|| black_box(&bits).dirty_bytes()));
    }
    let clean = Bits::new(Granularity::default(), 1 << 50);
    group.bench_function("clean pebibyte", |b| b.iter(|| black_box(&clean).is_clean()));
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(core::time::Duration::from_millis(300))
        .measurement_time(core::time::Duration::from_secs(1));
    targets = mark, merge, walk
}
criterion_main!(benches);

//! Memory follows what is dirty, and no mark is lost between threads.

use std::sync::Barrier;
use std::thread;

use driveline_bitmap::{Bitmap, BitmapName, Bits, Granularity};

const PIB: u64 = 1 << 50;

#[test]
fn a_clean_pebibyte_takes_hundreds_of_bytes() {
    let bits = Bits::new(Granularity::default(), PIB);
    assert!(bits.allocated_bytes() < 1024, "{} bytes", bits.allocated_bytes());
    assert!(bits.is_clean() && bits.next_clean(PIB - 1) == Some(PIB - 1));
    // A bitmap has two sets of bits, for the freeze.
    let bitmap = Bitmap::new(BitmapName::new("daily").unwrap(), Granularity::default(), PIB);
    assert!(bitmap.allocated_bytes() < 1024, "{} bytes", bitmap.allocated_bytes());
    let finest = Bits::new(Granularity::MIN, u64::MAX);
    assert!(finest.allocated_bytes() < 32 << 10, "{} bytes", finest.allocated_bytes());
}

#[test]
fn a_dirty_pebibyte_takes_kilobytes() {
    let mut bits = Bits::new(Granularity::default(), PIB);
    bits.mark(0..u64::MAX);
    assert_eq!(bits.dirty_bytes(), PIB);
    bits.clear_range(PIB / 2..PIB / 2 + 65536);
    assert_eq!(bits.dirty_bytes(), PIB - 65536);
    assert!(bits.allocated_bytes() < 32 << 10, "{} bytes", bits.allocated_bytes());
    bits.clear_all();
    bits.compact();
    assert!(bits.allocated_bytes() < 1024, "{} bytes", bits.allocated_bytes());
}

#[test]
fn scattered_marks_take_memory_for_themselves_only() {
    let mut bits = Bits::new(Granularity::default(), PIB);
    for tebibyte in 0..1024 {
        bits.mark(tebibyte << 40..(tebibyte << 40) + 1);
    }
    assert_eq!(bits.dirty_granules(), 1024);
    assert!(bits.allocated_bytes() < 4 << 20, "{} bytes", bits.allocated_bytes());
    // Granules that became dirty one by one are as cheap as those marked at once, after a compaction.
    for granule in 0..4096 {
        bits.mark(granule << 16..(granule + 1) << 16);
    }
    let before = (bits.allocated_bytes(), bits.clone());
    bits.compact();
    assert!(bits.allocated_bytes() < before.0);
    assert_eq!(bits, before.1);
}

#[test]
fn marks_from_four_threads_are_all_kept() {
    const THREADS: u64 = 4;
    const MARKS: u64 = 20_000;
    let granularity = Granularity::MIN;
    let bits = Bits::new(granularity, PIB);
    let start = Barrier::new(THREADS as usize);
    // Neighbours in one word belong to different threads, and every leaf is first needed by all at once.
    let granule = |mark: u64, thread: u64| (mark / 64 * 4096 + mark % 64 * 4 + thread) << granularity.shift();
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let (bits, start) = (&bits, &start);
            scope.spawn(move || {
                start.wait();
                for mark in 0..MARKS {
                    let offset = granule(mark, thread);
                    bits.mark(offset..offset + 1);
                }
            });
        }
    });
    assert_eq!(bits.dirty_granules(), THREADS * MARKS);
    assert!((0..THREADS).all(|thread| (0..MARKS).all(|mark| bits.is_dirty(granule(mark, thread)))));
}

#[test]
fn marks_survive_a_racing_clear_of_their_neighbours() {
    let granularity = Granularity::MIN;
    let granules = 3 * 4096_u64;
    let bits = Bits::new(granularity, granules << 9);
    bits.mark(0..u64::MAX);
    let start = Barrier::new(2);
    thread::scope(|scope| {
        scope.spawn(|| {
            start.wait();
            // Takes full slots apart while the other thread relies on them being full.
            for odd in (1..granules).step_by(2) {
                bits.clear_range(odd << 9..(odd + 1) << 9);
            }
        });
        scope.spawn(|| {
            start.wait();
            for even in (0..granules).step_by(2) {
                bits.mark(even << 9..(even << 9) + 1);
            }
        });
    });
    assert_eq!(bits.dirty_granules(), granules / 2);
    assert!((0..granules).all(|granule| bits.is_dirty(granule << 9) == (granule % 2 == 0)));
}

//! What fuzzers feed: any bytes as the file of a store.

use std::path::Path;
use std::sync::Arc;

use core::task::Waker;
use driveline_bitmap::{BitmapName, Granularity, Half, Record, View};

use crate::disk::memory::MemoryDisk;
use crate::header::{COPIES, COPY_BYTES, reseal};
use crate::volume::Volume;
use crate::{BootId, Durability, LogOptions, OpenOptions, Options, Spec, Store};

const CAPACITY: usize = 1 << 20;
const BOOT: BootId = BootId([7; 16]);

fn on(disk: MemoryDisk) -> (Arc<MemoryDisk>, Arc<Volume>) {
    let disk = Arc::new(disk);
    (Arc::clone(&disk), Arc::new(Volume::new(Path::new("fuzzed"), disk)))
}

/// Stores of a few shapes to begin with, by seed.
pub fn sample(seed: u64) -> Vec<u8> {
    let (disk, volume) = on(MemoryDisk::new(CAPACITY, &[]));
    let log = LogOptions { extent_bytes: 64 << 10, extents: 8 };
    let options = Options { drive_size: 1 << 20, boot_id: BOOT, owner: vec![1, 2, 3], log };
    let store = Store::create_on(volume, &options, false).expect("memory takes it");
    let kinds = [Durability::Volatile, Durability::Process, Durability::Power];
    for (at, durability) in kinds.into_iter().cycle().skip(seed as usize % 3).take(2).enumerate() {
        let name = BitmapName::new(&format!("b{at}")).expect("it is short");
        let half = Half::First;
        let record = Record { name, recording: true, length: 1 << 20, recorder: half, frozen: false };
        let granularity = Granularity::new(4096 << at).expect("it is a power of two");
        let spec = Spec { record: record.clone(), granularity, view: View::Drive, durability };
        let ledger = store.add(&spec).expect("there is room");
        ledger.mark(half, 3..30 + seed % 50);
        let frozen = Record { recorder: half.other(), frozen: seed.is_multiple_of(5), ..record };
        ledger.take_down(&frozen).expect("there is room");
        ledger.mark(half.other(), 1..4);
    }
    if seed.is_multiple_of(2) {
        store.close_clean().expect("memory takes it");
    }
    disk.bytes()
}

/// Opens the bytes as a store, as they are and with checksums put right, and uses it. Panics are bugs.
pub fn run(bytes: &[u8]) {
    let bytes = &bytes[..bytes.len().min(CAPACITY)];
    let mut sealed = bytes.to_vec();
    for at in COPIES {
        let copy = (at as usize).min(sealed.len())..((at + COPY_BYTES) as usize).min(sealed.len());
        reseal(&mut sealed[copy]);
    }
    for bytes in [bytes, &sealed] {
        for boot_id in [BOOT, BootId([8; 16])] {
            let (_, volume) = on(MemoryDisk::new(CAPACITY, bytes));
            let Ok(opened) = Store::open_on(volume, &OpenOptions::new(boot_id), false) else { continue };
            for found in &opened.bitmaps {
                let length = found.record.length;
                let granules = length.div_ceil(found.granularity.bytes());
                let recorder = found.record.recorder;
                assert!(found.bits.dirty_bytes() <= length);
                found.ledger.mark(recorder, 0..granules.min(1));
                found.ledger.mark(recorder, granules.saturating_sub(1)..granules);
                let _ = found.ledger.poll_safe(0..length, Waker::noop());
                let _ = found.ledger.reserve(length.saturating_add(1 << 20));
                // Errors are fine.
                let _ =
                    found.ledger.take_down(&Record { recorder: recorder.other(), ..found.record.clone() });
                found.ledger.cut(granules / 2);
                let _ = found.ledger.forget();
            }
            drop(opened.bitmaps);
            let _ = opened.store.close_clean();
        }
    }
}

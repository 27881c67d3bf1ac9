//! Damage: in one bitmap it is that one's fault, and in the directory it costs the bitmaps, never the image.

use super::*;
use rand::SeedableRng;

const SIZE: u64 = 4 << 20;

fn at(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap())
}

fn put(bytes: &mut [u8], at: u64, value: &[u8]) {
    bytes[at as usize..at as usize + value.len()].copy_from_slice(value);
}

/// Where the data of the bitmaps extension is.
fn extension(bytes: &[u8]) -> u64 {
    bytes.windows(4).position(|word| word == [0x23, 0x85, 0x28, 0x75]).unwrap() as u64 + 8
}

fn bits(from: u64) -> Bits {
    let bits = Bits::new(granularity(4096), SIZE);
    bits.mark(from..from + 50_000);
    bits
}

/// Three bitmaps, their entries 32 bytes each.
fn three() -> (Vec<u8>, u64) {
    let set = [kept("one", bits(0)), kept("two", bits(70_000)), kept("three", bits(1 << 20))];
    let bytes = image_with(SIZE, 4096, &set);
    let directory = at(&bytes, extension(&bytes) + 16);
    (bytes, directory)
}

#[test]
fn a_damaged_bitmap_is_listed_and_removed_and_the_others_work() {
    let qemu = have("qemu-img");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    let (good, directory) = three();
    let entry = directory + 32;
    let (one, table) = (at(&good, directory), at(&good, entry));
    let own_bits = at(&good, at(&good, directory));
    // At an offset, these bytes: what is said, and whether its clusters are known nevertheless.
    let damage: [(u64, &[u8], &str, bool); 17] = [
        (entry + 12, &[0, 0, 0, 4, 1, 12, 0, 0, 0, 0, 0, 8], "empty", true),
        (entry + 24, &[0xff], "UTF-8", true),
        (entry + 24, b"one", "same name", true),
        (entry + 24, b"t\0o", "zero byte", true),
        (entry + 16, &[3], "type 3", true),
        (entry + 17, &[60], "2^60", true),
        (entry + 17, &[0], "2^0", true),
        (entry + 15, &[8], "0x8", true),
        (entry + 15, &[1], "in use", true),
        (entry, &[0; 8], "its table is at 0x0", false),
        (entry, &(table + 512).to_be_bytes(), "its table is at", false),
        (entry, &(1u64 << 50).to_be_bytes(), "behind the end", false),
        (entry, &one.to_be_bytes(), "something else", false),
        (entry + 8, &[0, 0, 0, 9], "9 entries", false),
        (table, &[0x80], "reserved bits", false),
        (table, &(1u64 << 40).to_be_bytes(), "behind the end", false),
        (table, &own_bits.to_be_bytes(), "something else", false),
    ];
    for (at, value, word, clean) in damage {
        let mut bytes = good.clone();
        put(&mut bytes, at, value);
        let reader = World::open(bytes.clone(), None, true).unwrap();
        let found = reader.list();
        assert!(!found.outdated && found.unreadable.is_none(), "{word}: {found:?}");
        let why = found.bitmaps[1].inconsistent.clone().unwrap_or_default();
        assert!(why.contains(word), "'{why}' lacks '{word}'");
        // What shares clusters with it cannot be trusted, either.
        let shared = word == "something else";
        if !shared {
            assert_eq!(reader.load("one").unwrap(), bits(0), "{word}");
        }
        assert_eq!(reader.load("three").unwrap(), bits(1 << 20), "{word}");
        assert!(reader.bytes() == bytes, "{word}");

        let writer = World::open(bytes, None, false).unwrap();
        writer.write(0, &[1; 100]);
        let set = [kept("one", bits(4096)), kept("three", bits(1 << 20))];
        let three = BitmapToStore { bits: None, ..set[1].to_store() };
        writer.store_these(&[set[0].to_store(), three]).unwrap();
        writer.close().unwrap();
        let found = World::open(writer.bytes(), None, true).unwrap();
        assert_eq!(found.usable(), set, "{word}");
        if qemu {
            fs::write(&path, writer.bytes()).unwrap();
            if clean {
                check(&path)
            } else {
                crate::qcow2::tests::crash::at_worst_leaks(&path, word)
            }
            assert_eq!(info(&path).len(), 2, "{word}");
        }
    }
}

#[test]
fn extra_data_is_kept_if_it_may_be() {
    let (mut bytes, directory) = three();
    // Two of the three entries become one with 29 bytes of extra data: what was the second entry.
    put(&mut bytes, directory + 32 + 15, &[4]);
    put(&mut bytes, directory + 32 + 18, &[0, 3, 0, 0, 0, 37]);
    let ext = extension(&bytes);
    put(&mut bytes, ext, &[0, 0, 0, 2]);
    let extra = bytes[directory as usize + 56..][..37].to_vec();
    put(&mut bytes, directory + 93, b"two");
    let world = World::open(bytes.clone(), None, false).unwrap();
    assert_eq!(world.load("two").unwrap(), bits(70_000));
    world.store(&[kept("two", bits(0))]).unwrap();
    world.close().unwrap();
    let (found, after) = (world.bitmap("two"), world.bytes());
    assert_eq!(found.inconsistent, None);
    let directory = at(&after, extension(&after) + 16);
    assert_eq!(after[directory as usize + 24..][..37], extra);
    // Without the flag that allows it, it must not be used.
    let directory = at(&bytes, ext + 16);
    put(&mut bytes, directory + 32 + 15, &[0]);
    let world = World::open(bytes, None, true).unwrap();
    says(world.load("two"), "37 bytes of extra data");
}

#[test]
fn a_directory_that_cannot_be_read_costs_the_bitmaps_only() {
    let (good, directory) = three();
    let ext = extension(&good);
    let damage: [(u64, &[u8], &str); 10] = [
        (ext, &[0; 4], "0 bitmaps"),
        (ext, &[0, 0, 0, 2], "2 bitmaps"),
        (ext, &[0, 0, 0, 4], "3 bitmaps, expected 4"),
        (ext + 4, &[1], "reserved"),
        (ext + 8, &[0xff; 8], "18446744073709551615 bytes"),
        (ext + 16, &0x30001u64.to_be_bytes(), "0x30001"),
        (ext + 16, &(1u64 << 40).to_be_bytes(), "behind the end"),
        (ext + 16, &at(&good, 40).to_be_bytes(), "other metadata"),
        (directory + 20, &[0xff; 4], "needs"),
        (ext - 1, &[16], "16 bytes, expected 24"),
    ];
    for (at, value, word) in damage {
        let mut bytes = good.clone();
        put(&mut bytes, at, value);
        let reader = World::open(bytes.clone(), None, true).unwrap();
        let list = reader.list();
        let why = list.unreadable.unwrap_or_default();
        assert!(why.contains(word), "'{why}' lacks '{word}'");
        assert!(list.bitmaps.is_empty());
        says(reader.load("one"), "'one'");
        let writer = World::open(bytes.clone(), None, false).unwrap();
        assert!(writer.list().unreadable.unwrap().contains(word));
        writer.write(0, &[1; 100]);
        writer.close().unwrap();
        // It is there as it was, and says that it is not kept up.
        let ours = writer.bytes();
        assert_eq!((ours[95], &ours[ext as usize - 8..][..24]), (0, &bytes[ext as usize - 8..][..24]));
        let reader = World::open(ours.clone(), None, true).unwrap().list();
        assert!(reader.outdated && reader.unreadable.unwrap().contains(word));
        let writer = World::open(ours, None, false).unwrap();
        writer.store(&[kept("new", bits(9))]).unwrap();
        writer.close().unwrap();
        let list = World::open(writer.bytes(), None, true).unwrap();
        assert_eq!(list.usable(), [kept("new", bits(9))], "{word}");
    }
}

#[test]
fn bitmaps_that_a_foreign_writer_left_are_outdated_until_they_are_replaced() {
    let (mut bytes, _) = three();
    bytes[95] = 0;
    for read_only in [true, false] {
        let world = World::open(bytes.clone(), None, read_only).unwrap();
        let list = world.list();
        assert!(list.outdated && list.unreadable.is_none());
        assert_eq!(list.bitmaps.len(), 3);
        for bitmap in list.bitmaps {
            assert!(bitmap.inconsistent.unwrap().contains("knows no bitmaps"));
            assert_eq!(bitmap.clusters, 0);
        }
        says(world.load("one"), "knows no bitmaps");
        if !read_only {
            says(world.set_in_use(&["one"], false), "'one'");
            world.write(0, &[1; 10]);
            world.close().unwrap();
            assert_eq!(extension(&world.bytes()), extension(&bytes));
            // Their clusters may be others' by now, so they are not given up.
            let before = World::open(world.bytes(), None, false).unwrap();
            before.store(&[]).unwrap();
            before.close().unwrap();
            let list = World::open(before.bytes(), None, true).unwrap().list();
            assert!(!list.outdated && list.bitmaps.is_empty());
        }
    }
}

#[test]
fn a_directory_behind_the_end_is_no_reason_not_to_read_data() {
    let (mut bytes, directory) = three();
    // The file ends where the directory would begin.
    bytes.truncate(directory as usize);
    let world = World::open(bytes, None, true).unwrap();
    assert!(world.list().unreadable.unwrap().contains("behind the end"));
    assert_eq!(world.contents(), vec![0; SIZE as usize]);
}

#[test]
fn a_directory_that_cannot_be_read_now_may_be_read_later() {
    let (bytes, directory) = three();
    let leaf = leaf(bytes.clone());
    *leaf.driver.bad.lock() = directory..directory + 1;
    let refused = World::on(leaf.clone(), None, false, serde_json::json!({}));
    assert_eq!(refused.err().unwrap().kind(), driveline_graph::Kind::Io);
    let world = World::on(leaf.clone(), None, true, serde_json::json!({})).unwrap();
    assert!(world.list().unreadable.unwrap().contains("reading the directory"));
    assert_eq!(world.contents(), vec![0; SIZE as usize]);
    block_on(world.node.set_read_only(&world.children, false)).unwrap_err();
    assert!(world.bytes() == bytes, "nothing was lost");
    *leaf.driver.bad.lock() = 0..0;
    block_on(world.node.set_read_only(&world.children, false)).unwrap();
    assert_eq!(world.load("two").unwrap(), bits(70_000));
}

#[test]
fn any_damage_of_bitmaps_is_survived() {
    let (good, directory) = three();
    let ext = extension(&good);
    for seed in 0..150 * seeds().end {
        let mut random = StdRng::seed_from_u64(seed);
        let mut bytes = good.clone();
        for _ in 0..random.random_range(1..5) {
            let table = at(&good, directory + 32 * random.random_range(0..3));
            let (area, length) = [(ext - 8, 32), (directory, 96), (table, 16)][random.random_range(0..3)];
            let at = area + random.random_range(0..length);
            let value = match random.random_range(0..3) {
                0 => random.random::<u8>(),
                1 => 1 << random.random_range(0..8),
                _ => 0,
            };
            put(&mut bytes, at, &[value]);
        }
        crate::qcow2::fuzz::run(&bytes);
    }
}

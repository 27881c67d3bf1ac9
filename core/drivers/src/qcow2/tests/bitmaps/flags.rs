//! Which bitmaps look valid, and to whom.

use super::*;
use driveline_graph::Kind;
use driveline_op::op;

const SIZE: u64 = 4 << 20;

fn some_bits() -> Bits {
    let bits = Bits::new(granularity(65536), SIZE);
    bits.mark(100_000..900_000);
    bits
}

fn two() -> Vec<u8> {
    let mut set = [kept("one", some_bits()), kept("two", Bits::new(granularity(512), SIZE))];
    set[1].recording = false;
    image_with(SIZE, 4096, &set)
}

/// Which bitmaps an image says are in use, whoever reads it now.
fn in_use(bytes: Vec<u8>) -> Vec<bool> {
    let list = World::open(bytes, None, true).unwrap().list();
    assert!(!list.outdated && list.unreadable.is_none(), "{list:?}");
    list.bitmaps.iter().map(|bitmap| bitmap.in_use).collect()
}

#[test]
fn an_image_that_was_written_has_no_valid_bitmaps_for_others_and_all_of_them_for_its_node() {
    let world = World::open(two(), None, false).unwrap();
    world.write(0, &[1; 10]);
    assert_eq!(in_use(world.bytes()), [true, true]);
    let one = world.bitmap("one");
    assert_eq!((one.in_use, one.recording, one.inconsistent), (true, true, None));
    assert_eq!(world.load("one").unwrap(), some_bits());
    world.close().unwrap();
    assert_eq!(in_use(world.bytes()), [true, true]);
    let again = World::open(world.bytes(), None, false).unwrap();
    assert!(again.bitmap("one").inconsistent.unwrap().contains("in use"));
    says(again.load("one"), "in use");
    assert_eq!(again.load("one").unwrap_err().kind(), Kind::Corrupt);
}

#[test]
fn a_reader_changes_nothing_until_it_becomes_a_writer() {
    let bytes = two();
    let world = World::open(bytes.clone(), None, true).unwrap();
    assert_eq!(world.load("one").unwrap(), some_bits());
    says(world.store(&[]), "not permitted");
    says(world.set_in_use(&["one"], true), "not permitted");
    assert!(world.bytes() == bytes);
    block_on(world.node.set_read_only(&world.children, false)).unwrap();
    assert_eq!(world.bitmap("one").inconsistent, None);
    // Nothing is written, so they are what they were.
    assert!(world.bytes() == bytes);
    block_on(world.node.set_read_only(&world.children, true)).unwrap();
    assert!(world.bytes() == bytes);
    block_on(world.node.set_read_only(&world.children, false)).unwrap();
    world.write(5, &[5; 5]);
    block_on(world.node.set_read_only(&world.children, true)).unwrap();
    assert_eq!(in_use(world.bytes()), [true, true]);
    assert_eq!(world.load("one").unwrap(), some_bits(), "as it was stored");
}

/// An image was opened for writing by a start that failed at another one, and nobody closed it. Its bitmaps had been flagged
/// at the open, so the next start found all of them lost.
#[test]
fn an_image_that_was_opened_and_never_closed_keeps_its_bitmaps() {
    let bytes = two();
    let world = World::open(bytes.clone(), None, false).unwrap();
    assert_eq!(world.load("one").unwrap(), some_bits());
    assert!(world.bytes() == bytes);
    let again = World::open(world.bytes(), None, false).unwrap();
    assert_eq!(again.bitmap("one").inconsistent, None);
}

#[test]
fn an_image_that_was_opened_and_not_written_keeps_its_bitmaps() {
    let bytes = two();
    let world = World::open(bytes.clone(), None, false).unwrap();
    assert_eq!(world.read(0, 100).unwrap(), [0; 100]);
    world.close().unwrap();
    assert!(world.bytes() == bytes);
    // A set that is not stored leaves the one that is there, which is as good as it was.
    let world = World::open(bytes, None, false).unwrap();
    let wrong = Bits::new(granularity(512), SIZE - 512);
    says(world.store(&[kept("one", wrong)]), "4193792 bytes");
    world.close().unwrap();
    assert_eq!(in_use(world.bytes()), [false, false], "a set that cannot be is as if nobody had asked");
    let world = World::open(world.bytes(), None, false).unwrap();
    world.leaf.driver.failing.store(1, std::sync::atomic::Ordering::Relaxed);
    says(world.store(&[kept("one", some_bits())]), "rror");
    world.leaf.driver.failing.store(0, std::sync::atomic::Ordering::Relaxed);
    world.close().unwrap();
    assert_eq!(in_use(world.bytes()), [false, false]);
}

#[test]
fn every_kind_of_write_flags_what_was_stored_before_it() {
    let wipe = |world: &World| block_on(world.node.make_empty(&world.children)).unwrap();
    let grow = |world: &World| block_on(world.node.resize(&world.children, SIZE * 2)).unwrap();
    let shrink = |world: &World| block_on(world.node.resize(&world.children, SIZE / 2)).unwrap();
    let changes: [(&str, &dyn Fn(&World)); 6] = [
        ("write", &|world| world.write(0, b"x")),
        ("zero", &|world| world.plain(op::WRITE_ZEROES, 0, 5000, 0).unwrap()),
        ("discard", &|world| world.plain(op::DISCARD, 0, 65536, 0).unwrap()),
        ("wipe", &wipe),
        ("grow", &grow),
        ("shrink", &shrink),
    ];
    for (what, change) in changes {
        let world = World::open(image(SIZE, 4096), None, false).unwrap();
        world.store(&[kept("one", some_bits())]).unwrap();
        assert_eq!(in_use(world.bytes()), [false], "{what}");
        change(&world);
        assert_eq!(in_use(world.bytes()), [true], "{what}");
        world.close().unwrap();
        assert_eq!(in_use(world.bytes()), [true], "{what}");
    }
}

#[test]
fn what_was_stored_for_another_size_is_not_loaded() {
    for (size, same) in [(SIZE, true), (SIZE + 512, false), (SIZE - 512, false)] {
        let world = World::open(two(), None, false).unwrap();
        block_on(world.node.resize(&world.children, size)).unwrap();
        assert_eq!(world.load("one").is_ok(), same, "{size}");
        assert_eq!(world.set_in_use(&["one"], false).is_ok(), same, "{size}");
    }
}

#[test]
fn flags_are_set_and_taken_away_one_by_one() {
    let world = World::open(two(), None, false).unwrap();
    world.set_in_use(&["one"], true).unwrap();
    assert_eq!(in_use(world.bytes()), [true, false]);
    world.set_in_use(&["one"], false).unwrap();
    world.set_in_use(&["two", "two"], true).unwrap();
    assert_eq!(in_use(world.bytes()), [false, true]);
    says(world.set_in_use(&["one", "three"], true), "'three'");
    assert_eq!(in_use(world.bytes()), [false, true]);
    world.close().unwrap();
    let world = World::open(world.bytes(), None, false).unwrap();
    says(world.set_in_use(&["two"], false), "in use");
    assert_eq!(world.load("one").unwrap(), some_bits());
}

#[test]
fn a_bitmap_that_runs_is_there_without_contents() {
    let world = World::open(two(), None, false).unwrap();
    let running = |name, bytes| BitmapToStore {
        name,
        granularity: granularity(bytes),
        recording: true,
        in_use: true,
        bits: None,
    };
    world.store_these(&[running("new", 4096), running("one", 65536), running("two", 4096)]).unwrap();
    assert_eq!(in_use(world.bytes()), [true; 3]);
    assert_eq!(world.load("one").unwrap(), some_bits(), "what was there stays");
    assert_eq!(world.bitmap("one").clusters, 2);
    says(world.load("new"), "never stored");
    says(world.load("two"), "never stored");
    says(world.set_in_use(&["new"], false), "never stored");
    let valid = BitmapToStore { in_use: false, ..running("new", 4096) };
    says(world.store_these(&[valid]), "no contents");
    assert_eq!(in_use(world.bytes()), [true; 3], "a refused set changes nothing");
    world.store_these(&[BitmapToStore { in_use: false, ..running("one", 65536) }]).unwrap();
    assert_eq!(in_use(world.bytes()), [false]);
    assert_eq!(world.load("one").unwrap(), some_bits());
}

#[test]
fn what_cannot_be_stored_is_said() {
    let world = World::open(image(SIZE, 4096), None, false).unwrap();
    let good = kept("x", some_bits());
    let with = |name: &str| Kept { name: name.to_owned(), ..good.clone() };
    for (set, word) in [
        (vec![with("")], "empty"),
        (vec![with(&"x".repeat(1024))], "1024 bytes"),
        (vec![with("a\0b")], "zero byte"),
        (vec![with("a"), with("b"), with("a")], "another one"),
        (vec![kept("x", Bits::new(granularity(512), SIZE + 512))], "4194816 bytes"),
    ] {
        says(world.store(&set), word);
    }
    let other = BitmapToStore { granularity: granularity(512), ..good.to_store() };
    says(world.store_these(&[other]), "512B");
    let list = world.list();
    assert_eq!((list.bitmaps.len(), list.limits.bitmaps_max, list.limits.name_bytes_max), (0, 65535, 1023));
    let large = World::open(image(3 << 40, 65536), None, false).unwrap();
    says(large.store(&[kept("x", Bits::new(granularity(512), 3 << 40))]), "805306368 bytes");
    let nothing = World::open(image(0, 65536), None, false).unwrap();
    says(nothing.store(&[kept("x", Bits::new(granularity(512), 0))]), "0 bytes");

    let leaf = leaf(Vec::new());
    let options = CreateOptions { version: 2, ..CreateOptions::new(SIZE) };
    block_on(create(&file_child(&leaf, None).edge, &options)).unwrap();
    let old = World::on(leaf, None, false, serde_json::json!({})).unwrap();
    says(old.store(&[good]), "version 2");
    old.store(&[]).unwrap();
    assert_eq!(old.list().limits.bitmaps_max, 0);
}

#[test]
fn data_never_goes_to_where_bitmaps_are() {
    let world = World::open(image(SIZE, 4096), None, false).unwrap();
    world.write(0, &[1; 4096]);
    world.store(&[kept("one", some_bits())]).unwrap();
    world.close().unwrap();
    let mut bytes = world.bytes();
    let at = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    // L1 entry 0 points to the table whose entry 0 points to the data.
    let table = (at(&bytes, at(&bytes, 40) as usize) & 0xffff_ffff_fe00) as usize;
    let directory = bytes.windows(4).position(|word| word == [0x23, 0x85, 0x28, 0x75]).unwrap();
    let directory = at(&bytes, directory + 24);
    let bitmap_table = at(&bytes, directory as usize);
    let bits = at(&bytes, bitmap_table as usize);
    for target in [directory, bitmap_table, bits] {
        bytes[table..table + 8].copy_from_slice(&(target | 1 << 63).to_be_bytes());
        let world = World::open(bytes.clone(), None, false).unwrap();
        let error = block_on(world.ask(op::WRITE, 0, 0, 0, [1; 10][..].into())).result.unwrap_err();
        assert_eq!(error.code(), 5, "{error}");
        assert_eq!(world.load("one").unwrap(), some_bits());
    }
}

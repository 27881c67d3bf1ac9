//! Bitmaps beside what else the format has: checks and repairs, marks, snapshots, compressed clusters, subclusters, and
//! data in another file.

use super::*;
use crate::qcow2::{
    Repair, Verdict,
    header::{Header, incompatible},
    tests::{check::check as checked, crash::crashed},
};
use driveline_graph::Kind;
use driveline_op::op;
use rand::SeedableRng;

const SIZE: u64 = 4 << 20;
const CLUSTER: u64 = 4096;

fn set(seed: u64) -> [Kept; 2] {
    let mut random = rand::rngs::StdRng::seed_from_u64(seed);
    let mut other = kept("other", random_bits(&mut random, granularity(512), SIZE));
    other.recording = false;
    [kept("daily", random_bits(&mut random, granularity(512), SIZE)), other]
}

/// An image with data and bitmaps, closed, and with a witness.
fn image_with_both(bitmaps: &[Kept]) -> Vec<u8> {
    let world = World::open(image(SIZE, CLUSTER), None, false).unwrap();
    world.write(10_000, &pattern(1, 900_000));
    world.store(bitmaps).unwrap();
    witness(&world);
    world.close().unwrap();
    world.bytes()
}

fn witness(world: &World) {
    block_on(world.node.set_witness(&world.children, true)).unwrap();
}

fn had_witness(world: &World) -> bool {
    world.node.witness().unwrap().at_open
}

fn word(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap())
}

/// Where the directory, the first bitmap's table and its first cluster of bits are.
fn places(bytes: &[u8]) -> [(&'static str, u64); 3] {
    let extension = bytes.windows(4).position(|word| word == [0x23, 0x85, 0x28, 0x75]).unwrap() as u64 + 8;
    let directory = word(bytes, extension + 16);
    let table = word(bytes, directory);
    [("directory", directory), ("table", table), ("bits", word(bytes, table))]
}

/// The first L2 table of an image.
fn first_table(bytes: &[u8]) -> u64 {
    word(bytes, Header::parse(bytes).unwrap().l1_offset) & 0xff_ffff_ffff_ff00
}

#[test]
fn a_repair_of_a_dirty_image_keeps_bitmaps_and_the_witness() {
    let bitmaps = set(1);
    let good = image_with_both(&bitmaps);
    let mut dirty = good.clone();
    dirty[79] |= incompatible::DIRTY as u8;
    // Nothing is counted but the header, and some is counted twice.
    let block = word(&good, Header::parse(&good).unwrap().reftable_offset) as usize;
    dirty[block + 2..block + 600].fill(0);
    dirty[block + 601] = 2;
    assert_eq!(checked(dirty.clone(), Repair::Nothing).0.verdict(), Verdict::Corrupt);

    let reader = World::open(dirty.clone(), None, true).unwrap();
    assert!(had_witness(&reader) && reader.usable() == bitmaps);
    block_on(reader.node.set_read_only(&reader.children, false)).unwrap();
    let (report, repaired) = checked(dirty.clone(), Repair::All);
    assert_eq!(report.verdict(), Verdict::Clean, "{report:#?}");
    for world in
        [reader, World::open(dirty, None, false).unwrap(), World::open(repaired, None, false).unwrap()]
    {
        assert!(had_witness(&world) && world.usable() == bitmaps);
        world.write(SIZE - 200_000, &[9; 200_000]);
        assert!(world.usable() == bitmaps && world.read(10_000, 900_000).unwrap() == pattern(1, 900_000));
        world.store(&bitmaps).unwrap();
        world.close().unwrap();
        let (report, bytes) = checked(world.bytes(), Repair::Nothing);
        assert_eq!(report.verdict(), Verdict::Clean, "{report:#?}");
        assert_eq!(World::open(bytes, None, true).unwrap().usable(), bitmaps);
    }
}

#[test]
fn a_check_counts_bitmaps_that_are_in_use_as_qemu_does() {
    let qemu = have("qemu-img");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    let clean = |world: &World, when: &str| {
        world.flush().unwrap();
        for repair in [Repair::Nothing, Repair::Leaks, Repair::All] {
            let (report, after) = checked(world.bytes(), repair);
            assert_eq!(report.verdict(), Verdict::Clean, "{when}: {report:#?}");
            assert!(after == world.bytes(), "{when}: {repair:?} changed something");
        }
        if qemu {
            fs::write(&path, world.bytes()).unwrap();
            check(&path);
        }
    };
    let world = World::open(image_with_both(&set(2)), None, false).unwrap();
    clean(&world, "opened");
    witness(&world);
    clean(&world, "with a witness");
    world.write(0, &[3; 500_000]);
    clean(&world, "written");
    let used = set(3);
    let used = used.each_ref().map(|bitmap| BitmapToStore { in_use: true, bits: None, ..bitmap.to_store() });
    world.store_these(&used).unwrap();
    clean(&world, "kept elsewhere");
    world.write(2 << 20, &[4; 500_000]);
    world.store(&set(4)).unwrap();
    clean(&world, "stored");
    world.store(&[]).unwrap();
    clean(&world, "without any");
}

#[test]
fn data_is_not_written_over_bitmaps_and_the_image_is_marked() {
    let bitmaps = set(5);
    let good = image_with_both(&bitmaps);
    let both = places(&good).into_iter().flat_map(|place| [(place, false), (place, true)]);
    for ((what, place), anew) in both {
        let mut bytes = good.clone();
        // The disk's cluster 88 is where bitmaps are, as far as the map says.
        let entry = (first_table(&good) + 8 * 88) as usize;
        bytes[entry..entry + 8].copy_from_slice(&(place | 1 << 63).to_be_bytes());
        let world = World::open(bytes, None, false).unwrap();
        if anew {
            // All of the image is read again.
            block_on(world.node.take_snapshot(&world.children, "s")).unwrap();
            block_on(world.node.delete_snapshot(&world.children, "s")).unwrap();
        }
        let before = world.bytes();
        let answer = block_on(world.ask(op::WRITE, 88 * CLUSTER, 0, 0, [7; 4096][..].into()));
        assert_eq!(answer.result.unwrap_err().code(), 5, "{what}");
        says(world.store(&[]), "damaged");
        world.close().unwrap();
        let marked = world.bytes();
        let header = Header::parse(&marked).unwrap();
        assert_eq!(header.incompatible, incompatible::CORRUPT, "{what}");
        // Nothing was changed but the header, and flags before that.
        let directory = places(&good)[0].1 as usize;
        for at in CLUSTER as usize..good.len() {
            assert!(
                marked[at] == before[at] || (directory..directory + 512).contains(&at),
                "{what}, {at:#x}"
            );
        }
    }
}

#[test]
fn a_bitmap_that_claims_tables_of_the_disk_loses_what_it_says_and_takes_nothing_with_it() {
    let good = image_with_both(&set(6));
    let block = word(&good, Header::parse(&good).unwrap().reftable_offset);
    let [(_, directory), (_, table), _] = places(&good);
    for (at, place) in [(table, first_table(&good)), (table, block), (directory, first_table(&good))] {
        let mut bytes = good.clone();
        bytes[at as usize..at as usize + 8].copy_from_slice(&place.to_be_bytes());
        let world = World::open(bytes, None, false).unwrap();
        assert!(world.bitmap("daily").inconsistent.is_some(), "{place:#x}");
        assert_eq!(world.bitmap("other").inconsistent, None);
        world.store(&[]).unwrap();
        world.write(3 << 20, &[5; 300_000]);
        world.close().unwrap();
        let (report, bytes) = checked(world.bytes(), Repair::Nothing);
        assert!(matches!(report.verdict(), Verdict::Clean | Verdict::Leaks), "{report:#?}");
        let data = World::open(bytes, None, true).unwrap().read(10_000, 900_000).unwrap();
        assert!(data == pattern(1, 900_000));
    }
}

#[test]
fn snapshots_come_and_go_beside_bitmaps_and_none_is_applied() {
    let qemu = have_qemu();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    let bitmaps = set(7);
    let names = ["daily", "other"];
    let sums = bitmaps.each_ref().map(|bitmap| sum(&bitmap.bits));
    let agrees = |world: &World| {
        world.close().unwrap();
        assert_eq!(World::open(world.bytes(), None, true).unwrap().usable(), bitmaps);
        if qemu {
            fs::write(&path, world.bytes()).unwrap();
            check(&path);
            assert_eq!(sums_of_qemu(&path, &names), sums);
        }
    };
    let take = |world: &World, name| block_on(world.node.take_snapshot(&world.children, name));
    let delete = |world: &World, name| block_on(world.node.delete_snapshot(&world.children, name));
    let refused = |world: &World| {
        let error = block_on(world.node.apply_snapshot(&world.children, "s")).unwrap_err();
        assert_eq!(error.kind(), Kind::NotSupported);
        says(Err::<(), _>(error), "persistent bitmaps");
    };

    // The data is what it was, so the bitmaps are what they were when they are not looked after at all.
    let world = World::open(image_with_both(&bitmaps), None, false).unwrap();
    take(&world, "s").unwrap();
    assert_eq!(world.usable(), bitmaps);
    refused(&world);
    agrees(&world);
    let world = World::open(world.bytes(), None, false).unwrap();
    refused(&world);
    take(&world, "t").unwrap();
    delete(&world, "s").unwrap();
    agrees(&world);

    // Data is written between.
    let world = World::open(world.bytes(), None, false).unwrap();
    assert_eq!(world.usable(), bitmaps);
    take(&world, "s").unwrap();
    world.write(0, &[1; 700_000]);
    delete(&world, "t").unwrap();
    world.write(500_000, &[2; 700_000]);
    assert_eq!(world.usable(), bitmaps, "as they were stored");
    refused(&world);
    let unstored = World::open(world.bytes(), None, true).unwrap();
    assert!(unstored.usable().is_empty(), "they are in use");
    world.store(&bitmaps).unwrap();
    delete(&world, "s").unwrap();
    take(&world, "s").unwrap();
    agrees(&world);

    // Without bitmaps it is applied.
    let world = World::open(world.bytes(), None, false).unwrap();
    world.store(&[]).unwrap();
    world.write(0, &[3; 700_000]);
    block_on(world.node.apply_snapshot(&world.children, "s")).unwrap();
    assert!(world.list().bitmaps.is_empty() && world.read(0, 500_000).unwrap() == [1; 500_000]);
    world.store(&bitmaps).unwrap();
    agrees(&world);
}

#[test]
fn whatever_ends_a_change_of_snapshots_leaves_the_witness_and_bitmaps_that_can_be_told() {
    let bitmaps = set(8);
    for seed in 0..2 * seeds().end {
        let mut random = rand::rngs::StdRng::seed_from_u64(seed);
        let world = World::open(image_with_both(&bitmaps), None, false).unwrap();
        witness(&world);
        let before = world.bytes();
        *world.leaf.driver.log.lock() = Some(Vec::new());
        block_on(world.node.take_snapshot(&world.children, "s")).unwrap();
        block_on(world.node.delete_snapshot(&world.children, "s")).unwrap();
        world.close().unwrap();
        let log = world.leaf.driver.log.lock().take().unwrap();
        for cut in 0..=log.len() {
            let world = World::open(crashed(&before, &log, cut, &mut random), None, false).unwrap();
            let context = format!("seed {seed}, before event {cut}");
            assert!(had_witness(&world), "{context}");
            for bitmap in world.list().bitmaps {
                let is_told = bitmap.inconsistent.is_none_or(|why| why.contains("in use"));
                assert!(is_told && ["daily", "other"].contains(&&*bitmap.name), "{context}");
            }
            assert!(world.usable().iter().all(|bitmap| bitmaps.contains(bitmap)), "{context}");
            world.close().unwrap();
            let (report, _) = checked(world.bytes(), Repair::Nothing);
            assert!(matches!(report.verdict(), Verdict::Clean | Verdict::Leaks), "{context}: {report:#?}");
        }
    }
}

#[test]
fn a_compressed_write_is_a_write_to_whoever_reads_the_bitmaps() {
    let bitmaps = set(9);
    let world = World::open(image_with_both(&bitmaps), None, false).unwrap();
    let write = |offset| {
        block_on(world.node.write_compressed(&world.children, offset, &[7; CLUSTER as usize])).unwrap();
    };
    write(0);
    block_on(world.node.close(&world.children)).unwrap();
    assert!(World::open(world.bytes(), None, true).unwrap().usable().is_empty());
    // Stored in between, they are flagged once more.
    world.store(&bitmaps).unwrap();
    assert_eq!(World::open(world.bytes(), None, true).unwrap().usable(), bitmaps);
    write(CLUSTER);
    assert!(World::open(world.bytes(), None, true).unwrap().usable().is_empty());
}

/// Stores bitmaps in an image that is made with these options, and looks at it from all sides.
fn are_kept(options: CreateOptions) {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    let data = dir.path().join("data");
    let data_file = options.data_file.is_some();
    let options = CreateOptions { data_file: options.data_file.map(|_| text(&data).to_owned()), ..options };
    crate::qcow2::create_file(&path, &options).unwrap();
    let data_leaf = data_file.then(|| leaf(fs::read(&data).unwrap()));
    let open = |read_only| {
        let file = leaf(fs::read(&path).unwrap());
        World::with_data(file, data_leaf.as_ref(), None, read_only, serde_json::json!({})).unwrap()
    };
    let close = |world: World| {
        world.close().unwrap();
        fs::write(&path, world.bytes()).unwrap();
        if let Some(leaf) = &data_leaf {
            fs::write(&data, &*leaf.driver.data.lock()).unwrap();
        }
        assert_eq!(checked(world.bytes(), Repair::Nothing).0.verdict(), Verdict::Clean);
        check(&path);
    };
    let flags: [(_, _, &[&str]); 2] = [("daily", 512, &["auto"]), ("other", 512, &[])];
    let flags = flags.map(|(name, granularity, flags)| {
        (name.to_owned(), granularity, flags.iter().map(|&flag| flag.to_owned()).collect::<Vec<_>>())
    });
    let mut model = vec![0; SIZE as usize];
    for seed in 10..13 {
        let bitmaps = set(seed);
        let world = open(false);
        let at = 3000 + seed as usize * 90_000;
        model[at..at + 5000].copy_from_slice(&pattern(seed, 5000));
        world.write(at as u64, &model[at..at + 5000]);
        model[at + 8192..at + 8192 + 3000].fill(0);
        world.plain(op::WRITE_ZEROES, at as u64 + 8192, 3000, 0).unwrap();
        world.store(&bitmaps).unwrap();
        close(world);
        let reader = open(true);
        assert_eq!(reader.usable(), bitmaps);
        assert_eq!(reader.node.details()["data-file-raw"], options.data_file_raw);
        assert_eq!(info(&path), flags);
        assert_eq!(
            sums_of_qemu(&path, &["daily", "other"]),
            bitmaps.each_ref().map(|bitmap| sum(&bitmap.bits))
        );
        // Whoever writes without looking after them leaves them in use.
        let world = open(false);
        assert_eq!(world.usable(), bitmaps);
        world.write(at as u64 + 40_000, &[1; 700]);
        model[at + 40_000..at + 40_700].fill(1);
        assert_eq!(world.contents(), model);
        close(world);
        assert!(open(true).usable().is_empty());
        let raw = dir.path().join("raw");
        run("qemu-img", &["convert", "-O", "raw", text(&path), text(&raw)]);
        assert!(fs::read(&raw).unwrap() == model);
    }
    let bits = data_leaf.as_ref().map(|leaf| leaf.driver.data.lock().len());
    assert!(bits.is_none_or(|bytes| bytes as u64 == SIZE), "bitmaps are with the metadata");
}

#[test]
fn bitmaps_are_kept_in_an_image_with_subclusters() {
    are_kept(CreateOptions { cluster_bytes: 16384, extended_l2: true, ..CreateOptions::new(SIZE) });
}

#[test]
fn bitmaps_are_kept_in_an_image_with_a_data_file() {
    for data_file_raw in [false, true] {
        let data_file = Some(String::new());
        are_kept(CreateOptions {
            data_file,
            data_file_raw,
            cluster_bytes: CLUSTER,
            ..CreateOptions::new(SIZE)
        });
    }
}

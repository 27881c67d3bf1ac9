//! Damaged images: what is found is what QEMU finds, and after a repair both find nothing.

use super::{crash::crashed, harness::*};
use crate::qcow2::{
    CheckReport, Repair, Verdict, check_image,
    header::Header,
    layout::{COPIED, OFFSET_MASK, be64},
};
use futures::executor::block_on;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{fs, ops::Range, path::Path};

/// What QEMU finds: the exit code, corruptions, leaks.
fn qemu_finds(path: &Path) -> (i32, u64, u64) {
    let out = output("qemu-img", &["check", "-f", "qcow2", "--output=json", path.to_str().unwrap()]);
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap_or_default();
    let count = |key: &str| json[key].as_u64().unwrap_or(0);
    (out.status.code().unwrap(), count("corruptions"), count("leaks"))
}

pub(crate) fn check(bytes: Vec<u8>, repair: Repair) -> (CheckReport, Vec<u8>) {
    let leaf = leaf(bytes);
    let report = block_on(check_image(&file_child(&leaf, None).edge, repair)).unwrap();
    let bytes = leaf.driver.data.lock().clone();
    (report, bytes)
}

fn code(report: &CheckReport) -> i32 {
    match report.verdict() {
        Verdict::Clean => 0,
        Verdict::Incomplete => 1,
        Verdict::Corrupt => 2,
        Verdict::Leaks => 3,
    }
}

/// An image with a bit of everything, and where its words are.
struct Sample {
    bytes: Vec<u8>,
    contents: Vec<u8>,
    header: Header,
    l1: Range<usize>,
    tables: Vec<usize>,
    blocks: Vec<usize>,
}

const SAMPLES: [&str; 7] = [
    "compat=1.1,cluster_size=4096",
    "compat=0.10,cluster_size=512",
    "compat=1.1,cluster_size=65536",
    "compat=1.1,cluster_size=512,refcount_bits=1",
    "compat=1.1,cluster_size=1024,refcount_bits=64",
    "compat=1.1,cluster_size=16384,extended_l2=on",
    "compat=1.1,cluster_size=4096,refcount_bits=32,compression_type=zstd",
];

fn words(bytes: &[u8], range: Range<usize>) -> Vec<u64> {
    bytes[range].chunks_exact(8).map(|word| be64(word, 0)).collect()
}

fn sample(dir: &Path, options: &str) -> Sample {
    let (path, raw) = (dir.join("sample.qcow2"), dir.join("sample.raw"));
    let text = path.to_str().unwrap();
    let mut data = vec![7; 1500 << 10];
    data[..300_000].copy_from_slice(&pattern(3, 300_000));
    data[500_000..800_000].fill(0);
    fs::write(&raw, &data).unwrap();
    run("qemu-img", &["convert", "-c", "-O", "qcow2", "-o", options, raw.to_str().unwrap(), text]);
    qemu_io(&path, &["write -P 1 600k 200k".into(), "write -z 1000k 64k".into(), "write -P 3 0 100k".into()]);
    if !options.contains("refcount_bits=1") {
        run("qemu-img", &["snapshot", "-c", "s", text]);
        if options.contains("1.1") {
            run("qemu-img", &["bitmap", "--add", text, "b"]);
        }
    }
    qemu_io(&path, &["write -P 9 100k 300k".into()]);
    run("qemu-img", &["convert", "-O", "raw", text, raw.to_str().unwrap()]);
    let bytes = fs::read(&path).unwrap();
    let header = Header::parse(&bytes).unwrap();
    let l1 = header.l1_offset as usize..header.l1_offset as usize + header.l1_entries as usize * 8;
    let reftable = header.reftable_offset as usize
        ..header.reftable_offset as usize
            + header.reftable_clusters as usize * header.geometry().cluster_bytes() as usize;
    let offsets = |range| words(&bytes, range).into_iter().map(|word| (word & OFFSET_MASK) as usize);
    let (tables, blocks) = (offsets(l1.clone()).collect(), offsets(reftable).filter(|&at| at != 0).collect());
    Sample { tables, blocks, l1, contents: fs::read(raw).unwrap(), header, bytes }
}

/// Damages one word. Returns the guest's bytes that may be lost, and whether there is one way to count what is wrong.
fn damage(sample: &Sample, bytes: &mut [u8], random: &mut StdRng) -> (Range<usize>, bool) {
    let geometry = sample.header.geometry();
    let cluster = geometry.cluster_bytes() as usize;
    let flip = |bytes: &mut [u8], at: usize, random: &mut StdRng| bytes[at] ^= 1 << random.random_range(0..8);
    let none = 0..0;
    let entry_bytes = geometry.entry_words() * 8;
    let per_table = 1 << geometry.l2_bits();
    // An entry of the guest's disk, and where it is.
    let any = |random: &mut StdRng| {
        loop {
            let index = random.random_range(0..sample.contents.len() / cluster);
            let table = sample.tables[index / per_table];
            if table != 0 {
                return (index, table + index % per_table * entry_bytes);
            }
        }
    };
    let (index, place) = any(random);
    let guest = index * cluster..(index + 1) * cluster;
    let lost = match random.random_range(0..9) {
        0..=2 => {
            // Mostly where something is counted.
            let block = sample.blocks[random.random_range(0..sample.blocks.len())];
            let used = (sample.bytes.len() / cluster) << geometry.refcount_order >> 3;
            flip(bytes, block + random.random_range(0..used.clamp(1, cluster)), random);
            none
        }
        3 => {
            // Lost: a refcount without a use.
            let block = sample.blocks[random.random_range(0..sample.blocks.len())];
            bytes[block..block + cluster].fill(if geometry.refcount_order == 0 { 0xff } else { 0x11 });
            none
        }
        4 => {
            // No refcount at all.
            let at = sample.header.reftable_offset as usize;
            bytes[at..at + 8].fill(0);
            none
        }
        5 => {
            flip(bytes, place + random.random_range(0..8), random);
            guest
        }
        6 => {
            // One place for two.
            let (_, other) = any(random);
            bytes.copy_within(other..other + entry_bytes, place);
            guest
        }
        7 => {
            // Anything that is in the file, as data.
            let at = random.random_range(1..bytes.len() / cluster) * cluster;
            bytes[place..place + 8].copy_from_slice(&(at as u64 | COPIED).to_be_bytes());
            guest
        }
        _ => {
            let index = random.random_range(0..sample.tables.len());
            flip(bytes, sample.l1.start + index * 8 + random.random_range(0..8), random);
            let coverage = per_table * cluster;
            // QEMU takes what is in the middle of clusters for a table, too.
            return (index * coverage..(index + 1) * coverage, false);
        }
    };
    (lost, true)
}

#[test]
fn what_is_wrong_with_an_image_is_what_qemu_says_and_is_repaired() {
    if !have("qemu-img") || !have("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("damaged.qcow2");
    let samples = SAMPLES.map(|options| sample(dir.path(), options));
    for seed in 0..84 * seeds().end {
        let number = seed as usize % samples.len();
        let sample = &samples[number];
        let mut random = StdRng::seed_from_u64(seed);
        let mut bytes = sample.bytes.clone();
        let mut comparable = true;
        let mut kept = vec![true; sample.contents.len()];
        for _ in 0..random.random_range(1..4) {
            let (lost, countable) = damage(sample, &mut bytes, &mut random);
            comparable &= countable;
            let end = lost.end.min(kept.len());
            kept[lost.start.min(end)..end].fill(false);
        }
        let context = format!("seed {seed}, {}", SAMPLES[number]);
        fs::write(&path, &bytes).unwrap();
        let (report, same) = check(bytes.clone(), Repair::Nothing);
        assert!(same == bytes, "{context}: a check changed the image");
        let found = qemu_finds(&path);
        assert_eq!(code(&report), found.0, "{context}: {report:#?}, QEMU: {found:?}");
        if comparable && found.0 != 1 {
            let ours = (code(&report), report.corruptions, report.leaks);
            assert_eq!(ours, found, "{context}: {report:#?}");
        }

        let (report, repaired) = check(bytes, Repair::All);
        fs::write(&path, &repaired).unwrap();
        assert_eq!(
            (report.verdict(), qemu_finds(&path)),
            (Verdict::Clean, (0, 0, 0)),
            "{context}: {report:#?}"
        );
        let world = World::open(repaired, None, true).unwrap();
        let cluster = sample.header.geometry().cluster_bytes() as usize;
        let lost = (0..kept.len()).step_by(cluster).find(|&at| {
            let end = (at + cluster).min(kept.len());
            // A packed cluster that is no longer what it was cannot be read.
            let now = world.read(at as u64, end - at).unwrap_or_default();
            kept[at] && now != sample.contents[at..end]
        });
        assert_eq!(lost, None, "{context}: data was intact before the repair, and is not after");
    }
}

#[test]
fn a_repair_of_leaks_touches_nothing_else() {
    if !have("qemu-img") || !have("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let sample = sample(dir.path(), SAMPLES[0]);
    let mut bytes = sample.bytes.clone();
    let block = sample.blocks[0];
    let end = sample.bytes.len().div_ceil(4096);
    bytes.resize((end + 3) * 4096, 0);
    bytes[block + end * 2..block + (end + 3) * 2].fill(1);
    let (leaky, _) = check(bytes.clone(), Repair::Nothing);
    assert_eq!((leaky.verdict(), leaky.leaks), (Verdict::Leaks, 3));
    // A table that is also counted wrong is no leak.
    bytes[sample.tables[0] + 7] ^= 4;
    let (report, repaired) = check(bytes.clone(), Repair::Leaks);
    assert_eq!((report.verdict(), report.leaks, report.leaks_fixed), (Verdict::Corrupt, 0, 3));
    assert_eq!(repaired[sample.tables[0]..][..4096], bytes[sample.tables[0]..][..4096]);
}

#[test]
fn a_repair_that_is_cut_off_can_be_done_again() {
    if !have("qemu-img") || !have("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cut.qcow2");
    let samples = [0, 1, 3].map(|number| sample(dir.path(), SAMPLES[number]));
    for seed in 0..24 * seeds().end {
        let sample = &samples[seed as usize % samples.len()];
        let mut random = StdRng::seed_from_u64(seed);
        let mut bytes = sample.bytes.clone();
        let mut kept = vec![true; sample.contents.len()];
        for _ in 0..random.random_range(1..4) {
            let (lost, _) = damage(sample, &mut bytes, &mut random);
            let end = lost.end.min(kept.len());
            kept[lost.start.min(end)..end].fill(false);
        }
        let leaf = leaf(bytes.clone());
        *leaf.driver.log.lock() = Some(Vec::new());
        block_on(check_image(&file_child(&leaf, None).edge, Repair::All)).unwrap();
        let log = leaf.driver.log.lock().take().unwrap();
        let file = crashed(&bytes, &log, random.random_range(0..=log.len()), &mut random);
        let (report, repaired) = check(file, Repair::All);
        assert_eq!(report.verdict(), Verdict::Clean, "seed {seed}: {report:#?}");
        fs::write(&path, &repaired).unwrap();
        assert_eq!(qemu_finds(&path), (0, 0, 0), "seed {seed}");
        let world = World::open(repaired, None, true).unwrap();
        for at in (0..kept.len()).step_by(512).filter(|&at| kept[at]) {
            assert!(
                world.read(at as u64, 512).unwrap() == sample.contents[at..at + 512],
                "seed {seed}, {at}"
            );
        }
    }
}

#[test]
fn snapshots_that_do_not_know_the_size_of_the_disk_are_told() {
    if !have("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("old.qcow2");
    let text = path.to_str().unwrap();
    run("qemu-img", &["create", "-f", "qcow2", "-o", "compat=0.10", text, "1M"]);
    run("qemu-img", &["snapshot", "-c", "s", text]);
    let mut bytes = fs::read(&path).unwrap();
    let header = Header::parse(&bytes).unwrap();
    // The entry as the oldest programs wrote it: without extra data.
    let at = header.snapshots_offset as usize;
    let extra = bytes[at + 39] as usize;
    bytes[at + 39] = 0;
    bytes.copy_within(at + 40 + extra.., at + 40);
    assert_eq!(check(bytes.clone(), Repair::Nothing).0.verdict(), Verdict::Clean);
    let mut third = Header { version: 3, further: vec![], ..header }.encode().unwrap();
    third.resize(512, 0);
    bytes[..512].copy_from_slice(&third);
    fs::write(&path, &bytes).unwrap();
    let (report, _) = check(bytes.clone(), Repair::Nothing);
    assert_eq!((2, report.corruptions, report.leaks), qemu_finds(&path), "{report:#?}");
    let (report, repaired) = check(bytes, Repair::All);
    fs::write(&path, repaired).unwrap();
    assert_eq!((report.verdict(), qemu_finds(&path)), (Verdict::Clean, (0, 0, 0)), "{report:#?}");
    assert!(run("qemu-img", &["snapshot", "-l", text]).contains(" s "));
}

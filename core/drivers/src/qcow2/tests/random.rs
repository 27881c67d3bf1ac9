//! Random operations: a model in memory and QEMU must agree with what the image holds.

use super::harness::*;
use driveline_op::{BlockStatus, Buffer, flag, op, status};
use futures::{executor::block_on, future::join_all};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{fs, path::Path};

/// What an image should read as, byte by byte.
struct Model(Vec<u8>);

/// Some operations at the same time, disjoint, then perhaps a flush.
fn batch(world: &World, model: &mut Model, random: &mut StdRng, backed_v2: bool) {
    let size = model.0.len() as u64;
    let mut at = random.random_range(0..size);
    let mut asks = Vec::new();
    for _ in 0..random.random_range(1..6) {
        let left = size - at;
        if left == 0 {
            break;
        }
        let length_max = [700, 5000, 70_000, 400_000][random.random_range(0..4)];
        let length = random.random_range(1..=left.min(length_max));
        let range = at as usize..(at + length) as usize;
        let fua = if random.random_bool(0.05) { flag::FUA } else { 0 };
        match random.random_range(0..8) {
            0..=4 => {
                let data = pattern(random.random(), length as usize);
                model.0[range].copy_from_slice(&data);
                asks.push((op::WRITE, at, length, fua, Buffer::from(&data[..])));
            }
            5..=6 => {
                model.0[range].fill(0);
                let flags = if random.random() { flag::MAY_UNMAP } else { 0 };
                asks.push((op::WRITE_ZEROES, at, length, fua | flags, Buffer::default()));
            }
            _ => asks.push((op::DISCARD, at, length, fua, Buffer::default())),
        }
        at += length + random.random_range(0..3) * random.random_range(0..=(left - length) / 3);
    }
    let discards: Vec<_> = asks.iter().filter(|a| a.0 == op::DISCARD).map(|a| (a.1, a.2)).collect();
    let answers =
        join_all(asks.into_iter().map(|(op, at, length, flags, b)| world.ask(op, at, length, flags, b)));
    for answer in block_on(answers) {
        answer.result.unwrap();
    }
    for (at, length) in discards {
        // What is read now is what must be read from now on: as before, or zeroes.
        let found = world.read(at, length as usize).unwrap();
        let before = &model.0[at as usize..(at + length) as usize];
        assert!(
            found == before || found.iter().zip(before).all(|(now, before)| now == before || *now == 0),
            "discard shows other data"
        );
        if backed_v2 {
            assert!(found == before);
        }
        model.0[at as usize..(at + length) as usize].copy_from_slice(&found);
    }
    // Narrow refcounts do not count packed data for a snapshot as well.
    let wide = world.node.details()["refcount-bits"].as_u64() >= Some(8);
    let packs = wide && world.children.iter().all(|child| child.name != "data-file");
    if packs && random.random_bool(0.2) {
        let range = packed(world, random);
        model.0[range.start as usize..range.end as usize].fill((range.start >> 9) as u8);
    }
    if random.random_bool(0.2) {
        world.flush().unwrap();
    }
}

/// Writes a cluster compressed, each byte with the number of its sector, as far as it fits; returns where.
pub(crate) fn packed(world: &World, random: &mut StdRng) -> std::ops::Range<u64> {
    let info = *world.edge().info();
    let cluster = u64::from(info.cluster_bytes);
    let start = random.random_range(0..info.size_bytes.div_ceil(cluster)) * cluster;
    let range = start..(start + cluster).min(info.size_bytes);
    let data = vec![(start >> 9) as u8; (range.end - range.start) as usize];
    block_on(world.node.write_compressed(&world.children, start, &data)).unwrap();
    range
}

/// The extents cover the image and tell the truth about zeroes.
fn extents_are_true(world: &World, model: &Model) {
    let size = model.0.len() as u64;
    let mut at = 0;
    while at < size {
        let extent: BlockStatus = world.status(at, size - at).unwrap();
        assert!(extent.length > 0 && extent.length <= size - at);
        let range = at as usize..(at + extent.length) as usize;
        if extent.flags & status::ZERO != 0 {
            assert!(model.0[range.clone()].iter().all(|&byte| byte == 0), "{extent:?} at {at}");
        }
        if extent.flags & status::MAPPED != 0 {
            let map = extent.map as usize;
            let bytes = world.bytes();
            let end = (map + range.len()).min(bytes.len());
            assert!(bytes[map..end] == model.0[range][..end - map], "{extent:?} at {at}");
        }
        at += extent.length;
    }
}

fn check(path: &Path) {
    run("qemu-img", &["check", "-f", "qcow2", path.to_str().unwrap()]);
}

fn raw_of(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("converted");
    run("qemu-img", &["convert", "-O", "raw", path.to_str().unwrap(), raw.to_str().unwrap()]);
    fs::read(raw).unwrap()
}

/// Random work on one image, with QEMU looking at it after each round, and taking snapshots between.
fn rounds(seed: u64, options: &str, size: &str, backing: bool) {
    let dir = tempfile::tempdir().unwrap();
    let mut random = StdRng::seed_from_u64(seed);
    let (path, base) = (dir.path().join("image.qcow2"), dir.path().join("base.qcow2"));
    let (path_text, base_text) = (path.to_str().unwrap(), base.to_str().unwrap());
    let mut below = None;
    if backing {
        run("qemu-img", &["create", "-f", "qcow2", base_text, "1500k"]);
        qemu_io(&base, &["write -P 1 0 900k".into(), "write -P 2 1200k 100k".into()]);
        below = Some(World::open(fs::read(&base).unwrap(), None, true).unwrap());
        run(
            "qemu-img",
            &["create", "-f", "qcow2", "-o", options, "-b", base_text, "-F", "qcow2", path_text, size],
        );
    } else {
        run("qemu-img", &["create", "-f", "qcow2", "-o", options, path_text, size]);
    }
    let data_path =
        options.split_once("data_file=").map(|(_, rest)| Path::new(rest.split(',').next().unwrap()));
    let mut snapshots = Vec::new();
    let mut model = Model(raw_of(&path));
    for round in 0..3 {
        let context = format!("seed {seed}, {options}, backing {backing}, round {round}");
        let cache = serde_json::json!({ "cache-size": "128KiB" });
        let data = data_path.map(|path| leaf(fs::read(path).unwrap()));
        let image = leaf(fs::read(&path).unwrap());
        let world = World::with_data(image, data.as_ref(), below.as_ref(), false, cache).unwrap();
        for _ in 0..20 {
            batch(&world, &mut model, &mut random, backing && options.contains("0.10"));
        }
        assert!(world.contents() == model.0, "{context}");
        extents_are_true(&world, &model);
        world.close().unwrap();
        fs::write(&path, world.bytes()).unwrap();
        if let Some((path, data)) = data_path.zip(data) {
            let bytes = data.driver.data.lock().clone();
            if options.contains("data_file_raw=on") {
                // QEMU makes it as long as whole clusters.
                let seen = &bytes[..model.0.len()];
                assert!(seen == model.0, "the data file is not what the disk is: {context}");
                assert_eq!(bytes.len() as u64, fs::metadata(path).unwrap().len(), "{context}");
            }
            fs::write(path, bytes).unwrap();
        }
        check(&path);
        assert!(raw_of(&path) == model.0, "QEMU reads something else: {context}");
        // Each snapshot counts once more, and going back to one does for a moment.
        let snapshots_max = match options.split_once("refcount_bits=") {
            _ if data_path.is_some() => 0,
            Some((_, "1")) => 0,
            Some((_, "2")) => 1,
            _ => 2,
        };
        if round < snapshots_max {
            run("qemu-img", &["snapshot", "-c", &format!("s{round}"), path_text]);
            snapshots.push(model.0.clone());
        }
    }
    for (i, contents) in snapshots.iter().enumerate() {
        run("qemu-img", &["snapshot", "-a", &format!("s{i}"), path_text]);
        assert!(raw_of(&path) == *contents, "snapshot {i} changed: seed {seed}, {options}");
    }
}

/// Shapes of images, and the sizes of their disks.
const SHAPES: [(&str, &str); 11] = [
    ("compat=0.10,cluster_size=512", "3000k"),
    ("compat=0.10,cluster_size=65536", "3001k"),
    ("compat=1.1,cluster_size=512,refcount_bits=1", "3000k"),
    ("compat=1.1,cluster_size=512,refcount_bits=64", "2500k"),
    ("compat=1.1,cluster_size=1024,refcount_bits=2", "3000k"),
    ("compat=1.1,cluster_size=4096,refcount_bits=4", "3333k"),
    ("compat=1.1,cluster_size=65536,refcount_bits=16", "3001k"),
    ("compat=1.1,cluster_size=16384,refcount_bits=8", "3001k"),
    ("compat=1.1,cluster_size=2097152,refcount_bits=32", "9000k"),
    ("compat=1.1,cluster_size=16384,extended_l2=on,refcount_bits=16", "3001k"),
    ("compat=1.1,cluster_size=131072,extended_l2=on,refcount_bits=16", "3001k"),
];

/// More of it: `DRIVELINE_QCOW2_SEEDS=100`.
fn all_shapes(backing: bool) {
    if !have("qemu-img") || !have("qemu-io") {
        return;
    }
    for seed in seeds() {
        for (options, size) in SHAPES {
            rounds(seed, options, size, backing);
        }
    }
}

#[test]
fn random_work_leaves_images_that_qemu_agrees_with() {
    all_shapes(false);
}

#[test]
fn random_work_on_images_with_a_data_file_leaves_what_qemu_agrees_with() {
    if !have("qemu-img") || !have("qemu-io") {
        return;
    }
    for seed in seeds() {
        for (shape, backing) in [
            ("cluster_size=4096,data_file=DIR/a", false),
            ("cluster_size=65536,data_file=DIR/b", true),
            ("cluster_size=16384,data_file=DIR/c,data_file_raw=on", false),
            ("cluster_size=16384,data_file=DIR/d,extended_l2=on", true),
            ("cluster_size=32768,data_file=DIR/e,extended_l2=on,data_file_raw=on", false),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let options = shape.replace("DIR", dir.path().to_str().unwrap());
            rounds(seed, &options, "3000k", backing);
        }
    }
}

#[test]
fn random_work_on_overlays_leaves_images_that_qemu_agrees_with() {
    all_shapes(true);
}

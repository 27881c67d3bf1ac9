//! Compressed clusters that we write.

use super::{check::check, harness::*};
use crate::qcow2::{Compression, CreateOptions, Repair, Verdict, create_file};
use driveline_graph::Kind;
use driveline_op::op;
use futures::executor::block_on;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::fs;

/// Data that packs well, or with what is far away, or not at all.
fn data(random: &mut StdRng, length: usize) -> Vec<u8> {
    let seed = random.random();
    match random.random_range(0..4) {
        0 => vec![seed as u8; length],
        1 => pattern(seed, length),
        2 => pattern(seed, length / 3 + 1).repeat(4)[..length].to_vec(),
        _ => (0..length).map(|i| (i / 7 * 3) as u8).collect(),
    }
}

#[test]
fn packed_images_are_small_and_read_as_qemu_reads_them() {
    if !have("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (number, (compression, cluster_bytes, refcount_bits, version)) in [
        (Compression::Zlib, 65536, 16, 3),
        (Compression::Zstd, 65536, 16, 3),
        (Compression::Zlib, 512, 16, 2),
        (Compression::Zstd, 4096, 2, 3),
        (Compression::Zlib, 4096, 1, 3),
        (Compression::Zlib, 2 << 20, 8, 3),
    ]
    .into_iter()
    .enumerate()
    {
        let context = format!("{compression:?}, clusters of {cluster_bytes}, refcounts of {refcount_bits}");
        let path = dir.path().join(format!("{number}.qcow2"));
        let text = path.to_str().unwrap();
        let size = 3_000_320;
        let options =
            CreateOptions { compression, cluster_bytes, refcount_bits, version, ..CreateOptions::new(size) };
        create_file(&path, &options).unwrap();
        let world = World::open(fs::read(&path).unwrap(), None, false).unwrap();
        let mut random = StdRng::seed_from_u64(number as u64);
        let mut model = vec![0; size as usize];
        let cluster = cluster_bytes as usize;
        for round in 0..2 {
            for at in (0..size as usize).step_by(cluster) {
                let range = at..(at + cluster).min(size as usize);
                if round > 0 && random.random_bool(0.7) {
                    continue;
                }
                model[range.clone()].copy_from_slice(&data(&mut random, range.len()));
                let write = world.node.write_compressed(&world.children, at as u64, &model[range.clone()]);
                block_on(write).unwrap();
                if random.random_bool(0.1) {
                    let part = range.start + random.random_range(0..range.len())..range.end;
                    model[part.clone()].fill(0xee);
                    let bytes = model[part.clone()].into();
                    block_on(world.ask(op::WRITE, part.start as u64, 0, 0, bytes)).result.unwrap();
                }
                if random.random_bool(0.01) {
                    world.flush().unwrap();
                }
            }
            assert!(world.contents() == model, "{context}");
        }
        world.close().unwrap();
        fs::write(&path, world.bytes()).unwrap();
        run("qemu-img", &["check", text]);
        let (report, _) = check(world.bytes(), Repair::Nothing);
        assert_eq!(report.verdict(), Verdict::Clean, "{context}");
        assert!(report.compressed_clusters > report.allocated_clusters / 3, "{context}: {report:?}");
        let raw = dir.path().join("model");
        fs::write(&raw, &model).unwrap();
        run("qemu-img", &["compare", text, raw.to_str().unwrap()]);
    }
}

#[test]
fn packed_data_shares_host_clusters() {
    let path = tempfile::tempdir().unwrap().path().join("small.qcow2");
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    create_file(&path, &CreateOptions::new(8 << 20)).unwrap();
    let world = World::open(fs::read(&path).unwrap(), None, false).unwrap();
    let before = world.bytes().len();
    for number in 0..128 {
        let cluster = [number as u8; 65536];
        block_on(world.node.write_compressed(&world.children, number << 16, &cluster)).unwrap();
    }
    world.close().unwrap();
    let grown = world.bytes().len() - before;
    assert!(grown < 3 << 16, "8 MiB took {grown} bytes: an L2 table, and one or two clusters of packed data");
    let (report, _) = check(world.bytes(), Repair::Nothing);
    assert_eq!((report.verdict(), report.compressed_clusters), (Verdict::Clean, 128));
    fs::remove_dir_all(path.parent().unwrap()).unwrap();
}

#[test]
fn what_is_no_cluster_is_not_compressed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    create_file(&path, &CreateOptions::new(100_352)).unwrap();
    let world = World::open(fs::read(&path).unwrap(), None, false).unwrap();
    let write = |offset, length| {
        block_on(world.node.write_compressed(&world.children, offset, &vec![1; length])).map_err(|e| e.kind())
    };
    for (offset, length) in [(512, 65536), (0, 4096), (0, 0), (65536, 65536), (131_072, 512), (u64::MAX, 9)] {
        assert_eq!(write(offset, length), Err(Kind::Invalid), "{length} at {offset}");
    }
    write(65536, 100_352 - 65536).unwrap();
    assert_eq!(world.read(100_000, 352).unwrap(), [1; 352]);
}

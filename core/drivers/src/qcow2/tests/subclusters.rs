//! Images with extended L2 entries: what is allocated, subcluster by subcluster.

use super::harness::*;
use crate::qcow2::{CreateOptions, Preallocation, create_file};
use driveline_op::{flag, op, status};
use futures::executor::block_on;
use std::{fs, path::Path};

/// Extents as they are told by us: where each begins, its length, its depth in the chain (none: nowhere), zero or not.
fn ours(world: &World) -> Vec<(u64, u64, Option<u32>, bool)> {
    let mut out: Vec<(u64, u64, Option<u32>, bool)> = Vec::new();
    let mut at = 0;
    while at < world.size() {
        let found = world.status(at, world.size() - at).unwrap();
        let this = (found.depth.checked_sub(1), found.flags & status::ZERO != 0);
        match out.last_mut() {
            Some(last) if (last.2, last.3) == this => last.1 += found.length,
            _ => out.push((at, found.length, this.0, this.1)),
        }
        at += found.length;
    }
    out
}

/// The same as QEMU tells it.
fn theirs(path: &Path) -> Vec<(u64, u64, Option<u32>, bool)> {
    let map = run("qemu-img", &["map", "--output=json", path.to_str().unwrap()]);
    let map: Vec<serde_json::Value> = serde_json::from_str(&map).unwrap();
    let mut out: Vec<(u64, u64, Option<u32>, bool)> = Vec::new();
    for extent in map {
        let number = |key: &str| extent[key].as_u64().unwrap();
        let depth = (extent["present"] == true).then(|| number("depth") as u32);
        let this = (depth, extent["zero"] == true);
        match out.last_mut() {
            Some(last) if (last.2, last.3) == this => last.1 += number("length"),
            _ => out.push((number("start"), number("length"), this.0, this.1)),
        }
    }
    out
}

#[test]
fn each_subcluster_is_allocated_zeroed_and_given_up_by_itself() {
    if !have("qemu-img") || !have("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (base, path) = (dir.path().join("base.qcow2"), dir.path().join("top.qcow2"));
    let base_text = base.to_str().unwrap();
    run("qemu-img", &["create", "-f", "qcow2", base_text, "1M"]);
    qemu_io(&base, &["write -P 1 0 1M".into()]);
    let below = World::open(fs::read(&base).unwrap(), None, true).unwrap();
    let options = CreateOptions {
        extended_l2: true,
        backing: Some((base_text.into(), "qcow2".into())),
        ..CreateOptions::new(1 << 20)
    };
    create_file(&path, &options).unwrap();
    let world = World::open(fs::read(&path).unwrap(), Some(&below), false).unwrap();
    let empty = world.bytes().len();
    let write = |at: u64, length: usize| {
        let data = vec![7; length];
        block_on(world.ask(op::WRITE, at, 0, 0, data[..].into())).result.unwrap();
    };
    // Subclusters of 2 KiB: the third is touched, and then some across a cluster's end.
    write(5000, 100);
    assert_eq!(world.status(4096, 2048).unwrap().depth, 1);
    assert_eq!((world.status(0, 4096).unwrap().depth, world.status(6144, 2048).unwrap().depth), (2, 2));
    write(64 * 1024 - 3000, 6000);
    world.plain(op::WRITE_ZEROES, 20 * 1024, 10 * 1024, 0).unwrap();
    world.plain(op::WRITE_ZEROES, 300 * 1024, 4096, flag::MAY_UNMAP).unwrap();
    world.plain(op::DISCARD, 64 * 1024, 2048, 0).unwrap();
    world.plain(op::WRITE_ZEROES, 200 * 1024 + 100, 1000, 0).unwrap();
    world.close().unwrap();
    assert!(world.bytes().len() - empty <= 5 << 16, "an L2 table, and three clusters");
    fs::write(&path, world.bytes()).unwrap();
    run("qemu-img", &["check", path.to_str().unwrap()]);
    assert_eq!(ours(&world), theirs(&path));
    let raw = dir.path().join("raw");
    run("qemu-img", &["convert", "-O", "raw", path.to_str().unwrap(), raw.to_str().unwrap()]);
    assert!(fs::read(&raw).unwrap() == world.contents());
}

#[test]
fn images_with_subclusters_are_made_as_qemu_understands_them() {
    if !have("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (number, preallocation) in [Preallocation::Off, Preallocation::Metadata].into_iter().enumerate() {
        let path = dir.path().join(format!("{number}.qcow2"));
        let options = CreateOptions {
            extended_l2: true,
            cluster_bytes: 16 << 10,
            preallocation,
            ..CreateOptions::new(40_000_000 / 512 * 512)
        };
        create_file(&path, &options).unwrap();
        let text = path.to_str().unwrap();
        run("qemu-img", &["check", text]);
        let info = run("qemu-img", &["info", "--output=json", text]);
        assert!(info.contains("\"extended-l2\": true"), "{info}");
        let world = World::open(fs::read(&path).unwrap(), None, false).unwrap();
        let before = world.bytes().len();
        block_on(world.ask(op::WRITE, 9_999_999, 0, 0, pattern(1, 70_000)[..].into())).result.unwrap();
        world.close().unwrap();
        if preallocation == Preallocation::Metadata {
            assert_eq!(world.bytes().len(), before, "room was there");
        }
        fs::write(&path, world.bytes()).unwrap();
        run("qemu-img", &["check", text]);
    }
    for (cluster_bytes, version) in [(8 << 10, 3), (16 << 10, 2)] {
        let options = CreateOptions { extended_l2: true, cluster_bytes, version, ..CreateOptions::new(512) };
        let error = create_file(&dir.path().join("no"), &options).unwrap_err();
        assert_eq!(error.option(), Some("extended-l2"), "{error}");
    }
}

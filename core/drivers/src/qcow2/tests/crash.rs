//! A crash at any time leaves at worst clusters that are counted and not used, and keeps what was flushed.

use super::{harness::*, random::packed};
use driveline_op::{Buffer, flag, op};
use futures::{executor::block_on, future::join_all};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{fs, ops::Range, path::Path};

const SECTOR: usize = 512;

/// A flush that completed: how much was recorded then, and what the guest saw.
struct Stable {
    at: usize,
    contents: Vec<u8>,
}

/// An operation: how much was recorded when it began, and what it may change.
struct Begun {
    at: usize,
    range: Range<usize>,
}

/// The file after a crash before event `cut`: all that was durable, and of the rest any sectors.
pub(crate) fn crashed(before: &[u8], log: &[Event], cut: usize, random: &mut StdRng) -> Vec<u8> {
    let durable =
        log[..cut].iter().filter_map(|e| if let Event::Flush(n) = e { Some(*n) } else { None }).max();
    let durable = durable.unwrap_or(0);
    let chance = [0.0, 0.1, 0.5, 0.9, 1.0][random.random_range(0..5)];
    let mut file = before.to_vec();
    for (i, event) in log[..cut].iter().enumerate() {
        let Event::Write(offset, bytes) = event else { continue };
        let mut at = 0;
        while at < bytes.len() {
            let start = *offset as usize + at;
            let length = (SECTOR - start % SECTOR).min(bytes.len() - at);
            if i < durable || random.random_bool(chance) {
                if file.len() < start + length {
                    file.resize(start + length, 0);
                }
                file[start..start + length].copy_from_slice(&bytes[at..at + length]);
            }
            at += length;
        }
    }
    file
}

/// `qemu-img check` finds nothing, or leaks only.
pub(super) fn at_worst_leaks(path: &Path, context: &str) {
    let out = output("qemu-img", &["check", "-f", "qcow2", path.to_str().unwrap()]);
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(
        matches!(out.status.code(), Some(0 | 3)),
        "{context}: {:?}\n{text}{}",
        out.status,
        String::from_utf8_lossy(&out.stderr)
    );
}

fn work(world: &World, model: &mut [u8], random: &mut StdRng, begun: &mut Vec<Begun>) {
    let size = model.len();
    let mut asks = Vec::new();
    let mut at = random.random_range(0..size);
    for _ in 0..random.random_range(1..5) {
        let length_max = [600, 9000, 150_000][random.random_range(0..3)];
        let length = random.random_range(1..=length_max.min(size - at).max(1));
        if at + length > size {
            break;
        }
        let range = at..at + length;
        begun.push(Begun { at: world.leaf.driver.log_len(), range: range.clone() });
        let (start, length) = (at as u64, length as u64);
        let flags = if random.random() { flag::MAY_UNMAP } else { 0 };
        match random.random_range(0..7) {
            0..=3 => {
                let data = pattern(random.random(), length as usize);
                model[range].copy_from_slice(&data);
                asks.push((op::WRITE, start, length, 0, Buffer::from(&data[..])));
            }
            4..=5 => {
                model[range].fill(0);
                asks.push((op::WRITE_ZEROES, start, length, flags, Buffer::default()));
            }
            _ => asks.push((op::DISCARD, start, length, 0, Buffer::default())),
        }
        at = (at + length as usize + random.random_range(0..20_000)).min(size - 1);
    }
    let discards: Vec<_> = asks.iter().filter(|a| a.0 == op::DISCARD).map(|a| (a.1, a.2)).collect();
    for answer in block_on(join_all(asks.into_iter().map(|a| world.ask(a.0, a.1, a.2, a.3, a.4)))) {
        answer.result.unwrap();
    }
    if random.random_bool(0.3) {
        let at = world.leaf.driver.log_len();
        let range = packed(world, random);
        let range = range.start as usize..range.end as usize;
        model[range.clone()].fill((range.start >> 9) as u8);
        begun.push(Begun { at, range });
    }
    for (at, length) in discards {
        model[at as usize..(at + length) as usize].copy_from_slice(&world.read(at, length as usize).unwrap());
    }
}

fn crashes(seed: u64, options: &str, snapshot: bool, points: usize) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    let path_text = path.to_str().unwrap();
    let mut random = StdRng::seed_from_u64(seed);
    run("qemu-img", &["create", "-f", "qcow2", "-o", options, path_text, "2000k"]);
    qemu_io(&path, &["write -P 1 0 300k".into(), "write -P 2 1000k 100k".into()]);
    if snapshot {
        run("qemu-img", &["snapshot", "-c", "s", path_text]);
    }
    let before = fs::read(&path).unwrap();
    let world =
        World::open_with(before.clone(), None, false, serde_json::json!({ "cache-size": "128KiB" })).unwrap();
    let mut model = world.contents();
    *world.leaf.driver.log.lock() = Some(Vec::new());
    let mut stable = vec![Stable { at: 0, contents: model.clone() }];
    let mut begun = Vec::new();
    for _ in 0..60 {
        work(&world, &mut model, &mut random, &mut begun);
        if random.random_bool(0.3) {
            world.flush().unwrap();
            stable.push(Stable { at: world.leaf.driver.log_len(), contents: model.clone() });
        }
    }
    world.close().unwrap();
    let log = world.leaf.driver.log.lock().take().unwrap();
    for point in 0..points {
        let cut = random.random_range(0..=log.len());
        let context =
            format!("seed {seed}, {options}, snapshot {snapshot}, point {point}, before event {cut}");
        let file = crashed(&before, &log, cut, &mut random);
        fs::write(&path, &file).unwrap();
        at_worst_leaks(&path, &context);
        let mut after = World::open(file, None, false).unwrap();
        let kept = stable.iter().rev().find(|stable| stable.at <= cut).unwrap();
        let mut compare = vec![true; model.len()];
        for op in begun.iter().filter(|op| op.at >= kept.at && op.at <= cut) {
            compare[op.range.clone()].fill(false);
        }
        let found = after.contents();
        let lost = (0..model.len()).step_by(SECTOR).find(|&start| {
            let end = (start + SECTOR).min(model.len());
            found[start..end] != kept.contents[start..end]
                && (start..end).any(|i| compare[i] && found[i] != kept.contents[i])
        });
        assert_eq!(lost, None, "in this sector a byte is lost that was flushed: {context}");
        if point % 8 == 0 {
            let mut model = found;
            for _ in 0..10 {
                work(&after, &mut model, &mut random, &mut Vec::new());
            }
            after.close().unwrap();
            fs::write(&path, after.bytes()).unwrap();
            at_worst_leaks(&path, &context);
            after = World::open(after.bytes(), None, true).unwrap();
            assert!(after.contents() == model, "{context}");
        }
    }
}

#[test]
fn a_crash_at_any_time_leaves_at_worst_leaks() {
    if !have("qemu-img") || !have("qemu-io") {
        return;
    }
    for seed in seeds() {
        for (options, snapshot) in [
            ("compat=0.10,cluster_size=512", false),
            ("compat=1.1,cluster_size=512,refcount_bits=64", true),
            ("compat=1.1,cluster_size=4096,refcount_bits=16", true),
            ("compat=1.1,cluster_size=65536,refcount_bits=1", false),
            ("compat=1.1,cluster_size=16384,extended_l2=on", true),
        ] {
            crashes(seed, options, snapshot, 20);
        }
    }
}

#[test]
fn a_crash_while_an_image_is_resized_or_emptied_leaves_at_worst_leaks() {
    if !have("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    for seed in seeds() {
        for (options, snapshot) in [
            ("compat=1.1,cluster_size=512,refcount_bits=64", false),
            ("compat=1.1,cluster_size=4096", true),
            ("compat=0.10,cluster_size=1024", false),
            ("compat=1.1,cluster_size=16384,extended_l2=on", true),
        ] {
            let mut random = StdRng::seed_from_u64(seed);
            let path_text = path.to_str().unwrap();
            run("qemu-img", &["create", "-f", "qcow2", "-o", options, path_text, "1000k"]);
            qemu_io(&path, &["write -P 1 0 900k".into()]);
            if snapshot {
                run("qemu-img", &["snapshot", "-c", "s", path_text]);
            }
            let before = fs::read(&path).unwrap();
            let world = World::open(before.clone(), None, false).unwrap();
            *world.leaf.driver.log.lock() = Some(Vec::new());
            for size in [3000, 400, 20_000, 600, 9000] {
                block_on(world.node.resize(&world.children, size << 10)).unwrap();
                let mut model = world.contents();
                work(&world, &mut model, &mut random, &mut Vec::new());
                if random.random_bool(0.3) {
                    block_on(world.node.make_empty(&world.children)).unwrap();
                }
                work(&world, &mut model, &mut random, &mut Vec::new());
            }
            block_on(world.node.set_backing_file(&world.children, Some(("", "raw")))).unwrap();
            world.close().unwrap();
            let log = world.leaf.driver.log.lock().take().unwrap();
            for point in 0..30 {
                let cut = random.random_range(0..=log.len());
                let context =
                    format!("seed {seed}, {options}, snapshot {snapshot}, point {point}, before event {cut}");
                let file = crashed(&before, &log, cut, &mut random);
                fs::write(&path, &file).unwrap();
                at_worst_leaks(&path, &context);
                World::open(file, None, false).unwrap().contents();
            }
        }
    }
}

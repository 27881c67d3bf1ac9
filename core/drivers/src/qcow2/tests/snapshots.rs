//! Internal snapshots that we take, apply and delete, as QEMU sees them.

use super::{check::check, crash::crashed, harness::*};
use crate::qcow2::{CreateOptions, Repair, Verdict, create_file};
use driveline_graph::Kind;
use driveline_op::{flag, op};
use futures::executor::block_on;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{fs, path::Path, sync::atomic::Ordering::Relaxed};

fn write(world: &World, offset: u64, data: &[u8]) {
    block_on(world.ask(op::WRITE, offset, 0, 0, data.into())).result.unwrap();
}

fn take(world: &World, name: &str) -> driveline_graph::Result<String> {
    block_on(world.node.take_snapshot(&world.children, name))
}

fn apply(world: &World, name: &str) -> driveline_graph::Result<()> {
    block_on(world.node.apply_snapshot(&world.children, name))
}

fn delete(world: &World, name: &str) -> driveline_graph::Result<()> {
    block_on(world.node.delete_snapshot(&world.children, name))
}

fn names(world: &World) -> Vec<String> {
    world.node.snapshots().into_iter().map(|snapshot| snapshot.name).collect()
}

/// Some work of a guest.
fn work(world: &World, model: &mut [u8], random: &mut StdRng) {
    for _ in 0..random.random_range(1..8) {
        let start = random.random_range(0..model.len());
        let length = random.random_range(1..=(model.len() - start).min(90_000));
        let range = start..start + length;
        match random.random_range(0..4) {
            0..=1 => {
                model[range.clone()].copy_from_slice(&pattern(random.random(), length));
                write(world, start as u64, &model[range]);
            }
            2 => {
                model[range].fill(0);
                world.plain(op::WRITE_ZEROES, start as u64, length as u64, flag::MAY_UNMAP).unwrap();
            }
            _ => {
                let cluster = world.edge().info().cluster_bytes as usize;
                let start = start / cluster * cluster;
                let range = start..(start + cluster).min(model.len());
                model[range.clone()].fill(9);
                block_on(world.node.write_compressed(&world.children, start as u64, &model[range])).unwrap();
            }
        }
    }
}

const SHAPES: [(u32, u64, u32, bool); 5] = [
    (3, 4096, 16, false),
    (2, 512, 16, false),
    (3, 65536, 64, false),
    (3, 16384, 16, true),
    (3, 1024, 32, false),
];

fn made(path: &Path, shape: (u32, u64, u32, bool)) -> World {
    let (version, cluster_bytes, refcount_bits, extended_l2) = shape;
    let options = CreateOptions {
        version,
        cluster_bytes,
        refcount_bits,
        extended_l2,
        ..CreateOptions::new(1_500 << 10)
    };
    create_file(path, &options).unwrap();
    World::open(fs::read(path).unwrap(), None, false).unwrap()
}

#[test]
fn snapshots_go_back_and_forth_between_us_and_qemu() {
    if !have("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for seed in 0..5 * seeds().end {
        let shape = SHAPES[seed as usize % SHAPES.len()];
        let mut random = StdRng::seed_from_u64(seed);
        let path = dir.path().join(format!("{seed}.qcow2"));
        let text = path.to_str().unwrap();
        let mut world = made(&path, shape);
        let mut model = vec![0; 1_500 << 10];
        let mut kept: Vec<(String, Vec<u8>)> = Vec::new();
        for round in 0..24 {
            let context = format!("seed {seed}, {shape:?}, round {round}");
            work(&world, &mut model, &mut random);
            let ours: bool = random.random();
            if !ours {
                world.close().unwrap();
                fs::write(&path, world.bytes()).unwrap();
            }
            let pick = |random: &mut StdRng, kept: &Vec<_>| random.random_range(0..kept.len());
            match random.random_range(0..3) {
                1 if !kept.is_empty() => {
                    let (name, contents) = &kept[pick(&mut random, &kept)];
                    model.clone_from(contents);
                    if ours {
                        apply(&world, name).unwrap();
                    } else {
                        run("qemu-img", &["snapshot", "-a", name, text]);
                    }
                }
                2 if !kept.is_empty() => {
                    let (name, _) = kept.remove(pick(&mut random, &kept));
                    if ours {
                        delete(&world, &name).unwrap();
                    } else {
                        run("qemu-img", &["snapshot", "-d", &name, text]);
                    }
                }
                _ => {
                    let name = format!("state {round}");
                    if ours {
                        take(&world, &name).unwrap();
                    } else {
                        run("qemu-img", &["snapshot", "-c", &name, text]);
                    }
                    kept.push((name, model.clone()));
                }
            }
            if ours {
                assert!(world.contents() == model, "{context}");
                work(&world, &mut model, &mut random);
                world.close().unwrap();
                fs::write(&path, world.bytes()).unwrap();
            }
            run("qemu-img", &["check", text]);
            let bytes = fs::read(&path).unwrap();
            assert_eq!(check(bytes.clone(), Repair::Nothing).0.verdict(), Verdict::Clean, "{context}");
            world = World::open(bytes, None, false).unwrap();
            assert!(world.contents() == model, "{context}");
            assert_eq!(
                names(&world),
                kept.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>(),
                "{context}"
            );
            let list = run("qemu-img", &["snapshot", "-l", text]);
            assert!(kept.iter().all(|(name, _)| list.contains(name)), "{context}: {list}");
        }
        for (name, contents) in &kept {
            run("qemu-img", &["snapshot", "-a", name, text]);
            let world = World::open(fs::read(&path).unwrap(), None, true).unwrap();
            assert!(world.contents() == *contents, "seed {seed}, {name}");
        }
    }
}

#[test]
fn a_snapshot_knows_the_size_of_its_disk() {
    if !have("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    let world = made(&path, SHAPES[0]);
    write(&world, 5, &[1; 9]);
    assert_eq!(take(&world, "small").unwrap(), "1");
    block_on(world.node.resize(&world.children, 9 << 20)).unwrap();
    write(&world, 8 << 20, &[2; 9]);
    assert_eq!(take(&world, "large").unwrap(), "2");
    apply(&world, "1").unwrap();
    assert_eq!(world.size(), 1_500 << 10);
    apply(&world, "large").unwrap();
    assert_eq!((world.size(), world.read(8 << 20, 9).unwrap()), (9 << 20, vec![2; 9]));
    let found = world.node.snapshots();
    assert_eq!((found[0].size_bytes, found[1].size_bytes), (Some(1_500 << 10), Some(9 << 20)));
    assert!(found[0].date_ns > 1_600_000_000 * 1_000_000_000 && found[0].vm_state_bytes == 0);
    world.close().unwrap();
    fs::write(&path, world.bytes()).unwrap();
    run("qemu-img", &["check", path.to_str().unwrap()]);
}

#[test]
fn what_cannot_be_done_with_snapshots_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let world = made(&dir.path().join("image.qcow2"), (3, 4096, 1, false));
    write(&world, 5, &[1; 9]);
    world.flush().unwrap();
    let before = world.bytes();
    let kind = |result: driveline_graph::Result<()>| result.unwrap_err().kind();
    for (name, expected) in [("", Kind::Invalid), (&*"x".repeat(256), Kind::Invalid), ("a\0b", Kind::Invalid)]
    {
        assert_eq!(kind(take(&world, name).map(drop)), expected);
    }
    let narrow = take(&world, "s").unwrap_err();
    assert!(narrow.kind() == Kind::NotSupported && narrow.to_string().contains("refcounts"), "{narrow}");
    assert_eq!(kind(apply(&world, "s")), Kind::NotFound);
    assert_eq!(kind(delete(&world, "1")), Kind::NotFound);
    assert!(world.bytes() == before);
    let world = made(&dir.path().join("other.qcow2"), SHAPES[0]);
    take(&world, "s").unwrap();
    assert_eq!(kind(take(&world, "s").map(drop)), Kind::Exists);
    block_on(world.node.set_read_only(&world.children, true)).unwrap();
    assert_eq!(kind(delete(&world, "s")), Kind::NotPermitted);
}

#[test]
fn a_crash_leaves_the_snapshots_before_or_after() {
    if !have("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for seed in 0..9 * seeds().end {
        let shape = SHAPES[seed as usize / 3 % SHAPES.len()];
        let mut random = StdRng::seed_from_u64(seed);
        let path = dir.path().join(format!("{seed}.qcow2"));
        let world = made(&path, shape);
        let mut model = vec![0; 1_500 << 10];
        work(&world, &mut model, &mut random);
        take(&world, "first").unwrap();
        let first = model.clone();
        work(&world, &mut model, &mut random);
        take(&world, "second").unwrap();
        work(&world, &mut model, &mut random);
        world.flush().unwrap();
        let before = (world.bytes(), names(&world), model.clone());
        *world.leaf.driver.log.lock() = Some(Vec::new());
        match seed % 3 {
            0 => drop(take(&world, "third").unwrap()),
            1 => apply(&world, "first").unwrap(),
            _ => delete(&world, "first").unwrap(),
        }
        let log = world.leaf.driver.log.lock().take().unwrap();
        let after = (names(&world), if seed % 3 == 1 { first } else { model });
        for _ in 0..12 {
            let cut = random.random_range(0..=log.len());
            let context = format!("seed {seed}, {shape:?}, before event {cut}");
            let mut file = crashed(&before.0, &log, cut, &mut random);
            if shape.0 == 2 {
                file = check(file, Repair::All).1;
            }
            let world = World::open(file, None, false).unwrap();
            let found = (names(&world), world.contents());
            let is = |names: &Vec<String>, contents: &Vec<u8>| found.0 == *names && found.1 == *contents;
            assert!(is(&before.1, &before.2) || is(&after.0, &after.1), "{context}: {:?}", found.0);
            world.close().unwrap();
            fs::write(&path, world.bytes()).unwrap();
            let out = output("qemu-img", &["check", path.to_str().unwrap()]);
            assert!(matches!(out.status.code(), Some(0 | 3)), "{context}: {out:?}");
        }
    }
}

#[test]
fn a_file_that_fails_leaves_the_snapshots_before_or_after() {
    let dir = tempfile::tempdir().unwrap();
    for each in 1..40 {
        let world = made(&dir.path().join(format!("{each}.qcow2")), SHAPES[each % 3]);
        let mut model = vec![0; 1_500 << 10];
        work(&world, &mut model, &mut StdRng::seed_from_u64(each as u64));
        take(&world, "s").unwrap();
        work(&world, &mut model, &mut StdRng::seed_from_u64(100));
        world.flush().unwrap();
        world.leaf.driver.failing.store(each, Relaxed);
        let _ = take(&world, "t");
        let _ = delete(&world, "s");
        world.leaf.driver.failing.store(0, Relaxed);
        assert!(world.contents() == model, "each {each}. fails");
        let _ = world.close();
        let (report, bytes) = check(world.bytes(), Repair::All);
        assert_eq!(report.verdict(), Verdict::Clean, "{report:#?}");
        assert!(World::open(bytes, None, false).unwrap().contents() == model, "each {each}. fails");
    }
}

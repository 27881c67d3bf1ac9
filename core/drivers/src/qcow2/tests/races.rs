//! Requests at the same time.

use super::harness::*;
use crate::qcow2::{CreateOptions, create};
use driveline_op::{Buffer, op};
use futures::{
    executor::block_on,
    future::{join, join_all},
};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
use std::sync::atomic::Ordering::Relaxed;

fn image(options: &CreateOptions) -> World {
    let leaf = leaf(Vec::new());
    block_on(create(&file_child(&leaf, None).edge, options)).unwrap();
    World::on(leaf, None, false, serde_json::json!({ "cache-size": "128KiB" })).unwrap()
}

async fn write(world: &World, offset: u64, data: Vec<u8>) {
    world.ask(op::WRITE, offset, 0, 0, data[..].into()).await.result.unwrap();
}

const CLUSTER: u64 = 65536;

#[test]
fn a_slow_read_never_sees_what_its_cluster_is_used_for_next() {
    let world = image(&CreateOptions::new(64 << 20));
    block_on(async {
        write(&world, 0, vec![1; CLUSTER as usize]).await;
        world.ask(op::FLUSH, 0, 0, 0, Buffer::default()).await.result.unwrap();
        world.leaf.driver.slow.store(200, Relaxed);
        let read = world.ask(op::READ, 0, 0, 0, Buffer::new(CLUSTER as usize));
        let others = async {
            yield_now().await;
            world.leaf.driver.slow.store(0, Relaxed);
            world.ask(op::DISCARD, 0, CLUSTER, 0, Buffer::default()).await.result.unwrap();
            for i in 1..6 {
                world.ask(op::FLUSH, 0, 0, 0, Buffer::default()).await.result.unwrap();
                write(&world, i * CLUSTER, vec![2; CLUSTER as usize]).await;
            }
        };
        let (read, ()) = join(read, others).await;
        assert!(read.buffer.iter().all(|&byte| byte == 1), "it began before the discard");
    });
}

#[test]
fn a_slow_write_never_lands_in_what_its_cluster_is_used_for_next() {
    let world = image(&CreateOptions::new(64 << 20));
    block_on(async {
        write(&world, 0, vec![1; CLUSTER as usize]).await;
        world.ask(op::FLUSH, 0, 0, 0, Buffer::default()).await.result.unwrap();
        world.leaf.driver.slow.store(200, Relaxed);
        let slow = write(&world, 0, vec![3; CLUSTER as usize]);
        let others = async {
            yield_now().await;
            world.leaf.driver.slow.store(0, Relaxed);
            world.ask(op::DISCARD, 0, CLUSTER, 0, Buffer::default()).await.result.unwrap();
            for i in 1..6 {
                world.ask(op::FLUSH, 0, 0, 0, Buffer::default()).await.result.unwrap();
                write(&world, i * CLUSTER, vec![2; CLUSTER as usize]).await;
            }
        };
        join(slow, others).await;
    });
    assert!(world.read(CLUSTER, 5 * CLUSTER as usize).unwrap().iter().all(|&byte| byte == 2));
}

#[test]
fn writes_to_one_new_cluster_allocate_it_once() {
    for cluster_bytes in [512, 4096, 65536] {
        let world = image(&CreateOptions { cluster_bytes, ..CreateOptions::new(8 << 20) });
        let mut random = StdRng::seed_from_u64(cluster_bytes);
        let data = pattern(7, 1 << 20);
        let mut pieces: Vec<_> = data.chunks(700).enumerate().collect();
        pieces.shuffle(&mut random);
        world.leaf.driver.slow.store(3, Relaxed);
        block_on(join_all(pieces.iter().map(|(i, piece)| write(&world, *i as u64 * 700, piece.to_vec()))));
        assert!(world.read(0, data.len()).unwrap() == data);
        world.close().unwrap();
        let clusters = world.bytes().len() as u64 / cluster_bytes;
        assert!(
            clusters < (1 << 20) / cluster_bytes * 11 / 10 + 12,
            "{clusters} clusters of {cluster_bytes}"
        );
    }
}

/// A request that is dropped in the middle leaves an image that works, at worst with leaks.
#[test]
fn requests_may_be_cancelled_anywhere() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    let qemu = have("qemu-img");
    for seed in 0..12 * seeds().end {
        let mut random = StdRng::seed_from_u64(seed);
        let options =
            CreateOptions { cluster_bytes: [512, 4096][seed as usize % 2], ..CreateOptions::new(4 << 20) };
        let world = image(&options);
        world.leaf.driver.slow.store(2, Relaxed);
        for _ in 0..60 {
            let (at, length) = (random.random_range(0..3 << 20), random.random_range(1..200_000));
            let steps = random.random_range(0..60);
            let op =
                [op::WRITE, op::WRITE, op::WRITE_ZEROES, op::DISCARD, op::FLUSH][random.random_range(0..5)];
            let buffer = Buffer::new(if op == op::WRITE { length as usize } else { 0 });
            let mut call = Box::pin(world.ask(op, at, length, 0, buffer));
            block_on(async {
                for _ in 0..steps {
                    if futures::poll!(call.as_mut()).is_ready() {
                        return;
                    }
                }
            });
        }
        let data = pattern(seed, 1 << 20);
        block_on(write(&world, 1 << 20, data.clone()));
        assert!(world.read(1 << 20, data.len()).unwrap() == data, "seed {seed}");
        world.close().unwrap();
        if qemu {
            std::fs::write(&path, world.bytes()).unwrap();
            let out = output("qemu-img", &["check", "-f", "qcow2", path.to_str().unwrap()]);
            assert!(
                matches!(out.status.code(), Some(0 | 3)),
                "seed {seed}: {}",
                String::from_utf8_lossy(&out.stdout)
            );
        }
    }
}

#[test]
fn failures_of_the_file_pass() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    let qemu = have("qemu-img");
    for seed in 0..12 * seeds().end {
        let mut random = StdRng::seed_from_u64(seed);
        let options =
            CreateOptions { cluster_bytes: [512, 4096][seed as usize % 2], ..CreateOptions::new(4 << 20) };
        let world = image(&options);
        let mut failed = 0;
        for _ in 0..60 {
            world.leaf.driver.failing.store(random.random_range(1..30), Relaxed);
            let (at, length) = (random.random_range(0..3 << 20), random.random_range(1..200_000));
            let op =
                [op::WRITE, op::WRITE, op::WRITE_ZEROES, op::DISCARD, op::FLUSH][random.random_range(0..5)];
            let buffer = Buffer::new(if op == op::WRITE { length as usize } else { 0 });
            failed += usize::from(block_on(world.ask(op, at, length, 0, buffer)).result.is_err());
            if random.random_bool(0.1) {
                let size = random.random_range(3 << 11..5 << 11) * 512;
                failed += usize::from(block_on(world.node.resize(&world.children, size)).is_err());
            }
        }
        assert!(failed > 0);
        world.leaf.driver.failing.store(0, Relaxed);
        let data = pattern(seed, 1 << 20);
        block_on(write(&world, 1 << 20, data.clone()));
        world.close().unwrap();
        if qemu {
            std::fs::write(&path, world.bytes()).unwrap();
            let out = output("qemu-img", &["check", "-f", "qcow2", path.to_str().unwrap()]);
            assert!(
                matches!(out.status.code(), Some(0 | 3)),
                "seed {seed}: {}",
                String::from_utf8_lossy(&out.stdout)
            );
        }
        let after = World::open(world.bytes(), None, true).unwrap();
        assert!(after.read(1 << 20, data.len()).unwrap() == data, "seed {seed}");
    }
}

#[test]
fn many_threads_share_an_image() {
    let world = image(&CreateOptions { cluster_bytes: 4096, ..CreateOptions::new(64 << 20) });
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let world = &world;
            scope.spawn(move || {
                let mut random = StdRng::seed_from_u64(thread);
                let base = thread * (16 << 20);
                let mut model = vec![0; 2 << 20];
                for _ in 0..120 {
                    // Far from each other, so that slices of the map come and go.
                    let length = random.random_range(1..30_000);
                    let at = random.random_range(0..model.len() - length);
                    let place = base + at as u64;
                    match random.random_range(0..6) {
                        0..=2 => {
                            let data = pattern(random.random(), length);
                            model[at..at + length].copy_from_slice(&data);
                            block_on(write(world, place, data));
                        }
                        3 => {
                            model[at..at + length].fill(0);
                            world.plain(op::WRITE_ZEROES, place, length as u64, 0).unwrap();
                        }
                        4 => world.flush().unwrap(),
                        _ => assert!(world.read(place, length).unwrap() == model[at..at + length]),
                    }
                }
                assert!(world.read(base, model.len()).unwrap() == model);
            });
        }
    });
    world.close().unwrap();
    let after = World::open(world.bytes(), None, true).unwrap();
    assert!(after.contents() == world.contents());
}

//! Requests at the same time.

use super::harness::*;
use crate::qcow2::{CreateOptions, create};
use driveline_op::{Buffer, flag, op};
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

/// An image of another program maps a cluster behind the end of its file. It was written in place, given up and taken again
/// as one that nobody ever wrote to, so what had been there showed around what was written then.
#[test]
fn a_cluster_behind_the_end_of_the_file_is_not_fresh_once_it_was_written_in_place() {
    let world = image(&CreateOptions::new(64 << 20));
    block_on(write(&world, 0, vec![1; CLUSTER as usize]));
    world.close().unwrap();
    let mut bytes = world.bytes();
    let end = bytes.len() - CLUSTER as usize;
    assert!(bytes[end..].iter().all(|&byte| byte == 1), "its data is the last of the file");
    bytes.truncate(end);
    let world = World::open(bytes, None, false).unwrap();
    block_on(write(&world, 0, vec![2; CLUSTER as usize]));
    assert_eq!(world.bytes().len(), end + CLUSTER as usize, "in place");
    world.plain(op::WRITE_ZEROES, 0, CLUSTER, flag::MAY_UNMAP).unwrap();
    world.plain(op::DISCARD, 0, CLUSTER, 0).unwrap();
    world.flush().unwrap();
    block_on(write(&world, CLUSTER + 512, vec![3; 512]));
    assert_eq!(world.bytes().len(), end + CLUSTER as usize, "the same cluster");
    assert_eq!(world.read(CLUSTER, 512).unwrap(), [0; 512]);
}

async fn write_fua(world: &World, offset: u64, data: &[u8]) {
    world.ask(op::WRITE, offset, 0, flag::FUA, data.into()).await.result.unwrap();
}

/// What the image holds in this range for who opens it after the program was killed just now.
fn after_a_kill(world: &World, offset: u64, length: usize) -> Vec<u8> {
    let look = || World::open(world.bytes(), None, true).unwrap().read(offset, length).unwrap();
    // Not on this thread, which runs the requests.
    std::thread::scope(|scope| scope.spawn(look).join().unwrap())
}

/// A FUA write asked once, at its begin, whether the map was durable. While its first cluster was written another request
/// linked its second one; so that was written in place and answered, and the map never said where it is.
#[test]
fn a_fua_write_is_answered_when_what_others_linked_for_it_is_durable() {
    let world = image(&CreateOptions::new(64 << 20));
    block_on(async {
        write(&world, 0, vec![1; CLUSTER as usize]).await;
        world.ask(op::FLUSH, 0, 0, 0, Buffer::default()).await.result.unwrap();
        let mut other = Box::pin(write(&world, CLUSTER + 8192, vec![2; 4096]));
        assert!(futures::poll!(other.as_mut()).is_pending(), "it took a cluster, and writes there");
        world.leaf.driver.slow.store(1000, Relaxed);
        let mut durable = Box::pin(write_fua(&world, CLUSTER - 4096, &[3; 8192]));
        assert!(futures::poll!(durable.as_mut()).is_pending(), "it writes into the first cluster");
        world.leaf.driver.slow.store(0, Relaxed);
        other.await;
        durable.await;
    });
    assert!(after_a_kill(&world, CLUSTER - 4096, 8192).iter().all(|&byte| byte == 3));
}

/// On the page cache nothing waits, so tests on files never saw requests meet between two steps of one. Here every call waits,
/// each for another time, and each round begins with a durable map, goes over the end of a cluster that is there, and finds
/// others who make the next one.
#[test]
fn what_is_answered_with_fua_survives_a_kill_while_every_call_waits() {
    for seed in 0..6 * seeds().end {
        let cluster_bytes = [4096, 65536][seed as usize % 2];
        let world = image(&CreateOptions { cluster_bytes, ..CreateOptions::new(8 << 20) });
        let mut random = StdRng::seed_from_u64(seed);
        let begin = async |at: u64, fill: u8, durable: bool, order: u64| {
            let mut random = StdRng::seed_from_u64(order);
            for _ in 0..random.random_range(0..10) {
                yield_now().await;
            }
            world.leaf.driver.slow.store(random.random_range(0..20), Relaxed);
            if durable {
                write_fua(&world, at, &[fill; 1024]).await;
                assert!(after_a_kill(&world, at, 1024) == [fill; 1024], "seed {seed}, at {at}");
            } else {
                write(&world, at, vec![fill; 1024]).await;
            }
        };
        for round in 1..60 {
            world.flush().unwrap();
            let end = round * cluster_bytes;
            let mut places = [(end - 512, true), (end + 512, false), (end + 1536, random.random())];
            places.shuffle(&mut random);
            block_on(join_all(places.iter().map(|&(at, fua)| begin(at, round as u8, fua, random.random()))));
        }
        let contents = world.contents();
        world.close().unwrap();
        assert!(World::open(world.bytes(), None, true).unwrap().contents() == contents, "seed {seed}");
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

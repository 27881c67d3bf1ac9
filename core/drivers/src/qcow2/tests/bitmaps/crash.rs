//! A crash or a failure at any time leaves one set of bitmaps or the next, as it was stored.

use super::*;
use crate::qcow2::tests::{
    crash::{at_worst_leaks, crashed},
    harness::Event,
};
use driveline_op::op;
use futures::{FutureExt, future::join_all};
use rand::SeedableRng;
use std::{
    path::PathBuf,
    sync::{Arc, atomic::Ordering::Relaxed},
};

const SIZE: u64 = 3_000_320;

/// A set of bitmaps of a few names, a new one each time.
fn random_set(random: &mut StdRng) -> Vec<Kept> {
    let mut set = Vec::new();
    if random.random_bool(0.25) {
        return set;
    }
    for name in ["a", "b", "a name that is much longer than those of the others"] {
        if random.random_bool(0.7) {
            let granularity = granularity([512, 4096, 65536][random.random_range(0..3)]);
            let bits = random_bits(random, granularity, SIZE);
            set.push(Kept { name: name.to_owned(), recording: random.random(), bits });
        }
    }
    set
}

/// What a crash may leave: the sets that were the image's at some time while an event was not durable.
struct Times {
    /// How much was recorded when a set began to be stored, and when it was.
    sets: Vec<(usize, usize, Vec<Kept>)>,
    /// When data was written, so that no set was valid any more.
    writes: Vec<usize>,
}

impl Times {
    /// Is this what may look valid, if what was recorded before `cut` happened, perhaps?
    fn may_be(&self, found: &[Kept], cut: usize) -> bool {
        let last = self.sets.iter().rposition(|(_, end, _)| *end <= cut).unwrap_or(0);
        let (_, stored, set) = &self.sets[last];
        let stale = self.writes.iter().any(|&write| write >= *stored && write < cut);
        let next = self.sets.get(last + 1).filter(|(begin, _, _)| *begin <= cut);
        set == found && (!stale || set.is_empty()) || next.is_some_and(|(_, _, set)| set == found)
    }
}

/// An image with a backing file and a bitmap, and the backing file.
fn image_of_qemu(dir: &Path, cluster_bytes: u64) -> (PathBuf, PathBuf) {
    let (path, base) = (dir.join("image.qcow2"), dir.join("base.qcow2"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&base), &SIZE.to_string()]);
    let options = format!("cluster_size={cluster_bytes}");
    let backing = ["-b", text(&base), "-F", "qcow2"];
    let create = ["create", "-q", "-f", "qcow2", "-o", &options];
    run("qemu-img", &[&create[..], &backing, &[text(&path)]].concat());
    run("qemu-img", &["bitmap", "--add", text(&path), "of QEMU"]);
    (path, base)
}

fn crashes(seed: u64, cluster_bytes: u64, points: usize) {
    let mut random = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let (path, base) = image_of_qemu(dir.path(), cluster_bytes);
    let world = open_file(&path, false);
    world.write(0, &pattern(0, 1));
    let flagged = world.bytes();
    *world.leaf.driver.log.lock() = Some(Vec::new());
    let log_len = || world.leaf.driver.log_len();
    // The write flagged what was there.
    let mut times = Times { sets: vec![(0, 0, Vec::new())], writes: vec![] };
    for _ in 0..12 {
        if random.random_bool(0.4) {
            let at = random.random_range(0..SIZE - 9000);
            world.write(at, &pattern(at, random.random_range(1..9000)));
            times.writes.push(log_len() - 1);
        }
        let (begin, set) = (log_len(), random_set(&mut random));
        world.store(&set).unwrap();
        times.sets.push((begin, log_len(), set));
    }
    world.close().unwrap();
    let log = world.leaf.driver.log.lock().take().unwrap();
    for point in 0..points {
        let cut = random.random_range(0..=log.len());
        let context = format!("seed {seed}, clusters of {cluster_bytes}, point {point}, before event {cut}");
        let file = crashed(&flagged, &log, cut, &mut random);
        if point % 3 == 0 {
            fs::write(&path, &file).unwrap();
            at_worst_leaks(&path, &context);
        }
        let reader = World::open(file.clone(), None, true).unwrap();
        let list = reader.list();
        assert!(list.unreadable.is_none(), "{context}: {list:?}");
        let backing = Some((text(&base).to_owned(), "qcow2".to_owned()));
        assert_eq!(reader.node.backing_file(), backing, "{context}");
        for bitmap in &list.bitmaps {
            let why = bitmap.inconsistent.as_deref();
            assert!(bitmap.in_use || list.outdated || why.is_none(), "{context}: {bitmap:?}");
        }
        if list.bitmaps.iter().all(|bitmap| bitmap.inconsistent.is_none()) {
            let found = reader.usable();
            assert!(times.may_be(&found, cut), "{context}: {found:?}");
        }
        // Whatever it is, the next set replaces it.
        let writer = World::open(file, None, false).unwrap();
        let set = random_set(&mut random);
        writer.store(&set).unwrap();
        writer.close().unwrap();
        if point % 3 == 0 {
            fs::write(&path, writer.bytes()).unwrap();
            at_worst_leaks(&path, &context);
        }
        assert_eq!(World::open(writer.bytes(), None, true).unwrap().usable(), set, "{context}");
    }
}

#[test]
fn a_crash_leaves_one_set_or_the_next() {
    if !have("qemu-img") {
        return;
    }
    for seed in seeds() {
        for cluster_bytes in [512, 4096, 65536] {
            crashes(seed, cluster_bytes, 90);
        }
    }
}

#[test]
fn a_header_that_is_half_written_is_one_or_the_other() {
    if !have("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // QEMU's header has the names of features, so that of the backing file is not in the first sector.
    let (path, base) = image_of_qemu(dir.path(), 65536);
    let bits = Bits::new(granularity(4096), SIZE);
    let sets = [vec![], vec![kept("a", bits.clone())], vec![kept("a", bits.clone()), kept("b", bits)]];
    for order in [[0, 1, 0], [2, 0, 1]] {
        let world = open_file(&path, false);
        let mut file = world.bytes();
        *world.leaf.driver.log.lock() = Some(Vec::new());
        for i in order {
            world.store(&sets[i]).unwrap();
        }
        for event in world.leaf.driver.log.lock().take().unwrap() {
            let Event::Write(at, bytes) = event else { continue };
            for skipped in 0..if at == 0 { bytes.len().div_ceil(512) } else { 0 } {
                let mut torn = file.clone();
                for (i, sector) in bytes.chunks(512).enumerate().filter(|(i, _)| *i != skipped) {
                    torn[i * 512..i * 512 + sector.len()].copy_from_slice(sector);
                }
                let torn = World::open(torn, None, true).unwrap();
                assert_eq!(torn.node.backing_file(), Some((text(&base).to_owned(), "qcow2".to_owned())));
                assert!(!torn.list().outdated && torn.list().unreadable.is_none());
            }
            file.resize(file.len().max(at as usize + bytes.len()), 0);
            file[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
        }
        assert_eq!(World::open(file, None, true).unwrap().usable(), sets[order[2]]);
    }
}

#[test]
fn a_bitmap_is_flagged_durably_before_the_first_byte_of_data() {
    let bits = Bits::new(granularity(4096), SIZE);
    bits.mark(0..9000);
    let before = image_with(SIZE, 4096, &[kept("a", bits.clone()), kept("b", bits.clone())]);
    let leaf = leaf(before.clone());
    *leaf.driver.log.lock() = Some(Vec::new());
    let world = World::on(leaf, None, false, serde_json::json!({})).unwrap();
    assert_eq!(world.leaf.driver.log_len(), 0, "an open writes nothing");
    world.write(0, &[1; 4096]);
    world.store(&[kept("a", bits.clone())]).unwrap();
    let stored = world.leaf.driver.log_len();
    // Several at once, and none of them overtakes.
    world.leaf.driver.slow.store(3, Relaxed);
    let writes = (0..4).map(|i| world.ask(op::WRITE, i << 18, 0, 0, [2; 4096][..].into()));
    for answer in block_on(join_all(writes)) {
        answer.result.unwrap();
    }
    let log = world.leaf.driver.log.lock().take().unwrap();
    let [Event::Write(_, _), Event::Flush(_), ..] = &log[..] else { panic!("{log:?}") };
    let of = |log: &[Event]| {
        let mut bytes = before.clone();
        for event in log {
            if let Event::Write(at, data) = event {
                bytes.resize(bytes.len().max(*at as usize + data.len()), 0);
                bytes[*at as usize..*at as usize + data.len()].copy_from_slice(data);
            }
        }
        World::open(bytes, None, true).unwrap()
    };
    assert!(of(&log[..1]).usable().is_empty());
    assert_eq!(of(&log[..stored]).usable(), [kept("a", bits)]);
    // The next write of data finds the new set valid: its flags come first, and a flush.
    let [Event::Write(_, _), Event::Flush(_), Event::Write(_, data), ..] = &log[stored..] else {
        panic!("{:?}", &log[stored..]);
    };
    assert!(data.starts_with(&[2; 512]));
    assert!(of(&log[..stored + 1]).usable().is_empty());
}

#[test]
fn a_failure_leaves_one_set_or_the_next_and_the_image_goes_on() {
    if !have("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    let mut random = StdRng::seed_from_u64(3);
    for fail_at in 0..40 {
        let context = format!("failure {fail_at}");
        let (old, new) = (random_set(&mut random), random_set(&mut random));
        let world = World::open(image(SIZE, 4096), None, false).unwrap();
        world.write(0, &[1; 30_000]);
        world.store(&old).unwrap();
        world.leaf.driver.fail_after(fail_at);
        let failed = world.store(&new).is_err();
        world.leaf.driver.fail_after(usize::MAX);
        let expected = if failed { &old } else { &new };
        assert_eq!(world.usable(), *expected, "{context}: in memory");
        let found = World::open(world.bytes(), None, true).unwrap();
        assert!([&old, &new].contains(&&found.usable()), "{context}: in the file");
        if fail_at % 2 == 0 {
            // What was left over is given back, and what is stored next is what counts.
            world.write(50_000, &[2; 5000]);
            world.store(&new).unwrap();
        }
        world.close().unwrap();
        let expected = if fail_at % 2 == 0 { &new } else { expected };
        fs::write(&path, world.bytes()).unwrap();
        check(&path);
        assert_eq!(World::open(world.bytes(), None, true).unwrap().usable(), *expected, "{context}");
    }
}

#[test]
fn storing_may_be_cancelled_anywhere() {
    if !have("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    let mut random = StdRng::seed_from_u64(5);
    let old = random_set(&mut random);
    let new = [kept("new", random_bits(&mut random, granularity(512), SIZE))];
    let before = image_with(SIZE, 512, &old);
    for steps in 0.. {
        let world = World::open(before.clone(), None, false).unwrap();
        world.write(0, &[1; 2000]);
        let set: Vec<_> = new.iter().map(Kept::to_store).collect();
        let mut store = world.node.store_bitmaps(&world.children, &set);
        let done = (0..steps).any(|_| store.as_mut().now_or_never().is_some());
        drop(store);
        // What is in the file, were this a crash, and what goes on.
        let crashed = World::open(world.bytes(), None, true).unwrap();
        let found = crashed.usable();
        assert!(found.is_empty() && !done || found == new, "{steps}: {found:?}");
        world.write(0, &[1; 2000]);
        world.store(&old).unwrap();
        world.close().unwrap();
        fs::write(&path, world.bytes()).unwrap();
        check(&path);
        assert_eq!(World::open(world.bytes(), None, true).unwrap().usable(), old, "{steps}");
        if done {
            assert!(steps > 5, "it waits for writes and flushes, {steps} times");
            return;
        }
    }
}

#[test]
fn an_open_that_fails_leaves_the_bitmaps_as_they_were() {
    let bits = Bits::new(granularity(512), SIZE);
    bits.mark(7000..9000);
    let set: Vec<_> = (0..40).map(|i| kept(&format!("bitmap {i}"), bits.clone())).collect();
    let mut bytes = image_with(SIZE, 4096, &set);
    // An unknown autoclear bit, so that opening writes the header, too.
    bytes[88] = 0x40;
    for fail_at in 0.. {
        let leaf = leaf(bytes.clone());
        leaf.driver.fail_once(fail_at);
        let world = World::on(Arc::clone(&leaf), None, false, serde_json::json!({}));
        if world.is_ok() {
            assert!(fail_at > 1, "it writes the header, and flushes");
            return;
        }
        let found = leaf.driver.data.lock().clone();
        assert_eq!(World::open(found, None, true).unwrap().usable(), set, "failure {fail_at}");
    }
}

#[test]
fn flags_that_may_be_half_written_are_written_again() {
    let bits = Bits::new(granularity(512), SIZE);
    let set: Vec<_> = (0..40).map(|i| kept(&format!("bitmap {i}"), bits.clone())).collect();
    let names: Vec<_> = set.iter().map(|kept| kept.name.as_str()).collect();
    for fail_at in 0..4 {
        let world = World::open(image_with(SIZE, 4096, &set), None, false).unwrap();
        world.leaf.driver.fail_once(fail_at);
        // Three sectors of flags, and a flush.
        says(world.set_in_use(&names, true), "rror");
        world.write(0, &[1]);
        let found = World::open(world.bytes(), None, true).unwrap();
        assert!(found.usable().is_empty(), "failure {fail_at}");
    }
}

impl Leaf {
    /// So many writes and flushes succeed from now on, then all fail.
    fn fail_after(&self, count: usize) {
        self.fail_from.store(self.count().saturating_add(count), Relaxed);
    }

    /// The write or flush after so many fails.
    fn fail_once(&self, after: usize) {
        self.fail_only.store(self.count() + after, Relaxed);
    }
}

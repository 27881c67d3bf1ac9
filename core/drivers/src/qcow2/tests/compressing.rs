//! Writes that ask to be stored compressed, among others that do not.

use super::{check::check, harness::*};
use crate::qcow2::{CreateOptions, Repair, Verdict, create_file};
use driveline_op::{flag, op};
use futures::{executor::block_on, future::join_all};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{fs, ops::Range};

const CLUSTER: usize = 65536;
/// The disk ends inside a cluster.
const SIZE: usize = 40 * CLUSTER + 512;

fn image(name: &str) -> (tempfile::TempDir, World) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    create_file(&path, &CreateOptions::new(SIZE as u64)).unwrap();
    let world = World::open(fs::read(&path).unwrap(), None, false).unwrap();
    (dir, world)
}

async fn write(world: &World, range: Range<usize>, byte: u8, flags: u32) {
    let data = vec![byte; range.len()];
    let answer = world.ask(op::WRITE, range.start as u64, 0, flags, data[..].into()).await;
    answer.result.unwrap_or_else(|error| panic!("{range:?}: {error}"));
}

#[test]
fn whole_clusters_are_compressed_and_the_rest_is_not() {
    let (_dir, world) = image("image");
    block_on(async {
        write(&world, 0..SIZE, 1, flag::COMPRESSED | flag::FUA).await;
        write(&world, 100..CLUSTER + 100, 2, flag::COMPRESSED).await;
        write(&world, 2 * CLUSTER + 512..5 * CLUSTER - 512, 3, flag::COMPRESSED).await;
    });
    let mut model = vec![1; SIZE];
    model[100..CLUSTER + 100].fill(2);
    model[2 * CLUSTER + 512..5 * CLUSTER - 512].fill(3);
    assert!(world.contents() == model);
    world.close().unwrap();
    let (report, _) = check(world.bytes(), Repair::Nothing);
    // Written in part and so no more compressed: 0 and 1, 2 and 4.
    assert_eq!((report.verdict(), report.compressed_clusters), (Verdict::Clean, 41 - 4));
}

#[test]
fn compressed_and_plain_writes_at_the_same_time_lose_nothing() {
    for seed in seeds() {
        println!("seed {seed}");
        let mut random = StdRng::seed_from_u64(seed);
        let (_dir, world) = image("image");
        let mut model = vec![0; SIZE];
        for _ in 0..12 {
            // Stretches of their own, so that the outcome is one; many end inside a cluster that another goes on in.
            let mut cuts: Vec<usize> = (0..9).map(|_| random.random_range(0..SIZE / 512) * 512).collect();
            cuts.extend([0, SIZE]);
            cuts.sort_unstable();
            let stretches: Vec<_> = cuts
                .windows(2)
                .filter(|cut| cut[0] < cut[1])
                .map(|cut| (cut[0]..cut[1], random.random(), random.random_bool(0.6)))
                .collect();
            block_on(join_all(stretches.iter().map(|(range, byte, compressed)| {
                write(&world, range.clone(), *byte, if *compressed { flag::COMPRESSED } else { 0 })
            })));
            for (range, byte, _) in stretches {
                model[range].fill(byte);
            }
            if random.random_bool(0.3) {
                world.flush().unwrap();
            }
            assert!(world.contents() == model, "seed {seed}");
        }
        world.close().unwrap();
        let (report, _) = check(world.bytes(), Repair::Nothing);
        assert_eq!(report.verdict(), Verdict::Clean, "seed {seed}");
    }
}

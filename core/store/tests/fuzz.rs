//! The fuzz target without a fuzzer: mutated files for a while, on the stable compiler.
//!
//! `DRIVELINE_FUZZ_SECONDS` (default 1) says for how long, `DRIVELINE_FUZZ_SEED` repeats a run.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{Duration, Instant};

use driveline_store::fuzz::{run, sample};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Where there is something: near the start of one of the copies, or in the rings.
fn place(bytes: &[u8], random: &mut SmallRng) -> usize {
    let at = match random.random_range(0..4) {
        0 => random.random_range(0..600),
        1 => (128 << 10) + random.random_range(0..600),
        2 => (320 << 10) + random.random_range(0..200 << 10),
        _ => random.random_range(0..bytes.len().max(1)),
    };
    at.min(bytes.len().saturating_sub(1))
}

fn mutate(bytes: &mut Vec<u8>, random: &mut SmallRng) {
    for _ in 0..random.random_range(1..8) {
        let at = place(bytes, random);
        match random.random_range(0..40) {
            0 => bytes.truncate(at),
            1 => bytes.extend((0..random.random_range(0..4000)).map(|_| random.random::<u8>())),
            2..10 if at + 8 <= bytes.len() => {
                let number =
                    [0, 1, 65536, 1 << 20, 1 << 62, u64::MAX / 2, u64::MAX][random.random_range(0..7)];
                bytes[at..at + 8].copy_from_slice(&u64::to_le_bytes(number));
            }
            10..18 if at < bytes.len() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random.random_range(0..5)],
            18..22 => {
                // One copy as it was, the other one made of it.
                let half = 128 << 10;
                if bytes.len() > 2 * half {
                    bytes.copy_within(0..half, half);
                }
            }
            _ if at < bytes.len() => bytes[at] ^= 1 << random.random_range(0..8),
            _ => {}
        }
    }
}

#[test]
fn no_file_breaks_a_store() {
    let seed = setting("DRIVELINE_FUZZ_SEED").unwrap_or_else(|| RandomState::new().build_hasher().finish());
    let duration = Duration::from_secs(setting("DRIVELINE_FUZZ_SECONDS").unwrap_or(1));
    println!("DRIVELINE_FUZZ_SEED={seed}");
    let mut random = SmallRng::seed_from_u64(seed);
    let samples: Vec<_> = (0..6).map(sample).collect();
    let start = Instant::now();
    while start.elapsed() < duration {
        let mut bytes = samples[random.random_range(0..samples.len())].clone();
        mutate(&mut bytes, &mut random);
        run(&bytes);
    }
}

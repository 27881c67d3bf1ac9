//! Damaged images: any bytes in the header and the tables give an error or data, never a panic, a hang or much memory.

use super::harness::*;
use crate::qcow2::fuzz;
use rand::{Rng, SeedableRng, rngs::StdRng};

/// A word that is likely to hurt.
fn nasty(random: &mut StdRng) -> u64 {
    let bit = random.random_range(0..64);
    match random.random_range(0..6) {
        0 => random.random(),
        1 => 1 << bit,
        2 => u64::MAX << bit,
        3 => u64::MAX >> bit,
        4 => (random.random_range(0..40u64) << 9) | (random.random_range(0..4u64) << 62),
        _ => random.random_range(0..1000),
    }
}

#[test]
fn any_damage_is_survived() {
    for seed in 0..400 * seeds().end {
        let mut random = StdRng::seed_from_u64(seed);
        let mut bytes = fuzz::sample(seed);
        for _ in 0..random.random_range(1..6) {
            // Mostly the header and the tables that follow it.
            let area = if random.random_bool(0.5) { 112 } else { bytes.len() };
            let at = random.random_range(0..area - 8);
            let at = if random.random_bool(0.8) { at & !7 } else { at };
            let width = [1, 4, 8][random.random_range(0..3)];
            bytes[at..at + width].copy_from_slice(&nasty(&mut random).to_be_bytes()[8 - width..]);
        }
        if random.random_bool(0.1) {
            bytes.truncate(random.random_range(0..bytes.len()));
        }
        fuzz::run(&bytes);
    }
}

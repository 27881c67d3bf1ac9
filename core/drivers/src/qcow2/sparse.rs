//! Zeroes among data that goes to fresh clusters need not be written: the file reads as zeroes there.
//!
//! A backup copies whole clusters of which a guest has written a few kilobytes; written as they are they cost many times
//! that, in memory and on the disk. The map is the same either way.

use std::ops::Range;

/// Data is looked at in blocks of this size: the unit of allocation of most file systems.
pub(super) const BLOCK_BYTES: u64 = 4096;
/// Fewer zeroes between two runs are written with them: another request costs more.
const GAP_BYTES_MIN: u64 = 16 << 10;

/// What is to be written of so many bytes, `is_zero` telling it of blocks. The last block always is, so that the file is as
/// long as if all of it were written.
pub(super) fn runs(length: u64, is_zero: impl Fn(Range<u64>) -> bool) -> impl Iterator<Item = Range<u64>> {
    let mut next = 0;
    std::iter::from_fn(move || {
        let block = |at: u64| at..length.min(at + BLOCK_BYTES);
        let is_left_out = |block: &Range<u64>| block.end < length && is_zero(block.clone());
        let mut start = next;
        while start < length && is_left_out(&block(start)) {
            start += BLOCK_BYTES;
        }
        let (mut end, mut at) = (start, start);
        while at < length && at - end < GAP_BYTES_MIN {
            let block = block(at);
            at = block.end;
            if !is_left_out(&block) {
                end = at;
            }
        }
        next = at;
        (start < end).then_some(start..end)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn runs_of(data: &[u8]) -> Vec<(u64, u64)> {
        let is_zero =
            |block: Range<u64>| data[block.start as usize..block.end as usize].iter().all(|byte| *byte == 0);
        runs(data.len() as u64, is_zero).map(|run| (run.start, run.end)).collect()
    }

    #[test]
    fn data_is_one_run_and_of_zeroes_the_last_block_is_written() {
        assert_eq!(runs_of(&[1; 65536]), [(0, 65536)]);
        assert_eq!(runs_of(&[0; 65536]), [(61440, 65536)]);
        assert_eq!(runs_of(&[0; 10000]), [(8192, 10000)]);
        assert_eq!(runs_of(&[]), []);
    }

    #[test]
    fn a_short_gap_is_written_and_a_long_one_is_not() {
        let mut data = vec![0; 128 << 10];
        data[5000] = 1;
        data[12300] = 1;
        data[100_000] = 1;
        assert_eq!(runs_of(&data), [(4096, 16384), (98304, 102_400), (126_976, 131_072)]);
    }

    proptest! {
        #[test]
        fn what_is_left_out_is_zeroes(length in 0..200_000usize, marks in prop::collection::vec(any::<usize>(), 0..6)) {
            let mut data = vec![0; length];
            for mark in marks.into_iter().filter(|_| length > 0) {
                data[mark % length] = 7;
            }
            let (mut copy, mut before) = (vec![0; length], None);
            for (start, end) in runs_of(&data) {
                prop_assert!(before.is_none_or(|before: u64| before + GAP_BYTES_MIN <= start));
                before = Some(end);
                let run = start as usize..end as usize;
                copy[run.clone()].copy_from_slice(&data[run]);
            }
            prop_assert_eq!(before.unwrap_or(0), length as u64);
            prop_assert_eq!(copy, data);
        }
    }
}

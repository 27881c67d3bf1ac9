//! Bits against models that are too simple to be wrong.
#![expect(clippy::single_range_in_vec_init, reason = "a list of ranges may hold one")]

use core::ops::Range;

use driveline_bitmap::{Bits, Extent, Granularity, Granule, Grown};
use proptest::prelude::*;

/// One flag a granule.
#[derive(Clone, Debug)]
struct Flags {
    granularity: u64,
    length: u64,
    dirty: Vec<bool>,
}

impl Flags {
    fn new(granularity: u64, length: u64) -> Self {
        Flags { granularity, length, dirty: vec![false; length.div_ceil(granularity) as usize] }
    }

    fn bytes(&self, index: usize) -> Range<u64> {
        let start = index as u64 * self.granularity;
        start..(start + self.granularity).min(self.length)
    }

    fn mark(&mut self, range: Range<u64>) {
        for index in 0..self.dirty.len() {
            let bytes = self.bytes(index);
            self.dirty[index] |= bytes.start.max(range.start) < bytes.end.min(range.end);
        }
    }

    fn clear(&mut self, range: Range<u64>) {
        for index in 0..self.dirty.len() {
            let bytes = self.bytes(index);
            self.dirty[index] &= !(range.start <= bytes.start && bytes.end <= range.end);
        }
    }

    fn merge(&mut self, other: &Flags) {
        for index in (0..other.dirty.len()).filter(|&index| other.dirty[index]) {
            self.mark(other.bytes(index));
        }
    }

    fn resize(&mut self, length: u64, grown: Grown) {
        let before = core::mem::replace(&mut self.length, length);
        self.dirty.resize(length.div_ceil(self.granularity) as usize, false);
        if grown == Grown::Dirty && length > before {
            self.mark(before..length);
        }
    }

    fn extents(&self, range: Range<u64>) -> Vec<Extent> {
        let mut extents: Vec<Extent> = Vec::new();
        for (index, &dirty) in self.dirty.iter().enumerate() {
            let bytes = self.bytes(index);
            let (start, end) = (bytes.start.max(range.start), bytes.end.min(range.end));
            match extents.last_mut() {
                _ if start >= end => {}
                Some(last) if last.dirty == dirty => last.range.end = end,
                _ => extents.push(Extent { range: start..end, dirty }),
            }
        }
        extents
    }
}

fn assert_equal(bits: &Bits, flags: &Flags, window: Range<u64>) {
    assert_eq!(bits.length(), flags.length);
    assert_eq!(bits.granules(), flags.dirty.len() as u64);
    for range in [0..u64::MAX, window.clone()] {
        let expected = flags.extents(range.clone());
        let dirty_bytes: u64 = expected.iter().filter(|e| e.dirty).map(|e| e.range.end - e.range.start).sum();
        assert_eq!(bits.extents(range.clone()).collect::<Vec<_>>(), expected);
        assert_eq!(bits.dirty_bytes_in(range), dirty_bytes);
    }
    let dirty: Vec<_> = flags.extents(0..u64::MAX).into_iter().filter(|e| e.dirty).map(|e| e.range).collect();
    assert_eq!(bits.iter_dirty().collect::<Vec<_>>(), dirty);
    assert_eq!(bits.dirty_granules(), flags.dirty.iter().filter(|&&dirty| dirty).count() as u64);
    assert_eq!(bits.is_clean(), dirty.is_empty());
    let from = window.start;
    let next =
        |wanted| flags.extents(from..u64::MAX).iter().find(|e| e.dirty == wanted).map(|e| e.range.start);
    assert_eq!(bits.next_dirty(from), next(true));
    assert_eq!(bits.next_clean(from), next(false));
    assert_eq!(bits.is_dirty(from), flags.extents(from..from + 1).iter().any(|e| e.dirty));
}

#[derive(Clone, Debug)]
enum Step {
    Mark(Range<u64>),
    Clear(Range<u64>),
    ClearAll,
    Merge { granularity: u32, marks: Vec<Range<u64>> },
    Resize(u64, Grown),
    Word(u64, u64),
    Compact,
    Copy,
}

/// Five leaves of the tree at 512 B; the finer steps of a range are below a granule.
const BYTES_MAX: u64 = 5 * 4096 * 512;

fn ranges() -> impl Strategy<Value = Range<u64>> {
    let near = (0..BYTES_MAX, 0..20_000_u64).prop_map(|(start, length)| start..start + length);
    let far = (0..BYTES_MAX, 0..BYTES_MAX).prop_map(|(start, length)| start..start + length);
    // Whole leaves, so that slots become full and are taken apart again.
    let leaf = (0..5_u64, 1..5_u64).prop_map(|(leaf, leaves)| leaf << 21..(leaf + leaves) << 21);
    prop_oneof![3 => near, 2 => far, 1 => leaf, 1 => Just(0..u64::MAX), 1 => Just(7..7)]
}

fn steps() -> impl Strategy<Value = Step> {
    let grown = prop_oneof![Just(Grown::Dirty), Just(Grown::Clean)];
    prop_oneof![
        6 => ranges().prop_map(Step::Mark),
        4 => ranges().prop_map(Step::Clear),
        1 => Just(Step::ClearAll),
        2 => (9..16_u32, prop::collection::vec(ranges(), 0..4))
            .prop_map(|(granularity, marks)| Step::Merge { granularity, marks }),
        4 => (0..BYTES_MAX, grown).prop_map(|(length, grown)| Step::Resize(length, grown)),
        2 => (0..BYTES_MAX >> 15, prop_oneof![Just(0), Just(u64::MAX), any::<u64>()])
            .prop_map(|(at, word)| Step::Word(at, word)),
        1 => Just(Step::Compact),
        1 => Just(Step::Copy),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, failure_persistence: None, ..Default::default() })]

    #[test]
    fn bits_are_what_a_flag_for_each_granule_would_be(
        shift in 9..16_u32,
        length in 0..BYTES_MAX,
        steps in prop::collection::vec((steps(), ranges()), 1..10),
    ) {
        let mut bits = Bits::new(Granularity::new(1 << shift).unwrap(), length);
        let mut flags = Flags::new(1 << shift, length);
        for (step, window) in steps {
            match step {
                Step::Mark(range) => {
                    bits.mark(range.clone());
                    flags.mark(range);
                }
                Step::Clear(range) => {
                    bits.clear_range(range.clone());
                    flags.clear(range);
                }
                Step::ClearAll => {
                    bits.clear_all();
                    flags.clear(0..u64::MAX);
                }
                Step::Merge { granularity, marks } => {
                    let source = Bits::new(Granularity::new(1 << granularity).unwrap(), bits.length());
                    let mut source_flags = Flags::new(1 << granularity, flags.length);
                    for range in marks {
                        source.mark(range.clone());
                        source_flags.mark(range);
                    }
                    bits.merge_from(&source).unwrap();
                    flags.merge(&source_flags);
                }
                Step::Resize(length, grown) => {
                    bits.resize(length, grown);
                    flags.resize(length, grown);
                }
                Step::Word(at, word) => {
                    bits.mark_word(at, word);
                    for granule in (0..64).filter(|bit| word >> bit & 1 == 1).map(|bit| at * 64 + bit) {
                        flags.mark(granule << shift..(granule + 1) << shift);
                    }
                }
                Step::Compact => bits.compact(),
                Step::Copy => {
                    let copy = bits.clone();
                    prop_assert_eq!(&copy, &bits);
                    bits = copy;
                }
            }
            assert_equal(&bits, &flags, window);
        }
    }
}

/// Disjoint dirty runs of granules, for lengths that no flag array could hold.
#[derive(Clone, Debug, Default)]
struct Runs(Vec<Range<u128>>);

impl Runs {
    fn clear(&mut self, cut: Range<u128>) {
        let parts = self
            .0
            .iter()
            .flat_map(|run| [run.start..run.end.min(cut.start), run.start.max(cut.end)..run.end].into_iter());
        self.0 = parts.filter(|run| run.start < run.end).collect();
    }

    fn mark(&mut self, run: Range<u128>) {
        if run.start < run.end {
            self.clear(run.clone());
            self.0.push(run);
            self.0.sort_by_key(|run| run.start);
        }
    }

    /// In bytes, neighbours joined.
    fn bytes(&self, granularity: u64, length: u64) -> Vec<Range<u64>> {
        let mut joined: Vec<Range<u64>> = Vec::new();
        for run in &self.0 {
            let byte = |granule: u128| (granule * u128::from(granularity)).min(u128::from(length)) as u64;
            match joined.last_mut() {
                Some(last) if last.end == byte(run.start) => last.end = byte(run.end),
                _ => joined.push(byte(run.start)..byte(run.end)),
            }
        }
        joined
    }
}

/// Offsets anywhere, most of them on or beside the edge of some level of the tree.
fn far_offsets() -> impl Strategy<Value = u64> {
    let edges = (0..64_u32, 0..4_u64, -2..3_i64)
        .prop_map(|(shift, times, off)| (times << shift).wrapping_add_signed(off));
    prop_oneof![3 => edges, 1 => any::<u64>(), 1 => (0..5_u64).prop_map(|back| u64::MAX - back)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..Default::default() })]

    #[test]
    fn the_largest_lengths_are_as_exact_as_small_ones(
        shift in prop_oneof![1 => Just(9_u32), 3 => Just(16), 1 => Just(31), 3 => 9..32_u32],
        other_shift in 9..32_u32,
        length in prop_oneof![1 => Just(u64::MAX), 4 => Just(1 << 50), 4 => far_offsets()],
        steps in prop::collection::vec((prop::bool::weighted(0.7), far_offsets(), far_offsets()), 1..8),
    ) {
        let granularity = Granularity::new(1 << shift).unwrap();
        let mut bits = Bits::new(granularity, length);
        let mut runs = Runs::default();
        for (mark, a, b) in steps {
            let range = a.min(b)..a.max(b);
            let (start, end) = (u128::from(range.start), u128::from(range.end.min(length)));
            let bytes = u128::from(granularity.bytes());
            if mark {
                bits.mark(range.clone());
                if start < end {
                    runs.mark(start / bytes..end.div_ceil(bytes));
                }
            } else {
                bits.clear_range(range.clone());
                let whole_end = if range.end >= length { end.div_ceil(bytes) } else { end / bytes };
                if start.div_ceil(bytes) < whole_end {
                    runs.clear(start.div_ceil(bytes)..whole_end);
                }
            }
            let expected = runs.bytes(granularity.bytes(), length);
            prop_assert_eq!(bits.iter_dirty().collect::<Vec<_>>(), expected.clone());
            prop_assert_eq!(bits.dirty_bytes(), expected.iter().map(|run| run.end - run.start).sum::<u64>());
            // At most a top node for each exabyte or so of what is dirty, and a path to each end of a run.
            prop_assert!(bits.allocated_bytes() < 5 << 20, "{} bytes", bits.allocated_bytes());
        }
        bits.compact();
        let expected = runs.bytes(granularity.bytes(), length);
        prop_assert_eq!(bits.iter_dirty().collect::<Vec<_>>(), expected.clone());

        // A merge into another granularity is the same as to mark each dirty run there.
        let other = Granularity::new(1 << other_shift).unwrap();
        let (merged, marked) = (Bits::new(other, length), Bits::new(other, length));
        merged.merge_from(&bits).unwrap();
        expected.into_iter().for_each(|run| marked.mark(run));
        prop_assert_eq!(merged, marked);
    }
}

#[test]
fn extents_cover_a_range_without_a_gap() {
    let bits = Bits::new(Granularity::MIN, 5000);
    bits.mark(600..700);
    bits.mark(4999..u64::MAX);
    let extents: Vec<_> = bits.extents(10..u64::MAX).map(|e| (e.range, e.dirty)).collect();
    assert_eq!(extents, [(10..512, false), (512..1024, true), (1024..4608, false), (4608..5000, true)]);
    assert_eq!(bits.extents(5000..6000).count(), 0);
    assert_eq!(bits.extents(700..701).map(|e| e.range).collect::<Vec<_>>(), [700..701]);
    assert_eq!(bits.bytes_of(Granule(9)), 4608..5000);
}

#[test]
fn a_part_of_a_granule_is_dirty_as_a_whole_and_never_cleared_in_part() {
    let bits = Bits::new(Granularity::new(4096).unwrap(), 10_000);
    bits.mark(5000..5001);
    assert_eq!(bits.iter_dirty().collect::<Vec<_>>(), [4096..8192]);
    bits.clear_range(4097..9999);
    assert_eq!(bits.dirty_bytes(), 4096);
    bits.clear_range(4096..8192);
    assert!(bits.is_clean());
    // The last granule has 1808 bytes, so those are all of it.
    bits.mark(9999..10_000);
    bits.clear_range(8192..10_000);
    assert!(bits.is_clean());
}

#[test]
fn a_shrink_drops_bits_for_good() {
    let bits = Bits::new(Granularity::MIN, 1 << 20);
    bits.mark(0..u64::MAX);
    bits.resize(700, Grown::Clean);
    assert_eq!(bits.dirty_bytes(), 700);
    bits.resize(1 << 20, Grown::Clean);
    assert_eq!(
        bits.iter_dirty().collect::<Vec<_>>(),
        [0..1024],
        "only the granule that was cut is still dirty"
    );
    bits.resize(1 << 30, Grown::Dirty);
    assert_eq!(bits.iter_dirty().collect::<Vec<_>>(), [0..1024, 1 << 20..1 << 30]);
}

#[test]
fn a_merge_of_different_lengths_changes_nothing() {
    let (target, source) = (Bits::new(Granularity::MIN, 4096), Bits::new(Granularity::MIN, 4097));
    source.mark(0..1);
    let error = target.merge_from(&source).unwrap_err().to_string();
    assert!(error.contains("4097") && error.contains("4096"), "{error}");
    assert!(target.is_clean());
}

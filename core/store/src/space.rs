//! Where in the file there is room.

use core::ops::Range;

use crate::header::REST;
use crate::region::ALIGN;

/// Finds room of `bytes` between places that are in use: the first that is large enough.
pub(crate) fn find(mut used: Vec<Range<u64>>, bytes: u64) -> Range<u64> {
    let bytes = bytes.max(1).next_multiple_of(ALIGN);
    used.sort_by_key(|place| place.start);
    let mut start = REST;
    for place in used {
        if place.start >= start + bytes {
            break;
        }
        start = start.max(place.end);
    }
    start..start + bytes
}

/// How many bytes a region needs in addition to `capacity` granules to have room for `granules`.
///
/// At least an eighth of what it has: a drive that grows in small steps does not grow its region in as many.
pub(crate) fn growth(capacity: u64, granules: u64) -> Option<u64> {
    let missing = granules.max(1).checked_sub(capacity).filter(|&missing| missing > 0)?;
    Some((missing.div_ceil(8)).max(capacity / 64).next_multiple_of(ALIGN))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_gap_that_is_large_enough_is_taken() {
        let at = |from: u64, to: u64| REST + from * ALIGN..REST + to * ALIGN;
        assert_eq!(find(vec![], 1), at(0, 1));
        let used = vec![at(5, 9), at(0, 1), at(2, 4)];
        assert_eq!(find(used.clone(), ALIGN), at(1, 2));
        assert_eq!(find(used.clone(), ALIGN + 1), at(9, 11));
        assert_eq!(find(vec![at(2, 4)], 2 * ALIGN), at(0, 2));
    }

    #[test]
    fn a_region_grows_by_an_eighth_or_by_what_is_missing() {
        assert_eq!(growth(0, 0), Some(ALIGN));
        assert_eq!(growth(8 * ALIGN, 8 * ALIGN), None);
        assert_eq!(growth(8 * ALIGN, 8 * ALIGN + 1), Some(ALIGN));
        assert_eq!(growth(128 * ALIGN, 128 * ALIGN + 1), Some(2 * ALIGN));
        assert_eq!(growth(0, 1 << 60), Some(1 << 57));
    }
}

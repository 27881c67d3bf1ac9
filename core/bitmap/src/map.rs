//! Dirty bits as a line of text.

use crate::Bits;

/// From nothing dirty to all dirty.
const SHADES: [char; 6] = ['·', '░', '▒', '▓', '▓', '█'];

/// Draws `bits` as one line of `width` characters, each an equal share of the length, the darker the more of it is dirty.
///
/// `·` is wholly clean and `█` wholly dirty; whatever lies between is shaded, so that a single dirty granule
/// of a large drive is seen.
///
/// ```
/// # use driveline_bitmap::{Bits, Granularity, render_map};
/// let bits = Bits::new(Granularity::new(4096)?, 1 << 20);
/// bits.mark(0..256 << 10);
/// bits.mark(700_000..700_001);
/// assert_eq!(render_map(&bits, 8), "██···░··");
/// # Ok::<(), driveline_bitmap::Error>(())
/// ```
pub fn render_map(bits: &Bits, width: usize) -> String {
    let length = bits.length();
    // Products of a length and a column need more than 64 bits.
    let edge = |column: usize| (u128::from(length) * column as u128 / width as u128) as u64;
    let shade = |column: usize| {
        // Of a drive with fewer bytes than columns, each column shows the byte it falls on.
        let (start, end) = (edge(column), edge(column + 1).max(edge(column).saturating_add(1)).min(length));
        let (dirty, all) = (bits.dirty_bytes_in(start..end), end - start);
        match dirty {
            0 => SHADES[0],
            _ if dirty == all => SHADES[5],
            _ => SHADES[1 + (u128::from(dirty) * 4 / u128::from(all)) as usize],
        }
    };
    (0..width).map(shade).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Granularity, Grown};

    #[test]
    fn a_map_shows_the_least_change_and_has_its_width() {
        let bits = Bits::new(Granularity::MIN, u64::MAX);
        assert_eq!(render_map(&bits, 5), "·····");
        bits.mark(u64::MAX - 1..u64::MAX);
        assert_eq!(render_map(&bits, 5), "····░");
        bits.mark(0..u64::MAX / 2);
        // The middle is not on the edge of a granule, so what is right of it shows a little.
        assert_eq!(render_map(&bits, 4), "██░░");
        assert_eq!(render_map(&bits, 0), "");
    }

    #[test]
    fn a_map_of_less_than_a_byte_a_column_is_drawn_too() {
        let bits = Bits::new(Granularity::MIN, 3);
        bits.mark(0..3);
        assert_eq!(render_map(&bits, 6), "██████");
        bits.resize(0, Grown::Clean);
        assert_eq!(render_map(&bits, 6), "······");
    }
}

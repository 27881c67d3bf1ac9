//! How many bytes one bit stands for.

use core::fmt;
use core::str::FromStr;

use crate::{Error, Result};

/// Bytes per bit: a power of two from 512 B to 2 GiB.
///
/// ```
/// use driveline_bitmap::Granularity;
/// let granularity: Granularity = "64KiB".parse()?;
/// assert_eq!(granularity.bytes(), 65536);
/// assert_eq!(granularity, Granularity::default_for(None));
/// # Ok::<(), driveline_bitmap::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Granularity {
    shift: u8,
}

/// The index of one bit: granule `n` covers the bytes from `n * granularity` up to the next granule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Granule(pub u64);

impl Granularity {
    /// 512 B, a sector.
    pub const MIN: Granularity = Granularity { shift: 9 };
    /// 2 GiB.
    pub const MAX: Granularity = Granularity { shift: 31 };

    /// Takes a number of bytes.
    ///
    /// Errors: [`Error::Granularity`] unless `bytes` is a power of two from 512 B to 2 GiB.
    pub fn new(bytes: u64) -> Result<Self> {
        let fits = bytes.is_power_of_two() && (Self::MIN.bytes()..=Self::MAX.bytes()).contains(&bytes);
        fits.then(|| Granularity { shift: bytes.trailing_zeros() as u8 })
            .ok_or_else(|| Error::Granularity { found: bytes.to_string() })
    }

    /// The granularity for a node: its cluster size within 4 KiB and 64 KiB, or 64 KiB when it has none.
    ///
    /// A finer one would cost memory without sparing copies, as a cluster is allocated as a whole; a
    /// coarser one would make every small write expensive to back up.
    pub fn default_for(cluster_size: Option<u64>) -> Self {
        let bytes = cluster_size.filter(|&bytes| bytes > 0).unwrap_or(64 << 10).clamp(4 << 10, 64 << 10);
        Granularity { shift: bytes.ilog2() as u8 }
    }

    /// Bytes per bit.
    pub const fn bytes(self) -> u64 {
        1 << self.shift
    }

    /// The power: `bytes() == 1 << shift()`.
    pub const fn shift(self) -> u32 {
        self.shift as u32
    }

    /// The granule that holds the byte at `offset`.
    pub const fn granule_of(self, offset: u64) -> Granule {
        Granule(offset >> self.shift)
    }

    /// The first byte of `granule`.
    pub const fn offset_of(self, granule: Granule) -> u64 {
        granule.0 << self.shift
    }
}

impl Default for Granularity {
    fn default() -> Self {
        Granularity::default_for(None)
    }
}

impl fmt::Display for Granularity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (power, unit) = match self.shift {
            30.. => (30, "GiB"),
            20.. => (20, "MiB"),
            10.. => (10, "KiB"),
            _ => (0, "B"),
        };
        write!(f, "{}{unit}", self.bytes() >> power)
    }
}

impl fmt::Debug for Granularity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Granularity {
    type Err = Error;

    /// Reads `512`, `4k`, `64KiB`, `1M`, `2 GiB`: a number and a unit of 1024, in either case.
    fn from_str(text: &str) -> Result<Self> {
        let wrong = || Error::Granularity { found: format!("'{text}'") };
        let digits_end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits_end);
        let power = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kib" => 10,
            "m" | "mib" => 20,
            "g" | "gib" => 30,
            _ => return Err(wrong()),
        };
        let number: u64 = number.parse().map_err(|_| wrong())?;
        let bytes = number.checked_mul(1 << power).ok_or_else(wrong)?;
        Granularity::new(bytes).map_err(|_| wrong())
    }
}

impl TryFrom<u64> for Granularity {
    type Error = Error;

    fn try_from(bytes: u64) -> Result<Self> {
        Granularity::new(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_can_be_read_again() {
        for shift in 9..=31 {
            let granularity = Granularity::new(1 << shift).unwrap();
            assert_eq!(granularity.to_string().parse(), Ok(granularity));
            assert_eq!(granularity.bytes().to_string().parse(), Ok(granularity));
        }
    }

    #[test]
    fn the_default_is_the_cluster_size_within_bounds() {
        let bytes = |cluster| Granularity::default_for(cluster).bytes();
        assert_eq!(bytes(None), 65536);
        assert_eq!(bytes(Some(0)), 65536);
        assert_eq!(bytes(Some(512)), 4096);
        assert_eq!(bytes(Some(16384)), 16384);
        assert_eq!(bytes(Some(2 << 20)), 65536);
    }

    #[test]
    fn a_wrong_one_is_named_with_what_was_expected() {
        for text in ["", "100", "256", "3KiB", "4GiB", "64 apples", "k", "-512", "99999999999999999999g"] {
            let error = text.parse::<Granularity>().unwrap_err().to_string();
            assert!(error.contains(&format!("'{text}'")) && error.contains("512B"), "{error}");
        }
        assert!(Granularity::new(0).is_err() && Granularity::new(1 << 32).is_err());
    }
}

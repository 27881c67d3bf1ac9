//! Types that options of several drivers have.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::{fmt, str::FromStr};

/// A number of bytes: in options an integer, or a string such as `"64KiB"` or `"1 GiB"`.
///
/// Units are `B`, and `KiB`, `MiB`, `GiB`, `TiB`, `PiB`, `EiB`, powers of 1024. `K`, `M`, ... alone mean the same, as
/// they do in QEMU. `KB` and its kin are refused: to some they are powers of 1000.
///
/// ```
/// use driveline_drivers::Bytes;
/// assert_eq!("64KiB".parse(), Ok(Bytes(65536)));
/// assert_eq!("512".parse(), Ok(Bytes(512)));
/// assert!("64KB".parse::<Bytes>().is_err());
/// assert_eq!(Bytes(3 << 30).to_string(), "3GiB");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(pub u64);

const UNITS: [(&str, u32); 7] =
    [("B", 0), ("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40), ("PiB", 50), ("EiB", 60)];

/// Why a text is not a number of bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotBytes(Box<str>);

impl fmt::Display for NotBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "'{}' is not a number of bytes: expected an integer below 2^64, or one with a unit as in \"64KiB\"",
            self.0
        )
    }
}

impl std::error::Error for NotBytes {}

impl FromStr for Bytes {
    type Err = NotBytes;

    fn from_str(text: &str) -> Result<Self, NotBytes> {
        let wrong = || NotBytes(text.into());
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| wrong())?;
        let unit = unit.trim_start_matches(' ');
        let shift = UNITS
            .iter()
            .find(|(name, _)| {
                unit.is_empty() && *name == "B" || *name == unit || name.strip_suffix("iB") == Some(unit)
            })
            .ok_or_else(wrong)?
            .1;
        number.checked_mul(1 << shift).map(Bytes).ok_or_else(wrong)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = if self.0 == 0 { 0 } else { (self.0.trailing_zeros() / 10) as usize };
        let (name, shift) = UNITS[unit.min(6)];
        write!(f, "{}{name}", self.0 >> shift)
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Bytes;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bytes, as 65536 or \"64KiB\"")
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Bytes, E> {
                Ok(Bytes(value))
            }
            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Bytes, E> {
                u64::try_from(value)
                    .map(Bytes)
                    .map_err(|_| E::invalid_value(de::Unexpected::Signed(value), &self))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Bytes, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_to_write_a_size_reads_the_same() {
        for text in ["1048576", "1048576B", "1024KiB", "1MiB", "1M", "1 MiB"] {
            assert_eq!(text.parse(), Ok(Bytes(1 << 20)), "{text}");
        }
        let json: Vec<Bytes> = serde_json::from_str(r#"[65536, "64KiB"]"#).unwrap();
        assert_eq!(json, [Bytes(65536); 2]);
    }

    #[test]
    fn what_is_not_a_size_is_refused_by_name() {
        for text in ["", "KiB", "-1", "1.5GiB", "1KB", "64kib", "16EiB", "18446744073709551616"] {
            let error = text.parse::<Bytes>().unwrap_err();
            assert!(error.to_string().contains(&format!("'{text}'")), "{error}");
        }
        for json in ["-1", "1.5", "true", "null"] {
            assert!(serde_json::from_str::<Bytes>(json).is_err(), "{json}");
        }
    }

    #[test]
    fn what_is_printed_reads_back() {
        for value in [0, 1, 512, 1000, 1024, 3 << 30, u64::MAX, 1 << 63] {
            assert_eq!(Bytes(value).to_string().parse(), Ok(Bytes(value)));
        }
    }
}

//! Options with units.

use serde::{
    Deserialize, Deserializer,
    de::{Error, Visitor},
};
use std::{fmt, ops::Deref, time::Duration};

/// A number of bytes: `4096`, or a text such as `"64KiB"` (also K, M, G, T, P, E, each 1024 times the one before).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Bytes(pub u64);

/// A length of time: a text such as `"250us"`, `"5ms"`, `"1.5s"`, `"2min"` (also ns, h), or `0`.
///
/// A bare number has no unit, so only 0 can be one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Time(pub Duration);

impl Deref for Time {
    type Target = Duration;
    fn deref(&self) -> &Duration {
        &self.0
    }
}

impl From<Time> for Duration {
    fn from(time: Time) -> Self {
        time.0
    }
}

impl From<Bytes> for u64 {
    fn from(bytes: Bytes) -> Self {
        bytes.0
    }
}

/// A text that begins with digits: those, and the unit.
fn split(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    (&text[..end], text[end..].trim_start())
}

impl Bytes {
    fn read(text: &str) -> Option<Self> {
        let (number, unit) = split(text);
        let shift = match unit {
            "" | "B" => 0,
            "K" | "KiB" => 10,
            "M" | "MiB" => 20,
            "G" | "GiB" => 30,
            "T" | "TiB" => 40,
            "P" | "PiB" => 50,
            "E" | "EiB" => 60,
            _ => return None,
        };
        number.parse::<u64>().ok()?.checked_mul(1 << shift).map(Self)
    }
}

impl Time {
    fn read(text: &str) -> Option<Self> {
        let (number, unit) = split(text);
        let unit_ns: u64 = match unit {
            "ns" => 1,
            "us" | "µs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "min" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            "" if number == "0" => 1,
            _ => return None,
        };
        let (whole, part) = number.split_once('.').unwrap_or((number, "0"));
        if part.is_empty() || part.len() > 9 {
            return None;
        }
        let whole_ns = whole.parse::<u64>().ok()?.checked_mul(unit_ns)?;
        let part_ns =
            u128::from(part.parse::<u64>().ok()?) * u128::from(unit_ns) / 10u128.pow(part.len() as u32);
        Some(Self(Duration::from_nanos(whole_ns.checked_add(u64::try_from(part_ns).ok()?)?)))
    }
}

struct BytesVisitor;

impl Visitor<'_> for BytesVisitor {
    type Value = Bytes;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number of bytes, such as 4096 or \"64KiB\"")
    }

    fn visit_u64<E: Error>(self, bytes: u64) -> Result<Bytes, E> {
        Ok(Bytes(bytes))
    }

    fn visit_i64<E: Error>(self, bytes: i64) -> Result<Bytes, E> {
        u64::try_from(bytes)
            .map(Bytes)
            .map_err(|_| E::invalid_value(serde::de::Unexpected::Signed(bytes), &self))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Bytes, E> {
        Bytes::read(text).ok_or_else(|| {
            E::custom(format_args!("'{text}' is not a number of bytes: expected an integer below 2^64, or one with a unit as in \"64KiB\""))
        })
    }
}

struct TimeVisitor;

impl Visitor<'_> for TimeVisitor {
    type Value = Time;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a length of time with its unit, such as \"250us\", \"5ms\" or \"1s\"")
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Time, E> {
        match number {
            0 => Ok(Time::default()),
            _ => Err(E::invalid_value(serde::de::Unexpected::Unsigned(number), &self)),
        }
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Time, E> {
        Time::read(text).ok_or_else(|| {
            E::custom(format_args!(
                "'{text}' is not a length of time: expected a number and its unit, such as \"250us\", \"5ms\" or \"1s\""
            ))
        })
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(BytesVisitor)
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TimeVisitor)
    }
}

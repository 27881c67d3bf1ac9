//! From options to limits, and what a request weighs.

use crate::bucket::Limit;
use driveline_sdk::{
    Bytes, Error, Result, Time, options,
    serde::{
        Deserializer,
        de::{self, Deserialize, IntoDeserializer, Visitor},
    },
};
use std::fmt;

/// The largest rate: above it, the numbers in the buckets lose their last digits.
const RATE_MAX: u64 = 1_000_000_000_000_000;

/// The limits, and the group that they are shared in.
#[options]
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Shares the limits with all nodes that name the same group.
    #[serde(default)]
    pub(crate) group: Option<String>,
    /// An object with limits.
    #[serde(default)]
    pub(crate) throttle_group: Option<String>,
    /// Bytes that count as one operation; larger requests count as several.
    #[serde(default)]
    iops_size: Bytes,

    #[serde(default, alias = "iops")]
    iops_total: u64,
    #[serde(default, alias = "iops-max")]
    iops_total_max: u64,
    #[serde(default, alias = "iops-max-length")]
    iops_total_max_length: Option<Seconds>,
    #[serde(default)]
    iops_read: u64,
    #[serde(default)]
    iops_read_max: u64,
    #[serde(default)]
    iops_read_max_length: Option<Seconds>,
    #[serde(default)]
    iops_write: u64,
    #[serde(default)]
    iops_write_max: u64,
    #[serde(default)]
    iops_write_max_length: Option<Seconds>,

    #[serde(default, alias = "bps")]
    bps_total: Bytes,
    #[serde(default, alias = "bps-max")]
    bps_total_max: Bytes,
    #[serde(default, alias = "bps-max-length")]
    bps_total_max_length: Option<Seconds>,
    #[serde(default)]
    bps_read: Bytes,
    #[serde(default)]
    bps_read_max: Bytes,
    #[serde(default)]
    bps_read_max_length: Option<Seconds>,
    #[serde(default)]
    bps_write: Bytes,
    #[serde(default)]
    bps_write_max: Bytes,
    #[serde(default)]
    bps_write_max_length: Option<Seconds>,
}

/// A length of time, as a text with its unit or, as QEMU has it, a whole number of seconds.
#[derive(Clone, Copy, Debug)]
struct Seconds(f64);

impl<'de> Deserialize<'de> for Seconds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;

        impl Visitor<'_> for Either {
            type Value = Seconds;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a length of time such as \"5s\", or a whole number of seconds")
            }

            fn visit_u64<E: de::Error>(self, seconds: u64) -> Result<Seconds, E> {
                Ok(Seconds(seconds as f64))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Seconds, E> {
                Time::deserialize(text.into_deserializer()).map(|time| Seconds(time.as_secs_f64()))
            }
        }

        deserializer.deserialize_any(Either)
    }
}

/// What kind of request is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Read,
    Write,
}

impl Direction {
    /// A bit for each.
    pub(crate) fn bit(self) -> u8 {
        1 << self as u8
    }
}

/// All limits of a node or group.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Limits {
    /// Operations: in all, reads, writes.
    pub(crate) operations: [Limit; 3],
    /// Bytes: in all, reads, writes.
    pub(crate) bytes: [Limit; 3],
    /// Bytes that count as one operation; 0: every request is one.
    pub(crate) operation_bytes: u64,
}

impl Limits {
    /// Is there anything that a request of that direction might have to wait for?
    pub(crate) fn concern(&self, direction: Direction) -> bool {
        let concerned = [0, 1 + direction as usize];
        concerned.into_iter().any(|at| self.operations[at].rate > 0.0 || self.bytes[at].rate > 0.0)
    }

    /// How many operations a request of so many bytes counts as.
    pub(crate) fn operations_of(&self, length_bytes: u64) -> f64 {
        match self.operation_bytes {
            0 => 1.0,
            unit => (length_bytes as f64 / unit as f64).max(1.0),
        }
    }
}

/// A limit as it is written: `name`, `name-max` and `name-max-length`.
struct Written {
    name: &'static str,
    rate: u64,
    burst_rate: u64,
    burst_length: Option<Seconds>,
}

impl Written {
    fn limit(&self) -> Result<Limit> {
        let &Self { name, rate, burst_rate, burst_length } = self;
        let (max, max_length) = (format!("{name}-max"), format!("{name}-max-length"));
        if rate > RATE_MAX {
            return Err(Error::option(name, format_args!("{rate} is too much, expected at most {RATE_MAX}")));
        }
        if burst_rate > RATE_MAX {
            return Err(Error::option(
                &max,
                format_args!("{burst_rate} is too much, expected at most {RATE_MAX}"),
            ));
        }
        if burst_rate > 0 && rate == 0 {
            return Err(Error::option(&max, format_args!("a burst exceeds a limit, so it needs '{name}'")));
        }
        if burst_rate > 0 && burst_rate < rate {
            return Err(Error::option(
                &max,
                format_args!("a burst is faster than '{name}', expected at least {rate}"),
            ));
        }
        let burst_seconds = match burst_length {
            Some(_) if burst_rate == 0 => {
                return Err(Error::option(&max_length, format_args!("it needs '{max}'")));
            }
            Some(Seconds(seconds)) if seconds <= 0.0 => {
                return Err(Error::option(&max_length, "a burst takes some time, expected more than 0"));
            }
            Some(Seconds(seconds)) => seconds,
            None => 1.0,
        };
        Ok(Limit { rate: rate as f64, burst_rate: burst_rate as f64, burst_seconds })
    }
}

/// The limits in all, of reads and of writes. The first is used, or the others.
fn three(written: [Written; 3]) -> Result<[Limit; 3]> {
    let [total, read, write] = &written;
    for direction in [read, write] {
        if total.rate > 0 && direction.rate > 0 {
            let text = format!("it cannot be used together with '{}'", total.name);
            return Err(Error::option(direction.name, text));
        }
    }
    Ok([total.limit()?, read.limit()?, write.limit()?])
}

impl Options {
    /// The limits, checked. `None`: none are given.
    pub(crate) fn limits(&self) -> Result<Option<Limits>> {
        let operations = three([
            Written {
                name: "iops-total",
                rate: self.iops_total,
                burst_rate: self.iops_total_max,
                burst_length: self.iops_total_max_length,
            },
            Written {
                name: "iops-read",
                rate: self.iops_read,
                burst_rate: self.iops_read_max,
                burst_length: self.iops_read_max_length,
            },
            Written {
                name: "iops-write",
                rate: self.iops_write,
                burst_rate: self.iops_write_max,
                burst_length: self.iops_write_max_length,
            },
        ])?;
        let bytes = three([
            Written {
                name: "bps-total",
                rate: self.bps_total.0,
                burst_rate: self.bps_total_max.0,
                burst_length: self.bps_total_max_length,
            },
            Written {
                name: "bps-read",
                rate: self.bps_read.0,
                burst_rate: self.bps_read_max.0,
                burst_length: self.bps_read_max_length,
            },
            Written {
                name: "bps-write",
                rate: self.bps_write.0,
                burst_rate: self.bps_write_max.0,
                burst_length: self.bps_write_max_length,
            },
        ])?;
        let Bytes(operation_bytes) = self.iops_size;
        if operation_bytes > 0 && operations.iter().all(|limit| limit.rate == 0.0) {
            return Err(Error::option(
                "iops-size",
                "it says what an operation is, so it needs an 'iops-' limit",
            ));
        }
        let any = operations.iter().chain(&bytes).any(|limit| limit.rate > 0.0);
        Ok(any.then_some(Limits { operations, bytes, operation_bytes }))
    }
}

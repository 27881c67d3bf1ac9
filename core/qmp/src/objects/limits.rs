//! Limits of a `throttle-group`, and which of them make sense together.
//! Source: QEMU's qapi/block-core.json, `ThrottleLimits`; the rules and texts are those of its throttling.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// No limit may be larger.
const VALUE_MAX: i64 = 1_000_000_000_000_000;

/// One limit: a rate, and how far and long it may be exceeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Bytes or operations a second; 0 for any number.
    pub average: u64,
    /// The same in bursts; 0 for none beyond what comes by itself.
    pub maximum: u64,
    /// How many seconds a burst may last.
    pub burst_seconds: u64,
}

impl Default for Limit {
    fn default() -> Self {
        Self { average: 0, maximum: 0, burst_seconds: 1 }
    }
}

/// All limits of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ThrottleLimits {
    /// Bytes read and written.
    pub bps_total: Limit,
    /// Bytes read.
    pub bps_read: Limit,
    /// Bytes written.
    pub bps_write: Limit,
    /// Operations.
    pub iops_total: Limit,
    /// Reads.
    pub iops_read: Limit,
    /// Writes.
    pub iops_write: Limit,
    /// One operation for each so many bytes of a request; 0: every request is one.
    pub iops_size: u64,
}

/// For each field: its name with and without `x-`, and what it sets.
macro_rules! limits {
    ($($field:ident $x:ident $name:literal $x_name:literal => $limit:ident $part:ident,)*) => {
        /// The properties of a group, as QOM lists them.
        pub(super) const PROPERTIES: &[(&str, &str)] = &[("limits", "ThrottleLimits"), $(($x_name, "int"),)*];

        /// QAPI's `ThrottleLimits`, as they are given.
        #[derive(Clone, Copy, Default, Serialize, Deserialize)]
        #[serde(deny_unknown_fields, rename_all = "kebab-case")]
        struct Fields {
            $($field: Option<i64>,)*
        }

        /// QAPI's `ThrottleGroupProperties`.
        #[derive(Default, Deserialize)]
        #[serde(deny_unknown_fields, rename_all = "kebab-case")]
        pub(super) struct GivenLimits {
            limits: Option<Fields>,
            $($x: Option<i64>,)*
        }

        impl ThrottleLimits {
            /// These, with what is given in place of what was.
            ///
            /// Errors: the result makes no sense.
            pub(super) fn with(mut self, given: &GivenLimits) -> Result<Self> {
                let fields = given.limits.unwrap_or_default();
                $(if let Some(value) = fields.$field.or(given.$x) {
                    self.$limit.set(Part::$part, value)?;
                })*
                self.check()?;
                Ok(self)
            }

            /// As QOM shows them.
            pub(super) fn properties(&self) -> Map<String, Value> {
                let mut fields = Map::new();
                $(fields.insert($name.to_owned(), self.$limit.part(Part::$part).into());)*
                let mut all: Map<String, Value> =
                    fields.iter().map(|(name, value)| (format!("x-{name}"), value.clone())).collect();
                all.insert("limits".into(), fields.into());
                all
            }
        }
    };
}

limits! {
    iops_total x_iops_total "iops-total" "x-iops-total" => iops_total Average,
    iops_total_max x_iops_total_max "iops-total-max" "x-iops-total-max" => iops_total Maximum,
    iops_total_max_length x_iops_total_max_length "iops-total-max-length" "x-iops-total-max-length" => iops_total Burst,
    iops_read x_iops_read "iops-read" "x-iops-read" => iops_read Average,
    iops_read_max x_iops_read_max "iops-read-max" "x-iops-read-max" => iops_read Maximum,
    iops_read_max_length x_iops_read_max_length "iops-read-max-length" "x-iops-read-max-length" => iops_read Burst,
    iops_write x_iops_write "iops-write" "x-iops-write" => iops_write Average,
    iops_write_max x_iops_write_max "iops-write-max" "x-iops-write-max" => iops_write Maximum,
    iops_write_max_length x_iops_write_max_length "iops-write-max-length" "x-iops-write-max-length" => iops_write Burst,
    bps_total x_bps_total "bps-total" "x-bps-total" => bps_total Average,
    bps_total_max x_bps_total_max "bps-total-max" "x-bps-total-max" => bps_total Maximum,
    bps_total_max_length x_bps_total_max_length "bps-total-max-length" "x-bps-total-max-length" => bps_total Burst,
    bps_read x_bps_read "bps-read" "x-bps-read" => bps_read Average,
    bps_read_max x_bps_read_max "bps-read-max" "x-bps-read-max" => bps_read Maximum,
    bps_read_max_length x_bps_read_max_length "bps-read-max-length" "x-bps-read-max-length" => bps_read Burst,
    bps_write x_bps_write "bps-write" "x-bps-write" => bps_write Average,
    bps_write_max x_bps_write_max "bps-write-max" "x-bps-write-max" => bps_write Maximum,
    bps_write_max_length x_bps_write_max_length "bps-write-max-length" "x-bps-write-max-length" => bps_write Burst,
    iops_size x_iops_size "iops-size" "x-iops-size" => iops_size Average,
}

#[derive(Clone, Copy)]
enum Part {
    Average,
    Maximum,
    Burst,
}

/// What has parts that are set one by one.
trait Parts {
    fn field(&mut self, part: Part) -> &mut u64;
    fn part(self, part: Part) -> u64;

    fn set(&mut self, part: Part, value: i64) -> Result<()> {
        let outside = || Error::generic(format_args!("bps/iops/max values must be within [0, {VALUE_MAX}]"));
        let value = u64::try_from(value).map_err(|_| outside())?;
        if value > VALUE_MAX as u64 {
            return Err(outside());
        }
        *self.field(part) = value;
        Ok(())
    }
}

impl Parts for Limit {
    fn field(&mut self, part: Part) -> &mut u64 {
        match part {
            Part::Average => &mut self.average,
            Part::Maximum => &mut self.maximum,
            Part::Burst => &mut self.burst_seconds,
        }
    }

    fn part(mut self, part: Part) -> u64 {
        *self.field(part)
    }
}

impl Parts for u64 {
    fn field(&mut self, _: Part) -> &mut u64 {
        self
    }

    fn part(self, _: Part) -> u64 {
        self
    }
}

impl ThrottleLimits {
    fn check(&self) -> Result<()> {
        for [total, read, write] in [
            [self.bps_total, self.bps_read, self.bps_write],
            [self.iops_total, self.iops_read, self.iops_write],
        ] {
            let both = |of: fn(&Limit) -> u64| of(&total) > 0 && (of(&read) > 0 || of(&write) > 0);
            if both(|limit| limit.average) || both(|limit| limit.maximum) {
                return Err(Error::generic(
                    "bps/iops/max total values and read/write values cannot be used at the same time",
                ));
            }
        }
        let iops = [self.iops_total, self.iops_read, self.iops_write];
        if self.iops_size > 0 && iops.iter().all(|limit| limit.average == 0) {
            return Err(Error::generic("iops size requires an iops value to be set"));
        }
        let bps = [self.bps_total, self.bps_read, self.bps_write];
        bps.iter().chain(&iops).try_for_each(Limit::check)
    }
}

impl Limit {
    fn check(&self) -> Result<()> {
        let Self { average, maximum, burst_seconds } = *self;
        let text = if burst_seconds == 0 {
            "the burst length cannot be 0"
        } else if burst_seconds > 1 && maximum == 0 {
            "burst length set without burst rate"
        } else if maximum > 0 && burst_seconds > VALUE_MAX as u64 / maximum {
            "burst length too high for this burst rate"
        } else if maximum > 0 && average == 0 {
            "bps_max/iops_max require corresponding bps/iops values"
        } else if maximum > 0 && maximum < average {
            "bps_max/iops_max cannot be lower than bps/iops"
        } else {
            return Ok(());
        };
        Err(Error::generic(text))
    }
}

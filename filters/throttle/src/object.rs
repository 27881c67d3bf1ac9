//! Groups that are objects: made, changed and ended by somebody outside, and named by nodes in `throttle-group`.
//!
//! The properties are QEMU's: `limits` with all of them, and each alone as `x-NAME`, which can be given only at the beginning.
//! What is refused is refused in QEMU's words, because its clients show them.

use crate::{
    bucket::Limit,
    group::{Group, Member},
    limits::Limits,
};
use driveline_sdk::{
    Error, ObjectCall, Result,
    serde_json::{Map, Value, json},
};
use std::{
    collections::BTreeMap,
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError},
};

static OBJECTS: LazyLock<Mutex<BTreeMap<String, Arc<Group>>>> = LazyLock::new(Mutex::default);

fn objects() -> MutexGuard<'static, BTreeMap<String, Arc<Group>>> {
    OBJECTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The largest value of a limit. Source: QEMU include/qemu/throttle.h, `THROTTLE_VALUE_MAX`.
const VALUE_MAX: i64 = 1_000_000_000_000_000;

/// In all, reads, writes.
const DIRECTIONS: [&str; 3] = ["total", "read", "write"];

/// Makes a node a member of a group that is an object.
pub(crate) fn join(name: &str) -> Result<Member> {
    let group = objects().get(name).cloned();
    let text = format_args!("Throttle group '{name}' does not exist");
    group.map(Member::join_object).ok_or_else(|| Error::option("throttle-group", text))
}

/// See [`driveline_sdk::Filter::object`].
pub(crate) fn call(name: &str, call: ObjectCall) -> Result<Value> {
    let missing = || Error::new(2, format_args!("there is no throttle group '{name}'"));
    match call {
        ObjectCall::Check(properties) => read(&properties, Values::default(), true).map(|_| Value::Null),
        ObjectCall::Create(properties) => {
            let limits = read(&properties, Values::default(), true)?;
            let mut objects = objects();
            if objects.contains_key(name) {
                return Err(Error::new(17, format_args!("there is a throttle group '{name}' already")));
            }
            let group = Arc::<Group>::default();
            group.change_limits(limits.clone());
            objects.insert(name.to_owned(), group);
            Ok(tell(&limits))
        }
        ObjectCall::Set(properties) => {
            let group = objects().get(name).cloned().ok_or_else(missing)?;
            let limits = read(&properties, Values::of(&group.limits()), false)?;
            group.change_limits(limits.clone());
            Ok(tell(&limits))
        }
        ObjectCall::Get => objects().get(name).map(|group| tell(&group.limits())).ok_or_else(missing),
        ObjectCall::Delete => {
            let mut objects = objects();
            let group = objects.get(name).ok_or_else(missing)?;
            if group.users() > 1 {
                return Err(Error::new(16, format_args!("object '{name}' is in use, can not be deleted")));
            }
            objects.remove(name);
            Ok(Value::Null)
        }
    }
}

/// The values by their names, as they are written.
#[derive(Clone, Debug)]
struct Values(BTreeMap<String, i64>);

impl Default for Values {
    fn default() -> Self {
        Self::of(&Limits::default())
    }
}

impl Values {
    fn of(limits: &Limits) -> Self {
        let mut values = BTreeMap::new();
        for (unit, limits) in [("iops", &limits.operations), ("bps", &limits.bytes)] {
            for (direction, limit) in DIRECTIONS.into_iter().zip(limits) {
                let Limit { rate, burst_rate, burst_seconds } = *limit;
                let seconds = if burst_seconds < 1.0 { 1 } else { burst_seconds as i64 };
                values.insert(format!("{unit}-{direction}"), rate as i64);
                values.insert(format!("{unit}-{direction}-max"), burst_rate as i64);
                values.insert(format!("{unit}-{direction}-max-length"), seconds);
            }
        }
        values.insert("iops-size".to_owned(), limits.operation_bytes as i64);
        Self(values)
    }

    fn get(&self, name: &str) -> i64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    /// `false`: there is none of that name.
    fn set(&mut self, name: &str, value: i64) -> bool {
        self.0.get_mut(name).map(|place| *place = value).is_some()
    }

    /// Source: QEMU util/throttle.c, `throttle_is_valid`, for what is refused, in which order, and how it is said.
    fn limits(&self) -> Result<Limits> {
        let refuse = |text: &str| Err(Error::invalid(text));
        for unit in ["iops", "bps"] {
            for suffix in ["", "-max"] {
                let directed =
                    ["read", "write"].map(|direction| self.get(&format!("{unit}-{direction}{suffix}")));
                if self.get(&format!("{unit}-total{suffix}")) != 0 && directed != [0, 0] {
                    return refuse(
                        "bps/iops/max total values and read/write values cannot be used at the same time",
                    );
                }
            }
        }
        let iops = DIRECTIONS.map(|direction| self.get(&format!("iops-{direction}")));
        if self.get("iops-size") != 0 && iops == [0; 3] {
            return refuse("iops size requires an iops value to be set");
        }
        let mut limits = Limits::default();
        for (unit, into) in [("bps", &mut limits.bytes), ("iops", &mut limits.operations)] {
            for (direction, into) in DIRECTIONS.into_iter().zip(into) {
                let name = format!("{unit}-{direction}");
                let (rate, max) = (self.get(&name), self.get(&format!("{name}-max")));
                let length = self.get(&format!("{name}-max-length"));
                if !(0..=VALUE_MAX).contains(&rate) || !(0..=VALUE_MAX).contains(&max) {
                    return refuse(&format!("bps/iops/max values must be within [0, {VALUE_MAX}]"));
                }
                if length == 0 {
                    return refuse("the burst length cannot be 0");
                }
                if length > 1 && max == 0 {
                    return refuse("burst length set without burst rate");
                }
                if max != 0 && length > VALUE_MAX / max {
                    return refuse("burst length too high for this burst rate");
                }
                if max != 0 && rate == 0 {
                    return refuse("bps_max/iops_max require corresponding bps/iops values");
                }
                if max != 0 && max < rate {
                    return refuse("bps_max/iops_max cannot be lower than bps/iops");
                }
                *into = Limit { rate: rate as f64, burst_rate: max as f64, burst_seconds: length as f64 };
            }
        }
        limits.operation_bytes = self.get("iops-size") as u64;
        Ok(limits)
    }
}

/// Reads properties over the values that there are. Those with `x-` are for the beginning only.
fn read(properties: &Value, mut values: Values, beginning: bool) -> Result<Limits> {
    let Value::Object(properties) = properties else {
        return Err(Error::invalid("expected an object of properties"));
    };
    let alone = properties.iter().filter(|(name, _)| *name != "limits");
    for (name, value) in alone {
        if !beginning && name.strip_prefix("x-").is_some_and(|name| values.0.contains_key(name)) {
            return Err(Error::option(name, "Property cannot be set after initialization"));
        }
        let known = name.strip_prefix("x-").filter(|name| values.0.contains_key(*name));
        let Some(known) = known else {
            let text = format_args!("Parameter '{name}' is unexpected");
            return Err(Error::option(name, text));
        };
        let number = number(name, value, if known == "iops-size" { i64::from(u32::MAX) } else { i64::MAX })?;
        values.set(known, number);
    }
    match properties.get("limits") {
        None => {}
        Some(Value::Object(limits)) => {
            for (name, value) in limits {
                let path = format!("limits.{name}");
                let number = number(&path, value, i64::MAX)?;
                if !values.set(name, number) {
                    return Err(Error::option(&path, format_args!("Parameter '{path}' is unexpected")));
                }
            }
        }
        Some(_) => {
            let text = "Invalid parameter type for 'limits', expected: object";
            return Err(Error::option("limits", text));
        }
    }
    if !(0..=i64::from(u32::MAX)).contains(&values.get("iops-size")) {
        return Err(Error::invalid("iops-size value must be in range [0, 4294967295]"));
    }
    values.limits()
}

/// A whole number, also as the text that a command line makes of it.
fn number(name: &str, value: &Value, max: i64) -> Result<i64> {
    let found = value.as_i64().or_else(|| value.as_str()?.parse().ok());
    found.filter(|number| *number <= max).ok_or_else(|| {
        Error::option(name, format_args!("Invalid parameter type for '{name}', expected: integer"))
    })
}

/// All properties.
fn tell(limits: &Limits) -> Value {
    let values = Values::of(limits);
    let alone = values.0.iter().map(|(name, value)| (format!("x-{name}"), json!(value)));
    let mut properties: Map<String, Value> = alone.collect();
    properties.insert("limits".to_owned(), json!(values.0));
    Value::Object(properties)
}

#[cfg(test)]
mod tests;

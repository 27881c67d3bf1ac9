//! Events: what a format above says that it is about to do, and what is noticed here.

use driveline_sdk::{
    event::{NAMES, number},
    serde::{
        Deserialize, Deserializer,
        de::{self, Unexpected, Visitor},
    },
};
use std::fmt;

pub(crate) const READ_AIO: u64 = number("read_aio");
pub(crate) const WRITE_AIO: u64 = number("write_aio");
pub(crate) const FLUSH_TO_OS: u64 = number("flush_to_os");
pub(crate) const FLUSH_TO_DISK: u64 = number("flush_to_disk");
pub(crate) const PWRITEV: u64 = number("pwritev");
pub(crate) const PWRITEV_ZERO: u64 = number("pwritev_zero");
pub(crate) const PWRITEV_DONE: u64 = number("pwritev_done");
/// The node is opened. From a parent: it tells its events.
pub(crate) const NONE: u64 = number("none");

/// What nobody here ever does: rules for it would wait for ever, so they are refused.
const NEVER: [&str; 13] = [
    "vmstate_load",
    "vmstate_save",
    "reftable_update",
    "refblock_update",
    "cluster_alloc_bytes",
    "cluster_alloc_space",
    "pwritev_rmw_head",
    "pwritev_rmw_after_head",
    "pwritev_rmw_tail",
    "pwritev_rmw_after_tail",
    "empty_image_prepare",
    "l1_shrink_write_table",
    "l1_shrink_free_l2_clusters",
];

/// An event, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Event(pub(crate) u64);

impl Event {
    /// `Err`: what to say of it.
    pub(crate) fn of(name: &str) -> Result<Self, String> {
        if NEVER.contains(&name) {
            return Err(format!("the event '{name}' never comes: nothing here does that"));
        }
        let found = NAMES.iter().position(|known| *known == name);
        found.map(|at| Self(at as u64)).ok_or_else(|| format!("invalid parameter value: {name}"))
    }
}

struct Name;

impl Visitor<'_> for Name {
    type Value = Event;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of an event, such as \"l2_load\"")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<Event, E> {
        Event::of(name).map_err(|text| {
            if NAMES.contains(&name) {
                E::custom(text)
            } else {
                E::invalid_value(Unexpected::Str(name), &self)
            }
        })
    }
}

impl<'de> Deserialize<'de> for Event {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(Name)
    }
}

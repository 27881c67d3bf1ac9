//! The sidecar file that keeps a drive's dirty bitmaps, for any format, through crashes and power cuts.
#![deny(unsafe_code)]

mod disk;
mod entry;
mod error;
mod fingerprint;
#[doc(hidden)]
pub mod fuzz;
mod header;
mod ids;
mod inspect;
mod log;
#[allow(unsafe_code, reason = "words of a shared mapping, see there")]
mod mapping;
mod open;
mod rebind;
mod region;
mod space;
mod store;
mod volume;

pub use driveline_bitmap::Durability;
pub use error::{Error, Result};
pub use fingerprint::{Fingerprint, ImageFile};
pub use ids::{BootId, Uuid};
pub use inspect::{Inspected, Inspection, Standing};
pub use log::LogOptions;
pub use open::{Found, OpenOptions, Opened, Verdict};
pub use rebind::Incoming;
pub use store::{OWNER_BYTES_MAX, Options, Spec, Store};

#[cfg(test)]
mod tests;

//! Bitmaps that an image holds, and what a driver that can hold some is asked.

use crate::{BoxFuture, Error, Kind, Result};
use driveline_bitmap::{Bits, Granularity};

/// What an image says about its bitmaps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoredBitmaps {
    /// Each of them, in the image's order; those that cannot be used, too.
    pub bitmaps: Vec<StoredBitmap>,
    /// A program that knows no bitmaps wrote to the image, so that they all count as lost.
    pub outdated: bool,
    /// Why the list cannot be read, so that it is not known which bitmaps there were.
    pub unreadable: Option<String>,
    /// What the image could hold.
    pub limits: BitmapLimits,
}

/// One bitmap in an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredBitmap {
    /// Its name, as far as it is one: a damaged image may say anything.
    pub name: String,
    /// Bytes per bit; `None` if what the image says is none.
    pub granularity: Option<Granularity>,
    /// Does it take part in writes?
    pub recording: bool,
    /// The image says that what it holds is not up to date: somebody has it, or had it when he was killed.
    pub in_use: bool,
    /// Why its contents cannot be used. `None` with `in_use`: this node said so itself, and they can be loaded as they
    /// were before.
    pub inconsistent: Option<String>,
    /// Clusters of the image that it takes.
    pub clusters: u64,
}

/// What an image could hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BitmapLimits {
    /// Bitmaps; 0: none at all.
    pub bitmaps_max: u64,
    /// Bytes of a name.
    pub name_bytes_max: u64,
    /// Bytes of one bitmap's bits, an eighth of its granules.
    pub bits_bytes_max: u64,
}

/// A bitmap as an image is to hold it.
#[derive(Clone, Copy, Debug)]
pub struct BitmapToStore<'a> {
    /// Its name, which no other one of the set has.
    pub name: &'a str,
    /// Bytes per bit, also those of `bits`.
    pub granularity: Granularity,
    /// Does it take part in writes?
    pub recording: bool,
    /// Is somebody going to change it, so that what is stored must not be trusted?
    pub in_use: bool,
    /// Its contents, as long as the node. `None`: what the image holds under that name stays, and if that is nothing
    /// that can be used, `in_use` must be set.
    pub bits: Option<&'a Bits>,
}

/// A mark in an image that every writer takes away who does not know it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Witness {
    /// Was it there when the node was opened, or last became writable? Then nobody else wrote since it was set.
    pub at_open: bool,
    /// Is it there now?
    pub set: bool,
}

pub(crate) fn none<'a, T: Send + 'a>() -> BoxFuture<'a, Result<T>> {
    Box::pin(async { Err(Error::new(Kind::NotSupported, "its driver keeps no bitmaps")) })
}

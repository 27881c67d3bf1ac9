//! What must be true of the drive.

use super::SECTOR;
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

/// What the drive's user knows: its content, where that is known, and what each bitmap must say.
pub(super) struct Oracle {
    /// By sector; `None` after a change that failed, or that leaves the content open.
    pub(super) content: Vec<Option<u8>>,
    pub(super) bitmaps: BTreeMap<String, Expected>,
    /// What changed since each checkpoint until the next one, the oldest first.
    pub(super) epochs: Vec<Epoch>,
}

#[derive(Clone, Default)]
pub(super) struct Expected {
    pub(super) granularity: u64,
    pub(super) recording: bool,
    pub(super) dirty: BTreeSet<u64>,
    /// What failed changes addressed: one that a filter above refused never came to the bitmap.
    pub(super) maybe: BTreeSet<u64>,
    /// A backup has it: what was dirty at its moment is with that, and it cannot be changed.
    pub(super) frozen: bool,
}

/// The granularity of checkpoints, in bytes.
pub(super) const FINE: u64 = 4096;

/// What changed since a checkpoint, by granules of [`FINE`] bytes.
pub(super) struct Epoch {
    pub(super) checkpoint: String,
    pub(super) changed: Changed,
}

/// What surely changed, and what may have: a change that failed.
#[derive(Clone, Debug, Default)]
pub(super) struct Changed {
    pub(super) surely: BTreeSet<u64>,
    pub(super) maybe: BTreeSet<u64>,
}

impl Changed {
    pub(super) fn extend(&mut self, other: &Self) {
        self.surely.extend(&other.surely);
        self.maybe.extend(&other.maybe);
    }

    /// Is this what somebody is told who asks?
    pub(super) fn assert_is(&self, found: &BTreeSet<u64>, what: &str) {
        let lost: Vec<_> = self.surely.difference(found).collect();
        let extra: Vec<_> =
            found.iter().filter(|at| !self.surely.contains(at) && !self.maybe.contains(at)).collect();
        assert!(
            lost.is_empty() && extra.is_empty(),
            "{what}: {lost:?} are lost, and {extra:?} did not change"
        );
    }
}

impl Oracle {
    pub(super) fn mark(&mut self, range: Range<u64>, failed: bool) {
        for bitmap in self.bitmaps.values_mut().filter(|bitmap| bitmap.recording) {
            let granules = range.start / bitmap.granularity..range.end.div_ceil(bitmap.granularity);
            if failed { bitmap.maybe.extend(granules) } else { bitmap.dirty.extend(granules) }
        }
        if let Some(Epoch { changed, .. }) = self.epochs.last_mut() {
            let granules = range.start / FINE..range.end.div_ceil(FINE);
            if failed { changed.maybe.extend(granules) } else { changed.surely.extend(granules) }
        }
    }

    pub(super) fn size(&self) -> u64 {
        self.content.len() as u64 * SECTOR
    }
}

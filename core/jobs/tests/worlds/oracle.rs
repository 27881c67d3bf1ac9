//! What must be true of a drive.

use std::collections::{BTreeMap, BTreeSet};

/// What a drive's user knows: its content, where that is known, and what each bitmap must say.
#[derive(Default)]
pub(super) struct Oracle {
    /// By sector; `None` after a write that failed.
    pub(super) content: Vec<Option<u8>>,
    pub(super) bitmaps: BTreeMap<String, Expected>,
}

#[derive(Clone)]
pub(super) struct Expected {
    pub(super) granularity: u64,
    pub(super) recording: bool,
    pub(super) dirty: BTreeSet<u64>,
    /// What failed writes addressed: one that a filter above refused never got here, and changed nothing.
    pub(super) maybe: BTreeSet<u64>,
    /// A backup has it: what was dirty at its moment is with that, and it cannot be looked at.
    pub(super) frozen: bool,
}

impl Oracle {
    pub(super) fn mark(&mut self, range: std::ops::Range<u64>, failed: bool) {
        for bitmap in self.bitmaps.values_mut().filter(|bitmap| bitmap.recording) {
            let granules = range.start / bitmap.granularity..range.end.div_ceil(bitmap.granularity);
            if failed { bitmap.maybe.extend(granules) } else { bitmap.dirty.extend(granules) }
        }
    }
}

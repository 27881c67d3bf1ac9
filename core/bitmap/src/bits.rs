//! The dirty bits over a length of bytes, without a name or a state.

use core::fmt;
use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::tree::{Cursor, Root};
use crate::{Error, Granularity, Granule, Result};

/// What an area that a resize adds holds at first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grown {
    /// It changed for the reader: there was nothing to read before.
    Dirty,
    /// It counts as unchanged, as in QEMU.
    Clean,
}

/// A run of bytes that are all dirty or all clean.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Which bytes.
    pub range: Range<u64>,
    /// Whether they changed.
    pub dirty: bool,
}

/// Which granules of `length` bytes are dirty.
///
/// Ranges are half-open ranges of bytes; what lies beyond the length is ignored, and an empty or reversed
/// range holds nothing. Memory follows what is neither all clean nor all dirty: a clean bitmap over a
/// pebibyte takes some hundred bytes, a wholly dirty one some kilobytes.
///
/// Every method but [`compact`](Bits::compact) takes `&self`, takes no lock and may run in any number of threads.
/// The bits are relaxed atomics: a mark is seen by whoever learned, by any synchronisation, that the
/// marking call returned. No mark is lost to another mark, a merge, or a read. A clear or a resize that
/// races with marks leaves each granule as if the two had come in either order, so callers who need an exact
/// cut drain writers first. Clears and resizes come one at a time: two that race may leave too much dirty.
pub struct Bits {
    granularity: Granularity,
    length: AtomicU64,
    root: Root,
}

impl Bits {
    /// All clean.
    pub fn new(granularity: Granularity, length: u64) -> Self {
        let root = Root::new(u64::BITS - granularity.shift());
        Bits { granularity, length: AtomicU64::new(length), root }
    }

    /// Bytes per bit.
    pub fn granularity(&self) -> Granularity {
        self.granularity
    }

    /// Bytes covered. The last granule may be shorter than the others.
    pub fn length(&self) -> u64 {
        // Whoever sees that another thread made the bitmap longer can mark there.
        self.length.load(Ordering::Acquire)
    }

    /// How many granules there are, the last one rounded up.
    pub fn granules(&self) -> u64 {
        self.length().div_ceil(self.granularity.bytes())
    }

    /// Makes every granule that `range` touches dirty.
    #[inline]
    pub fn mark(&self, range: Range<u64>) {
        if let Some((first, last)) = self.touched(range) {
            if first == last {
                self.root.mark_one(first);
            } else {
                self.root.mark(first, last);
            }
        }
    }

    /// Makes dirty those of the 64 granules from `64 * at` whose bits are set in `word`, the first one's the lowest; bits
    /// beyond the length are ignored.
    ///
    /// For who reads a dense bitmap: word by word, half of 2^28 granules take milliseconds, and range by range a second.
    pub fn mark_word(&self, at: u64, word: u64) {
        let Some(first) = at.checked_mul(64) else { return };
        let here = self.granules().saturating_sub(first);
        let word = if here < 64 { word & ((1 << here) - 1) } else { word };
        if word != 0 {
            self.root.mark_word(first, word);
        }
    }

    /// Makes every granule clean that lies wholly within `range`.
    ///
    /// A granule of which only a part is in the range stays as it is: the rest of it may have changed. The
    /// last granule is within the range if all of its bytes below the length are.
    pub fn clear_range(&self, range: Range<u64>) {
        let length = self.length();
        let first = range.start.div_ceil(self.granularity.bytes());
        let end = if range.end >= length { self.granules() } else { range.end >> self.granularity.shift() };
        if range.start < range.end && first < end {
            self.root.clear(first, end - 1);
        }
    }

    /// Makes everything clean. Memory is kept for the next marks; [`compact`](Bits::compact) frees it.
    pub fn clear_all(&self) {
        self.clear_range(0..u64::MAX);
    }

    /// Whether the granule that holds the byte at `offset` is dirty.
    pub fn is_dirty(&self, offset: u64) -> bool {
        offset < self.length() && self.root.is_dirty(self.granularity.granule_of(offset).0)
    }

    /// Whether nothing is dirty.
    pub fn is_clean(&self) -> bool {
        self.next_dirty(0).is_none()
    }

    /// The first dirty byte at or after `from`.
    pub fn next_dirty(&self, from: u64) -> Option<u64> {
        self.next(from, true)
    }

    /// The first clean byte at or after `from`.
    pub fn next_clean(&self, from: u64) -> Option<u64> {
        self.next(from, false)
    }

    /// The dirty granules.
    pub fn dirty_granules(&self) -> u64 {
        self.touched(0..u64::MAX).map_or(0, |(first, last)| self.root.count(first, last))
    }

    /// The dirty bytes; of the last granule, only those below the length.
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty_bytes_in(0..u64::MAX)
    }

    /// The dirty bytes within `range`.
    pub fn dirty_bytes_in(&self, range: Range<u64>) -> u64 {
        let range = range.start..range.end.min(self.length());
        let Some((first, last)) = self.touched(range.clone()) else { return 0 };
        if first == last {
            return if self.root.is_dirty(first) { range.end - range.start } else { 0 };
        }
        let part = |index: u64| {
            let granule = self.bytes_of(Granule(index));
            let bytes = granule.end.min(range.end) - granule.start.max(range.start);
            if self.root.is_dirty(index) { bytes } else { 0 }
        };
        let whole = if last - first > 1 { self.root.count(first + 1, last - 1) } else { 0 };
        part(first) + part(last) + (whole << self.granularity.shift())
    }

    /// The dirty ranges in ascending order, each as long as can be.
    pub fn iter_dirty(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.extents(0..u64::MAX).filter(|extent| extent.dirty).map(|extent| extent.range)
    }

    /// `range`, as far as there is something to describe, in runs that are dirty and clean in turn.
    pub fn extents(&self, range: Range<u64>) -> Extents<'_> {
        let end = range.end.min(self.length());
        Extents { bits: self, cursor: Cursor::new(&self.root), rest: range.start..end, dirty: None }
    }

    /// Makes dirty what is dirty in `other`, whatever the granularities.
    ///
    /// A granule becomes dirty if any dirty byte of `other` lies in it; so one dirty granule of a coarser
    /// `other` makes all the granules within it dirty.
    ///
    /// Errors: [`Error::LengthsDiffer`].
    pub fn merge_from(&self, other: &Bits) -> Result<()> {
        let (target_length, source_length) = (self.length(), other.length());
        if target_length != source_length {
            let (source_name, target_name) = (String::new(), String::new());
            return Err(Error::LengthsDiffer { source_name, source_length, target_name, target_length });
        }
        if self.granularity == other.granularity {
            self.root.merge(&other.root);
            return Ok(());
        }
        let mut from = 0;
        while let Some(start) = other.next_dirty(from) {
            // A clear that races with this may have taken the granule back: go on after it regardless.
            let end = other.next_clean(start).unwrap_or(source_length).max(start + 1);
            self.mark(start..end);
            // What follows up to the end of the target's granule cannot change anything any more.
            from = self.bytes_of(self.granularity.granule_of(end - 1)).end;
        }
        Ok(())
    }

    /// Changes the length. Bits beyond a smaller length are dropped; a last granule that is cut stays as it is.
    pub fn resize(&self, length: u64, grown: Grown) {
        let before = self.length();
        if length < before {
            self.clear_range(length..before);
        }
        self.length.store(length, Ordering::Release);
        if length > before && grown == Grown::Dirty {
            self.mark(before..length);
        }
    }

    /// Frees the memory of areas that are all clean or all dirty by now. Needs room for the result meanwhile.
    pub fn compact(&mut self) {
        *self = self.clone();
    }

    /// Bytes of memory in use.
    pub fn allocated_bytes(&self) -> usize {
        size_of::<Self>() + self.root.allocated_bytes()
    }

    /// The bytes of `granule`, as far as they are below the length.
    pub fn bytes_of(&self, granule: Granule) -> Range<u64> {
        let start = self.granularity.offset_of(granule);
        start..start.saturating_add(self.granularity.bytes()).min(self.length())
    }

    /// The granules that `range` touches, by their numbers.
    pub(crate) fn granules_of(&self, range: Range<u64>) -> Option<Range<u64>> {
        self.touched(range).map(|(first, last)| first..last + 1)
    }

    /// Whether all of these granules are dirty.
    pub(crate) fn all_dirty(&self, granules: Range<u64>) -> bool {
        let (first, last) = (granules.start, granules.end - 1);
        if first == last { self.root.is_dirty(first) } else { self.root.find(first, last, false).is_none() }
    }

    fn next(&self, from: u64, dirty: bool) -> Option<u64> {
        let (first, last) = self.touched(from..u64::MAX)?;
        let found = self.root.find(first, last, dirty)?;
        Some(self.granularity.offset_of(Granule(found)).max(from))
    }

    /// The first and the last granule that `range` touches.
    #[inline]
    fn touched(&self, range: Range<u64>) -> Option<(u64, u64)> {
        let end = range.end.min(self.length());
        let shift = self.granularity.shift();
        (range.start < end).then(|| (range.start >> shift, (end - 1) >> shift))
    }
}

impl Clone for Bits {
    /// A copy of what is dirty now, as compact as can be.
    fn clone(&self) -> Self {
        let copy = Bits::new(self.granularity, self.length());
        copy.root.merge(&self.root);
        copy
    }
}

impl PartialEq for Bits {
    /// Equal length, granularity and dirty granules.
    fn eq(&self, other: &Self) -> bool {
        self.granularity == other.granularity
            && self.length() == other.length()
            && self.iter_dirty().eq(other.iter_dirty())
    }
}

impl fmt::Debug for Bits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bits")
            .field("granularity", &self.granularity)
            .field("length", &self.length())
            .field("dirty_granules", &self.dirty_granules())
            .finish()
    }
}

/// The runs of [`Bits::extents`].
#[derive(Clone)]
pub struct Extents<'a> {
    bits: &'a Bits,
    cursor: Cursor<'a>,
    rest: Range<u64>,
    /// What the first granule of the rest was when the run before it ended there.
    dirty: Option<bool>,
}

impl Iterator for Extents<'_> {
    type Item = Extent;

    fn next(&mut self) -> Option<Extent> {
        if self.rest.start >= self.rest.end {
            return None;
        }
        let (start, shift) = (self.rest.start, self.bits.granularity.shift());
        let (first, last) = (start >> shift, (self.rest.end - 1) >> shift);
        let dirty = self.dirty.unwrap_or_else(|| self.bits.root.is_dirty(first));
        // Marks that race with this may have turned the first granule: it is reported as it was seen.
        let turn = if first < last { self.cursor.find(first + 1, last, !dirty) } else { None };
        let end = turn.map_or(self.rest.end, |granule| granule << shift);
        self.rest.start = end;
        self.dirty = Some(!dirty);
        Some(Extent { range: start..end, dirty })
    }
}

impl core::iter::FusedIterator for Extents<'_> {}

impl fmt::Debug for Extents<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Extents").field("bits", &self.bits).field("rest", &self.rest).finish()
    }
}

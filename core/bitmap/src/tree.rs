//! The sparse tree of granules under [`Bits`](crate::Bits): what is allocated follows what is mixed.
//!
//! ```text
//! Root ── slot ─┬─ Inner ── ... ── Inner ─┬─ Leaf   4096 bits in atomic words (a bitvec array)
//!               │  256 slots              ├─ (empty) all clean, nothing allocated
//!               └─ (empty)                └─ (full bit) all dirty, nothing allocated
//! ```
//!
//! Every operation takes `&self`: a slot is filled at most once and freed only with the whole tree, so marking
//! threads need no lock and no reclamation scheme. A slot's full bit outranks the child below it.
//!
//! Indices are relative to the level, ranges of them inclusive: the end of the last range of a 64-bit drive
//! would not fit otherwise.

use core::sync::atomic::{AtomicU64, Ordering};

use bitvec::array::BitArray;
use bitvec::order::Lsb0;
use once_cell::race::OnceBox;

const LEAF_BITS: u32 = 12;
const LEAF_WORDS: usize = 1 << (LEAF_BITS - 6);
const FAN_OUT_BITS: u32 = 8;
const FAN_OUT: usize = 1 << FAN_OUT_BITS;

/// What one root slot leads to: 2^44 granules, at 64 KiB one exabyte.
type Top = Inner<Inner<Inner<Inner<Leaf>>>>;

/// One level of the tree. Monomorphised from [`Top`] down, so that a mark is a handful of inlined loads.
trait Level: Default {
    /// A level holds `1 << BITS` granules.
    const BITS: u32;
    const LAST: u64 = (1 << Self::BITS) - 1;

    fn mark_one(&self, index: u64);
    fn mark(&self, first: u64, last: u64);
    /// Marks those of the 64 indices from `index`, a multiple of 64, whose bits are set in `word`.
    fn mark_word(&self, index: u64, word: u64);
    fn clear(&self, first: u64, last: u64);
    fn is_dirty(&self, index: u64) -> bool;
    /// The first index at or after `from` that is dirty, or clean.
    fn find(&self, from: u64, dirty: bool) -> Option<u64>;
    fn count(&self, first: u64, last: u64) -> u64;
    /// Marks what is dirty in `other`, and allocates for what is mixed there, nothing more.
    fn merge(&self, other: &Self);
    /// The leaf that holds `index`, unless it is absent or does not count.
    fn leaf(&self, index: u64) -> Option<&Leaf>;
    fn allocated_bytes(&self) -> usize;
}

/// The bits themselves.
#[derive(Default)]
struct Leaf {
    bits: BitArray<[AtomicU64; LEAF_WORDS], Lsb0>,
}

impl Leaf {
    /// The words that `first..=last` touches, each with the mask of its touched bits.
    fn words(&self, first: u64, last: u64) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let (first_word, last_word) = ((first >> 6) as usize, (last >> 6) as usize);
        self.bits.as_raw_slice()[first_word..=last_word].iter().zip(first_word..).map(move |(word, at)| {
            let head = if at == first_word { u64::MAX << (first & 63) } else { u64::MAX };
            let tail = if at == last_word { u64::MAX >> (63 - (last & 63)) } else { u64::MAX };
            (word, head & tail)
        })
    }
}

impl Level for Leaf {
    const BITS: u32 = LEAF_BITS;

    #[inline]
    fn mark_one(&self, index: u64) {
        // Most writes hit what is dirty already. To look first keeps the cache line shared between threads.
        if !self.is_dirty(index) {
            self.bits.set_aliased(index as usize, true);
        }
    }

    fn mark(&self, first: u64, last: u64) {
        for (word, mask) in self.words(first, last) {
            if mask == u64::MAX {
                word.store(mask, Ordering::Relaxed);
            } else if word.load(Ordering::Relaxed) & mask != mask {
                word.fetch_or(mask, Ordering::Relaxed);
            }
        }
    }

    fn mark_word(&self, index: u64, word: u64) {
        self.bits.as_raw_slice()[(index >> 6) as usize].fetch_or(word, Ordering::Relaxed);
    }

    fn clear(&self, first: u64, last: u64) {
        for (word, mask) in self.words(first, last) {
            if word.load(Ordering::Relaxed) & mask != 0 {
                word.fetch_and(!mask, Ordering::Relaxed);
            }
        }
    }

    #[inline]
    fn is_dirty(&self, index: u64) -> bool {
        self.bits.as_raw_slice()[(index >> 6) as usize].load(Ordering::Relaxed) >> (index & 63) & 1 == 1
    }

    fn find(&self, from: u64, dirty: bool) -> Option<u64> {
        let flip = if dirty { 0 } else { u64::MAX };
        self.words(from, Self::LAST).zip(from >> 6..).find_map(|((word, mask), at)| {
            let wanted = (word.load(Ordering::Relaxed) ^ flip) & mask;
            (wanted != 0).then(|| at << 6 | u64::from(wanted.trailing_zeros()))
        })
    }

    fn count(&self, first: u64, last: u64) -> u64 {
        self.bits[first as usize..=last as usize].count_ones() as u64
    }

    fn merge(&self, other: &Self) {
        for (word, other) in self.bits.as_raw_slice().iter().zip(other.bits.as_raw_slice()) {
            let other = other.load(Ordering::Relaxed);
            if word.load(Ordering::Relaxed) | other != word.load(Ordering::Relaxed) {
                word.fetch_or(other, Ordering::Relaxed);
            }
        }
    }

    fn leaf(&self, _: u64) -> Option<&Leaf> {
        Some(self)
    }

    fn allocated_bytes(&self) -> usize {
        size_of::<Self>()
    }
}

/// 256 children, each absent until it holds something mixed.
struct Inner<T> {
    full: BitArray<[AtomicU64; FAN_OUT / 64], Lsb0>,
    children: [OnceBox<T>; FAN_OUT],
}

impl<T> Default for Inner<T> {
    fn default() -> Self {
        Inner { full: BitArray::default(), children: core::array::from_fn(|_| OnceBox::new()) }
    }
}

impl<T: Level> Inner<T> {
    fn is_full(&self, slot: usize) -> bool {
        // Pairs with the release in `set_full`: who sees that a slot is no longer full sees the bits that
        // were written into its child instead.
        self.full.as_raw_slice()[slot / 64].load(Ordering::Acquire) >> (slot % 64) & 1 == 1
    }

    fn set_full(&self, slot: usize, full: bool) {
        let (word, mask) = (&self.full.as_raw_slice()[slot / 64], 1 << (slot % 64));
        if full {
            word.fetch_or(mask, Ordering::Release);
        } else {
            word.fetch_and(!mask, Ordering::Release);
        }
    }

    /// The child to mark in, or none if all of it is dirty already.
    #[inline]
    fn child_to_mark(&self, slot: usize) -> Option<&T> {
        match self.children[slot].get() {
            // If the slot is full as well, the mark goes into a child that does not count: harmless, and
            // cheaper than to look.
            Some(child) => Some(child),
            None => self.child_to_mark_slow(slot),
        }
    }

    #[cold]
    fn child_to_mark_slow(&self, slot: usize) -> Option<&T> {
        (!self.is_full(slot)).then(|| self.child(slot))
    }

    fn child(&self, slot: usize) -> &T {
        self.children[slot].get_or_init(Box::default)
    }
}

impl<T: Level> Level for Inner<T> {
    const BITS: u32 = T::BITS + FAN_OUT_BITS;

    #[inline]
    fn mark_one(&self, index: u64) {
        if let Some(child) = self.child_to_mark((index >> T::BITS) as usize) {
            child.mark_one(index & T::LAST);
        }
    }

    fn mark(&self, first: u64, last: u64) {
        for (slot, first, last) in split::<T>(first, last) {
            if (first, last) == (0, T::LAST) {
                if !self.is_full(slot) {
                    self.set_full(slot, true);
                }
            } else if let Some(child) = self.child_to_mark(slot) {
                child.mark(first, last);
            }
        }
    }

    fn mark_word(&self, index: u64, word: u64) {
        if let Some(child) = self.child_to_mark((index >> T::BITS) as usize) {
            child.mark_word(index & T::LAST, word);
        }
    }

    fn clear(&self, first: u64, last: u64) {
        for (slot, first, last) in split::<T>(first, last) {
            if self.is_full(slot) {
                if (first, last) != (0, T::LAST) {
                    // What stays dirty must be in the child before the slot stops to be full.
                    self.child(slot).mark(0, T::LAST);
                }
                self.set_full(slot, false);
            }
            if let Some(child) = self.children[slot].get() {
                child.clear(first, last);
            }
        }
    }

    fn is_dirty(&self, index: u64) -> bool {
        let slot = (index >> T::BITS) as usize;
        self.is_full(slot) || self.children[slot].get().is_some_and(|child| child.is_dirty(index & T::LAST))
    }

    fn find(&self, from: u64, dirty: bool) -> Option<u64> {
        split::<T>(from, Self::LAST).find_map(|(slot, first, _)| {
            let found = if self.is_full(slot) {
                dirty.then_some(first)
            } else {
                match self.children[slot].get() {
                    Some(child) => child.find(first, dirty),
                    None => (!dirty).then_some(first),
                }
            };
            found.map(|index| (slot as u64) << T::BITS | index)
        })
    }

    fn count(&self, first: u64, last: u64) -> u64 {
        split::<T>(first, last)
            .map(|(slot, first, last)| {
                if self.is_full(slot) {
                    last - first + 1
                } else {
                    self.children[slot].get().map_or(0, |child| child.count(first, last))
                }
            })
            .sum()
    }

    fn merge(&self, other: &Self) {
        for slot in (0..FAN_OUT).filter(|&slot| !self.is_full(slot)) {
            let child = other.children[slot].get();
            if other.is_full(slot) || child.is_some_and(|child| child.find(0, false).is_none()) {
                self.set_full(slot, true);
            } else if let Some(child) = child.filter(|child| child.find(0, true).is_some()) {
                self.child(slot).merge(child);
            }
        }
    }

    fn leaf(&self, index: u64) -> Option<&Leaf> {
        let slot = (index >> T::BITS) as usize;
        let child = self.children[slot].get().filter(|_| !self.is_full(slot));
        child.and_then(|child| child.leaf(index & T::LAST))
    }

    fn allocated_bytes(&self) -> usize {
        let below = self.children.iter().filter_map(OnceBox::get).map(T::allocated_bytes);
        size_of::<Self>() + below.sum::<usize>()
    }
}

/// The slots of children `T` that `first..=last` touches, each with the range inside the child.
fn split<T: Level>(first: u64, last: u64) -> impl Iterator<Item = (usize, u64, u64)> {
    let (first_slot, last_slot) = (first >> T::BITS, last >> T::BITS);
    (first_slot..=last_slot).map(move |slot| {
        let from = if slot == first_slot { first & T::LAST } else { 0 };
        let to = if slot == last_slot { last & T::LAST } else { T::LAST };
        (slot as usize, from, to)
    })
}

/// The whole tree: as many slots as the longest drive needs at a granularity, so that it never moves.
pub(crate) struct Root {
    slots: Box<[OnceBox<Top>]>,
}

impl Root {
    /// For indices of at most `index_bits` bits: 2048 slots at 512 B granularity, 16 at 64 KiB.
    pub(crate) fn new(index_bits: u32) -> Self {
        let slots = 1_usize << index_bits.saturating_sub(Top::BITS);
        Root { slots: (0..slots).map(|_| OnceBox::new()).collect() }
    }

    #[inline]
    pub(crate) fn mark_one(&self, index: u64) {
        self.slots[(index >> Top::BITS) as usize].get_or_init(Box::default).mark_one(index & Top::LAST);
    }

    pub(crate) fn mark(&self, first: u64, last: u64) {
        for (slot, first, last) in split::<Top>(first, last) {
            self.slots[slot].get_or_init(Box::default).mark(first, last);
        }
    }

    pub(crate) fn mark_word(&self, index: u64, word: u64) {
        let top = self.slots[(index >> Top::BITS) as usize].get_or_init(Box::default);
        top.mark_word(index & Top::LAST, word);
    }

    pub(crate) fn clear(&self, first: u64, last: u64) {
        for (slot, first, last) in split::<Top>(first, last) {
            if let Some(top) = self.slots[slot].get() {
                top.clear(first, last);
            }
        }
    }

    pub(crate) fn is_dirty(&self, index: u64) -> bool {
        self.slots[(index >> Top::BITS) as usize].get().is_some_and(|top| top.is_dirty(index & Top::LAST))
    }

    pub(crate) fn find(&self, from: u64, last: u64, dirty: bool) -> Option<u64> {
        let found = split::<Top>(from, last).find_map(|(slot, first, _)| {
            let found = match self.slots[slot].get() {
                Some(top) => top.find(first, dirty),
                None => (!dirty).then_some(first),
            };
            found.map(|index| (slot as u64) << Top::BITS | index)
        });
        found.filter(|&index| index <= last)
    }

    pub(crate) fn count(&self, first: u64, last: u64) -> u64 {
        let tops = split::<Top>(first, last)
            .map(|(slot, first, last)| self.slots[slot].get().map_or(0, |top| top.count(first, last)));
        tops.sum()
    }

    /// Marks what is dirty in `other`, a tree of equal size.
    pub(crate) fn merge(&self, other: &Root) {
        for (slot, other) in self.slots.iter().zip(&other.slots) {
            if let Some(other) = other.get().filter(|other| other.find(0, true).is_some()) {
                slot.get_or_init(Box::default).merge(other);
            }
        }
    }

    fn leaf(&self, index: u64) -> Option<&Leaf> {
        self.slots[(index >> Top::BITS) as usize].get().and_then(|top| top.leaf(index & Top::LAST))
    }

    pub(crate) fn allocated_bytes(&self) -> usize {
        let below = self.slots.iter().filter_map(OnceBox::get).map(Top::allocated_bytes);
        size_of_val(&*self.slots) + below.sum::<usize>()
    }
}

/// Finds like [`Root::find`], for who goes on from where it found: most steps of a walk stay within a leaf.
#[derive(Clone)]
pub(crate) struct Cursor<'a> {
    root: &'a Root,
    leaf: Option<(u64, &'a Leaf)>,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(root: &'a Root) -> Self {
        Cursor { root, leaf: None }
    }

    pub(crate) fn find(&mut self, from: u64, last: u64, dirty: bool) -> Option<u64> {
        let base = from & !Leaf::LAST;
        if self.leaf.is_none_or(|(at, _)| at != base) {
            self.leaf = self.root.leaf(from).map(|leaf| (base, leaf));
        }
        let Some((_, leaf)) = self.leaf else { return self.root.find(from, last, dirty) };
        match leaf.find(from & Leaf::LAST, dirty) {
            Some(index) => Some(base | index).filter(|&index| index <= last),
            None if base | Leaf::LAST >= last => None,
            None => self.root.find(base + Leaf::LAST + 1, last, dirty),
        }
    }
}

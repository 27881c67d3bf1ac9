//! What a node should hold.

use std::ops::Range;

/// A node's bytes, as far as they are known: what a discarded range reads as is not.
pub(super) struct Model {
    bytes: Vec<u8>,
    known: Vec<bool>,
}

impl Model {
    /// Of a node about which nothing is known yet.
    pub(super) fn new(size_bytes: usize) -> Self {
        Self { bytes: vec![0; size_bytes], known: vec![false; size_bytes] }
    }

    pub(super) fn write(&mut self, at: usize, data: &[u8]) {
        self.bytes[at..at + data.len()].copy_from_slice(data);
        self.known[at..at + data.len()].fill(true);
    }

    pub(super) fn zero(&mut self, range: Range<usize>) {
        self.bytes[range.clone()].fill(0);
        self.known[range].fill(true);
    }

    pub(super) fn forget(&mut self, range: Range<usize>) {
        self.known[range].fill(false);
    }

    /// Takes what a read gave: bytes that were unknown are known from now on, because they must not change by themselves.
    /// Returns the first position where it contradicts.
    pub(super) fn compare(&mut self, at: usize, data: &[u8]) -> Option<usize> {
        for (index, byte) in (at..).zip(data) {
            if self.known[index] && self.bytes[index] != *byte {
                return Some(index);
            }
            (self.bytes[index], self.known[index]) = (*byte, true);
        }
        None
    }

    /// Is it certain that not all of the range is zero?
    pub(super) fn surely_not_zero(&self, range: Range<usize>) -> bool {
        range.clone().any(|index| self.known[index] && self.bytes[index] != 0)
    }

    pub(super) fn bytes(&self, range: Range<usize>) -> &[u8] {
        &self.bytes[range]
    }
}

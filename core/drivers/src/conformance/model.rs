//! What a node should hold.

use std::ops::Range;

/// A node's bytes, as far as they are known: what a discarded range reads as is not.
pub(super) struct Model {
    bytes: Vec<u8>,
    /// Ascending, apart from each other, none empty.
    unknown: Vec<Range<usize>>,
}

impl Model {
    /// Of a node about which nothing is known yet.
    pub(super) fn new(size_bytes: usize) -> Self {
        Self { bytes: vec![0; size_bytes], unknown: vec![Range { start: 0, end: size_bytes }] }
    }

    pub(super) fn write(&mut self, at: usize, data: &[u8]) {
        self.bytes[at..at + data.len()].copy_from_slice(data);
        self.learn(&(at..at + data.len()));
    }

    pub(super) fn zero(&mut self, range: Range<usize>) {
        self.bytes[range.clone()].fill(0);
        self.learn(&range);
    }

    pub(super) fn forget(&mut self, range: Range<usize>) {
        self.learn(&range);
        let at = self.unknown.partition_point(|other| other.start < range.start);
        self.unknown.insert(at, range);
    }

    fn learn(&mut self, range: &Range<usize>) {
        let outside = |other: &Range<usize>| {
            let before = other.start..other.end.min(range.start);
            let after = other.start.max(range.end)..other.end;
            [before, after].into_iter().filter(|part| !part.is_empty())
        };
        self.unknown = self.unknown.iter().flat_map(outside).collect();
    }

    /// The parts of a range that are known.
    fn known(&self, range: Range<usize>) -> Vec<Range<usize>> {
        let mut at = range.start;
        let mut known = Vec::new();
        for gap in self.unknown.iter().filter(|gap| gap.start < range.end && range.start < gap.end) {
            known.push(at..gap.start);
            at = gap.end;
        }
        known.push(at..range.end);
        known.retain(|part| !part.is_empty());
        known
    }

    /// Takes what a read gave: bytes that were unknown are known from now on, because they must not change by themselves.
    /// Returns the first position where it contradicts.
    pub(super) fn compare(&mut self, at: usize, data: &[u8]) -> Option<usize> {
        for part in self.known(at..at + data.len()) {
            let found = &data[part.start - at..part.end - at];
            if self.bytes[part.clone()] != *found {
                let differs =
                    self.bytes[part.clone()].iter().zip(found).position(|(want, have)| want != have);
                return differs.map(|index| part.start + index);
            }
        }
        self.write(at, data);
        None
    }

    /// Is it certain that not all of the range is zero?
    pub(super) fn surely_not_zero(&self, range: Range<usize>) -> bool {
        const ZEROES: [u8; 4096] = [0; 4096];
        self.known(range)
            .into_iter()
            .any(|part| self.bytes[part].chunks(4096).any(|chunk| *chunk != ZEROES[..chunk.len()]))
    }

    pub(super) fn byte(&self, at: usize) -> u8 {
        self.bytes[at]
    }
}

#[cfg(test)]
mod tests {
    use super::Model;

    #[test]
    fn only_what_is_known_can_be_contradicted() {
        let mut model = Model::new(10);
        assert_eq!(model.compare(0, &[1; 10]), None);
        assert_eq!(model.compare(0, &[1, 1, 2]), Some(2), "it was learnt from the first read");
        model.forget(2..8);
        model.write(4, &[9]);
        assert_eq!(model.known(1..9), [1..2, 4..5, 8..9]);
        assert_eq!(model.compare(3, &[7, 8]), Some(4));
        assert_eq!(model.compare(3, &[7, 9]), None);
        assert_eq!(model.compare(3, &[6]), Some(3));
        model.zero(0..10);
        assert!(!model.surely_not_zero(0..10));
    }
}

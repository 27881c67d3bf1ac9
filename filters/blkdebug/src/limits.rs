//! Limits of a device that is not there: requests come to the child as such a device would get them.

use driveline_sdk::{Bytes, Error, Result};
use std::ops::Range;

/// The limits as they are written; 0: none.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Limits {
    pub(crate) align: u64,
    pub(crate) max_transfer: u64,
    pub(crate) opt_write_zero: u64,
    pub(crate) max_write_zero: u64,
    pub(crate) opt_discard: u64,
    pub(crate) max_discard: u64,
}

/// Limits are below this. Source: QEMU block/blkdebug.c, `blkdebug_open`.
const LIMIT_MAX: u64 = i32::MAX as u64;

impl Limits {
    /// Reads them, over a child that has an alignment of its own. What cannot be is refused in QEMU's words.
    pub(crate) fn new(options: &crate::Options, child_alignment: u32) -> Result<Self> {
        let given = |option: Option<Bytes>| option.map_or(0, |bytes| bytes.0);
        let limits = Self {
            align: given(options.align),
            max_transfer: given(options.max_transfer),
            opt_write_zero: given(options.opt_write_zero),
            max_write_zero: given(options.max_write_zero),
            opt_discard: given(options.opt_discard),
            max_discard: given(options.max_discard),
        };
        if limits.align != 0 && (limits.align >= LIMIT_MAX || !limits.align.is_power_of_two()) {
            let text = format_args!("Cannot meet constraints with align {}", limits.align);
            return Err(Error::option("align", text));
        }
        let align = limits.align.max(u64::from(child_alignment));
        for (key, value, unit) in [
            ("max-transfer", limits.max_transfer, align),
            ("opt-write-zero", limits.opt_write_zero, align),
            ("max-write-zero", limits.max_write_zero, align.max(limits.opt_write_zero)),
            ("opt-discard", limits.opt_discard, align),
            ("max-discard", limits.max_discard, align.max(limits.opt_discard)),
        ] {
            if value != 0 && (value >= LIMIT_MAX || !value.is_multiple_of(unit)) {
                return Err(Error::option(key, format_args!("Cannot meet constraints with {key} {value}")));
            }
        }
        Ok(limits)
    }

    /// The requests that zeroes become.
    pub(crate) fn zeroes(&self, range: Range<u64>) -> impl Iterator<Item = Piece> + use<> {
        pieces(range, self.opt_write_zero.max(self.align).max(1), self.max_write_zero)
    }

    /// The requests that a discard becomes.
    pub(crate) fn discards(&self, range: Range<u64>) -> impl Iterator<Item = Piece> + use<> {
        pieces(range, self.opt_discard.max(self.align).max(1), self.max_discard)
    }
}

/// A part of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) range: Range<u64>,
    /// It is whole units; else a device does not take it.
    pub(crate) whole: bool,
}

/// What is not whole units at both ends by itself, and the rest in steps of `max`, a multiple of `unit` (0: at once).
fn pieces(range: Range<u64>, unit: u64, max: u64) -> impl Iterator<Item = Piece> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        if at >= range.end {
            return None;
        }
        let (head, whole_end) = (at % unit, range.end / unit * unit);
        let end = if head != 0 {
            (at - head).saturating_add(unit).min(range.end)
        } else if whole_end > at {
            whole_end.min(if max == 0 { u64::MAX } else { at.saturating_add(max) })
        } else {
            range.end
        };
        let piece = Piece { range: at..end, whole: head == 0 && end % unit == 0 };
        at = end;
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_whole_units_but_for_the_ends() {
        let split = |range, unit, max| {
            let pieces = pieces(range, unit, max);
            pieces.map(|piece| (piece.range.start, piece.range.end, piece.whole)).collect::<Vec<_>>()
        };
        assert_eq!(split(0..4096, 1, 0), [(0, 4096, true)]);
        assert_eq!(split(0..4096, 1024, 2048), [(0, 2048, true), (2048, 4096, true)]);
        assert_eq!(
            split(100..3000, 1024, 1024),
            [(100, 1024, false), (1024, 2048, true), (2048, 3000, false)]
        );
        assert_eq!(split(100..200, 1024, 0), [(100, 200, false)]);
        assert_eq!(split(0..350, 100, 200), [(0, 200, true), (200, 300, true), (300, 350, false)]);
        assert_eq!(split(5..5, 100, 200), []);
    }
}

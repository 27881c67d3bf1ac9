//! Bitmaps as bytes: the header extension, directory entries, table entries and bits. No I/O, and no panic on any bytes.
//!
//! What is wrong with one of them is said as a text, the reason why it cannot be used.
//!
//! Source: QEMU docs/interop/qcow2.txt, "Bitmaps extension" and "Bitmaps"; limits: block/qcow2-bitmap.c.

use crate::qcow2::layout::{Geometry, OFFSET_MASK, be32, be64};
use driveline_bitmap::{BitmapName, Bits, Granularity};
use std::ops::Range;

pub(super) const BITMAPS_MAX: usize = 65535;
pub(super) const DIRECTORY_BYTES_MAX: u64 = 1024 * 65535;
const TABLE_ENTRIES_MAX: u64 = 0x800_0000;
pub(super) const BITS_BYTES_MAX: u64 = 512 << 20;
/// Bytes of a directory entry before extra data and name.
const FIXED_BYTES: usize = 24;
/// Where in an entry the byte with the flags is that we know.
pub(super) const FLAGS_AT: usize = 15;
const TYPE_DIRTY: u8 = 1;

/// Bits of an entry's flags.
pub(super) mod flags {
    pub(crate) const IN_USE: u32 = 1;
    pub(crate) const AUTO: u32 = 2;
    pub(crate) const EXTRA_COMPATIBLE: u32 = 4;
}

/// A table entry for a cluster of ones. One for a cluster of zeroes is 0.
pub(super) const ONES: u64 = 1;

/// The header extension: where the directory is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::qcow2) struct Place {
    pub(in crate::qcow2) bitmaps: u32,
    pub(in crate::qcow2) bytes: u64,
    pub(in crate::qcow2) offset: u64,
}

impl Place {
    pub(in crate::qcow2) fn parse(data: &[u8], geometry: &Geometry) -> Result<Self, String> {
        if data.len() != 24 {
            return Err(format!("the bitmaps extension has {} bytes, expected 24", data.len()));
        }
        let place = Self { bitmaps: be32(data, 0), bytes: be64(data, 8), offset: be64(data, 16) };
        let reserved = be32(data, 4);
        if reserved != 0 {
            return Err(format!("the reserved field of the bitmaps extension is {reserved:#x}, expected 0"));
        }
        if !(1..=BITMAPS_MAX as u32).contains(&place.bitmaps) {
            return Err(format!(
                "the bitmaps extension counts {} bitmaps, expected 1 to {BITMAPS_MAX}",
                place.bitmaps
            ));
        }
        if !(1..=DIRECTORY_BYTES_MAX).contains(&place.bytes) {
            return Err(format!(
                "the bitmap directory has {} bytes, expected 1 to {DIRECTORY_BYTES_MAX}",
                place.bytes
            ));
        }
        check_offset("the bitmap directory", place.offset, geometry)?;
        Ok(place)
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = self.bitmaps.to_be_bytes().to_vec();
        out.extend([0; 4]);
        out.extend(self.bytes.to_be_bytes());
        out.extend(self.offset.to_be_bytes());
        out
    }

    /// The clusters of the directory, as bytes of the file.
    pub(super) fn range(&self, geometry: &Geometry) -> Range<u64> {
        self.offset..geometry.align_up(self.offset + self.bytes)
    }
}

/// Is it at a cluster's beginning, and not in the header's?
fn check_offset(what: &str, offset: u64, geometry: &Geometry) -> Result<(), String> {
    if offset == 0 || geometry.in_cluster(offset) != 0 || offset > OFFSET_MASK {
        let cluster_bytes = geometry.cluster_bytes();
        return Err(format!("{what} is at {offset:#x}, expected a multiple of {cluster_bytes} below 2^56"));
    }
    Ok(())
}

/// An entry of the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::qcow2) struct Entry {
    pub(in crate::qcow2) table_offset: u64,
    pub(in crate::qcow2) table_entries: u32,
    pub(super) flags: u32,
    pub(super) kind: u8,
    pub(super) granularity_bits: u8,
    pub(super) extra: Vec<u8>,
    pub(in crate::qcow2) name: Vec<u8>,
}

/// Bytes of an entry with its padding.
pub(super) fn entry_bytes(extra_bytes: usize, name_bytes: usize) -> usize {
    (FIXED_BYTES + extra_bytes + name_bytes).next_multiple_of(8)
}

impl Entry {
    /// An entry of ours.
    pub(super) fn new(name: &str, granularity: Granularity, flags: u32) -> Self {
        Self {
            table_offset: 0,
            table_entries: 0,
            flags,
            kind: TYPE_DIRTY,
            granularity_bits: granularity.shift() as u8,
            extra: Vec::new(),
            name: name.as_bytes().to_vec(),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        entry_bytes(self.extra.len(), self.name.len())
    }

    pub(super) fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    pub(super) fn granularity(&self) -> Option<Granularity> {
        1u64.checked_shl(self.granularity_bits.into()).and_then(|bytes| Granularity::new(bytes).ok())
    }

    /// Why it cannot be used, as far as it says itself; where its table is aside.
    pub(super) fn fault(&self) -> Option<String> {
        let name = match str::from_utf8(&self.name) {
            Ok(name) if name.contains('\0') => return Some("its name contains a zero byte".into()),
            Ok(name) => name,
            Err(_) => return Some("its name is not UTF-8".into()),
        };
        if let Err(error) = BitmapName::new(name) {
            return Some(error.to_string());
        }
        if self.kind != TYPE_DIRTY {
            return Some(format!("it is of type {}, expected {TYPE_DIRTY} (dirty tracking)", self.kind));
        }
        if self.granularity().is_none() {
            return Some(format!("its granularity is 2^{}, expected 2^9 to 2^31", self.granularity_bits));
        }
        let known = flags::IN_USE | flags::AUTO | flags::EXTRA_COMPATIBLE;
        if self.flags & !known != 0 {
            return Some(format!("its flags are {:#x}, expected none but {known:#x}", self.flags));
        }
        if !self.extra.is_empty() && !self.has(flags::EXTRA_COMPATIBLE) {
            return Some(format!(
                "it has {} bytes of extra data that must be understood to use it",
                self.extra.len()
            ));
        }
        None
    }

    /// The clusters of its table, as bytes of the file.
    pub(in crate::qcow2) fn table(&self, geometry: &Geometry) -> Result<Range<u64>, String> {
        check_offset("its table", self.table_offset, geometry)?;
        let entries = u64::from(self.table_entries);
        let entries_max = TABLE_ENTRIES_MAX.min(BITS_BYTES_MAX / geometry.cluster_bytes());
        if !(1..=entries_max).contains(&entries) {
            return Err(format!("its table has {entries} entries, expected 1 to {entries_max}"));
        }
        Ok(self.table_offset..geometry.align_up(self.table_offset + entries * 8))
    }

    /// Why the table is not one for a disk of that size.
    pub(super) fn size_fault(&self, geometry: &Geometry, size_bytes: u64) -> Option<String> {
        let expected = table_entries(geometry, size_bytes, self.granularity()?);
        (u64::from(self.table_entries) != expected).then(|| {
            format!(
                "its table has {} entries, expected {expected} for a disk of {size_bytes} bytes",
                self.table_entries
            )
        })
    }
}

/// Reads a directory. That is all or nothing: behind an entry that lies about its length nothing can be found.
pub(in crate::qcow2) fn parse_directory(bytes: &[u8], bitmaps: u32) -> Result<Vec<Entry>, String> {
    let (mut out, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        let number = out.len();
        if number as u64 == u64::from(bitmaps) {
            let left = bytes.len() - at;
            return Err(format!("the bitmap directory goes on for {left} bytes after its {bitmaps} bitmaps"));
        }
        let rest = &bytes[at..];
        let short = |needed: usize| {
            format!(
                "bitmap {number} at {at:#x} of the directory needs {needed} bytes, but only {} are left",
                rest.len()
            )
        };
        if rest.len() < FIXED_BYTES {
            return Err(short(FIXED_BYTES));
        }
        let name_bytes = usize::from(u16::from_be_bytes([rest[18], rest[19]]));
        let extra_bytes = be32(rest, 20) as usize;
        let length = entry_bytes(extra_bytes, name_bytes);
        if rest.len() < length {
            return Err(short(length));
        }
        let name_at = FIXED_BYTES + extra_bytes;
        out.push(Entry {
            table_offset: be64(rest, 0),
            table_entries: be32(rest, 8),
            flags: be32(rest, 12),
            kind: rest[16],
            granularity_bits: rest[17],
            extra: rest[FIXED_BYTES..name_at].to_vec(),
            name: rest[name_at..name_at + name_bytes].to_vec(),
        });
        at += length;
    }
    if out.len() as u64 != u64::from(bitmaps) {
        return Err(format!("the bitmap directory has {} bitmaps, expected {bitmaps}", out.len()));
    }
    Ok(out)
}

/// Writes a directory.
pub(super) fn encode_directory<'a>(entries: impl Iterator<Item = &'a Entry>) -> Vec<u8> {
    let mut out = Vec::new();
    for entry in entries {
        out.extend(entry.table_offset.to_be_bytes());
        out.extend(entry.table_entries.to_be_bytes());
        out.extend(entry.flags.to_be_bytes());
        out.extend([entry.kind, entry.granularity_bits]);
        out.extend((entry.name.len() as u16).to_be_bytes());
        out.extend((entry.extra.len() as u32).to_be_bytes());
        out.extend(&entry.extra);
        out.extend(&entry.name);
        out.resize(out.len().next_multiple_of(8), 0);
    }
    out
}

/// The cluster that an entry of a table points to; `None` if there is none.
pub(in crate::qcow2) fn cluster(word: u64, geometry: &Geometry) -> Result<Option<u64>, String> {
    let wrong = |expected: &str| Err(format!("an entry of its table is {word:#x}, expected {expected}"));
    let offset = word & OFFSET_MASK;
    match word & !OFFSET_MASK {
        0 | ONES if offset == 0 => Ok(None),
        0 if geometry.in_cluster(offset) == 0 => Ok(Some(offset)),
        0 => wrong("a cluster's beginning"),
        _ => wrong("0 in the reserved bits"),
    }
}

/// Bytes of the disk that one cluster of bits stands for.
pub(super) fn coverage(geometry: &Geometry, granularity: Granularity) -> u64 {
    (geometry.cluster_bytes() * 8) << granularity.shift()
}

/// Entries of the table of a bitmap over that many bytes.
pub(super) fn table_entries(geometry: &Geometry, size_bytes: u64, granularity: Granularity) -> u64 {
    size_bytes.div_ceil(coverage(geometry, granularity))
}

/// What a cluster of bits would hold: as a table entry if it is all the same, else `None`.
///
/// The last one is never called ones unless it has no unused bits: those must be zero.
pub(super) fn uniform(bits: &Bits, range: Range<u64>, whole: bool) -> Option<u64> {
    let first = bits.extents(range.clone()).next();
    match first {
        Some(first) if first.range != range => None,
        Some(first) if first.dirty => whole.then_some(ONES),
        _ => Some(0),
    }
}

/// Writes the bits of a range into bytes that are zero, from the first one's lowest bit on.
pub(super) fn encode_bits(bits: &Bits, range: Range<u64>, into: &mut [u8]) {
    let shift = bits.granularity().shift();
    for extent in bits.extents(range.clone()).filter(|extent| extent.dirty) {
        let first = ((extent.range.start - range.start) >> shift) as usize;
        let last = ((extent.range.end - 1 - range.start) >> shift) as usize;
        let (head, tail) = (0xff << (first % 8), 0xff >> (7 - last % 8));
        if first / 8 == last / 8 {
            into[first / 8] |= head & tail;
        } else {
            into[first / 8] |= head;
            into[first / 8 + 1..last / 8].fill(0xff);
            into[last / 8] |= tail;
        }
    }
}

/// Marks what bytes say about the disk from `start` on. Bits behind its end mean nothing.
pub(super) fn decode_bits(from: &[u8], start: u64, bits: &Bits) {
    let shift = bits.granularity().shift();
    let mark = |run: Range<u64>| bits.mark(start + (run.start << shift)..start + (run.end << shift));
    let mut run: Option<u64> = None;
    for (at, bytes) in (0..).step_by(64).zip(from.chunks_exact(8)) {
        let word = u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
        let mut bit = 0;
        while bit < 64 {
            // How many from here on are as the first.
            let rest = word >> bit;
            let same = if rest & 1 == 1 { rest.trailing_ones() } else { rest.trailing_zeros() };
            match run {
                None if rest & 1 == 1 => run = Some(at + u64::from(bit)),
                Some(begin) if rest & 1 == 0 => {
                    mark(begin..at + u64::from(bit));
                    run = None;
                }
                _ => {}
            }
            bit += same.min(64 - bit);
        }
    }
    if let Some(begin) = run {
        mark(begin..from.len() as u64 * 8);
    }
}

#[cfg(test)]
mod tests;

//! The bits of one half: where they are in the file, and what is done to them there.

use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use driveline_bitmap::Bits;

use crate::Result;
use crate::disk::PAGE;
use crate::mapping::Words;
use crate::volume::Volume;

/// Where parts of a region begin and end: pages of the largest size that any machine has.
pub(crate) const ALIGN: u64 = 64 << 10;

/// Granules whose bits are in one page.
const PAGE_BITS: u64 = PAGE as u64 * 8;

/// A part of a region, mapped.
#[derive(Clone, Debug)]
struct Segment {
    /// Which bits.
    bits: Range<u64>,
    place: Range<u64>,
    words: Arc<Words>,
}

/// The bits of one half, dense, in as many places of the file as it grew in steps. Nothing that grew ever moves, so marks
/// need not wait for it. A clone is the same bits.
///
/// Words are little-endian, and the first granule's bit is the lowest.
#[derive(Clone, Debug, Default)]
pub(crate) struct Region {
    segments: Vec<Segment>,
}

impl Region {
    /// Maps what is reserved at `places`.
    pub(crate) fn map(volume: &Volume, places: &[Range<u64>]) -> Result<Self> {
        let mut region = Region::default();
        for place in places {
            region.push(volume, place.clone())?;
        }
        Ok(region)
    }

    /// Adds bits that are at `place`.
    pub(crate) fn push(&mut self, volume: &Volume, place: Range<u64>) -> Result<()> {
        let words = volume.map(place.clone())?;
        let first = self.capacity();
        let bits = first..first + (place.end - place.start) * 8;
        self.segments.push(Segment { bits, place, words });
        Ok(())
    }

    /// How many granules there is room for.
    pub(crate) fn capacity(&self) -> u64 {
        self.segments.last().map_or(0, |segment| segment.bits.end)
    }

    pub(crate) fn places(&self) -> Vec<Range<u64>> {
        self.segments.iter().map(|segment| segment.place.clone()).collect()
    }

    /// Makes granules dirty. What has no room is the caller's mistake.
    #[inline]
    pub(crate) fn mark(&self, granules: Range<u64>) {
        assert!(granules.end <= self.capacity(), "no room was reserved for granules {granules:?}");
        for segment in &self.segments {
            let (first, end) = (granules.start.max(segment.bits.start), granules.end.min(segment.bits.end));
            if first < end {
                let first = first - segment.bits.start;
                segment.mark(first, end - 1 - segment.bits.start);
            }
        }
    }

    /// Makes granules clean. Not at the same time as a mark of one of them.
    pub(crate) fn unmark(&self, granules: Range<u64>) {
        for segment in &self.segments {
            let (first, end) = (granules.start.max(segment.bits.start), granules.end.min(segment.bits.end));
            if first < end {
                let first = first - segment.bits.start;
                for (at, mask) in words_of(first, end - 1 - segment.bits.start) {
                    segment.words[at].fetch_and(!mask.to_le(), Ordering::SeqCst);
                }
            }
        }
    }

    /// Makes the granules from `first` on clean. Not at the same time as a mark of one of them.
    pub(crate) fn clear_from(&self, volume: &Volume, first: u64) -> Result<()> {
        self.walk(volume, |words, bits| {
            for (word, at) in words.iter().zip((bits.start..).step_by(64)) {
                let keep = if at + 64 <= first {
                    u64::MAX
                } else if at >= first {
                    0
                } else {
                    (1 << (first - at)) - 1
                };
                if u64::from_le(word.load(Ordering::Relaxed)) & !keep != 0 {
                    word.fetch_and(keep.to_le(), Ordering::SeqCst);
                }
            }
        })
    }

    /// Makes dirty what is so in `other`.
    pub(crate) fn merge(&self, volume: &Volume, other: &Region) -> Result<()> {
        other.walk(volume, |words, bits| {
            for (word, at) in words.iter().zip((bits.start..).step_by(64)) {
                let mut dirty = u64::from_le(word.load(Ordering::Relaxed));
                while dirty != 0 && at < self.capacity() {
                    let first = dirty.trailing_zeros();
                    let count = (dirty >> first).trailing_ones();
                    self.mark(at + u64::from(first)..at + u64::from(first + count));
                    dirty &= !(u64::MAX >> (64 - count) << first);
                }
            }
        })
    }

    /// Gives `each` all words that may be anything but zero, with the bits that they hold.
    fn walk(&self, volume: &Volume, mut each: impl FnMut(&[AtomicU64], Range<u64>)) -> Result<()> {
        for segment in &self.segments {
            volume.data(segment.place.clone(), |data| {
                let (from, to) = (data.start - segment.place.start, data.end - segment.place.start);
                let bits = segment.bits.start + from * 8..segment.bits.start + to * 8;
                each(&segment.words[(from / 8) as usize..(to / 8) as usize], bits);
                Ok(())
            })?;
        }
        Ok(())
    }
}

impl Segment {
    /// The whole of `first..=last` becomes dirty.
    ///
    /// Sequentially consistent, as are the looks at what extents are active: whoever sees a bit set and then an extent active
    /// knows that the sync which lets the extent go will see the bit.
    #[inline]
    fn mark(&self, first: u64, last: u64) {
        for (at, mask) in words_of(first, last) {
            let mask = mask.to_le();
            // Most writes hit what is dirty already. To look first keeps the page clean and the cache line shared.
            if self.words[at].load(Ordering::SeqCst) & mask != mask {
                self.words[at].fetch_or(mask, Ordering::SeqCst);
            }
        }
    }
}

/// The words that `first..=last` touches, each with the mask of its bits.
#[inline]
fn words_of(first: u64, last: u64) -> impl Iterator<Item = (usize, u64)> {
    let (first_word, last_word) = ((first >> 6) as usize, (last >> 6) as usize);
    (first_word..=last_word).map(move |at| {
        let head = if at == first_word { u64::MAX << (first & 63) } else { u64::MAX };
        let tail = if at == last_word { u64::MAX >> (63 - (last & 63)) } else { u64::MAX };
        (at, head & tail)
    })
}

/// Reads bits from the file, not through a mapping: gives `each` every page that is not all zeros, with its number among the
/// pages of the half.
pub(crate) fn scan(
    volume: &Volume,
    places: &[Range<u64>],
    mut each: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let mut buffer = vec![0; 256 << 10];
    let mut first_page = 0;
    for place in places {
        volume.data(place.clone(), |data| {
            let mut at = data.start;
            while at < data.end {
                let count = (data.end - at).min(buffer.len() as u64) as usize;
                volume.read_at(&mut buffer[..count], at)?;
                let page = first_page + (at - place.start) / PAGE as u64;
                for (page, bytes) in (page..).zip(buffer[..count].chunks_exact(PAGE)) {
                    if bytes.iter().any(|&byte| byte != 0) {
                        each(page, bytes)?;
                    }
                }
                at += count as u64;
            }
            Ok(())
        })?;
        first_page += (place.end - place.start) / PAGE as u64;
    }
    Ok(())
}

/// Adds the bits of a half to `bits`; the return is their checksum.
pub(crate) fn load(volume: &Volume, places: &[Range<u64>], bits: &Bits) -> Result<u32> {
    let mut crc = 0;
    scan(volume, places, |page, bytes| {
        crc = page_crc(crc, page, bytes);
        let first = page * (PAGE_BITS / 64);
        for (at, word) in (first..).zip(bytes.chunks_exact(8)) {
            bits.mark_word(at, u64::from_le_bytes(word.try_into().expect("8 bytes")));
        }
        Ok(())
    })?;
    Ok(crc)
}

/// The checksum of a half: of its pages that are not all zeros, each with its number. So it does not depend on where they are,
/// and costs nothing for what was never written.
pub(crate) fn checksum(volume: &Volume, places: &[Range<u64>]) -> Result<u32> {
    let mut crc = 0;
    scan(volume, places, |page, bytes| {
        crc = page_crc(crc, page, bytes);
        Ok(())
    })?;
    Ok(crc)
}

fn page_crc(crc: u32, page: u64, bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c_append(crc, &page.to_le_bytes()), bytes)
}

/// The checksum of a half that is all clean, or has no place yet.
pub(crate) const CLEAN_CRC: u32 = 0;

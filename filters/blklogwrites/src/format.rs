//! What stands in a log: a super block, then entries, each in a sector of its own with its data behind it. All numbers are
//! little-endian.
//!
//! Source: Linux, Documentation/admin-guide/device-mapper/log-writes.rst, and drivers/md/dm-log-writes.c, `log_write_super`
//! and `log_write_entry`.

use driveline_sdk::{Error, Result};

const MAGIC: u64 = 0x6a_7366_7773_6872;
const VERSION: u64 = 1;

/// Bytes of a super block.
pub(crate) const SUPER_BYTES: usize = 28;

/// Sectors that a log can have.
pub(crate) fn valid_sector(bytes: u64) -> bool {
    // Source: QEMU block/blklogwrites.c: larger than both structures, and no larger than its longest request alignment.
    bytes.is_power_of_two() && (64..=(8 << 20)).contains(&bytes)
}

/// The first sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Super {
    pub(crate) entries: u64,
    pub(crate) sector_bytes: u32,
}

impl Super {
    pub(crate) fn bytes(&self) -> [u8; SUPER_BYTES] {
        let mut bytes = [0; SUPER_BYTES];
        bytes[..8].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[8..16].copy_from_slice(&VERSION.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.entries.to_le_bytes());
        bytes[24..].copy_from_slice(&self.sector_bytes.to_le_bytes());
        bytes
    }

    pub(crate) fn parse(bytes: &[u8; SUPER_BYTES]) -> Result<Self> {
        if word(bytes, 0) != MAGIC {
            return Err(Error::invalid("Invalid log superblock magic"));
        }
        if word(bytes, 1) != VERSION {
            return Err(Error::invalid(format_args!("Unsupported log version {}", word(bytes, 1))));
        }
        let [.., a, b, c, d] = *bytes;
        let sector_bytes = u32::from_le_bytes([a, b, c, d]);
        if !valid_sector(sector_bytes.into()) {
            return Err(Error::invalid(format_args!("Invalid log sector size {sector_bytes}")));
        }
        Ok(Self { entries: word(bytes, 2), sector_bytes })
    }
}

fn word(bytes: &[u8], number: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[number * 8..][..8]);
    u64::from_le_bytes(word)
}

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Where, in sectors of the log's size.
    pub(crate) sector: u64,
    pub(crate) sectors: u64,
    pub(crate) flags: u64,
    /// Bytes of a mark's text; writes have their data without it.
    pub(crate) data_length: u64,
}

impl Entry {
    pub(crate) const BYTES: usize = 32;
    pub(crate) const FLUSH: u64 = 1;
    pub(crate) const FUA: u64 = 2;
    pub(crate) const DISCARD: u64 = 4;
    /// A text that somebody left in the log. We write none, and find the way past them.
    pub(crate) const MARK: u64 = 8;

    pub(crate) fn bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let words = [self.sector, self.sectors, self.flags, self.data_length];
        for (at, word) in bytes.chunks_exact_mut(8).zip(words) {
            at.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    pub(crate) fn parse(bytes: &[u8; Self::BYTES]) -> Self {
        let word = |number| word(bytes, number);
        Self { sector: word(0), sectors: word(1), flags: word(2), data_length: word(3) }
    }

    /// How many sectors of data follow. A mark's text is in its own sector.
    pub(crate) fn sectors_after(&self) -> Option<u64> {
        let none = self.flags & (Self::DISCARD | Self::MARK) != 0;
        if none { Some(0) } else { Some(self.sectors).filter(|sectors| *sectors < 1 << 55) }
    }
}

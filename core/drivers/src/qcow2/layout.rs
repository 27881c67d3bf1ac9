//! Where things are: sizes that follow from the header, and what the words of the tables mean.

use driveline_op::{Error, Result};

/// Bits 9 to 55 of table entries: the offset of a cluster.
pub(crate) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits 9 to 63 of refcount table entries.
pub(crate) const REFTABLE_MASK: u64 = 0xffff_ffff_ffff_fe00;
/// Bits of L1 entries, standard L2 entries and refcount table entries that are zero.
pub(crate) const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
pub(crate) const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
pub(crate) const REFTABLE_RESERVED: u64 = 0x1ff;
/// The refcount is exactly one, so it may be written in place.
pub(crate) const COPIED: u64 = 1 << 63;
/// The cluster is compressed.
pub(crate) const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeroes (version 3).
pub(crate) const ZERO: u64 = 1;
/// Parts of a cluster that has parts.
pub(crate) const SUBCLUSTERS: u64 = 32;
/// The unit in which tables are cached and written.
pub(crate) const SLICE_BYTES_MAX: u64 = 4096;

/// Sizes that follow from the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) version: u32,
    pub(crate) cluster_bits: u32,
    pub(crate) refcount_order: u32,
    /// L2 entries are two words: the second says which of 32 subclusters are allocated, and which are zero.
    pub(crate) extended_l2: bool,
    /// Data is in another file, where the guest has it.
    pub(crate) data_file: bool,
}

impl Geometry {
    pub(crate) fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Where in its cluster an offset is.
    pub(crate) fn in_cluster(&self, offset: u64) -> u64 {
        offset & (self.cluster_bytes() - 1)
    }

    pub(crate) fn align_down(&self, offset: u64) -> u64 {
        offset & !(self.cluster_bytes() - 1)
    }

    pub(crate) fn align_up(&self, offset: u64) -> u64 {
        self.align_down(offset.saturating_add(self.cluster_bytes() - 1))
    }

    /// Entries of an L2 table, as a power of two.
    pub(crate) fn l2_bits(&self) -> u32 {
        self.cluster_bits - 3 - u32::from(self.extended_l2)
    }

    /// Words of an L2 entry.
    pub(crate) fn entry_words(&self) -> usize {
        1 + usize::from(self.extended_l2)
    }

    /// Guest bytes that one L1 entry stands for, as a power of two.
    pub(crate) fn l1_shift(&self) -> u32 {
        self.cluster_bits + self.l2_bits()
    }

    /// Entries of the L1 table of an image of that size.
    pub(crate) fn l1_entries(&self, size_bytes: u64) -> u64 {
        size_bytes.div_ceil(1 << self.l1_shift())
    }

    pub(crate) fn slice_bytes(&self) -> u64 {
        self.cluster_bytes().min(SLICE_BYTES_MAX)
    }

    pub(crate) fn slice_entries(&self) -> u64 {
        self.slice_bytes() / 8 / self.entry_words() as u64
    }

    /// Guest bytes that one slice of an L2 table stands for.
    pub(crate) fn slice_coverage(&self) -> u64 {
        self.slice_entries() << self.cluster_bits
    }

    /// Which L1 entry stands for a guest offset.
    pub(crate) fn l1_index(&self, offset: u64) -> usize {
        (offset >> self.l1_shift()) as usize
    }

    /// The slice of an L2 table that stands for a guest offset, and the entry in it.
    pub(crate) fn slice_of(&self, table: u64, offset: u64) -> (u64, usize) {
        let entry = (offset >> self.cluster_bits) & ((1 << self.l2_bits()) - 1);
        let slice = entry / self.slice_entries();
        (table + slice * self.slice_bytes(), (entry % self.slice_entries()) as usize)
    }

    /// Clusters whose refcounts are in one refcount block.
    pub(crate) fn block_entries(&self) -> u64 {
        (self.cluster_bytes() * 8) >> self.refcount_order
    }

    /// The offset of the L2 table that an L1 entry points to; 0: none.
    pub(crate) fn table(&self, l1_entry: u64) -> Result<u64> {
        let table = l1_entry & OFFSET_MASK;
        if self.in_cluster(table) != 0 {
            return Err(corrupt(format_args!(
                "L1 entry {l1_entry:#x} points to an L2 table that is not at a cluster's beginning"
            )));
        }
        Ok(table)
    }

    /// What an L2 entry says.
    pub(crate) fn mapping(&self, entry: u64) -> Result<Mapping> {
        if entry == 0 {
            return Ok(Mapping::Unallocated);
        }
        if entry & COMPRESSED != 0 {
            if self.data_file {
                return Err(corrupt(format_args!(
                    "L2 entry {entry:#x} is a compressed cluster, which images with a data file lack"
                )));
            }
            return Ok(Mapping::Compressed(entry & !COPIED));
        }
        let host = entry & OFFSET_MASK;
        let copied = entry & COPIED != 0;
        if self.in_cluster(host) != 0 {
            return Err(corrupt(format_args!(
                "L2 entry {entry:#x} points to data that is not at a cluster's beginning"
            )));
        }
        if entry & ZERO != 0 {
            if self.version < 3 {
                return Err(corrupt(format_args!(
                    "L2 entry {entry:#x} is a zero cluster, which version 2 lacks"
                )));
            }
            return Ok(Mapping::Zero { host, copied });
        }
        if host == 0 && !(copied && self.data_file) {
            if copied {
                return Err(corrupt(format_args!("L2 entry {entry:#x} points to the header")));
            }
            return Ok(Mapping::Unallocated);
        }
        Ok(Mapping::Data { host, copied })
    }

    /// What is mapped by itself: a subcluster, or a cluster.
    pub(crate) fn unit_bytes(&self) -> u64 {
        if self.extended_l2 { self.cluster_bytes() / SUBCLUSTERS } else { self.cluster_bytes() }
    }

    /// What the words of L2 entries say of one unit, by its number from the first word on. `host` is where it is itself.
    #[inline]
    pub(crate) fn unit(&self, words: &[u64], number: usize) -> Result<Mapping> {
        if !self.extended_l2 {
            return self.mapping(words[number]);
        }
        let (index, part) = (number / SUBCLUSTERS as usize, (number as u64) % SUBCLUSTERS);
        let (word, bits) = (words[index * 2], words[index * 2 + 1]);
        let cluster = self.mapping(word)?;
        if word & COMPRESSED != 0 {
            return Ok(cluster);
        }
        let (is_data, is_zero) = (bits >> part & 1 != 0, bits >> (SUBCLUSTERS + part) & 1 != 0);
        Ok(match (is_data, is_zero, cluster) {
            (false, true, _) => Mapping::Zero { host: 0, copied: false },
            (false, false, _) => Mapping::Unallocated,
            (true, false, Mapping::Data { host, copied }) => {
                Mapping::Data { host: host + part * self.unit_bytes(), copied }
            }
            _ => {
                return Err(corrupt(format_args!(
                    "L2 entry {word:#x} with subclusters {bits:#x} contradicts itself"
                )));
            }
        })
    }

    /// Where the data of a compressed cluster is: offset, and bytes at most.
    pub(crate) fn compressed(&self, entry: u64) -> (u64, u64) {
        let shift = 62 - (self.cluster_bits - 8);
        let offset = entry & ((1 << shift) - 1);
        let sectors = ((entry & !(COPIED | COMPRESSED)) >> shift) + 1;
        (offset, sectors * 512 - offset % 512)
    }
}

/// An L2 entry: its word, and the bits of its subclusters, where there are some.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) word: u64,
    pub(crate) bits: u64,
}

impl Entry {
    /// An entry without subclusters.
    pub(crate) fn of(word: u64) -> Self {
        Self { word, bits: 0 }
    }

    /// The subclusters that are data.
    pub(crate) fn allocated(self) -> u64 {
        self.bits & u64::from(u32::MAX)
    }

    /// The subclusters that are zeroes.
    pub(crate) fn zeroes(self) -> u64 {
        self.bits >> SUBCLUSTERS
    }
}

/// What an L2 entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// Read it from the backing file.
    Unallocated,
    /// It reads as zeroes; `host` is space kept for it, 0 if none.
    Zero { host: u64, copied: bool },
    /// It is stored at `host`.
    Data { host: u64, copied: bool },
    /// It is stored compressed; see [`Geometry::compressed`].
    Compressed(u64),
}

const DAMAGED: &str = "the qcow2 image is damaged: ";

/// An image that is not what it should be: `EIO`.
pub(crate) fn corrupt(text: impl std::fmt::Display) -> Error {
    Error::new(5, format_args!("{DAMAGED}{text}"))
}

/// Did our own metadata make no sense? Texts stay in the node that they are about, so it cannot be a child's.
pub(crate) fn is_corrupt(error: &Error) -> bool {
    what_is_corrupt(error).is_some()
}

/// What of our own metadata makes no sense.
pub(crate) fn what_is_corrupt(error: &Error) -> Option<&str> {
    error.message()?.strip_prefix(DAMAGED)
}

pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

pub(crate) fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// Big-endian bytes to words.
pub(crate) fn decode_words(bytes: &[u8], words: &mut [u64]) {
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = be64(bytes, 0);
    }
}

/// Words to big-endian bytes.
pub(crate) fn encode_words(words: &[u64], bytes: &mut [u8]) {
    for (word, bytes) in words.iter().zip(bytes.chunks_exact_mut(8)) {
        bytes.copy_from_slice(&word.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const V3: Geometry =
        Geometry { version: 3, cluster_bits: 16, refcount_order: 4, extended_l2: false, data_file: false };

    #[test]
    fn entries_read_as_the_format_says() {
        assert_eq!(V3.mapping(0).unwrap(), Mapping::Unallocated);
        assert_eq!(V3.mapping(1).unwrap(), Mapping::Zero { host: 0, copied: false });
        let data = V3.mapping(COPIED | 0x50000).unwrap();
        assert_eq!(data, Mapping::Data { host: 0x50000, copied: true });
        let kept = V3.mapping(COPIED | 0x50001).unwrap();
        assert_eq!(kept, Mapping::Zero { host: 0x50000, copied: true });
        assert!(V3.mapping(0x50200).unwrap_err().to_string().contains("0x50200"));
        assert!(V3.mapping(COPIED).is_err());
        assert!(Geometry { version: 2, ..V3 }.mapping(1).is_err());
    }

    #[test]
    fn a_compressed_cluster_ends_with_its_last_sector() {
        // 64 KiB clusters: 54 bits of offset, 8 bits of further sectors.
        let entry = COMPRESSED | 3 << 54 | 0x12345;
        assert_eq!(V3.compressed(entry), (0x12345, 4 * 512 - 0x145));
    }

    proptest! {
        #[test]
        fn any_entry_reads_as_something(entry: u64, cluster_bits in 9u32..=21, version in 2u32..=3) {
            let geometry = Geometry { version, cluster_bits, ..V3 };
            if let Ok(Mapping::Compressed(entry)) = geometry.mapping(entry) {
                let (offset, bytes) = geometry.compressed(entry);
                prop_assert!(bytes > 0 && bytes <= 2 * geometry.cluster_bytes() + 512);
                prop_assert!(offset < 1 << 61);
            }
        }
    }
}

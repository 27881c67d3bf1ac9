//! The header: read with every check that needs no other part of the image, and written.

use super::layout::{Geometry, be32, be64};
use driveline_graph::{Error, Kind, Result};
use std::ops::Range;

pub(crate) const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bytes of the header that every image has, and those that every version 3 image has.
pub(crate) const V2_BYTES: usize = 72;
pub(crate) const V3_BYTES: usize = 104;
pub(crate) const CLUSTER_BITS_MIN: u32 = 9;
pub(crate) const CLUSTER_BITS_MAX: u32 = 21;
/// A subcluster is a sector at least.
pub(crate) const EXTENDED_L2_CLUSTER_BITS_MIN: u32 = 14;
pub(crate) const L1_BYTES_MAX: u64 = 32 << 20;
pub(crate) const REFTABLE_BYTES_MAX: u64 = 8 << 20;
pub(crate) const BACKING_NAME_BYTES_MAX: usize = 1023;
pub(crate) const SNAPSHOTS_MAX: u32 = 65536;
/// Offsets of metadata fit the entries that point to it.
const OFFSET_MAX: u64 = 1 << 56;

/// Bits of `incompatible`.
pub(crate) mod incompatible {
    pub(crate) const DIRTY: u64 = 1;
    pub(crate) const CORRUPT: u64 = 2;
    pub(crate) const EXTERNAL_DATA: u64 = 4;
    pub(crate) const COMPRESSION: u64 = 8;
    pub(crate) const EXTENDED_L2: u64 = 16;
    pub(crate) const KNOWN: u64 = 31;
}

/// Bit of `compatible`: refcounts may be stale while the dirty bit is set.
pub(crate) const LAZY_REFCOUNTS: u64 = 1;

/// Bit of `autoclear`: nobody wrote who does not know persistent bitmaps.
pub(crate) const AUTOCLEAR_BITMAPS: u64 = 1;
/// Bit of `autoclear`: the external data file reads as the disk does.
pub(crate) const AUTOCLEAR_RAW_EXTERNAL: u64 = 2;
/// Bit of `autoclear` that no version of the format uses: every writer that follows the format takes it away.
pub(crate) const AUTOCLEAR_WITNESS: u64 = 1 << 63;
/// What a repair keeps up: bitmaps, here and elsewhere, are as true as they were.
pub(crate) const AUTOCLEAR_KNOWN: u64 = AUTOCLEAR_BITMAPS | AUTOCLEAR_RAW_EXTERNAL | AUTOCLEAR_WITNESS;

pub(crate) const EXT_END: u32 = 0;
pub(crate) const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
pub(crate) const EXT_FEATURES: u32 = 0x6803_f857;
pub(crate) const EXT_BITMAPS: u32 = 0x2385_2875;
pub(crate) const EXT_DATA_FILE: u32 = 0x4441_5441;

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate.
    Zlib,
    /// Zstandard.
    Zstd,
}

/// A header extension, kept as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Extension {
    pub(crate) kind: u32,
    pub(crate) data: Vec<u8>,
}

/// A header that passed all checks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) version: u32,
    pub(crate) cluster_bits: u32,
    pub(crate) size_bytes: u64,
    pub(crate) l1_entries: u32,
    pub(crate) l1_offset: u64,
    pub(crate) reftable_offset: u64,
    pub(crate) reftable_clusters: u32,
    pub(crate) snapshots: u32,
    pub(crate) snapshots_offset: u64,
    pub(crate) incompatible: u64,
    pub(crate) compatible: u64,
    pub(crate) autoclear: u64,
    pub(crate) refcount_order: u32,
    pub(crate) compression: Compression,
    /// Fields after those that we know, kept as they are: bytes 104 to the header's length.
    pub(crate) further: Vec<u8>,
    /// All but the format of the backing file.
    pub(crate) extensions: Vec<Extension>,
    pub(crate) backing: Option<String>,
    pub(crate) backing_format: Option<String>,
}

fn corrupt(text: impl std::fmt::Display) -> Error {
    Error::new(Kind::Corrupt, format_args!("the qcow2 header is damaged: {text}"))
}

fn unsupported(text: impl std::fmt::Display) -> Error {
    Error::new(Kind::NotSupported, text)
}

impl Header {
    /// The cluster size, from the first bytes of an image. The header is inside the first cluster.
    pub(crate) fn cluster_bytes_of(bytes: &[u8]) -> Result<usize> {
        if bytes.len() < V2_BYTES || bytes[..4] != MAGIC {
            let found: Vec<_> = bytes.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
            let text =
                format_args!("not a qcow2 image: it begins with [{}], not [51 46 49 fb]", found.join(" "));
            return Err(Error::new(Kind::Invalid, text));
        }
        let version = be32(bytes, 4);
        if !(2..=3).contains(&version) {
            return Err(unsupported(format_args!("qcow2 version {version}; known are 2 and 3")));
        }
        let bits = be32(bytes, 20);
        if !(CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX).contains(&bits) {
            return Err(unsupported(format_args!(
                "clusters of 2^{bits} bytes; expected 2^{CLUSTER_BITS_MIN} to 2^{CLUSTER_BITS_MAX}"
            )));
        }
        Ok(1 << bits)
    }

    /// Reads the first cluster of an image.
    pub(crate) fn parse(cluster: &[u8]) -> Result<Self> {
        let cluster_bytes = Self::cluster_bytes_of(cluster)?;
        let Some(cluster) = cluster.get(..cluster_bytes) else {
            return Err(corrupt(format_args!(
                "it has {} bytes, expected a cluster of {cluster_bytes}",
                cluster.len()
            )));
        };
        let version = be32(cluster, 4);
        match be32(cluster, 32) {
            0 => {}
            1 => return Err(unsupported("the image is encrypted with AES, which is not supported")),
            2 => return Err(unsupported("the image is encrypted with LUKS, which is not supported")),
            other => {
                return Err(corrupt(format_args!("encryption method {other}, expected 0 (none), 1 or 2")));
            }
        }
        let (mut features, mut refcount_order, mut header_bytes) = ([0; 3], 4, V2_BYTES);
        let (mut compression, mut further) = (Compression::Zlib, Vec::new());
        if version >= 3 {
            features = [be64(cluster, 72), be64(cluster, 80), be64(cluster, 88)];
            refcount_order = be32(cluster, 96);
            header_bytes = be32(cluster, 100) as usize;
            if header_bytes < V3_BYTES || !header_bytes.is_multiple_of(8) || header_bytes > cluster_bytes {
                return Err(corrupt(format_args!(
                    "header length {header_bytes}, expected a multiple of 8 from {V3_BYTES} to {cluster_bytes}"
                )));
            }
            if refcount_order > 6 {
                return Err(corrupt(format_args!(
                    "refcounts of 2^{refcount_order} bits, expected 2^6 at most"
                )));
            }
            further = cluster[V3_BYTES..header_bytes].to_vec();
        }
        let [incompatible, compatible, autoclear] = features;
        let backing_offset = be64(cluster, 8);
        let backing_bytes = be32(cluster, 16) as usize;
        let mut backing = None;
        let mut extensions_end = cluster_bytes;
        if backing_offset != 0 {
            if backing_bytes > BACKING_NAME_BYTES_MAX {
                return Err(corrupt(format_args!(
                    "a backing file name of {backing_bytes} bytes, expected {BACKING_NAME_BYTES_MAX} at most"
                )));
            }
            let place =
                usize::try_from(backing_offset).ok().and_then(|at| Some(at..at.checked_add(backing_bytes)?));
            let Some(place) = place.filter(|p| p.start >= header_bytes && p.end <= cluster_bytes) else {
                return Err(corrupt(format_args!(
                    "the backing file name is at {backing_offset}, expected in {header_bytes}..{cluster_bytes}"
                )));
            };
            extensions_end = place.start;
            let name =
                str::from_utf8(&cluster[place]).map_err(|_| corrupt("the backing file name is not UTF-8"))?;
            if name.contains('\0') {
                return Err(corrupt("the backing file name contains a zero byte"));
            }
            backing = (!name.is_empty()).then(|| name.to_owned());
        }
        let (backing_format, extensions) = parse_extensions(&cluster[..extensions_end], header_bytes)?;
        check_incompatible(incompatible, &extensions)?;
        if incompatible & incompatible::EXTENDED_L2 != 0 && be32(cluster, 20) < EXTENDED_L2_CLUSTER_BITS_MIN {
            return Err(corrupt(format_args!(
                "extended L2 entries with clusters of {cluster_bytes} bytes, expected {} at least",
                1u64 << EXTENDED_L2_CLUSTER_BITS_MIN
            )));
        }
        let kind = further.first().copied().unwrap_or(0);
        match (incompatible & incompatible::COMPRESSION != 0, kind) {
            (false, 0) => {}
            (true, 1) => compression = Compression::Zstd,
            (true, 0) => return Err(corrupt("the compression type bit is set, but the type is 0 (zlib)")),
            (false, kind) => {
                return Err(corrupt(format_args!(
                    "compression type {kind} without the compression type bit"
                )));
            }
            (true, kind) => {
                return Err(unsupported(format_args!(
                    "compression type {kind}; known are 0 (zlib) and 1 (zstd)"
                )));
            }
        }
        let header = Self {
            version,
            cluster_bits: be32(cluster, 20),
            size_bytes: be64(cluster, 24),
            l1_entries: be32(cluster, 36),
            l1_offset: be64(cluster, 40),
            reftable_offset: be64(cluster, 48),
            reftable_clusters: be32(cluster, 56),
            snapshots: be32(cluster, 60),
            snapshots_offset: be64(cluster, 64),
            incompatible,
            compatible,
            autoclear,
            refcount_order,
            compression,
            further,
            extensions,
            backing,
            backing_format,
        };
        header.check()?;
        Ok(header)
    }

    /// Checks numbers against each other and against limits.
    fn check(&self) -> Result<()> {
        let geometry = self.geometry();
        let cluster_bytes = geometry.cluster_bytes();
        if self.size_bytes > i64::MAX as u64 {
            return Err(corrupt(format_args!(
                "a size of {} bytes, expected less than 2^63",
                self.size_bytes
            )));
        }
        let at = |what: &str, offset: u64, bytes: u64| {
            if offset == 0 || !offset.is_multiple_of(cluster_bytes) || offset + bytes > OFFSET_MAX {
                return Err(corrupt(format_args!(
                    "the {what} is at {offset:#x}, expected a multiple of {cluster_bytes} after the header"
                )));
            }
            Ok(())
        };
        let l1_bytes = u64::from(self.l1_entries) * 8;
        if l1_bytes > L1_BYTES_MAX {
            return Err(unsupported(format_args!(
                "an L1 table of {l1_bytes} bytes; the limit is {L1_BYTES_MAX}"
            )));
        }
        let needed = geometry.l1_entries(self.size_bytes);
        if u64::from(self.l1_entries) < needed {
            return Err(corrupt(format_args!(
                "an L1 table of {} entries, expected {needed} for {} bytes",
                self.l1_entries, self.size_bytes
            )));
        }
        if self.l1_entries > 0 {
            at("L1 table", checked(self.l1_offset)?, l1_bytes)?;
        }
        let reftable_bytes = u64::from(self.reftable_clusters) << self.cluster_bits;
        if reftable_bytes > REFTABLE_BYTES_MAX {
            return Err(unsupported(format_args!(
                "a refcount table of {reftable_bytes} bytes; the limit is {REFTABLE_BYTES_MAX}"
            )));
        }
        if self.reftable_clusters == 0 {
            return Err(corrupt("the refcount table has 0 clusters, expected at least 1"));
        }
        at("refcount table", checked(self.reftable_offset)?, reftable_bytes)?;
        if self.snapshots > SNAPSHOTS_MAX {
            return Err(corrupt(format_args!(
                "{} snapshots, expected {SNAPSHOTS_MAX} at most",
                self.snapshots
            )));
        }
        if self.snapshots > 0 {
            at("snapshot table", checked(self.snapshots_offset)?, 0)?;
        }
        Ok(())
    }

    /// May it be written to? Says why not.
    pub(crate) fn check_writable(&self) -> Result<()> {
        if self.incompatible & incompatible::CORRUPT != 0 {
            return Err(Error::new(
                Kind::Corrupt,
                "the image is marked as corrupt and can only be opened read-only; \
                 'driveline check-image --repair' may repair it",
            ));
        }
        Ok(())
    }

    /// Must the external data file read as the disk does?
    pub(crate) fn is_raw_external(&self) -> bool {
        self.incompatible & incompatible::EXTERNAL_DATA != 0 && self.autoclear & AUTOCLEAR_RAW_EXTERNAL != 0
    }

    /// The name of the external data file, if it is noted.
    pub(crate) fn data_file(&self) -> Option<String> {
        let name = self.extensions.iter().find(|e| e.kind == EXT_DATA_FILE)?;
        Some(String::from_utf8_lossy(&name.data).trim_end_matches('\0').to_owned())
    }

    pub(crate) fn geometry(&self) -> Geometry {
        Geometry {
            version: self.version,
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            extended_l2: self.incompatible & incompatible::EXTENDED_L2 != 0,
            data_file: self.incompatible & incompatible::EXTERNAL_DATA != 0,
        }
    }

    /// Where the header, the L1 table and the refcount table are.
    pub(crate) fn metadata(&self) -> [Range<u64>; 3] {
        let clusters = |at: u64, bytes: u64| at..self.geometry().align_up(at + bytes);
        [
            clusters(0, 1),
            clusters(self.l1_offset, u64::from(self.l1_entries) * 8),
            clusters(self.reftable_offset, u64::from(self.reftable_clusters) << self.cluster_bits),
        ]
    }

    fn header_bytes(&self) -> usize {
        if self.version >= 3 { V3_BYTES + self.further.len() } else { V2_BYTES }
    }

    /// The header with extensions and the name of the backing file, as it stands at the image's beginning.
    pub(crate) fn encode(&self) -> Result<Vec<u8>> {
        let mut tail = Vec::new();
        let extension = |tail: &mut Vec<u8>, kind: u32, data: &[u8]| {
            tail.extend(kind.to_be_bytes());
            tail.extend((data.len() as u32).to_be_bytes());
            tail.extend(data);
            tail.resize(tail.len().next_multiple_of(8), 0);
        };
        if let Some(format) = &self.backing_format {
            extension(&mut tail, EXT_BACKING_FORMAT, format.as_bytes());
        }
        for e in &self.extensions {
            extension(&mut tail, e.kind, &e.data);
        }
        extension(&mut tail, EXT_END, &[]);
        let mut backing_at = 0;
        if let Some(name) = &self.backing {
            if name.len() > BACKING_NAME_BYTES_MAX {
                return Err(Error::new(
                    Kind::Invalid,
                    format_args!(
                        "a backing file name of {} bytes; the limit is {BACKING_NAME_BYTES_MAX}",
                        name.len()
                    ),
                ));
            }
            backing_at = self.header_bytes() + tail.len();
            tail.extend(name.as_bytes());
        }
        let mut out = Vec::with_capacity(self.header_bytes() + tail.len());
        out.extend(MAGIC);
        out.extend(self.version.to_be_bytes());
        out.extend((backing_at as u64).to_be_bytes());
        out.extend(self.backing.as_ref().map_or(0, |name| name.len() as u32).to_be_bytes());
        out.extend(self.cluster_bits.to_be_bytes());
        out.extend(self.size_bytes.to_be_bytes());
        out.extend(0u32.to_be_bytes());
        out.extend(self.l1_entries.to_be_bytes());
        out.extend(self.l1_offset.to_be_bytes());
        out.extend(self.reftable_offset.to_be_bytes());
        out.extend(self.reftable_clusters.to_be_bytes());
        out.extend(self.snapshots.to_be_bytes());
        out.extend(self.snapshots_offset.to_be_bytes());
        if self.version >= 3 {
            out.extend(self.incompatible.to_be_bytes());
            out.extend(self.compatible.to_be_bytes());
            out.extend(self.autoclear.to_be_bytes());
            out.extend(self.refcount_order.to_be_bytes());
            out.extend((self.header_bytes() as u32).to_be_bytes());
            out.extend(&self.further);
        }
        out.extend(tail);
        if out.len() > 1 << self.cluster_bits {
            return Err(Error::new(
                Kind::Invalid,
                format_args!(
                    "a header of {} bytes with the backing file's name does not fit a cluster of {}",
                    out.len(),
                    1u64 << self.cluster_bits
                ),
            ));
        }
        Ok(out)
    }
}

fn checked(offset: u64) -> Result<u64> {
    if offset < OFFSET_MAX {
        Ok(offset)
    } else {
        Err(corrupt(format_args!("a table is at {offset:#x}, expected less than 2^56")))
    }
}

/// Reads the extensions that begin at `at`, up to the end mark or the end of `area`.
fn parse_extensions(area: &[u8], mut at: usize) -> Result<(Option<String>, Vec<Extension>)> {
    let (mut format, mut extensions) = (None, Vec::new());
    while at + 8 <= area.len() {
        let (kind, length) = (be32(area, at), be32(area, at + 4) as usize);
        if kind == EXT_END {
            break;
        }
        at += 8;
        let Some(data) = at.checked_add(length).and_then(|end| area.get(at..end)) else {
            return Err(corrupt(format_args!(
                "extension {kind:#010x} has {length} bytes, but only {} are left",
                area.len() - at
            )));
        };
        match kind {
            EXT_BACKING_FORMAT => {
                let name =
                    str::from_utf8(data).map_err(|_| corrupt("the backing file's format is not UTF-8"))?;
                format = Some(name.trim_end_matches('\0').to_owned()).filter(|name| !name.is_empty());
            }
            _ => extensions.push(Extension { kind, data: data.to_vec() }),
        }
        at = (at + length).next_multiple_of(8);
    }
    Ok((format, extensions))
}

/// Refuses incompatible features by name.
fn check_incompatible(bits: u64, extensions: &[Extension]) -> Result<()> {
    let unknown = bits & !incompatible::KNOWN;
    if unknown == 0 {
        return Ok(());
    }
    let table = extensions.iter().filter(|e| e.kind == EXT_FEATURES).flat_map(|e| e.data.chunks_exact(48));
    let names: Vec<String> = (0..64)
        .filter(|bit| unknown & 1 << bit != 0)
        .map(|bit| {
            let name = table.clone().find(|entry| entry[0] == 0 && u32::from(entry[1]) == bit);
            let name = name.map(|entry| {
                String::from_utf8_lossy(&entry[2..]).trim_end_matches('\0').escape_debug().to_string()
            });
            format!("bit {bit} ({})", name.as_deref().unwrap_or("without a name"))
        })
        .collect();
    Err(unsupported(format_args!(
        "the image uses incompatible features that are not known: {}",
        names.join(", ")
    )))
}

/// The feature name table that new images get.
pub(crate) fn feature_names() -> Extension {
    const NAMES: [(u8, u8, &str); 8] = [
        (0, 0, "dirty bit"),
        (0, 1, "corrupt bit"),
        (0, 2, "external data file"),
        (0, 3, "compression type"),
        (0, 4, "extended L2 entries"),
        (1, 0, "lazy refcounts"),
        (2, 0, "bitmaps"),
        (2, 1, "raw external data"),
    ];
    let mut data = Vec::with_capacity(48 * NAMES.len());
    for (field, bit, name) in NAMES {
        data.extend([field, bit]);
        data.extend(name.as_bytes());
        data.resize(data.len().next_multiple_of(48), 0);
    }
    Extension { kind: EXT_FEATURES, data }
}

#[cfg(test)]
mod tests;

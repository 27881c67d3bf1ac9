//! A header as bytes: a sealed whole of sealed sections, so that of a damaged one the sound sections can be told.
//!
//! Numbers are little-endian; `text` is a 16-bit length and as many bytes.
//!
//! ```text
//! whole     magic "DRVLSTOR" | version u32 | crc32c u32 of the version and of all that follows | bytes u32 | 0 u32 | sequence u64 | sections
//! section   magic "DRVLSECT" | kind u32 | crc32c u32 of the kind and the body | bytes of the body u32 | 0 u32 | body,
//!           padded with zeros to a multiple of 8
//! base  1   uuid 16 | generation u64 | drive size u64 | boot id 16 | clean u8 | role u8 (0 counts, 1 incoming,
//!           2 superseded) | peer uuid 16 | peer path text | epoch u64 | extent bytes u64 | extents u32 |
//!           start and end of the rings u64 u64 | next id u64
//! owner 2   as it was given
//! row   3   id u64 | name text | log2 of the granularity u8 | view u8 (0 drive, 1 node) | durability u8 (0 volatile,
//!           1 process, 2 power) | flags u8 (1 recording, 2 second half records, 4 frozen) | length u64 | for each half:
//!           crc32c u32, places u16, for each of them its start and end u64 u64
//! ```

use core::ops::Range;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use driveline_bitmap::{BitmapName, Granularity, Half, Record, View};

use super::{Base, Header, REST, Role, Row};
use crate::region::ALIGN;
use crate::{BootId, Durability, LogOptions, Uuid};

const MAGIC: &[u8; 8] = b"DRVLSTOR";
const SECTION: &[u8; 8] = b"DRVLSECT";
pub(crate) const VERSION: u32 = 1;
const WHOLE_BYTES: usize = 32;
const SECTION_BYTES: usize = 24;
const BASE: u32 = 1;
const OWNER: u32 = 2;
const ROW: u32 = 3;
/// Nothing that counts came so far.
const NUMBER_MAX: u64 = 1 << 63;
/// No file is longer.
const OFFSET_MAX: u64 = 1 << 62;

/// What one copy of a header turned out to be.
#[derive(Debug)]
pub(crate) enum Decoded {
    /// As it was written.
    Sound { sequence: u64, header: Header },
    /// Not whole; these of its sections are.
    Damaged { reason: String, base: Option<Base>, owner: Option<Vec<u8>>, rows: Vec<Row> },
    /// Of another version.
    Version(u32),
    /// Nothing was ever written here, or something else was.
    Foreign,
}

/// The header as one copy of it.
pub(crate) fn encode(header: &Header, sequence: u64) -> Vec<u8> {
    let mut out = vec![0; WHOLE_BYTES];
    section(&mut out, BASE, &encode_base(&header.base));
    section(&mut out, OWNER, &header.owner);
    for row in &header.rows {
        section(&mut out, ROW, &encode_row(row));
    }
    out[..8].copy_from_slice(MAGIC);
    out[8..12].copy_from_slice(&VERSION.to_le_bytes());
    let bytes = out.len() as u32;
    out[16..20].copy_from_slice(&bytes.to_le_bytes());
    out[24..32].copy_from_slice(&sequence.to_le_bytes());
    let crc = whole_crc(VERSION, &out[16..]);
    out[12..16].copy_from_slice(&crc.to_le_bytes());
    out
}

/// Puts the checksums of a copy right, whatever it says.
pub(crate) fn reseal(copy: &mut [u8]) {
    for at in (0..copy.len()).step_by(8) {
        let Some(head) = copy.get(at..at + SECTION_BYTES).filter(|head| head.starts_with(SECTION)) else {
            continue;
        };
        let mut input = Input(&head[8..]);
        let (Some(kind), Some(_), Some(bytes)) = (input.u32(), input.u32(), input.u32()) else { continue };
        let start = at + SECTION_BYTES;
        let Some(body) = copy.get(start..start.saturating_add(bytes as usize)) else { continue };
        let crc = section_crc(kind, body);
        copy[at + 12..at + 16].copy_from_slice(&crc.to_le_bytes());
    }
    let Some(head) = copy.get(..WHOLE_BYTES) else { return };
    let bytes = u32::from_le_bytes(head[16..20].try_into().expect("4 bytes"));
    let version = u32::from_le_bytes(head[8..12].try_into().expect("4 bytes"));
    if let Some(whole) = copy.get(16..bytes as usize) {
        let crc = whole_crc(version, whole);
        copy[12..16].copy_from_slice(&crc.to_le_bytes());
    }
}

fn section(out: &mut Vec<u8>, kind: u32, body: &[u8]) {
    out.extend(SECTION);
    out.extend(kind.to_le_bytes());
    out.extend(section_crc(kind, body).to_le_bytes());
    out.extend((body.len() as u32).to_le_bytes());
    out.extend([0; 4]);
    out.extend(body);
    out.resize(out.len().next_multiple_of(8), 0);
}

fn whole_crc(version: u32, rest: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&version.to_le_bytes()), rest)
}

fn section_crc(kind: u32, body: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&kind.to_le_bytes()), body)
}

fn encode_base(base: &Base) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(base.uuid.0);
    out.extend(base.generation.to_le_bytes());
    out.extend(base.drive_size.to_le_bytes());
    out.extend(base.boot_id.0);
    out.push(base.clean.into());
    let (role, peer, path) = match &base.role {
        Role::Counts => (0, [0; 16], None),
        Role::Incoming { from, path } => (1, from.0, Some(path)),
        Role::Superseded { by, path } => (2, by.0, Some(path)),
    };
    out.push(role);
    out.extend(peer);
    text(&mut out, path.map_or(&[][..], |path| path.as_os_str().as_bytes()));
    out.extend(base.epoch.to_le_bytes());
    out.extend(base.log.extent_bytes.to_le_bytes());
    out.extend(base.log.extents.to_le_bytes());
    out.extend(base.rings.start.to_le_bytes());
    out.extend(base.rings.end.to_le_bytes());
    out.extend(base.next_id.to_le_bytes());
    out
}

fn encode_row(row: &Row) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(row.id.to_le_bytes());
    text(&mut out, row.record.name.as_bytes());
    out.push(row.granularity.shift() as u8);
    out.push(matches!(row.view, View::Node).into());
    out.push(row.durability as u8);
    let second = row.record.recorder == Half::Second;
    out.push(u8::from(row.record.recording) | u8::from(second) << 1 | u8::from(row.record.frozen) << 2);
    out.extend(row.record.length.to_le_bytes());
    for (places, crc) in row.places.iter().zip(row.crcs) {
        out.extend(crc.to_le_bytes());
        out.extend((places.len() as u16).to_le_bytes());
        for place in places {
            out.extend(place.start.to_le_bytes());
            out.extend(place.end.to_le_bytes());
        }
    }
    out
}

fn text(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend((bytes.len() as u16).to_le_bytes());
    out.extend(bytes);
}

/// Reads one copy, whatever is there.
pub(crate) fn decode(copy: &[u8]) -> Decoded {
    let found = copy.windows(8).step_by(8).any(|bytes| bytes == SECTION);
    let mut input = Input(copy);
    let (Some(magic), Some(version), Some(crc), Some(bytes)) =
        (input.take(8), input.u32(), input.u32(), input.u32())
    else {
        return Decoded::Foreign;
    };
    if magic != MAGIC && !found {
        return Decoded::Foreign;
    }
    let whole = copy.get(16..bytes as usize).unwrap_or_default();
    let sealed = magic == MAGIC && !whole.is_empty() && whole_crc(version, whole) == crc;
    if sealed && version != VERSION {
        return Decoded::Version(version);
    }
    let copy = if sealed { &copy[..bytes as usize] } else { copy };
    let mut sections = Sections { copy, at: 0 };
    let (mut base, mut owner, mut rows) = (None, None, Vec::new());
    let mut wrong = None;
    for (kind, body) in &mut sections {
        match kind {
            BASE => base = decode_base(body),
            OWNER => owner = Some(body.to_vec()),
            ROW => match decode_row(body) {
                Some(row) => rows.push(row),
                None => wrong = Some("a row of it makes no sense"),
            },
            _ => wrong = Some("it has a section of unknown kind"),
        }
    }
    let overlap = overlap(base.as_ref(), &rows);
    let mut ids: Vec<u64> = rows.iter().map(|row| row.id).collect();
    ids.sort_unstable();
    if ids.windows(2).any(|two| two[0] == two[1]) {
        wrong = Some("two rows of it have one number");
    }
    let sequence = copy.get(24..32).map_or(0, |bytes| u64::from_le_bytes(bytes.try_into().expect("8 bytes")));
    if sequence >= NUMBER_MAX {
        wrong = Some("its number makes no sense");
    }
    let reason = match (sealed, wrong, overlap) {
        (true, None, false) => match (base, owner) {
            (Some(base), Some(owner)) => {
                return Decoded::Sound { sequence, header: Header { base, owner, rows } };
            }
            (base, owner) => {
                let reason = "its first sections are missing".to_owned();
                return Decoded::Damaged { reason, base, owner, rows };
            }
        },
        (false, ..) => "its checksum does not match",
        (true, Some(wrong), _) => wrong,
        (true, None, true) => "places of it overlap",
    };
    if overlap {
        // Nobody can say whose bits those are.
        rows.iter_mut().for_each(|row| row.places = Default::default());
        if let Some(base) = &mut base {
            base.rings = 0..0;
        }
    }
    Decoded::Damaged { reason: reason.to_owned(), base, owner, rows }
}

/// The sound sections of a copy, wherever they are.
struct Sections<'a> {
    copy: &'a [u8],
    at: usize,
}

impl<'a> Iterator for Sections<'a> {
    type Item = (u32, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        while let Some(head) = self.copy.get(self.at..self.at + SECTION_BYTES) {
            let mut input = Input(head);
            let magic = input.take(8)?;
            let (kind, crc, bytes) = (input.u32()?, input.u32()?, input.u32()? as usize);
            let start = self.at + SECTION_BYTES;
            let body = self.copy.get(start..start.saturating_add(bytes));
            self.at += 8;
            if let Some(body) = body.filter(|body| magic == SECTION && section_crc(kind, body) == crc) {
                self.at = (start + bytes).next_multiple_of(8);
                return Some((kind, body));
            }
        }
        None
    }
}

fn decode_base(body: &[u8]) -> Option<Base> {
    let mut input = Input(body);
    let uuid = Uuid(input.array()?);
    let (generation, drive_size) = (input.u64()?, input.u64()?);
    let boot_id = BootId(input.array()?);
    let clean = input.flag()?;
    let role = input.u8()?;
    let peer = Uuid(input.array()?);
    let path = PathBuf::from(OsStr::from_bytes(input.text()?));
    let role = match role {
        0 => Role::Counts,
        1 => Role::Incoming { from: peer, path },
        2 => Role::Superseded { by: peer, path },
        _ => return None,
    };
    let epoch = input.u64()?;
    let log = LogOptions { extent_bytes: input.u64()?, extents: input.u32()? };
    let rings = input.place()?;
    let next_id = input.u64()?;
    let small = [generation, epoch, next_id].iter().all(|&number| number < NUMBER_MAX);
    let fits = small && log.check().is_ok() && rings.end - rings.start == crate::log::rings_bytes(log);
    (fits && input.0.is_empty()).then_some(Base {
        uuid,
        generation,
        drive_size,
        boot_id,
        clean,
        role,
        epoch,
        log,
        rings,
        next_id,
    })
}

fn decode_row(body: &[u8]) -> Option<Row> {
    let mut input = Input(body);
    let id = input.u64()?;
    let name = BitmapName::new(core::str::from_utf8(input.text()?).ok()?).ok()?;
    let granularity = Granularity::new(1_u64.checked_shl(input.u8()?.into())?).ok()?;
    let view = if input.flag()? { View::Node } else { View::Drive };
    let durability = match input.u8()? {
        0 => Durability::Volatile,
        1 => Durability::Process,
        2 => Durability::Power,
        _ => return None,
    };
    let flags = input.u8()?;
    let record = Record {
        name,
        recording: flags & 1 != 0,
        recorder: if flags & 2 != 0 { Half::Second } else { Half::First },
        frozen: flags & 4 != 0,
        length: input.u64()?,
    };
    let (mut places, mut crcs) = ([Vec::new(), Vec::new()], [0; 2]);
    for (places, crc) in places.iter_mut().zip(&mut crcs) {
        *crc = input.u32()?;
        for _ in 0..input.u16()? {
            places.push(input.place()?);
        }
    }
    let fits = flags < 8 && id < NUMBER_MAX && input.0.is_empty();
    fits.then_some(Row { id, granularity, view, durability, record, places, crcs })
}

fn overlap(base: Option<&Base>, rows: &[Row]) -> bool {
    let rings = base.map(|base| base.rings.clone());
    let mut places: Vec<_> =
        rows.iter().flat_map(|row| row.places.iter().flatten().cloned()).chain(rings).collect();
    places.sort_by_key(|place| place.start);
    places.windows(2).any(|two| two[0].end > two[1].start)
}

/// What is left to read.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_le_bytes)
    }

    fn flag(&mut self) -> Option<bool> {
        self.u8().filter(|&flag| flag < 2).map(|flag| flag == 1)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Option<&'a [u8]> {
        let length = self.u16()?;
        self.take(length.into())
    }

    /// A range of the file that may hold bits or a log.
    fn place(&mut self) -> Option<Range<u64>> {
        let place = self.u64()?..self.u64()?;
        let aligned = place.start.is_multiple_of(ALIGN) && place.end.is_multiple_of(ALIGN);
        (aligned && REST <= place.start && place.start < place.end && place.end <= OFFSET_MAX)
            .then_some(place)
    }
}

//! Block status: lists of extents, and the payload that selects contexts.

use super::reader::{Malformed, Reader};
use super::{ContextId, Headers};

/// A range with one status; extents of a list follow each other without gaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, never 0.
    pub length: u64,
    /// What the context says about it.
    pub status: u64,
}

/// How wide the two numbers of an extent are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentWidth {
    /// 32 bits: `BLOCK_STATUS`.
    Narrow,
    /// 64 bits: `BLOCK_STATUS_EXT`.
    Wide,
}

impl ExtentWidth {
    /// Bytes of one extent.
    pub const fn extent_length(self) -> usize {
        match self {
            ExtentWidth::Narrow => 8,
            ExtentWidth::Wide => 16,
        }
    }

    /// The width that goes with a form of headers.
    pub const fn of(headers: Headers) -> ExtentWidth {
        match headers {
            Headers::Compact => ExtentWidth::Narrow,
            Headers::Extended => ExtentWidth::Wide,
        }
    }
}

/// A list of extents as it stands on the wire: a view, decoded one by one while it is iterated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extents<'a> {
    width: ExtentWidth,
    bytes: &'a [u8],
}

impl<'a> Extents<'a> {
    /// Views `bytes`, which must be at least one whole extent, none of them empty.
    pub fn new(width: ExtentWidth, bytes: &'a [u8]) -> Result<Extents<'a>, Malformed> {
        let rest = bytes.len() % width.extent_length();
        if rest != 0 {
            return Err(Malformed::Trailing { length: rest });
        }
        if bytes.is_empty() {
            return Err(Malformed::Field { field: "number of descriptors", value: 0 });
        }
        let extents = Extents { width, bytes };
        if extents.iter().any(|extent| extent.length == 0) {
            return Err(Malformed::Field { field: "extent length", value: 0 });
        }
        Ok(extents)
    }

    /// How wide the extents are.
    pub const fn width(&self) -> ExtentWidth {
        self.width
    }

    /// How many there are.
    pub const fn count(&self) -> usize {
        self.bytes.len() / self.width.extent_length()
    }

    /// The bytes as they stand on the wire.
    pub const fn as_bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The extents in order.
    pub fn iter(&self) -> impl Iterator<Item = Extent> + 'a {
        let width = self.width;
        self.bytes.chunks_exact(width.extent_length()).map(move |bytes| Extent::decode(width, bytes))
    }
}

impl Extent {
    fn decode(width: ExtentWidth, bytes: &[u8]) -> Extent {
        let (length, status) = bytes.split_at(width.extent_length() / 2);
        Extent { length: big_endian(length), status: big_endian(status) }
    }

    /// Appends the extent.
    ///
    /// Shape: a narrow extent has length and status below 2^32.
    pub fn encode(&self, width: ExtentWidth, out: &mut Vec<u8>) {
        match width {
            ExtentWidth::Narrow => {
                debug_assert!(u32::try_from(self.length).is_ok() && u32::try_from(self.status).is_ok());
                out.extend_from_slice(&(self.length as u32).to_be_bytes());
                out.extend_from_slice(&(self.status as u32).to_be_bytes());
            }
            ExtentWidth::Wide => {
                out.extend_from_slice(&self.length.to_be_bytes());
                out.extend_from_slice(&self.status.to_be_bytes());
            }
        }
    }
}

fn big_endian(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// The payload of a block status request that wants only some of the selected contexts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusPayload<'a> {
    /// How much of the export the request is about; the header's length is that of this payload.
    pub effect_length: u64,
    ids: &'a [u8],
}

impl<'a> StatusPayload<'a> {
    /// Reads a payload: eight bytes, then any number of context ids.
    pub fn decode(bytes: &'a [u8]) -> Result<StatusPayload<'a>, Malformed> {
        let mut reader = Reader::new(bytes);
        let effect_length = reader.u64()?;
        let ids = reader.rest();
        match ids.len() % 4 {
            0 => Ok(StatusPayload { effect_length, ids }),
            length => Err(Malformed::Trailing { length }),
        }
    }

    /// The contexts that the client wants, as it named them: they may repeat or not exist.
    pub fn ids(&self) -> impl Iterator<Item = ContextId> + 'a {
        self.ids.chunks_exact(4).map(|id| ContextId(big_endian(id) as u32))
    }

    /// Appends a payload.
    pub fn encode(effect_length: u64, ids: &[ContextId], out: &mut Vec<u8>) {
        out.extend_from_slice(&effect_length.to_be_bytes());
        for id in ids {
            out.extend_from_slice(&id.0.to_be_bytes());
        }
    }
}

//! The replies of the transmission phase: simple, structured and extended.

use super::reader::{Malformed, Reader};
use super::{
    ChunkType, ContextId, Cookie, EXTENDED_REPLY_MAGIC, Errno, ExtentWidth, Extents, Headers, ReplyFlags,
    SIMPLE_REPLY_MAGIC, STRING_LENGTH_MAX, STRUCTURED_REPLY_MAGIC,
};

/// A reply without chunks. Data of a successful read follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimpleReply {
    /// How the request ended.
    pub errno: Errno,
    /// Which request.
    pub cookie: Cookie,
}

impl SimpleReply {
    /// Bytes on the wire.
    pub const LENGTH: usize = 16;

    /// Reads a reply.
    pub fn decode(bytes: &[u8]) -> Result<SimpleReply, Malformed> {
        let mut reader = Reader::new(bytes);
        reader.magic_u32(SIMPLE_REPLY_MAGIC)?;
        let reply = SimpleReply { errno: Errno(reader.u32()?), cookie: Cookie(reader.u64()?) };
        reader.finish()?;
        Ok(reply)
    }

    /// Appends the reply.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        out.extend_from_slice(&self.errno.0.to_be_bytes());
        out.extend_from_slice(&self.cookie.0.to_be_bytes());
    }
}

/// What precedes the payload of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkHeader {
    /// Whether it is the last of its reply.
    pub flags: ReplyFlags,
    /// What it carries.
    pub kind: ChunkType,
    /// Which request it answers.
    pub cookie: Cookie,
    /// The offset of the request; not sent, and 0 when decoded, with compact headers.
    pub offset: u64,
    /// How many bytes of payload follow.
    pub length: u64,
}

impl ChunkHeader {
    /// Bytes on the wire.
    pub const fn length(headers: Headers) -> usize {
        match headers {
            Headers::Compact => 20,
            Headers::Extended => 32,
        }
    }

    /// Reads a header.
    pub fn decode(headers: Headers, bytes: &[u8]) -> Result<ChunkHeader, Malformed> {
        let mut reader = Reader::new(bytes);
        reader.magic_u32(match headers {
            Headers::Compact => STRUCTURED_REPLY_MAGIC,
            Headers::Extended => EXTENDED_REPLY_MAGIC,
        })?;
        let flags = ReplyFlags(reader.u16()?);
        let kind = ChunkType(reader.u16()?);
        let cookie = Cookie(reader.u64()?);
        let (offset, length) = match headers {
            Headers::Compact => (0, reader.u32()?.into()),
            Headers::Extended => (reader.u64()?, reader.u64()?),
        };
        reader.finish()?;
        Ok(ChunkHeader { flags, kind, cookie, offset, length })
    }

    /// Appends the header.
    ///
    /// Shape: with compact headers the payload is below 2^32 bytes.
    pub fn encode(&self, headers: Headers, out: &mut Vec<u8>) {
        let magic = match headers {
            Headers::Compact => STRUCTURED_REPLY_MAGIC,
            Headers::Extended => EXTENDED_REPLY_MAGIC,
        };
        out.extend_from_slice(&magic.to_be_bytes());
        out.extend_from_slice(&self.flags.0.to_be_bytes());
        out.extend_from_slice(&self.kind.0.to_be_bytes());
        out.extend_from_slice(&self.cookie.0.to_be_bytes());
        match headers {
            Headers::Compact => {
                debug_assert!(u32::try_from(self.length).is_ok());
                out.extend_from_slice(&(self.length as u32).to_be_bytes());
            }
            Headers::Extended => {
                out.extend_from_slice(&self.offset.to_be_bytes());
                out.extend_from_slice(&self.length.to_be_bytes());
            }
        }
    }

    /// Appends this header and all of an [`Chunk::OffsetData`] but the data itself, which a server sends from where it lies.
    ///
    /// Effect: kind and length of `self` are set to fit.
    pub fn encode_data(mut self, headers: Headers, offset: u64, data_length: u64, out: &mut Vec<u8>) {
        self.kind = ChunkType::OFFSET_DATA;
        self.length = 8 + data_length;
        self.encode(headers, out);
        out.extend_from_slice(&offset.to_be_bytes());
    }
}

/// The payload of a chunk, understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunk<'a> {
    /// Nothing; the reply is complete.
    None,
    /// Data of a read.
    OffsetData {
        /// Where it belongs in the export.
        offset: u64,
        /// At least one byte.
        data: &'a [u8],
    },
    /// Zeroes of a read.
    OffsetHole {
        /// Where they are in the export.
        offset: u64,
        /// How many, never 0.
        length: u32,
    },
    /// Extents of one context: `BLOCK_STATUS` or `BLOCK_STATUS_EXT` by their width.
    BlockStatus {
        /// Which context.
        context: ContextId,
        /// At least one.
        extents: Extents<'a>,
    },
    /// The request failed.
    Error {
        /// How, never [`Errno::OK`].
        errno: Errno,
        /// A text for humans, often empty.
        message: &'a str,
        /// Where, if it is known: `ERROR_OFFSET` instead of `ERROR`.
        offset: Option<u64>,
    },
    /// A chunk that has no meaning here.
    Unknown(ChunkType),
}

impl<'a> Chunk<'a> {
    /// Understands a payload.
    pub fn decode(kind: ChunkType, payload: &'a [u8]) -> Result<Chunk<'a>, Malformed> {
        let mut reader = Reader::new(payload);
        let chunk = match kind {
            ChunkType::NONE => Chunk::None,
            ChunkType::OFFSET_DATA => {
                let offset = reader.u64()?;
                match reader.rest() {
                    [] => return Err(Malformed::Truncated { missing: 1 }),
                    data => Chunk::OffsetData { offset, data },
                }
            }
            ChunkType::OFFSET_HOLE => match (reader.u64()?, reader.u32()?) {
                (_, 0) => return Err(Malformed::Field { field: "hole size", value: 0 }),
                (offset, length) => Chunk::OffsetHole { offset, length },
            },
            ChunkType::BLOCK_STATUS => Chunk::BlockStatus {
                context: ContextId(reader.u32()?),
                extents: Extents::new(ExtentWidth::Narrow, reader.rest())?,
            },
            ChunkType::BLOCK_STATUS_EXT => {
                let context = ContextId(reader.u32()?);
                let count = reader.u32()?;
                let extents = Extents::new(ExtentWidth::Wide, reader.rest())?;
                if extents.count() != count as usize {
                    return Err(Malformed::Field { field: "descriptor count", value: count.into() });
                }
                Chunk::BlockStatus { context, extents }
            }
            ChunkType::ERROR | ChunkType::ERROR_OFFSET => {
                let errno = Errno(reader.u32()?);
                if errno == Errno::OK {
                    return Err(Malformed::Field { field: "error", value: 0 });
                }
                let length = reader.u16()?.into();
                let message = reader.string(length)?;
                let offset = if kind == ChunkType::ERROR { None } else { Some(reader.u64()?) };
                Chunk::Error { errno, message, offset }
            }
            other => return Ok(Chunk::Unknown(other)),
        };
        reader.finish()?;
        Ok(chunk)
    }

    /// Which type this is.
    pub const fn kind(&self) -> ChunkType {
        match self {
            Chunk::None => ChunkType::NONE,
            Chunk::OffsetData { .. } => ChunkType::OFFSET_DATA,
            Chunk::OffsetHole { .. } => ChunkType::OFFSET_HOLE,
            Chunk::BlockStatus { extents, .. } => match extents.width() {
                ExtentWidth::Narrow => ChunkType::BLOCK_STATUS,
                ExtentWidth::Wide => ChunkType::BLOCK_STATUS_EXT,
            },
            Chunk::Error { offset: None, .. } => ChunkType::ERROR,
            Chunk::Error { offset: Some(_), .. } => ChunkType::ERROR_OFFSET,
            Chunk::Unknown(kind) => *kind,
        }
    }

    /// Bytes of the payload.
    pub const fn payload_length(&self) -> usize {
        match self {
            Chunk::None | Chunk::Unknown(_) => 0,
            Chunk::OffsetData { data, .. } => 8 + data.len(),
            Chunk::OffsetHole { .. } => 12,
            Chunk::BlockStatus { extents, .. } => match extents.width() {
                ExtentWidth::Narrow => 4 + extents.as_bytes().len(),
                ExtentWidth::Wide => 8 + extents.as_bytes().len(),
            },
            Chunk::Error { message, offset: None, .. } => 6 + message.len(),
            Chunk::Error { message, offset: Some(_), .. } => 14 + message.len(),
        }
    }

    /// Appends the chunk with its header.
    ///
    /// `offset` is that of the request and is sent with extended headers only.
    pub fn encode(
        &self,
        headers: Headers,
        flags: ReplyFlags,
        cookie: Cookie,
        offset: u64,
        out: &mut Vec<u8>,
    ) {
        let length = self.payload_length() as u64;
        ChunkHeader { flags, kind: self.kind(), cookie, offset, length }.encode(headers, out);
        match self {
            Chunk::None | Chunk::Unknown(_) => {}
            Chunk::OffsetData { offset, data } => {
                out.extend_from_slice(&offset.to_be_bytes());
                out.extend_from_slice(data);
            }
            Chunk::OffsetHole { offset, length } => {
                out.extend_from_slice(&offset.to_be_bytes());
                out.extend_from_slice(&length.to_be_bytes());
            }
            Chunk::BlockStatus { context, extents } => {
                out.extend_from_slice(&context.0.to_be_bytes());
                if extents.width() == ExtentWidth::Wide {
                    out.extend_from_slice(&(extents.count() as u32).to_be_bytes());
                }
                out.extend_from_slice(extents.as_bytes());
            }
            Chunk::Error { errno, message, offset } => {
                debug_assert!(*errno != Errno::OK && message.len() <= STRING_LENGTH_MAX);
                out.extend_from_slice(&errno.0.to_be_bytes());
                out.extend_from_slice(&(message.len() as u16).to_be_bytes());
                out.extend_from_slice(message.as_bytes());
                if let Some(offset) = offset {
                    out.extend_from_slice(&offset.to_be_bytes());
                }
            }
        }
    }
}

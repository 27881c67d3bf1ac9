//! The answers of a server to options.

use super::reader::{Malformed, Reader, put_string_u32};
use super::{ContextId, InfoType, OptionCode, OptionReplyHeader, ReplyCode, TransmissionFlags};

/// An option reply with its data understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OptionReply<'a> {
    /// Done.
    Ack,
    /// One export of a list.
    Server {
        /// Its name.
        name: &'a str,
        /// A text for humans, often empty.
        description: &'a str,
    },
    /// One aspect of an export.
    Info(Info<'a>),
    /// One metadata context.
    MetaContext {
        /// Its number in this session; 0 in a list.
        id: ContextId,
        /// Its name.
        name: &'a str,
    },
    /// The option failed.
    Error {
        /// How; has its error bit set.
        code: ReplyCode,
        /// A text for humans, often empty.
        message: &'a str,
    },
    /// A reply that has no meaning here.
    Unknown(ReplyCode),
}

/// An aspect of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Info<'a> {
    /// Size and abilities.
    Export {
        /// Size in bytes.
        size_bytes: u64,
        /// Abilities.
        flags: TransmissionFlags,
    },
    /// The canonical name.
    Name(&'a str),
    /// A text for humans.
    Description(&'a str),
    /// How requests should be cut.
    BlockSize(BlockSizes),
    /// An aspect that has no meaning here.
    Unknown(InfoType),
}

/// The size constraints of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of this power of two, at most 64 KiB.
    pub minimum_bytes: u32,
    /// Requests aligned to this power of two are done without read-modify-write.
    pub preferred_bytes: u32,
    /// The largest payload of a request or of a read.
    pub payload_bytes_max: u32,
}

impl<'a> OptionReply<'a> {
    /// Understands the data of a reply.
    pub fn decode(code: ReplyCode, data: &'a [u8]) -> Result<OptionReply<'a>, Malformed> {
        let mut reader = Reader::new(data);
        let reply = match code {
            ReplyCode::ACK => OptionReply::Ack,
            ReplyCode::SERVER => {
                OptionReply::Server { name: reader.string_u32()?, description: reader.string_rest()? }
            }
            ReplyCode::INFO => OptionReply::Info(Info::decode(&mut reader)?),
            ReplyCode::META_CONTEXT => {
                OptionReply::MetaContext { id: ContextId(reader.u32()?), name: reader.string_rest()? }
            }
            code if code.is_error() => OptionReply::Error { code, message: reader.string_rest()? },
            code => return Ok(OptionReply::Unknown(code)),
        };
        reader.finish()?;
        Ok(reply)
    }

    /// Which reply this is.
    pub fn code(&self) -> ReplyCode {
        match self {
            OptionReply::Ack => ReplyCode::ACK,
            OptionReply::Server { .. } => ReplyCode::SERVER,
            OptionReply::Info(_) => ReplyCode::INFO,
            OptionReply::MetaContext { .. } => ReplyCode::META_CONTEXT,
            OptionReply::Error { code, .. } | OptionReply::Unknown(code) => *code,
        }
    }

    /// Appends the reply to `option` with its header.
    pub fn encode(&self, option: OptionCode, out: &mut Vec<u8>) {
        let start = out.len();
        OptionReplyHeader { option, code: self.code(), length: 0 }.encode(out);
        let data = out.len();
        match self {
            OptionReply::Server { name, description } => {
                put_string_u32(out, name);
                out.extend_from_slice(description.as_bytes());
            }
            OptionReply::Info(info) => info.encode(out),
            OptionReply::MetaContext { id, name } => {
                out.extend_from_slice(&id.0.to_be_bytes());
                out.extend_from_slice(name.as_bytes());
            }
            OptionReply::Error { code, message } => {
                debug_assert!(code.is_error());
                out.extend_from_slice(message.as_bytes());
            }
            OptionReply::Ack | OptionReply::Unknown(_) => {}
        }
        let length = (out.len() - data) as u32;
        out[start + 16..data].copy_from_slice(&length.to_be_bytes());
    }
}

impl<'a> Info<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Info<'a>, Malformed> {
        Ok(match InfoType(reader.u16()?) {
            InfoType::EXPORT => {
                Info::Export { size_bytes: reader.u64()?, flags: TransmissionFlags(reader.u16()?) }
            }
            InfoType::NAME => Info::Name(reader.string_rest()?),
            InfoType::DESCRIPTION => Info::Description(reader.string_rest()?),
            InfoType::BLOCK_SIZE => Info::BlockSize(BlockSizes {
                minimum_bytes: reader.u32()?,
                preferred_bytes: reader.u32()?,
                payload_bytes_max: reader.u32()?,
            }),
            other => {
                reader.rest();
                Info::Unknown(other)
            }
        })
    }

    /// Which aspect this is.
    pub fn kind(&self) -> InfoType {
        match self {
            Info::Export { .. } => InfoType::EXPORT,
            Info::Name(_) => InfoType::NAME,
            Info::Description(_) => InfoType::DESCRIPTION,
            Info::BlockSize(_) => InfoType::BLOCK_SIZE,
            Info::Unknown(kind) => *kind,
        }
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.kind().0.to_be_bytes());
        match self {
            Info::Export { size_bytes, flags } => {
                out.extend_from_slice(&size_bytes.to_be_bytes());
                out.extend_from_slice(&flags.0.to_be_bytes());
            }
            Info::Name(text) | Info::Description(text) => out.extend_from_slice(text.as_bytes()),
            Info::BlockSize(sizes) => {
                out.extend_from_slice(&sizes.minimum_bytes.to_be_bytes());
                out.extend_from_slice(&sizes.preferred_bytes.to_be_bytes());
                out.extend_from_slice(&sizes.payload_bytes_max.to_be_bytes());
            }
            Info::Unknown(_) => {}
        }
    }
}

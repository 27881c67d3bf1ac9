//! Fixed-size messages of the handshake.

use super::reader::{Malformed, Reader};
use super::{
    ClientFlags, HandshakeFlags, INIT_PASSWD, OPTION_MAGIC, OPTION_REPLY_MAGIC, OptionCode, ReplyCode,
    TransmissionFlags,
};

/// The first message of all: the server shows itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// What the server can do.
    pub flags: HandshakeFlags,
}

impl Greeting {
    /// Bytes on the wire.
    pub const LENGTH: usize = 18;

    /// Reads a greeting; an oldstyle server is [`Malformed::Magic`].
    pub fn decode(bytes: &[u8]) -> Result<Greeting, Malformed> {
        let mut reader = Reader::new(bytes);
        reader.magic_u64(INIT_PASSWD)?;
        reader.magic_u64(OPTION_MAGIC)?;
        let flags = HandshakeFlags(reader.u16()?);
        reader.finish()?;
        Ok(Greeting { flags })
    }

    /// Appends the greeting.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&INIT_PASSWD.to_be_bytes());
        out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        out.extend_from_slice(&self.flags.0.to_be_bytes());
    }
}

impl ClientFlags {
    /// Bytes on the wire.
    pub const LENGTH: usize = 4;

    /// Reads the client's answer to the greeting. Unknown flags are kept: to refuse them is the server's duty.
    pub fn decode(bytes: &[u8]) -> Result<ClientFlags, Malformed> {
        let mut reader = Reader::new(bytes);
        let flags = ClientFlags(reader.u32()?);
        reader.finish()?;
        Ok(flags)
    }

    /// Appends the flags.
    pub fn encode(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.0.to_be_bytes());
    }
}

/// What precedes the data of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// Which option.
    pub option: OptionCode,
    /// How many bytes of data follow.
    pub length: u32,
}

impl OptionHeader {
    /// Bytes on the wire.
    pub const LENGTH: usize = 16;

    /// Reads a header.
    pub fn decode(bytes: &[u8]) -> Result<OptionHeader, Malformed> {
        let mut reader = Reader::new(bytes);
        reader.magic_u64(OPTION_MAGIC)?;
        let header = OptionHeader { option: OptionCode(reader.u32()?), length: reader.u32()? };
        reader.finish()?;
        Ok(header)
    }

    /// Appends the header.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        out.extend_from_slice(&self.option.0.to_be_bytes());
        out.extend_from_slice(&self.length.to_be_bytes());
    }
}

/// What precedes the data of an option reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option that is answered.
    pub option: OptionCode,
    /// What the answer is.
    pub code: ReplyCode,
    /// How many bytes of data follow.
    pub length: u32,
}

impl OptionReplyHeader {
    /// Bytes on the wire.
    pub const LENGTH: usize = 20;

    /// Reads a header.
    pub fn decode(bytes: &[u8]) -> Result<OptionReplyHeader, Malformed> {
        let mut reader = Reader::new(bytes);
        reader.magic_u64(OPTION_REPLY_MAGIC)?;
        let header = OptionReplyHeader {
            option: OptionCode(reader.u32()?),
            code: ReplyCode(reader.u32()?),
            length: reader.u32()?,
        };
        reader.finish()?;
        Ok(header)
    }

    /// Appends the header.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
        out.extend_from_slice(&self.option.0.to_be_bytes());
        out.extend_from_slice(&self.code.0.to_be_bytes());
        out.extend_from_slice(&self.length.to_be_bytes());
    }
}

/// The answer to [`OptionCode::EXPORT_NAME`]: it has a form of its own, and no way to say no.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportNameReply {
    /// Size of the export in bytes.
    pub size_bytes: u64,
    /// What the export can do.
    pub flags: TransmissionFlags,
}

impl ExportNameReply {
    /// Zeroes that follow unless [`ClientFlags::NO_ZEROES`] was agreed.
    const ZEROES: usize = 124;

    /// Bytes on the wire.
    pub const fn length(no_zeroes: bool) -> usize {
        if no_zeroes { 10 } else { 10 + ExportNameReply::ZEROES }
    }

    /// Reads the answer.
    pub fn decode(bytes: &[u8], no_zeroes: bool) -> Result<ExportNameReply, Malformed> {
        let mut reader = Reader::new(bytes);
        let reply = ExportNameReply { size_bytes: reader.u64()?, flags: TransmissionFlags(reader.u16()?) };
        if !no_zeroes {
            reader.take(ExportNameReply::ZEROES)?;
        }
        reader.finish()?;
        Ok(reply)
    }

    /// Appends the answer.
    pub fn encode(&self, no_zeroes: bool, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.size_bytes.to_be_bytes());
        out.extend_from_slice(&self.flags.0.to_be_bytes());
        if !no_zeroes {
            out.extend_from_slice(&[0; ExportNameReply::ZEROES]);
        }
    }
}

//! The requests of the transmission phase.

use super::reader::{Malformed, Reader};
use super::{Command, CommandFlags, Cookie, EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC};

/// Which form requests have, agreed in the handshake.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Headers {
    /// 28 bytes with a 32-bit length.
    #[default]
    Compact,
    /// 32 bytes with a 64-bit length.
    Extended,
}

impl Headers {
    /// Bytes of a request without its payload.
    pub const fn request_length(self) -> usize {
        match self {
            Headers::Compact => 28,
            Headers::Extended => 32,
        }
    }
}

/// A request without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// How it is to be done.
    pub flags: CommandFlags,
    /// What is to be done.
    pub command: Command,
    /// The client's name for it.
    pub cookie: Cookie,
    /// Where it begins.
    pub offset: u64,
    /// How long it is, or how long its payload is: see [`Request::payload_length`].
    pub length: u64,
}

impl Request {
    /// How many bytes follow the header.
    ///
    /// A write always has a payload. Any other command has one only with extended headers and if the flag says so, so
    /// that a server that does not know a command can still find the next one.
    ///
    /// By proto.md the flag is needed for an extended write, too; but QEMU 10.0 leaves it out there as a client, and takes a
    /// payload for granted as a server.
    pub const fn payload_length(&self, headers: Headers) -> u64 {
        let write = self.command.0 == Command::WRITE.0;
        let announced =
            matches!(headers, Headers::Extended) && self.flags.contains(CommandFlags::PAYLOAD_LEN);
        if write || announced { self.length } else { 0 }
    }

    /// Appends the request.
    ///
    /// Shape: a compact request has a length below 2^32.
    pub fn encode(&self, headers: Headers, out: &mut Vec<u8>) {
        let magic = match headers {
            Headers::Compact => REQUEST_MAGIC,
            Headers::Extended => EXTENDED_REQUEST_MAGIC,
        };
        out.extend_from_slice(&magic.to_be_bytes());
        out.extend_from_slice(&self.flags.0.to_be_bytes());
        out.extend_from_slice(&self.command.0.to_be_bytes());
        out.extend_from_slice(&self.cookie.0.to_be_bytes());
        out.extend_from_slice(&self.offset.to_be_bytes());
        match headers {
            Headers::Compact => {
                debug_assert!(u32::try_from(self.length).is_ok());
                out.extend_from_slice(&(self.length as u32).to_be_bytes());
            }
            Headers::Extended => out.extend_from_slice(&self.length.to_be_bytes()),
        }
    }
}

/// Reads one request from exactly [`Headers::request_length`] bytes: the first stage of a request's path.
///
/// Errors: only a wrong magic number (or a wrong amount of bytes) is one. The stream is then out of step, and the
/// only answer is to close it. What a request asks for is judged later, by whoever knows the export.
#[inline]
pub fn parse(headers: Headers, bytes: &[u8]) -> Result<Request, Malformed> {
    let mut reader = Reader::new(bytes);
    reader.magic_u32(match headers {
        Headers::Compact => REQUEST_MAGIC,
        Headers::Extended => EXTENDED_REQUEST_MAGIC,
    })?;
    let request = Request {
        flags: CommandFlags(reader.u16()?),
        command: Command(reader.u16()?),
        cookie: Cookie(reader.u64()?),
        offset: reader.u64()?,
        length: match headers {
            Headers::Compact => reader.u32()?.into(),
            Headers::Extended => reader.u64()?,
        },
    };
    reader.finish()?;
    tracing::trace!(
        target: "driveline::io",
        stage = "parse",
        command = ?request.command,
        offset = request.offset,
        length = request.length,
        id = request.cookie.0,
    );
    Ok(request)
}

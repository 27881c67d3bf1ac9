//! What a server answers. Every number in it is looked at before it is believed: a server that breaks the protocol, on purpose or
//! not, ends the link, and never the program.

use super::{
    calls::{Asked, CallId},
    link::{Ended, Link},
    terms::Terms,
};
use driveline_transport::{Receive, Transport};
use driveline_wire::{
    Chunk, ChunkHeader, ChunkType, Command, ContextId, Errno, Headers, Malformed, ReplyFlags,
    SIMPLE_REPLY_MAGIC, STRING_LENGTH_MAX, SimpleReply,
};
use std::io;

/// The longest payload of a chunk that is not data: so many extents nobody asked for.
const CHUNK_BYTES_MAX: u64 = 1 << 20;
/// The same for one that tells of an error.
const ERROR_BYTES_MAX: u64 = STRING_LENGTH_MAX as u64 + 14;

/// Why reading ends.
enum Stop {
    Lost(io::Error),
    Violated(String),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Stop {
        Stop::Lost(error)
    }
}

impl From<Malformed> for Stop {
    fn from(error: Malformed) -> Stop {
        Stop::Violated(error.to_string())
    }
}

fn violated<T>(why: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::Violated(why.into()))
}

/// Reads answers until the connection ends.
pub(super) async fn read<T: Transport>(
    link: &Link,
    transport: &T,
    receive: &mut Receive,
    terms: &Terms,
) -> Ended {
    let mut replies = Replies { link, transport, receive, terms, scratch: Vec::new(), answered: false };
    loop {
        match replies.next().await {
            Ok(()) => {}
            Err(Stop::Lost(error)) => return Ended::Lost(error),
            Err(Stop::Violated(why)) => return Ended::Violated(why),
        }
    }
}

struct Replies<'a, T> {
    link: &'a Link,
    transport: &'a T,
    receive: &'a mut Receive,
    terms: &'a Terms,
    scratch: Vec<u8>,
    /// Has this connection brought an answer?
    answered: bool,
}

impl<T: Transport> Replies<'_, T> {
    async fn take<const N: usize>(&mut self, at_end: &str) -> Result<[u8; N], Stop> {
        let bytes = self.receive.take(self.transport, N).await?;
        let ended = || io::Error::new(io::ErrorKind::UnexpectedEof, at_end.to_owned());
        Ok(bytes.ok_or_else(ended)?.try_into().expect("that many bytes were asked for"))
    }

    /// One reply, or one chunk of one.
    async fn next(&mut self) -> Result<(), Stop> {
        const HEADER_MAX: usize = ChunkHeader::length(Headers::Extended);
        let mut header = [0; HEADER_MAX];
        let magic: [u8; 4] = self.take("server dropped connection").await?;
        header[..4].copy_from_slice(&magic);
        let simple = u32::from_be_bytes(magic) == SIMPLE_REPLY_MAGIC;
        if simple && self.terms.headers == Headers::Extended {
            return violated("a simple reply, though extended headers were agreed");
        }
        if !simple && !self.terms.structured {
            return violated(format!("{magic:x?} begins no simple reply"));
        }
        if simple {
            let rest: [u8; SimpleReply::LENGTH - 4] = self.take("an answer was cut off").await?;
            header[4..SimpleReply::LENGTH].copy_from_slice(&rest);
            return self.simple(SimpleReply::decode(&header[..SimpleReply::LENGTH])?).await;
        }
        let length = match self.terms.headers {
            Headers::Compact => {
                let rest: [u8; ChunkHeader::length(Headers::Compact) - 4] =
                    self.take("an answer was cut off").await?;
                header[4..4 + rest.len()].copy_from_slice(&rest);
                4 + rest.len()
            }
            Headers::Extended => {
                let rest: [u8; HEADER_MAX - 4] = self.take("an answer was cut off").await?;
                header[4..].copy_from_slice(&rest);
                HEADER_MAX
            }
        };
        self.chunk(ChunkHeader::decode(self.terms.headers, &header[..length])?).await
    }

    fn asked(&self, id: CallId) -> Result<Asked, Stop> {
        match self.link.calls().asked(id) {
            Some(asked) => Ok(asked),
            None => violated("an answer to a request that nobody sent"),
        }
    }

    async fn simple(&mut self, reply: SimpleReply) -> Result<(), Stop> {
        let id = CallId::of(reply.cookie);
        let asked = self.asked(id)?;
        if self.terms.structured && matches!(asked.command, Command::READ | Command::BLOCK_STATUS) {
            return violated(format!("a simple reply to {}", asked.command));
        }
        if reply.errno != Errno::OK {
            self.link.calls().failed(id, reply.errno);
        } else if asked.command == Command::READ {
            self.data(id, asked, asked.offset, asked.length).await?;
        }
        self.complete(id)
    }

    async fn chunk(&mut self, header: ChunkHeader) -> Result<(), Stop> {
        let id = CallId::of(header.cookie);
        let asked = self.asked(id)?;
        if self.terms.headers == Headers::Extended && header.offset != asked.offset {
            return violated("an answer with the offset of another request");
        }
        let done = header.flags.contains(ReplyFlags::DONE);
        match header.kind {
            ChunkType::NONE if header.length == 0 && done => {}
            ChunkType::OFFSET_DATA if asked.command == Command::READ && header.length > 8 => {
                let offset = u64::from_be_bytes(self.take("an answer was cut off").await?);
                self.data(id, asked, offset, header.length - 8).await?;
            }
            ChunkType::OFFSET_HOLE if asked.command == Command::READ => {
                self.payload(header.length, CHUNK_BYTES_MAX).await?;
                let Chunk::OffsetHole { offset, length } = Chunk::decode(header.kind, &self.scratch)? else {
                    return violated("a hole that is none");
                };
                self.hole(id, asked, offset, length.into())?;
            }
            ChunkType::BLOCK_STATUS | ChunkType::BLOCK_STATUS_EXT
                if asked.command == Command::BLOCK_STATUS =>
            {
                let wide = header.kind == ChunkType::BLOCK_STATUS_EXT;
                if wide != (self.terms.headers == Headers::Extended) {
                    return violated("extents of the wrong width");
                }
                self.payload(header.length, CHUNK_BYTES_MAX).await?;
                let Chunk::BlockStatus { context, extents } = Chunk::decode(header.kind, &self.scratch)?
                else {
                    return violated("extents that are none");
                };
                self.extents(id, context, extents.iter().next())?;
            }
            kind if kind.is_error() => {
                self.payload(header.length, ERROR_BYTES_MAX).await?;
                let (errno, message) = match Chunk::decode(kind, &self.scratch) {
                    Ok(Chunk::Error { errno, message, .. }) => (errno, message),
                    // An error of a kind that is not known is an error.
                    Ok(_) => (Errno::EINVAL, ""),
                    Err(error) => return Err(error.into()),
                };
                if !message.is_empty() {
                    tracing::debug!(target: "driveline::nbd", command = %asked.command, %errno, message, "server reported");
                }
                self.link.calls().failed(id, errno);
            }
            kind => {
                return violated(format!(
                    "a chunk {kind} of {} bytes answers {}",
                    header.length, asked.command
                ));
            }
        }
        if done { self.complete(id) } else { Ok(()) }
    }

    /// Reads a payload that is looked at as a whole.
    async fn payload(&mut self, length: u64, limit: u64) -> Result<(), Stop> {
        if length > limit {
            return violated(format!("an answer with {length} bytes, at most {limit} make sense"));
        }
        self.scratch.resize(length as usize, 0);
        Ok(self.receive.fill(self.transport, &mut self.scratch).await?)
    }

    /// Where in its request a part of an answer lies.
    fn part(asked: Asked, offset: u64, length: u64) -> Result<std::ops::Range<u64>, Stop> {
        let start = offset.checked_sub(asked.offset);
        let part = start.and_then(|start| Some(start..start.checked_add(length)?));
        match part {
            Some(part) if part.end <= asked.length => Ok(part),
            _ => violated("data that nobody asked for"),
        }
    }

    async fn data(&mut self, id: CallId, asked: Asked, offset: u64, length: u64) -> Result<(), Stop> {
        let part = Self::part(asked, offset, length)?;
        let buffer = self.link.calls().take_buffer(id);
        let Some(mut buffer) = buffer else { return violated("an answer to a request that is gone") };
        // What is lost here with the connection is lost with it: the whole answer will come again.
        self.receive.fill(self.transport, &mut buffer[part.start as usize..part.end as usize]).await?;
        self.filled(id, buffer, part)
    }

    fn hole(&mut self, id: CallId, asked: Asked, offset: u64, length: u64) -> Result<(), Stop> {
        let part = Self::part(asked, offset, length)?;
        let buffer = self.link.calls().take_buffer(id);
        let Some(mut buffer) = buffer else { return violated("an answer to a request that is gone") };
        buffer[part.start as usize..part.end as usize].fill(0);
        self.filled(id, buffer, part)
    }

    fn filled(
        &self,
        id: CallId,
        buffer: driveline_op::Buffer,
        part: std::ops::Range<u64>,
    ) -> Result<(), Stop> {
        self.link.calls().filled(id, buffer, part).map_err(|why| Stop::Violated(why.into()))
    }

    fn extents(
        &self,
        id: CallId,
        context: ContextId,
        first: Option<driveline_wire::Extent>,
    ) -> Result<(), Stop> {
        if self.terms.context != Some(context) {
            return violated(format!("extents of context {}, which was not selected", context.0));
        }
        if let Some(extent) = first {
            self.link.calls().extent(id, extent);
        }
        Ok(())
    }

    fn complete(&mut self, id: CallId) -> Result<(), Stop> {
        let waker = self.link.calls().complete(id).map_err(|why| Stop::Violated(why.into()))?;
        if !std::mem::replace(&mut self.answered, true) {
            self.link.answered();
        }
        if let Some(waker) = waker {
            waker.wake();
        }
        Ok(())
    }
}

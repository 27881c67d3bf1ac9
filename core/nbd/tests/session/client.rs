//! The other end: a client as small as tests need it, made of the same codec.

use std::collections::HashMap;
use std::io::{self, IoSlice, IoSliceMut};

use driveline_nbd::Transport;
use driveline_nbd::wire::*;

use crate::pipe::Pipe;

/// How replies shall look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Simple,
    Structured,
    Extended,
}

pub(crate) const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];

/// An option reply that owns its text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) code: ReplyCode,
    pub(crate) data: Vec<u8>,
}

impl Reply {
    pub(crate) fn meaning(&self) -> OptionReply<'_> {
        OptionReply::decode(self.code, &self.data).unwrap()
    }
}

/// The reply to a request, put together from its chunks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) errno: Errno,
    pub(crate) message: String,
    pub(crate) data: Vec<u8>,
    pub(crate) extents: HashMap<u32, Vec<(u64, u64)>>,
}

pub(crate) struct Client {
    pub(crate) pipe: Pipe,
    pub(crate) mode: Mode,
    pub(crate) size_bytes: u64,
    pub(crate) flags: TransmissionFlags,
    /// Offset and length of reads that wait for their answer: a simple reply tells neither.
    reads: HashMap<u64, (u64, usize)>,
    next_cookie: u64,
}

impl Client {
    /// Reads the greeting and answers it.
    pub(crate) async fn greet(pipe: Pipe) -> Client {
        Client::greet_with(pipe, ClientFlags::KNOWN).await
    }

    pub(crate) async fn greet_with(pipe: Pipe, flags: ClientFlags) -> Client {
        let client = Client {
            pipe,
            mode: Mode::Simple,
            size_bytes: 0,
            flags: TransmissionFlags::EMPTY,
            reads: HashMap::new(),
            next_cookie: 1,
        };
        let greeting = client.receive(Greeting::LENGTH).await.unwrap();
        assert_eq!(Greeting::decode(&greeting).unwrap().flags, HandshakeFlags::KNOWN);
        let mut out = Vec::new();
        flags.encode(&mut out);
        client.send(&out).await.unwrap();
        client
    }

    /// All of a handshake: the mode, the contexts, the export `disk`.
    pub(crate) async fn go(pipe: Pipe, mode: Mode, contexts: &[&str]) -> Client {
        let mut client = Client::greet(pipe).await;
        client.agree(mode).await;
        if !contexts.is_empty() {
            let request = MetaContextRequest { export: "disk", queries: contexts.to_vec() };
            let replies = client.option(&OptionRequest::SetMetaContext(request)).await;
            assert_eq!(replies.last().unwrap().code, ReplyCode::ACK);
        }
        let request = InfoRequest { export: "disk", infos: vec![InfoType::BLOCK_SIZE] };
        let replies = client.option(&OptionRequest::Go(request)).await;
        assert_eq!(replies.last().unwrap().code, ReplyCode::ACK);
        for reply in &replies {
            if let OptionReply::Info(Info::Export { size_bytes, flags }) = reply.meaning() {
                (client.size_bytes, client.flags) = (size_bytes, flags);
            }
        }
        client
    }

    pub(crate) async fn agree(&mut self, mode: Mode) {
        self.mode = mode;
        let option = match mode {
            Mode::Simple => return,
            Mode::Structured => OptionRequest::StructuredReply,
            Mode::Extended => OptionRequest::ExtendedHeaders,
        };
        assert_eq!(self.option(&option).await.last().unwrap().code, ReplyCode::ACK);
    }

    pub(crate) fn headers(&self) -> Headers {
        if self.mode == Mode::Extended { Headers::Extended } else { Headers::Compact }
    }

    pub(crate) async fn send(&self, bytes: &[u8]) -> io::Result<()> {
        self.pipe.write_all(&[IoSlice::new(bytes)]).await
    }

    /// Exactly so many bytes.
    pub(crate) async fn receive(&self, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        let mut filled = 0;
        while filled < length {
            match self.pipe.read(&mut [IoSliceMut::new(&mut bytes[filled..])]).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => filled += read,
            }
        }
        Ok(bytes)
    }

    /// Sends an option and reads all its replies.
    pub(crate) async fn option(&mut self, option: &OptionRequest<'_>) -> Vec<Reply> {
        let mut out = Vec::new();
        option.encode(&mut out);
        self.raw_option(option.code(), &out[OptionHeader::LENGTH..]).await.unwrap()
    }

    /// The same with data of any kind.
    pub(crate) async fn raw_option(&mut self, option: OptionCode, data: &[u8]) -> io::Result<Vec<Reply>> {
        let mut out = Vec::new();
        OptionHeader { option, length: data.len() as u32 }.encode(&mut out);
        out.extend_from_slice(data);
        self.send(&out).await?;
        let mut replies = Vec::new();
        loop {
            let header = OptionReplyHeader::decode(&self.receive(OptionReplyHeader::LENGTH).await?).unwrap();
            assert_eq!(header.option, option);
            let data = self.receive(header.length as usize).await?;
            replies.push(Reply { code: header.code, data });
            if header.code == ReplyCode::ACK || header.code.is_error() {
                return Ok(replies);
            }
        }
    }

    /// Sends a request. With extended headers a payload sets its flag.
    pub(crate) async fn request(
        &mut self,
        command: Command,
        flags: CommandFlags,
        offset: u64,
        length: u64,
        payload: &[u8],
    ) -> u64 {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        if command == Command::READ {
            self.reads.insert(cookie, (offset, length as usize));
        }
        let flags = flags.with(CommandFlags::PAYLOAD_LEN, self.mode == Mode::Extended && !payload.is_empty());
        let mut out = Vec::new();
        Request { flags, command, cookie: Cookie(cookie), offset, length }.encode(self.headers(), &mut out);
        out.extend_from_slice(payload);
        self.send(&out).await.unwrap();
        cookie
    }

    /// Sends a request and waits for its answer; nothing else is under way.
    pub(crate) async fn call(
        &mut self,
        command: Command,
        flags: CommandFlags,
        offset: u64,
        length: u64,
        payload: &[u8],
    ) -> Answer {
        let cookie = self.request(command, flags, offset, length, payload).await;
        let (answered, answer) = self.answer().await.unwrap();
        assert_eq!(answered, cookie);
        answer
    }

    pub(crate) async fn read(&mut self, offset: u64, length: u64) -> Answer {
        self.call(Command::READ, CommandFlags::EMPTY, offset, length, &[]).await
    }

    pub(crate) async fn write(&mut self, offset: u64, data: &[u8]) -> Answer {
        self.call(Command::WRITE, CommandFlags::EMPTY, offset, data.len() as u64, data).await
    }

    /// The next complete answer, whichever request it belongs to. This server never interleaves chunks.
    pub(crate) async fn answer(&mut self) -> io::Result<(u64, Answer)> {
        let mut answer = Answer::default();
        if self.mode != Mode::Extended {
            let start = self.receive(16).await?;
            if let Ok(reply) = SimpleReply::decode(&start) {
                answer.errno = reply.errno;
                let read = self.reads.remove(&reply.cookie.0);
                if let Some((_, length)) = read {
                    assert_eq!(self.mode, Mode::Simple, "a read is answered in chunks when that was agreed");
                    if reply.errno == Errno::OK {
                        answer.data = self.receive(length).await?;
                    }
                }
                return Ok((reply.cookie.0, answer));
            }
            let mut bytes = start;
            bytes.extend(self.receive(4).await?);
            return self.chunks(bytes, answer).await;
        }
        let bytes = self.receive(32).await?;
        self.chunks(bytes, answer).await
    }

    async fn chunks(&mut self, first: Vec<u8>, mut answer: Answer) -> io::Result<(u64, Answer)> {
        assert_ne!(self.mode, Mode::Simple);
        let mut bytes = first;
        loop {
            let header = ChunkHeader::decode(self.headers(), &bytes).unwrap();
            let payload = self.receive(header.length as usize).await?;
            match Chunk::decode(header.kind, &payload).unwrap() {
                Chunk::None => assert!(header.flags.contains(ReplyFlags::DONE)),
                Chunk::OffsetData { offset, data } => {
                    let (start, length) = self.reads[&header.cookie.0];
                    answer.data.resize(length, 0);
                    let at = (offset - start) as usize;
                    answer.data[at..at + data.len()].copy_from_slice(data);
                }
                Chunk::OffsetHole { .. } => answer.data.resize(self.reads[&header.cookie.0].1, 0),
                Chunk::BlockStatus { context, extents } => {
                    let extents = extents.iter().map(|extent| (extent.length, extent.status)).collect();
                    assert!(answer.extents.insert(context.0, extents).is_none(), "one chunk a context");
                }
                Chunk::Error { errno, message, .. } => {
                    (answer.errno, answer.message) = (errno, message.to_owned());
                }
                other => panic!("unexpected {other:?}"),
            }
            if header.flags.contains(ReplyFlags::DONE) {
                self.reads.remove(&header.cookie.0);
                return Ok((header.cookie.0, answer));
            }
            bytes = self.receive(ChunkHeader::length(self.headers())).await?;
        }
    }

    /// Leaves in good order.
    pub(crate) async fn leave(mut self) {
        self.request(Command::DISC, CommandFlags::EMPTY, 0, 0, &[]).await;
        assert!(self.answer().await.is_err(), "there is no reply to a disconnect");
    }
}

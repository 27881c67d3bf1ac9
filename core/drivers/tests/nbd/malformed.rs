//! A server that does whatever a test wants: what is no answer ends the link, and never the program.

use crate::kit::{Folder, ask, engine, errno, open, seed, write};
use driveline_op::op;
use driveline_wire::*;
use futures::future::join;
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::json;
use std::{
    io::{self, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    thread,
};

const SIZE: u64 = 1 << 20;

/// How a server answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Simple,
    Structured,
    Extended,
}

impl Mode {
    fn headers(self) -> Headers {
        if self == Mode::Extended { Headers::Extended } else { Headers::Compact }
    }
}

/// The server's side of a connection.
struct Peer {
    stream: UnixStream,
    mode: Mode,
}

impl Peer {
    fn take(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// A handshake without fault, unless `spoil` changes what is sent; then it ends there, since
    /// the other side may only wait for more.
    fn handshake(&mut self, spoil: &mut impl FnMut(&mut Vec<u8>) -> bool) -> io::Result<()> {
        let mut out = Vec::new();
        Greeting { flags: HandshakeFlags::KNOWN }.encode(&mut out);
        let spoiled = spoil(&mut out);
        self.stream.write_all(&out)?;
        if spoiled {
            return Ok(());
        }
        self.take(ClientFlags::LENGTH)?;
        loop {
            let header = OptionHeader::decode(&self.take(OptionHeader::LENGTH)?).unwrap();
            self.take(header.length as usize)?;
            let mut out = Vec::new();
            let option = header.option;
            let refused = OptionReply::Error { code: ReplyCode::ERR_UNSUP, message: "no" };
            match option {
                OptionCode::EXTENDED_HEADERS if self.mode == Mode::Extended => {
                    OptionReply::Ack.encode(option, &mut out)
                }
                OptionCode::STRUCTURED_REPLY if self.mode == Mode::Structured => {
                    OptionReply::Ack.encode(option, &mut out)
                }
                OptionCode::SET_META_CONTEXT => {
                    let name = "base:allocation";
                    OptionReply::MetaContext { id: ContextId(5), name }.encode(option, &mut out);
                    OptionReply::Ack.encode(option, &mut out);
                }
                OptionCode::GO => {
                    let flags = TransmissionFlags::KNOWN.beyond(TransmissionFlags::READ_ONLY);
                    OptionReply::Info(Info::Export { size_bytes: SIZE, flags }).encode(option, &mut out);
                    let sizes =
                        BlockSizes { minimum_bytes: 1, preferred_bytes: 4096, payload_bytes_max: 1 << 25 };
                    OptionReply::Info(Info::BlockSize(sizes)).encode(option, &mut out);
                    OptionReply::Ack.encode(option, &mut out);
                }
                _ => refused.encode(option, &mut out),
            }
            let spoiled = spoil(&mut out);
            self.stream.write_all(&out)?;
            if spoiled || option == OptionCode::GO {
                return Ok(());
            }
        }
    }

    fn request(&mut self) -> io::Result<Request> {
        let headers = self.mode.headers();
        let request = parse(headers, &self.take(headers.request_length())?).unwrap();
        self.take(request.payload_length(headers) as usize)?;
        Ok(request)
    }

    /// An answer without fault.
    fn answer(&self, request: &Request) -> Vec<u8> {
        let (mut out, headers) = (Vec::new(), self.mode.headers());
        let (cookie, offset) = (request.cookie, request.offset);
        let data = vec![7; request.length as usize];
        let mut extents = Vec::new();
        let width = ExtentWidth::of(headers);
        Extent { length: request.length.max(1), status: 0 }.encode(width, &mut extents);
        match (self.mode, request.command) {
            (Mode::Simple, command) => {
                SimpleReply { errno: Errno::OK, cookie }.encode(&mut out);
                if command == Command::READ {
                    out.extend(data);
                }
            }
            (_, Command::READ) => {
                let (half, rest) = data.split_at(data.len() / 2);
                let hole = Chunk::OffsetHole { offset, length: half.len() as u32 };
                hole.encode(headers, ReplyFlags::EMPTY, cookie, offset, &mut out);
                let data = Chunk::OffsetData { offset: offset + half.len() as u64, data: rest };
                data.encode(headers, ReplyFlags::DONE, cookie, offset, &mut out);
            }
            (_, Command::BLOCK_STATUS) => {
                let extents = Extents::new(width, &extents).unwrap();
                let status = Chunk::BlockStatus { context: ContextId(5), extents };
                status.encode(headers, ReplyFlags::DONE, cookie, offset, &mut out);
            }
            _ => Chunk::None.encode(headers, ReplyFlags::DONE, cookie, offset, &mut out),
        }
        out
    }
}

/// Serves one connection with `serve`; those after it are shut at once.
fn server(socket: &Path, mode: Mode, serve: impl FnOnce(Peer) + Send + 'static) {
    let listener = UnixListener::bind(socket).unwrap();
    thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        serve(Peer { stream, mode });
    });
}

fn mutate(bytes: &mut Vec<u8>, random: &mut StdRng) {
    for _ in 0..random.random_range(1..4) {
        let at = random.random_range(0..=bytes.len().min(40));
        match random.random_range(0..5) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.random_range(0..8),
            1 if at < bytes.len() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random.random_range(0..5)],
            2 => bytes.truncate(at),
            3 => bytes.insert(at.min(bytes.len()), random.random()),
            _ => bytes.extend((0..random.random_range(0..40)).map(|_| random.random::<u8>())),
        }
    }
}

/// Every request ends, with one outcome or another, whatever comes in place of an answer.
#[test]
fn no_answer_breaks_the_driver() {
    let (engine, seed) = (engine(), seed());
    for round in 0..150 {
        let mut random = StdRng::seed_from_u64(seed.wrapping_add(round));
        let mode = [Mode::Simple, Mode::Structured, Mode::Extended][random.random_range(0..3)];
        let folder = Folder::new();
        server(&folder.socket(), mode, move |mut peer| {
            peer.handshake(&mut |_| false).unwrap();
            let sound = random.random_range(0..3);
            for number in 0.. {
                let Ok(request) = peer.request() else { return };
                let mut out = peer.answer(&request);
                if number >= sound {
                    mutate(&mut out, &mut random);
                }
                // A mutant may only leave the other side waiting: this is the end of it.
                if peer.stream.write_all(&out).is_err() || number >= sound {
                    return;
                }
            }
        });
        let options = folder.options(json!({}));
        engine.block_on_local(|| async move {
            let node = open(options).await.unwrap();
            for _ in 0..2 {
                let reads =
                    join(ask(&node, op::READ, 100, 1000, 0), ask(&node, op::BLOCK_STATUS, 0, SIZE, 0));
                join(reads, write(&node, 5000, &[1; 100], 0)).await;
            }
            node.node.close(&[]).await.unwrap();
        });
    }
}

#[test]
fn no_handshake_breaks_the_driver() {
    let (engine, seed) = (engine(), seed());
    for round in 0..150 {
        let mut random = StdRng::seed_from_u64(seed.wrapping_add(round));
        let mode = [Mode::Simple, Mode::Structured, Mode::Extended][random.random_range(0..3)];
        let folder = Folder::new();
        server(&folder.socket(), mode, move |mut peer| {
            let mut left = random.random_range(0..4);
            let spoiled = peer.handshake(&mut |out| {
                if left > 0 {
                    left -= 1;
                    return false;
                }
                mutate(out, &mut random);
                true
            });
            drop(spoiled);
        });
        let options = json!({ "server": { "type": "unix", "path": folder.socket() } });
        engine.block_on_local(|| async move {
            if let Ok(node) = open(options).await {
                ask(&node, op::READ, 0, 512, 0).await;
                node.node.close(&[]).await.unwrap();
            }
        });
    }
}

/// What one wrong answer does: the request fails, and the link is given up.
fn gives_up(mode: Mode, wrong: impl FnOnce(&Request) -> Vec<u8> + Send + 'static) {
    let (engine, folder) = (engine(), Folder::new());
    server(&folder.socket(), mode, move |mut peer| {
        peer.handshake(&mut |_| false).unwrap();
        let request = peer.request().unwrap();
        let _ = peer.stream.write_all(&wrong(&request));
        // Until the client goes, so that it is the answer that ends it.
        let _ = peer.stream.read(&mut [0; 100]);
    });
    let options = folder.options(json!({ "reconnect-delay": 3600 }));
    engine.block_on_local(|| async move {
        let node = open(options).await.unwrap();
        assert_eq!(errno(&ask(&node, op::READ, 4096, 1000, 0).await), libc::EIO);
        assert_eq!(node.node.details()["state"], "given up: the server broke the protocol");
        assert_eq!(errno(&ask(&node, op::READ, 0, 512, 0).await), libc::EIO);
        node.node.close(&[]).await.unwrap();
    });
}

#[test]
fn answers_that_cannot_be_are_not_believed() {
    let chunk = |mode: Mode, offset: i64, length: usize, flags: ReplyFlags| {
        move |request: &Request| {
            let (mut out, data) = (Vec::new(), vec![1; length]);
            let at = request.offset.wrapping_add_signed(offset);
            Chunk::OffsetData { offset: at, data: &data }.encode(
                mode.headers(),
                flags,
                request.cookie,
                request.offset,
                &mut out,
            );
            out
        }
    };
    for mode in [Mode::Structured, Mode::Extended] {
        // Before, behind and beyond what was asked for; a part only.
        gives_up(mode, chunk(mode, -1, 10, ReplyFlags::DONE));
        gives_up(mode, chunk(mode, 999, 2, ReplyFlags::DONE));
        gives_up(mode, chunk(mode, i64::MIN, 10, ReplyFlags::DONE));
        gives_up(mode, chunk(mode, 0, 999, ReplyFlags::DONE));
        // The same twice.
        gives_up(mode, move |request| {
            let mut out = chunk(mode, 0, 600, ReplyFlags::EMPTY)(request);
            out.extend(chunk(mode, 400, 600, ReplyFlags::DONE)(request));
            out
        });
        // Of no request, and of another kind.
        gives_up(mode, move |request| {
            chunk(mode, 0, 1000, ReplyFlags::DONE)(&Request {
                cookie: Cookie(request.cookie.0 ^ 1 << 32),
                ..*request
            })
        });
        gives_up(mode, move |request| {
            let mut out = Vec::new();
            SimpleReply { errno: Errno::EIO, cookie: request.cookie }.encode(&mut out);
            out
        });
        // An endless one.
        gives_up(mode, move |request| {
            let (mut out, cookie) = (Vec::new(), request.cookie);
            let header = ChunkHeader {
                flags: ReplyFlags::DONE,
                kind: ChunkType::OFFSET_HOLE,
                cookie,
                offset: request.offset,
                length: u32::MAX.into(),
            };
            header.encode(mode.headers(), &mut out);
            out
        });
    }
    gives_up(Mode::Simple, |_| b"HTTP/1.1 400 Bad Request\r\n".to_vec());
    gives_up(Mode::Simple, |request| {
        let mut out = Vec::new();
        SimpleReply { errno: Errno::OK, cookie: Cookie(!request.cookie.0) }.encode(&mut out);
        out
    });
}

//! A connection at work: requests out, answers in, both at the same time in one task.

use super::{
    connect::{Connected, Way},
    link::{Ended, Link},
    replies,
    terms::Terms,
};
use driveline_op::Buffer;
use driveline_transport::Transport;
use driveline_wire::{Command, CommandFlags, Cookie, Headers, Request};
use std::{
    future::{Future, poll_fn},
    io::{self, IoSlice},
    pin::pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

/// Requests that go out together ...
const BATCH_REQUESTS: usize = 64;
/// ... unless they are this long.
const BATCH_BYTES: usize = 512 << 10;
/// Parts of one write: a header and a payload for each request.
const PARTS_MAX: usize = 2 * BATCH_REQUESTS;

/// Runs until the connection ends in one way or another.
pub(super) async fn run(link: &Link, connected: &mut Connected) -> Ended {
    let Connected { way, receive, terms } = connected;
    match way {
        Way::Plain(stream) => both(link, stream, receive, terms).await,
        Way::Tls(stream) => {
            let ended = both(link, &**stream, receive, terms).await;
            once(stream.finish());
            ended
        }
    }
}

async fn both<T: Transport>(
    link: &Link,
    transport: &T,
    receive: &mut driveline_transport::Receive,
    terms: &Terms,
) -> Ended {
    let ended = {
        let mut reader = pin!(replies::read(link, transport, receive, terms));
        let mut writer = pin!(send(link, transport, terms.headers));
        poll_fn(|cx| {
            if link.is_closed(cx) {
                return Poll::Ready(Ended::Closed);
            }
            if link.is_cut() {
                let cut = io::Error::new(io::ErrorKind::ConnectionAborted, "it was cut");
                return Poll::Ready(Ended::Lost(cut));
            }
            if let Poll::Ready(error) = writer.as_mut().poll(cx) {
                return Poll::Ready(Ended::Lost(error));
            }
            reader.as_mut().poll(cx)
        })
        .await
    };
    if let Ended::Closed = ended {
        let request = Request {
            flags: CommandFlags::EMPTY,
            command: Command::DISC,
            cookie: Cookie(0),
            offset: 0,
            length: 0,
        };
        let mut out = Vec::new();
        request.encode(terms.headers, &mut out);
        // Nothing was in flight, so there is room for it; and who does not take it is none the worse.
        once(transport.write_all(&[IoSlice::new(&out)]));
    }
    ended
}

/// Does as much of it as can be done without waiting: a courtesy.
fn once(future: impl Future) {
    let _ = pin!(future).poll(&mut Context::from_waker(Waker::noop()));
}

/// Sends what is queued, again and again, until the connection fails.
async fn send<T: Transport>(link: &Link, transport: &T, headers: Headers) -> io::Error {
    let mut batch = Batch::default();
    loop {
        // The outer loop has noted the task's waker, so that it hears of the first request that comes.
        poll_fn(|_| if link.calls().waiting() { Poll::Ready(()) } else { Poll::Pending }).await;
        batch.collect(link, headers);
        let outcome = batch.write(transport).await;
        batch.clear();
        if let Err(error) = outcome {
            return error;
        }
    }
}

/// Requests on their way out: headers in one place, payload where it lies.
#[derive(Default)]
struct Batch {
    heads: Vec<u8>,
    parts: Vec<Part>,
}

enum Part {
    /// The next so many bytes of the heads.
    Heads(usize),
    Data(Arc<Buffer>),
}

impl Batch {
    fn collect(&mut self, link: &Link, headers: Headers) {
        let mut calls = link.calls();
        let (mut requests, mut bytes) = (0, 0);
        while requests < BATCH_REQUESTS && bytes < BATCH_BYTES {
            let Some((id, asked, payload)) = calls.next() else { break };
            let extended_write = headers == Headers::Extended && asked.command == Command::WRITE;
            let request = Request {
                flags: asked.flags.with(CommandFlags::PAYLOAD_LEN, extended_write),
                command: asked.command,
                cookie: id.cookie(),
                offset: asked.offset,
                length: asked.length,
            };
            let before = self.heads.len();
            request.encode(headers, &mut self.heads);
            let added = self.heads.len() - before;
            match self.parts.last_mut() {
                Some(Part::Heads(length)) => *length += added,
                _ => self.parts.push(Part::Heads(added)),
            }
            requests += 1;
            bytes += added;
            if let Some(payload) = payload {
                bytes += payload.len();
                self.parts.push(Part::Data(payload));
            }
        }
    }

    async fn write(&self, transport: &impl Transport) -> io::Result<()> {
        let mut slices = [IoSlice::new(&[]); PARTS_MAX];
        let mut heads = &self.heads[..];
        for (slice, part) in slices.iter_mut().zip(&self.parts) {
            *slice = IoSlice::new(match part {
                Part::Heads(length) => {
                    let (head, rest) = heads.split_at(*length);
                    heads = rest;
                    head
                }
                Part::Data(data) => data,
            });
        }
        transport.write_all(&slices[..self.parts.len()]).await
    }

    fn clear(&mut self) {
        self.heads.clear();
        self.parts.clear();
    }
}

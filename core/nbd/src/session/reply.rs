//! From storage to the connection: turns outcomes into replies.

use std::borrow::Cow;

use driveline_op::Buffer;

use super::Session;
use crate::export::Storage;
use driveline_transport::Transport;
use driveline_wire::{
    Chunk, ChunkHeader, ChunkType, Command, Errno, Headers, ReplyFlags, Request, STRING_LENGTH_MAX,
    SimpleReply,
};

/// A request at its end.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) request: Request,
    pub(super) admitted_bytes: usize,
    pub(super) buffer: Buffer,
    pub(super) outcome: Outcome,
}

/// How it ended.
#[derive(Debug)]
pub(super) enum Outcome {
    /// Well, and there is nothing to say about it.
    Done,
    /// Well, and the buffer holds what was read.
    Data,
    /// Well, and these chunks are the reply.
    Chunks(Vec<u8>),
    Failed(Failure),
}

/// Why a request failed: for the program and for the human.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) errno: Errno,
    pub(super) message: Cow<'static, str>,
}

impl<T: Transport, S: Storage> Session<'_, T, S> {
    /// Last stage of a request's path: queues the reply, which is sent with all others that are ready by then.
    pub(super) fn reply(&self, done: Done) {
        let Done { request, admitted_bytes, buffer, outcome } = done;
        let errno = match &outcome {
            Outcome::Failed(failure) => failure.errno,
            _ => Errno::OK,
        };
        tracing::trace!(
            target: "driveline::io",
            stage = "reply",
            command = ?request.command,
            %errno,
            id = request.cookie.0,
        );
        let state = &mut *self.state.borrow_mut();
        if state.deaf {
            state.pool.give(buffer);
            return;
        }
        let (headers, structured) = (self.terms.headers, self.terms.structured);
        // Simple replies do for what has no payload; reads and extended headers need chunks.
        let chunked = headers == Headers::Extended || structured && request.command == Command::READ;
        let simple = SimpleReply { errno, cookie: request.cookie };
        let batch = &mut state.batch;
        match outcome {
            Outcome::Data if chunked => {
                let header = ChunkHeader {
                    flags: ReplyFlags::DONE,
                    kind: ChunkType::OFFSET_DATA,
                    cookie: request.cookie,
                    offset: request.offset,
                    length: 0,
                };
                batch.head(|out| header.encode_data(headers, request.offset, buffer.len() as u64, out));
                batch.data(buffer);
            }
            Outcome::Data => {
                batch.head(|out| simple.encode(out));
                batch.data(buffer);
            }
            Outcome::Chunks(chunks) => batch.bytes(chunks),
            Outcome::Failed(failure) if structured => {
                let message = clipped(&failure.message);
                let chunk = Chunk::Error { errno, message, offset: None };
                let (cookie, offset) = (request.cookie, request.offset);
                batch.head(|out| chunk.encode(headers, ReplyFlags::DONE, cookie, offset, out));
                state.pool.give(buffer);
            }
            Outcome::Done if chunked => {
                let (cookie, offset) = (request.cookie, request.offset);
                batch.head(|out| Chunk::None.encode(headers, ReplyFlags::DONE, cookie, offset, out));
                state.pool.give(buffer);
            }
            Outcome::Done | Outcome::Failed(_) => {
                batch.head(|out| simple.encode(out));
                state.pool.give(buffer);
            }
        }
        state.batch.count(admitted_bytes);
        self.step();
    }
}

/// As much of `text` as a string of the protocol may hold.
fn clipped(text: &str) -> &str {
    &text[..text.floor_char_boundary(STRING_LENGTH_MAX)]
}

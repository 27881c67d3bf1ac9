//! From the connection to storage: reads requests, judges them, and begins them.

use std::borrow::Cow;

use driveline_op::{Answer, Ask, Buffer, flag, op};

use super::judge::{Refusal, invalid, judge, judge_range};
use super::reply::{Done, Failure, Outcome};
use super::{Session, status};
use crate::export::Storage;
use crate::fault::Fault;
use crate::limits::{SKIP_BYTES_MAX, STATUS_BYTES_MAX};
use driveline_transport::Receive;
use driveline_transport::Transport;
use driveline_wire::{self, Command, CommandFlags, Errno, Request, StatusPayload};

/// A request that was found good, with all that it needs.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) request: Request,
    /// How much of the export it is about.
    pub(super) length: u64,
    /// What a write stores, or where a read goes.
    pub(super) buffer: Buffer,
    /// What it was admitted with.
    pub(super) admitted_bytes: usize,
    /// For block status: which of the selected contexts, by index; `None` for all.
    pub(super) wanted: Option<Vec<usize>>,
}

impl<T: Transport, S: Storage> Session<'_, T, S> {
    /// Reads requests and hands those that are good to `start`, until the client leaves.
    pub(super) async fn read_requests(
        &self,
        receive: &mut Receive,
        mut start: impl FnMut(Job),
    ) -> Result<(), Fault> {
        let headers = self.terms.headers;
        loop {
            if !receive.may_have(headers.request_length()) && !self.state.borrow().batch.is_empty() {
                // Nothing more has come, so the answers go out before the connection is asked again.
                self.yield_turn().await;
            }
            let Some(bytes) = receive.take(self.transport, headers.request_length()).await? else {
                return Ok(());
            };
            let request = driveline_wire::parse(headers, bytes)?;
            if request.command == Command::DISC {
                return Ok(());
            }
            match judge(&self.terms, &request) {
                Ok(()) => self.submit(receive, request, &mut start).await?,
                Err(refusal) => self.refuse(receive, request, refusal).await?,
            }
        }
    }

    /// Second stage of a request's path: gets memory and payload, and begins it.
    ///
    /// Shape: `request` was judged.
    async fn submit(
        &self,
        receive: &mut Receive,
        request: Request,
        start: &mut impl FnMut(Job),
    ) -> Result<(), Fault> {
        let mut job = Job {
            request,
            length: request.length,
            buffer: Buffer::default(),
            admitted_bytes: 0,
            wanted: None,
        };
        match request.command {
            Command::READ | Command::WRITE => {
                let length = request.length as usize;
                // What the pool will hand out for it.
                job.admitted_bytes = length.next_power_of_two();
                self.admit(job.admitted_bytes).await;
                job.buffer = self.state.borrow_mut().pool.take(length);
                if request.command == Command::WRITE {
                    receive.fill(self.transport, &mut job.buffer).await?;
                }
            }
            Command::BLOCK_STATUS => {
                if request.flags.contains(CommandFlags::PAYLOAD_LEN) {
                    match self.status_payload(receive, &request).await? {
                        Ok((length, wanted)) => (job.length, job.wanted) = (length, Some(wanted)),
                        Err(refusal) => return self.answer_refused(request, refusal).await,
                    }
                }
                job.admitted_bytes = STATUS_BYTES_MAX;
                self.admit(job.admitted_bytes).await;
            }
            _ => self.admit(0).await,
        }
        tracing::trace!(
            target: "driveline::io",
            stage = "submit",
            command = ?request.command,
            flags = ?request.flags,
            offset = request.offset,
            length = job.length,
            id = request.cookie.0,
        );
        start(job);
        Ok(())
    }

    /// Reads the payload of a block status request: its length, and the contexts it is limited to.
    async fn status_payload(
        &self,
        receive: &mut Receive,
        request: &Request,
    ) -> Result<Result<(u64, Vec<usize>), Refusal>, Fault> {
        if request.length > 8 + 4 * self.contexts.len() as u64 {
            self.skip_payload(receive, request).await?;
            return Ok(Err(invalid("more metadata contexts than were selected")));
        }
        let mut payload = vec![0; request.length as usize];
        receive.fill(self.transport, &mut payload).await?;
        Ok(self.wanted_contexts(request, &payload))
    }

    fn wanted_contexts(&self, request: &Request, payload: &[u8]) -> Result<(u64, Vec<usize>), Refusal> {
        let payload = StatusPayload::decode(payload).map_err(|_| invalid("malformed payload"))?;
        judge_range(&self.terms, request, payload.effect_length)?;
        let mut wanted = Vec::new();
        for id in payload.ids() {
            let found = self.contexts.iter().position(|selected| selected.id == id);
            let index = found.ok_or(invalid("a metadata context that was not selected"))?;
            if wanted.contains(&index) {
                return Err(invalid("a metadata context is named twice"));
            }
            wanted.push(index);
        }
        Ok((payload.effect_length, wanted))
    }

    /// Answers a request that is not even begun, and reads over its payload.
    async fn refuse(&self, receive: &mut Receive, request: Request, refusal: Refusal) -> Result<(), Fault> {
        self.skip_payload(receive, &request).await?;
        self.answer_refused(request, refusal).await
    }

    async fn answer_refused(&self, request: Request, refusal: Refusal) -> Result<(), Fault> {
        self.admit(0).await;
        let failure = Failure { errno: refusal.errno, message: Cow::Borrowed(refusal.message) };
        self.reply(Done {
            request,
            admitted_bytes: 0,
            buffer: Buffer::default(),
            outcome: Outcome::Failed(failure),
        });
        Ok(())
    }

    async fn skip_payload(&self, receive: &mut Receive, request: &Request) -> Result<(), Fault> {
        let length = request.payload_length(self.terms.headers);
        if length > SKIP_BYTES_MAX {
            return Err(Fault::TooLong { what: request.command.to_string(), length });
        }
        Ok(receive.skip(self.transport, length).await?)
    }

    /// Does a request to its end.
    pub(super) async fn execute(&self, job: Job) -> Done {
        let Job { request, length, buffer, admitted_bytes, wanted } = job;
        let (buffer, outcome) = if length == 0 && request.command != Command::FLUSH {
            (buffer, Outcome::Done)
        } else if request.command == Command::BLOCK_STATUS {
            let one = request.flags.contains(CommandFlags::REQ_ONE);
            let outcome = match self.block_status(&request, length, wanted.as_deref(), one).await {
                Ok(chunks) => Outcome::Chunks(chunks),
                Err(failure) => Outcome::Failed(failure),
            };
            (buffer, outcome)
        } else {
            let answer = self.storage.call(ask(&request, length), buffer).await;
            let outcome = outcome(&request, &answer);
            (answer.buffer, outcome)
        };
        Done { request, admitted_bytes, buffer, outcome }
    }

    async fn block_status(
        &self,
        request: &Request,
        length: u64,
        wanted: Option<&[usize]>,
        one: bool,
    ) -> Result<Vec<u8>, Failure> {
        let (headers, storage) = (self.terms.headers, self.storage);
        match wanted {
            Some(wanted) => {
                let contexts = wanted.iter().map(|index| &self.contexts[*index]);
                status::survey(storage, headers, request, length, one, contexts).await
            }
            None => status::survey(storage, headers, request, length, one, self.contexts.iter()).await,
        }
    }
}

/// A request in the graph's words.
fn ask(request: &Request, length: u64) -> Ask {
    let has = |flag| request.flags.contains(flag);
    let mut flags = 0;
    let op = match request.command {
        Command::READ => op::READ,
        Command::WRITE => op::WRITE,
        Command::FLUSH => op::FLUSH,
        Command::TRIM => op::DISCARD,
        Command::CACHE => op::CACHE,
        Command::WRITE_ZEROES => {
            if !has(CommandFlags::NO_HOLE) {
                flags |= flag::MAY_UNMAP;
            }
            if has(CommandFlags::FAST_ZERO) {
                flags |= flag::NO_FALLBACK;
            }
            op::WRITE_ZEROES
        }
        other => unreachable!("{other} was judged good"),
    };
    let writes = matches!(op, op::WRITE | op::DISCARD | op::WRITE_ZEROES);
    if writes && has(CommandFlags::FUA) {
        flags |= flag::FUA;
    }
    let (offset, length) = if op == op::FLUSH { (0, 0) } else { (request.offset, length) };
    Ask { op, flags, offset, length, trace_id: request.cookie.0, ..Ask::default() }
}

/// What storage's answer means to a client.
fn outcome(request: &Request, answer: &Answer) -> Outcome {
    let Err(error) = &answer.result else {
        return if request.command == Command::READ { Outcome::Data } else { Outcome::Done };
    };
    let errno = match (Errno::from_system(error.code()), request.command) {
        // A hint that storage has no use for is taken all the same.
        (Errno::ENOTSUP, Command::TRIM | Command::CACHE) => return Outcome::Done,
        (Errno::ENOTSUP, Command::WRITE_ZEROES) if request.flags.contains(CommandFlags::FAST_ZERO) => {
            Errno::ENOTSUP
        }
        // Elsewhere the protocol has no such error.
        (Errno::ENOTSUP, _) => Errno::EINVAL,
        (errno, _) => errno,
    };
    Outcome::Failed(Failure { errno, message: Cow::Owned(format!("{}: {error}", request.command)) })
}

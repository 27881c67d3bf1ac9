//! The requests of one link: those that wait to be sent, those that wait for an answer, and what has been answered.
//!
//! A call is answered exactly once (asserted), whatever happens to the connection meanwhile. One that was sent and not
//! answered when the connection went is sent again on the next.

use driveline_op::Buffer;
use driveline_wire::{Command, CommandFlags, Cookie, Errno, Extent};
use slab::Slab;
use std::{collections::VecDeque, mem, ops::Range, sync::Arc, task::Waker};

/// A request that has been on its way so often is what the server dies of.
const LOSSES_MAX: u32 = 16;
/// A server answers in order, more or less: of what follows each other there is one part.
const PARTS_MAX: usize = 1024;
/// Buffers that are kept for the next requests.
const SPARE_BYTES_MAX: usize = 16 << 20;
/// Smaller requests take a buffer of this size, so that one fits the next.
const SPARE_BYTES_MIN: usize = 64 << 10;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Asked {
    pub(super) command: Command,
    pub(super) flags: CommandFlags,
    pub(super) offset: u64,
    pub(super) length: u64,
}

/// What a request was answered with.
#[derive(Debug)]
pub(super) enum Reply {
    Done,
    Data(Buffer),
    Status(Extent),
}

/// Names a call, and never two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CallId {
    key: u32,
    generation: u32,
}

impl CallId {
    pub(super) fn cookie(self) -> Cookie {
        Cookie(u64::from(self.generation) << 32 | u64::from(self.key))
    }

    pub(super) fn of(cookie: Cookie) -> CallId {
        CallId { key: cookie.0 as u32, generation: (cookie.0 >> 32) as u32 }
    }
}

#[derive(Debug)]
enum Stage {
    Queued,
    Sent,
    /// Sent, and nobody waits any more; the cookie is taken until the answer comes.
    Abandoned,
    Answered(Result<Reply, Errno>),
}

/// One request.
#[derive(Debug)]
struct Call {
    generation: u32,
    /// Its place in the order in which requests came.
    number: u64,
    asked: Asked,
    /// Of a write. It is shared with whoever sends it just now, and kept until the answer.
    payload: Option<Arc<Buffer>>,
    stage: Stage,
    waker: Option<Waker>,
    losses: u32,
    partial: Partial,
}

/// What has come of an answer so far.
#[derive(Debug, Default)]
struct Partial {
    buffer: Option<Buffer>,
    /// The parts of it that have come; none overlap.
    parts: Vec<Range<u64>>,
    extent: Option<Extent>,
    error: Option<Errno>,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Calls {
    slots: Slab<Call>,
    queue: VecDeque<CallId>,
    generation: u32,
    number: u64,
    /// How many answers have come.
    answers: u64,
    spare: Vec<Buffer>,
    spare_bytes: usize,
}

impl Calls {
    /// One more, to be sent. Returns whether it is the first that waits.
    pub(super) fn push(&mut self, asked: Asked, payload: Option<Arc<Buffer>>) -> (CallId, bool) {
        self.generation = self.generation.wrapping_add(1);
        self.number += 1;
        let key = self.slots.insert(Call {
            generation: self.generation,
            number: self.number,
            asked,
            payload,
            stage: Stage::Queued,
            waker: None,
            losses: 0,
            partial: Partial::default(),
        });
        let id = CallId { key: key as u32, generation: self.generation };
        self.queue.push_back(id);
        (id, self.queue.len() == 1)
    }

    /// The next to be sent, which now counts as sent.
    pub(super) fn next(&mut self) -> Option<(CallId, Asked, Option<Arc<Buffer>>)> {
        while let Some(id) = self.queue.pop_front() {
            // One that was given up meanwhile is not here any more.
            let Some(call) = self.get(id) else { continue };
            debug_assert!(matches!(call.stage, Stage::Queued));
            call.stage = Stage::Sent;
            return Some((id, call.asked, call.payload.clone()));
        }
        None
    }

    /// Whether a call waits to be sent.
    pub(super) fn waiting(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Whether a call waits for its answer.
    pub(super) fn any_open(&self) -> bool {
        self.slots.iter().any(|(_, call)| matches!(call.stage, Stage::Queued | Stage::Sent))
    }

    /// How many answers have come by now, if a call waits for one.
    pub(super) fn awaited(&self) -> Option<u64> {
        self.any_open().then_some(self.answers)
    }

    fn get(&mut self, id: CallId) -> Option<&mut Call> {
        self.slots.get_mut(id.key as usize).filter(|call| call.generation == id.generation)
    }

    /// What was asked for, of a call that was sent and is not answered.
    pub(super) fn asked(&mut self, id: CallId) -> Option<Asked> {
        let call = self.get(id)?;
        matches!(call.stage, Stage::Sent | Stage::Abandoned).then_some(call.asked)
    }

    /// The answer, if it is there; else `waker` is woken when it is. A waker that was known before goes to `old`, to be dropped
    /// once no lock is held: dropping it may run anything.
    pub(super) fn poll(
        &mut self,
        id: CallId,
        waker: &Waker,
        old: &mut Option<Waker>,
    ) -> Option<Result<Reply, Errno>> {
        let call = self.get(id).expect("a call stays until its answer is taken");
        if !matches!(call.stage, Stage::Answered(_)) {
            if !call.waker.as_ref().is_some_and(|known| known.will_wake(waker)) {
                *old = call.waker.replace(waker.clone());
            }
            return None;
        }
        let call = self.slots.remove(id.key as usize);
        self.give_payload(call.payload);
        match call.stage {
            Stage::Answered(answer) => Some(answer),
            _ => unreachable!("looked at above"),
        }
    }

    /// Nobody waits for the answer any more. What is returned is to be dropped once no lock is held.
    pub(super) fn abandon(&mut self, id: CallId) -> Option<Waker> {
        let call = self.get(id)?;
        let waker = call.waker.take();
        match call.stage {
            Stage::Sent => call.stage = Stage::Abandoned,
            _ => drop(self.slots.remove(id.key as usize)),
        }
        waker
    }

    /// Lends the buffer that a read fills; it comes back by [`Calls::filled`].
    pub(super) fn take_buffer(&mut self, id: CallId) -> Option<Buffer> {
        let call = self.get(id)?;
        let length = call.asked.length as usize;
        match call.partial.buffer.take() {
            Some(buffer) => Some(buffer),
            None => Some(self.buffer(length)),
        }
    }

    /// Takes the buffer back, with `part` of it filled.
    ///
    /// Errors: that part was filled before.
    pub(super) fn filled(
        &mut self,
        id: CallId,
        buffer: Buffer,
        part: Range<u64>,
    ) -> Result<(), &'static str> {
        let Some(call) = self.get(id) else { return Ok(()) };
        call.partial.buffer = Some(buffer);
        if call.partial.parts.iter().any(|known| known.start < part.end && part.start < known.end) {
            return Err("the server answers the same bytes twice");
        }
        let is_full = call.partial.parts.len() >= PARTS_MAX;
        match call.partial.parts.last_mut() {
            Some(last) if last.end == part.start => last.end = part.end,
            _ if is_full => {
                return Err("the server answers in too many pieces");
            }
            _ => call.partial.parts.push(part),
        }
        Ok(())
    }

    /// Notes an extent; the first counts.
    pub(super) fn extent(&mut self, id: CallId, extent: Extent) {
        if let Some(call) = self.get(id) {
            call.partial.extent.get_or_insert(extent);
        }
    }

    /// Notes that the request failed; the first error counts.
    pub(super) fn failed(&mut self, id: CallId, errno: Errno) {
        if let Some(call) = self.get(id) {
            call.partial.error.get_or_insert(errno);
        }
    }

    /// The answer is complete. Returns whom to wake, once no lock is held. A call that was failed while its answer was read (the
    /// node was closed by another thread) stays failed; a second answer of the server's is refused by [`Calls::asked`].
    ///
    /// Errors: it is not, though the server says so.
    pub(super) fn complete(&mut self, id: CallId) -> Result<Option<Waker>, &'static str> {
        self.answers += 1;
        let Some(call) = self.get(id) else { return Ok(None) };
        if let Stage::Answered(_) = call.stage {
            return Ok(None);
        }
        let partial = mem::take(&mut call.partial);
        let answer = match (partial.error, call.asked.command) {
            (Some(errno), _) => Err(errno),
            (None, Command::READ) => {
                let have: u64 = partial.parts.iter().map(|part| part.end - part.start).sum();
                match partial.buffer {
                    Some(buffer) if have == call.asked.length => Ok(Reply::Data(buffer)),
                    _ => return Err("the server answered a part of a read"),
                }
            }
            (None, Command::BLOCK_STATUS) => match partial.extent {
                Some(extent) => Ok(Reply::Status(extent)),
                None => Err(Errno::EIO),
            },
            (None, _) => Ok(Reply::Done),
        };
        Ok(self.answer(id, answer))
    }

    fn answer(&mut self, id: CallId, answer: Result<Reply, Errno>) -> Option<Waker> {
        let call = self.get(id).expect("whoever answers has looked");
        match call.stage {
            Stage::Sent | Stage::Queued => {
                call.stage = Stage::Answered(answer);
                call.waker.take()
            }
            Stage::Abandoned => {
                self.slots.remove(id.key as usize);
                None
            }
            Stage::Answered(_) => unreachable!("a call was answered twice"),
        }
    }

    /// The connection is gone. What was sent and not answered is to be sent again, before what was not sent, in the order in
    /// which it all came; but what was lost too often fails. Returns whom to wake.
    pub(super) fn lost(&mut self) -> Vec<Waker> {
        let mut again = Vec::new();
        let mut hopeless = Vec::new();
        self.slots.retain(|key, call| {
            let id = CallId { key: key as u32, generation: call.generation };
            match call.stage {
                Stage::Abandoned => return false,
                Stage::Answered(_) => return true,
                Stage::Sent => call.losses += 1,
                Stage::Queued => {}
            }
            call.partial = Partial::default();
            call.stage = Stage::Queued;
            if call.losses >= LOSSES_MAX {
                hopeless.push(id)
            } else {
                again.push((call.number, id))
            }
            true
        });
        again.sort_unstable_by_key(|(number, _)| *number);
        self.queue = again.into_iter().map(|(_, id)| id).collect();
        hopeless.into_iter().filter_map(|id| self.answer(id, Err(Errno::EIO))).collect()
    }

    /// Fails all that are not answered. Returns whom to wake.
    pub(super) fn fail_all(&mut self) -> Vec<Waker> {
        self.queue.clear();
        let open: Vec<CallId> = self
            .slots
            .iter()
            .filter(|(_, call)| !matches!(call.stage, Stage::Answered(_)))
            .map(|(key, call)| CallId { key: key as u32, generation: call.generation })
            .collect();
        open.into_iter().filter_map(|id| self.answer(id, Err(Errno::EIO))).collect()
    }

    /// A buffer of `length` bytes with anything in it.
    pub(super) fn buffer(&mut self, length: usize) -> Buffer {
        let fits = |buffer: &Buffer| {
            buffer.capacity() >= length && buffer.capacity() / 8 <= length.max(SPARE_BYTES_MIN)
        };
        let mut buffer = match self.spare.iter().rposition(fits) {
            Some(at) => {
                let buffer = self.spare.swap_remove(at);
                self.spare_bytes -= buffer.capacity();
                buffer
            }
            None => Buffer::new(length.max(SPARE_BYTES_MIN).next_power_of_two()),
        };
        buffer.set_len(length);
        buffer
    }

    /// Keeps a buffer for later.
    pub(super) fn give(&mut self, buffer: Buffer) {
        if self.spare_bytes + buffer.capacity() <= SPARE_BYTES_MAX {
            self.spare_bytes += buffer.capacity();
            self.spare.push(buffer);
        }
    }

    fn give_payload(&mut self, payload: Option<Arc<Buffer>>) {
        if let Some(buffer) = payload.and_then(|payload| Arc::try_unwrap(payload).ok()) {
            self.give(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(calls: &mut Calls) -> CallId {
        let asked = Asked { command: Command::READ, flags: CommandFlags::EMPTY, offset: 0, length: 512 };
        let (id, _) = calls.push(asked, None);
        assert_eq!(calls.next().map(|(id, ..)| id), Some(id));
        id
    }

    fn poll(calls: &mut Calls, id: CallId) -> Option<Result<Reply, Errno>> {
        calls.poll(id, Waker::noop(), &mut None)
    }

    /// The story: the task looks a call up, reads its answer and completes it, with the lock free in between. Where another thread
    /// closed the node just then, the task panicked: "a call was answered twice".
    #[test]
    fn a_call_that_is_failed_while_its_answer_is_read_is_answered_once() {
        for steps in 0..4 {
            let mut calls = Calls::default();
            let id = read(&mut calls);
            assert!(poll(&mut calls, id).is_none());
            let mut woken = Vec::new();
            let mut close = |calls: &mut Calls, now: u32| {
                if now == steps {
                    woken.extend(calls.fail_all());
                }
            };
            close(&mut calls, 0);
            if calls.asked(id).is_none() {
                // That is a server that answers what nobody sent, as far as the task knows; it ends, as it is to.
                assert_eq!(steps, 0);
            } else {
                close(&mut calls, 1);
                let buffer = calls.take_buffer(id).unwrap();
                close(&mut calls, 2);
                calls.filled(id, buffer, 0..512).unwrap();
                close(&mut calls, 3);
                assert!(calls.complete(id).unwrap().is_none());
            }
            assert_eq!(woken.len(), 1, "the one who waits is woken once");
            assert_eq!(poll(&mut calls, id).unwrap().unwrap_err(), Errno::EIO);
            assert!(!calls.any_open() && calls.slots.is_empty());
        }
    }

    #[test]
    fn one_who_has_gone_before_the_node_is_closed_leaves_nothing() {
        let mut calls = Calls::default();
        let id = read(&mut calls);
        calls.abandon(id);
        assert!(calls.asked(id).is_some());
        assert!(calls.fail_all().is_empty());
        assert!(calls.complete(id).unwrap().is_none());
        assert!(calls.slots.is_empty());
    }
}

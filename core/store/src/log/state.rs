//! Which extent is where on its way through the log: no I/O, no thread, no clock.

use core::ops::Range;
use core::task::{Poll, Waker};
use std::collections::{HashMap, VecDeque};

use super::block::{BLOCKS_MAX, Block, NONE, Ring, UPDATES_MAX};
use super::table::Table;
use crate::Error;

/// Why the log could not be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) text: String,
    pub(crate) errno: i32,
}

impl Fault {
    pub(crate) fn of(error: &Error) -> Self {
        let text = match error {
            Error::Io { source, .. } => format!("{error}: {source}"),
            _ => error.to_string(),
        };
        Fault { text, errno: error.errno() }
    }
}

/// Somebody whose data may not reach the disk yet.
#[derive(Debug)]
pub(crate) struct Waiter {
    /// Which bitmap, and which of its contents: one that was cleared is another one.
    pub(crate) entry: u64,
    pub(crate) stamp: u64,
    pub(crate) bytes: Range<u64>,
    /// The first and the last that the bytes touch.
    pub(crate) extents: (u64, u64),
    pub(crate) waker: Waker,
}

impl Waiter {
    /// Whether the two wait for the same bits.
    fn is_like(&self, other: &Waiter) -> bool {
        (self.entry, self.stamp, &self.bytes) == (other.entry, other.stamp, &other.bytes)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nobody relies on what the slot says.
    Free,
    /// In the flight, and not durable yet.
    Entering,
    Active,
    /// Nobody finds it any more, but its bits may not be durable yet.
    Retiring,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    extent: u64,
    phase: Phase,
}

/// A transaction that is being written.
#[derive(Debug, Default)]
struct Flight {
    waiters: Vec<Waiter>,
    entering: Vec<u32>,
    retiring: Vec<u32>,
    sequence: u64,
    seal: u32,
}

/// What became of somebody's flight, until he asks.
#[derive(Debug)]
struct Answer {
    waiter: Waiter,
    fault: Option<Fault>,
    flight: u64,
}

/// Flights after which an answer that nobody asked for is dropped: whoever waited has gone away.
const ANSWER_FLIGHTS: u64 = 16;

#[derive(Debug)]
pub(crate) struct State {
    ring: Ring,
    slots: Vec<Slot>,
    /// The slots of extents that are not free.
    slot_of: HashMap<u64, u32>,
    free: VecDeque<u32>,
    /// Where the search for the next extent to retire goes on.
    hand: usize,
    /// Of the last block that is durable.
    sequence: u64,
    seal: u32,
    queue: Vec<Waiter>,
    flight: Option<Flight>,
    answers: Vec<Answer>,
    flights: u64,
    stopped: bool,
}

impl State {
    pub(crate) fn new(ring: Ring, sequence: u64, seal: u32) -> Self {
        let count = ring.slots;
        State {
            ring,
            slots: vec![Slot { extent: NONE, phase: Phase::Free }; count as usize],
            slot_of: HashMap::new(),
            free: (0..count).collect(),
            hand: 0,
            sequence,
            seal,
            queue: Vec::new(),
            flight: None,
            answers: Vec::new(),
            flights: 0,
            stopped: false,
        }
    }

    pub(crate) fn is_wanted(&self) -> bool {
        !self.queue.is_empty()
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Nothing is committed any more. Returns whom to wake.
    pub(crate) fn stop(&mut self) -> Vec<Waker> {
        self.stopped = true;
        self.queue.drain(..).map(|waiter| waiter.waker).collect()
    }

    pub(crate) fn poll(&mut self, table: &Table, waiter: Waiter) -> Poll<Result<(), Fault>> {
        let mut like = self.answers.iter().enumerate().filter(|(_, answer)| answer.waiter.is_like(&waiter));
        let mine = like.clone().find(|(_, answer)| answer.waiter.waker.will_wake(&waiter.waker));
        if let Some(at) = mine.or_else(|| like.next()).map(|(at, _)| at) {
            let answer = self.answers.swap_remove(at);
            return Poll::Ready(answer.fault.map_or(Ok(()), Err));
        }
        if self.is_small(&waiter)
            && (waiter.extents.0..=waiter.extents.1).all(|extent| self.is_active(extent))
        {
            (waiter.extents.0..=waiter.extents.1).for_each(|extent| {
                table.contains(extent);
            });
            return Poll::Ready(Ok(()));
        }
        if self.stopped {
            let errno = rustix::io::Errno::SHUTDOWN.raw_os_error();
            return Poll::Ready(Err(Fault { text: "the store was closed".to_owned(), errno }));
        }
        let known =
            self.queue.iter().any(|queued| queued.is_like(&waiter) && queued.waker.will_wake(&waiter.waker));
        if !known {
            self.queue.push(waiter);
        }
        Poll::Pending
    }

    /// Begins a flight for all who wait: what to write where, before one sync. None if nobody waits, or while one is on.
    pub(crate) fn begin(&mut self, table: &Table) -> Option<Vec<(u64, Vec<u8>)>> {
        if self.queue.is_empty() || self.flight.is_some() {
            return None;
        }
        let mut flight = Flight { waiters: core::mem::take(&mut self.queue), ..Flight::default() };
        for waiter in &flight.waiters {
            if !self.is_small(waiter) {
                continue;
            }
            for extent in waiter.extents.0..=waiter.extents.1 {
                if self.slot_of.contains_key(&extent) || flight.entering.len() == BLOCKS_MAX * UPDATES_MAX {
                    continue;
                }
                let Some(slot) = self.free.pop_front() else { break };
                self.slots[slot as usize] = Slot { extent, phase: Phase::Entering };
                self.slot_of.insert(extent, slot);
                flight.entering.push(slot);
            }
        }
        self.retire(table, &mut flight);
        let blocks = self.encode(&mut flight);
        self.flight = Some(flight);
        Some(blocks)
    }

    /// The flight is durable, or failed: then it is as if it had never been. Returns whom to wake.
    pub(crate) fn finish(&mut self, table: &Table, fault: Option<Fault>) -> Vec<Waker> {
        let Some(flight) = self.flight.take() else { return Vec::new() };
        let (to_active, to_free) = match fault {
            None => (flight.entering, flight.retiring),
            // The log names what retires until its slot has another extent, so that may come back.
            Some(_) => (flight.retiring, flight.entering),
        };
        for slot in to_free {
            self.slots[slot as usize].phase = Phase::Free;
            self.slot_of.remove(&self.slots[slot as usize].extent);
            self.free.push_back(slot);
        }
        for slot in to_active {
            self.slots[slot as usize].phase = Phase::Active;
            if !table.insert(self.slots[slot as usize].extent) {
                let active = self.slots.iter().filter(|slot| slot.phase == Phase::Active);
                table.rebuild(active.map(|slot| slot.extent));
            }
        }
        self.flights += 1;
        if fault.is_none() {
            (self.sequence, self.seal) = (flight.sequence, flight.seal);
            self.answers.retain(|answer| answer.fault.is_none());
        }
        let flights = self.flights;
        self.answers.retain(|answer| answer.flight + ANSWER_FLIGHTS > flights);
        let wakers = flight.waiters.iter().map(|waiter| waiter.waker.clone()).collect();
        let answers = flight.waiters.into_iter();
        self.answers.extend(answers.map(|waiter| Answer { waiter, fault: fault.clone(), flight: flights }));
        wakers
    }

    fn is_active(&self, extent: u64) -> bool {
        let slot = self.slot_of.get(&extent);
        slot.is_some_and(|&slot| self.slots[slot as usize].phase == Phase::Active)
    }

    /// Whether the waiter's extents are few enough to take slots for.
    fn is_small(&self, waiter: &Waiter) -> bool {
        waiter.extents.1 - waiter.extents.0 < self.spare() as u64
    }

    /// How many slots a flight should find free.
    fn spare(&self) -> usize {
        (self.slots.len() / 8).clamp(2, 2 * UPDATES_MAX)
    }

    /// Lets extents go that were not used for a while, so that the next flight finds free slots: a clock with one hand.
    fn retire(&mut self, table: &Table, flight: &mut Flight) {
        let mut steps = 2 * self.slots.len();
        while self.free.len() + flight.retiring.len() < self.spare() && steps > 0 {
            steps -= 1;
            let at = self.hand;
            self.hand = (at + 1) % self.slots.len();
            let Slot { extent, phase } = self.slots[at];
            if phase == Phase::Active && !table.take_used(extent) {
                table.remove(extent);
                self.slots[at].phase = Phase::Retiring;
                flight.retiring.push(at as u32);
            }
        }
    }

    fn encode(&self, flight: &mut Flight) -> Vec<(u64, Vec<u8>)> {
        let updates = |slot: &u32| (*slot, self.slots[*slot as usize].extent);
        let updates: Vec<_> = flight.entering.iter().map(updates).collect();
        (flight.sequence, flight.seal) = (self.sequence, self.seal);
        let mut blocks = Vec::new();
        for updates in updates.chunks(UPDATES_MAX) {
            flight.sequence += 1;
            let block = Block { sequence: flight.sequence, before: flight.seal, updates };
            let (bytes, seal) = self.ring.encode(&block, &|slot| self.slots[slot as usize].extent);
            flight.seal = seal;
            blocks.push((self.ring.place_of(flight.sequence), bytes));
        }
        blocks
    }
}

#[cfg(test)]
mod tests;

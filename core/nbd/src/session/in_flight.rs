//! The requests that wait for storage: futures in slots that are used again and again.
//!
//! A request is polled where it arrives, and most end there. One that does not stays in its slot, whose waker says
//! exactly which request can go on; the others are not looked at.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures::task::AtomicWaker;

use crate::limits::REQUESTS_MAX;

const WORDS: usize = REQUESTS_MAX.div_ceil(64);

/// Up to [`REQUESTS_MAX`] futures of one type.
pub(super) struct InFlight<F: Future> {
    slots: Vec<Slot<F>>,
    free: Vec<usize>,
    /// Slots that were woken and are still to be polled.
    woken: [u64; WORDS],
    ready: Arc<Ready>,
}

struct Slot<F> {
    future: Pin<Box<Option<F>>>,
    waker: Waker,
}

/// Which slots were woken, and the task that should know.
struct Ready {
    slots: [AtomicU64; WORDS],
    task: AtomicWaker,
}

struct SlotWaker {
    ready: Arc<Ready>,
    slot: usize,
}

impl Wake for SlotWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let bit = 1 << (self.slot % 64);
        if self.ready.slots[self.slot / 64].fetch_or(bit, Ordering::AcqRel) & bit == 0 {
            self.ready.task.wake();
        }
    }
}

impl<F: Future> InFlight<F> {
    pub(super) fn new() -> Self {
        let ready = Ready { slots: Default::default(), task: AtomicWaker::new() };
        InFlight { slots: Vec::new(), free: Vec::new(), woken: [0; WORDS], ready: Arc::new(ready) }
    }

    /// Who is woken when a future can go on.
    pub(super) fn register(&self, task: &Waker) {
        self.ready.task.register(task);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Polls `future` at once, and keeps it if it is not done.
    ///
    /// Shape: fewer than [`REQUESTS_MAX`] are in flight.
    pub(super) fn start(&mut self, future: F) -> Option<F::Output> {
        let slot = self.free.pop().unwrap_or_else(|| self.add_slot());
        self.slots[slot].future.as_mut().set(Some(future));
        self.poll(slot)
    }

    fn add_slot(&mut self) -> usize {
        let slot = self.slots.len();
        assert!(slot < REQUESTS_MAX, "the session admits no more requests than there are slots");
        let waker = Waker::from(Arc::new(SlotWaker { ready: Arc::clone(&self.ready), slot }));
        self.slots.push(Slot { future: Box::pin(None), waker });
        slot
    }

    fn poll(&mut self, slot: usize) -> Option<F::Output> {
        let Slot { future, waker } = &mut self.slots[slot];
        // A waker may outlive its request: then nobody is there to be polled.
        let running = future.as_mut().as_pin_mut()?;
        let Poll::Ready(output) = running.poll(&mut Context::from_waker(waker)) else { return None };
        future.as_mut().set(None);
        self.free.push(slot);
        Some(output)
    }

    /// The output of some future that was woken and is done.
    pub(super) fn next(&mut self) -> Option<F::Output> {
        for word in 0..WORDS {
            if self.woken[word] == 0 && self.ready.slots[word].load(Ordering::Relaxed) != 0 {
                self.woken[word] = self.ready.slots[word].swap(0, Ordering::AcqRel);
            }
            while self.woken[word] != 0 {
                let bit = self.woken[word].trailing_zeros() as usize;
                self.woken[word] &= self.woken[word] - 1;
                if let Some(output) = self.poll(word * 64 + bit) {
                    return Some(output);
                }
            }
        }
        None
    }
}

impl<F: Future> fmt::Debug for InFlight<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InFlight({} of {} slots)", self.slots.len() - self.free.len(), self.slots.len())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::future::poll_fn;

    use super::*;

    /// Futures that end when told to, each known by its number.
    #[derive(Default)]
    struct Gates(RefCell<Vec<(bool, Option<Waker>)>>);

    impl Gates {
        async fn pass(&self, number: usize) -> usize {
            poll_fn(|cx| {
                let mut gates = self.0.borrow_mut();
                let count = gates.len().max(number + 1);
                gates.resize_with(count, Default::default);
                let gate = &mut gates[number];
                gate.1 = Some(cx.waker().clone());
                if gate.0 { Poll::Ready(number) } else { Poll::Pending }
            })
            .await
        }

        fn open(&self, number: usize) {
            let waker = {
                let gate = &mut self.0.borrow_mut()[number];
                gate.0 = true;
                gate.1.clone()
            };
            waker.unwrap().wake();
        }
    }

    #[test]
    fn only_those_woken_end_and_their_slots_are_used_again() {
        let gates = Gates::default();
        let mut in_flight = InFlight::new();
        for number in 0..REQUESTS_MAX {
            assert_eq!(in_flight.start(gates.pass(number)), None);
        }
        assert_eq!(in_flight.next(), None);
        for number in [100, 3, 64] {
            gates.open(number);
        }
        let mut ended: Vec<usize> = std::iter::from_fn(|| in_flight.next()).collect();
        ended.sort_unstable();
        assert_eq!(ended, [3, 64, 100]);
        assert!(!in_flight.is_empty());
        gates.0.borrow_mut()[3].0 = true;
        assert_eq!(in_flight.start(gates.pass(3)), Some(3), "an open gate is passed at once");
        assert_eq!(in_flight.slots.len(), REQUESTS_MAX);
    }

    #[test]
    fn a_late_wake_of_an_ended_request_is_nothing() {
        let gates = Gates::default();
        let mut in_flight = InFlight::new();
        assert_eq!(in_flight.start(gates.pass(0)), None);
        gates.open(0);
        assert_eq!(in_flight.next(), Some(0));
        gates.open(0);
        assert_eq!(in_flight.next(), None);
        assert!(in_flight.is_empty());
    }
}

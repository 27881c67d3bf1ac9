//! The operations that a thread has given away: to the kernel's ring, or to epoll as a wait for readiness.
//!
//! A slot lives until both sides are done with it: the future that waits and the kernel that completes. Its key
//! carries a generation, so a late completion of a forgotten operation never reaches the slot's next tenant.

use std::task::{Context, Poll, Waker};

/// Names one operation of one thread, and never two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    index: u32,
    generation: u32,
}

/// Generations stay below this, so that no key collides with [`WAKE`] or [`IGNORE`].
const GENERATIONS: u32 = 1 << 31;

/// `user_data` of the poll on the thread's own wake-up descriptor.
pub(crate) const WAKE: u64 = u64::MAX;
/// `user_data` of entries whose result nobody reads, such as a cancellation.
pub(crate) const IGNORE: u64 = u64::MAX - 1;

impl Key {
    pub(crate) fn user_data(self) -> u64 {
        u64::from(self.index) | u64::from(self.generation) << 32
    }

    fn from_user_data(user_data: u64) -> Key {
        Key { index: user_data as u32, generation: (user_data >> 32) as u32 }
    }
}

#[derive(Debug)]
enum State {
    Vacant,
    /// In flight; the waker is of whoever polled last.
    Waiting(Option<Waker>),
    /// The result is in and not yet collected.
    Done(i32),
    /// In flight and nobody will ask: the completion frees the slot.
    Forgotten,
}

/// The slab of a thread's operations.
#[derive(Debug, Default)]
pub(crate) struct Ops {
    slots: Vec<(u32, State)>,
    free: Vec<u32>,
    in_flight: usize,
}

impl Ops {
    pub(crate) fn insert(&mut self) -> Key {
        self.in_flight += 1;
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                let index = u32::try_from(self.slots.len()).expect("fewer than 2^32 operations in flight");
                self.slots.push((0, State::Vacant));
                index
            }
        };
        let (generation, state) = &mut self.slots[index as usize];
        *state = State::Waiting(None);
        Key { index, generation: *generation }
    }

    /// How many operations have not been completed yet.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Notes the kernel's answer; returns whom to wake, once no borrow is held.
    pub(crate) fn complete(&mut self, user_data: u64, result: i32) -> Option<Waker> {
        let key = Key::from_user_data(user_data);
        let state = self.state(key).expect("the kernel completes only what was submitted, once");
        let before = std::mem::replace(state, State::Done(result));
        self.in_flight -= 1;
        match before {
            State::Waiting(waker) => waker,
            State::Forgotten => {
                self.release(key);
                None
            }
            State::Vacant | State::Done(_) => unreachable!("an operation completed twice"),
        }
    }

    /// Takes the result if it is in (the key is then spent), else notes the waker. A waker that was known before goes to
    /// `old`, for the caller to drop once no borrow is held: dropping it may run anything.
    pub(crate) fn poll(&mut self, key: Key, cx: &mut Context<'_>, old: &mut Option<Waker>) -> Poll<i32> {
        match self.state(key).expect("a spent operation is polled") {
            State::Done(result) => {
                let result = *result;
                self.release(key);
                Poll::Ready(result)
            }
            State::Waiting(waker) => {
                if !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                    *old = waker.replace(cx.waker().clone());
                }
                Poll::Pending
            }
            State::Vacant | State::Forgotten => unreachable!("a spent operation is polled"),
        }
    }

    pub(crate) fn is_done(&mut self, key: Key) -> bool {
        matches!(self.state(key), Some(State::Done(_)))
    }

    /// Gives up interest. Returns whether the operation is still in flight; its slot then frees itself.
    pub(crate) fn forget(&mut self, key: Key, old: &mut Option<Waker>) -> bool {
        let state = self.state(key).expect("a spent operation is forgotten");
        match std::mem::replace(state, State::Forgotten) {
            State::Waiting(waker) => {
                *old = waker;
                true
            }
            _ => {
                self.release(key);
                false
            }
        }
    }

    fn state(&mut self, key: Key) -> Option<&mut State> {
        let (generation, state) = self.slots.get_mut(key.index as usize)?;
        (*generation == key.generation && !matches!(state, State::Vacant)).then_some(state)
    }

    fn release(&mut self, key: Key) {
        let (generation, state) = &mut self.slots[key.index as usize];
        *generation = (*generation + 1) % GENERATIONS;
        *state = State::Vacant;
        self.free.push(key.index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forgotten_operation_frees_its_slot_when_it_completes() {
        let mut ops = Ops::default();
        let first = ops.insert();
        assert!(ops.forget(first, &mut None));
        assert!(ops.complete(first.user_data(), 0).is_none());
        let second = ops.insert();
        assert_eq!(first.index, second.index);
        assert_ne!(first, second, "the generation tells the tenants apart");
        assert_eq!(ops.in_flight(), 1);
    }

    #[test]
    fn a_result_is_collected_once() {
        let mut ops = Ops::default();
        let key = ops.insert();
        let mut cx = Context::from_waker(Waker::noop());
        assert!(ops.poll(key, &mut cx, &mut None).is_pending());
        assert!(ops.complete(key.user_data(), 7).is_some());
        assert!(ops.is_done(key));
        assert_eq!(ops.poll(key, &mut cx, &mut None), Poll::Ready(7));
        assert!(!ops.is_done(key));
    }
}

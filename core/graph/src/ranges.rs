//! Ranges in flight on a node: who must wait for whom.
//!
//! A write shares its range with other writes; an exclusive holder (a read-modify-write, a job that copies) shares
//! it with nobody. Whoever comes later waits for those before it that it conflicts with, in the order of coming.

use event_listener::Event;
use parking_lot::Mutex;
use std::{ops::Range, sync::Arc};

/// Ranges in flight: of one node, or of whoever else must keep changes of one place apart.
#[derive(Debug, Default)]
pub struct Ranges {
    held: Mutex<Held>,
    left: Event,
}

#[derive(Debug, Default)]
struct Held {
    next_ticket: u64,
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    ticket: u64,
    range: Range<u64>,
    exclusive: bool,
}

/// A range (see [`Ranges::hold`]), held until it is dropped.
#[derive(Debug)]
pub struct Hold {
    ranges: Arc<Ranges>,
    ticket: u64,
}

impl Ranges {
    /// Holds a range, after all conflicting ones that came before: every other one that overlaps, if either is
    /// `exclusive`.
    pub async fn hold(self: &Arc<Self>, range: Range<u64>, exclusive: bool) -> Hold {
        let hold = self.enter(range, exclusive);
        while self.must_wait(hold.ticket) {
            let left = self.left.listen();
            // Asked again, because the last one may have left before the listener was there.
            if !self.must_wait(hold.ticket) {
                break;
            }
            left.await;
        }
        hold
    }

    fn enter(self: &Arc<Self>, range: Range<u64>, exclusive: bool) -> Hold {
        let mut held = self.held.lock();
        let ticket = held.next_ticket;
        held.next_ticket += 1;
        held.entries.push(Entry { ticket, range, exclusive });
        Hold { ranges: self.clone(), ticket }
    }

    fn must_wait(&self, ticket: u64) -> bool {
        let held = self.held.lock();
        let at = held.entries.iter().position(|entry| entry.ticket == ticket).expect("a hold is entered");
        let me = &held.entries[at];
        held.entries[..at].iter().any(|other| {
            (me.exclusive || other.exclusive)
                && other.range.start < me.range.end
                && me.range.start < other.range.end
        })
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut held = self.ranges.held.lock();
        // `remove` keeps the order of coming, which fairness rests on.
        if let Some(at) = held.entries.iter().position(|entry| entry.ticket == self.ticket) {
            held.entries.remove(at);
        }
        drop(held);
        self.ranges.left.notify(usize::MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use std::pin::pin;

    #[test]
    fn an_exclusive_hold_waits_for_writes_and_later_writes_wait_for_it() {
        let ranges = Arc::new(Ranges::default());
        let write = ranges.hold(0..4096, false).now_or_never().expect("nobody is before it");
        let mut lock = pin!(ranges.hold(0..8192, true));
        assert!(lock.as_mut().now_or_never().is_none());
        let mut later = pin!(ranges.hold(4096..5000, false));
        assert!(later.as_mut().now_or_never().is_none(), "fair: it does not overtake the lock");
        assert!(ranges.hold(8192..9000, false).now_or_never().is_some(), "elsewhere nobody waits");
        drop(write);
        let lock = lock.now_or_never().expect("the write has left");
        assert!(later.as_mut().now_or_never().is_none());
        drop(lock);
        assert!(later.now_or_never().is_some());
    }

    #[test]
    fn writes_share_and_a_dropped_waiter_leaves_no_trace() {
        let ranges = Arc::new(Ranges::default());
        let a = ranges.hold(0..10, false).now_or_never().unwrap();
        let b = ranges.hold(5..15, false).now_or_never().unwrap();
        drop(Box::pin(ranges.hold(0..20, true)));
        {
            let mut waiter = Box::pin(ranges.hold(0..20, true));
            assert!(waiter.as_mut().now_or_never().is_none());
        }
        assert!(ranges.hold(0..5, false).now_or_never().is_some());
        drop((a, b));
        assert!(ranges.held.lock().entries.is_empty());
    }
}

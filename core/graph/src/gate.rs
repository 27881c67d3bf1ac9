//! A gate: counts who is inside, and keeps others out while it is closed. Drain is made of gates.

use event_listener::Event;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

/// Counts requests in flight. It may be closed any number of times, and opens when each closer has opened it.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    inside: AtomicUsize,
    closed: AtomicUsize,
    opened: Event,
    emptied: Event,
}

impl Gate {
    /// Goes in, if the gate is open.
    #[inline]
    pub(crate) fn try_enter(&self) -> bool {
        self.inside.fetch_add(1, SeqCst);
        // Count first, look then: a closer closes first and counts then, so one of the two sees the other.
        if self.closed.load(SeqCst) == 0 {
            return true;
        }
        self.leave();
        false
    }

    /// Goes in, when the gate is open.
    pub(crate) async fn enter(&self) {
        while !self.try_enter() {
            let opened = self.opened.listen();
            if self.closed.load(SeqCst) == 0 {
                continue;
            }
            opened.await;
        }
    }

    /// Counts one more for somebody who is inside already, whether or not the gate is closed.
    #[inline]
    pub(crate) fn enter_again(&self) {
        let inside = self.inside.fetch_add(1, SeqCst);
        debug_assert!(inside > 0, "who enters again is inside");
    }

    /// Goes out.
    #[inline]
    pub(crate) fn leave(&self) {
        if self.inside.fetch_sub(1, SeqCst) == 1 && self.closed.load(SeqCst) > 0 {
            self.emptied.notify(usize::MAX);
        }
    }

    /// Keeps newcomers out.
    pub(crate) fn close(&self) {
        self.closed.fetch_add(1, SeqCst);
    }

    /// Waits until nobody is inside. Only of use while the gate is closed.
    pub(crate) async fn empty(&self) {
        while self.inside.load(SeqCst) > 0 {
            let emptied = self.emptied.listen();
            if self.inside.load(SeqCst) == 0 {
                return;
            }
            emptied.await;
        }
    }

    /// Undoes one `close`.
    pub(crate) fn open(&self) {
        let before = self.closed.fetch_sub(1, SeqCst);
        assert!(before > 0, "a gate is opened as often as it was closed");
        if before == 1 {
            self.opened.notify(usize::MAX);
        }
    }

    /// How many are inside.
    pub(crate) fn inside(&self) -> usize {
        self.inside.load(SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use std::pin::pin;

    #[test]
    fn a_closed_gate_empties_and_lets_nobody_in_until_every_closer_opened_it() {
        let gate = Gate::default();
        assert!(gate.try_enter());
        gate.close();
        gate.close();
        let mut empty = pin!(gate.empty());
        assert!(empty.as_mut().now_or_never().is_none());
        let mut enter = pin!(gate.enter());
        assert!(enter.as_mut().now_or_never().is_none());
        gate.leave();
        assert!(empty.now_or_never().is_some());
        gate.open();
        assert!(enter.as_mut().now_or_never().is_none());
        gate.open();
        assert!(enter.now_or_never().is_some());
        assert_eq!(gate.inside(), 1);
    }

    #[test]
    fn threads_that_come_and_go_never_slip_past_a_closed_gate() {
        let (gate, inside) = (Gate::default(), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..20_000 {
                        futures::executor::block_on(gate.enter());
                        inside.fetch_add(1, SeqCst);
                        inside.fetch_sub(1, SeqCst);
                        gate.leave();
                    }
                });
            }
            for _ in 0..500 {
                gate.close();
                futures::executor::block_on(gate.empty());
                assert_eq!(inside.load(SeqCst), 0);
                gate.open();
            }
        });
    }
}

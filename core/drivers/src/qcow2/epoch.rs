//! When clusters that were given up may be used again: after the requests that may have looked them up.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// Counts requests by the epoch that they began in. A request looks clusters up only while it is counted.
///
/// The epoch advances when no request of the one before is left. What was given up in epoch `t` is unreachable for
/// requests that begin afterwards, so once the epoch is `t + 2` nobody uses it.
#[derive(Debug)]
pub(crate) struct Epoch {
    now: AtomicU64,
    counts: [AtomicU64; 2],
}

/// A request that is counted.
#[derive(Debug)]
pub(crate) struct Pin<'a>(&'a AtomicU64);

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

impl Epoch {
    pub(crate) fn new() -> Self {
        Self { now: AtomicU64::new(2), counts: [AtomicU64::new(0), AtomicU64::new(0)] }
    }

    /// Counts a request until the pin is dropped.
    pub(crate) fn pin(&self) -> Pin<'_> {
        loop {
            let epoch = self.now.load(SeqCst);
            let pin = Pin(&self.counts[(epoch & 1) as usize]);
            pin.0.fetch_add(1, SeqCst);
            // If the epoch went on meanwhile, the count may have been taken for that of a later epoch.
            if self.now.load(SeqCst) == epoch {
                return pin;
            }
            drop(pin);
        }
    }

    /// The epoch in which something is given up, read after it was made unreachable.
    pub(crate) fn now(&self) -> u64 {
        self.now.load(SeqCst)
    }

    /// Advances as far as it can. What was given up in epochs before the one returned is nobody's any more.
    /// One caller at a time.
    pub(crate) fn settled(&self) -> u64 {
        for _ in 0..2 {
            let epoch = self.now.load(SeqCst);
            if self.counts[((epoch - 1) & 1) as usize].load(SeqCst) != 0 {
                break;
            }
            self.now.store(epoch + 1, SeqCst);
        }
        self.now.load(SeqCst) - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_given_up_waits_for_requests_that_began_before() {
        let epoch = Epoch::new();
        let before = epoch.pin();
        let given_up = epoch.now();
        let after = epoch.pin();
        assert!(epoch.settled() <= given_up, "a request that began before is there");
        drop(before);
        assert!(epoch.settled() <= given_up, "the other one may have looked before, too");
        drop(after);
        assert!(epoch.settled() > given_up);
    }

    #[test]
    fn requests_that_began_afterwards_hold_nothing_up() {
        let epoch = Epoch::new();
        let before = epoch.pin();
        let given_up = epoch.now();
        epoch.settled(); // goes on by one
        let _after = epoch.pin();
        drop(before);
        assert!(epoch.settled() > given_up);
    }
}

//! Whether to look for completions for a moment before sleeping.
//!
//! A thread that is awake answers several times quicker than one that has to be woken, if its processor has nothing better to
//! do; if the peer is waiting for that very processor, looking only delays it. Which of the two it is cannot be known, so it is
//! measured: now and then a few waits go the other way, and the way with the shorter waits is kept.

use std::cell::Cell;
use std::time::Duration;

/// Waits between two trials. Trials of a bad way cost their share of this only.
const PERIOD: u32 = 1024;
/// Waits of a trial each way.
const TRIAL: u32 = 8;
/// A wait of so many limits is idleness and says nothing about either way.
const IDLE_LIMITS: u32 = 4;

#[derive(Debug)]
pub(super) struct Spin {
    limit: Duration,
    waits: Cell<u32>,
    idle: Cell<bool>,
    /// Nanoseconds that a wait takes of late, with spinning and without.
    spinning: Cell<u32>,
    sleeping: Cell<u32>,
}

impl Spin {
    pub(super) fn new(limit: Duration) -> Spin {
        Spin {
            limit: limit.min(Duration::from_millis(1)),
            waits: Cell::new(0),
            idle: Cell::new(true),
            spinning: Cell::new(0),
            sleeping: Cell::new(0),
        }
    }

    /// Never spins, so that nothing needs to be measured.
    pub(super) fn is_off(&self) -> bool {
        self.limit.is_zero()
    }

    /// For how long to look before the wait that now begins. Nothing after a long wait: an idle thread burns no time.
    pub(super) fn next(&self) -> Duration {
        let spin = match self.waits.get() % PERIOD {
            _ if self.idle.get() => false,
            trial if trial < TRIAL => true,
            trial if trial < 2 * TRIAL => false,
            // Clearly better, as it burns what others could use.
            _ => self.spinning.get() < self.sleeping.get() / 4 * 3,
        };
        if spin { self.limit } else { Duration::ZERO }
    }

    /// Learns from a wait: how it was done and how long it took.
    pub(super) fn note(&self, spun: bool, waited: Duration) {
        if waited > self.limit * IDLE_LIMITS {
            self.idle.set(true);
            return;
        }
        // The first short wait after idleness belongs to no trial.
        if self.idle.replace(false) {
            return;
        }
        self.waits.set(self.waits.get().wrapping_add(1));
        let cost = if spun { &self.spinning } else { &self.sleeping };
        let waited = waited.as_nanos() as u32;
        let known = cost.get();
        cost.set(if known == 0 { waited } else { known - known / 8 + waited / 8 });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets waits take `spinning` or `sleeping`, and counts how many of `count` spin.
    fn spins(spin: &Spin, count: u32, spinning: Duration, sleeping: Duration) -> u32 {
        let mut spins = 0;
        for _ in 0..count {
            let spun = !spin.next().is_zero();
            spins += u32::from(spun);
            spin.note(spun, if spun { spinning } else { sleeping });
        }
        spins
    }

    #[test]
    fn it_spins_only_while_that_pays() {
        const SHORT: Duration = Duration::from_micros(3);
        const LONG: Duration = Duration::from_micros(15);
        let spin = Spin::new(Duration::from_micros(20));
        assert!(spins(&spin, 10_000, SHORT, LONG) > 9_500);
        assert!(spins(&spin, 10_000, LONG, SHORT) < 1_500, "it notices that things have changed");
        assert!(spins(&spin, 10_240, LONG, SHORT) <= 80, "and only tries from then on");
        assert!(spins(&spin, 10_000, SHORT, LONG) > 8_000);
    }

    #[test]
    fn it_never_spins_when_idle() {
        let spin = Spin::new(Duration::from_micros(20));
        let long = Duration::from_millis(10);
        assert_eq!(spins(&spin, 1000, long, long), 0);
    }
}

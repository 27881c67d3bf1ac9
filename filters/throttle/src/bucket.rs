//! A leaky bucket: how much may pass, and when.

use std::time::Duration;

/// A rate, and how far it may be exceeded for a while. Units are operations or bytes.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub(crate) struct Limit {
    /// Units per second in the long run; 0: no limit.
    pub(crate) rate: f64,
    /// Units per second during a burst; 0: no bursts.
    pub(crate) burst_rate: f64,
    /// How long a burst at the full burst rate may last, in seconds.
    pub(crate) burst_seconds: f64,
}

impl Limit {
    /// How much may pass at once before the rate holds. Without bursts it is a tenth of a second's worth, as
    /// otherwise every second request would wait.
    fn capacity(&self) -> f64 {
        if self.burst_rate > 0.0 { self.burst_rate * self.burst_seconds } else { self.rate / 10.0 }
    }

    /// A burst of more than a second has a rate to keep to; a shorter one is simply an amount.
    fn keeps_burst_rate(&self) -> bool {
        self.burst_rate > 0.0 && self.burst_seconds > 1.0
    }
}

/// What passes is poured in, and leaks out at the rate. While it is fuller than its capacity, nothing may pass.
///
/// So a request passes as soon as those before it have been paid for, whatever its own size, and the next ones wait for
/// it: a request that is larger than the capacity needs no splitting.
#[derive(Debug)]
pub(crate) struct Bucket {
    limit: Limit,
    level: f64,
    /// Leaks at the burst rate.
    burst_level: f64,
}

impl Bucket {
    pub(crate) fn new(limit: Limit) -> Self {
        Self { limit, level: 0.0, burst_level: 0.0 }
    }

    pub(crate) fn leak(&mut self, elapsed: Duration) {
        let seconds = elapsed.as_secs_f64();
        self.level = (self.level - self.limit.rate * seconds).max(0.0);
        self.burst_level = (self.burst_level - self.limit.burst_rate * seconds).max(0.0);
    }

    pub(crate) fn pour(&mut self, units: f64) {
        if self.limit.rate > 0.0 {
            self.level += units;
            self.burst_level += units;
        }
    }

    /// How long until something may pass; zero: now.
    pub(crate) fn wait(&self) -> Duration {
        if self.limit.rate == 0.0 {
            return Duration::ZERO;
        }
        let excess = self.level - self.limit.capacity();
        if excess > 0.0 {
            return time_to_leak(excess, self.limit.rate);
        }
        let excess = self.burst_level - self.limit.burst_rate / 10.0;
        if self.limit.keeps_burst_rate() && excess > 0.0 {
            return time_to_leak(excess, self.limit.burst_rate);
        }
        Duration::ZERO
    }
}

/// Rounded down to nanoseconds, so that what rounding left in the bucket makes nobody wait again.
fn time_to_leak(units: f64, rate: f64) -> Duration {
    Duration::from_nanos((units * 1e9 / rate) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How much passes in a time if there is always more to do, in requests of `units`.
    fn passes(limit: Limit, units: f64, within: Duration) -> f64 {
        let (mut bucket, mut now, mut passed) = (Bucket::new(limit), Duration::ZERO, 0.0);
        loop {
            let wait = bucket.wait();
            now += wait;
            if now >= within {
                return passed;
            }
            bucket.leak(wait);
            bucket.pour(units);
            passed += units;
        }
    }

    fn about(found: f64, expected: f64) -> bool {
        (found - expected).abs() <= expected * 0.02 + 2.0
    }

    #[test]
    fn the_rate_holds_in_the_long_run() {
        let limit = Limit { rate: 100.0, ..Limit::default() };
        assert!(about(passes(limit, 1.0, Duration::from_secs(10)), 1000.0 + 10.0));
        assert!(about(passes(limit, 3.0, Duration::from_secs(10)), 1000.0 + 10.0));
    }

    #[test]
    fn a_request_larger_than_the_capacity_is_paid_for_afterwards() {
        let mut bucket = Bucket::new(Limit { rate: 100.0, ..Limit::default() });
        bucket.pour(1010.0);
        assert_eq!(bucket.wait(), Duration::from_secs(10));
        bucket.leak(Duration::from_secs(10));
        assert_eq!(bucket.wait(), Duration::ZERO);
    }

    #[test]
    fn a_burst_of_a_second_is_an_amount() {
        let limit = Limit { rate: 100.0, burst_rate: 2000.0, burst_seconds: 1.0 };
        assert!(about(passes(limit, 1.0, Duration::from_millis(1)), 2000.0));
        assert!(about(passes(limit, 1.0, Duration::from_secs(10)), 2000.0 + 1000.0));
    }

    #[test]
    fn a_longer_burst_has_a_rate_and_an_end() {
        let limit = Limit { rate: 100.0, burst_rate: 2000.0, burst_seconds: 5.0 };
        assert!(about(passes(limit, 1.0, Duration::from_millis(1)), 200.0), "a tenth of a second at once");
        assert!(about(passes(limit, 1.0, Duration::from_secs(3)), 200.0 + 6000.0));
        assert!(about(passes(limit, 1.0, Duration::from_secs(60)), 10_000.0 + 6000.0));
    }

    #[test]
    fn who_pauses_may_burst_again() {
        let mut bucket = Bucket::new(Limit { rate: 100.0, burst_rate: 200.0, burst_seconds: 1.0 });
        bucket.pour(250.0);
        assert_eq!(bucket.wait(), Duration::from_millis(500));
        bucket.leak(Duration::from_secs(3));
        bucket.pour(200.0);
        assert_eq!(bucket.wait(), Duration::ZERO);
    }

    #[test]
    fn no_limit_is_no_wait() {
        let mut bucket = Bucket::new(Limit::default());
        bucket.pour(1e18);
        assert_eq!(bucket.wait(), Duration::ZERO);
    }
}

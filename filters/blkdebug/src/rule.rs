//! Which requests something happens to.

use crate::errno::Errno;
use driveline_sdk::{Bytes, Error, Result, options};
use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

/// A kind of request.
#[options]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
    BlockStatus,
    Cache,
}

/// A rule as it is written.
#[options]
#[derive(Clone, Debug)]
pub(crate) struct RuleOptions {
    op: Option<Operation>,
    offset: Option<Bytes>,
    length: Option<Bytes>,
    #[serde(default)]
    after: u64,
    count: Option<u64>,
    #[serde(default)]
    once: bool,
    probability: Option<f64>,
    seed: Option<u64>,
    pub(crate) errno: Option<Errno>,
    short: Option<Bytes>,
    pub(crate) suspend: Option<String>,
}

/// A rule, and how often it has applied.
#[derive(Debug)]
pub(crate) struct Rule {
    op: Option<Operation>,
    range: Option<Range<u64>>,
    after: u64,
    /// Requests that came to it.
    matched: AtomicU64,
    /// How often it may still apply.
    left: AtomicU64,
    probability: Option<f64>,
    random: AtomicU64,
    pub(crate) errno: Option<Errno>,
    pub(crate) short_bytes: u64,
}

impl RuleOptions {
    /// Refuses what makes no sense. `place` is where the rule stands, for errors.
    pub(crate) fn check(&self, place: &str, has_control: bool) -> Result<()> {
        let refuse = |key: &str, text: &str| Err(Error::option(&format!("{place}.{key}"), text));
        if self.errno.is_none() && self.suspend.is_none() {
            return Err(Error::option(place, "nothing would happen by it, expected 'errno' or 'suspend'"));
        }
        if self.op == Some(Operation::Flush) && (self.offset.is_some() || self.length.is_some()) {
            let key = if self.offset.is_some() { "offset" } else { "length" };
            return refuse(key, "a flush has no range");
        }
        if self.length == Some(Bytes(0)) {
            return refuse("length", "no request is in it, expected at least 1");
        }
        if self.once && self.count.is_some() {
            return refuse("once", "it is the same as 'count = 1', so only one of them can be given");
        }
        if self.count == Some(0) {
            return refuse("count", "it would never apply, expected at least 1");
        }
        if self.probability.is_some_and(|probability| !(0.0..=1.0).contains(&probability)) {
            return refuse("probability", "expected a number from 0 to 1");
        }
        if self.seed.is_some() && self.probability.is_none() {
            return refuse("seed", "nothing is random without 'probability'");
        }
        if self.short.is_some() && (self.errno.is_none() || self.op != Some(Operation::Write)) {
            return refuse(
                "short",
                "only a write that fails can be short: it needs 'op = \"write\"' and 'errno'",
            );
        }
        let Some(tag) = &self.suspend else { return Ok(()) };
        if tag.is_empty() || !tag.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_') {
            return refuse("suspend", "it names a file, expected letters, digits, '-' and '_'");
        }
        if !has_control {
            return refuse("suspend", "nothing could resume it, expected the option 'control' of the node");
        }
        Ok(())
    }

    pub(crate) fn rule(&self) -> Rule {
        let start = self.offset.unwrap_or_default().0;
        let end = self.length.map_or(u64::MAX, |length| start.saturating_add(length.0));
        Rule {
            op: self.op,
            range: (self.offset.is_some() || self.length.is_some()).then_some(start..end),
            after: self.after,
            matched: AtomicU64::new(0),
            left: AtomicU64::new(if self.once { 1 } else { self.count.unwrap_or(u64::MAX) }),
            probability: self.probability,
            random: AtomicU64::new(self.seed.unwrap_or(0)),
            errno: self.errno,
            short_bytes: self.short.unwrap_or_default().0,
        }
    }
}

impl Rule {
    /// Does it apply to this request? It counts the answer. A flush has no range.
    pub(crate) fn applies(&self, op: Operation, range: Option<&Range<u64>>) -> bool {
        let its_op = self.op.is_none_or(|its| its == op);
        let its_range = match (&self.range, range) {
            (None, _) => true,
            (Some(its), Some(range)) => its.start.max(range.start) < its.end.min(range.end),
            (Some(_), None) => false,
        };
        if !its_op || !its_range || self.matched.fetch_add(1, Relaxed) < self.after {
            return false;
        }
        if self.probability.is_some_and(|probability| self.random() >= probability) {
            return false;
        }
        self.left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok()
    }

    /// A number from 0 to 1; the same ones for the same seed (SplitMix64, whose states are multiples of one number).
    fn random(&self) -> f64 {
        const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut z = self.random.fetch_add(STEP, Relaxed).wrapping_add(STEP);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

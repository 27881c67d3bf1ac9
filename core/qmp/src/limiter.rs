//! Events that come too often: at most one a second of a kind, and the last of those that came meanwhile is told then.
//!
//! Source: QEMU's monitor/monitor.c. Of the events that it limits, two are known here.

use crate::monitor::Monitor;
use parking_lot::Mutex;
use serde_json::Value;
use std::{collections::BTreeMap, time::Duration};

/// So much time is between two events that count as the same.
pub(crate) const INTERVAL: Duration = Duration::from_secs(1);

/// Events that were told less than [`INTERVAL`] ago, and what came of them since then.
#[derive(Debug, Default)]
pub(crate) struct Limiter(Mutex<BTreeMap<String, Option<Value>>>);

/// What counts as the same event; `None` for one that may come at any rate.
fn key(event: &Value) -> Option<String> {
    match event["event"].as_str()? {
        "QUORUM_REPORT_BAD" => Some(format!("bad {}", event["data"]["node-name"])),
        "QUORUM_FAILURE" => Some("failure".to_owned()),
        _ => None,
    }
}

/// What is to be done with an event.
#[derive(Debug, PartialEq)]
pub(crate) enum Verdict {
    /// It is told.
    Tell,
    /// It is told, and [`Limiter::next`] is asked with this key after each [`INTERVAL`].
    TellAndWait(String),
    /// It is kept.
    Keep,
}

impl Limiter {
    pub(crate) fn judge(&self, event: &Value) -> Verdict {
        let Some(key) = key(event) else { return Verdict::Tell };
        let mut waiting = self.0.lock();
        match waiting.get_mut(&key) {
            Some(last) => {
                *last = Some(event.clone());
                Verdict::Keep
            }
            None => {
                waiting.insert(key.clone(), None);
                Verdict::TellAndWait(key)
            }
        }
    }

    /// What was kept; `None`: nothing, so the next one is told at once.
    pub(crate) fn next(&self, key: &str) -> Option<Value> {
        let mut waiting = self.0.lock();
        let last = waiting.get_mut(key).and_then(Option::take);
        if last.is_none() {
            waiting.remove(key);
        }
        last
    }
}

impl Monitor {
    /// Tells all who are connected, unless the same has been told just now: then later.
    pub(crate) fn tell(&self, event: &Value) {
        match self.limiter().judge(event) {
            Verdict::Tell => self.tell_now(event),
            Verdict::Keep => {}
            Verdict::TellAndWait(key) => {
                self.tell_now(event);
                let weak = self.downgrade();
                let runtime = self.jobs().runtime();
                let sleeper = runtime.clone();
                runtime.spawn(Box::pin(async move {
                    loop {
                        sleeper.sleep(INTERVAL).await;
                        let Some(monitor) = Monitor::upgrade(&weak) else { return };
                        let Some(event) = monitor.limiter().next(&key) else { return };
                        monitor.tell_now(&event);
                    }
                }));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn of_those_that_come_too_often_the_last_is_told_later() {
        let limiter = Limiter::default();
        let bad = |node: &str, at: u32| json!({ "event": "QUORUM_REPORT_BAD", "data": { "node-name": node, "sector-num": at } });
        let Verdict::TellAndWait(key) = limiter.judge(&bad("a", 1)) else { panic!("the first is told") };
        assert!(matches!(limiter.judge(&bad("b", 1)), Verdict::TellAndWait(_)), "another node is another");
        assert_eq!([2, 3].map(|at| limiter.judge(&bad("a", at))), [Verdict::Keep, Verdict::Keep]);
        assert_eq!(limiter.next(&key), Some(bad("a", 3)));
        assert_eq!(limiter.judge(&bad("a", 4)), Verdict::Keep, "that was one more");
        assert_eq!(limiter.next(&key), Some(bad("a", 4)));
        assert_eq!(limiter.next(&key), None);
        assert!(matches!(limiter.judge(&bad("a", 5)), Verdict::TellAndWait(_)));
    }

    #[test]
    fn failures_of_all_quorums_count_as_one_and_other_events_are_not_limited() {
        let limiter = Limiter::default();
        let failure = |of: &str| json!({ "event": "QUORUM_FAILURE", "data": { "reference": of } });
        assert!(matches!(limiter.judge(&failure("a")), Verdict::TellAndWait(_)));
        assert_eq!(limiter.judge(&failure("b")), Verdict::Keep);
        let other = json!({ "event": "BLOCK_IMAGE_CORRUPTED", "data": {} });
        assert_eq!([(); 2].map(|()| limiter.judge(&other)), [Verdict::Tell, Verdict::Tell]);
    }
}

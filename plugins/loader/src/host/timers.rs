//! Timers on a thread of their own, for programs without an engine.

use super::HostServices;
use parking_lot::{Condvar, Mutex};
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    task::Waker,
    thread,
    time::{Duration, Instant},
};

/// The services of a program that installed none: a thread that sleeps until the next timer, begun with the first
/// one, and panics of filters told to the log and to the graphs.
#[derive(Debug)]
pub struct ThreadTimers {
    shared: Arc<Shared>,
    begun: Instant,
}

#[derive(Debug, Default)]
struct Shared {
    timers: Mutex<Timers>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Timers {
    running: bool,
    last: u64,
    /// In the order of their deadlines.
    waiting: BTreeMap<(u64, u64), Waker>,
    deadlines: HashMap<u64, u64>,
}

impl Default for ThreadTimers {
    fn default() -> Self {
        Self { shared: Arc::default(), begun: Instant::now() }
    }
}

fn ns_since(begun: Instant) -> u64 {
    u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

impl Shared {
    fn run(&self, begun: Instant) {
        let mut timers = self.timers.lock();
        loop {
            let now_ns = ns_since(begun);
            let later = timers.waiting.split_off(&(now_ns, u64::MAX));
            let due = std::mem::replace(&mut timers.waiting, later);
            for (_, timer) in due.keys() {
                timers.deadlines.remove(timer);
            }
            if !due.is_empty() {
                drop(timers);
                due.into_values().for_each(Waker::wake);
                timers = self.timers.lock();
                continue;
            }
            match timers.waiting.keys().next() {
                Some((deadline_ns, _)) => {
                    let wait = Duration::from_nanos(deadline_ns - now_ns);
                    self.changed.wait_for(&mut timers, wait);
                }
                None => self.changed.wait(&mut timers),
            }
        }
    }
}

impl HostServices for ThreadTimers {
    fn now_ns(&self) -> u64 {
        ns_since(self.begun)
    }

    fn timer_start(&self, deadline_ns: u64, waker: Waker) -> u64 {
        if deadline_ns <= self.now_ns() {
            return 0;
        }
        let mut timers = self.shared.timers.lock();
        timers.last += 1;
        let timer = timers.last;
        let first = timers.waiting.keys().next().is_none_or(|(other, _)| deadline_ns < *other);
        timers.waiting.insert((deadline_ns, timer), waker);
        timers.deadlines.insert(timer, deadline_ns);
        if !std::mem::replace(&mut timers.running, true) {
            let (shared, begun) = (self.shared.clone(), self.begun);
            let spawned =
                thread::Builder::new().name("plugin timers".into()).spawn(move || shared.run(begun));
            spawned.expect("a thread can be started");
        } else if first {
            self.shared.changed.notify_one();
        }
        timer
    }

    fn timer_poll(&self, timer: u64, waker: &Waker) -> bool {
        let mut timers = self.shared.timers.lock();
        let Some(deadline_ns) = timers.deadlines.get(&timer).copied() else { return true };
        let old = timers.waiting.insert((deadline_ns, timer), waker.clone());
        drop(timers);
        drop(old); // a waker's drop is its owner's code, so not under the lock
        false
    }

    fn timer_drop(&self, timer: u64) {
        let mut timers = self.shared.timers.lock();
        let old = timers
            .deadlines
            .remove(&timer)
            .and_then(|deadline_ns| timers.waiting.remove(&(deadline_ns, timer)));
        drop(timers);
        drop(old);
    }

    fn node_failed(&self, cookie: u64, message: &str) {
        // The graph knows its name, and logs it.
        driveline_graph::node_failed(cookie, message);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        sync::mpsc::{Sender, channel},
        task::Wake,
    };

    struct Tell(u64, Mutex<Sender<u64>>);

    impl Wake for Tell {
        fn wake(self: Arc<Self>) {
            let _ = self.1.lock().send(self.0);
        }
    }

    #[test]
    fn timers_wake_in_the_order_of_their_deadlines() {
        let timers = ThreadTimers::default();
        let (send, woken) = channel();
        let waker = |name| Waker::from(Arc::new(Tell(name, Mutex::new(send.clone()))));
        let now_ns = timers.now_ns();
        let late = timers.timer_start(now_ns + 30_000_000, waker(2));
        let early = timers.timer_start(now_ns + 5_000_000, waker(1));
        let never = timers.timer_start(now_ns + 10_000_000, waker(3));
        assert!(!timers.timer_poll(late, &waker(4)), "takes the new waker");
        timers.timer_drop(never);
        assert_eq!((woken.recv(), woken.recv()), (Ok(1), Ok(4)));
        assert!(timers.timer_poll(early, &waker(1)) && timers.timer_poll(late, &waker(2)));
        assert_eq!(timers.timer_start(now_ns, waker(5)), 0, "it has passed");
    }
}

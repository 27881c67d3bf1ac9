//! The loop of an engine thread: run tasks, read mail, fire timers, reap completions, sleep.

mod shared;
mod spin;
mod task;

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use async_task::Runnable;
use parking_lot::RwLock;
use slab::Slab;

pub(crate) use shared::{Mail, Shared};
pub(crate) use task::prepare;
pub use task::{JoinError, JoinHandle};

use self::spin::Spin;
use crate::driver::Driver;
use crate::engine::Inner;
use crate::timers::{TimerKey, Timers};

/// Tasks run in one go before the loop looks at completions and mail.
const TASKS_PER_TURN: usize = 64;
/// What one poll of a task may do without waiting before others get their turn: socket operations, or [`COST_BYTES`] of file
/// operations. It keeps a job that copies within the page cache, and a client that never pauses, from starving the rest.
const COSTS_PER_POLL: u32 = 128;
/// A file operation costs 1, and 1 more for each so many bytes.
pub(crate) const COST_BYTES: usize = 32 << 10;

thread_local! {
    // Constant and without destructor, so it can be read at any point of a thread's life.
    static CURRENT: Cell<*const Worker> = const { Cell::new(ptr::null()) };
}

/// The engine thread that this is, if it is one.
pub(crate) fn with_current<R>(f: impl FnOnce(Option<&Worker>) -> R) -> R {
    let worker = CURRENT.get();
    // SAFETY: `Worker::run` set it to a worker that it borrows until it clears it, on this thread.
    f(unsafe { worker.as_ref() })
}

/// All engine threads of the process by id, for the rare mail to a thread of which only the id is kept.
static THREADS: RwLock<Option<HashMap<u64, Weak<Shared>>>> = RwLock::new(None);

/// Sends mail to a thread by id; to a thread that is gone it is dropped.
pub(crate) fn post_to(thread: u64, mail: Mail) {
    let shared = THREADS.read().as_ref().and_then(|threads| threads.get(&thread)?.upgrade());
    if let Some(shared) = shared {
        shared.post(mail);
    }
}

/// An engine thread's own half.
#[derive(Debug)]
pub(crate) struct Worker {
    shared: Arc<Shared>,
    pub(crate) engine: Weak<Inner>,
    pub(crate) driver: Driver,
    pub(crate) timers: RefCell<Timers>,
    queue: RefCell<VecDeque<Runnable>>,
    mail: RefCell<VecDeque<Mail>>,
    /// Wakers of all tasks that wait, so that the thread can drop them before it ends.
    waiting: RefCell<Slab<Waker>>,
    costs_left: Cell<u32>,
    spin: Spin,
}

impl Worker {
    pub(crate) fn new(
        shared: Arc<Shared>,
        engine: Weak<Inner>,
        driver: Driver,
        spin_limit: Duration,
    ) -> Worker {
        THREADS.write().get_or_insert_default().insert(shared.id, Arc::downgrade(&shared));
        Worker {
            shared,
            engine,
            driver,
            timers: RefCell::default(),
            queue: RefCell::default(),
            mail: RefCell::default(),
            waiting: RefCell::default(),
            costs_left: Cell::new(COSTS_PER_POLL),
            spin: Spin::new(spin_limit),
        }
    }

    pub(crate) fn id(&self) -> u64 {
        self.shared.id
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Queues a task on this, the current thread: no lock and no system call.
    pub(crate) fn push(&self, runnable: Runnable) {
        self.queue.borrow_mut().push_back(runnable);
    }

    fn register(&self, waker: Waker) -> usize {
        self.waiting.borrow_mut().insert(waker)
    }

    fn unregister(&self, slot: usize) -> Waker {
        self.waiting.borrow_mut().remove(slot)
    }

    pub(crate) fn cancel_timer(&self, key: TimerKey) -> Option<Waker> {
        self.timers.borrow_mut().remove(key)
    }

    /// Takes an operation off what the running task may do at once. When all is used, the task goes to the end of the queue.
    pub(crate) fn poll_proceed(&self, cost: u32, cx: &mut Context<'_>) -> Poll<()> {
        match self.costs_left.get() {
            0 => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            left => {
                self.costs_left.set(left.saturating_sub(cost));
                Poll::Ready(())
            }
        }
    }

    /// The life of the thread.
    pub(crate) fn run(&self) {
        CURRENT.set(self);
        loop {
            self.run_tasks();
            self.read_mail();
            self.fire_timers();
            if self.shared.stopping() {
                break;
            }
            if self.queue.borrow().is_empty() {
                self.wait();
            } else {
                self.driver.turn();
            }
        }
        self.drop_tasks();
        CURRENT.set(ptr::null());
        THREADS.write().get_or_insert_default().remove(&self.shared.id);
    }

    fn run_tasks(&self) {
        for _ in 0..TASKS_PER_TURN {
            let Some(runnable) = self.queue.borrow_mut().pop_front() else { break };
            self.costs_left.set(COSTS_PER_POLL);
            // Panics of the future are caught within; this is for a waker of somebody else that panics.
            if catch_unwind(AssertUnwindSafe(|| runnable.run())).is_err() {
                tracing::error!(target: "driveline::engine", "a waker panicked");
            }
        }
    }

    fn read_mail(&self) {
        if !self.shared.has_mail() {
            return;
        }
        let mut mail = self.mail.borrow_mut();
        self.shared.take_mail(&mut mail);
        while let Some(message) = mail.pop_front() {
            match message {
                Mail::Run(runnable) => self.push(runnable),
                Mail::CancelTimer(key) => drop(self.cancel_timer(key)),
                Mail::Forget(key, fd) => self.driver.forget(key, fd),
            }
        }
    }

    fn fire_timers(&self) {
        let Some(deadline) = self.timers.borrow().next_deadline() else { return };
        let now = Instant::now();
        if deadline > now {
            return;
        }
        loop {
            let Some(waker) = self.timers.borrow_mut().pop_due(now) else { break };
            waker.wake();
        }
    }

    /// Nothing to run: look for a moment if that has paid lately, then sleep.
    fn wait(&self) {
        let deadline = self.timers.borrow().next_deadline();
        if self.spin.is_off() {
            self.sleep(deadline);
            return;
        }
        let begin = Instant::now();
        let spin = self.spin.next();
        if spin.is_zero() || !self.look(deadline.map_or(begin + spin, |at| at.min(begin + spin))) {
            self.sleep(deadline);
        }
        self.spin.note(!spin.is_zero(), begin.elapsed());
    }

    /// Looks for something to do until `end`, awake. Returns whether there is something.
    fn look(&self, end: Instant) -> bool {
        self.driver.turn();
        loop {
            if !self.queue.borrow().is_empty() || self.shared.has_mail() {
                return true;
            }
            if self.driver.ready() {
                self.driver.turn();
                return true;
            }
            if Instant::now() >= end {
                return false;
            }
            std::hint::spin_loop();
        }
    }

    fn sleep(&self, deadline: Option<Instant>) {
        if !self.shared.fall_asleep() {
            return;
        }
        let timeout = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        self.driver.park(timeout);
        self.shared.awake();
    }

    /// Drops every task on this thread, and refuses new ones. A destructor may still cancel operations, which works as long as
    /// the driver is there; it may wake and spawn, so this goes on until nothing is left.
    fn drop_tasks(&self) {
        loop {
            self.read_mail();
            loop {
                let Some(runnable) = self.queue.borrow_mut().pop_front() else { break };
                drop(runnable);
            }
            let waker = self.waiting.borrow().iter().next().map(|(_, waker)| waker.clone());
            let idle = waker.is_none() && self.queue.borrow().is_empty() && !self.shared.has_mail();
            if let Some(waker) = waker {
                waker.wake();
            }
            if idle {
                break;
            }
        }
        // What arrives from here on was never polled, and is dropped by whoever sends it.
        drop(self.shared.close());
    }
}

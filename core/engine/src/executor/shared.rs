//! What other threads see of an engine thread: its inbox and the descriptor that ends its sleep.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use async_task::Runnable;
use parking_lot::Mutex;

use crate::ops::Key;
use crate::timers::TimerKey;

/// A message to an engine thread.
#[derive(Debug)]
pub(crate) enum Mail {
    /// A task to run there.
    Run(Runnable),
    /// A timer whose owner was dropped on another thread.
    CancelTimer(TimerKey),
    /// A wait for a descriptor, likewise.
    Forget(Key, RawFd),
}

/// The public half of an engine thread.
#[derive(Debug)]
pub(crate) struct Shared {
    /// Unique among all threads of all engines of this process.
    pub(crate) id: u64,
    /// Its place in its engine.
    pub(crate) index: usize,
    inbox: Mutex<Inbox>,
    /// Set after something was put into the inbox, so that an awake thread looks without taking the lock.
    pending: AtomicBool,
    /// The thread is about to sleep or sleeps: whoever turns this off must write to `wake`.
    asleep: AtomicBool,
    wake: OwnedFd,
    stop: AtomicBool,
}

#[derive(Debug, Default)]
struct Inbox {
    mail: VecDeque<Mail>,
    closed: bool,
}

impl Shared {
    pub(crate) fn new(index: usize) -> io::Result<Shared> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        Ok(Shared {
            id: NEXT.fetch_add(1, SeqCst),
            index,
            inbox: Mutex::default(),
            pending: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            wake: rustix::event::eventfd(0, flags)?,
            stop: AtomicBool::new(false),
        })
    }

    pub(crate) fn wake_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }

    /// Delivers mail; a closed inbox drops it (a task is thereby cancelled).
    pub(crate) fn post(&self, mail: Mail) {
        let refused = {
            let mut inbox = self.inbox.lock();
            if inbox.closed {
                Some(mail)
            } else {
                inbox.mail.push_back(mail);
                None
            }
        };
        match refused {
            Some(mail) => drop(mail),
            None => {
                self.pending.store(true, SeqCst);
                self.rouse();
            }
        }
    }

    /// Asks the thread to drop its tasks and end.
    pub(crate) fn stop(&self) {
        self.stop.store(true, SeqCst);
        self.pending.store(true, SeqCst);
        self.rouse();
    }

    pub(crate) fn stopping(&self) -> bool {
        self.stop.load(SeqCst)
    }

    /// The one system call of a cross-thread wake, made only when the thread sleeps.
    fn rouse(&self) {
        if self.asleep.load(SeqCst) && self.asleep.swap(false, SeqCst) {
            self.write_wake();
        }
    }

    pub(crate) fn write_wake(&self) {
        // Only a full counter could refuse, after 2^64 wakes.
        let _ = rustix::io::write(self.wake.as_fd(), &1u64.to_ne_bytes());
    }

    pub(crate) fn has_mail(&self) -> bool {
        self.pending.load(SeqCst)
    }

    /// Moves all mail into `into`. `into` is empty; the two queues change places.
    pub(crate) fn take_mail(&self, into: &mut VecDeque<Mail>) {
        self.pending.store(false, SeqCst);
        std::mem::swap(&mut self.inbox.lock().mail, into);
    }

    /// Announces sleep. False: mail has come, stay awake.
    ///
    /// This store and the load of `pending` pair with the store and load in `post`: one of the two sides sees the other.
    pub(crate) fn fall_asleep(&self) -> bool {
        self.asleep.store(true, SeqCst);
        if self.pending.load(SeqCst) {
            self.asleep.store(false, SeqCst);
            return false;
        }
        true
    }

    pub(crate) fn awake(&self) {
        self.asleep.store(false, SeqCst);
    }

    /// Refuses mail from now on, and hands back what had come.
    pub(crate) fn close(&self) -> VecDeque<Mail> {
        let mut inbox = self.inbox.lock();
        inbox.closed = true;
        std::mem::take(&mut inbox.mail)
    }
}

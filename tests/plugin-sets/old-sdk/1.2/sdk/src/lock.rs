//! Locks on byte ranges.

use std::{
    collections::VecDeque,
    fmt,
    future::Future,
    ops::Range,
    pin::Pin,
    sync::{Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

/// Keeps requests apart whose ranges overlap.
///
/// It is fair: who comes later waits for all overlapping ones that came before, whether they hold the lock or wait
/// for it themselves. An uncontended lock takes no allocation (but for the first few).
///
/// ```
/// # use driveline_sdk::{RangeLock, testing::block_on};
/// # block_on(async {
/// let lock = RangeLock::new();
/// let first = lock.lock(0..4096).await;
/// let elsewhere = lock.lock(4096..8192).await; // does not wait
/// drop(first);
/// let again = lock.lock(0..512).await;
/// # drop((elsewhere, again)) });
/// ```
#[derive(Default)]
pub struct RangeLock {
    /// In the order of arrival.
    entries: Mutex<Entries>,
}

#[derive(Default)]
struct Entries {
    list: VecDeque<Entry>,
    next_id: u64,
}

struct Entry {
    id: u64,
    range: Range<u64>,
    shared: bool,
    /// Who waits; `None` for a holder, and for a waiter that is just being woken.
    waker: Option<Waker>,
}

impl fmt::Debug for RangeLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.entries().list.iter().map(|entry| entry.range.clone())).finish()
    }
}

impl Entries {
    /// Must `entry`, of which `position` others came before, wait?
    fn must_wait(&self, position: usize) -> bool {
        let entry = &self.list[position];
        self.list.iter().take(position).any(|other| {
            other.range.start.max(entry.range.start) < other.range.end.min(entry.range.end)
                && !(other.shared && entry.shared)
        })
    }

    /// Takes an entry away; returns the wakers of those that need not wait any more.
    fn remove(&mut self, id: u64) -> Vec<Waker> {
        let position =
            self.list.iter().position(|entry| entry.id == id).expect("an entry lives as long as its owner");
        self.list.remove(position);
        let mut woken = Vec::new();
        for later in position..self.list.len() {
            if self.list[later].waker.is_some() && !self.must_wait(later) {
                woken.extend(self.list[later].waker.take());
            }
        }
        woken
    }
}

impl RangeLock {
    /// Nothing locked.
    pub fn new() -> Self {
        Self::default()
    }

    /// Locks a range against all others that overlap it.
    pub fn lock(&self, range: Range<u64>) -> RangeLocking<'_> {
        RangeLocking { lock: self, range, shared: false, id: None }
    }

    /// Locks a range against those of [`RangeLock::lock`] that overlap it, not against other shared ones.
    pub fn lock_shared(&self, range: Range<u64>) -> RangeLocking<'_> {
        RangeLocking { lock: self, range, shared: true, id: None }
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn release(&self, id: u64) {
        // Wakers run code of others, so never under the mutex.
        let woken = self.entries().remove(id);
        woken.into_iter().for_each(Waker::wake);
    }
}

/// The future of a lock. Dropped before it is ready, it leaves the queue.
#[derive(Debug)]
pub struct RangeLocking<'a> {
    lock: &'a RangeLock,
    range: Range<u64>,
    shared: bool,
    id: Option<u64>,
}

impl<'a> Future for RangeLocking<'a> {
    type Output = RangeGuard<'a>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<RangeGuard<'a>> {
        let lock = self.lock;
        let mut entries = lock.entries();
        let (id, position) = match self.id {
            Some(id) => {
                (id, entries.list.iter().position(|entry| entry.id == id).expect("still in the queue"))
            }
            None => {
                let id = entries.next_id;
                entries.next_id += 1;
                entries.list.push_back(Entry {
                    id,
                    range: self.range.clone(),
                    shared: self.shared,
                    waker: None,
                });
                self.id = Some(id);
                (id, entries.list.len() - 1)
            }
        };
        if entries.must_wait(position) {
            entries.list[position].waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        entries.list[position].waker = None;
        self.id = None;
        Poll::Ready(RangeGuard { lock, id })
    }
}

impl Drop for RangeLocking<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.lock.release(id);
        }
    }
}

/// A locked range; unlocked on drop.
#[derive(Debug)]
#[must_use = "the range is unlocked when this is dropped"]
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    id: u64,
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        self.lock.release(self.id);
    }
}

//! The io_uring ring of one engine thread.
//!
//! Entries are queued without a system call. One `io_uring_enter` a turn submits all of them and, when there is nothing to
//! run, waits in the same call, with the next timer as its time limit.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use io_uring::squeue::Entry;
use io_uring::{IoUring, Probe, cqueue, opcode, types};

use crate::ops::{IGNORE, Key, Ops, WAKE};

const SUBMISSIONS: u32 = 256;
const COMPLETIONS: u32 = 4096;

pub(crate) struct Ring {
    uring: RefCell<IoUring>,
    ops: RefCell<Ops>,
    /// Entries that found the submission queue full even after submitting. Rare: the kernel was out of memory, or had
    /// completions to deliver first.
    backlog: RefCell<VecDeque<Entry>>,
    /// Kept for its capacity.
    wakers: Cell<Vec<Waker>>,
    wake_fd: RawFd,
}

impl Ring {
    /// Builds the ring of the calling thread, and checks with a wake-up that the kernel does what is needed.
    ///
    /// `wake_fd` is an eventfd that stays open as long as the ring lives.
    pub(crate) fn new(wake_fd: RawFd) -> io::Result<Ring> {
        let uring = build()?;
        let features = uring.params();
        if !(features.is_feature_ext_arg()
            && features.is_feature_nodrop()
            && features.is_feature_submit_stable())
        {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "io_uring is too old here"));
        }
        let mut probe = Probe::new();
        uring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
            opcode::PollAdd::CODE,
            opcode::AsyncCancel::CODE,
        ];
        if needed.iter().any(|&code| !probe.is_supported(code)) {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "io_uring lacks an operation here"));
        }
        let ring = Ring {
            uring: RefCell::new(uring),
            ops: RefCell::default(),
            backlog: RefCell::default(),
            wakers: Cell::default(),
            wake_fd,
        };
        ring.try_wake()?;
        Ok(ring)
    }

    /// Wakes itself once: proves that multishot polls (Linux 5.13) and waiting with a time limit work.
    fn try_wake(&self) -> io::Result<()> {
        self.arm_wake();
        // SAFETY: the descriptor is open by contract, and the eight bytes are on the stack.
        unsafe { libc::write(self.wake_fd, (&raw const ONE).cast(), 8) };
        self.enter(1, Some(Duration::from_secs(1)))?;
        let mut uring = self.uring.borrow_mut();
        match uring.completion().next() {
            Some(entry) if entry.user_data() == WAKE && entry.result() > 0 && cqueue::more(entry.flags()) => {
                Ok(())
            }
            _ => Err(io::Error::new(io::ErrorKind::Unsupported, "io_uring does not wake here")),
        }
    }

    /// A multishot poll that nobody ever reads from: each write to an eventfd triggers it anew.
    fn arm_wake(&self) {
        let entry = opcode::PollAdd::new(types::Fd(self.wake_fd), libc::POLLIN as u32).multi(true).build();
        // SAFETY: the entry lends no memory.
        unsafe { self.push(entry.user_data(WAKE)) };
    }

    /// Queues an operation.
    ///
    /// # Safety
    ///
    /// The memory and the descriptor that `entry` names stay valid until the operation completes, which `cancel_and_wait`
    /// brings about.
    pub(crate) unsafe fn submit(&self, entry: Entry) -> Key {
        let key = self.ops.borrow_mut().insert();
        // SAFETY: the caller's promise.
        unsafe { self.push(entry.user_data(key.user_data())) };
        key
    }

    pub(crate) fn poll_add(&self, fd: RawFd, mask: i16) -> Key {
        let entry = opcode::PollAdd::new(types::Fd(fd), mask as u16 as u32).build();
        // SAFETY: a poll lends no memory, and a closed descriptor only makes it fail.
        unsafe { self.submit(entry) }
    }

    /// # Safety
    ///
    /// As for [`Ring::submit`].
    unsafe fn push(&self, entry: Entry) {
        let mut backlog = self.backlog.borrow_mut();
        if backlog.is_empty() {
            let mut uring = self.uring.borrow_mut();
            // SAFETY: the caller's promise.
            if unsafe { uring.submission().push(&entry) }.is_ok() {
                return;
            }
            // Errors show again at the next turn, which reaps completions as well.
            let _ = uring.submit();
            // SAFETY: the caller's promise.
            if unsafe { uring.submission().push(&entry) }.is_ok() {
                return;
            }
        }
        backlog.push_back(entry);
    }

    pub(crate) fn poll_result(&self, key: Key, cx: &mut Context<'_>) -> Poll<i32> {
        let mut old = None;
        let polled = self.ops.borrow_mut().poll(key, cx, &mut old);
        drop(old);
        polled
    }

    /// Gives up an operation that lends no memory.
    pub(crate) fn forget(&self, key: Key) {
        let mut old = None;
        if self.ops.borrow_mut().forget(key, &mut old) {
            self.push_cancel(key);
        }
    }

    /// Cancels an operation and waits until the kernel has let go of its memory.
    pub(crate) fn cancel_and_wait(&self, key: Key) {
        if !self.ops.borrow_mut().is_done(key) {
            self.push_cancel(key);
        }
        while !self.ops.borrow_mut().is_done(key) {
            if let Err(error) = self.enter(1, None) {
                fatal(&error);
            }
            self.reap();
        }
        self.ops.borrow_mut().forget(key, &mut None);
    }

    fn push_cancel(&self, key: Key) {
        let entry = opcode::AsyncCancel::new(key.user_data()).build();
        // SAFETY: the entry lends no memory.
        unsafe { self.push(entry.user_data(IGNORE)) };
    }

    pub(crate) fn turn(&self) {
        let idle = {
            let mut uring = self.uring.borrow_mut();
            let submissions = uring.submission();
            submissions.is_empty() && !submissions.taskrun() && !submissions.cq_overflow()
        };
        if !(idle && self.backlog.borrow().is_empty())
            && let Err(error) = self.enter(0, None)
        {
            fatal(&error);
        }
        self.reap();
    }

    pub(crate) fn ready(&self) -> bool {
        let mut uring = self.uring.borrow_mut();
        if !uring.completion().is_empty() {
            return true;
        }
        let submissions = uring.submission();
        submissions.taskrun() || submissions.cq_overflow()
    }

    pub(crate) fn park(&self, timeout: Option<Duration>) {
        if let Err(error) = self.enter(1, timeout) {
            fatal(&error);
        }
        self.reap();
    }

    /// Submits all entries, and waits for `want` completions.
    fn enter(&self, want: usize, timeout: Option<Duration>) -> io::Result<()> {
        let mut uring = self.uring.borrow_mut();
        let mut backlog = self.backlog.borrow_mut();
        while let Some(entry) = backlog.pop_front() {
            // SAFETY: whoever called `push` with it promised.
            if unsafe { uring.submission().push(&entry) }.is_err() {
                backlog.push_front(entry);
                break;
            }
        }
        // Never wait with something left to submit.
        let want = if backlog.is_empty() { want } else { 0 };
        let result = match timeout {
            None => uring.submit_and_wait(want),
            Some(timeout) => {
                let timeout = types::Timespec::from(timeout);
                uring.submitter().submit_with_args(want, &types::SubmitArgs::new().timespec(&timeout))
            }
        };
        match result {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                // Time over, a signal, or completions must be reaped first; memory is short for a moment.
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// Collects completions, then wakes: a waker may run anything, so no borrow is held by then.
    fn reap(&self) {
        let mut wakers = self.wakers.take();
        let mut rearm = false;
        {
            let mut uring = self.uring.borrow_mut();
            let mut ops = self.ops.borrow_mut();
            for entry in uring.completion() {
                match entry.user_data() {
                    IGNORE => {}
                    WAKE => rearm |= !cqueue::more(entry.flags()),
                    user_data => wakers.extend(ops.complete(user_data, entry.result())),
                }
            }
        }
        if rearm {
            self.arm_wake();
        }
        for waker in wakers.drain(..) {
            waker.wake();
        }
        self.wakers.set(wakers);
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // Forgotten polls may be left, and end with the ring; lent memory never is: its owners waited.
        tracing::trace!(target: "driveline::engine", left = self.ops.borrow().in_flight(), "ring closed");
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("in_flight", &self.ops.borrow().in_flight()).finish_non_exhaustive()
    }
}

static ONE: u64 = 1;

/// The best set of flags that this kernel takes: completions run only when this thread asks (6.1), or without interrupting it
/// (5.19), or as ever.
fn build() -> io::Result<IoUring> {
    let builder = || {
        let mut builder = IoUring::builder();
        builder.setup_clamp().setup_cqsize(COMPLETIONS).dontfork();
        builder
    };
    builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_submit_all()
        .build(SUBMISSIONS)
        .or_else(|_| {
            builder().setup_coop_taskrun().setup_taskrun_flag().setup_submit_all().build(SUBMISSIONS)
        })
        .or_else(|_| builder().build(SUBMISSIONS))
}

/// A ring that cannot be entered any more leaves lent memory in the kernel's hands: nothing is safe but to end.
fn fatal(error: &io::Error) -> ! {
    tracing::error!(target: "driveline::engine", %error, "io_uring_enter failed");
    eprintln!("driveline-engine: io_uring_enter failed: {error}");
    std::process::abort()
}

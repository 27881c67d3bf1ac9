//! Waiting without io_uring: epoll for sockets and for the thread's own descriptor. Files go to the blocking pool.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::ops::{Key, Ops, WAKE};

const EVENTS: usize = 128;

#[derive(Debug)]
pub(crate) struct Epoll {
    epoll: OwnedFd,
    ops: RefCell<Ops>,
    /// By descriptor number. A registration outlives its waits: arming it again is one `EPOLL_CTL_MOD`.
    watches: RefCell<Vec<Watch>>,
    /// Completed since the last turn; woken when no borrow is held.
    wakers: RefCell<Vec<Waker>>,
    /// Cleared when `epoll_pwait2` (Linux 5.11) turns out to be missing.
    pwait2: Cell<bool>,
}

#[derive(Debug, Default)]
struct Watch {
    waits: Vec<(Key, i16)>,
}

impl Epoll {
    /// `wake_fd` is an eventfd that stays open as long as this lives.
    pub(crate) fn new(wake_fd: RawFd) -> io::Result<Epoll> {
        // SAFETY: no memory is passed.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and ours.
        let epoll = unsafe { OwnedFd::from_raw_fd(fd) };
        let this = Epoll {
            epoll,
            ops: RefCell::default(),
            watches: RefCell::default(),
            wakers: RefCell::default(),
            pwait2: Cell::new(true),
        };
        // Edge-triggered, so each write counts once and nobody has to read.
        this.control(libc::EPOLL_CTL_ADD, wake_fd, (libc::EPOLLIN | libc::EPOLLET) as u32, WAKE)?;
        Ok(this)
    }

    fn control(&self, operation: i32, fd: RawFd, events: u32, data: u64) -> io::Result<()> {
        let mut event = libc::epoll_event { events, u64: data };
        // SAFETY: the event is on the stack.
        match unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), operation, fd, &raw mut event) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    pub(crate) fn poll_add(&self, fd: RawFd, mask: i16) -> Key {
        let key = self.ops.borrow_mut().insert();
        let mut watches = self.watches.borrow_mut();
        let index = fd as usize;
        if watches.len() <= index {
            watches.resize_with(index + 1, Watch::default);
        }
        watches[index].waits.push((key, mask));
        if let Err(error) = self.arm(fd, &watches[index]) {
            // Not a descriptor that can be waited for: said at once.
            watches[index].waits.pop();
            let errno = error.raw_os_error().unwrap_or(libc::EINVAL);
            self.ops.borrow_mut().complete(key.user_data(), -errno);
        }
        key
    }

    /// Arms for one event of any kind that is waited for.
    fn arm(&self, fd: RawFd, watch: &Watch) -> io::Result<()> {
        // poll's and epoll's bits are the same numbers for all that is used here.
        let mask = watch.waits.iter().fold(0, |all, (_, mask)| all | *mask as u16 as u32);
        let events = mask | libc::EPOLLONESHOT as u32;
        match self.control(libc::EPOLL_CTL_MOD, fd, events, fd as u64) {
            // Never registered, or the number names a new file since.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                self.control(libc::EPOLL_CTL_ADD, fd, events, fd as u64)
            }
            other => other,
        }
    }

    pub(crate) fn poll_result(&self, key: Key, cx: &mut Context<'_>) -> Poll<i32> {
        let mut old = None;
        let polled = self.ops.borrow_mut().poll(key, cx, &mut old);
        drop(old);
        polled
    }

    pub(crate) fn forget(&self, key: Key, fd: RawFd) {
        let mut old = None;
        if self.ops.borrow_mut().forget(key, &mut old) {
            // An event that is armed still comes, once, and finds nobody.
            self.watches.borrow_mut()[fd as usize].waits.retain(|(wait, _)| *wait != key);
            self.ops.borrow_mut().complete(key.user_data(), -libc::ECANCELED);
        }
    }

    pub(crate) fn turn(&self) {
        if self.ops.borrow().in_flight() > 0 {
            self.collect(Some(Duration::ZERO));
        }
        self.wake();
    }

    pub(crate) fn ready(&self) -> bool {
        if self.ops.borrow().in_flight() > 0 {
            self.collect(Some(Duration::ZERO));
        }
        !self.wakers.borrow().is_empty()
    }

    pub(crate) fn park(&self, timeout: Option<Duration>) {
        self.collect(timeout);
        self.wake();
    }

    fn wake(&self) {
        if self.wakers.borrow().is_empty() {
            return;
        }
        let mut wakers = self.wakers.take();
        for waker in wakers.drain(..) {
            waker.wake();
        }
        // Back, for its capacity; what was added meanwhile stays.
        self.wakers.borrow_mut().append(&mut wakers);
    }

    fn collect(&self, timeout: Option<Duration>) {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; EVENTS];
        let count = self.wait(&mut events, timeout);
        for event in &events[..count] {
            let libc::epoll_event { events: ready, u64: data } = *event;
            if data != WAKE {
                self.dispatch(data as RawFd, ready);
            }
        }
    }

    fn dispatch(&self, fd: RawFd, ready: u32) {
        let broken = ready & (libc::EPOLLERR | libc::EPOLLHUP) as u32 != 0;
        let mut watches = self.watches.borrow_mut();
        let mut ops = self.ops.borrow_mut();
        let mut wakers = self.wakers.borrow_mut();
        let watch = &mut watches[fd as usize];
        watch.waits.retain(|(key, mask)| {
            let hit = broken || *mask as u16 as u32 & ready != 0;
            if hit {
                wakers.extend(ops.complete(key.user_data(), ready as i32));
            }
            !hit
        });
        if !watch.waits.is_empty()
            && let Err(error) = self.arm(fd, watch)
        {
            let errno = error.raw_os_error().unwrap_or(libc::EINVAL);
            for (key, _) in watch.waits.drain(..) {
                wakers.extend(ops.complete(key.user_data(), -errno));
            }
        }
    }

    fn wait(&self, events: &mut [libc::epoll_event; EVENTS], timeout: Option<Duration>) -> usize {
        let (epoll, first) = (self.epoll.as_raw_fd(), events.as_mut_ptr());
        let mut result = -1i64;
        let mut done = false;
        if self.pwait2.get() {
            let time = timeout.map(|timeout| libc::timespec {
                tv_sec: timeout.as_secs().min(i32::MAX as u64) as _,
                tv_nsec: timeout.subsec_nanos().into(),
            });
            let time = time.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
            // SAFETY: `events` has room for EVENTS entries, `time` is null or on the stack, and no signal mask is passed.
            result = unsafe {
                libc::syscall(libc::SYS_epoll_pwait2, epoll, first, EVENTS as i32, time, 0usize, 0usize)
            };
            done = result >= 0 || io::Error::last_os_error().raw_os_error() != Some(libc::ENOSYS);
            self.pwait2.set(done);
        }
        if !done {
            // Rounded up: a timer never fires early.
            let millis = timeout.map_or(-1, |timeout| timeout.as_micros().div_ceil(1000).min(60_000) as i32);
            // SAFETY: `events` has room for EVENTS entries.
            result = unsafe { libc::epoll_wait(epoll, first, EVENTS as i32, millis) }.into();
        }
        // The only error that a correct call has is EINTR.
        usize::try_from(result).unwrap_or(0)
    }
}

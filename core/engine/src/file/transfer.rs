//! One file operation as a future: inline when that does not block, else through the ring or the blocking pool.

use std::future::Future;
use std::io;
use std::os::fd::RawFd;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use io_uring::{opcode, squeue, types};

use super::File;
use crate::driver::Driver;
use crate::executor::{COST_BYTES, with_current};
use crate::ops::Key;
use crate::pool::Lent;

/// Longer reads and writes are copies that other requests should not wait for: this takes about a millisecond.
const INLINE_READ_MAX: usize = 4 << 20;
/// Smaller, as the file system may have to find room for the data as well.
const INLINE_WRITE_MAX: usize = 512 << 10;

/// What is to be done; plain words, as the kernel takes them.
#[derive(Clone, Copy, Debug)]
enum Call {
    Read { iov: *const libc::iovec, count: u32, offset: u64 },
    Write { iov: *const libc::iovec, count: u32, offset: u64 },
    Sync { datasync: bool },
    Allocate { mode: i32, offset: u64, length: u64 },
}

#[derive(Debug)]
enum State {
    Begin,
    /// In the ring of the thread with this id.
    Ring(u64, Key),
    Pool(Lent),
    End,
}

/// The future behind all file operations.
#[derive(Debug)]
pub(super) struct Transfer<'f> {
    file: &'f File,
    call: Call,
    state: State,
}

// SAFETY: the pointers are to memory that the caller of the unsafe constructors lends to this operation, whichever thread
// it runs on. An operation that a ring has begun is polled and dropped on that ring's thread only, which is checked.
unsafe impl Send for Transfer<'_> {}

impl<'f> Transfer<'f> {
    fn new(file: &'f File, call: Call) -> Self {
        Transfer { file, call, state: State::Begin }
    }

    /// Errors are negative errno values, as the ring's.
    fn poll_raw(&mut self, cx: &mut Context<'_>) -> Poll<i32> {
        loop {
            let result = match &mut self.state {
                State::Begin => {
                    let proceed = with_current(|worker| worker.map(|w| w.poll_proceed(self.cost(), cx)));
                    if proceed.is_some_and(|proceed| proceed.is_pending()) {
                        return Poll::Pending;
                    }
                    if let Some(result) = self.inline() {
                        result
                    } else {
                        self.state = self.begin();
                        continue;
                    }
                }
                State::Ring(thread, key) => {
                    let (thread, key) = (*thread, *key);
                    let polled = with_current(|worker| match worker {
                        Some(worker) if worker.id() == thread => match &worker.driver {
                            Driver::Ring(ring) => ring.poll_result(key, cx),
                            Driver::Epoll(_) => unreachable!("a thread keeps its driver"),
                        },
                        _ => panic!("a file operation is polled on another thread than the one it began on"),
                    });
                    let Poll::Ready(result) = polled else { return Poll::Pending };
                    self.state = State::End;
                    if matches!(-result, libc::EAGAIN | libc::EINTR) {
                        self.state = self.begin_in_pool();
                        continue;
                    }
                    result
                }
                State::Pool(lent) => {
                    let Poll::Ready(result) = Pin::new(lent).poll(cx) else { return Poll::Pending };
                    result
                }
                State::End => panic!("a file operation is polled after its end"),
            };
            self.state = State::End;
            return Poll::Ready(result);
        }
    }

    /// How many bytes a read or write is to move.
    fn length(&self) -> usize {
        match self.call {
            Call::Read { iov, count, .. } | Call::Write { iov, count, .. } if count > 0 => {
                // SAFETY: the array is part of the lent memory.
                let parts = unsafe { std::slice::from_raw_parts(iov, count as usize) };
                parts.iter().map(|part| part.iov_len).sum()
            }
            _ => 0,
        }
    }

    fn cost(&self) -> u32 {
        1 + (self.length() / COST_BYTES).min(u32::MAX as usize / 2) as u32
    }

    /// Tries what the page cache can answer at once. `None`: it would block.
    fn inline(&self) -> Option<i32> {
        match self.call {
            Call::Read { .. } if self.length() > INLINE_READ_MAX => None,
            Call::Read { iov, count, offset } => {
                if self.file.ways.read_nowait() {
                    // SAFETY: the memory is lent to this operation (`read_at`).
                    let result = unsafe { preadv2(self.file.fd(), iov, count, offset, libc::RWF_NOWAIT) };
                    match -result {
                        libc::EAGAIN | libc::EINTR => return None,
                        libc::EOPNOTSUPP => self.file.ways.refuse_read_nowait(),
                        _ => return Some(result),
                    }
                }
                if !self.file.ways.in_memory() {
                    return None;
                }
                // SAFETY: as above.
                Some(unsafe { preadv2(self.file.fd(), iov, count, offset, 0) })
            }
            Call::Write { .. } if self.length() > INLINE_WRITE_MAX => None,
            Call::Write { iov, count, offset } => {
                if self.file.ways.write_nowait() {
                    // SAFETY: the memory is lent to this operation (`write_at`).
                    let result = unsafe { pwritev2(self.file.fd(), iov, count, offset, libc::RWF_NOWAIT) };
                    match -result {
                        libc::EAGAIN | libc::EINTR => return None,
                        libc::EOPNOTSUPP => self.file.ways.refuse_write_nowait(),
                        _ => return Some(result),
                    }
                }
                if !self.file.ways.write_inline() {
                    return None;
                }
                let begin = Instant::now();
                // SAFETY: as above.
                let result = unsafe { pwritev2(self.file.fd(), iov, count, offset, 0) };
                self.file.ways.note_write(begin);
                (result != -libc::EINTR).then_some(result)
            }
            Call::Sync { .. } | Call::Allocate { .. } => None,
        }
    }

    fn begin(&self) -> State {
        let in_ring = with_current(|worker| {
            let worker = worker?;
            let Driver::Ring(ring) = &worker.driver else { return None };
            // SAFETY: the memory is lent until this future completes or its drop returns, and `drop` waits for the kernel.
            let key = unsafe { ring.submit(self.entry()) };
            Some(State::Ring(worker.id(), key))
        });
        in_ring.unwrap_or_else(|| self.begin_in_pool())
    }

    fn begin_in_pool(&self) -> State {
        let (fd, call) = (self.file.fd(), self.call);
        // SAFETY: the memory and the file outlive `Lent`, whose drop waits; `call` owns nothing.
        let lent = unsafe {
            Lent::start(move || {
                loop {
                    let result = call.block(fd);
                    if result != -libc::EINTR {
                        break result;
                    }
                }
            })
        };
        State::Pool(lent.expect("a thread for blocking work can be started"))
    }

    fn entry(&self) -> squeue::Entry {
        let fd = types::Fd(self.file.fd());
        let entry = match self.call {
            Call::Read { iov, count, offset } => opcode::Readv::new(fd, iov, count).offset(offset).build(),
            Call::Write { iov, count, offset } => opcode::Writev::new(fd, iov, count).offset(offset).build(),
            Call::Sync { datasync } => {
                let flags = if datasync { types::FsyncFlags::DATASYNC } else { types::FsyncFlags::empty() };
                opcode::Fsync::new(fd).flags(flags).build()
            }
            Call::Allocate { mode, offset, length } => {
                opcode::Fallocate::new(fd, length).offset(offset).mode(mode).build()
            }
        };
        // The kernel would copy at once what is in the page cache, on this thread; for much, it is to use another.
        let copies = !self.file.direct && self.length() > INLINE_READ_MAX;
        if copies { entry.flags(squeue::Flags::ASYNC) } else { entry }
    }
}

impl Drop for Transfer<'_> {
    fn drop(&mut self) {
        // A `Lent` waits by itself.
        let State::Ring(thread, key) = self.state else { return };
        with_current(|worker| match worker.map(|worker| (worker.id(), &worker.driver)) {
            Some((id, Driver::Ring(ring))) if id == thread => ring.cancel_and_wait(key),
            _ => {
                // Returning would free memory that the kernel may still write to.
                eprintln!("driveline-engine: a file operation is dropped on another thread than it began on");
                std::process::abort();
            }
        });
    }
}

impl Call {
    /// Does it, however long it takes.
    fn block(self, fd: RawFd) -> i32 {
        match self {
            // SAFETY: the memory is lent to the operation that this call belongs to.
            Call::Read { iov, count, offset } => unsafe { preadv2(fd, iov, count, offset, 0) },
            // SAFETY: as above.
            Call::Write { iov, count, offset } => unsafe { pwritev2(fd, iov, count, offset, 0) },
            // SAFETY: no memory is passed.
            Call::Sync { datasync: true } => errno(unsafe { libc::fdatasync(fd) } as isize),
            // SAFETY: no memory is passed.
            Call::Sync { datasync: false } => errno(unsafe { libc::fsync(fd) } as isize),
            Call::Allocate { mode, offset, length } => {
                // SAFETY: no memory is passed.
                errno(unsafe { libc::fallocate(fd, mode, offset as i64, length as i64) } as isize)
            }
        }
    }
}

/// # Safety
///
/// `iov` names `count` parts that may be written to.
unsafe fn preadv2(fd: RawFd, iov: *const libc::iovec, count: u32, offset: u64, flags: i32) -> i32 {
    // SAFETY: the caller's promise.
    errno(unsafe { libc::preadv2(fd, iov, count as i32, offset as i64, flags) })
}

/// # Safety
///
/// `iov` names `count` parts that may be read.
unsafe fn pwritev2(fd: RawFd, iov: *const libc::iovec, count: u32, offset: u64, flags: i32) -> i32 {
    // SAFETY: the caller's promise.
    errno(unsafe { libc::pwritev2(fd, iov, count as i32, offset as i64, flags) })
}

fn errno(result: isize) -> i32 {
    if result < 0 {
        -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
    } else {
        // The kernel moves at most 2^31 - 4096 bytes in a call.
        result as i32
    }
}

fn to_result(result: i32) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))
}

/// A positional read in progress, see [`File::read_at`]. Yields how many bytes were read; 0 is the end of the file.
///
/// Dropping it cancels the read and waits until the kernel no longer touches the memory.
#[derive(Debug)]
#[must_use = "a future does nothing unless it is awaited"]
pub struct ReadAt<'f>(Transfer<'f>);

/// A positional write in progress, see [`File::write_at`]. Yields how many bytes were written.
///
/// Dropping it cancels the write, or waits for it.
#[derive(Debug)]
#[must_use = "a future does nothing unless it is awaited"]
pub struct WriteAt<'f>(Transfer<'f>);

/// An fsync or fallocate in progress.
#[derive(Debug)]
#[must_use = "a future does nothing unless it is awaited"]
pub struct Control<'f>(Transfer<'f>);

impl<'f> ReadAt<'f> {
    pub(super) fn new(file: &'f File, iov: *const libc::iovec, count: u32, offset: u64) -> Self {
        ReadAt(Transfer::new(file, Call::Read { iov, count, offset }))
    }
}

impl<'f> WriteAt<'f> {
    pub(super) fn new(file: &'f File, iov: *const libc::iovec, count: u32, offset: u64) -> Self {
        WriteAt(Transfer::new(file, Call::Write { iov, count, offset }))
    }
}

impl<'f> Control<'f> {
    pub(super) fn sync(file: &'f File, datasync: bool) -> Self {
        Control(Transfer::new(file, Call::Sync { datasync }))
    }

    pub(super) fn allocate(file: &'f File, mode: i32, offset: u64, length: u64) -> Self {
        Control(Transfer::new(file, Call::Allocate { mode, offset, length }))
    }
}

impl Future for ReadAt<'_> {
    type Output = io::Result<usize>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll_raw(cx).map(to_result)
    }
}

impl Future for WriteAt<'_> {
    type Output = io::Result<usize>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll_raw(cx).map(to_result)
    }
}

impl Future for Control<'_> {
    type Output = io::Result<()>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll_raw(cx).map(|result| to_result(result).map(drop))
    }
}

//! What an engine thread waits with: an io_uring ring, or epoll.

use std::future::Future;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use crate::epoll::Epoll;
use crate::executor::{Mail, Worker, post_to, with_current};
use crate::ops::Key;
use crate::ring::Ring;

// One a thread, and never moved: its size does not matter, an indirection would.
#[allow(clippy::large_enum_variant)]
#[derive(Debug)]
pub(crate) enum Driver {
    Ring(Ring),
    Epoll(Epoll),
}

impl Driver {
    /// Submits what is queued and collects what is complete, without waiting.
    pub(crate) fn turn(&self) {
        match self {
            Driver::Ring(ring) => ring.turn(),
            Driver::Epoll(epoll) => epoll.turn(),
        }
    }

    /// Whether `turn` would find something. Free of system calls with a ring.
    pub(crate) fn ready(&self) -> bool {
        match self {
            Driver::Ring(ring) => ring.ready(),
            Driver::Epoll(epoll) => epoll.ready(),
        }
    }

    /// Submits and waits until something completes, the thread's descriptor is written to, or the time is over.
    pub(crate) fn park(&self, timeout: Option<Duration>) {
        match self {
            Driver::Ring(ring) => ring.park(timeout),
            Driver::Epoll(epoll) => epoll.park(timeout),
        }
    }

    /// Begins a wait for readiness: completes with `poll(2)` bits, or a negative errno.
    fn poll_add(&self, fd: BorrowedFd<'_>, mask: i16) -> Key {
        match self {
            Driver::Ring(ring) => ring.poll_add(fd.as_raw_fd(), mask),
            Driver::Epoll(epoll) => epoll.poll_add(fd.as_raw_fd(), mask),
        }
    }

    fn poll_result(&self, key: Key, cx: &mut Context<'_>) -> Poll<i32> {
        match self {
            Driver::Ring(ring) => ring.poll_result(key, cx),
            Driver::Epoll(epoll) => epoll.poll_result(key, cx),
        }
    }

    /// Gives up a wait that `poll_add` began for `fd`.
    pub(crate) fn forget(&self, key: Key, fd: RawFd) {
        match self {
            Driver::Ring(ring) => ring.forget(key),
            Driver::Epoll(epoll) => epoll.forget(key, fd),
        }
    }
}

/// Waits until `fd` is readable, writable or broken, as `mask` (of `poll(2)`) says.
///
/// Polled first on one engine thread and then on another, it starts over on the new one.
#[derive(Debug)]
pub(crate) struct Ready<'fd> {
    fd: BorrowedFd<'fd>,
    mask: i16,
    waiting: Option<(u64, Key)>,
}

impl<'fd> Ready<'fd> {
    pub(crate) fn new(fd: &'fd impl AsFd, mask: i16) -> Self {
        Ready { fd: fd.as_fd(), mask, waiting: None }
    }

    fn forget(&mut self) {
        let Some((thread, key)) = self.waiting.take() else { return };
        let fd = self.fd.as_raw_fd();
        with_current(|worker| match worker {
            Some(worker) if worker.id() == thread => worker.driver.forget(key, fd),
            // It lends no memory, so a message to its thread will do.
            _ => post_to(thread, Mail::Forget(key, fd)),
        });
    }

    fn poll_on(&mut self, worker: &Worker, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let key = match self.waiting {
            Some((thread, key)) if thread == worker.id() => key,
            _ => {
                self.forget();
                let key = worker.driver.poll_add(self.fd, self.mask);
                self.waiting = Some((worker.id(), key));
                key
            }
        };
        let Poll::Ready(result) = worker.driver.poll_result(key, cx) else { return Poll::Pending };
        self.waiting = None;
        Poll::Ready(if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(()) })
    }
}

impl Future for Ready<'_> {
    type Output = io::Result<()>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        with_current(|worker| {
            self.poll_on(worker.expect("sockets and signals are awaited on an engine thread"), cx)
        })
    }
}

impl Drop for Ready<'_> {
    fn drop(&mut self) {
        self.forget();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{Backend, Config, Engine, spawn_local, yield_now};

    /// More waits than the ring's queues hold, in both directions, end all at once.
    #[test]
    fn ten_thousand_waits_end_at_once() {
        for backend in [Backend::IoUring, Backend::Fallback] {
            let engine = Engine::start(Config { threads: 1, backend, ..Config::default() }).unwrap();
            engine.block_on_local(|| async {
                let (reader, writer) = std::io::pipe().unwrap();
                let reader = Arc::new(reader);
                let joins: Vec<_> = (0..10_000)
                    .map(|_| {
                        let reader = Arc::clone(&reader);
                        spawn_local(async move { Ready::new(&*reader, libc::POLLIN).await })
                    })
                    .collect();
                yield_now().await;
                crate::sleep(Duration::from_millis(1)).await;
                rustix::io::write(&writer, b"x").unwrap();
                for join in joins {
                    join.await.unwrap().unwrap();
                }
            });
        }
    }

    #[test]
    fn a_forgotten_wait_neither_blocks_nor_confuses_the_next() {
        for backend in [Backend::IoUring, Backend::Fallback] {
            let engine = Engine::start(Config { threads: 1, backend, ..Config::default() }).unwrap();
            engine.block_on_local(|| async {
                let (reader, writer) = std::io::pipe().unwrap();
                for _ in 0..1000 {
                    let mut ready = Ready::new(&reader, libc::POLLIN);
                    std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut ready).poll(cx).is_pending())).await;
                }
                rustix::io::write(&writer, b"x").unwrap();
                Ready::new(&reader, libc::POLLIN).await.unwrap();
                drop(writer);
                Ready::new(&reader, libc::POLLIN).await.unwrap();
            });
        }
    }
}

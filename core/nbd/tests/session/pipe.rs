//! A connection inside one thread.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{self, IoSlice, IoSliceMut, Read};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use driveline_nbd::Transport;

/// One end of a connection. Dropping it closes both directions.
pub(crate) struct Pipe {
    incoming: Rc<RefCell<Direction>>,
    outgoing: Rc<RefCell<Direction>>,
}

struct Direction {
    bytes: VecDeque<u8>,
    capacity: usize,
    closed: bool,
    waiting: Vec<Waker>,
}

impl Direction {
    fn wake(&mut self) {
        self.waiting.drain(..).for_each(Waker::wake);
    }

    fn wait<T>(&mut self, cx: &Context<'_>) -> Poll<T> {
        self.waiting.push(cx.waker().clone());
        Poll::Pending
    }
}

impl Pipe {
    /// Two ends, with room for so many bytes in each direction.
    pub(crate) fn pair(capacity: usize) -> (Pipe, Pipe) {
        let direction = || {
            let direction =
                Direction { bytes: VecDeque::new(), capacity, closed: false, waiting: Vec::new() };
            Rc::new(RefCell::new(direction))
        };
        let (one, other) = (direction(), direction());
        let near = Pipe { incoming: Rc::clone(&one), outgoing: Rc::clone(&other) };
        (near, Pipe { incoming: other, outgoing: one })
    }

    /// Sends no more, but still reads.
    pub(crate) fn close_writing(&self) {
        let mut direction = self.outgoing.borrow_mut();
        direction.closed = true;
        direction.wake();
    }

    /// What nobody has read yet.
    pub(crate) fn unread(&self) -> usize {
        self.outgoing.borrow().bytes.len()
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        for direction in [&self.incoming, &self.outgoing] {
            let mut direction = direction.borrow_mut();
            direction.closed = true;
            direction.wake();
        }
    }
}

impl Transport for Pipe {
    async fn read(&self, parts: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        poll_fn(|cx| {
            let mut direction = self.incoming.borrow_mut();
            if direction.bytes.is_empty() && !direction.closed {
                return direction.wait(cx);
            }
            direction.wake();
            Poll::Ready(direction.bytes.read_vectored(parts))
        })
        .await
    }

    async fn write_all(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        for part in parts {
            let mut rest: &[u8] = part;
            poll_fn(|cx| {
                while !rest.is_empty() {
                    let mut direction = self.outgoing.borrow_mut();
                    if direction.closed {
                        return Poll::Ready(Err(io::Error::from(io::ErrorKind::BrokenPipe)));
                    }
                    let free = (direction.capacity - direction.bytes.len()).min(rest.len());
                    if free == 0 {
                        return direction.wait(cx);
                    }
                    direction.bytes.extend(&rest[..free]);
                    rest = &rest[free..];
                    direction.wake();
                }
                Poll::Ready(Ok(()))
            })
            .await?;
        }
        Ok(())
    }
}

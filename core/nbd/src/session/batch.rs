//! Replies on their way out: headers in one place, payload where it lies, all sent together.

use std::io::{self, IoSlice};

use driveline_op::Buffer;

use super::pool::Pool;
use driveline_transport::Transport;

/// Parts of one write.
const PARTS_MAX: usize = 128;

/// Replies in order.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// All headers and small payloads, one after the other.
    heads: Vec<u8>,
    parts: Vec<Part>,
    /// How many replies; not the same as parts.
    replies: usize,
    /// Bytes of payload that its requests were admitted with.
    admitted_bytes: usize,
    /// Bytes to send.
    length: usize,
}

#[derive(Debug)]
enum Part {
    /// The next so many bytes of the heads.
    Heads(usize),
    Data(Buffer),
    Bytes(Vec<u8>),
}

impl Batch {
    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    pub(super) fn length(&self) -> usize {
        self.length
    }

    pub(super) fn replies(&self) -> usize {
        self.replies
    }

    pub(super) fn admitted_bytes(&self) -> usize {
        self.admitted_bytes
    }

    /// Appends what `encode` writes.
    pub(super) fn head(&mut self, encode: impl FnOnce(&mut Vec<u8>)) {
        let before = self.heads.len();
        encode(&mut self.heads);
        let added = self.heads.len() - before;
        self.length += added;
        match self.parts.last_mut() {
            Some(Part::Heads(length)) => *length += added,
            _ => self.parts.push(Part::Heads(added)),
        }
    }

    /// Appends data.
    pub(super) fn data(&mut self, data: Buffer) {
        debug_assert!(!data.is_empty());
        self.length += data.len();
        self.parts.push(Part::Data(data));
    }

    /// Appends bytes that are too many for the heads.
    pub(super) fn bytes(&mut self, bytes: Vec<u8>) {
        debug_assert!(!bytes.is_empty());
        self.length += bytes.len();
        self.parts.push(Part::Bytes(bytes));
    }

    /// Counts one complete reply.
    pub(super) fn count(&mut self, admitted_bytes: usize) {
        self.replies += 1;
        self.admitted_bytes += admitted_bytes;
    }

    /// Sends everything, in as few writes as the connection takes it.
    pub(super) async fn send(&self, transport: &impl Transport) -> io::Result<()> {
        let mut heads = &self.heads[..];
        for parts in self.parts.chunks(PARTS_MAX) {
            let mut slices = [IoSlice::new(&[]); PARTS_MAX];
            for (slice, part) in slices.iter_mut().zip(parts) {
                *slice = IoSlice::new(match part {
                    Part::Heads(length) => {
                        let (head, rest) = heads.split_at(*length);
                        heads = rest;
                        head
                    }
                    Part::Data(data) => data,
                    Part::Bytes(bytes) => bytes,
                });
            }
            transport.write_all(&slices[..parts.len()]).await?;
        }
        Ok(())
    }

    /// Forgets the replies, and gives their buffers to `pool`. The memory of the batch itself is kept.
    pub(super) fn clear(&mut self, pool: &mut Pool) {
        for part in self.parts.drain(..) {
            if let Part::Data(buffer) = part {
                pool.give(buffer);
            }
        }
        self.heads.clear();
        (self.replies, self.admitted_bytes, self.length) = (0, 0, 0);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::io::IoSliceMut;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    /// Counts its calls.
    #[derive(Default)]
    struct Sink {
        bytes: RefCell<Vec<u8>>,
        calls: RefCell<Vec<usize>>,
    }

    impl Transport for Sink {
        async fn read(&self, _: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
            unreachable!("this test only writes")
        }

        async fn write_all(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
            self.calls.borrow_mut().push(parts.len());
            parts.iter().for_each(|part| self.bytes.borrow_mut().extend_from_slice(part));
            Ok(())
        }
    }

    #[test]
    fn all_bytes_arrive_in_order_and_headers_side_by_side_are_one_part() {
        let mut pool = Pool::default();
        let mut batch = Batch::default();
        for _ in 0..2 {
            let mut expected = Vec::new();
            for i in 0..200u8 {
                batch.head(|out| out.extend_from_slice(&[i; 5]));
                expected.extend_from_slice(&[i; 5]);
                if i % 2 == 0 {
                    let mut data = pool.take(10);
                    data.fill(!i);
                    batch.data(data);
                    expected.extend_from_slice(&[!i; 10]);
                }
                if i % 50 == 0 {
                    batch.bytes(vec![0; 30]);
                    expected.extend_from_slice(&[0; 30]);
                }
                batch.count(1);
            }
            assert_eq!((batch.length(), batch.replies(), batch.admitted_bytes()), (expected.len(), 200, 200));
            let sink = Sink::default();
            {
                let send = pin!(batch.send(&sink));
                assert!(matches!(send.poll(&mut Context::from_waker(Waker::noop())), Poll::Ready(Ok(()))));
            }
            assert!(*sink.bytes.borrow() == expected);
            assert_eq!(*sink.calls.borrow(), [PARTS_MAX, 205 - PARTS_MAX]);
            batch.clear(&mut pool);
            assert!(batch.is_empty());
        }
    }
}

//! Reading from a connection: small messages through a buffer, payload straight to where it belongs.

use std::io::{self, IoSliceMut};

use crate::Transport;

/// The buffer. Several pipelined requests fit, and little enough that copying payload out of it is cheap.
const BUFFER_BYTES: usize = 32 << 10;
/// How far to read past large payload: the next header, and not much of the payload that may follow it.
const AHEAD_BYTES: usize = 256;
/// From here on payload counts as large.
const LARGE_BYTES: usize = 16 << 10;

/// The received bytes that nobody has looked at yet.
#[derive(Debug)]
pub struct Receive {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// How much to read at once when the buffer is empty.
    ahead: usize,
    /// The last read got less than it could have: for now there is no more.
    drained: bool,
}

impl Default for Receive {
    fn default() -> Receive {
        Receive::new()
    }
}

impl Receive {
    /// One that has received nothing.
    pub fn new() -> Receive {
        let buffer = vec![0; BUFFER_BYTES].into_boxed_slice();
        Receive { buffer, start: 0, end: 0, ahead: BUFFER_BYTES, drained: false }
    }

    /// Whether everything that was received has been taken.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Whether at least `length` bytes are here, or more could come without waiting.
    pub fn may_have(&self, length: usize) -> bool {
        self.end - self.start >= length || !self.drained
    }

    /// The next `length` bytes, at most the size of the buffer; `None` if the stream ends before the first of them.
    pub async fn take(&mut self, transport: &impl Transport, length: usize) -> io::Result<Option<&[u8]>> {
        assert!(length <= self.buffer.len());
        while self.end - self.start < length {
            if self.start > 0 {
                self.buffer.copy_within(self.start..self.end, 0);
                self.end -= self.start;
                self.start = 0;
            }
            let limit = (self.end + self.ahead).max(length).min(self.buffer.len());
            let free = &mut self.buffer[self.end..limit];
            let wanted = free.len();
            let read = transport.read(&mut [IoSliceMut::new(free)]).await?;
            if read == 0 {
                return if self.end == 0 { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
            self.end += read;
            self.drained = read < wanted;
        }
        let taken = self.start..self.start + length;
        self.start = taken.end;
        Ok(Some(&self.buffer[taken]))
    }

    /// Fills `into`. What the buffer does not hold is read without a copy, and the next message's beginning with it.
    pub async fn fill(&mut self, transport: &impl Transport, into: &mut [u8]) -> io::Result<()> {
        let buffered = into.len().min(self.end - self.start);
        into[..buffered].copy_from_slice(&self.buffer[self.start..self.start + buffered]);
        self.start += buffered;
        // After large payload the next one is likely large too, and should not go through the buffer.
        self.ahead = if into.len() >= LARGE_BYTES { AHEAD_BYTES } else { self.buffer.len() };
        let mut filled = buffered;
        while filled < into.len() {
            (self.start, self.end) = (0, 0);
            let rest = &mut into[filled..];
            let missing = rest.len();
            let ahead = &mut self.buffer[..self.ahead];
            let wanted = missing + ahead.len();
            let mut parts = [IoSliceMut::new(rest), IoSliceMut::new(ahead)];
            let read = transport.read(&mut parts).await?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.drained = read < wanted;
            filled += read.min(missing);
            self.end = read.saturating_sub(missing);
        }
        Ok(())
    }

    /// Reads `length` bytes and forgets them.
    pub async fn skip(&mut self, transport: &impl Transport, mut length: u64) -> io::Result<()> {
        self.ahead = self.buffer.len();
        while length > 0 {
            // One byte of what is missing is enough to ask for: `take` reads ahead by itself.
            let part = length.min((self.end - self.start).max(1) as u64);
            if self.take(transport, part as usize).await?.is_none() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            length -= part;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::io::IoSlice;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    /// Bytes that come in pieces of at most so many.
    struct Pieces(RefCell<Vec<u8>>, usize);

    impl Transport for Pieces {
        async fn read(&self, parts: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
            let mut bytes = self.0.borrow_mut();
            let mut left = self.1.min(bytes.len());
            let read = left;
            for part in parts {
                let length = left.min(part.len());
                part[..length].copy_from_slice(&bytes[..length]);
                bytes.drain(..length);
                left -= length;
            }
            Ok(read - left)
        }

        async fn write_all(&self, _: &[IoSlice<'_>]) -> io::Result<()> {
            unreachable!("this test only reads")
        }
    }

    fn now<T>(future: impl Future<Output = T>) -> T {
        match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(output) => output,
            Poll::Pending => panic!("nothing here waits"),
        }
    }

    #[test]
    fn headers_and_payload_come_out_as_they_went_in_however_cut() {
        let bytes: Vec<u8> = (0..200_000u32).map(|i| (i * 7 + i / 256) as u8).collect();
        for piece in [1, 3, 28, 1000, 40_000, 1_000_000] {
            let pieces = Pieces(RefCell::new(bytes.clone()), piece);
            let mut receive = Receive::new();
            let mut at = 0;
            for payload in [0, 5, 4096, 20_000, 70_000, 70_000, 0, 1] {
                assert_eq!(now(receive.take(&pieces, 28)).unwrap().unwrap(), &bytes[at..at + 28]);
                at += 28;
                let mut into = vec![0; payload];
                now(receive.fill(&pieces, &mut into)).unwrap();
                assert!(into == bytes[at..at + payload]);
                at += payload;
            }
            now(receive.skip(&pieces, 1000)).unwrap();
            at += 1000;
            let rest = bytes.len() - at;
            now(receive.skip(&pieces, rest as u64)).unwrap();
            assert!(now(receive.take(&pieces, 28)).unwrap().is_none());
        }
    }

    #[test]
    fn an_end_inside_a_message_is_an_error() {
        let mut receive = Receive::new();
        let pieces = Pieces(RefCell::new(vec![1; 27]), 100);
        assert_eq!(now(receive.take(&pieces, 28)).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}

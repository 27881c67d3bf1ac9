//! Buffers that go from request to request, never zeroed and rarely allocated.

use driveline_op::{BUFFER_ALIGNMENT, Buffer};

use crate::limits::KEPT_BYTES;

/// Sizes are powers of two from one page to the largest payload; each has a shelf.
const SHELVES: usize = 14;

/// Free buffers by size.
#[derive(Debug, Default)]
pub(super) struct Pool {
    shelves: [Vec<Buffer>; SHELVES],
    kept_bytes: usize,
}

fn shelf_of(length: usize) -> usize {
    (length.max(BUFFER_ALIGNMENT).next_power_of_two() / BUFFER_ALIGNMENT).trailing_zeros() as usize
}

impl Pool {
    /// A buffer of `length` bytes with anything in it.
    pub(super) fn take(&mut self, length: usize) -> Buffer {
        if length == 0 {
            return Buffer::default();
        }
        let shelf = shelf_of(length);
        let mut buffer = match self.shelves[shelf].pop() {
            Some(buffer) => {
                self.kept_bytes -= buffer.capacity();
                buffer
            }
            None => Buffer::new(BUFFER_ALIGNMENT << shelf),
        };
        buffer.set_len(length);
        buffer
    }

    /// Takes a buffer back. A buffer that is not from here, or too much, is freed.
    pub(super) fn give(&mut self, buffer: Buffer) {
        let capacity = buffer.capacity();
        if capacity == 0 || self.kept_bytes + capacity > KEPT_BYTES {
            return;
        }
        let shelf = shelf_of(capacity);
        if shelf < SHELVES && capacity == BUFFER_ALIGNMENT << shelf {
            self.kept_bytes += capacity;
            self.shelves[shelf].push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_that_was_given_back_is_used_again() {
        let mut pool = Pool::default();
        let buffer = pool.take(5000);
        let address = buffer.as_ptr();
        assert_eq!((buffer.len(), buffer.capacity()), (5000, 8192));
        pool.give(buffer);
        let buffer = pool.take(8192);
        assert_eq!((buffer.as_ptr(), buffer.len()), (address, 8192));
    }

    #[test]
    fn the_largest_payload_has_a_shelf_and_the_pool_an_end() {
        let mut pool = Pool::default();
        let largest = pool.take(crate::wire::PAYLOAD_LENGTH_MAX as usize);
        pool.give(largest);
        assert_eq!(pool.kept_bytes, 0, "one such buffer is more than is kept");
        let buffers: Vec<Buffer> = (0..40).map(|_| pool.take(1 << 20)).collect();
        buffers.into_iter().for_each(|buffer| pool.give(buffer));
        assert_eq!(pool.kept_bytes, KEPT_BYTES);
    }
}

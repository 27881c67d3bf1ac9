//! Memory for data: page-aligned, initialised once, reused without zeroing.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error},
    fmt,
    ops::{Deref, DerefMut},
    ptr::NonNull,
};

/// The alignment of buffers: enough for O_DIRECT on every common device.
pub const BUFFER_ALIGNMENT: usize = 4096;

/// Owned memory for data, aligned to [`BUFFER_ALIGNMENT`]. The empty one allocates nothing.
pub struct Buffer {
    base: NonNull<u8>,
    len: usize,
    capacity: usize,
}

// SAFETY: it owns its memory.
unsafe impl Send for Buffer {}
// SAFETY: it owns its memory; shared access is read-only.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// A buffer of `len` zero bytes. (The kernel gives zero pages for large ones, so that costs nothing.)
    pub fn new(len: usize) -> Self {
        if len == 0 {
            return Self::default();
        }
        let layout = Self::layout(len);
        // SAFETY: the layout is not empty.
        let Some(base) = NonNull::new(unsafe { alloc_zeroed(layout) }) else { handle_alloc_error(layout) };
        Self { base, len, capacity: len }
    }

    fn layout(capacity: usize) -> Layout {
        Layout::from_size_align(capacity, BUFFER_ALIGNMENT)
            .expect("a buffer is smaller than the address space")
    }

    /// How long it may become without a new allocation.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Makes it `len` bytes long, keeping the memory if it suffices. What bytes it then holds is unspecified:
    /// old data or zeroes.
    pub fn set_len(&mut self, len: usize) {
        if len <= self.capacity {
            self.len = len; // all of the capacity was initialised when it was allocated
        } else {
            *self = Self::new(len);
        }
    }
}

impl Default for Buffer {
    fn default() -> Self {
        Self { base: NonNull::dangling(), len: 0, capacity: 0 }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.capacity > 0 {
            // SAFETY: allocated in `new` with this layout.
            unsafe { dealloc(self.base.as_ptr(), Self::layout(self.capacity)) };
        }
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `len` bytes are initialised and ours.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut` makes it exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.len) }
    }
}

impl From<&[u8]> for Buffer {
    fn from(data: &[u8]) -> Self {
        let mut buffer = Self::new(data.len());
        buffer.copy_from_slice(data);
        buffer
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.len)
    }
}

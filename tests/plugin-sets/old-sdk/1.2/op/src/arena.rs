//! Memory for the state of a request's operations, reused per thread.

use std::{cell::RefCell, fmt, mem::MaybeUninit};

/// Arenas that a thread keeps; more than that many requests in flight on one thread go to the allocator.
const KEPT: usize = 256;
/// The smallest arena, in 16-byte words; most graphs fit.
const WORDS_MIN: usize = 128;

thread_local! {
    static FREE: RefCell<Vec<Box<[Word]>>> = const { RefCell::new(Vec::new()) };
}

/// A piece with the largest alignment that operations commonly need.
#[repr(align(16))]
#[derive(Clone, Copy)]
struct Word {
    _bytes: MaybeUninit<[u8; 16]>,
}

/// An arena, given back to its thread's stock on drop.
pub(crate) struct Arena(Box<[Word]>);

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Arena({} bytes)", self.0.len() * size_of::<Word>())
    }
}

impl Arena {
    /// An arena of at least that many bytes.
    pub(crate) fn take(bytes: usize) -> Self {
        let words = bytes.div_ceil(size_of::<Word>()) + 1;
        let kept = FREE.try_with(|free| free.borrow_mut().pop()).ok().flatten();
        match kept {
            Some(arena) if arena.len() >= words => Self(arena),
            _ => Self(vec![Word { _bytes: MaybeUninit::uninit() }; words.max(WORDS_MIN)].into_boxed_slice()),
        }
    }

    /// First byte and length.
    pub(crate) fn raw(&mut self) -> (*mut u8, usize) {
        (self.0.as_mut_ptr().cast(), size_of_val(&*self.0))
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        let arena = std::mem::take(&mut self.0);
        // While a thread ends its stock may be gone; then the arena is simply freed.
        let _ = FREE.try_with(|free| {
            let mut free = free.borrow_mut();
            if free.len() < KEPT && !arena.is_empty() {
                free.push(arena);
            }
        });
    }
}

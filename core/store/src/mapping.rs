//! A part of a file as atomic words that are shared with the page cache. The only unsafe code of the crate.

use core::fmt;
use core::ops::{Deref, Range};
use core::sync::atomic::AtomicU64;
use std::fs::File;
use std::io;
use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};

/// Words of 64 bits that any number of threads change at once.
///
/// Whoever kills the process cannot take back what was stored here: the page cache has it. A write to a page that the file has
/// no room for would kill the process, so who maps has reserved the range before.
pub(crate) struct Words {
    source: Source,
}

enum Source {
    Mapped(MmapRaw),
    /// For disks in memory.
    Memory(Arc<[AtomicU64]>, Range<usize>),
}

impl Words {
    /// Maps bytes of a file; `range` is whole pages.
    pub(crate) fn map(file: &File, range: Range<u64>) -> io::Result<Self> {
        let bytes = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
        let map = MmapOptions::new().offset(range.start).len(bytes).map_raw(file)?;
        Ok(Words { source: Source::Mapped(map) })
    }

    /// Words of a disk in memory.
    pub(crate) fn of_memory(all: &Arc<[AtomicU64]>, words: Range<usize>) -> Self {
        Words { source: Source::Memory(Arc::clone(all), words) }
    }
}

impl Deref for Words {
    type Target = [AtomicU64];

    #[inline]
    fn deref(&self) -> &[AtomicU64] {
        match &self.source {
            // SAFETY: `MmapRaw` guarantees `len` bytes from its pointer, readable and writable until it is dropped, which the
            // lifetime of `self` forbids meanwhile; the kernel guarantees the alignment, a page. This process looks at the
            // mapping through this slice alone, so all its accesses are atomic. Another one that writes to the file is kept out
            // by the lock on it; if one does so regardless, the words have other values, which nothing here relies on.
            Source::Mapped(map) => unsafe {
                core::slice::from_raw_parts(map.as_ptr().cast::<AtomicU64>(), map.len() / 8)
            },
            Source::Memory(all, words) => &all[words.clone()],
        }
    }
}

impl fmt::Debug for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Words").field("count", &self.len()).finish()
    }
}

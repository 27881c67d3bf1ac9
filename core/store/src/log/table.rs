//! The active extents, for threads that only look.

use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// A set of extents in a hash table with open addressing. Any number of threads look while one changes.
///
/// A look may miss an extent that is there, while the table is made anew; it never finds one that is not.
#[derive(Debug)]
pub(crate) struct Table {
    /// Extent + 1, or one of the two marks.
    cells: Box<[AtomicU64]>,
    /// Whether the cell's extent was found since this was last taken back.
    used: Box<[AtomicBool]>,
    /// How many cells are marked as gone: they make the way to nothing longer. Only who changes the table counts.
    gone: AtomicUsize,
}

const EMPTY: u64 = 0;
const GONE: u64 = u64::MAX;

impl Table {
    pub(crate) fn new(extents: usize) -> Self {
        let cells = (extents * 4).next_power_of_two();
        Table {
            cells: (0..cells).map(|_| AtomicU64::new(EMPTY)).collect(),
            used: (0..cells).map(|_| AtomicBool::new(false)).collect(),
            gone: AtomicUsize::new(0),
        }
    }

    fn path(&self, extent: u64) -> impl Iterator<Item = usize> {
        // The high bits of a product with an odd constant near 2^64 divided by the golden ratio: Fibonacci hashing.
        let first = (extent.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize;
        let mask = self.cells.len() - 1;
        (0..self.cells.len()).map(move |step| (first + step) & mask)
    }

    fn find(&self, extent: u64) -> Option<usize> {
        for at in self.path(extent) {
            // Sequentially consistent: see the marks in the mapping.
            match self.cells[at].load(Ordering::SeqCst) {
                EMPTY => return None,
                found if found == extent + 1 => return Some(at),
                _ => {}
            }
        }
        None
    }

    /// Whether the extent is active; that counts as a use of it.
    #[inline]
    pub(crate) fn contains(&self, extent: u64) -> bool {
        let found = self.find(extent);
        if let Some(at) = found
            && !self.used[at].load(Ordering::Relaxed)
        {
            self.used[at].store(true, Ordering::Relaxed);
        }
        found.is_some()
    }

    /// Whether it was used since this was last asked.
    pub(crate) fn take_used(&self, extent: u64) -> bool {
        self.find(extent).is_some_and(|at| self.used[at].swap(false, Ordering::Relaxed))
    }

    /// Adds an extent that is not there. Says whether the table is still quick to look through; if not, it must be made anew.
    pub(crate) fn insert(&self, extent: u64) -> bool {
        for at in self.path(extent) {
            let cell = &self.cells[at];
            let found = cell.load(Ordering::SeqCst);
            if found == EMPTY || found == GONE {
                self.used[at].store(true, Ordering::Relaxed);
                cell.store(extent + 1, Ordering::SeqCst);
                self.gone.fetch_sub(usize::from(found == GONE), Ordering::Relaxed);
                break;
            }
        }
        self.gone.load(Ordering::Relaxed) < self.cells.len() / 4
    }

    /// From now on nobody finds it.
    pub(crate) fn remove(&self, extent: u64) {
        if let Some(at) = self.find(extent) {
            self.cells[at].store(GONE, Ordering::SeqCst);
            self.gone.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Makes the table anew with these extents.
    pub(crate) fn rebuild(&self, extents: impl Iterator<Item = u64>) {
        self.cells.iter().for_each(|cell| cell.store(EMPTY, Ordering::SeqCst));
        self.gone.store(0, Ordering::Relaxed);
        for extent in extents {
            for at in self.path(extent) {
                if self.cells[at].load(Ordering::SeqCst) == EMPTY {
                    self.cells[at].store(extent + 1, Ordering::SeqCst);
                    break;
                }
            }
        }
    }
}

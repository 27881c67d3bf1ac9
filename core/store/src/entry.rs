//! One bitmap of a store, as its ledger.

use core::fmt;
use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering};
use core::task::{Poll, Waker, ready};
use std::sync::{Arc, OnceLock, Weak};

use arc_swap::ArcSwap;
use driveline_bitmap::{BitmapName, Bits, Granularity, Half, Ledger, Record, StoreBinding, View};
use parking_lot::Mutex;

use crate::header::{self, index};
use crate::log::Log;
use crate::region::Region;
use crate::store::Shared;
use crate::volume::Volume;
use crate::{Durability, Error};

type Result<T> = driveline_bitmap::Result<T>;

/// Where an entry's bits are now. Replaced as a whole when there are more places, and when the store moves to another file.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) volume: Arc<Volume>,
    /// Of bitmaps that survive a power cut.
    pub(crate) log: Option<Arc<Log>>,
    pub(crate) halves: [Region; 2],
}

/// One bitmap of a store.
pub(crate) struct Entry {
    pub(crate) id: u64,
    pub(crate) granularity: Granularity,
    pub(crate) view: View,
    pub(crate) durability: Durability,
    place: ArcSwap<Place>,
    /// The bits of a volatile bitmap; the place has them after a flush or an orderly close.
    memory: Option<[Bits; 2]>,
    /// Grows whenever bits become clean: what was safe before says nothing about what is set after.
    stamp: AtomicU64,
    shared: OnceLock<Weak<Shared>>,
    /// For errors.
    name: Mutex<BitmapName>,
}

impl Entry {
    pub(crate) fn new(
        id: u64,
        granularity: Granularity,
        view: View,
        durability: Durability,
        name: &BitmapName,
        place: Place,
    ) -> Self {
        let volatile = durability == Durability::Volatile;
        let memory = || [Bits::new(granularity, u64::MAX), Bits::new(granularity, u64::MAX)];
        Entry {
            id,
            granularity,
            view,
            durability,
            place: ArcSwap::from_pointee(place),
            memory: volatile.then(memory),
            stamp: AtomicU64::new(0),
            shared: OnceLock::new(),
            name: Mutex::new(name.clone()),
        }
    }

    /// Says whose it is. Until then it is closed.
    pub(crate) fn set_store(&self, shared: &Weak<Shared>) {
        // Nobody moves an entry to another store.
        let _ = self.shared.set(Weak::clone(shared));
    }

    pub(crate) fn place(&self) -> Arc<Place> {
        self.place.load_full()
    }

    pub(crate) fn set_place(&self, place: Place) {
        self.place.store(Arc::new(place));
    }

    pub(crate) fn set_name(&self, name: &BitmapName) {
        *self.name.lock() = name.clone();
    }

    /// Makes all of a half clean, now.
    pub(crate) fn wipe_now(&self, half: Half) {
        self.stamp.fetch_add(1, Ordering::SeqCst);
        match &self.memory {
            Some(memory) => memory[index(half)].clear_all(),
            None => self.clear_from(half, 0),
        }
    }

    /// Brings the bits of a volatile bitmap to their place, where nothing else looks at them.
    pub(crate) fn write_volatile(&self) -> crate::Result<()> {
        let (Some(memory), place) = (&self.memory, self.place()) else { return Ok(()) };
        for (bits, region) in memory.iter().zip(&place.halves) {
            region.clear_from(&place.volume, 0)?;
            for dirty in bits.iter_dirty() {
                let granules = self.granules(dirty);
                region.mark(granules.start..granules.end.min(region.capacity()));
            }
        }
        Ok(())
    }

    /// Takes bits that were found in the file into memory, if that is where they are kept.
    pub(crate) fn read_volatile(&self, half: Half, found: &Bits) {
        if let Some(memory) = &self.memory {
            found.iter_dirty().for_each(|dirty| memory[index(half)].mark(dirty));
        }
    }

    fn granules(&self, bytes: Range<u64>) -> Range<u64> {
        bytes.start >> self.granularity.shift()..header::granules(self.granularity, bytes.end)
    }

    fn clear_from(&self, half: Half, first: u64) {
        let place = self.place.load();
        if let Err(error) = place.halves[index(half)].clear_from(&place.volume, first) {
            // More is dirty than has to be, which loses nothing.
            let name = &*self.name.lock();
            tracing::warn!(%name, %error, "bits stay dirty");
        }
    }

    fn open_store(&self) -> Option<Arc<Shared>> {
        self.shared.get().and_then(Weak::upgrade)
    }

    fn store(&self) -> Result<Arc<Shared>> {
        self.open_store().ok_or_else(|| {
            let errno = rustix::io::Errno::SHUTDOWN.raw_os_error();
            self.refused("the store was closed".to_owned(), errno)
        })
    }

    fn refused(&self, text: String, errno: i32) -> driveline_bitmap::Error {
        driveline_bitmap::Error::Store { name: self.name.lock().to_string(), text, errno }
    }

    fn told(&self, error: &Error) -> driveline_bitmap::Error {
        error.of_bitmap(&self.name.lock())
    }
}

impl Ledger for Entry {
    #[inline]
    fn mark(&self, half: Half, granules: Range<u64>) {
        if granules.is_empty() {
            return;
        }
        match &self.memory {
            Some(memory) => {
                let shift = self.granularity.shift();
                memory[index(half)].mark(granules.start << shift..granules.end.saturating_mul(1 << shift));
            }
            None => self.place.load().halves[index(half)].mark(granules),
        }
    }

    fn unmark(&self, half: Half, granules: Range<u64>) {
        if granules.is_empty() {
            return;
        }
        self.stamp.fetch_add(1, Ordering::SeqCst);
        match &self.memory {
            Some(memory) => {
                let shift = self.granularity.shift();
                memory[index(half)]
                    .clear_range(granules.start << shift..granules.end.saturating_mul(1 << shift));
            }
            None => self.place.load().halves[index(half)].unmark(granules),
        }
    }

    fn wipe(&self, half: Half) {
        // What a closed store says stays as it is.
        if let Some(shared) = self.open_store() {
            shared.wipe(self, half);
        }
    }

    fn cut(&self, first: u64) {
        self.stamp.fetch_add(1, Ordering::SeqCst);
        for half in Half::BOTH {
            match &self.memory {
                Some(memory) => {
                    memory[index(half)].clear_range(first << self.granularity.shift()..u64::MAX);
                }
                None => self.clear_from(half, first),
            }
        }
    }

    fn counts(&self, half: Half) -> bool {
        self.open_store().is_some_and(|shared| shared.counts(self.id, half))
    }

    fn durability(&self) -> Durability {
        self.durability
    }

    fn waits(&self) -> bool {
        self.durability == Durability::Power
    }

    #[inline]
    fn poll_safe(&self, bytes: Range<u64>, waker: &Waker) -> Poll<Result<()>> {
        let place = self.place.load();
        if place.volume.in_doubt() {
            let resolved = self.store()?.resolve();
            if let Err(error) = resolved {
                return Poll::Ready(Err(self.told(&error)));
            }
        }
        let Some(log) = &place.log else { return Poll::Ready(Ok(())) };
        let polled = ready!(log.poll(self.id, self.stamp.load(Ordering::SeqCst), &bytes, waker));
        Poll::Ready(polled.map_err(|fault| self.refused(fault.text, fault.errno)))
    }

    fn take_down(&self, record: &Record) -> Result<()> {
        self.store()?.take_down(self, Some(record)).map_err(|error| self.told(&error))
    }

    fn reserve(&self, length: u64) -> Result<()> {
        self.store()?.reserve(self, length).map_err(|error| self.told(&error))
    }

    fn forget(&self) -> Result<()> {
        self.store()?.take_down(self, None).map_err(|error| self.told(&error))
    }

    fn binding(&self) -> StoreBinding {
        StoreBinding::Sidecar { path: self.place.load().volume.path.clone() }
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry")
            .field("id", &self.id)
            .field("name", &*self.name.lock())
            .field("granularity", &self.granularity)
            .field("durability", &self.durability)
            .finish_non_exhaustive()
    }
}

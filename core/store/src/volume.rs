//! A store's disk with what must be known about it: whether writes were lost, and whether the header is in doubt.

use core::ops::Range;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::disk::{Disk, PAGE};
use crate::mapping::Words;
use crate::{Error, Result};

/// How many syncs had failed when something was written. If that grew before its own sync, it may be lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Written(u64);

/// A disk, its name, and the state of its writes.
///
/// Linux reports a failed write-back once and takes the pages as clean then: another sync succeeds and the data is nowhere. So
/// syncs come one at a time, and after one that failed every mapped page is made dirty again; who wrote otherwise
/// learns by [`Written`] that it has to write again.
#[derive(Debug)]
pub(crate) struct Volume {
    pub(crate) path: PathBuf,
    disk: Arc<dyn Disk>,
    /// Whether the last sync failed.
    sync: Mutex<bool>,
    failures: AtomicU64,
    mapped: Mutex<Vec<Weak<Words>>>,
    /// No mark is safe: a header was written that may or may not be found after a crash and says what did not come true, or
    /// the store was closed.
    doubt: AtomicBool,
}

impl Volume {
    pub(crate) fn new(path: &Path, disk: Arc<dyn Disk>) -> Self {
        Volume {
            path: path.to_owned(),
            disk,
            sync: Mutex::new(false),
            failures: AtomicU64::new(0),
            mapped: Mutex::default(),
            doubt: AtomicBool::new(false),
        }
    }

    /// Names the file in an error of the system.
    pub(crate) fn failed<T>(&self, what: &'static str, result: io::Result<T>) -> Result<T> {
        result.map_err(|source| Error::Io { what, path: self.path.clone(), source })
    }

    pub(crate) fn length(&self) -> Result<u64> {
        self.failed("ask for the size of", self.disk.length())
    }

    pub(crate) fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.failed("read", self.disk.read_at(buffer, offset))
    }

    /// Writes, for a later [`sync`](Volume::sync) of what was written since [`now`](Volume::now).
    pub(crate) fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        self.failed("write", self.disk.write_at(data, offset))
    }

    pub(crate) fn reserve(&self, range: Range<u64>) -> Result<()> {
        self.failed("reserve room in", self.disk.reserve(range))
    }

    pub(crate) fn release(&self, range: Range<u64>) {
        if let Err(error) = self.disk.release(range.clone()) {
            tracing::warn!(path = %self.path.display(), ?range, %error, "room was not given back");
        }
    }

    pub(crate) fn map(&self, range: Range<u64>) -> Result<Arc<Words>> {
        let words = Arc::new(self.failed("map", self.disk.map(range))?);
        let mut mapped = self.mapped.lock();
        mapped.retain(|words| words.strong_count() > 0);
        mapped.push(Arc::downgrade(&words));
        Ok(words)
    }

    pub(crate) fn now(&self) -> Written {
        Written(self.failures.load(Ordering::SeqCst))
    }

    /// Brings to stable storage what mappings hold and what was written after `since`.
    pub(crate) fn sync(&self, since: Written) -> Result<()> {
        let mut suspect = self.sync.lock();
        if *suspect {
            let mapped: Vec<_> = self.mapped.lock().iter().filter_map(Weak::upgrade).collect();
            mapped.iter().for_each(|words| self.disk.redirty(words));
        }
        let synced = self.disk.sync();
        *suspect = synced.is_err();
        if synced.is_err() {
            self.failures.fetch_add(1, Ordering::SeqCst);
        }
        self.failed("sync", synced)?;
        if self.now() != since {
            let lost = io::Error::other("an earlier sync failed, which may have lost what was written");
            return self.failed("sync", Err(lost));
        }
        Ok(())
    }

    pub(crate) fn in_doubt(&self) -> bool {
        self.doubt.load(Ordering::SeqCst)
    }

    pub(crate) fn set_doubt(&self, doubt: bool) {
        self.doubt.store(doubt, Ordering::SeqCst);
    }

    /// Gives `each` every piece of `range`, of whole pages, that may be anything but zeros.
    pub(crate) fn data(
        &self,
        range: Range<u64>,
        mut each: impl FnMut(Range<u64>) -> Result<()>,
    ) -> Result<()> {
        let (mut at, page) = (range.start, PAGE as u64);
        let end = range.end.min(self.length()?.next_multiple_of(page));
        while at < end {
            let found = self.failed("look for data in", self.disk.next_data(at..end))?;
            let Some(data) = found else { break };
            let data = (data.start / page * page).max(at)..data.end.next_multiple_of(page).min(end);
            at = data.end;
            each(data)?;
        }
        Ok(())
    }
}

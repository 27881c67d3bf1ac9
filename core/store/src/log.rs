//! The activity log: which extents of the drive may be written without a sync first, as DRBD has it.
//!
//! Before data of an extent may reach the disk, a durable log says that the extent is *active*; after a power cut all of it
//! counts as dirty. Writes to active extents cost nothing. A *flight* is one transaction with one sync, for all who wait:
//!
//! ```text
//! absent ── begin: gets a free slot, goes into a block ──> entering ── finish: the sync succeeded ──> active
//! active ── begin: marks do not see it any more ──> retiring ── finish: the sync wrote its bits ──> slot is free
//! ```
//!
//! What a flight retires gives slots for the next one, so that each flight needs one sync and not two. And whoever waited for a
//! flight is safe by its sync alone: his bits were set before it began. So nobody depends on a slot, and a range of more
//! extents than are worth it takes none.

mod block;
mod state;
mod table;

use core::ops::Range;
use core::task::{Poll, Waker};
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};

use self::block::Ring;
pub(crate) use self::state::Fault;
use self::state::{State, Waiter};
use self::table::Table;
use crate::region::ALIGN;
use crate::volume::Volume;
use crate::{Error, Result, Uuid};

/// How much after a power cut may be dirty that is not, in exchange for syncs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogOptions {
    /// Bytes of the drive that become active together: a power of two from 64 KiB to 1 GiB.
    pub extent_bytes: u64,
    /// How many of them there may be: 8 to 65536. A power cut makes at most `extents * extent_bytes` dirty that is not.
    pub extents: u32,
}

impl Default for LogOptions {
    fn default() -> Self {
        LogOptions { extent_bytes: 4 << 20, extents: 1024 }
    }
}

impl LogOptions {
    pub(crate) fn check(self) -> Result<()> {
        let wrong =
            |option, found: u64, expected| Err(Error::Option { option, found: found.to_string(), expected });
        if !self.extent_bytes.is_power_of_two() || !(64 << 10..=1 << 30).contains(&self.extent_bytes) {
            return wrong("extent_bytes", self.extent_bytes, "a power of two from 64 KiB to 1 GiB");
        }
        if !(8..=65536).contains(&self.extents) {
            return wrong("extents", self.extents.into(), "8 to 65536");
        }
        Ok(())
    }
}

/// Bytes that the two rings of a log take in the file.
pub(crate) fn rings_bytes(options: LogOptions) -> u64 {
    (2 * block::ring_bytes(options.extents)).next_multiple_of(ALIGN)
}

/// The ring that an epoch uses: the other one than the epoch before, which must be there until this one counts.
fn ring(uuid: Uuid, epoch: u64, options: LogOptions, rings: &Range<u64>) -> Ring {
    Ring::new(uuid, epoch, options.extents, rings.start + (epoch & 1) * block::ring_bytes(options.extents))
}

/// The byte ranges that were active when the log was last written.
///
/// Errors: in words, if that cannot be told.
pub(crate) fn replay(
    volume: &Volume,
    uuid: Uuid,
    epoch: u64,
    options: LogOptions,
    rings: &Range<u64>,
) -> Result<core::result::Result<Vec<Range<u64>>, String>> {
    if epoch == 0 || rings.is_empty() {
        return Ok(Err("there is no log".to_owned()));
    }
    let ring = ring(uuid, epoch, options, rings);
    let mut bytes = vec![0; ring.bytes() as usize];
    volume.read_at(&mut bytes, ring.place)?;
    let range = |extent: u64| {
        let start = extent.saturating_mul(options.extent_bytes);
        start..start.saturating_add(options.extent_bytes)
    };
    Ok(ring.replay(&bytes).map(|extents| extents.into_iter().map(range).collect()))
}

/// The log of an open store.
#[derive(Debug)]
pub(crate) struct Log {
    shared: Arc<Shared>,
    committer: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    volume: Arc<Volume>,
    shift: u32,
    table: Table,
    state: Mutex<State>,
    wanted: Condvar,
}

impl Log {
    /// Begins a log of which nothing is known: fills the ring of `epoch`. It counts once a header names the epoch.
    pub(crate) fn begin(
        volume: &Arc<Volume>,
        uuid: Uuid,
        epoch: u64,
        options: LogOptions,
        rings: &Range<u64>,
    ) -> Result<Self> {
        let ring = ring(uuid, epoch, options, rings);
        let (blank, sequence, seal) = ring.blank();
        let since = volume.now();
        volume.write_at(&blank, ring.place)?;
        volume.sync(since)?;
        let shared = Shared {
            volume: Arc::clone(volume),
            shift: options.extent_bytes.trailing_zeros(),
            table: Table::new(options.extents as usize),
            state: Mutex::new(State::new(ring, sequence, seal)),
            wanted: Condvar::new(),
        };
        Ok(Log { shared: Arc::new(shared), committer: None })
    }

    /// Starts the thread that commits what is asked for. Without it, [`commit`](Log::commit) has to be called.
    pub(crate) fn start(&mut self) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let started = std::thread::Builder::new().name("driveline-store".to_owned()).spawn(move || {
            while shared.wait() {
                shared.commit();
            }
        });
        self.committer = Some(self.shared.volume.failed("start the committer of", started)?);
        Ok(())
    }

    #[cfg(test)]
    /// Makes one flight, if anybody waits. Says whether somebody did.
    #[cfg(test)]
    pub(crate) fn commit(&self) -> bool {
        self.shared.commit()
    }

    /// Ready once data of these bytes may reach the disk. `entry` and `stamp` tell bitmaps, and their contents, apart.
    #[inline]
    pub(crate) fn poll(
        &self,
        entry: u64,
        stamp: u64,
        bytes: &Range<u64>,
        waker: &Waker,
    ) -> Poll<core::result::Result<(), Fault>> {
        let Some(extents) = self.shared.extents(bytes) else { return Poll::Ready(Ok(())) };
        let few = extents.1 - extents.0 < 16;
        if few && (extents.0..=extents.1).all(|extent| self.shared.table.contains(extent)) {
            return Poll::Ready(Ok(()));
        }
        self.shared.poll(Waiter { entry, stamp, extents, bytes: bytes.clone(), waker: waker.clone() })
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        let waiters = self.shared.state.lock().stop();
        self.shared.wanted.notify_all();
        waiters.into_iter().for_each(Waker::wake);
        if let Some(committer) = self.committer.take()
            && committer.thread().id() != std::thread::current().id()
        {
            // A panic of it was reported when it happened.
            let _ = committer.join();
        }
    }
}

impl Shared {
    /// The first and the last extent that bytes touch.
    #[inline]
    fn extents(&self, bytes: &Range<u64>) -> Option<(u64, u64)> {
        (bytes.start < bytes.end).then(|| (bytes.start >> self.shift, (bytes.end - 1) >> self.shift))
    }

    #[cold]
    fn poll(&self, waiter: Waiter) -> Poll<core::result::Result<(), Fault>> {
        let polled = self.state.lock().poll(&self.table, waiter);
        if polled.is_pending() {
            self.wanted.notify_one();
        }
        polled
    }

    /// Waits until there is something to commit; false once there never will be.
    fn wait(&self) -> bool {
        let mut state = self.state.lock();
        while !state.is_wanted() && !state.is_stopped() {
            self.wanted.wait(&mut state);
        }
        !state.is_stopped()
    }

    fn commit(&self) -> bool {
        let Some(blocks) = self.state.lock().begin(&self.table) else { return false };
        let since = self.volume.now();
        let mut written = Ok(());
        for (place, block) in &blocks {
            written = written.and_then(|()| self.volume.write_at(block, *place));
        }
        let done = written.and_then(|()| self.volume.sync(since));
        let fault = done.as_ref().err().map(Fault::of);
        if let Some(fault) = &fault {
            tracing::warn!(fault = %fault.text, "the activity log was not written");
        }
        let woken = self.state.lock().finish(&self.table, fault);
        woken.into_iter().for_each(Waker::wake);
        true
    }
}

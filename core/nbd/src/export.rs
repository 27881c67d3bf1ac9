//! Exports: what is served, under which name, and to whom at the moment.

use std::collections::BTreeMap;
use std::fmt;
use std::future::{Future, poll_fn};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Poll, Waker};

use driveline_bitmap::Bitmap;
use driveline_op::{Answer, Ask, Buffer, Info};
use futures::task::AtomicWaker;
use parking_lot::Mutex;
use slab::Slab;

use driveline_wire::{BlockSizes, PAYLOAD_LENGTH_MAX, STRING_LENGTH_MAX, TransmissionFlags};

/// Where the requests of a session go: a root of a graph, or memory in a test.
///
/// What arrives here is inside the export, aligned if the client promised to align, and permitted.
pub trait Storage: Send + Sync + 'static {
    /// Size and limits, as they are now.
    fn info(&self) -> Info;

    /// Does one operation, and gives the buffer back.
    fn call(&self, ask: Ask, buffer: Buffer) -> impl Future<Output = Answer>;
}

/// Something that can be served.
#[derive(Debug)]
pub struct Export<S> {
    /// Where its data is.
    pub storage: S,
    /// Whether clients may write.
    pub writable: bool,
    /// A text for humans that clients show; may be empty.
    pub description: String,
    /// Bitmaps that clients may look at, as `qemu:dirty-bitmap:NAME`. They stay usable meanwhile.
    pub bitmaps: Vec<Arc<Bitmap>>,
    /// Whether clients may ask in which layer data is, as `qemu:allocation-depth`.
    pub allocation_depth: bool,
    /// The engine thread that all its sessions run on, once the client has chosen it; `None`: wherever there is room.
    pub thread: Option<usize>,
}

impl<S: Storage> Export<S> {
    /// An export with nothing but data: read-only, without bitmaps.
    pub fn new(storage: S) -> Export<S> {
        Export {
            storage,
            writable: false,
            description: String::new(),
            bitmaps: Vec::new(),
            allocation_depth: true,
            thread: None,
        }
    }

    /// Lets clients write.
    #[must_use]
    pub fn writable(mut self, writable: bool) -> Self {
        self.writable = writable;
        self
    }

    /// Lets clients look at a bitmap.
    #[must_use]
    pub fn bitmap(mut self, bitmap: Arc<Bitmap>) -> Self {
        self.bitmaps.push(bitmap);
        self
    }

    /// What the export can do, without what depends on the client.
    pub(crate) fn flags(&self) -> TransmissionFlags {
        let common = TransmissionFlags::HAS_FLAGS
            | TransmissionFlags::SEND_FLUSH
            | TransmissionFlags::SEND_FUA
            | TransmissionFlags::SEND_CACHE
            | TransmissionFlags::CAN_MULTI_CONN;
        common
            | if self.writable {
                TransmissionFlags::SEND_TRIM
                    | TransmissionFlags::SEND_WRITE_ZEROES
                    | TransmissionFlags::SEND_FAST_ZERO
            } else {
                TransmissionFlags::READ_ONLY
            }
    }

    /// The sizes for a client that promises to keep to them (`asked`), or that does not.
    ///
    /// The storage takes any alignment, but aligned requests spare it a read before each write. So a client that does not
    /// ask is never turned away, as QEMU's server does it.
    pub(crate) fn block_sizes(&self, asked: bool) -> BlockSizes {
        let info = self.storage.info();
        let alignment = u64::from(info.request_alignment).clamp(1, 1 << 16);
        let fits = info.size_bytes.is_multiple_of(alignment);
        let alignment = if fits { alignment as u32 } else { 1 };
        BlockSizes {
            minimum_bytes: if asked { alignment } else { 1 },
            preferred_bytes: alignment.max(4096),
            payload_bytes_max: PAYLOAD_LENGTH_MAX,
        }
    }
}

/// Why an export cannot be added.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AddError {
    /// The name is taken.
    #[error("an export named '{name}' exists already")]
    Exists {
        /// The name.
        name: String,
    },
    /// Name or description cannot be sent.
    #[error("{what} of an export is text without NUL of at most {STRING_LENGTH_MAX} bytes")]
    Text {
        /// Which of the two.
        what: &'static str,
    },
}

/// The exports of a server, by name. It changes while clients are connected.
pub struct Exports<S> {
    entries: Mutex<BTreeMap<String, Arc<Entry<S>>>>,
}

impl<S> Default for Exports<S> {
    fn default() -> Self {
        Exports { entries: Mutex::default() }
    }
}

impl<S> fmt::Debug for Exports<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.entries.lock().keys()).finish()
    }
}

impl<S: Storage> Exports<S> {
    /// Serves `export` as `name` to whoever connects from now on. The empty name is the default export.
    ///
    /// Errors: [`AddError`]; then nothing changes.
    pub fn add(&self, name: &str, export: Export<S>) -> Result<(), AddError> {
        for (what, text) in [("the name", name), ("the description", &export.description)] {
            if text.len() > STRING_LENGTH_MAX || text.contains('\0') {
                return Err(AddError::Text { what });
            }
        }
        let mut entries = self.entries.lock();
        if entries.contains_key(name) {
            return Err(AddError::Exists { name: name.to_owned() });
        }
        let entry = Entry { name: name.to_owned(), export, sessions: Mutex::default() };
        entries.insert(name.to_owned(), Arc::new(entry));
        Ok(())
    }

    /// Offers `name` to nobody any more. Its sessions go on until the result is told otherwise.
    pub fn remove(&self, name: &str) -> Option<Removed<S>> {
        let entry = self.entries.lock().remove(name)?;
        entry.sessions.lock().closed = true;
        Some(Removed { entry })
    }

    /// The names, in order.
    pub fn names(&self) -> Vec<String> {
        self.entries.lock().keys().cloned().collect()
    }

    /// How many sessions an export has at the moment.
    pub fn sessions(&self, name: &str) -> Option<usize> {
        let entries = self.entries.lock();
        Some(entries.get(name)?.sessions.lock().stops.len())
    }

    /// The export that a client means. An empty name means the default export: the one that is named so, or the only one.
    pub(crate) fn find(&self, name: &str) -> Option<Arc<Entry<S>>> {
        let entries = self.entries.lock();
        match entries.get(name) {
            Some(entry) => Some(Arc::clone(entry)),
            None if name.is_empty() && entries.len() == 1 => entries.values().next().cloned(),
            None => None,
        }
    }

    pub(crate) fn all(&self) -> Vec<Arc<Entry<S>>> {
        self.entries.lock().values().cloned().collect()
    }
}

/// An export with its name and its sessions.
pub(crate) struct Entry<S> {
    pub(crate) name: String,
    pub(crate) export: Export<S>,
    sessions: Mutex<Sessions>,
}

impl<S> fmt::Debug for Entry<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry").field("name", &self.name).finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Sessions {
    closed: bool,
    stops: Slab<Arc<Stop>>,
    /// Who waits for the last session to end.
    waiting: Vec<Waker>,
}

impl<S> Entry<S> {
    /// Begins a session. `None`: the export was removed meanwhile.
    pub(crate) fn begin(self: &Arc<Self>) -> Option<Attached<S>> {
        let mut sessions = self.sessions.lock();
        if sessions.closed {
            return None;
        }
        let stop = Arc::new(Stop::default());
        let key = sessions.stops.insert(Arc::clone(&stop));
        Some(Attached { entry: Arc::clone(self), stop, key })
    }
}

/// A session's hold on its export.
#[derive(Debug)]
pub(crate) struct Attached<S> {
    pub(crate) entry: Arc<Entry<S>>,
    pub(crate) stop: Arc<Stop>,
    key: usize,
}

impl<S> Drop for Attached<S> {
    fn drop(&mut self) {
        let waiting = {
            let mut sessions = self.entry.sessions.lock();
            sessions.stops.remove(self.key);
            if sessions.stops.is_empty() { std::mem::take(&mut sessions.waiting) } else { Vec::new() }
        };
        waiting.into_iter().for_each(Waker::wake);
    }
}

/// An export that nobody can connect to any more.
#[must_use = "the sessions go on until they are told to finish"]
#[derive(Debug)]
pub struct Removed<S> {
    entry: Arc<Entry<S>>,
}

impl<S: Storage> Removed<S> {
    /// Tells the sessions to read no more requests, to answer those that they have, and to end.
    pub fn finish(&self) {
        self.stop(Stage::Finish);
    }

    /// Tells the sessions to end without sending answers, as a client may not take them. Requests still run to their end.
    pub fn cut(&self) {
        self.stop(Stage::Cut);
    }

    fn stop(&self, stage: Stage) {
        let stops: Vec<Arc<Stop>> =
            self.entry.sessions.lock().stops.iter().map(|(_, stop)| Arc::clone(stop)).collect();
        stops.iter().for_each(|stop| stop.raise(stage));
    }

    /// Waits until all sessions have ended: nothing uses the storage any more.
    pub async fn ended(&self) {
        poll_fn(|cx| {
            let mut sessions = self.entry.sessions.lock();
            if sessions.stops.is_empty() {
                return Poll::Ready(());
            }
            sessions.waiting.push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

/// How far a session is told to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    Run,
    Finish,
    Cut,
}

/// How a session learns that it should end.
#[derive(Debug, Default)]
pub(crate) struct Stop {
    stage: AtomicU8,
    task: AtomicWaker,
}

impl Stop {
    fn raise(&self, stage: Stage) {
        self.stage.fetch_max(stage as u8, Ordering::AcqRel);
        self.task.wake();
    }

    pub(crate) fn register(&self, task: &Waker) {
        self.task.register(task);
    }

    pub(crate) fn stage(&self) -> Stage {
        match self.stage.load(Ordering::Acquire) {
            0 => Stage::Run,
            1 => Stage::Finish,
            _ => Stage::Cut,
        }
    }
}

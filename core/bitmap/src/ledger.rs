//! The contract between a bitmap and what keeps it beyond the life of the process.

use core::fmt;
use core::ops::Range;
use core::task::{Poll, Waker};

use crate::{BitmapName, Result, StoreBinding};

/// One of a bitmap's two sets of bits: usually one records and the other one is idle and clean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Half {
    /// The first set.
    First,
    /// The second set.
    Second,
}

impl Half {
    /// Both, in order.
    pub const BOTH: [Half; 2] = [Half::First, Half::Second];

    /// The other one.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Half::First => Half::Second,
            Half::Second => Half::First,
        }
    }
}

/// What of a bitmap has to be known to find it again, besides its bits and what never changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// What it is called.
    pub name: BitmapName,
    /// Whether marks are recorded.
    pub recording: bool,
    /// Bytes covered.
    pub length: u64,
    /// The set that marks go to.
    pub recorder: Half,
    /// Whether the other set counts as well: it is frozen for a reader. Whoever finds the bitmap again finds both as one.
    pub frozen: bool,
}

/// What a persistent bitmap survives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Durability {
    /// An orderly end: its bits are saved then, and are in memory until then.
    Volatile,
    /// A process that is killed, too: exact afterwards, at the cost of a store to memory.
    #[default]
    Process,
    /// A machine that loses power, too: a mark is durable before the data can be. After that a bitmap has too much, by a bound,
    /// and never too little.
    Power,
}

impl fmt::Display for Durability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Durability::Volatile => "volatile",
            Durability::Process => "process",
            Durability::Power => "power",
        })
    }
}

/// What keeps one bitmap beyond the life of the process.
///
/// The bitmap tells its ledger of every change before memory has it, so that at any moment the ledger holds at least what
/// memory does. Marks and clears come from the data path and cannot fail: room for them was reserved. All else may fail, and
/// then leaves the ledger as it was.
///
/// Implemented by stores; called by [`Bitmap`](crate::Bitmap) alone.
pub trait Ledger: fmt::Debug + Send + Sync {
    /// The granules are dirty in `half`. From any number of threads at once; idempotent.
    fn mark(&self, half: Half, granules: Range<u64>);

    /// The granules are clean in `half`. Never at the same time as a mark of one of them; others may be marked meanwhile.
    fn unmark(&self, half: Half, granules: Range<u64>);

    /// All of `half` is clean. Never at the same time as a mark in it.
    ///
    /// If the last settled [`Record`] counts this half, it is wiped only once a record that does not is settled: what a crash
    /// must find is never taken away early. No mark comes to it in between.
    fn wipe(&self, half: Half);

    /// The granules from `first` on are clean in both halves, at once: the drive ends before them. Never at the same time as
    /// a mark.
    fn cut(&self, first: u64);

    /// Does the last settled record count this half? One that does is cleared by turning to the other half.
    fn counts(&self, half: Half) -> bool;

    /// What its bitmap survives.
    fn durability(&self) -> Durability;

    /// Is [`poll_safe`](Ledger::poll_safe) ever anything but ready?
    fn waits(&self) -> bool;

    /// Ready once all marks of these bytes, made before this call, are as safe as the bitmap's durability promises: data
    /// that they speak of may reach the disk then. Wakes `waker` when it is worth asking again.
    ///
    /// Errors: the store cannot be written; the write that waits for this must fail.
    fn poll_safe(&self, bytes: Range<u64>, waker: &Waker) -> Poll<Result<()>>;

    /// Takes down a new record, all of it or nothing.
    ///
    /// Within a batch of its store it is settled when the batch ends, together with all others, else at once.
    ///
    /// Errors: [`Error::Store`](crate::Error::Store).
    fn take_down(&self, record: &Record) -> Result<()>;

    /// Reserves room for granules up to `length` bytes, before a resize. Bits stay.
    ///
    /// Errors: [`Error::Store`](crate::Error::Store).
    fn reserve(&self, length: u64) -> Result<()>;

    /// Forgets the bitmap; like a record, settled with the batch. The ledger may be asked to take it down again: that
    /// is how a transaction undoes.
    ///
    /// Errors: [`Error::Store`](crate::Error::Store).
    fn forget(&self) -> Result<()>;

    /// Where that is, for people.
    fn binding(&self) -> StoreBinding;
}

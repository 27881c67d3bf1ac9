//! A bitmap: dirty bits with an identity, a name and a state.

mod kept;
mod users;

use arc_swap::ArcSwapOption;
use core::fmt;
use core::ops::Range;
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering, fence};
use parking_lot::{Mutex, MutexGuard};

pub use self::users::{Frozen, Keep, Use};
use crate::state::Control;
use crate::{BitmapName, Bits, Error, Granularity, Grown, Operation, Result, StoreBinding, View};

/// Tells bitmaps of one process apart, whatever they are called and wherever they are attached.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BitmapId(u64);

impl BitmapId {
    fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        BitmapId(NEXT.fetch_add(1, Ordering::Relaxed))
    }

    /// The number, as shown in traces.
    pub fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for BitmapId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

impl fmt::Debug for BitmapId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Marks are recorded.
const RECORDING: u8 = 1 << 0;
/// The second of the two sets of bits records, not the first.
const SECOND: u8 = 1 << 1;
/// The set that does not record is frozen for a reader; otherwise it is clean and unused.
const FROZEN: u8 = 1 << 2;
/// A ledger keeps the bitmap.
const KEPT: u8 = 1 << 3;
/// Who marks waits until the mark is safe.
const WAITS: u8 = 1 << 4;

/// A dirty bitmap, shared by the data path, which marks, and the control path, which does the rest.
///
/// It keeps two sets of bits. Usually one records and the other one lies idle. [`freeze`](Bitmap::freeze)
/// turns them round: what was recorded stands still for a backup to read, and the other one, QEMU's
/// *successor*, records from then on. Neither the identity nor the name changes by that, so every handle
/// stays good.
///
/// ```text
///              marks                 marks                          marks
///                |                     |                              |
///   before:  [ first ]     frozen: [ second ]     after abdicate: [ second ]    after reclaim: both, in second
///            [ idle  ]             [ first  ] <- backup           [ idle   ]
/// ```
pub struct Bitmap {
    id: BitmapId,
    view: View,
    state: AtomicU8,
    bits: [Bits; 2],
    /// Freezes that have ended.
    thaws: AtomicU64,
    control: Mutex<Control>,
    ledger: ArcSwapOption<kept::Slot>,
}

impl Bitmap {
    /// A clean bitmap of the drive's view that records.
    pub fn new(name: BitmapName, granularity: Granularity, length: u64) -> Self {
        let control = Control {
            name,
            users: Vec::new(),
            keepers: Vec::new(),
            users_ever: 0,
            readonly: false,
            inconsistent: false,
            persistent: false,
            store: None,
        };
        Bitmap {
            id: BitmapId::next(),
            view: View::Drive,
            state: AtomicU8::new(RECORDING),
            bits: [Bits::new(granularity, length), Bits::new(granularity, length)],
            thaws: AtomicU64::new(0),
            control: Mutex::new(control),
            ledger: ArcSwapOption::empty(),
        }
    }

    /// The same with another view.
    #[must_use]
    pub fn with_view(self, view: View) -> Self {
        Bitmap { view, ..self }
    }

    /// The same, recording from the start or not.
    #[must_use]
    pub fn with_recording(self, recording: bool) -> Self {
        self.set_recording(recording);
        self
    }

    /// The same, persistent in `store`.
    #[must_use]
    pub fn with_store(self, store: StoreBinding) -> Self {
        self.set_store(Some(store));
        self
    }

    /// The same with contents that are lost: imported from an image that was not closed orderly. It does not record.
    #[must_use]
    pub fn with_lost_contents(self) -> Self {
        self.set_lost();
        self
    }

    /// Its contents are lost. It does not record.
    pub fn set_lost(&self) {
        self.control.lock().inconsistent = true;
        self.set_recording(false);
    }

    /// Whatever its contents were that are lost: all of it is dirty from now on, and it records.
    ///
    /// Errors: [`Error::Store`].
    pub fn adopt(&self) -> Result<()> {
        self.mark_unconditionally(0..u64::MAX);
        let mut control = self.control.lock();
        self.take_down(&control, |record| record.recording = true)?;
        control.inconsistent = false;
        self.set_recording(true);
        Ok(())
    }

    /// Who it is.
    pub fn id(&self) -> BitmapId {
        self.id
    }

    /// What it is called now; [`BitmapSet::rename`](crate::BitmapSet::rename) may change that.
    pub fn name(&self) -> BitmapName {
        self.control.lock().name.clone()
    }

    /// Whose changes it records.
    pub fn view(&self) -> View {
        self.view
    }

    /// Bytes per bit.
    pub fn granularity(&self) -> Granularity {
        self.bits[0].granularity()
    }

    /// Bytes covered.
    pub fn length(&self) -> u64 {
        self.bits[0].length()
    }

    /// Records that `range` changes, if the bitmap is recording. The data path calls this before the write.
    ///
    /// Takes no lock: one relaxed load when nothing is recorded, else that and the marks of [`Bits::mark`].
    #[inline]
    pub fn mark(&self, range: Range<u64>) {
        let state = self.state.load(Ordering::Relaxed);
        if state & RECORDING != 0 {
            if state & KEPT == 0 {
                self.bits[recorder(state)].mark(range);
            } else {
                self.mark_kept(state, range);
            }
        }
    }

    /// Makes `range` dirty, recording or not: populates a bitmap from what is allocated, piece by piece.
    ///
    /// Check [`Operation::Populate`] first.
    pub fn mark_unconditionally(&self, range: Range<u64>) {
        let state = self.state.load(Ordering::Acquire);
        if state & KEPT == 0 {
            self.bits[recorder(state)].mark(range);
        } else {
            self.mark_kept(state, range);
        }
    }

    /// The bits as a reader should see them: those that stand still while the bitmap is frozen, else those that record.
    ///
    /// Once the freeze ends, what was returned here while it lasted is idle, and clean.
    pub fn bits(&self) -> &Bits {
        let state = self.state.load(Ordering::Acquire);
        &self.bits[if state & FROZEN == 0 { recorder(state) } else { 1 - recorder(state) }]
    }

    /// Reads the bits that [`Bitmap::bits`] returns, again if a freeze has ended meanwhile: what was read then may have been half
    /// cleared.
    pub fn read<T>(&self, mut read: impl FnMut(&Bits) -> T) -> T {
        loop {
            let before = self.thaws.load(Ordering::Acquire);
            let found = read(self.bits());
            // Whoever has read something of what was cleared sees here that it was.
            fence(Ordering::Acquire);
            if self.thaws.load(Ordering::Relaxed) == before {
                return found;
            }
        }
    }

    /// The bits that marks go to, the successor's while the bitmap is frozen.
    pub fn recording_bits(&self) -> &Bits {
        &self.bits[recorder(self.state.load(Ordering::Acquire))]
    }

    /// Whether marks are recorded.
    pub fn is_recording(&self) -> bool {
        self.state.load(Ordering::Relaxed) & RECORDING != 0
    }

    /// Whether a freeze is on.
    pub fn is_frozen(&self) -> bool {
        self.state.load(Ordering::Relaxed) & FROZEN != 0
    }

    /// Whether somebody uses it, so that it may be neither changed nor removed.
    pub fn is_busy(&self) -> bool {
        !self.control.lock().users.is_empty()
    }

    /// Who makes it busy.
    pub fn users(&self) -> Vec<String> {
        self.control.lock().users.iter().map(|(_, who)| who.clone()).collect()
    }

    /// Whether its contents are lost.
    pub fn is_inconsistent(&self) -> bool {
        self.control.lock().inconsistent
    }

    /// Whether it is kept across restarts.
    pub fn is_persistent(&self) -> bool {
        self.control.lock().persistent
    }

    /// Makes it persistent or not. Without a store that is a wish that the owner of the stores fulfils.
    pub fn set_persistent(&self, persistent: bool) {
        self.control.lock().persistent = persistent;
    }

    /// Where its bits are kept.
    pub fn store(&self) -> Option<StoreBinding> {
        self.ledger().map(|ledger| ledger.binding()).or_else(|| self.control.lock().store.clone())
    }

    /// Binds it to a store, which makes it persistent, or to none, which does not.
    pub fn set_store(&self, store: Option<StoreBinding>) {
        let mut control = self.control.lock();
        control.persistent = store.is_some();
        control.store = store;
    }

    /// Says whether the image that it was read from may be written.
    pub fn set_readonly(&self, readonly: bool) {
        self.control.lock().readonly = readonly;
    }

    /// Whether the image that it was read from may not be written.
    pub fn is_readonly(&self) -> bool {
        self.control.lock().readonly
    }

    /// Says whether `operation` would be accepted now: what a transaction asks before it changes anything.
    ///
    /// Errors: [`Error::Refused`].
    pub fn check(&self, operation: Operation) -> Result<()> {
        self.control.lock().check(operation)
    }

    /// Says whether `source` could be merged into this bitmap now.
    ///
    /// Errors: [`Error::Refused`] for either of the two, [`Error::LengthsDiffer`].
    pub fn check_merge(&self, source: &Bitmap) -> Result<()> {
        self.check(Operation::MergeInto)?;
        source.check(Operation::MergeFrom)?;
        self.check_lengths(source)
    }

    /// Makes it clean.
    pub fn clear(&self) -> Result<()> {
        let control = self.control.lock();
        control.check(Operation::Clear)?;
        self.replace(&control, &Bits::new(self.granularity(), self.length()))
    }

    /// Records from now on.
    pub fn enable(&self) -> Result<()> {
        let control = self.control.lock();
        control.check(Operation::Enable)?;
        self.take_down(&control, |record| record.recording = true)?;
        self.set_recording(true);
        Ok(())
    }

    /// Records no more; what was recorded stays.
    pub fn disable(&self) -> Result<()> {
        let control = self.control.lock();
        control.check(Operation::Disable)?;
        self.take_down(&control, |record| record.recording = false)?;
        self.set_recording(false);
        Ok(())
    }

    /// Adds what is dirty in `source`, which may have another granularity and sit on another node.
    ///
    /// Errors: as [`check_merge`](Bitmap::check_merge).
    pub fn merge_from(&self, source: &Bitmap) -> Result<()> {
        // One lock at a time: two bitmaps that are merged into each other at once must not wait for each other.
        self.check_merge(source)?;
        let control = self.control.lock();
        control.check(Operation::MergeInto)?;
        self.absorb(source.bits())
    }

    /// Takes over a copy of bits that was made earlier, in place of what it has: how a transaction undoes.
    ///
    /// The granularities may differ, the lengths may not. Marks must be drained, or they may be lost.
    ///
    /// Errors: [`Error::LengthsDiffer`].
    pub fn restore(&self, saved: &Bits) -> Result<()> {
        let control = self.control.lock();
        let bits = self.recording_bits();
        if bits.length() != saved.length() {
            let (source_name, target_name) = (String::new(), control.name.to_string());
            let (source_length, target_length) = (saved.length(), bits.length());
            return Err(Error::LengthsDiffer { source_name, source_length, target_name, target_length });
        }
        if bits.iter_dirty().eq(saved.iter_dirty()) {
            return Ok(());
        }
        self.replace(&control, saved)
    }

    /// Follows its node to another length.
    ///
    /// While it records, an area that grows is dirty in the drive's view (it changed for the reader) and clean in the
    /// node's, as in QEMU. Unlike there it may be busy: frozen bits follow as well, and what grows is recorded by
    /// the successor.
    ///
    /// What keeps it should have been asked to [`reserve`](Bitmap::reserve) before; if there is no room it is kept no more.
    pub fn resize(&self, length: u64) {
        self.resize_locked(self.control.lock(), length);
    }

    /// As [`Bitmap::resize`], but never makes it shorter: for the data path, where several threads may write behind the end at
    /// once, each with another end in mind. When this returns, `length` bytes can be marked.
    pub fn grow(&self, length: u64) {
        let control = self.control.lock();
        if length > self.length() {
            self.resize_locked(control, length);
        }
    }

    fn resize_locked(&self, control: MutexGuard<'_, Control>, length: u64) {
        let (state, before) = (self.state.load(Ordering::Acquire), self.length());
        let changes = self.view == View::Drive && state & RECORDING != 0;
        let bits = &self.bits[recorder(state)];
        let kept = self.reserve(length).is_ok();
        if let Some(ledger) = self.ledger().filter(|_| kept && length < before) {
            ledger.cut(length.div_ceil(self.granularity().bytes()));
        }
        bits.resize(length, if changes && !kept { Grown::Dirty } else { Grown::Clean });
        self.bits[1 - recorder(state)].resize(length, Grown::Clean);
        if kept {
            if changes && length > before {
                self.mark_unconditionally(before..length);
            }
            // If this fails, who finds the bitmap sees the old length, and counts what lies beyond as changed.
            drop(self.take_down(&control, |_| {}));
        } else {
            drop(control);
            drop(self.let_go());
        }
    }

    /// All that a client may know about it.
    pub fn info(&self) -> BitmapInfo {
        let control = self.control.lock();
        BitmapInfo {
            id: self.id,
            name: control.name.clone(),
            count: self.bits().dirty_bytes(),
            granularity: self.granularity(),
            length: self.length(),
            view: self.view,
            recording: self.is_recording(),
            busy: !control.users.is_empty(),
            users: control.users.iter().map(|(_, who)| who.clone()).collect(),
            persistent: control.persistent,
            readonly: control.readonly,
            inconsistent: control.inconsistent,
            store: self.ledger().map(|ledger| ledger.binding()).or_else(|| control.store.clone()),
        }
    }

    /// Bytes of memory in use.
    pub fn allocated_bytes(&self) -> usize {
        size_of::<Self>() + self.bits.iter().map(Bits::allocated_bytes).sum::<usize>()
    }

    /// Frees the memory of areas that are all clean or all dirty by now.
    pub fn compact(&mut self) {
        self.bits.iter_mut().for_each(Bits::compact);
    }

    pub(crate) fn set_name(&self, name: BitmapName) -> Result<()> {
        let mut control = self.control.lock();
        self.take_down(&control, |record| record.name = name.clone())?;
        control.name = name;
        Ok(())
    }

    /// Adds `bits` to what records, whatever the state.
    pub(crate) fn absorb(&self, bits: &Bits) -> Result<()> {
        self.mark_ledger(bits);
        self.recording_bits().merge_from(bits)
    }

    pub(crate) fn check_lengths(&self, source: &Bitmap) -> Result<()> {
        let (source_length, target_length) = (source.length(), self.length());
        if source_length == target_length {
            return Ok(());
        }
        let (source_name, target_name) = (source.name().to_string(), self.name().to_string());
        Err(Error::LengthsDiffer { source_name, source_length, target_name, target_length })
    }

    fn set_recording(&self, recording: bool) {
        if recording {
            self.state.fetch_or(RECORDING, Ordering::AcqRel);
        } else {
            self.state.fetch_and(!RECORDING, Ordering::AcqRel);
        }
    }
}

/// Which of the two sets of bits records.
#[inline]
fn recorder(state: u8) -> usize {
    usize::from(state & SECOND != 0)
}

impl fmt::Debug for Bitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.info(), f)
    }
}

/// A bitmap at one moment; the fields of QEMU's `BlockDirtyInfo`, and more.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BitmapInfo {
    /// Who it is.
    pub id: BitmapId,
    /// What it is called.
    pub name: BitmapName,
    /// Dirty bytes, none beyond the length; of the frozen bits while it is frozen.
    pub count: u64,
    /// Bytes per bit.
    pub granularity: Granularity,
    /// Bytes covered.
    pub length: u64,
    /// Whose changes it records.
    pub view: View,
    /// Whether marks are recorded, be it by a successor.
    pub recording: bool,
    /// Whether somebody uses it.
    pub busy: bool,
    /// Who uses it.
    pub users: Vec<String>,
    /// Whether it is kept across restarts.
    pub persistent: bool,
    /// Whether its image may not be written.
    pub readonly: bool,
    /// Whether its contents are lost.
    pub inconsistent: bool,
    /// Where its bits are kept.
    pub store: Option<StoreBinding>,
}

//! A bitmap that outlives the process: every change goes to its [`Ledger`] before memory has it.
//!
//! ```text
//!   mark:   dirty in memory already? ── yes ─▶ done
//!             │ no
//!             ▼
//!           ledger, then memory: who finds it in memory finds it in the ledger as well
//!
//!   clear:  the ledger turns to the other half, which is clean; then what was recorded is wiped
//! ```

use core::ops::Range;
use core::sync::atomic::{Ordering, fence};
use core::task::{Poll, Waker};
use std::sync::Arc;

use super::{Bitmap, FROZEN, KEPT, RECORDING, SECOND, WAITS, recorder};
use crate::{Bits, Durability, Half, Ledger, Record, Result};

/// Where the ledger hangs; read by the data path without a lock.
#[derive(Debug)]
pub(super) struct Slot(Arc<dyn Ledger>);

impl Bitmap {
    /// The same, found again in `ledger`, which has recorded `found` and holds `bits`.
    #[must_use]
    pub fn found(self, ledger: Arc<dyn Ledger>, found: &Record, bits: &Bits) -> Self {
        if found.recorder == Half::Second {
            self.state.fetch_or(SECOND, Ordering::AcqRel);
        }
        self.set_recording(found.recording);
        drop(self.recording_bits().merge_from(bits));
        self.hang(ledger);
        self
    }

    /// Keeps the bitmap in `ledger` from now on, which holds nothing yet. Marks must be drained.
    ///
    /// Errors: [`Error::Store`](crate::Error::Store); it is kept where it was then.
    pub fn keep_in(&self, ledger: Arc<dyn Ledger>) -> Result<()> {
        let control = self.control.lock();
        let record = self.record_of(&control);
        ledger.reserve(record.length)?;
        for half in Half::BOTH {
            mark_all(&*ledger, half, &self.bits[half as usize]);
        }
        ledger.take_down(&record)?;
        drop(control);
        self.hang(ledger);
        Ok(())
    }

    /// Is kept no more; what kept it is returned as it is, to be forgotten or to keep another one. Marks must be drained.
    pub fn let_go(&self) -> Option<Arc<dyn Ledger>> {
        self.state.fetch_and(!(KEPT | WAITS), Ordering::AcqRel);
        let mut control = self.control.lock();
        control.persistent = false;
        control.store = None;
        self.ledger.swap(None).map(|slot| slot.0.clone())
    }

    fn hang(&self, ledger: Arc<dyn Ledger>) {
        let bits = if ledger.waits() { KEPT | WAITS } else { KEPT };
        let mut control = self.control.lock();
        control.persistent = true;
        control.store = None;
        drop(control);
        self.ledger.store(Some(Arc::new(Slot(ledger))));
        self.state.fetch_or(bits, Ordering::AcqRel);
    }

    /// What keeps it.
    pub fn ledger(&self) -> Option<Arc<dyn Ledger>> {
        self.ledger.load().as_ref().map(|slot| slot.0.clone())
    }

    /// What it survives. `None`: it ends with the process, or nothing keeps it yet.
    pub fn durability(&self) -> Option<Durability> {
        self.ledger().map(|ledger| ledger.durability())
    }

    /// What there is to know about it, besides its bits.
    pub fn record(&self) -> Record {
        self.record_of(&self.control.lock())
    }

    pub(super) fn record_of(&self, control: &crate::state::Control) -> Record {
        let state = self.state.load(Ordering::Acquire);
        Record {
            name: control.name.clone(),
            recording: state & RECORDING != 0,
            length: self.length(),
            recorder: half_of(state),
            frozen: state & FROZEN != 0,
        }
    }

    /// Lets the ledger take down the record as `change` makes it, before memory follows. Nothing, if nothing keeps it.
    pub(super) fn take_down(
        &self,
        control: &crate::state::Control,
        change: impl FnOnce(&mut Record),
    ) -> Result<()> {
        let Some(ledger) = self.ledger() else { return Ok(()) };
        let mut record = self.record_of(control);
        change(&mut record);
        ledger.take_down(&record)
    }

    /// Takes the record down anew: a bitmap that was forgotten is kept again.
    ///
    /// Errors: [`Error::Store`](crate::Error::Store).
    pub fn remember(&self) -> Result<()> {
        self.take_down(&self.control.lock(), |_| {})
    }

    /// The ledger forgets the bitmap, which is removed, or has given way to another. Marks still reach it:
    /// [`remember`](Bitmap::remember) takes this back.
    ///
    /// Errors: [`Error::Store`](crate::Error::Store).
    pub fn forget(&self) -> Result<()> {
        self.ledger().map_or(Ok(()), |ledger| ledger.forget())
    }

    /// Reserves what a resize to `length` bytes will need, so that the resize itself cannot fail.
    ///
    /// Errors: [`Error::Store`](crate::Error::Store).
    pub fn reserve(&self, length: u64) -> Result<()> {
        self.ledger().map_or(Ok(()), |ledger| ledger.reserve(length))
    }

    /// Must who writes wait with [`poll_safe`](Bitmap::poll_safe) after marking?
    #[inline]
    pub fn waits(&self) -> bool {
        let state = self.state.load(Ordering::Relaxed);
        state & (WAITS | RECORDING) == WAITS | RECORDING
    }

    /// Ready when what was marked in `range` is as safe as the bitmap's durability promises.
    ///
    /// Errors: [`Error::Store`](crate::Error::Store): the write must not go on.
    pub fn poll_safe(&self, range: Range<u64>, waker: &Waker) -> Poll<Result<()>> {
        let range = range.start..range.end.min(self.length());
        if range.is_empty() {
            return Poll::Ready(Ok(()));
        }
        let slot = self.ledger.load();
        slot.as_ref().map_or(Poll::Ready(Ok(())), |slot| slot.0.poll_safe(range, waker))
    }

    /// Marks in the ledger, then in memory.
    pub(super) fn mark_kept(&self, state: u8, range: Range<u64>) {
        let bits = &self.bits[recorder(state)];
        let Some(granules) = bits.granules_of(range.clone()) else { return };
        if bits.all_dirty(granules.clone()) {
            // Pairs with the fence below: whoever found it in memory finds it in the ledger.
            fence(Ordering::Acquire);
            return;
        }
        if let Some(slot) = &*self.ledger.load() {
            slot.0.mark(half_of(state), granules);
        }
        fence(Ordering::Release);
        bits.mark(range);
    }

    /// What of `range` is clean in memory becomes clean in the ledger as well. Until then whoever finds the bitmap again finds it
    /// dirty: [`Bits::clear_range`] clears memory alone, because what made it clean may not be safe yet.
    ///
    /// Nobody may mark in `range` meanwhile.
    pub fn settle_clean(&self, range: Range<u64>) {
        let Some(ledger) = self.ledger() else { return };
        let state = self.state.load(Ordering::Acquire);
        let bits = &self.bits[recorder(state)];
        for extent in bits.extents(range).filter(|extent| !extent.dirty) {
            // Only whole granules: a run of clean ones begins and ends with one, unless the range cuts it off.
            let granule = bits.granularity().bytes();
            let start = extent.range.start.next_multiple_of(granule);
            let end = match extent.range.end {
                end if end >= bits.length() => end,
                end => end / granule * granule,
            };
            if let Some(granules) = bits.granules_of(start..end) {
                ledger.unmark(half_of(state), granules);
            }
        }
    }

    /// Marks in the ledger all that `bits` will add to what records.
    pub(super) fn mark_ledger(&self, bits: &Bits) {
        if let Some(ledger) = self.ledger() {
            let state = self.state.load(Ordering::Acquire);
            let own = &self.bits[recorder(state)];
            for range in bits.iter_dirty() {
                if let Some(granules) = own.granules_of(range) {
                    ledger.mark(half_of(state), granules);
                }
            }
        }
    }

    /// Makes the other half ready to record: clean in the ledger as well.
    pub(super) fn ready_other_half(&self, control: &crate::state::Control) -> Result<()> {
        let Some(ledger) = self.ledger() else { return Ok(()) };
        let other = half_of(self.state.load(Ordering::Acquire)).other();
        if ledger.counts(other) {
            // The end of a freeze could not be taken down.
            ledger.take_down(&self.record_of(control))?;
        }
        ledger.wipe(other);
        Ok(())
    }

    /// Replaces what is recorded by `bits`, in the ledger too, such that a crash finds the one or the other.
    ///
    /// Marks must be drained, and the bitmap not frozen; a frozen one is changed in place.
    pub(super) fn replace(&self, control: &crate::state::Control, bits: &Bits) -> Result<()> {
        let state = self.state.load(Ordering::Acquire);
        let (half, own) = (half_of(state), &self.bits[recorder(state)]);
        let turns = |ledger: &Arc<dyn Ledger>| {
            state & FROZEN == 0 && ledger.counts(half) && !ledger.counts(half.other())
        };
        match self.ledger().filter(|ledger| !own.is_clean() && turns(ledger)) {
            Some(ledger) => {
                let other = &self.bits[half.other() as usize];
                other.merge_from(bits)?;
                mark_all(&*ledger, half.other(), other);
                if let Err(error) = self.take_down(control, |record| record.recorder = half.other()) {
                    other.clear_all();
                    ledger.wipe(half.other());
                    return Err(error);
                }
                self.state.fetch_xor(SECOND, Ordering::AcqRel);
                own.clear_all();
                ledger.wipe(half);
            }
            None => {
                // What the settled record counts stays in the ledger: after a crash it is too much, but nothing is lost.
                if let Some(ledger) = self.ledger().filter(|ledger| !ledger.counts(half)) {
                    ledger.wipe(half);
                }
                own.clear_all();
                self.mark_ledger(bits);
                own.merge_from(bits)?;
            }
        }
        Ok(())
    }

    /// Ends a freeze in the ledger: the frozen half counts no more, and is clean.
    pub(super) fn settle_thaw(&self, control: &crate::state::Control, frozen: Half) {
        let Some(ledger) = self.ledger() else { return };
        // If this fails, what was frozen is found again after a crash, too much but never too little; the next record
        // settles it.
        if ledger.take_down(&self.record_of(control)).is_ok() {
            ledger.wipe(frozen);
        }
    }
}

fn half_of(state: u8) -> Half {
    if state & SECOND == 0 { Half::First } else { Half::Second }
}

/// Marks in `half` what is dirty in `bits`.
fn mark_all(ledger: &dyn Ledger, half: Half, bits: &Bits) {
    for range in bits.iter_dirty() {
        if let Some(granules) = bits.granules_of(range) {
            ledger.mark(half, granules);
        }
    }
}

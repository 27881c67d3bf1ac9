//! Who uses a bitmap, and the freeze that gives one user bits that stand still.

use core::sync::atomic::{Ordering, fence};
use std::sync::Arc;

use super::{Bitmap, FROZEN, SECOND};
use crate::{Bits, Operation, Result};

impl Bitmap {
    /// Makes the bitmap busy for as long as the result lives. `who` is shown to whoever is refused.
    ///
    /// Errors: [`Error::Refused`](crate::Error::Refused) if its contents are lost.
    pub fn begin_use(self: &Arc<Self>, who: &str) -> Result<Use> {
        let mut control = self.control.lock();
        control.check(Operation::Use)?;
        let user = control.add_user(who);
        Ok(Use { bitmap: Arc::clone(self), user })
    }

    /// Keeps the bitmap from being removed for as long as the result lives. All else can be done to it meanwhile.
    ///
    /// Who shows a bitmap to others needs this: one that was removed records no more, but looks as if it did.
    pub fn keep(self: &Arc<Self>, who: &str) -> Keep {
        let keeper = self.control.lock().add_keeper(who);
        Keep { bitmap: Arc::clone(self), keeper }
    }

    /// Lets what was recorded stand still for `who` to read, and records into a successor from now on.
    ///
    /// Drain marks around this for an exact cut. To drop the result reclaims: an unfinished backup loses nothing.
    ///
    /// Errors: [`Error::Refused`](crate::Error::Refused) if it is busy, readonly or inconsistent.
    pub fn freeze(self: &Arc<Self>, who: &str) -> Result<Frozen> {
        let mut control = self.control.lock();
        control.check(Operation::Freeze)?;
        self.ready_other_half(&control)?;
        self.take_down(&control, |record| {
            record.recorder = record.recorder.other();
            record.frozen = true;
        })?;
        let user = control.add_user(who);
        // Nobody else changes these two while the lock is held, so both turn in one step.
        self.state.fetch_xor(SECOND | FROZEN, Ordering::AcqRel);
        Ok(Frozen { held: Use { bitmap: Arc::clone(self), user }, success: false })
    }
}

/// Somebody uses the bitmap: it is busy until this is dropped.
#[derive(Debug)]
#[must_use = "the bitmap is busy only as long as this lives"]
pub struct Use {
    bitmap: Arc<Bitmap>,
    user: u64,
}

impl Use {
    /// The bitmap in use.
    pub fn bitmap(&self) -> &Arc<Bitmap> {
        &self.bitmap
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        self.bitmap.control.lock().remove_user(self.user);
    }
}

/// Somebody shows the bitmap: it is not removed until this is dropped.
#[derive(Debug)]
#[must_use = "the bitmap is kept only as long as this lives"]
pub struct Keep {
    bitmap: Arc<Bitmap>,
    keeper: u64,
}

impl Keep {
    /// The bitmap that is kept.
    pub fn bitmap(&self) -> &Arc<Bitmap> {
        &self.bitmap
    }
}

impl Drop for Keep {
    fn drop(&mut self) {
        self.bitmap.control.lock().remove_keeper(self.keeper);
    }
}

/// A bitmap whose recorded bits stand still while its successor records.
///
/// Ends by [`abdicate`](Frozen::abdicate) or [`reclaim`](Frozen::reclaim). Both are exact while writes go on.
#[derive(Debug)]
#[must_use = "to drop this reclaims at once"]
pub struct Frozen {
    held: Use,
    success: bool,
}

impl Frozen {
    /// The frozen bitmap.
    pub fn bitmap(&self) -> &Arc<Bitmap> {
        &self.held.bitmap
    }

    /// The bits that stand still.
    pub fn bits(&self) -> &Bits {
        self.held.bitmap.bits()
    }

    /// Success: what stood still is dropped, and what the successor recorded is all that the bitmap holds.
    pub fn abdicate(mut self) {
        self.success = true;
    }

    /// Failure: the bitmap holds what stood still and what the successor recorded.
    pub fn reclaim(self) {
        drop(self);
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let bitmap = &self.held.bitmap;
        let control = bitmap.control.lock();
        let (frozen, half) = (bitmap.bits(), bitmap.record_of(&control).recorder.other());
        if !self.success {
            bitmap.absorb(frozen).expect("both sets of bits are resized together");
        }
        // Readers turn to the successor before the frozen bits go, and those in the middle of them begin again.
        bitmap.state.fetch_and(!FROZEN, Ordering::AcqRel);
        bitmap.thaws.fetch_add(1, Ordering::AcqRel);
        fence(Ordering::Release);
        bitmap.settle_thaw(&control, half);
        frozen.clear_all();
    }
}

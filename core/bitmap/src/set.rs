//! The bitmaps that are attached to one node.

use std::sync::Arc;

use crate::{Bitmap, BitmapId, BitmapName, Error, Operation, Result};

/// Bitmaps with unique names, in the order in which they were added.
///
/// A plain value: whoever owns the node locks it. A clone holds the same bitmaps, so a transaction can keep
/// one and put it back. The data path does not ask the set; it keeps a [`snapshot`](BitmapSet::snapshot) that is made anew when the
/// set changes.
#[derive(Clone, Debug, Default)]
pub struct BitmapSet {
    bitmaps: Vec<Arc<Bitmap>>,
}

impl BitmapSet {
    /// An empty set.
    pub fn new() -> Self {
        BitmapSet::default()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.bitmaps.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bitmaps.is_empty()
    }

    /// All, in the order in which they were added.
    pub fn iter(&self) -> core::slice::Iter<'_, Arc<Bitmap>> {
        self.bitmaps.iter()
    }

    /// All, as they are now, for a data path that must not lock.
    pub fn snapshot(&self) -> Arc<[Arc<Bitmap>]> {
        self.bitmaps.as_slice().into()
    }

    /// The bitmap of this name, if any.
    pub fn get(&self, name: &str) -> Option<&Arc<Bitmap>> {
        self.bitmaps.iter().find(|bitmap| bitmap.name() == *name)
    }

    /// The bitmap of this identity, if it is here.
    pub fn get_id(&self, id: BitmapId) -> Option<&Arc<Bitmap>> {
        self.bitmaps.iter().find(|bitmap| bitmap.id() == id)
    }

    /// The bitmap of this name.
    ///
    /// Errors: [`Error::NotFound`], which tells the names that are there.
    pub fn find(&self, name: &str) -> Result<&Arc<Bitmap>> {
        self.get(name).ok_or_else(|| Error::NotFound {
            name: name.to_owned(),
            present: self.bitmaps.iter().map(|bitmap| bitmap.name().to_string()).collect(),
        })
    }

    /// Adds a bitmap.
    ///
    /// Errors: [`Error::NameTaken`].
    pub fn add(&mut self, bitmap: Arc<Bitmap>) -> Result<()> {
        self.check_name(&bitmap.name())?;
        self.bitmaps.push(bitmap);
        Ok(())
    }

    /// Removes a bitmap for good.
    ///
    /// Errors: [`Error::NotFound`], [`Error::Refused`] if it is busy or readonly.
    pub fn remove(&mut self, name: &str) -> Result<Arc<Bitmap>> {
        let bitmap = self.find(name)?;
        bitmap.check(Operation::Remove)?;
        let id = bitmap.id();
        Ok(self.take(id).expect("it was found in this set"))
    }

    /// Takes a bitmap out to put it elsewhere, whatever its state: its users go along.
    pub fn take(&mut self, id: BitmapId) -> Option<Arc<Bitmap>> {
        let at = self.bitmaps.iter().position(|bitmap| bitmap.id() == id)?;
        Some(self.bitmaps.remove(at))
    }

    /// Adds a bitmap that was moved here; one of the same name that is here already is merged into it.
    ///
    /// The moved one keeps its identity, granularity, state and users, takes the other one's place and gains its bits,
    /// and its ledger if it has none itself; else that forgets the one that gave way, which is returned.
    ///
    /// Errors: as [`check_put`](BitmapSet::check_put); nothing is changed then.
    pub fn put(&mut self, moved: Arc<Bitmap>) -> Result<Option<Arc<Bitmap>>> {
        self.check_put(&moved)?;
        let name = moved.name();
        let Some(place) = self.bitmaps.iter_mut().find(|bitmap| bitmap.name() == name) else {
            self.bitmaps.push(moved);
            return Ok(None);
        };
        if place.id() == moved.id() {
            return Ok(None);
        }
        match place.ledger() {
            Some(_) if moved.ledger().is_some() => place.forget()?,
            Some(ledger) => {
                moved.keep_in(ledger)?;
                place.let_go();
            }
            None if moved.store().is_none() && place.is_persistent() => moved.set_store(place.store()),
            None => {}
        }
        moved.absorb(place.bits())?;
        Ok(Some(core::mem::replace(place, moved)))
    }

    /// Says whether [`put`](BitmapSet::put) would succeed.
    ///
    /// Errors: if there is another one of the same name, [`Error::Refused`] if that one is busy, readonly or inconsistent
    /// or if the moved one is inconsistent, [`Error::LengthsDiffer`].
    pub fn check_put(&self, moved: &Bitmap) -> Result<()> {
        match self.get(&moved.name()) {
            Some(present) if present.id() != moved.id() => {
                present.check(Operation::Remove)?;
                present.check(Operation::MergeFrom)?;
                moved.check(Operation::Use)?;
                moved.check_lengths(present)
            }
            _ => Ok(()),
        }
    }

    /// Gives a bitmap another name. Its identity, its handles and its users stay.
    ///
    /// Errors: [`Error::NotFound`], [`Error::NameTaken`], [`Error::Refused`] if it is readonly.
    pub fn rename(&mut self, name: &str, new_name: BitmapName) -> Result<()> {
        let bitmap = self.find(name)?;
        bitmap.check(Operation::Rename)?;
        if *name != *new_name {
            self.check_name(&new_name)?;
            bitmap.set_name(new_name)?;
        }
        Ok(())
    }

    /// Lets all follow the node to another length.
    pub fn resize(&self, length: u64) {
        self.bitmaps.iter().for_each(|bitmap| bitmap.resize(length));
    }

    /// Says whether a bitmap of this name could be added.
    ///
    /// Errors: [`Error::NameTaken`].
    pub fn check_name(&self, name: &str) -> Result<()> {
        match self.get(name) {
            Some(_) => Err(Error::NameTaken { name: name.to_owned() }),
            None => Ok(()),
        }
    }
}

impl<'a> IntoIterator for &'a BitmapSet {
    type Item = &'a Arc<Bitmap>;
    type IntoIter = core::slice::Iter<'a, Arc<Bitmap>>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

//! Exports that a change of the graph brings: prepared in it, and offered once it is made.
//!
//! The turn of [`Exports`] is not taken meanwhile: who has it may be waiting for the change. Id and name are kept free instead.

use super::{Entry, Exports, Held, Listening, NewExport, State, name_taken, offer};
use crate::{config::Address, daemon::Inner};
use driveline_bitmap::Bitmap;
use driveline_graph::{Change, Error, Kind, Result, Root};
use driveline_qmp::ExportToCome;
use parking_lot::Mutex;
use std::sync::Arc;

/// An export that is prepared. Dropped, it never was.
pub(crate) struct Coming {
    inner: Arc<Inner>,
    new: NewExport,
    at: Address,
    listening: Arc<Listening>,
    /// Its user in the change, and the bitmaps that it shows.
    shows: Option<(Root, (Vec<Arc<Bitmap>>, Vec<Held>))>,
}

impl Coming {
    /// Prepares an export in a change.
    ///
    /// Errors: those of [`Exports::add`] but for what permissions refuse, which the change says when it is made.
    pub(crate) fn prepare(
        inner: Arc<Inner>,
        change: &mut Change,
        new: NewExport,
        bitmaps: &[Arc<Bitmap>],
    ) -> Result<Self> {
        let exports: &Exports = &inner.exports;
        let (at, listening) = exports.place_for(&new)?;
        if listening.server.exports().sessions(&new.name).is_some() {
            return Err(name_taken(&new.name));
        }
        {
            let mut state = exports.state.lock();
            // Looked at once more: others may have been quicker.
            let place = (at.clone(), new.name.clone());
            if state.exports.contains_key(&new.id)
                || state.coming.contains_key(&new.id)
                || state.coming.values().any(|coming| *coming == place)
            {
                return Err(Error::new(
                    Kind::Busy,
                    format_args!("export '{}' is being added already", new.id),
                ));
            }
            state.coming.insert(new.id.clone(), place);
        }
        let mut coming = Self { inner, new, at, listening, shows: None };
        let root = coming.new.attach(change)?;
        let held = coming.new.hold(&coming.inner.graph, bitmaps)?;
        coming.shows = Some((root, (bitmaps.to_vec(), held)));
        Ok(coming)
    }
}

impl ExportToCome for Coming {
    fn publish(mut self: Box<Self>) {
        let Some((root, shown)) = self.shows.take() else { return };
        let mut state = self.inner.exports.state.lock();
        state.coming.remove(&self.new.id);
        // A server that was stopped meanwhile took its exports along, and this is one of them.
        if !state.servers.get(&self.at).is_some_and(|there| Arc::ptr_eq(there, &self.listening)) {
            return;
        }
        match offer(&self.listening.server, &self.new, root, shown) {
            Ok(shown) => {
                let entry = Entry::new(&self.new, self.at.clone(), false, shown);
                state.exports.insert(self.new.id.clone(), entry);
            }
            // Its name was kept free, so this cannot be.
            Err(error) => tracing::error!("an export of a transaction: {error}"),
        }
    }
}

impl Drop for Coming {
    fn drop(&mut self) {
        self.inner.exports.state.lock().coming.remove(&self.new.id);
    }
}

/// Ids and names that are kept free while exports wait for a change that offers them. Dropped, they are free again, or those of
/// exports that are there.
pub(super) struct Taken<'a> {
    state: &'a Mutex<State>,
    ids: Vec<String>,
}

impl<'a> Taken<'a> {
    pub(super) fn none(state: &'a Mutex<State>) -> Self {
        Self { state, ids: Vec::new() }
    }

    /// Errors: the id is another export's, or of one that is on its way, as the name on this socket may be.
    pub(super) fn take(&mut self, new: &NewExport, at: &Address) -> Result<()> {
        let mut state = self.state.lock();
        state.check_id(&new.id)?;
        let place = (at.clone(), new.name.clone());
        if state.coming.values().any(|coming| *coming == place) {
            return Err(name_taken(&new.name));
        }
        state.coming.insert(new.id.clone(), place);
        self.ids.push(new.id.clone());
        Ok(())
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let mut state = self.state.lock();
        for id in &self.ids {
            state.coming.remove(id);
        }
    }
}

//! At the end: bitmaps go where they are between two runs of the program.

use super::{
    Kept, Owner, Stores,
    owner::Owned,
    place::{self, Place},
    store_error,
};
use driveline_bitmap::{Bitmap, Bits, Granularity};
use driveline_graph::{BitmapToStore, Change, Error, Graph, OpenChild, OpenNode, Result};
use driveline_store::{Fingerprint, Store};
use std::{fs, io, path::PathBuf, sync::Arc, time::SystemTime};

/// Stores that stay files, with the images that they are about, for the time when those are closed.
#[derive(Debug, Default)]
pub(crate) struct Remaining(Vec<(Arc<Kept>, Store, Vec<PathBuf>)>);

impl Remaining {
    pub(crate) fn append(&mut self, more: Self) {
        self.0.extend(more.0);
    }
}

/// A bitmap for an image, by value: what is done in a graph change outlives who asks for it.
pub(super) struct ForImage {
    name: String,
    granularity: Granularity,
    recording: bool,
    /// None: it is in use, in a file beside the image.
    bits: Option<Bits>,
    /// Its bits are those that this one has when the image is written.
    live: Option<Arc<Bitmap>>,
}

impl ForImage {
    pub(super) fn in_use(bitmap: &Bitmap) -> Self {
        let (name, granularity) = (bitmap.name().to_string(), bitmap.granularity());
        Self { name, granularity, recording: bitmap.is_recording(), bits: None, live: None }
    }

    /// What a bitmap holds when the image is written: what a guest writes until then is in it.
    fn live(bitmap: &Arc<Bitmap>) -> Self {
        Self { live: Some(bitmap.clone()), ..Self::in_use(bitmap) }
    }

    /// Nothing changes any more.
    fn settle(self) -> Self {
        match &self.live {
            Some(bitmap) => Self::with_bits(bitmap, bitmap.bits().clone()),
            None => self,
        }
    }

    pub(super) fn borrow(&self) -> BitmapToStore<'_> {
        BitmapToStore {
            name: &self.name,
            granularity: self.granularity,
            recording: self.recording,
            in_use: self.bits.is_none(),
            bits: self.bits.as_ref(),
        }
    }

    fn to_in_use(&self) -> Self {
        let (name, granularity) = (self.name.clone(), self.granularity);
        Self { name, granularity, recording: self.recording, bits: None, live: None }
    }

    pub(super) fn with_bits(bitmap: &Bitmap, bits: Bits) -> Self {
        Self { bits: Some(bits), ..Self::in_use(bitmap) }
    }
}

/// Makes these the bitmaps of an image, and sets or takes away its witness.
pub(super) async fn put_into_image(
    graph: &Graph,
    node: &str,
    bitmaps: Vec<ForImage>,
    witness: bool,
) -> Result<()> {
    let mut change = graph.change().await;
    let read_only = graph.view_node(node)?.read_only;
    if read_only {
        // A job was done with it meanwhile. Nobody else writes there now.
        change.set_read_only(node, false)?;
    }
    stage_into_image(&mut change, node, bitmaps, witness)?;
    change.commit().await?;
    if read_only {
        let mut change = graph.change().await;
        change.set_read_only(node, true)?;
        change.commit().await?;
    }
    Ok(())
}

/// The same as part of a change. If that is not made after all, the image is told that its bitmaps are in use beside it.
pub(super) fn stage_into_image(
    change: &mut Change,
    node: &str,
    bitmaps: Vec<ForImage>,
    witness: bool,
) -> Result<()> {
    let in_use = bitmaps.iter().map(ForImage::to_in_use).collect();
    change.visit_or_back(
        node,
        move |open, children| Box::pin(async move { put(&*open, &children, bitmaps, witness).await }),
        move |open, children| Box::pin(async move { put(&*open, &children, in_use, true).await }),
    )
}

/// The same at once, with the image's node and children at hand.
pub(super) async fn put(
    open: &dyn OpenNode,
    children: &[OpenChild],
    bitmaps: Vec<ForImage>,
    witness: bool,
) -> Result<()> {
    let bitmaps: Vec<ForImage> = bitmaps.into_iter().map(ForImage::settle).collect();
    let bitmaps: Vec<BitmapToStore<'_>> = bitmaps.iter().map(ForImage::borrow).collect();
    if witness {
        open.set_witness(children, true).await?;
    }
    open.store_bitmaps(children, &bitmaps).await?;
    if !witness {
        open.set_witness(children, false).await?;
    }
    Ok(())
}

impl Stores {
    /// Puts the bitmaps of images into them, while they are open and nothing is in flight. What stays a file is returned,
    /// for [`Stores::close_files`]. Goes on after an error, and returns the first.
    pub(crate) async fn save(&self) -> (Remaining, Result<()>) {
        self.state.lock().closing = true;
        self.changed.notify(usize::MAX);
        let _turn = self.turn.lock().await;
        let (mut remaining, mut first) = (Remaining::default(), Ok(()));
        for kept in self.all() {
            let (store, place, attached) = {
                let mut inner = kept.inner.lock();
                inner.pin = None;
                (inner.store.take(), inner.place.clone(), inner.attached)
            };
            // A start that failed half-way leaves what it found, as if it had been killed.
            let Some(store) = store.filter(|_| attached) else { continue };
            let bitmaps = self.bitmaps_of(&store.path());
            let saved = match &place {
                Place::Image { node, .. } => self.save_image(&kept, node, &bitmaps).await.map(|()| true),
                Place::File(_) => Ok(bitmaps.is_empty()),
            };
            match saved {
                Ok(true) => {
                    let path = store.path();
                    drop(store);
                    let removed = remove(&path);
                    first = first.and(removed);
                }
                not_all => {
                    let files = place::files_below(&self.graph, kept.owner.name());
                    remaining.0.push((kept.clone(), store, files));
                    if let Err(error) = not_all {
                        tracing::error!("bitmaps of {} stay beside their image: {error}", kept.owner);
                        first = first.and(Err(error));
                    }
                }
            }
        }
        (remaining, first)
    }

    /// Puts the bitmaps of a drive that is about to go where they are between two runs of the program, and takes them off it. What
    /// stays a file is returned, for [`Stores::close_files`] once its images are closed.
    pub(crate) async fn leave(&self, drive: &str) -> Result<Remaining> {
        let _turn = self.turn.lock().await;
        let owner = Owner::Drive(drive.to_owned());
        let mut remaining = Remaining::default();
        let Some(kept) = self.all().into_iter().find(|kept| kept.owner == owner) else {
            return Ok(remaining);
        };
        let (path, place, attached) = {
            let inner = kept.inner.lock();
            (inner.store.as_ref().map(|store| store.path()), inner.place.clone(), inner.attached)
        };
        let bitmaps = path.as_deref().map(|path| self.bitmaps_of(path)).unwrap_or_default();
        if let (Place::Image { node, .. }, true) = (&place, path.is_some() && attached) {
            self.save_image(&kept, node, &bitmaps).await?;
        }
        let mut change = self.graph.change().await;
        // Others there are another drive's, which came to show the same disk.
        let lost = self.lost_of(&kept);
        let shown = self.graph.bitmaps(drive)?;
        let own = |bitmap: &&Arc<Bitmap>| bitmaps.iter().chain(&lost).any(|own| Arc::ptr_eq(own, bitmap));
        for bitmap in shown.iter().filter(own) {
            change.detach_bitmap(drive, bitmap.name().as_str())?;
        }
        change.commit().await?;
        let files = place::files_below(&self.graph, drive);
        let store = self.part_with(&kept);
        // What was found and could not be attached is there the next time, as after a kill.
        let Some(store) = store.filter(|_| attached) else { return Ok(remaining) };
        match place {
            Place::File(_) if !bitmaps.is_empty() => remaining.0.push((kept, store, files)),
            _ => {
                let path = store.path();
                drop(store);
                remove(&path)?;
            }
        }
        Ok(remaining)
    }

    pub(super) async fn save_image(&self, kept: &Kept, node: &str, bitmaps: &[Arc<Bitmap>]) -> Result<()> {
        put_into_image(&self.graph, node, self.for_image(kept, bitmaps), false).await
    }

    /// What an image is to hold when these are put away.
    pub(super) fn for_image(&self, kept: &Kept, bitmaps: &[Arc<Bitmap>]) -> Vec<ForImage> {
        let mut stored: Vec<ForImage> =
            bitmaps.iter().filter(|bitmap| bitmap.ledger().is_some()).map(ForImage::live).collect();
        stored.extend(self.lost_of(kept).iter().map(|bitmap| ForImage::in_use(bitmap)));
        stored
    }

    /// Bitmaps of an image whose contents are lost, and which nobody removed: the image keeps them as they are.
    pub(super) fn lost_of(&self, kept: &Kept) -> Vec<Arc<Bitmap>> {
        let nodes = self.graph.nodes();
        let foreign = kept.inner.lock().foreign.clone();
        let lost = |bitmap: &&Arc<Bitmap>| {
            bitmap.is_inconsistent() && foreign.iter().any(|name| *name == *bitmap.name().as_str())
        };
        nodes.iter().flat_map(|view| view.bitmaps.iter()).filter(lost).cloned().collect()
    }

    /// Closes the stores that stay files, once the images are closed: then they know what those look like.
    pub(crate) fn close_files(&self, remaining: Remaining) -> Result<()> {
        let mut first = Ok(());
        for (kept, store, files) in remaining.0 {
            let path = store.path();
            let owned = kept.owned(self, &kept.inner.lock());
            let closed = Fingerprint::take(&files)
                .map_err(|error| Error::io_text(error.raw_os_error().unwrap_or(5), error))
                .and_then(|images| {
                    let owned = Owned { images, ..owned };
                    store.set_owner(&owned.encode()).map_err(store_error)?;
                    // Closing the images may have taken a while, and was this program's doing.
                    store.heartbeat(SystemTime::now());
                    store.close_clean().map_err(store_error)
                });
            if let Err(error) = closed {
                tracing::error!("{}: {error}", path.display());
                first = first.and(Err(error));
            }
        }
        first
    }
}

pub(super) fn remove(path: &std::path::Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io(error.raw_os_error().unwrap_or(5), format_args!("removing {}", path.display())))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use driveline_graph::GraphOptions;
    use futures::FutureExt;

    /// A start that fails between the opening of a store and the attaching of its bitmaps has a graph without them: that is no
    /// reason to put away none, and to remove the file.
    #[test]
    fn a_start_that_fails_half_way_leaves_the_store_that_it_found() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vda.dlbitmaps");
        let graph = Graph::new(GraphOptions::default());
        let stores = Stores::new(&graph).unwrap();
        let kept = stores.add(Owner::Drive("vda".into()), Place::File(path.clone()), true);
        kept.store(&stores, 1 << 20).unwrap();
        let (remaining, saved) = stores.save().now_or_never().expect("nobody else is here");
        saved.and(stores.close_files(remaining)).unwrap();
        assert!(path.exists());
    }
}

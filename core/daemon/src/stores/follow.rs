//! While the program runs: bitmaps follow their drive to other images, and images know that their bitmaps are in use.
//!
//! ```text
//!   before a commit   active.qcow2 ─▶ base.qcow2        after it   base.qcow2
//!                     active.qcow2.dlbitmaps                       base.qcow2.dlbitmaps
//! ```

use super::{
    Kept, Owner, Stores,
    place::Place,
    save::{ForImage, put_into_image},
    store_error,
};
use driveline_bitmap::{Bitmap, Durability};
use driveline_graph::{Error, Kind, Permissions, Result, RootOptions};
use driveline_store::Store;
use std::{
    sync::{Arc, Weak},
    time::{Duration, SystemTime},
};

/// How often stores are told that the program lives.
const HEARTBEAT: Duration = Duration::from_secs(1);

impl Stores {
    /// Follows changes of the graph until the program ends.
    pub(crate) async fn follow(self: Arc<Self>) {
        loop {
            let changed = self.changed.listen();
            if self.state.lock().closing {
                return;
            }
            self.settle().await;
            changed.await;
        }
    }

    /// Makes places, images and pins what they should be now. What fails is logged, and tried again at the next change.
    pub(crate) async fn settle(self: &Arc<Self>) {
        let _turn = self.turn.lock().await;
        if self.state.lock().closing {
            return;
        }
        self.adopt_writable().await;
        for kept in self.all() {
            if self.is_over(&kept) {
                continue;
            }
            if let Err(error) = self.settle_one(&kept).await {
                tracing::error!("bitmaps of {}: {error}", kept.owner);
            }
        }
    }

    /// A drive or node that is gone keeps nothing any more, and the next one of its name has a place of its own.
    fn is_over(&self, kept: &Arc<Kept>) -> bool {
        if self.graph.node_or_drive(kept.owner.name()).is_ok() {
            return false;
        }
        let (path, attached) = {
            let inner = kept.inner.lock();
            (inner.store.as_ref().map(|store| store.path()), inner.attached)
        };
        if path.as_ref().is_some_and(|path| !self.bitmaps_of(path).is_empty()) {
            return false;
        }
        drop(kept.inner.lock().store.take());
        self.forget(kept);
        // What was found and could not be attached is there the next time.
        let path = path.filter(|_| attached);
        if let Some(Err(error)) = path.map(|path| super::save::remove(&path)) {
            tracing::error!("bitmaps of {}, of which there are none any more: {error}", kept.owner);
        }
        true
    }

    /// Nobody's bitmaps are kept there any more: what is left of it is the store, if it has one.
    pub(super) fn part_with(&self, kept: &Arc<Kept>) -> Option<Store> {
        let store = {
            let mut inner = kept.inner.lock();
            inner.pin = None;
            inner.announced.clear();
            inner.store.take()
        };
        self.forget(kept);
        store
    }

    pub(super) fn forget(&self, kept: &Arc<Kept>) {
        self.state.lock().kept.retain(|other| !Arc::ptr_eq(other, kept));
    }

    pub(super) async fn settle_one(self: &Arc<Self>, kept: &Arc<Kept>) -> Result<()> {
        let (place, fixed, has_store) = {
            let inner = kept.inner.lock();
            (inner.place.clone(), inner.fixed, inner.store.is_some())
        };
        let wanted = match &kept.owner {
            Owner::Drive(drive) if !fixed && self.graph.is_drive(drive) => {
                Place::default_for(&self.graph, drive).unwrap_or_else(|_| place.clone())
            }
            _ => place.clone(),
        };
        if !has_store {
            kept.inner.lock().place = wanted;
            return Ok(());
        }
        let wanted = self.unless_taken(kept, wanted);
        self.move_to(kept, &wanted).await?;
        if let Some(node) = wanted.node() {
            self.announce(kept, node).await?;
        }
        self.say_images(kept)
    }

    /// Tells a store which images its drive has now.
    fn say_images(&self, kept: &Kept) -> Result<()> {
        let mut inner = kept.inner.lock();
        let owned = kept.owned(self, &inner).encode();
        if let Some(store) = inner.store.as_ref().filter(|_| inner.said != owned) {
            store.set_owner(&owned).map_err(store_error)?;
            inner.said = owned;
        }
        Ok(())
    }

    /// An image that keeps bitmaps of its own has no room for a drive's as long as the program runs: those are in a file of
    /// the drive's name beside it, and come into the image when the drive is next opened there.
    fn unless_taken(&self, kept: &Arc<Kept>, wanted: Place) -> Place {
        let Some(node) = wanted.node() else { return wanted };
        let taken = |other: &Arc<Kept>| {
            let inner = (!Arc::ptr_eq(other, kept)).then(|| other.inner.lock());
            inner.is_some_and(|inner| inner.place.node() == Some(node) && inner.store.is_some())
        };
        if !self.all().iter().any(taken) {
            return wanted;
        }
        let path = wanted.store_path().with_file_name(format!("{}.dlbitmaps", kept.owner.name()));
        Place::File(path)
    }

    /// Moves the bitmaps of a drive to another place: the new one is written before the old one is dropped, and at every
    /// moment exactly one of them counts.
    pub(super) async fn move_to(self: &Arc<Self>, kept: &Arc<Kept>, place: &Place) -> Result<()> {
        let (path, before) = {
            let inner = kept.inner.lock();
            let Some(store) = &inner.store else { return Ok(()) };
            (store.path(), inner.place.clone())
        };
        if path == place.store_path() {
            kept.inner.lock().place = place.clone();
            return Ok(());
        }
        // The image knows before they come: from the first moment a change of it from outside would be noticed.
        if let Some(node) = place.node() {
            let bitmaps = self.bitmaps_of(&path).into_iter().chain(self.lost_of(kept));
            let stored = bitmaps.map(|bitmap| ForImage::in_use(&bitmap)).collect();
            put_into_image(&self.graph, node, stored, true).await?;
        }
        let root = self.graph.node_or_drive(kept.owner.name())?;
        let mut change = self.graph.change().await;
        let (stores, moved, to) = (self.clone(), kept.clone(), place.clone());
        let work = move |_| {
            let result = moved.move_store(&stores, &to);
            Box::pin(async move { result }) as driveline_graph::BoxFuture<'static, Result<()>>
        };
        change.while_drained_first(&[root.name()], work)?;
        change.commit().await?;
        tracing::info!("bitmaps of {} moved from {before} to {place}", kept.owner);
        if let Some(node) = before.node()
            && self.graph.node(node).is_ok()
            && let Err(error) = put_into_image(&self.graph, node, Vec::new(), false).await
        {
            // They stay there as bitmaps in use: useless, but harmless.
            tracing::warn!("bitmaps of {} stay in the image of node '{node}' too: {error}", kept.owner);
        }
        kept.inner.lock().announced.clear();
        Ok(())
    }

    /// Tells an image which bitmaps are in use beside it, keeps it from going away, and gives it a witness.
    async fn announce(&self, kept: &Arc<Kept>, node: &str) -> Result<()> {
        let path = kept.inner.lock().store.as_ref().map(|store| store.path());
        let Some(path) = path else { return Ok(()) };
        let bitmaps = self.bitmaps_of(&path);
        let lost = self.lost_of(kept);
        let mut names: Vec<String> =
            bitmaps.iter().chain(&lost).map(|bitmap| bitmap.name().to_string()).collect();
        names.sort();
        let witness = self.graph.node(node)?.open_node().witness().is_some_and(|witness| witness.set);
        if kept.inner.lock().announced == names && witness {
            return Ok(());
        }
        let view = self.graph.view_node(node)?;
        if view.read_only || !view.common.active {
            return Ok(());
        }
        let stored = bitmaps.iter().chain(&lost).map(|bitmap| ForImage::in_use(bitmap)).collect();
        put_into_image(&self.graph, node, stored, true).await?;
        let pin = if names.is_empty() {
            None
        } else {
            let user = format!("bitmaps of {}", kept.owner);
            let needs = Permissions::NONE;
            let pin = self.graph.open_root(node, RootOptions { needs, ..RootOptions::reader(user) }).await?;
            Some(pin)
        };
        let mut inner = kept.inner.lock();
        inner.pin = pin;
        inner.announced = names;
        inner.foreign = lost.iter().map(|bitmap| bitmap.name().to_string()).collect();
        let owned = kept.owned(self, &inner).encode();
        if let Some(store) = &inner.store {
            store.set_owner(&owned).map_err(store_error)?;
        }
        Ok(())
    }

    /// An image that was read-only and is writable now keeps its bitmaps up: they were shown so far, and record now.
    async fn adopt_writable(self: &Arc<Self>) {
        for view in self.graph.nodes() {
            let shown = view.bitmaps.iter().filter(|bitmap| {
                !view.read_only
                    && view.common.active
                    && bitmap.is_readonly()
                    && bitmap.ledger().is_none()
                    && !bitmap.is_inconsistent()
            });
            let shown: Vec<Arc<Bitmap>> = shown.cloned().collect();
            if shown.is_empty() {
                continue;
            }
            let node = view.node.name();
            if let Err(error) = self.adopt(node, shown).await {
                tracing::error!("bitmaps of node '{node}', which became writable: {error}");
            }
        }
    }

    async fn adopt(self: &Arc<Self>, node: &str, bitmaps: Vec<Arc<Bitmap>>) -> Result<()> {
        let keeper = self.clerk();
        let mut change = self.graph.change().await;
        let name = node.to_owned();
        change.visit(node, move |_, _| {
            Box::pin(async move {
                for bitmap in bitmaps {
                    let ledger = keeper.new_ledger(&name, &bitmap, Durability::Process)?;
                    bitmap.keep_in(ledger)?;
                    bitmap.set_readonly(false);
                }
                Ok(())
            })
        })?;
        change.commit().await
    }

    /// Whether the bitmaps of a drive could be moved to a place.
    ///
    /// Errors: those of [`Stores::rebind`].
    pub(crate) fn check_rebind(
        &self,
        target: &str,
        place: &crate::config::StorePlace,
    ) -> Result<(Arc<Kept>, Place)> {
        let kept = self.of(target)?;
        let place = Place::configured(&self.graph, place)?;
        let path = kept.inner.lock().store.as_ref().map(|store| store.path());
        for bitmap in path.iter().flat_map(|path| self.bitmaps_of(path)) {
            place.check(&bitmap)?;
        }
        if path.as_ref() != Some(&place.store_path()) && place.store_path().exists() {
            let there = place.store_path();
            return Err(Error::new(Kind::Exists, format_args!("{} is there already", there.display())));
        }
        Ok((kept, place))
    }

    /// Moves a drive's bitmaps to a place that somebody names. It does not follow the drive any more then.
    ///
    /// Errors: the place cannot keep them; they stay where they are then.
    pub(crate) async fn rebind(
        self: &Arc<Self>,
        target: &str,
        place: &crate::config::StorePlace,
    ) -> Result<()> {
        let (kept, place) = self.check_rebind(target, place)?;
        let _turn = self.turn.lock().await;
        self.move_to(&kept, &place).await?;
        {
            let mut inner = kept.inner.lock();
            inner.place = place;
            inner.fixed = true;
        }
        self.settle_one(&kept).await
    }

    /// Where the bitmaps of a drive are, for [`Stores::move_back`].
    pub(crate) fn place_now(&self, drive: &str) -> Result<(Place, bool)> {
        let kept = self.of(drive)?;
        let inner = kept.inner.lock();
        Ok((inner.place.clone(), inner.fixed))
    }

    /// Takes a [`Stores::rebind`] back.
    pub(crate) async fn move_back(
        self: &Arc<Self>,
        drive: &str,
        (place, fixed): (Place, bool),
    ) -> Result<()> {
        let kept = self.of(drive)?;
        let _turn = self.turn.lock().await;
        self.move_to(&kept, &place).await?;
        {
            let mut inner = kept.inner.lock();
            (inner.place, inner.fixed) = (place, fixed);
        }
        self.settle_one(&kept).await
    }

    /// Brings the bitmaps of a drive or image to stable storage, as they are now.
    pub(crate) async fn flush(&self, target: &str) -> Result<()> {
        // While a change is made its records wait, and cannot be flushed. Whoever has this one has no other beside him.
        let change = self.graph.change().await;
        let flushed = self.flush_now(target);
        change.give_up().await;
        flushed
    }

    fn flush_now(&self, target: &str) -> Result<()> {
        let kept = self.of(target)?;
        let inner = kept.inner.lock();
        inner.store.as_ref().map_or(Ok(()), |store| store.flush().map_err(store_error))
    }

    /// Where the bitmaps of a drive are kept, if somebody said it.
    pub(crate) fn configured_place(&self, drive: &str) -> Option<crate::config::StorePlace> {
        let kept = self.of(drive).ok()?;
        let inner = kept.inner.lock();
        inner.fixed.then(|| inner.place.said())
    }

    /// Where the bitmaps of a drive or image are kept, and in which file they are now, if any is persistent.
    pub(crate) fn where_kept(&self, target: &str) -> Result<(String, Option<std::path::PathBuf>)> {
        let kept = self.of(target)?;
        let inner = kept.inner.lock();
        Ok((inner.place.to_string(), inner.store.as_ref().map(|store| store.path())))
    }
}

/// Tells stores every second that the program lives, until it ends. In a thread of its own: the engine's may be held up by a
/// disk for longer than that, and the program lives all the same.
pub(super) fn beat(stores: Weak<Stores>) {
    let beats = move || {
        while let Some(stores) = stores.upgrade().filter(|stores| !stores.state.lock().closing) {
            for kept in stores.all() {
                if let Some(store) = &kept.inner.lock().store {
                    store.heartbeat(SystemTime::now());
                }
            }
            if let Some(journals) = stores.journals.get().and_then(Weak::upgrade) {
                journals.beat(SystemTime::now());
            }
            drop(stores);
            std::thread::sleep(HEARTBEAT);
        }
    };
    if let Err(error) = std::thread::Builder::new().name("heartbeat".into()).spawn(beats) {
        // Bitmaps beside raw images may be found all dirty after a crash then.
        tracing::error!("stores get no signs of life: {error}");
    }
}

impl Kept {
    /// The store becomes another file, while nothing is marked, and within a change of the graph.
    fn move_store(&self, stores: &Stores, place: &Place) -> Result<()> {
        let mut inner = self.inner.lock();
        let Some(store) = &inner.store else { return Ok(()) };
        // The batch of this change holds nothing of the store yet, and a store moves between batches.
        store.end_batch().map_err(store_error)?;
        let moved = move_file(store, place);
        store.begin_batch().map_err(store_error)?;
        moved?;
        inner.place = place.clone();
        let owned = self.owned(stores, &inner).encode();
        inner.store.as_ref().map_or(Ok(()), |store| store.set_owner(&owned).map_err(store_error))
    }
}

fn move_file(store: &Store, place: &Place) -> Result<()> {
    let before = store.path();
    let mut copy = store.copy_to(&place.store_path()).map_err(store_error)?;
    // If this fails the copy stays: after an error of the disk nobody knows whether the old file says that it counts.
    store.supersede(&mut copy).map_err(store_error)?;
    copy.activate(store).map_err(store_error)?;
    super::save::remove(&before)
}

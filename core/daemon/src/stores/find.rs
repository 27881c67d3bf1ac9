//! At the start: what stores and images hold becomes bitmaps of drives and nodes, whatever ended the program before.

use super::{
    Kept, Owner, Recovered, Stores, Trust,
    owner::Owned,
    place::Place,
    save::{ForImage, put_into_image},
    store_error, view_for,
};
use crate::config::{Config, DriveSection};
use driveline_bitmap::{Bitmap, BitmapName, Bits, Durability, Granularity, StoreBinding, View};
use driveline_graph::{Error, Graph, OpenChild, OpenNode, Result, StoredBitmap, StoredBitmaps};
use driveline_store::{Found, Opened, Spec};
use std::{sync::Arc, time::SystemTime};

/// What an image holds.
pub(super) struct InImage {
    pub(super) stored: StoredBitmaps,
    /// Contents of those that can be used, by name.
    pub(super) bits: Vec<(String, Bits)>,
}

impl Stores {
    /// Finds the bitmaps of all drives and images, and attaches them. Names of those of drives are returned, by drive.
    pub(crate) async fn find(&self, config: &Config) -> Result<Vec<(String, String)>> {
        let mut names = Vec::new();
        for drive in &config.drives {
            let found = self.find_drive(drive).await?;
            names.extend(found.into_iter().map(|name| (drive.name.get_ref().clone(), name)));
        }
        self.find_images().await?;
        Ok(names)
    }

    /// Finds the bitmaps of a drive that has just been made, attaches them, and returns their names.
    pub(crate) async fn find_drive(&self, drive: &DriveSection) -> Result<Vec<String>> {
        let place = match &drive.store {
            Some(place) => Place::configured(&self.graph, place.get_ref())?,
            None => match Place::default_for(&self.graph, drive.name.get_ref()) {
                Ok(place) => place,
                // Nobody asks for a place, so it does not matter that there is none.
                Err(_) if drive.bitmaps.iter().all(|bitmap| bitmap.durability.is_none()) => {
                    return Ok(Vec::new());
                }
                Err(error) => return Err(error),
            },
        };
        let owner = Owner::Drive(drive.name.get_ref().clone());
        let kept = self.add(owner, place, drive.store.is_some());
        self.find_for(&kept, Some(drive)).await
    }

    /// Finds the bitmaps of images that came later. Returns what became of them.
    pub(crate) async fn find_added(self: &Arc<Self>) -> Vec<Recovered> {
        let before = self.reports.lock().len();
        if let Err(error) = self.find_images().await {
            tracing::error!("bitmaps of an image: {error}");
        }
        self.settle().await;
        self.reports.lock()[before..].to_vec()
    }

    /// Finds the bitmaps of images that are no drive's place, and were not looked at yet.
    async fn find_images(&self) -> Result<()> {
        for view in self.graph.nodes() {
            let name = view.node.name();
            let taken = |kept: &Arc<Kept>| kept.inner.lock().place.node() == Some(name);
            if view.node.open_node().witness().is_none() || self.all().iter().any(taken) {
                continue;
            }
            // What another program has is looked at when it is ours.
            if !view.common.active || !self.state.lock().seen.insert(view.node.id()) {
                continue;
            }
            match Place::of_image(&self.graph, name) {
                Ok(place) => {
                    let stored = stored_in(&self.graph, name).await?;
                    if !stored.stored.bitmaps.is_empty() || place.store_path().exists() {
                        let kept = self.add(Owner::Node(name.to_owned()), place, true);
                        self.find_for(&kept, None).await?;
                    }
                }
                Err(_) => self.show_read_only(name).await?,
            }
        }
        Ok(())
    }

    /// Finds the bitmaps of one drive or image. Returns their names.
    pub(super) async fn find_for(&self, kept: &Kept, drive: Option<&DriveSection>) -> Result<Vec<String>> {
        // Before the bitmaps are attached, a store looks as if it had none: nobody may follow that.
        let _turn = self.turn.lock().await;
        let place = kept.inner.lock().place.clone();
        let node = self.image_to_ask(kept, &place);
        let opened = self.open_stores(kept, &place)?;
        let image = match &node {
            Some(node) => Some(stored_in(&self.graph, node).await?),
            None => None,
        };
        let size = self.graph.size_bytes(kept.owner.name())?;
        let bitmaps = self.take_found(kept, drive, opened, image.as_ref(), size)?;
        let names = bitmaps.iter().map(|bitmap| bitmap.name().to_string()).collect();
        let mut change = self.graph.change().await;
        for bitmap in bitmaps {
            change.attach_bitmap(kept.owner.name(), bitmap)?;
        }
        change.commit().await?;
        kept.inner.lock().attached = true;
        if let (Some(node), None, Some(image)) = (&node, place.node(), &image)
            && !image.stored.bitmaps.is_empty()
        {
            // They were there before the drive had another place for them, and are in that now; but for those that are lost.
            let lost = self.lost_of(kept).iter().map(|bitmap| ForImage::in_use(bitmap)).collect();
            put_into_image(&self.graph, node, lost, false).await?;
        }
        Ok(names)
    }

    /// Takes over what is in files and in an image, in which nobody keeps it any more.
    pub(super) fn take_found(
        &self,
        kept: &Kept,
        drive: Option<&DriveSection>,
        (opened, mut gone): (Vec<Opened>, Option<String>),
        image: Option<&InImage>,
        size: u64,
    ) -> Result<Vec<Arc<Bitmap>>> {
        let mut bitmaps: Vec<Arc<Bitmap>> = Vec::new();
        // Bitmaps that were lost before, if the stores know that.
        let mut lost_before = (!opened.is_empty()).then(Vec::new);
        for opened in opened {
            let lost = self.take_store(kept, opened, image, &mut bitmaps)?;
            lost_before = lost_before.zip(lost).map(|(before, lost)| [before, lost].concat());
        }
        if let Some(image) = image {
            gone = gone.or_else(|| image.stored.unreadable.clone());
            self.take_image(kept, image, drive, size, lost_before.as_deref(), &mut bitmaps)?;
        }
        if let (Some(reason), Some(drive)) = (gone, drive) {
            self.make_all_dirty(kept, drive, size, &reason, &mut bitmaps)?;
        }
        Ok(bitmaps)
    }

    /// The image that may hold bitmaps of a drive or image: its place, or that of before, if it got another one.
    fn image_to_ask(&self, kept: &Kept, place: &Place) -> Option<String> {
        let top = || {
            let chain = self.graph.chain(kept.owner.name()).ok()?;
            let name = chain.first()?.name().to_owned();
            Place::of_image(&self.graph, &name).is_ok().then_some(name)
        };
        let node = place.node().map(str::to_owned).or_else(top)?;
        let id = self.graph.node(&node).ok()?.id();
        self.state.lock().seen.insert(id);
        Some(node)
    }

    /// Takes over what a store holds. The first one goes on keeping it; what is in others comes to that.
    ///
    /// Returns the bitmaps of the image that were lost before; nothing, if somebody else may have had the image since.
    pub(super) fn take_store(
        &self,
        kept: &Kept,
        opened: Opened,
        image: Option<&InImage>,
        bitmaps: &mut Vec<Arc<Bitmap>>,
    ) -> Result<Option<Vec<String>>> {
        let Opened { store, bitmaps: found, owner, heartbeat, clean, same_boot, damage, .. } = opened;
        let owned = owner.as_deref().and_then(Owned::decode);
        let outside = self.changed_outside(kept.owner.name(), owned.as_ref(), clean, same_boot, heartbeat);
        if let Some(damage) = damage {
            tracing::warn!("{}: {damage}", store.path().display());
        }
        let path = store.path();
        let mut rest = Some(store);
        let first = {
            let mut inner = kept.inner.lock();
            let first = inner.store.is_none();
            // Another change may be in its batch just now.
            rest.take_if(|_| first).map_or(Ok(()), |store| inner.put(store))?;
            first
        };
        for found in found {
            let name = found.record.name.to_string();
            let in_image = image.and_then(|image| image.bits.iter().find(|(in_image, _)| *in_image == name));
            if in_image.is_some() {
                // It was put away into the image; the end of the program came between that and the end of this file.
                found.ledger.forget().map_err(Error::from)?;
                continue;
            }
            let durability = found.durability;
            if let Some(since) = found.since.as_ref().filter(|_| outside.is_none()) {
                self.since.lock().push((kept.owner.name().to_owned(), name.clone(), since.clone()));
            }
            let (bitmap, trust) = from_store(found, kept, outside.as_deref());
            self.report(kept, &name, trust, !clean);
            let namesake = bitmaps.iter().find(|bitmap| bitmap.name().as_str() == name);
            match namesake {
                _ if first => bitmaps.push(Arc::new(bitmap)),
                // It was on its way from this store to the other one, or there were two: both together lose nothing.
                Some(namesake) => {
                    bitmap.bits().iter_dirty().for_each(|dirty| namesake.mark_unconditionally(dirty))
                }
                None => {
                    bitmap.let_go();
                    bitmaps.push(self.keep(kept, bitmap, durability)?);
                }
            }
        }
        match rest {
            Some(store) => {
                drop(store);
                super::save::remove(&path)?;
            }
            // Not before what is not to be trusted is dirty: who is killed in between must find the images changed again.
            None => kept.inner.lock().store.iter().for_each(|store| store.heartbeat(SystemTime::now())),
        }
        Ok(owned.filter(|_| outside.is_none()).map(|owned| owned.lost))
    }

    /// Bitmaps that there should be, and of which nothing is left: everything may have changed.
    fn make_all_dirty(
        &self,
        kept: &Kept,
        drive: &DriveSection,
        size: u64,
        reason: &str,
        bitmaps: &mut Vec<Arc<Bitmap>>,
    ) -> Result<()> {
        for section in &drive.bitmaps {
            let name = section.name.get_ref();
            let Some(durability) = section.durability else { continue };
            if bitmaps.iter().any(|bitmap| bitmap.name().as_str() == name) {
                continue;
            }
            let granularity = section.granularity.map(Granularity::new).transpose().map_err(Error::from)?;
            let bitmap = Bitmap::new(
                BitmapName::new(name).map_err(Error::from)?,
                granularity.unwrap_or_default(),
                size,
            );
            let bitmap = bitmap.with_view(section.view).with_recording(section.recording);
            bitmap.mark_unconditionally(0..size);
            bitmaps.push(self.keep(kept, bitmap, durability)?);
            self.report(kept, name, Trust::AllDirty { reason: reason.to_owned() }, true);
        }
        Ok(())
    }

    /// Keeps a bitmap that was not in the store.
    fn keep(&self, kept: &Kept, bitmap: Bitmap, durability: Durability) -> Result<Arc<Bitmap>> {
        kept.store(self, bitmap.length())?;
        let (record, granularity, view) = (bitmap.record(), bitmap.granularity(), bitmap.view());
        let spec = Spec { record, granularity, view, durability };
        let ledger = kept.inner.lock().store.as_ref().expect("it was just made").add(&spec);
        bitmap.keep_in(ledger.map_err(store_error)?)?;
        Ok(Arc::new(bitmap))
    }

    /// Takes over what a writable image holds, besides what was found in the file beside it.
    fn take_image(
        &self,
        kept: &Kept,
        image: &InImage,
        drive: Option<&DriveSection>,
        size: u64,
        lost_before: Option<&[String]>,
        bitmaps: &mut Vec<Arc<Bitmap>>,
    ) -> Result<()> {
        if let Some(why) = &image.stored.unreadable {
            tracing::error!("{}: the bitmaps of its image cannot be told: {why}", kept.owner);
        }
        let mut foreign = Vec::new();
        for stored in &image.stored.bitmaps {
            if bitmaps.iter().any(|bitmap| bitmap.name().as_str() == stored.name) {
                continue;
            }
            let section = drive
                .and_then(|drive| drive.bitmaps.iter().find(|bitmap| *bitmap.name.get_ref() == stored.name));
            let bits = image.bits.iter().find(|(name, _)| *name == stored.name).map(|(_, bits)| bits);
            let lent = kept.inner.lock().lent.iter().find(|(name, ..)| *name == stored.name).cloned();
            let lent = lent.map(|(_, view, durability)| (view, durability));
            let wanted = section.and_then(|section| section.durability);
            let wanted = wanted.or(lent.map(|(_, durability)| durability));
            if bits.is_none() && lost_before.is_some_and(|before| !before.contains(&stored.name)) {
                // It was removed, and the image was not told any more.
                continue;
            }
            let (Ok(name), Some(granularity)) = (BitmapName::new(&stored.name), stored.granularity) else {
                foreign.push(stored.name.clone());
                self.report(kept, &stored.name, lost(stored), true);
                continue;
            };
            // An image does not say the view.
            let view = section.map(|section| section.view).or(lent.map(|(view, _)| view));
            let view = view.unwrap_or(View::Drive);
            let bitmap = Bitmap::new(name, granularity, size).with_view(view_for(&kept.owner, view));
            let bitmap = match bits {
                Some(bits) => {
                    let bitmap = bitmap.with_recording(stored.recording);
                    bits.iter_dirty().for_each(|range| bitmap.mark_unconditionally(range));
                    self.report(kept, &stored.name, Trust::Exact, false);
                    bitmap
                }
                None if wanted.is_some() => {
                    bitmap.mark_unconditionally(0..size);
                    let reason = why_lost(stored);
                    self.report(kept, &stored.name, Trust::AllDirty { reason }, true);
                    bitmap.with_recording(stored.recording)
                }
                None => {
                    let node = kept.inner.lock().place.node().unwrap_or_default().to_owned();
                    self.report(kept, &stored.name, lost(stored), true);
                    foreign.push(stored.name.clone());
                    bitmaps
                        .push(Arc::new(bitmap.with_store(StoreBinding::Qcow2 { node }).with_lost_contents()));
                    continue;
                }
            };
            bitmaps.push(self.keep(kept, bitmap, wanted.unwrap_or_default())?);
        }
        let mut inner = kept.inner.lock();
        inner.foreign = foreign;
        let owned = kept.owned(self, &inner).encode();
        inner.store.as_ref().map_or(Ok(()), |store| store.set_owner(&owned).map_err(store_error))
    }

    /// Shows the bitmaps of an image that may not be written, on its own node.
    async fn show_read_only(&self, node: &str) -> Result<()> {
        let image = stored_in(&self.graph, node).await?;
        let size = self.graph.size_bytes(node)?;
        let mut change = self.graph.change().await;
        for stored in &image.stored.bitmaps {
            let (Ok(name), Some(granularity)) = (BitmapName::new(&stored.name), stored.granularity) else {
                continue;
            };
            let bitmap = Bitmap::new(name, granularity, size)
                .with_view(View::Node)
                .with_recording(stored.recording)
                .with_store(StoreBinding::Qcow2 { node: node.to_owned() });
            let bitmap = match image.bits.iter().find(|(name, _)| *name == stored.name) {
                Some((_, bits)) => {
                    bits.iter_dirty().for_each(|range| bitmap.mark_unconditionally(range));
                    bitmap
                }
                None => bitmap.with_lost_contents(),
            };
            bitmap.set_readonly(true);
            change.attach_bitmap(node, Arc::new(bitmap))?;
        }
        change.commit().await
    }

    pub(super) fn report(&self, kept: &Kept, name: &str, trust: Trust, crashed: bool) {
        let report = Recovered { owner: kept.owner.name().to_owned(), name: name.to_owned(), trust, crashed };
        match &report.trust {
            Trust::Exact => tracing::info!("{report}"),
            // Whoever starts the program tells of it.
            _ if crashed && !self.state.lock().told => tracing::info!("{report}"),
            _ => tracing::warn!("{report}"),
        }
        self.reports.lock().push(report);
    }
}

/// A bitmap of a store, as the graph takes it.
fn from_store(found: Found, kept: &Kept, outside: Option<&str>) -> (Bitmap, Trust) {
    let Found { ledger, granularity, view, record, bits, verdict, .. } = found;
    let bitmap =
        Bitmap::new(record.name.clone(), granularity, record.length).with_view(view_for(&kept.owner, view));
    let bitmap = bitmap.found(ledger, &record, &bits);
    let trust = match outside {
        Some(reason) => {
            bitmap.mark_unconditionally(0..record.length);
            Trust::AllDirty { reason: reason.to_owned() }
        }
        None => verdict.into(),
    };
    (bitmap, trust)
}

fn why_lost(stored: &StoredBitmap) -> String {
    stored.inconsistent.clone().unwrap_or_else(|| "it was in use when its program ended".to_owned())
}

pub(super) fn lost(stored: &StoredBitmap) -> Trust {
    Trust::Lost { reason: why_lost(stored) }
}

/// Asks an image what it holds, and loads what of it can be used.
pub(super) async fn stored_in(graph: &Graph, node: &str) -> Result<InImage> {
    // What is stored in an image is changed by changes of the graph alone.
    let change = graph.change().await;
    let (open, children) = change.look_at(node)?;
    let image = load(&*open, &children).await.map_err(|error| error.at(node));
    change.give_up().await;
    image
}

/// The same with the image's node and children at hand.
pub(super) async fn load(open: &dyn OpenNode, children: &[OpenChild]) -> Result<InImage> {
    let stored = open.stored_bitmaps(children).await?;
    let mut bits = Vec::new();
    for bitmap in &stored.bitmaps {
        if bitmap.inconsistent.is_some() || stored.outdated {
            continue;
        }
        match open.load_bitmap(children, &bitmap.name).await {
            Ok(loaded) => bits.push((bitmap.name.clone(), loaded)),
            // One that is damaged is lost, and keeps the others from nothing.
            Err(error) => tracing::error!("bitmap '{}': {error}", bitmap.name),
        }
    }
    Ok(InImage { stored, bits })
}

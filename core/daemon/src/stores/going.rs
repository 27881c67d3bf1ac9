//! Nodes that go, or that another program may have: their images get their bitmaps back in the very change that takes them away.
//!
//! Whoever came between the one and the other wrote what no bitmap recorded.

use super::{
    Kept, Owner, Place, Stores,
    find::load,
    save::{ForImage, put, remove, stage_into_image},
};
use driveline_bitmap::StoreBinding;
use driveline_graph::{BoxFuture, Change, NodeId, NodeView, OpenChild, OpenNode, Result};
use driveline_qmp::NodesGoing;
use driveline_store::Store;
use parking_lot::Mutex;
use std::{collections::BTreeSet, sync::Arc};

/// Nodes on their way. As long as this lives nobody else moves bitmaps, or tells images of them.
pub(crate) struct Going {
    stores: Arc<Stores>,
    /// What keeps bitmaps of them.
    kept: Vec<Arc<Kept>>,
    /// Images that are read-only, and have theirs already: nobody writes there.
    saved: BTreeSet<NodeId>,
    /// Nodes that somebody uses, or did so when this began: a drive's bitmaps may leave them in the same change.
    used: BTreeSet<NodeId>,
    /// What the change puts away.
    released: Vec<(NodeId, Option<Arc<Kept>>)>,
    /// What the change finds again, and whether there was a file for it before.
    taken_back: Vec<(NodeId, Arc<Kept>, bool)>,
    _turn: async_lock::MutexGuardArc<()>,
}

impl Stores {
    /// Begins to put away the bitmaps of nodes, before the change is begun that they go with.
    pub(crate) async fn going(self: &Arc<Self>, nodes: &[String]) -> Result<Going> {
        // Else what follows might tell an image in between that its bitmaps are in use, beside it.
        let turn = self.turn.lock_arc().await;
        let mut going = Going {
            stores: self.clone(),
            kept: Vec::new(),
            saved: BTreeSet::new(),
            used: BTreeSet::new(),
            released: Vec::new(),
            taken_back: Vec::new(),
            _turn: turn,
        };
        for node in nodes {
            let Ok(view) = self.graph.view_node(node) else { continue };
            if is_used(&view) {
                going.used.insert(view.node.id());
                continue;
            }
            let Some(kept) = self.of_image(node) else { continue };
            if view.read_only {
                self.save_image(&kept, node, &view.bitmaps).await?;
                going.saved.insert(view.node.id());
            }
            // What keeps the image for its bitmaps would be in the way of its removal.
            let mut inner = kept.inner.lock();
            inner.announced.clear();
            drop(inner.pin.take());
            drop(inner);
            going.kept.push(kept);
        }
        Ok(going)
    }

    /// Whose place an image is.
    fn at(&self, node: &str) -> Option<Arc<Kept>> {
        self.all().into_iter().find(|kept| kept.inner.lock().place.node() == Some(node))
    }

    /// Nothing is kept for an image's bitmaps as long as the image has them itself. What is left is the file, if there is one.
    fn rest(&self, kept: &Arc<Kept>) -> Option<Store> {
        if let Owner::Node(_) = kept.owner {
            return self.part_with(kept);
        }
        // A drive keeps its place.
        let mut inner = kept.inner.lock();
        inner.pin = None;
        inner.announced.clear();
        inner.attached = false;
        inner.store.take()
    }

    fn let_go(&self, kept: &Arc<Kept>) -> Result<()> {
        let path = self.rest(kept).map(|store| store.path());
        path.map_or(Ok(()), |path| remove(&path))
    }

    /// What keeps the bitmaps of an image that is no drive's place, if any is persistent, or was.
    fn of_image(&self, node: &str) -> Option<Arc<Kept>> {
        let owner = Owner::Node(node.to_owned());
        self.all().into_iter().find(|kept| kept.owner == owner && kept.inner.lock().store.is_some())
    }
}

/// Does somebody use a node, besides those who keep its bitmaps?
fn is_used(view: &NodeView) -> bool {
    view.parents.iter().any(|parent| !parent.starts_with("bitmaps of "))
}

impl Going {
    /// Adds a node's bitmaps to the change. `false`: it has none, or somebody uses it by now.
    pub(crate) fn put_away(&mut self, change: &mut Change, node: &str) -> Result<bool> {
        let Ok(view) = change.layout().view_node(node) else { return Ok(false) };
        let kept = self.stores.of_image(node);
        // One that became read-only just now has not got them.
        let misses = kept.is_some() && view.read_only && !self.saved.contains(&view.node.id());
        let used = is_used(&view) || self.used.contains(&view.node.id());
        // All of them may have been removed, and the file for them is there all the same.
        let has_some = kept.is_some() || view.bitmaps.iter().any(|bitmap| bitmap.is_persistent());
        if used || !has_some || misses {
            return Ok(false);
        }
        for bitmap in view.bitmaps.iter().filter(|bitmap| bitmap.is_persistent()) {
            change.detach_bitmap(node, bitmap.name().as_str())?;
        }
        // After that, which may be refused: nothing else has to be told of it then.
        if let Some(kept) = kept.as_ref().filter(|_| !view.read_only) {
            let bitmaps = self.stores.for_image(kept, &view.bitmaps);
            stage_into_image(change, node, bitmaps, false)?;
        }
        self.released.push((view.node.id(), kept));
        Ok(true)
    }

    /// Adds to the change: another program may have the image of a node, whoever uses the node, and with it the bitmaps that it keeps.
    fn lend(&mut self, change: &mut Change, node: &str) -> Result<()> {
        let layout = change.layout();
        let view = layout.view_node(node)?;
        let kept = self.stores.at(node).filter(|kept| kept.inner.lock().store.is_some());
        if kept.is_some() && view.read_only {
            // Nobody can write them there. They stay as they are.
            return Ok(());
        }
        let lost = kept.as_ref().map(|kept| self.stores.lost_of(kept)).unwrap_or_default();
        let here = kept.as_ref().map(|kept| kept.inner.lock().place.store_path());
        let here = here.map(|path| StoreBinding::Sidecar { path });
        let mut bitmaps = Vec::new();
        for (at, bitmap) in layout.nodes().iter().flat_map(|view| view.bitmaps.iter().map(move |b| (view, b)))
        {
            let live = here.is_some() && bitmap.store() == here;
            // What the image holds, and what was only shown so far.
            let shown = at.node.id() == view.node.id() && bitmap.is_persistent() && bitmap.ledger().is_none();
            if live || shown || lost.iter().any(|lost| lost.id() == bitmap.id()) {
                change.detach_bitmap(at.node.name(), bitmap.name().as_str())?;
                bitmaps.push(bitmap.clone());
            }
        }
        if let Some(kept) = &kept {
            let said = bitmaps
                .iter()
                .filter_map(|bitmap| Some((bitmap.name().to_string(), bitmap.view(), bitmap.durability()?)));
            kept.inner.lock().lent = said.collect();
            // After that, which may be refused: nothing else has to be told of it then.
            stage_into_image(change, node, self.stores.for_image(kept, &bitmaps), false)?;
        }
        self.released.push((view.node.id(), kept));
        Ok(())
    }

    /// Adds to the change, in which the image became this program's again: its bitmaps are found as they are now. Nobody writes
    /// to it before they record.
    fn take_back(&mut self, change: &mut Change, node: &str) -> Result<()> {
        let stores = self.stores.clone();
        let id = change.layout().view_node(node)?.node.id();
        let kept = match stores.at(node) {
            // It never left.
            Some(kept) if kept.inner.lock().store.is_some() => return Ok(()),
            Some(kept) => kept,
            None => match Place::of_image(&stores.graph, node) {
                Ok(place) => stores.add(Owner::Node(node.to_owned()), place, true),
                // It has none, or they are shown only, for which there is time.
                Err(_) => return Ok(()),
            },
        };
        stores.state.lock().seen.insert(id);
        let place = kept.inner.lock().place.clone();
        let target = kept.owner.name().to_owned();
        self.taken_back.push((id, kept.clone(), place.store_path().exists()));
        let before = Arc::new(Mutex::new(None));
        let was = before.clone();
        change.attach_found(&target, node, move |open, children, size| {
            Box::pin(async move {
                let image = load(&*open, &children).await?;
                if image.stored.bitmaps.is_empty() && !place.store_path().exists() {
                    return Ok(Vec::new());
                }
                let opened = stores.open_stores(&kept, &place)?;
                let bitmaps = stores.take_found(&kept, None, opened, Some(&image), size)?;
                let as_it_was = bitmaps.iter().filter_map(|bitmap| {
                    let stored =
                        image.stored.bitmaps.iter().find(|stored| stored.name == bitmap.name().as_str())?;
                    let bits = image.bits.iter().find(|(name, _)| *name == stored.name);
                    Some(match bits {
                        Some((_, bits)) => ForImage::with_bits(bitmap, bits.clone()),
                        None => ForImage::in_use(bitmap),
                    })
                });
                *was.lock() = Some(as_it_was.collect::<Vec<_>>());
                let in_use = bitmaps.iter().map(|bitmap| ForImage::in_use(bitmap)).collect();
                put(&*open, &children, in_use, true).await?;
                kept.inner.lock().attached = true;
                Ok(bitmaps)
            })
        })?;
        let give_back =
            move |open: Arc<dyn OpenNode>, children: Vec<OpenChild>| -> BoxFuture<'static, Result<()>> {
                Box::pin(async move {
                    let before = before.lock().take();
                    match before {
                        Some(bitmaps) => put(&*open, &children, bitmaps, false).await,
                        None => Ok(()),
                    }
                })
            };
        change.visit_or_back(node, |_, _| Box::pin(async { Ok(()) }), give_back)
    }

    /// The change was made, or not. Images of nodes that stay are told that their bitmaps are in use, if they do not know.
    pub(crate) async fn end(self, made: bool) -> Result<()> {
        let mut result = Ok(());
        let mut staying = self.kept;
        for (id, kept) in self.released.into_iter().filter(|_| made) {
            if let Some(kept) = kept {
                staying.retain(|other| !Arc::ptr_eq(other, &kept));
                result = result.and(self.stores.let_go(&kept));
            }
            self.stores.state.lock().seen.remove(&id);
        }
        for (id, kept, had_file) in self.taken_back {
            let is_empty = {
                let inner = kept.inner.lock();
                inner.store.is_none() && inner.foreign.is_empty()
            };
            match made {
                true if !is_empty => staying.push(kept),
                // What came from the image is there still; what was in a file is left as it was found.
                _ if had_file => drop(self.stores.rest(&kept)),
                _ => result = result.and(self.stores.let_go(&kept)),
            }
            if !made {
                self.stores.state.lock().seen.remove(&id);
            }
        }
        for kept in staying {
            if let Err(error) = self.stores.settle_one(&kept).await {
                tracing::error!("bitmaps of {}, which stay: {error}", kept.owner);
            }
        }
        result
    }
}

impl NodesGoing for Going {
    fn stage(&mut self, change: &mut Change, node: &str) -> driveline_qmp::Result<bool> {
        Ok(self.put_away(change, node)?)
    }

    fn stage_inactive(&mut self, change: &mut Change, node: &str) -> driveline_qmp::Result<()> {
        Ok(self.lend(change, node)?)
    }

    fn stage_active(&mut self, change: &mut Change, node: &str) -> driveline_qmp::Result<()> {
        Ok(self.take_back(change, node)?)
    }

    fn ended(self: Box<Self>, made: bool) -> BoxFuture<'static, driveline_qmp::Result<()>> {
        Box::pin(async move { Ok(self.end(made).await?) })
    }
}

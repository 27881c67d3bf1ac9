//! Snapshots: another image on top, or the data kept inside the image.

use super::{Change, Staged, Undo, undo};
use crate::{
    bitmaps::relocate,
    driver::{Permissions, Role},
    error::{Error, Kind, Result},
    node::NodeId,
    topology::{Attachment, Parent},
};
use driveline_bitmap::{Bitmap, View};
use std::sync::Arc;

impl Change {
    /// Keeps the data of a node as it is: everybody writes to `overlay` from now on, and reads through it.
    ///
    /// ```text
    ///   parents ─▶ node          parents ─▶ overlay ─▶ node (read-only)
    ///                └ daily                   └ daily
    /// ```
    ///
    /// With the name of a drive it is the drive's top image that is kept: filters on the drive stay on the drive. Parents,
    /// drives and roots that follow go along, and so do bitmaps that record what the drive's user changes; those in node
    /// view stay, as QEMU has it. A bitmap takes the size of the overlay.
    ///
    /// The node becomes read-only after its users have gone on: they need not wait until it is on stable storage, but for a
    /// flush.
    ///
    /// Errors: the overlay is in use, has a backing image or can have none; a job works on the node.
    pub fn snapshot(&mut self, node: &str, overlay: &str) -> Result<()> {
        let named = self.topology.node_or_drive(node)?;
        let is_node = self.topology.names.contains_key(node);
        let old = if is_node { named } else { self.topology.skip_filters(named) };
        let new = self.topology.id(overlay)?;
        if old == new || !self.topology.parents(new).is_empty() {
            return Err(Error::new(Kind::Busy, "The overlay is already in use"));
        }
        if self.topology.backing(new).is_some() {
            return Err(Error::new(Kind::Invalid, "The overlay already has a backing image"));
        }
        let children = &self.topology.at(new).node.driver.description().children;
        let Some(spec) = children.iter().find(|spec| spec.role == Role::Backing).cloned() else {
            return Err(Error::new(Kind::NotSupported, "The overlay does not support backing images"));
        };
        self.topology.check_acyclic(new, old)?;
        let below: Vec<NodeId> = std::iter::successors(Some(old), |id| self.topology.filtered(*id)).collect();
        below.iter().try_for_each(|id| self.refuse_job(*id, true))?;
        let shows = |id: &NodeId| {
            std::iter::successors(Some(*id), |id| self.topology.filtered(*id)).any(|id| id == old)
        };
        let above: Vec<NodeId> = self.topology.nodes.keys().copied().filter(shows).collect();
        above.iter().try_for_each(|id| self.refuse_job(*id, false))?;
        let (old_name, new_name) = (self.topology.name(old), self.topology.name(new));
        self.move_parents(old, new);
        self.set_child(&new_name, &spec.name, Some(&old_name))?;
        if let Some(placed) = self.topology.nodes.get_mut(&new) {
            placed.was_target = false;
        }
        let touched: Vec<NodeId> = below.iter().copied().chain([new]).collect();
        self.action(touched, move |staged| Box::pin(async move { carry_bitmaps(staged, &below, new) }));
        if !self.topology.at(old).read_only {
            self.keeping.push(old);
        }
        Ok(())
    }

    /// A job counts on the node's place. One that is of a filter above counts on what that shows, unless it looks at the past.
    fn refuse_job(&self, id: NodeId, of_past: bool) -> Result<()> {
        for parent in self.topology.parents(id) {
            let Parent::Root(root) = parent else { continue };
            let attached = &self.topology.roots[&root];
            let counts = attached.needs != Permissions::NONE && (of_past || !attached.past && attached.locks);
            if attached.to == Attachment::Node(id) && counts {
                let (name, user) = (self.topology.name(id), attached.root.user());
                let text = format_args!("Node '{name}' is busy: block device is in use by {user}");
                return Err(Error::new(Kind::Busy, text));
            }
        }
        Ok(())
    }

    /// Keeps the data of a node as a snapshot inside its image; if the change is not made it is deleted again.
    ///
    /// Errors: as [`OpenNode::take_snapshot`](crate::OpenNode::take_snapshot), when the change is made.
    pub fn take_internal_snapshot(&mut self, node: &str, name: &str) -> Result<()> {
        let id = self.topology.node_or_drive(node)?;
        let id = self.topology.skip_filters(id);
        if self.topology.at(id).read_only {
            return Err(Error::new(Kind::NotPermitted, "it is read-only").at(&self.topology.name(id)));
        }
        let snapshot = name.to_owned();
        self.action([id], move |staged| {
            Box::pin(async move {
                let (open, at) = (staged.topology.at(id).node.open.clone(), staged.topology.name(id));
                let children = staged.wired.get(&id).map(|wired| wired.children.clone()).unwrap_or_default();
                let taken = open.take_snapshot(&children, &snapshot).await;
                let taken = taken.map_err(|error| error.at(&at))?;
                let back: Undo = Box::new(move || {
                    Box::pin(async move {
                        if let Err(error) = open.delete_snapshot(&children, &taken).await {
                            tracing::error!(node = &*at, "undo of an internal snapshot: {error}");
                        }
                    })
                });
                Ok(back)
            })
        });
        Ok(())
    }
}

/// Bitmaps in the drive's view go from the nodes that showed the drive to the one that shows it now.
fn carry_bitmaps(staged: &mut Staged, from: &[NodeId], to: NodeId) -> Result<Undo> {
    let size = staged.wire(to)?.info.size_bytes;
    let mut undos: Vec<Box<dyn FnOnce() + Send>> = Vec::new();
    let back = |undos: Vec<Box<dyn FnOnce() + Send>>| undos.into_iter().rev().for_each(|undo| undo());
    for at in from {
        let node = staged.any_node(*at)?;
        let here: Vec<Arc<Bitmap>> = node.bitmaps.lock().iter().cloned().collect();
        for bitmap in here.into_iter().filter(|bitmap| bitmap.view() == View::Drive) {
            let carried = match take_size(&bitmap, size) {
                Ok(resized) => {
                    undos.push(resized);
                    relocate(staged, *at, bitmap, to, false)
                }
                Err(error) => Err(error),
            };
            match carried {
                Ok(undo) => undos.push(undo),
                Err(error) => {
                    back(undos);
                    return Err(error);
                }
            }
        }
    }
    Ok(undo(move || back(undos)))
}

/// Makes a bitmap as long as its new node. What a drive has grown by is dirty.
fn take_size(bitmap: &Arc<Bitmap>, size: u64) -> Result<Box<dyn FnOnce() + Send>> {
    let before = bitmap.length();
    if before == size {
        return Ok(Box::new(|| {}));
    }
    bitmap.reserve(size)?;
    let (bitmap, bits) = (bitmap.clone(), bitmap.recording_bits().clone());
    bitmap.resize(size);
    Ok(Box::new(move || {
        bitmap.resize(before);
        drop(bitmap.restore(&bits));
    }))
}

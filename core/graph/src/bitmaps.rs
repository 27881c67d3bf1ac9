//! Bitmaps in a change: every operation on them is an action with its undo, so that they can stand in one
//! transaction with each other and with changes of the graph.

use crate::{
    change::{Change, Staged, Undo, undo},
    driver::{BoxFuture, OpenChild, OpenNode},
    error::{Error, Kind, Result},
    node::{Node, NodeId},
};
use driveline_bitmap::{Bitmap, BitmapName, Durability, Granularity, Use, View};
use driveline_op::{Ask, Buffer, Call, op};
use parking_lot::Mutex;
use std::sync::Arc;

/// A bitmap to be added.
#[derive(Clone, Debug)]
pub struct NewBitmap {
    /// Its name.
    pub name: String,
    /// Its granularity; without it, the cluster size of the node within 4 to 64 KiB, else 64 KiB.
    pub granularity: Option<u64>,
    /// Whose changes it records.
    pub view: View,
    /// Does it record?
    pub recording: bool,
    /// What it survives; without it, it is in memory only and ends with the process.
    pub durability: Option<Durability>,
}

impl NewBitmap {
    /// A drive's bitmap that records, with the default granularity.
    pub fn named(name: impl Into<String>) -> Self {
        Self { name: name.into(), granularity: None, view: View::Drive, recording: true, durability: None }
    }
}

impl Change {
    /// Adds a bitmap to a node or to a drive's root.
    pub fn add_bitmap(&mut self, target: &str, new: NewBitmap) -> Result<()> {
        let id = self.topology.node_or_drive(target)?;
        let name = BitmapName::new(&new.name)?;
        let granularity = new.granularity.map(Granularity::new).transpose()?;
        let (graph, target) = (self.graph.clone(), target.to_owned());
        self.action([id], move |staged| {
            Box::pin(async move {
                let node = staged.any_node(id)?;
                let info = staged.wire(id)?.info;
                let cluster = (info.cluster_bytes > 0).then_some(u64::from(info.cluster_bytes));
                let granularity = granularity.unwrap_or_else(|| Granularity::default_for(cluster));
                let bitmap = Bitmap::new(name, granularity, info.size_bytes)
                    .with_view(new.view)
                    .with_recording(new.recording);
                let bitmap = Arc::new(bitmap);
                refuse_parked_name(staged, id, bitmap.name().as_str())?;
                node.bitmaps.lock().check_name(bitmap.name().as_str())?;
                if let Some(durability) = new.durability {
                    let Some(keeper) = graph.keeper() else {
                        let message = format_args!("bitmap '{}': nothing keeps persistent bitmaps", new.name);
                        return Err(Error::new(Kind::NotSupported, message).at(&node.name));
                    };
                    let ledger = keeper.new_ledger(&target, &bitmap, durability);
                    let kept = ledger.and_then(|ledger| Ok(bitmap.keep_in(ledger)?));
                    kept.map_err(|error| error.at(&node.name))?;
                }
                node.bitmaps.lock().add(bitmap.clone()).map_err(|error| Error::from(error).at(&node.name))?;
                Ok(undo(move || {
                    drop(node.bitmaps.lock().take(bitmap.id()));
                    drop(bitmap.forget());
                }))
            })
        });
        Ok(())
    }

    /// Attaches a bitmap that was found in a store to a node or to a drive's root. It takes the node's size: what lies
    /// beyond its own is dirty in the drive's view.
    pub fn attach_bitmap(&mut self, target: &str, bitmap: Arc<Bitmap>) -> Result<()> {
        let id = self.topology.node_or_drive(target)?;
        self.action([id], move |staged| Box::pin(async move { attach(staged, id, bitmap) }));
        Ok(())
    }

    /// Attaches to a node or to a drive's root what `find` finds in an image, while nothing is in flight: it gets the image's
    /// node, its children, and how long what gets the bitmaps is by then, in bytes.
    pub fn attach_found<F>(&mut self, target: &str, image: &str, find: F) -> Result<()>
    where
        F: FnOnce(Arc<dyn OpenNode>, Vec<OpenChild>, u64) -> BoxFuture<'static, Result<Vec<Arc<Bitmap>>>>
            + Send
            + 'static,
    {
        let (id, image) = (self.topology.node_or_drive(target)?, self.topology.id(image)?);
        self.action([id, image], move |staged| {
            Box::pin(async move {
                let size = staged.wire(id)?.info.size_bytes;
                let (node, children) = (staged.node(image)?, staged.wire(image)?.children);
                let found = find(node.open.clone(), children, size).await;
                let found = found.map_err(|error| error.at(node.name()))?;
                let mut undos = Vec::new();
                for bitmap in found {
                    match attach(staged, id, bitmap) {
                        Ok(undo) => undos.push(undo),
                        Err(error) => {
                            for undo in undos {
                                undo().await;
                            }
                            return Err(error);
                        }
                    }
                }
                let undo: Undo = Box::new(move || {
                    Box::pin(async move {
                        for undo in undos {
                            undo().await;
                        }
                    })
                });
                Ok(undo)
            })
        });
        Ok(())
    }

    /// Removes a bitmap. One in use is refused.
    pub fn remove_bitmap(&mut self, target: &str, name: &str) -> Result<()> {
        self.bitmap_action(target, name, |staged, id, bitmap| {
            let node = staged.any_node(id)?;
            let before = node.bitmaps.lock().clone();
            node.bitmaps.lock().remove(bitmap.name().as_str())?;
            if let Err(error) = bitmap.forget() {
                *node.bitmaps.lock() = before;
                return Err(error.into());
            }
            Ok(Box::new(move || {
                *node.bitmaps.lock() = before;
                drop(bitmap.remember());
            }))
        })
    }

    /// Removes a bitmap that `who` keeps busy to have it alone, by `used`: that ends with it, and is there again if the change is
    /// not made.
    pub fn remove_own_bitmap(
        &mut self,
        target: &str,
        used: &Arc<Mutex<Option<Use>>>,
        who: &str,
    ) -> Result<()> {
        let Some(name) = used.lock().as_ref().map(|used| used.bitmap().name()) else { return Ok(()) };
        let (used, who) = (used.clone(), who.to_owned());
        self.bitmap_action(target, name.as_str(), move |staged, id, bitmap| {
            let node = staged.any_node(id)?;
            let before = node.bitmaps.lock().clone();
            *used.lock() = None;
            let again = move |bitmap: &Arc<Bitmap>| *used.lock() = bitmap.begin_use(&who).ok();
            let removed = node.bitmaps.lock().remove(bitmap.name().as_str()).and_then(|_| bitmap.forget());
            if let Err(error) = removed {
                *node.bitmaps.lock() = before;
                again(&bitmap);
                return Err(error.into());
            }
            Ok(Box::new(move || {
                *node.bitmaps.lock() = before;
                drop(bitmap.remember());
                again(&bitmap);
            }))
        })
    }

    /// Takes a bitmap off its node, which its store keeps all the same: whoever put it away elsewhere does this. One in use is
    /// refused.
    pub fn detach_bitmap(&mut self, target: &str, name: &str) -> Result<()> {
        self.bitmap_action(target, name, |staged, id, bitmap| {
            let node = staged.any_node(id)?;
            let before = node.bitmaps.lock().clone();
            let was_readonly = bitmap.is_readonly();
            bitmap.set_readonly(false);
            if let Err(error) = node.bitmaps.lock().remove(bitmap.name().as_str()) {
                bitmap.set_readonly(was_readonly);
                return Err(error.into());
            }
            Ok(Box::new(move || {
                bitmap.set_readonly(was_readonly);
                *node.bitmaps.lock() = before;
            }))
        })
    }

    /// Clears a bitmap: it forgets all that was written before this change, and nothing of what comes after.
    pub fn clear_bitmap(&mut self, target: &str, name: &str) -> Result<()> {
        self.bitmap_action(target, name, |_, _, bitmap| {
            let saved = bitmap.bits().clone();
            bitmap.clear()?;
            Ok(Box::new(move || drop(bitmap.restore(&saved))))
        })
    }

    /// Makes a bitmap usable whose contents are lost: all of it is dirty, and it is kept where it was.
    pub fn adopt_bitmap(&mut self, target: &str, name: &str) -> Result<()> {
        let (graph, home) = (self.graph.clone(), target.to_owned());
        self.bitmap_action(target, name, move |staged, id, bitmap| {
            let at = staged.any_node(id)?.name.clone();
            if !bitmap.is_inconsistent() {
                let message = format_args!("bitmap '{}' is not inconsistent", bitmap.name());
                return Err(Error::new(Kind::Invalid, message).at(&at));
            }
            let store = bitmap.store();
            let keeper = graph.keeper().filter(|_| bitmap.is_persistent());
            if let Some(keeper) = keeper {
                let ledger = keeper.new_ledger(&home, &bitmap, Durability::default());
                ledger.and_then(|ledger| Ok(bitmap.keep_in(ledger)?)).map_err(|error| error.at(&at))?;
            }
            bitmap.adopt()?;
            Ok(Box::new(move || {
                drop(bitmap.forget());
                bitmap.let_go();
                bitmap.set_store(store);
                bitmap.set_lost();
            }))
        })
    }

    /// Makes a bitmap record.
    pub fn enable_bitmap(&mut self, target: &str, name: &str) -> Result<()> {
        self.record_bitmap(target, name, true)
    }

    /// Makes a bitmap stop recording.
    pub fn disable_bitmap(&mut self, target: &str, name: &str) -> Result<()> {
        self.record_bitmap(target, name, false)
    }

    fn record_bitmap(&mut self, target: &str, name: &str, recording: bool) -> Result<()> {
        fn set(bitmap: &Bitmap, recording: bool) -> driveline_bitmap::Result<()> {
            if recording { bitmap.enable() } else { bitmap.disable() }
        }
        self.bitmap_action(target, name, move |_, _, bitmap| {
            let before = bitmap.is_recording();
            set(&bitmap, recording)?;
            Ok(Box::new(move || drop(set(&bitmap, before))))
        })
    }

    /// ORs other bitmaps (of any nodes and granularities, but of equal length) into one.
    pub fn merge_bitmaps(&mut self, target: &str, name: &str, sources: Vec<(String, String)>) -> Result<()> {
        self.bitmap_action(target, name, move |staged, _, bitmap| {
            let saved = bitmap.bits().clone();
            for (target, name) in &sources {
                let merged =
                    staged.find_bitmap(target, name).and_then(|(_, source)| Ok(bitmap.merge_from(&source)?));
                if let Err(error) = merged {
                    drop(bitmap.restore(&saved));
                    return Err(error);
                }
            }
            Ok(Box::new(move || drop(bitmap.restore(&saved))))
        })
    }

    /// Gives a bitmap another name. Handles of it stay good.
    pub fn rename_bitmap(&mut self, target: &str, name: &str, new_name: &str) -> Result<()> {
        let new = BitmapName::new(new_name)?;
        self.bitmap_action(target, name, move |staged, id, bitmap| {
            let node = staged.any_node(id)?;
            let old = bitmap.name();
            // One that is parked comes back to where others may have the name by now.
            let home = staged.parked.get(&bitmap.id()).copied();
            for at in [id].into_iter().chain(home) {
                refuse_parked_name(staged, at, new.as_str())?;
            }
            if let Some(home) = home.filter(|home| *home != id) {
                staged.any_node(home)?.bitmaps.lock().check_name(new.as_str())?;
            }
            node.bitmaps.lock().rename(old.as_str(), new.clone())?;
            Ok(Box::new(move || drop(node.bitmaps.lock().rename(new.as_str(), old))))
        })
    }

    /// Moves a bitmap to another node (or a drive's root): bits, state, users and name go along, and its identity
    /// stays. One of the same name that is there is merged into it.
    pub fn move_bitmap(&mut self, target: &str, name: &str, to: &str) -> Result<()> {
        self.move_or_park(target, name, to, false)
    }

    /// Moves a bitmap to a holder for a while: at its home, and by its drive, it is still found. Earlier actions of the
    /// same change may have moved or renamed it; one that they have removed stays so.
    pub fn park_bitmap(&mut self, bitmap: &Arc<Bitmap>, holder: &str) -> Result<()> {
        let to = self.topology.node_or_drive(holder)?;
        let here = self.topology.nodes.values().find(|p| p.node.bitmaps.lock().get_id(bitmap.id()).is_some());
        let touches: Vec<NodeId> = here.map(|placed| placed.node.id).into_iter().chain([to]).collect();
        let bitmap = bitmap.clone();
        self.action(touches, move |staged| {
            Box::pin(async move {
                let is_on = |node: &Node| node.bitmaps.lock().get_id(bitmap.id()).is_some();
                let from = staged.topology.nodes.values().find(|p| is_on(&p.node)).map(|p| p.node.id);
                match from {
                    Some(from) => Ok(undo(relocate(staged, from, bitmap, to, true)?)),
                    None => Ok(undo(|| {})),
                }
            })
        });
        Ok(())
    }

    /// Makes a bitmap say what `bits` says when the change comes to it, whoever uses it: how a job tells what it has not
    /// copied. Nothing, if the bitmap is not there any more.
    pub fn set_bits(&mut self, bitmap: &Arc<Bitmap>, bits: &Arc<Bitmap>) {
        let here = self.topology.nodes.values().find(|p| p.node.bitmaps.lock().get_id(bitmap.id()).is_some());
        let Some(at) = here.map(|placed| placed.node.id) else { return };
        let (bitmap, bits) = (bitmap.clone(), bits.clone());
        self.action([at], move |_| {
            Box::pin(async move {
                let saved = bitmap.recording_bits().clone();
                bitmap.restore(bits.bits())?;
                Ok(undo(move || drop(bitmap.restore(&saved))))
            })
        });
    }

    /// Takes a parked bitmap off its holder: to its home, if that is still below the drive's root, else to the
    /// root. `holder` itself does not count as the root: it is on its way out.
    pub fn bring_home(&mut self, holder: &str, name: &str, drive: &str) -> Result<()> {
        let (holder_id, bitmap) = self.find_bitmap(holder, name)?;
        let root = match self.topology.drive(drive)? {
            root if root == holder_id => self.topology.filtered(holder_id).unwrap_or(root),
            root => root,
        };
        let home = self.parked_home(bitmap.id()).filter(|home| {
            self.topology.nodes.contains_key(home)
                && self.topology.reach(root).contains(home)
                && *home != holder_id
        });
        // Below a format node lie other data: only the filters on top and the format itself show the drive's.
        let shows_drive = |home: &NodeId| {
            let mut at = Some(root);
            while let Some(id) = at {
                if id == *home {
                    return true;
                }
                at = self.topology.filtered(id);
            }
            false
        };
        let to = home.filter(shows_drive).unwrap_or(root);
        let to = self.topology.name(to);
        self.move_or_park(holder, name, &to, false)
    }

    fn move_or_park(&mut self, target: &str, name: &str, to: &str, park: bool) -> Result<()> {
        let to = self.topology.node_or_drive(to)?;
        self.touched.insert(to);
        self.bitmap_action(target, name, move |staged, from, bitmap| relocate(staged, from, bitmap, to, park))
    }

    /// Marks everything that is allocated in the top image of the node or drive.
    pub fn populate_bitmap(&mut self, target: &str, name: &str) -> Result<()> {
        let (target, name) = (target.to_owned(), name.to_owned());
        let id = self.place(&target, &name);
        self.action(id, move |staged| {
            Box::pin(async move {
                let (id, bitmap) = staged.find_bitmap(&target, &name)?;
                bitmap.check(driveline_bitmap::Operation::Clear)?;
                let saved = bitmap.bits().clone();
                let edge = staged.wire(id)?.edge;
                let mut offset = 0;
                while offset < bitmap.length() {
                    let length = (bitmap.length() - offset).min(1 << 30);
                    let ask = Ask { op: op::BLOCK_STATUS, offset, length, ..Ask::default() };
                    let answer = Call::new(edge.clone(), ask, Buffer::default()).await;
                    if let Err(error) = answer.result {
                        drop(bitmap.restore(&saved));
                        return Err(Error::from(error).at(&staged.topology.name(id)));
                    }
                    if answer.status.depth == 1 {
                        bitmap.mark_unconditionally(offset..offset + answer.status.length);
                    }
                    offset += answer.status.length.max(1);
                }
                Ok(undo(move || drop(bitmap.restore(&saved))))
            })
        });
        Ok(())
    }

    /// Where a bitmap is now, if it is there before the change; else the node that is named.
    fn place(&self, target: &str, name: &str) -> Option<NodeId> {
        match self.find_bitmap(target, name) {
            Ok((id, _)) => Some(id),
            Err(_) => self.topology.node_or_drive(target).ok(),
        }
    }

    pub(crate) fn bitmap_action(
        &mut self,
        target: &str,
        name: &str,
        action: impl FnOnce(&mut Staged, NodeId, Arc<Bitmap>) -> Result<Box<dyn FnOnce() + Send>> + Send + 'static,
    ) -> Result<()> {
        self.topology.node_or_drive(target)?;
        let (target, name) = (target.to_owned(), name.to_owned());
        let touches = self.place(&target, &name);
        self.action(touches, move |staged| {
            Box::pin(async move {
                // Looked up only now: an earlier action of the same change may have added or moved it.
                let (id, bitmap) = staged.find_bitmap(&target, &name)?;
                let back = action(staged, id, bitmap)?;
                Ok(undo(back))
            })
        });
        Ok(())
    }
}

/// Moves a bitmap from node to node, for a while (`park`) or for good. Returns what undoes it.
pub(crate) fn relocate(
    staged: &mut Staged,
    from: NodeId,
    bitmap: Arc<Bitmap>,
    to: NodeId,
    park: bool,
) -> Result<Box<dyn FnOnce() + Send>> {
    let source = staged.any_node(from)?;
    let target = staged.node(to)?;
    let size = staged.wire(to)?.info.size_bytes;
    if size != bitmap.length() {
        let message = format!(
            "bitmap '{}' is of {} bytes and cannot move to a node of {size}",
            bitmap.name().as_str(),
            bitmap.length()
        );
        return Err(Error::new(Kind::Invalid, message).at(&target.name));
    }
    if from == to {
        return Ok(Box::new(|| {}));
    }
    let (saved, bits) = (target.bitmaps.lock().clone(), bitmap.recording_bits().clone());
    let (own, namesake) = (bitmap.ledger(), saved.get(bitmap.name().as_str()).cloned());
    let namesakes = namesake.as_ref().and_then(|namesake| namesake.ledger());
    target.bitmaps.lock().put(bitmap.clone()).map_err(|error| Error::from(error).at(&target.name))?;
    source.bitmaps.lock().take(bitmap.id());
    // No undo: `staged` itself is dropped when the change fails.
    if park {
        staged.parked.insert(bitmap.id(), from);
    } else {
        staged.parked.remove(&bitmap.id());
    }
    Ok(Box::new(move || {
        *target.bitmaps.lock() = saved;
        drop(bitmap.restore(&bits));
        // What the namesake was kept in goes back to it, or remembers it again.
        match (namesake, namesakes) {
            (Some(namesake), Some(_)) if own.is_some() => drop(namesake.remember()),
            (Some(namesake), Some(ledger)) => {
                bitmap.let_go();
                drop(namesake.keep_in(ledger));
            }
            _ => {}
        }
        drop(source.bitmaps.lock().put(bitmap));
    }))
}

fn attach(staged: &Staged, id: NodeId, bitmap: Arc<Bitmap>) -> Result<Undo> {
    let node = staged.any_node(id)?;
    let size = staged.wire(id)?.info.size_bytes;
    refuse_parked_name(staged, id, bitmap.name().as_str())?;
    if bitmap.length() != size {
        bitmap.reserve(size)?;
        bitmap.resize(size);
    }
    node.bitmaps.lock().add(bitmap.clone()).map_err(|error| Error::from(error).at(&node.name))?;
    Ok(undo(move || drop(node.bitmaps.lock().take(bitmap.id()))))
}

/// While a bitmap is parked its name is taken at its home.
fn refuse_parked_name(staged: &Staged, at: NodeId, name: &str) -> Result<()> {
    let parked_here = |bitmap: &Arc<Bitmap>| staged.parked.get(&bitmap.id()) == Some(&at);
    let taken = staged.topology.nodes.values().any(|placed| {
        placed.node.bitmaps.lock().iter().any(|bitmap| bitmap.name().as_str() == name && parked_here(bitmap))
    });
    if !taken {
        return Ok(());
    }
    let message = format_args!("bitmap '{name}' exists already (a job keeps it on a holder)");
    Err(Error::new(Kind::Exists, message).at(&staged.topology.name(at)))
}

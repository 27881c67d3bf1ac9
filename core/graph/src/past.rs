//! What jobs need that keep a point in time: a root on it, a bitmap that stands still from then on, and compressed writes.

use crate::{
    change::Change,
    error::{Error, Kind, Result},
    graph::Graph,
    io::Marks,
    root::{Root, RootOptions},
};
use driveline_bitmap::Frozen;
use parking_lot::Mutex;
use std::sync::Arc;

impl Change {
    /// As [`Change::attach_to_node`], to the point in time that a node shows: see
    /// [`OpenNode::point_in_time`](crate::OpenNode::point_in_time).
    ///
    /// Errors: [`Kind::NotSupported`] if it shows none.
    pub fn attach_to_past(&mut self, node: &str, options: &RootOptions) -> Result<Root> {
        let id = self.topology.id(node)?;
        if self.topology.at(id).node.open.point_in_time().is_none() {
            return Err(Error::new(Kind::NotSupported, "it shows no point in time").at(node));
        }
        let root = self.attach_to_node(node, options)?;
        let attached = self.topology.roots.get_mut(&root.id()).expect("it was attached just now");
        attached.past = true;
        Ok(root)
    }

    /// Freezes a bitmap for `who` when this change is made, in its turn among the other steps, and puts it into `slot` after
    /// `with` has seen it. Nothing is in flight above the bitmap's node then.
    ///
    /// Errors: those of [`Bitmap::freeze`](driveline_bitmap::Bitmap::freeze), and of `with`.
    pub fn freeze_bitmap<F>(
        &mut self,
        target: &str,
        name: &str,
        who: &str,
        slot: &Arc<Mutex<Option<Frozen>>>,
        with: F,
    ) -> Result<()>
    where
        F: FnOnce(&Frozen) -> Result<()> + Send + 'static,
    {
        let (who, slot) = (who.to_owned(), slot.clone());
        self.bitmap_action(target, name, move |_, _, bitmap| {
            let frozen = bitmap.freeze(&who)?;
            with(&frozen)?;
            *slot.lock() = Some(frozen);
            Ok(Box::new(move || drop(slot.lock().take())))
        })
    }
}

impl Graph {
    /// Writes one cluster of a node compressed: see [`OpenNode::write_compressed`](crate::OpenNode::write_compressed). The
    /// caller is inside a unit or request that a drain of the node waits for.
    pub async fn write_compressed(&self, node: &str, offset: u64, data: &[u8]) -> Result<()> {
        let (topology, wired) = {
            let state = self.0.state.lock();
            (state.topology.clone(), state.wired.clone())
        };
        let id = topology.id(node)?;
        let node = &topology.at(id).node;
        let range = offset..offset + data.len() as u64;
        let marks = Marks { bitmaps: node.bitmaps.lock().snapshot(), reach: Vec::new(), grows: false };
        // As any copy to it: whoever found the range unallocated has read it from the backing before that changes.
        let _hold = node.ranges.hold(range.clone(), true).await;
        let marked = marks.mark_safely(range, 0, 0).await;
        marked.map_err(|error| Error::from(error).at(&node.name))?;
        let children = wired.get(&id).map(|wired| wired.children.clone()).unwrap_or_default();
        node.open.write_compressed(&children, offset, data).await.map_err(|error| error.at(&node.name))
    }
}

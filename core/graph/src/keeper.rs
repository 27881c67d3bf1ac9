//! What keeps bitmaps beyond the life of the process, as the graph sees it.

use crate::{Result, graph::Graph, layout::Layout};
use driveline_bitmap::{Bitmap, Durability, Ledger};
use std::{fmt, sync::Arc};

/// Has a ledger for each persistent bitmap, and settles what they record in batches: a change of the graph is all or
/// nothing, also for whoever finds the bitmaps after a crash.
///
/// Its methods are called while a change is made, so they do not wait for anything but a disk.
pub trait Keeper: fmt::Debug + Send + Sync {
    /// A ledger for a new bitmap of a node or a drive, without a record yet.
    ///
    /// Errors: there is no store for it, or no room in it.
    fn new_ledger(&self, target: &str, bitmap: &Bitmap, durability: Durability) -> Result<Arc<dyn Ledger>>;

    /// From now on records wait for [`Keeper::end_batch`].
    fn begin_batch(&self);

    /// Settles what was recorded since the batch began, all of it with one write for each store.
    ///
    /// Errors: a store cannot be written; it holds what it held before.
    fn end_batch(&self) -> Result<()>;

    /// Drives are about to show the data of other nodes: all else has been done, and no request of theirs has gone there yet.
    fn drives_move(&self, before: &Layout, after: &Layout) {
        let _ = (before, after);
    }
}

impl Graph {
    /// Keeps persistent bitmaps with `keeper` from now on. Without one there are none.
    pub fn set_keeper(&self, keeper: Arc<dyn Keeper>) {
        *self.0.keeper.write() = Some(keeper);
    }

    pub(crate) fn keeper(&self) -> Option<Arc<dyn Keeper>> {
        self.0.keeper.read().clone()
    }
}

/// The batch of one change.
pub(crate) struct Batch(Option<Arc<dyn Keeper>>);

impl Batch {
    pub(crate) fn begin(graph: &Graph) -> Self {
        let keeper = graph.keeper();
        if let Some(keeper) = &keeper {
            keeper.begin_batch();
        }
        Self(keeper)
    }

    /// Settles what has been recorded; what comes now is in another batch.
    pub(crate) fn settle(&self) -> Result<()> {
        let Some(keeper) = &self.0 else { return Ok(()) };
        let settled = keeper.end_batch();
        keeper.begin_batch();
        settled
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        if let Some(keeper) = self.0.take()
            && let Err(error) = keeper.end_batch()
        {
            tracing::error!("bitmaps: after a graph change: {error}");
        }
    }
}

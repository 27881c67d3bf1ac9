//! The way back, when a plan could not be carried out to its end.

use super::{
    plan::{Step, plan},
    state::{ExportShape, State},
};
use crate::{
    config::Config,
    daemon::Inner,
    exports::Reserved,
    stores::{Place, Remaining},
};
use driveline_graph::Result;
use std::sync::Arc;

/// What was done of a plan, as far as the graph does not tell it.
#[derive(Debug, Default)]
pub(super) struct Done {
    /// Exports that were ended.
    pub(super) ended: Vec<ExportShape>,
    /// Drives that are new.
    pub(super) drives: Vec<String>,
    /// Bitmaps that are new, by drive. Others of a new drive were found.
    pub(super) bitmaps: Vec<(String, String)>,
    /// Drives whose bitmaps were moved, and where those were.
    pub(super) moved: Vec<(String, (Place, bool))>,
}

impl Inner {
    /// After a failure: the graph becomes what it was, and is served as it was. No bitmap ends that was there before.
    pub(super) async fn take_back(self: &Arc<Self>, config: &Config, before: &State, done: Done) {
        let mut failed: Vec<_> = Vec::new();
        let mut put_away = Remaining::default();
        for (drive, name) in &done.bitmaps {
            failed.extend(self.end_bitmap(drive, name).await.err());
        }
        for drive in &done.drives {
            match self.stores.leave(drive).await {
                Ok(remaining) => put_away.append(remaining),
                Err(error) => failed.push(error),
            }
        }
        for (drive, was) in done.moved.into_iter().rev() {
            failed.extend(self.stores.move_back(&drive, was).await.err());
        }
        let mut back = plan(&self.running(), before, false);
        let is_of_graph = |step: &Step| {
            !matches!(
                step,
                Step::NewExport(..)
                    | Step::ChangeExport(..)
                    | Step::EndExport(_)
                    | Step::NewBitmap { .. }
                    | Step::Store { .. }
            )
        };
        back.steps.retain(is_of_graph);
        let is_back = Box::pin(self.change_graph(&back, config, before, &mut Done::default())).await;
        failed.extend(is_back.err());
        failed.extend(self.stores.close_files(put_away).err());
        let exports = done.ended.into_iter().map(|shape| (shape.at, shape.export)).collect();
        failed.extend(self.exports.start(exports, Reserved::default()).await.err());
        for error in failed {
            tracing::error!("taking an apply back: {error}");
        }
    }

    async fn end_bitmap(&self, drive: &str, name: &str) -> Result<()> {
        let mut change = self.graph.change().await;
        change.remove_bitmap(drive, name)?;
        change.commit().await
    }
}

//! Metadata that makes no sense, met while something is written: the image is marked, and left alone from then on.

use super::{Qcow2, header::incompatible, io::Io, layout::is_corrupt};
use driveline_op::Result;
use std::sync::atomic::Ordering::Relaxed;

impl Qcow2 {
    /// Looks at how a change ended. If it met metadata that makes no sense, nothing is written any more: what is in
    /// memory may be as wrong as what is on disk. Version 3 says so in the header, too.
    #[inline]
    pub(crate) async fn judge(&self, io: &mut Io<'_, '_>, result: Result<()>) -> Result<()> {
        match &result {
            Err(error) if is_corrupt(error) => Box::pin(self.mark_damaged(io)).await,
            _ => {}
        }
        result
    }

    #[cold]
    async fn mark_damaged(&self, io: &mut Io<'_, '_>) {
        // Whoever holds the lock may still end what he began.
        let _meta = self.meta.lock().await;
        if self.damaged.swap(true, Relaxed) || self.geometry.version < 3 {
            return;
        }
        tracing::error!("a qcow2 image is marked as corrupt, and not written to any more");
        if let Err(error) = self.change_header(io, |h| h.incompatible |= incompatible::CORRUPT).await {
            tracing::error!(%error, "the mark could not be written");
        }
    }
}

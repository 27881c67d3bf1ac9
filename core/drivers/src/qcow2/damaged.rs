//! Metadata that makes no sense, met while something is read or written: the image is marked, and nothing is written to it from
//! then on. One that is read-only is only told of.

use super::{
    Qcow2,
    header::incompatible,
    io::Io,
    layout::{is_corrupt, what_is_corrupt},
};
use driveline_graph::{NodeEvent, node_tells};
use driveline_op::{Error, Result};
use std::sync::atomic::Ordering::Relaxed;

impl Qcow2 {
    /// Looks at how an operation ended. If it met metadata that makes no sense, nothing is written any more: what is in
    /// memory may be as wrong as what is on disk. Version 3 says so in the header, too.
    ///
    /// Source: QEMU, `qcow2_signal_corruption`.
    #[inline]
    pub(crate) async fn judge<T>(&self, io: &mut Io<'_, '_>, result: Result<T>) -> Result<T> {
        match &result {
            Err(error) if is_corrupt(error) => Box::pin(self.found_damaged(io, error)).await,
            _ => {}
        }
        result
    }

    #[cold]
    async fn found_damaged(&self, io: &mut Io<'_, '_>, error: &Error) {
        let fatal = !self.read_only.load(Relaxed);
        if !fatal {
            // It is met again and again, and told once.
            if !self.damage_told.swap(true, Relaxed) {
                self.tell_damage(error, fatal);
            }
            return;
        }
        // Whoever holds the lock may still end what he began.
        let _meta = self.meta.lock().await;
        if self.damaged.swap(true, Relaxed) {
            return;
        }
        self.damage_told.store(true, Relaxed);
        tracing::error!("a qcow2 image is marked as corrupt, and not written to any more");
        self.tell_damage(error, fatal);
        if self.geometry.version >= 3
            && let Err(error) = self.change_header(io, |h| h.incompatible |= incompatible::CORRUPT).await
        {
            tracing::error!(%error, "the mark could not be written");
        }
    }

    fn tell_damage(&self, error: &Error, fatal: bool) {
        let message = what_is_corrupt(error).unwrap_or_default().to_owned();
        node_tells(self.cookie, &NodeEvent::ImageCorrupted { message, fatal });
    }
}

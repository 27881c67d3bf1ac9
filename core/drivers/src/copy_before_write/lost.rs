//! The point in time is lost: something was overwritten that could not be copied.

use super::state::{CopyBeforeWrite, Side};
use driveline_graph::{NodeEvent, node_tells};
use driveline_op::Error;
use std::sync::atomic::Ordering::SeqCst;

impl CopyBeforeWrite {
    /// Gives the point in time up for good, because a copy failed at that end. It is told once.
    pub(super) fn lose(&self, side: Side, error: &Error) {
        let message = match side {
            Side::Source => format!("what a write overwrites could not be read: {error}"),
            Side::Target => format!("what a write overwrites could not be copied to the target: {error}"),
        };
        // Before anybody can see that it is lost.
        let _ = self.why_lost.set(message.clone());
        let is_new = !self.broken.swap(true, SeqCst);
        self.lost.notify(usize::MAX);
        if is_new {
            node_tells(self.cookie, &NodeEvent::PastLost { message });
        }
    }

    /// Is ready when the point in time is lost.
    pub(super) async fn lost(&self) {
        let lost = self.lost.listen();
        if !self.broken.load(SeqCst) {
            lost.await;
        }
    }

    /// Why the point in time is lost, if it is.
    pub fn why_lost(&self) -> Option<&str> {
        self.why_lost.get().map(String::as_str)
    }
}

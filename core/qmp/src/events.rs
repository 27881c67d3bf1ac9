//! Events: what happened, as QMP tells it to every monitor that has finished its negotiation.

use crate::{
    control::{InterruptedJob, RecoveredBitmap},
    interrupted, stores,
};
use serde_json::{Value, json};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Something that monitors hear of.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// The program ends.
    Shutdown(Reason),
    /// An export is gone, and its id is free.
    ExportDeleted {
        /// Its id.
        id: String,
    },
    /// An operation of a node panicked; requests that it had got an I/O error.
    NodeFailed {
        /// The node.
        node: String,
        /// The text of the panic.
        message: String,
    },
    /// A write went behind the threshold of a node, which is none any more.
    WriteThreshold {
        /// The node.
        node: String,
        /// How far behind, in bytes.
        exceeded: u64,
        /// The offset that was set.
        threshold: u64,
    },
    /// A bitmap was found in an image, and can be used as far as this says.
    BitmapRecovered(RecoveredBitmap),
    /// A guest overwrote what could not be kept, so a view of a checkpoint shows nothing any more.
    ViewLost {
        /// The checkpoint.
        checkpoint: String,
        /// The drive.
        drive: String,
        /// The node that showed the moment.
        node: String,
        /// The export of it.
        export: Option<String>,
        /// Why it could not be kept.
        reason: String,
    },
    /// A job was interrupted when the program ended the last time.
    JobInterrupted(InterruptedJob),
}

/// Why the program ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The command `quit`.
    Quit,
    /// A signal.
    Signal,
    /// An error that it cannot go on after.
    Error,
}

impl Reason {
    /// Its word in QMP (`ShutdownCause`).
    pub fn name(self) -> &'static str {
        match self {
            Reason::Quit => "host-qmp-quit",
            Reason::Signal => "host-signal",
            Reason::Error => "host-error",
        }
    }
}

impl Event {
    fn name(&self) -> &'static str {
        match self {
            Event::Shutdown(_) => "SHUTDOWN",
            Event::ExportDeleted { .. } => "BLOCK_EXPORT_DELETED",
            Event::WriteThreshold { .. } => "BLOCK_WRITE_THRESHOLD",
            Event::NodeFailed { .. } => "X_DRIVELINE_NODE_FAILED",
            Event::BitmapRecovered(_) => "X_DRIVELINE_BITMAP_RECOVERED",
            Event::ViewLost { .. } => "X_DRIVELINE_CHECKPOINT_VIEW_LOST",
            Event::JobInterrupted(_) => "X_DRIVELINE_JOB_INTERRUPTED",
        }
    }

    fn data(&self) -> Value {
        match self {
            Event::Shutdown(reason) => json!({ "guest": false, "reason": reason.name() }),
            Event::ExportDeleted { id } => json!({ "id": id }),
            Event::WriteThreshold { node, exceeded, threshold } => json!({
                "node-name": node,
                "amount-exceeded": exceeded,
                "write-threshold": threshold,
            }),
            Event::NodeFailed { node, message } => json!({ "node-name": node, "message": message }),
            Event::BitmapRecovered(bitmap) => stores::recovered(bitmap),
            Event::ViewLost { checkpoint, drive, node, export, reason } => {
                let mut data =
                    json!({ "checkpoint": checkpoint, "drive": drive, "node-name": node, "reason": reason });
                if let Some(export) = export {
                    data["export"] = export.as_str().into();
                }
                data
            }
            Event::JobInterrupted(job) => interrupted::shown(job),
        }
    }

    /// The event as a message, as of now.
    pub(crate) fn message(&self) -> Value {
        message(self.name(), self.data())
    }
}

/// What happened in the graph, as a message, if monitors hear of it so.
pub(crate) fn of_graph(event: &driveline_graph::Event) -> Option<Value> {
    use driveline_graph::Event as Happened;
    const SECTOR: u64 = 512;
    let sectors = |range: &std::ops::Range<u64>| {
        let first = range.start / SECTOR;
        (first, range.end.div_ceil(SECTOR) - first)
    };
    match event {
        Happened::QuorumBad { node, operation, error, range } => {
            let (first, count) = sectors(range);
            let mut data = json!({ "type": operation, "node-name": **node, "sector-num": first, "sectors-count": count });
            if let Some(errno) = error {
                let text = std::io::Error::from_raw_os_error(*errno).to_string();
                let text = text.rfind(" (os error ").map_or(&*text, |at| &text[..at]);
                data["error"] = text.into();
            }
            Some(message("QUORUM_REPORT_BAD", data))
        }
        Happened::QuorumFailure { reference, range } => {
            let (first, count) = sectors(range);
            let data = json!({ "reference": **reference, "sector-num": first, "sectors-count": count });
            Some(message("QUORUM_FAILURE", data))
        }
        Happened::ImageCorrupted { drive, node, message: text, fatal } => {
            let data = json!({ "device": **drive, "node-name": **node, "msg": text, "fatal": fatal });
            Some(message("BLOCK_IMAGE_CORRUPTED", data))
        }
        Happened::NodeFailed { node, message } => {
            Some(Event::NodeFailed { node: node.to_string(), message: message.clone() }.message())
        }
        Happened::WriteThreshold { node, exceeded, threshold } => {
            let (node, exceeded, threshold) = (node.to_string(), *exceeded, *threshold);
            Some(Event::WriteThreshold { node, exceeded, threshold }.message())
        }
        _ => None,
    }
}

/// A message about an event of a name that happens now.
pub(crate) fn message(name: &str, data: Value) -> Value {
    // A clock before 1970 is no reason to lose an event.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    json!({
        "timestamp": { "seconds": now.as_secs(), "microseconds": now.subsec_micros() },
        "event": name,
        "data": data,
    })
}

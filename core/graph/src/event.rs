//! What happens in a graph, for those who listen.

use std::{ops::Range, sync::Arc};

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// An operation of a node panicked; it was answered with EIO.
    NodeFailed {
        /// The node.
        node: Arc<str>,
        /// The text of the panic.
        message: String,
    },
    /// A child of a quorum failed, or was outvoted.
    QuorumBad {
        /// The child's node.
        node: Arc<str>,
        /// `read`, `write` or `flush`.
        operation: &'static str,
        /// The errno that it failed with; `None`: it was outvoted.
        error: Option<i32>,
        /// Of the request, in bytes.
        range: Range<u64>,
    },
    /// Too few children of a quorum agreed, or did what was asked.
    QuorumFailure {
        /// The drive that the quorum belongs to, or else its node.
        reference: Arc<str>,
        /// Of the request, in bytes.
        range: Range<u64>,
    },
    /// The metadata of an image made no sense.
    ImageCorrupted {
        /// The drive that the image belongs to; empty if it belongs to none.
        drive: Arc<str>,
        /// The image's node.
        node: Arc<str>,
        /// What makes no sense.
        message: String,
        /// Nothing is written to it any more. It is not for an image that could not be written to anyhow.
        fatal: bool,
    },
    /// A write went behind the threshold that was set for a node. It is told once.
    WriteThreshold {
        /// The node.
        node: Arc<str>,
        /// How far behind, in bytes.
        exceeded: u64,
        /// The offset that was set.
        threshold: u64,
    },
    /// Data was overwritten that could not be kept, so the point in time that a node showed is lost.
    PastLost {
        /// The node.
        node: Arc<str>,
        /// Why it could not be kept.
        message: String,
    },
    /// A change of the graph has taken effect.
    Changed,
}

/// Something that an operation of a node has to tell, which does not know the graph.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NodeEvent {
    /// See [`Event::QuorumBad`].
    QuorumBad {
        /// The number of the child.
        child: usize,
        /// `read`, `write` or `flush`.
        operation: &'static str,
        /// The errno that it failed with; `None`: it was outvoted.
        error: Option<i32>,
        /// Of the request, in bytes.
        range: Range<u64>,
    },
    /// See [`Event::ImageCorrupted`].
    ImageCorrupted {
        /// What makes no sense.
        message: String,
        /// Nothing is written to it any more.
        fatal: bool,
    },
    /// See [`Event::PastLost`].
    PastLost {
        /// Why it could not be kept.
        message: String,
    },
    /// See [`Event::QuorumFailure`].
    QuorumFailure {
        /// Of the request, in bytes.
        range: Range<u64>,
    },
}

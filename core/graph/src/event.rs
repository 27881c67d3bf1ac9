//! What happens in a graph, for those who listen.

use std::sync::Arc;

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
    /// A change of the graph has taken effect.
    Changed,
}

//! The one door for a change that is not made: what it opened is closed.
//!
//! ```text
//!   edits ─▶ an error ─▶ give_up, commit_if: close what was opened ─▶ the turn is free
//!      └────▶ dropped ─▶ what was opened waits in the graph ─▶ the next change, or the graph's end, closes it first
//! ```

use super::Change;
use crate::{driver::OpenChild, error::Result, graph::Graph, node::Node, topology::Topology};
use std::sync::Arc;

/// Nodes that are open and in no graph, in the order of opening: parents last. With the children that they have.
pub(crate) type Opened = Vec<(Arc<Node>, Vec<OpenChild>)>;

impl Change {
    /// Makes the change if its edits went well, as [`Change::commit`]; else gives it up, and returns what went wrong.
    pub async fn commit_if<T, E: From<crate::Error>>(self, edits: Result<T, E>) -> Result<T, E> {
        match edits {
            Ok(edited) => {
                self.commit().await?;
                Ok(edited)
            }
            Err(error) => {
                self.give_up().await;
                Err(error)
            }
        }
    }

    /// Ends a change that is not to be made: it never was, and nodes that it opened are closed.
    pub async fn give_up(mut self) {
        self.close_opened().await;
    }

    pub(super) async fn close_opened(&mut self) {
        let opened = std::mem::take(&mut self.opened);
        Rest { graph: self.graph.clone(), opened }.close().await;
    }

    /// What was opened and has become no part of the graph. The change was made.
    pub(super) fn opened_in_vain(&mut self, topology: &Topology) -> Opened {
        let opened = std::mem::take(&mut self.opened).into_iter().rev();
        opened.filter(|(node, _)| !topology.nodes.contains_key(&node.id)).collect()
    }
}

impl Drop for Change {
    fn drop(&mut self) {
        if !self.opened.is_empty() {
            self.graph.0.left_open.lock().append(&mut self.opened);
        }
    }
}

impl Graph {
    /// Closes what changes that were dropped have left open. The caller has the turn.
    pub(crate) async fn close_left_open(&self) {
        let opened = std::mem::take(&mut *self.0.left_open.lock());
        if !opened.is_empty() {
            Rest { graph: self.clone(), opened }.close().await;
        }
    }
}

/// Nodes that are being closed. If that is cancelled, the graph has those that are left.
struct Rest {
    graph: Graph,
    opened: Opened,
}

impl Rest {
    async fn close(&mut self) {
        while let Some((node, children)) = self.opened.last().cloned() {
            if let Err(error) = node.open.close(&children).await {
                tracing::warn!(node = node.name(), "closing after a change that was not made: {error}");
            }
            self.opened.pop();
        }
    }
}

impl Drop for Rest {
    fn drop(&mut self) {
        if !self.opened.is_empty() {
            self.graph.0.left_open.lock().append(&mut self.opened);
        }
    }
}

/// Closes instances that others have replaced. Goes on after an error, and returns the first.
pub(super) async fn close_all(nodes: Opened) -> Result<()> {
    let mut first = Ok(());
    for (node, children) in nodes {
        if let Err(error) = node.open.close(&children).await {
            let error = error.at(node.name());
            tracing::error!("{error}");
            first = first.and(Err(error));
        }
    }
    first
}

//! The end of the program does not wait for servers that do not answer.

use driveline_graph::{Graph, Node, NodeId};
use std::{collections::BTreeMap, convert::Infallible, sync::Arc, time::Duration};

/// A server that has not answered for so long, though it was asked, is given up.
const PATIENCE: Duration = Duration::from_secs(15);
/// How often it is looked at.
const LOOKS: u32 = 15;

/// What was seen of a node.
struct Seen {
    node: Arc<Node>,
    awaited: Option<u64>,
    /// So often in a row.
    same: u32,
}

/// Cuts the connections of nodes that wait for answers that do not come, for as long as this is polled: it has no end. Those that go on
/// answering have all the time that they need: what is still to be written there is somebody's data.
pub(crate) async fn cut(graph: &Graph) -> Infallible {
    let mut seen: BTreeMap<NodeId, Seen> = BTreeMap::new();
    loop {
        // A node that is closed is in the graph no more, and waits all the same.
        for view in graph.nodes() {
            let new = || Seen { node: view.node.clone(), awaited: None, same: 0 };
            seen.entry(view.node.id()).or_insert_with(new);
        }
        for Seen { node, awaited, same } in seen.values_mut() {
            let now = node.open_node().awaited();
            *same = if now.is_some() && now == *awaited { *same + 1 } else { 0 };
            *awaited = now;
            if *same < LOOKS {
                continue;
            }
            *same = 0;
            let (name, seconds) = (node.name(), PATIENCE.as_secs());
            tracing::error!(
                "node '{name}': its server has not answered for {seconds} seconds, and is given up"
            );
            if let Err(error) = node.open_node().yank() {
                tracing::error!("node '{name}': {error}");
            }
        }
        driveline_engine::sleep(PATIENCE / LOOKS).await;
    }
}

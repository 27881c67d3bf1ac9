//! Edges with their permissions, for people who look for who keeps whom from doing what.

use crate::{driver::Permissions, graph::Graph, permission::on_child_of, topology::Attachment};
use std::sync::Arc;

/// Who is at the upper end of an edge.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum EdgeParent {
    /// A node, by its name.
    Node(Arc<str>),
    /// A user from outside: a number that no other has, and who it is, for people.
    Root(u64, String),
}

/// An edge, as it was when it was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EdgeView {
    /// Its upper end.
    pub parent: EdgeParent,
    /// The name of the node at its lower end.
    pub child: Arc<str>,
    /// Which child it is: `file`, `backing`; `root` of a user from outside.
    pub name: String,
    /// The drive that a user follows.
    pub drive: Option<Arc<str>>,
    /// What the parent needs.
    pub needs: Permissions,
    /// What it lets others do.
    pub shares: Permissions,
}

impl Graph {
    /// All edges: those of users first, then those of nodes, parents before children.
    pub fn edges(&self) -> Vec<EdgeView> {
        let state = self.0.state.lock().clone();
        let topology = &state.topology;
        let of_root = |(id, attached): (&u64, &crate::topology::Attached)| EdgeView {
            parent: EdgeParent::Root(*id, attached.root.user().to_owned()),
            child: topology.name(topology.root_node(attached)),
            name: "root".to_owned(),
            drive: match &attached.to {
                Attachment::Drive(drive) => Some(drive.clone()),
                Attachment::Node(_) | Attachment::Place(_) => None,
            },
            needs: attached.needs,
            shares: attached.shares,
        };
        let mut edges: Vec<EdgeView> = topology.roots.iter().map(of_root).collect();
        for id in topology.top_down() {
            let placed = topology.at(id);
            let Some(granted) = state.granted.get(&id) else { continue };
            for (number, child) in placed.children.iter().enumerate() {
                let (needs, shares) = on_child_of(topology, placed, number, *granted);
                edges.push(EdgeView {
                    parent: EdgeParent::Node(placed.node.name.clone()),
                    child: topology.name(child.node),
                    name: child.name.to_string(),
                    drive: None,
                    needs,
                    shares,
                });
            }
        }
        edges
    }
}

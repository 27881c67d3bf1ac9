//! The graph at one moment: as it is, or as a change in the making would have it.

use crate::{
    change::Change,
    common::NodeOptions,
    driver::{DriverKind, Permissions, Role},
    error::Result,
    graph::{State, bitmap_places},
    node::{Node, NodeId},
    permission::{self, Granted},
    topology::{Parent, Topology},
    wiring::{Wired, wire_one},
};
use driveline_bitmap::{Bitmap, BitmapId};
use driveline_op::Info;
use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, OnceLock},
};

/// Who is where at one moment. What changes afterwards does not show in it.
#[derive(Clone)]
pub struct Layout {
    topology: Arc<Topology>,
    parked: BTreeMap<BitmapId, NodeId>,
    /// Of a change in the making it is worked out for what is asked for only.
    wired: Option<Arc<BTreeMap<NodeId, Wired>>>,
    granted: OnceLock<Arc<BTreeMap<NodeId, Granted>>>,
}

impl fmt::Debug for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.topology.names.keys()).finish()
    }
}

impl Change {
    /// The graph as this change would have it so far: with its edits, but without what is done only when it is made
    /// (bitmaps that are added or moved, sizes, headers).
    pub fn layout(&self) -> Layout {
        let (topology, parked) = (Arc::new(self.topology.clone()), self.before.parked.clone());
        Layout { topology, parked, wired: None, granted: OnceLock::new() }
    }

    /// The node of a name, or the root node of a drive of that name, as this change would have it so far.
    pub fn node_or_drive(&self, name: &str) -> Result<Arc<Node>> {
        Ok(self.topology.at(self.topology.node_or_drive(name)?).node.clone())
    }
}

impl From<State> for Layout {
    fn from(state: State) -> Self {
        let State { topology, wired, granted, parked } = state;
        Self { topology, parked, wired: Some(wired), granted: OnceLock::from(granted) }
    }
}

impl Layout {
    /// A node by name.
    pub fn node(&self, name: &str) -> Result<Arc<Node>> {
        let topology = &self.topology;
        Ok(topology.at(topology.id(name)?).node.clone())
    }

    /// The node of a name, or the root node of a drive of that name.
    pub fn node_or_drive(&self, name: &str) -> Result<Arc<Node>> {
        let topology = &self.topology;
        Ok(topology.at(topology.node_or_drive(name)?).node.clone())
    }

    /// All nodes with their places, parents before children.
    pub fn nodes(&self) -> Vec<NodeView> {
        self.views(self.topology.top_down())
    }

    /// The nodes of the drives, and all below these, with their places, parents before children.
    pub fn nodes_of_drives(&self) -> Vec<NodeView> {
        self.views(self.topology.top_down_from(self.topology.drives.values().copied()))
    }

    fn views(&self, ids: Vec<NodeId>) -> Vec<NodeView> {
        if ids.is_empty() {
            return Vec::new();
        }
        let mut parents = self.topology.all_parents();
        ids.into_iter().map(|id| self.view(id, &parents.remove(&id).unwrap_or_default())).collect()
    }

    /// A node with its place.
    pub fn view_node(&self, name: &str) -> Result<NodeView> {
        let id = self.topology.id(name)?;
        Ok(self.view(id, &self.topology.parents(id)))
    }

    fn view(&self, id: NodeId, parents: &[Parent]) -> NodeView {
        let topology = &self.topology;
        let placed = topology.at(id);
        NodeView {
            node: placed.node.clone(),
            read_only: placed.read_only,
            implicit: placed.implicit,
            common: placed.common,
            children: placed
                .children
                .iter()
                .map(|child| ChildView {
                    name: child.name.to_string(),
                    role: child.role,
                    node: topology.name(child.node),
                })
                .collect(),
            parents: parents.iter().map(|parent| topology.describe(parent)).collect(),
            needs: self.granted().get(&id).map(|granted| granted.needs).unwrap_or_default(),
            bitmaps: placed.node.bitmaps.lock().iter().cloned().collect(),
        }
    }

    /// All drives: names and root nodes.
    pub fn drives(&self) -> Vec<DriveView> {
        let topology = &self.topology;
        let view = |(name, root): (&Arc<str>, &NodeId)| DriveView {
            name: name.clone(),
            root: topology.name(*root),
            format: topology.name(topology.skip_filters(*root)),
        };
        topology.drives.iter().map(view).collect()
    }

    /// Is it the name of a drive?
    pub fn is_drive(&self, name: &str) -> bool {
        self.topology.drives.contains_key(name)
    }

    /// The chain of format nodes from a node or drive down, filters left out: the top image first.
    pub fn chain(&self, name: &str) -> Result<Vec<Arc<Node>>> {
        let topology = &self.topology;
        let mut at = Some(topology.skip_filters(topology.node_or_drive(name)?));
        let mut chain = Vec::new();
        while let Some(id) = at {
            chain.push(topology.at(id).node.clone());
            at = topology.backing(id).map(|below| topology.skip_filters(below));
        }
        Ok(chain)
    }

    /// Can requests on `from` (a node or drive) reach `to`?
    pub fn reaches(&self, from: &str, to: &str) -> bool {
        let topology = &self.topology;
        let (Ok(from), Ok(to)) = (topology.node_or_drive(from), topology.node_or_drive(to)) else {
            return false;
        };
        topology.reach(from).contains(&to)
    }

    /// The drive that a node belongs to: the one that shows it, itself or by filters; else the first whose graph reaches it.
    pub fn drive_of(&self, node: &str) -> Option<Arc<str>> {
        let topology = &self.topology;
        let id = topology.id(node).ok()?;
        // Others may reach it too: what looks at a point in time of it, or an image that is backed by it.
        let shows =
            |root: NodeId| std::iter::successors(Some(root), |at| topology.filtered(*at)).any(|at| at == id);
        let reaches = |root: NodeId| topology.reach(root).contains(&id);
        let drives = &topology.drives;
        let found = drives.iter().find(|(_, root)| shows(**root));
        found.or_else(|| drives.iter().find(|(_, root)| reaches(**root))).map(|(name, _)| name.clone())
    }

    /// Size of the drive or node.
    pub fn size_bytes(&self, name: &str) -> Result<u64> {
        Ok(self.info(name)?.size_bytes)
    }

    /// Size and limits of the drive or node.
    pub fn info(&self, name: &str) -> Result<Info> {
        let id = self.topology.node_or_drive(name)?;
        Ok(match &self.wired {
            Some(wired) => wired[&id].info,
            None => wire_one(&self.topology, id, false).info,
        })
    }

    fn granted(&self) -> &BTreeMap<NodeId, Granted> {
        // A conflict is an error when the change is made; until then nobody has been granted anything.
        self.granted.get_or_init(|| Arc::new(permission::compute(&self.topology).unwrap_or_default()))
    }

    /// Where bitmaps of a node or drive are: the node that each is attached to.
    pub fn bitmap_places(&self, target: &str) -> Result<Vec<(Arc<str>, Arc<Bitmap>)>> {
        let places = bitmap_places(&self.topology, &self.parked, target)?;
        Ok(places.into_iter().map(|(id, bitmap)| (self.topology.name(id), bitmap)).collect())
    }
}

/// A node in its place, as it was when it was asked for.
#[derive(Clone, Debug)]
pub struct NodeView {
    /// The node.
    pub node: Arc<Node>,
    /// It takes no writes.
    pub read_only: bool,
    /// It was made for its parent and goes with it.
    pub implicit: bool,
    /// The options that it has in common with all nodes.
    pub common: NodeOptions,
    /// Its children.
    pub children: Vec<ChildView>,
    /// Its users, for people.
    pub parents: Vec<String>,
    /// What they need together.
    pub needs: Permissions,
    /// The bitmaps attached to it.
    pub bitmaps: Vec<Arc<Bitmap>>,
}

impl NodeView {
    /// Is it a filter?
    pub fn is_filter(&self) -> bool {
        self.node.driver().description().kind == DriverKind::Filter
    }
}

/// A child of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChildView {
    /// Which child: `file`, `backing`, `child`.
    pub name: String,
    /// What it is to the node.
    pub role: Role,
    /// The node's name.
    pub node: Arc<str>,
}

/// A drive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DriveView {
    /// Its name.
    pub name: Arc<str>,
    /// The node that it leads to.
    pub root: Arc<str>,
    /// The first node below that is no filter.
    pub format: Arc<str>,
}

//! Who is whose child: a plain value that is copied, edited, checked, and then takes the place of the old one.

use crate::{
    common::NodeOptions,
    driver::{DriverKind, OpenNode, Permissions, Role},
    error::{Error, Kind, Result},
    node::{Node, NodeId},
    root::RootShared,
};
use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// The shape of the graph.
#[derive(Clone, Default)]
pub(crate) struct Topology {
    pub(crate) nodes: BTreeMap<NodeId, Placed>,
    pub(crate) names: BTreeMap<Arc<str>, NodeId>,
    pub(crate) drives: BTreeMap<Arc<str>, NodeId>,
    pub(crate) roots: BTreeMap<u64, Attached>,
}

/// A node in its place.
#[derive(Clone)]
pub(crate) struct Placed {
    pub(crate) node: Arc<Node>,
    pub(crate) children: Vec<ChildEdge>,
    pub(crate) read_only: bool,
    /// Made for its parent (defined in place, or named by an image): goes when its last parent goes.
    pub(crate) implicit: bool,
    /// A job kept a point in time in it, and has ended while somebody looked at that: what backs it may change all the same.
    pub(crate) was_target: bool,
    pub(crate) common: NodeOptions,
}

impl Placed {
    /// Nothing is written by it or to it.
    pub(crate) fn takes_no_writes(&self) -> bool {
        self.read_only || !self.common.active
    }

    /// Did it take no writes before a change?
    pub(crate) fn was_read_only(&self, before: &Topology) -> bool {
        before.nodes.get(&self.node.id).map_or(self.takes_no_writes(), Self::takes_no_writes)
    }
}

/// An edge from a node to its child.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ChildEdge {
    pub(crate) name: Cow<'static, str>,
    pub(crate) role: Role,
    pub(crate) node: NodeId,
}

/// A root in its place.
#[derive(Clone)]
pub(crate) struct Attached {
    pub(crate) root: Arc<RootShared>,
    pub(crate) to: Attachment,
    pub(crate) needs: Permissions,
    pub(crate) shares: Permissions,
    /// It locks ranges of its node (jobs do).
    pub(crate) locks: bool,
    /// It wants the node's point in time, not its present.
    pub(crate) past: bool,
    /// Parents whose claims on the node do not count against this root's, nor this root's against theirs.
    pub(crate) overrules: BTreeSet<NodeId>,
    /// On an inactive node it needs nothing.
    pub(crate) may_be_inactive: bool,
}

/// What a root is attached to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Attachment {
    /// A drive: follows its root node.
    Drive(Arc<str>),
    /// A node: stays there, whatever is put above (jobs).
    Node(NodeId),
    /// A place in the graph: what is put above the node, or takes its place, takes the root along (exports on nodes).
    Place(NodeId),
}

/// A parent of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Parent {
    Node(NodeId, Cow<'static, str>),
    Drive(Arc<str>),
    Root(u64),
}

impl Topology {
    pub(crate) fn id(&self, name: &str) -> Result<NodeId> {
        self.names.get(name).copied().ok_or_else(|| {
            let nearest = nearest(name, self.names.keys().map(|n| &**n));
            let hint = nearest.map(|n| format!("; did you mean '{n}'?")).unwrap_or_default();
            Error::new(Kind::NotFound, format_args!("there is no node '{name}'{hint}"))
        })
    }

    pub(crate) fn drive(&self, name: &str) -> Result<NodeId> {
        self.drives.get(name).copied().ok_or_else(|| {
            let nearest = nearest(name, self.drives.keys().map(|n| &**n));
            let hint = nearest.map(|n| format!("; did you mean '{n}'?")).unwrap_or_default();
            Error::new(Kind::NotFound, format_args!("there is no drive '{name}'{hint}"))
        })
    }

    /// A node by its name, or the root node of a drive. A node's name goes first.
    pub(crate) fn node_or_drive(&self, name: &str) -> Result<NodeId> {
        if let Some(id) = self.names.get(name).or_else(|| self.drives.get(name)) {
            return Ok(*id);
        }
        let nearest = nearest(name, self.names.keys().chain(self.drives.keys()).map(|n| &**n));
        let hint = nearest.map(|n| format!("; did you mean '{n}'?")).unwrap_or_default();
        Err(Error::new(Kind::NotFound, format_args!("there is no node and no drive '{name}'{hint}")))
    }

    pub(crate) fn at(&self, id: NodeId) -> &Placed {
        &self.nodes[&id]
    }

    pub(crate) fn name(&self, id: NodeId) -> Arc<str> {
        self.at(id).node.name.clone()
    }

    pub(crate) fn root_node(&self, attached: &Attached) -> NodeId {
        match &attached.to {
            Attachment::Drive(drive) => self.drives[drive],
            Attachment::Node(id) | Attachment::Place(id) => *id,
        }
    }

    /// Makes an edge, a drive or a root that follows lead to another node. A root that stays at its node is left there, and
    /// so is who wants the past of that very node.
    pub(crate) fn repoint(&mut self, parent: &Parent, node: NodeId) {
        match parent {
            Parent::Node(id, child) => {
                let placed = self.nodes.get_mut(id).expect("a parent is a node");
                let edges = placed.children.iter_mut().filter(|edge| edge.name == *child);
                let edges = edges.filter(|edge| edge.role != Role::PointInTime);
                edges.for_each(|edge| edge.node = node);
            }
            Parent::Drive(name) => drop(self.drives.insert(name.clone(), node)),
            Parent::Root(id) => {
                let attached = self.roots.get_mut(id).expect("a parent is a root");
                if let Attachment::Place(at) = &mut attached.to {
                    *at = node;
                }
            }
        }
    }

    /// Who uses a node directly.
    pub(crate) fn parents(&self, id: NodeId) -> Vec<Parent> {
        let nodes = self.nodes.values().flat_map(|placed| {
            let parent = placed.node.id;
            placed
                .children
                .iter()
                .filter(move |c| c.node == id)
                .map(move |c| Parent::Node(parent, c.name.clone()))
        });
        let drives =
            self.drives.iter().filter(|(_, root)| **root == id).map(|(name, _)| Parent::Drive(name.clone()));
        let roots = self
            .roots
            .iter()
            .filter(|(_, attached)| matches!(attached.to, Attachment::Node(at) | Attachment::Place(at) if at == id))
            .map(|(root, _)| Parent::Root(*root));
        nodes.chain(drives).chain(roots).collect()
    }

    /// Who uses which node directly, of all nodes that are used.
    pub(crate) fn all_parents(&self) -> BTreeMap<NodeId, Vec<Parent>> {
        let mut parents: BTreeMap<NodeId, Vec<Parent>> = BTreeMap::new();
        for placed in self.nodes.values() {
            for child in &placed.children {
                let parent = Parent::Node(placed.node.id, child.name.clone());
                parents.entry(child.node).or_default().push(parent);
            }
        }
        for (name, root) in &self.drives {
            parents.entry(*root).or_default().push(Parent::Drive(name.clone()));
        }
        for (id, attached) in &self.roots {
            if let Attachment::Node(at) | Attachment::Place(at) = attached.to {
                parents.entry(at).or_default().push(Parent::Root(*id));
            }
        }
        parents
    }

    pub(crate) fn describe(&self, parent: &Parent) -> String {
        match parent {
            Parent::Node(id, child) => format!("node '{}' (as its '{child}')", self.name(*id)),
            Parent::Drive(name) => format!("drive '{name}'"),
            Parent::Root(id) => self.roots[id].root.user().to_owned(),
        }
    }

    /// All nodes at and below a node.
    pub(crate) fn reach(&self, from: NodeId) -> BTreeSet<NodeId> {
        let (mut seen, mut todo) = (BTreeSet::new(), vec![from]);
        while let Some(id) = todo.pop() {
            if seen.insert(id) {
                todo.extend(self.at(id).children.iter().map(|child| child.node));
            }
        }
        seen
    }

    /// All nodes, parents before children.
    pub(crate) fn top_down(&self) -> Vec<NodeId> {
        self.order(self.nodes.keys().copied())
    }

    /// Nodes and all nodes below them, parents before children.
    pub(crate) fn top_down_from(&self, ids: impl IntoIterator<Item = NodeId>) -> Vec<NodeId> {
        self.order(ids.into_iter())
    }

    fn order(&self, from: impl Iterator<Item = NodeId>) -> Vec<NodeId> {
        fn visit(t: &Topology, id: NodeId, seen: &mut BTreeSet<NodeId>, order: &mut Vec<NodeId>) {
            if seen.insert(id) {
                t.at(id).children.iter().for_each(|child| visit(t, child.node, seen, order));
                order.push(id);
            }
        }
        let (mut seen, mut order) = (BTreeSet::new(), Vec::new());
        from.for_each(|id| visit(self, id, &mut seen, &mut order));
        order.reverse();
        order
    }

    /// Would an edge from `parent` to `child` close a cycle? Then its nodes, for the error.
    pub(crate) fn check_acyclic(&self, parent: NodeId, child: NodeId) -> Result<()> {
        let Some(mut path) = self.path(child, parent) else { return Ok(()) };
        path.push(child);
        let names: Vec<_> = path.iter().map(|id| self.name(*id)).collect();
        Err(Error::new(Kind::Invalid, format_args!("a cycle of nodes: {}", names.join(" -> "))))
    }

    /// A path down from one node to another.
    pub(crate) fn path(&self, from: NodeId, to: NodeId) -> Option<Vec<NodeId>> {
        if from == to {
            return Some(vec![from]);
        }
        self.at(from).children.iter().find_map(|child| {
            let mut path = self.path(child.node, to)?;
            path.insert(0, from);
            Some(path)
        })
    }

    /// The child that a filter filters.
    pub(crate) fn filtered(&self, id: NodeId) -> Option<NodeId> {
        let placed = self.at(id);
        let child = placed.children.iter().find(|child| child.role == Role::Filtered)?;
        (placed.node.driver.description().kind == DriverKind::Filter).then_some(child.node)
    }

    /// Does it grow when something is written behind its end? A protocol may (a file below a format), and so may what shows one
    /// to its end: filters, and formats that are nothing but their children's data.
    pub(crate) fn grows(&self, id: NodeId) -> bool {
        let placed = self.at(id);
        let below =
            |role| placed.children.iter().filter(move |child| child.role == role).map(|child| child.node);
        match placed.node.driver.description().kind {
            DriverKind::Protocol => true,
            DriverKind::Filter => self.filtered(id).is_some_and(|below| self.grows(below)),
            DriverKind::Format => {
                let keeps_metadata = below(Role::Storage).next().is_some();
                // As in `filename.rs`: a window of a size that the user fixed ends where it ends.
                let fixed = placed.node.options.contains_key("size");
                !keeps_metadata
                    && !fixed
                    && below(Role::Data).next().is_some()
                    && below(Role::Data).all(|below| self.grows(below))
            }
        }
    }

    /// Does a filter copy old data to this node?
    pub(crate) fn is_target(&self, id: NodeId) -> bool {
        self.nodes
            .values()
            .flat_map(|placed| &placed.children)
            .any(|c| c.node == id && c.role == Role::Target)
    }

    /// Does it copy old data to a target?
    pub(crate) fn copies(&self, id: NodeId) -> bool {
        self.at(id).children.iter().any(|child| child.role == Role::Target)
    }

    /// Is it the edge of a parent that wants a point in time of this very child?
    pub(crate) fn is_past(&self, parent: NodeId, child: &str) -> bool {
        self.at(parent).children.iter().any(|edge| edge.name == child && edge.role == Role::PointInTime)
    }

    /// The children of a node that it has a list of.
    pub(crate) fn members(&self, id: NodeId) -> Vec<NodeId> {
        let placed = self.at(id);
        let specs = &placed.node.driver().description().children;
        let in_list = |name: &str| specs.iter().any(|spec| spec.number(name).is_some());
        placed.children.iter().filter(|child| in_list(&child.name)).map(|child| child.node).collect()
    }

    /// A node without the filters on top of it.
    pub(crate) fn skip_filters(&self, mut id: NodeId) -> NodeId {
        while let Some(below) = self.filtered(id) {
            id = below;
        }
        id
    }

    /// A node without the filters on top of it that show its data as it is.
    pub(crate) fn skip_plain_filters(&self, mut id: NodeId) -> NodeId {
        while let Some(below) = self.filtered(id)
            && self.at(id).node.driver.description().shows_data_as_it_is()
        {
            id = below;
        }
        id
    }

    /// The instance of that node.
    pub(crate) fn unfiltered(&self, id: NodeId) -> Arc<dyn OpenNode> {
        self.at(self.skip_filters(id)).node.open.clone()
    }

    /// Where unallocated ranges of a format node are read from.
    pub(crate) fn backing(&self, id: NodeId) -> Option<NodeId> {
        self.at(id).children.iter().find(|child| child.role == Role::Backing).map(|child| child.node)
    }

    /// Takes out implicit nodes that nobody uses any more, and returns them, parents first.
    pub(crate) fn collect_unused(&mut self) -> Vec<NodeId> {
        let mut unused = Vec::new();
        loop {
            let used = self.used();
            let next: Vec<NodeId> = self
                .nodes
                .values()
                .filter(|p| p.implicit)
                .map(|p| p.node.id)
                .filter(|id| !used.contains(id))
                .collect();
            if next.is_empty() {
                return unused;
            }
            for id in next {
                self.names.remove(&self.name(id));
                self.nodes.remove(&id);
                unused.push(id);
            }
        }
    }

    /// The nodes that have a parent.
    fn used(&self) -> BTreeSet<NodeId> {
        let children = self.nodes.values().flat_map(|placed| &placed.children).map(|child| child.node);
        let rooted = self.roots.values().map(|attached| self.root_node(attached));
        children.chain(self.drives.values().copied()).chain(rooted).collect()
    }
}

/// The name that is most like a misspelt one, if any is like it.
pub fn nearest<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let limit = (name.chars().count() / 3).max(1);
    names
        .map(|known| (distance(name, known), known))
        .filter(|(d, _)| *d <= limit)
        .min()
        .map(|(_, known)| known)
}

/// Levenshtein distance, with a swap of neighbours as one step.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![(0..=b.len()).collect::<Vec<_>>()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let change = usize::from(a[i - 1] != b[j - 1]);
            let mut best = (rows[i - 1][j] + 1).min(row[j - 1] + 1).min(rows[i - 1][j - 1] + change);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_nearest_name_is_offered_and_far_ones_are_not() {
        let names = ["active", "base", "limit"];
        assert_eq!(super::nearest("actvie", names.into_iter()), Some("active"));
        assert_eq!(super::nearest("bse", names.into_iter()), Some("base"));
        assert_eq!(super::nearest("overlay", names.into_iter()), None);
    }
}

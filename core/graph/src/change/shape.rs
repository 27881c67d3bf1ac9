//! Edits of the graph's shape: children, filters, what takes whose place.

use super::{Change, undo};
use crate::{
    driver::{Options, Role},
    error::{Error, Kind, Result},
    node::{Node, NodeId},
    topology::{Attachment, ChildEdge, Parent},
};
use std::sync::Arc;

impl Change {
    /// Takes a node out and closes it. One that is in use is refused, by the names of its users, and one that has bitmaps,
    /// unless the same change moves them away first (then use [`Change::remove_emptied_node`]).
    pub fn remove_node(&mut self, name: &str) -> Result<()> {
        self.refuse_used(name)?;
        self.refuse_with_bitmaps(self.topology.id(name)?)?;
        self.refuse_touched(name)?;
        self.take_out(name).map(drop)
    }

    /// As [`Change::remove_node`], for a node whose bitmaps an earlier action of this change moves away or removes. If any
    /// is left when the change is made, the change is refused.
    pub fn remove_emptied_node(&mut self, name: &str) -> Result<()> {
        let node = self.take_out(name)?;
        self.must_be_emptied(node);
        Ok(())
    }

    fn take_out(&mut self, name: &str) -> Result<Arc<Node>> {
        self.refuse_used(name)?;
        let id = self.topology.id(name)?;
        self.topology.names.remove(name);
        let placed = self.topology.nodes.remove(&id).expect("it was looked up above");
        Ok(placed.node)
    }

    fn refuse_used(&self, name: &str) -> Result<()> {
        let id = self.topology.id(name)?;
        let users: Vec<_> = self.topology.parents(id).iter().map(|p| self.topology.describe(p)).collect();
        if !users.is_empty() {
            let message = format_args!("it is in use by {}", users.join(", "));
            return Err(Error::new(Kind::Busy, message).at(name));
        }
        Ok(())
    }

    fn must_be_emptied(&mut self, node: Arc<Node>) {
        self.action([node.id], move |_| {
            Box::pin(async move {
                if node.bitmaps.lock().is_empty() {
                    return Ok(undo(|| {}));
                }
                Err(Error::new(Kind::Busy, "it still has bitmaps").at(&node.name))
            })
        });
    }

    fn refuse_with_bitmaps(&self, id: NodeId) -> Result<()> {
        let node = &self.topology.at(id).node;
        let names: Vec<_> =
            node.bitmaps.lock().iter().map(|bitmap| format!("'{}'", bitmap.name().as_str())).collect();
        if names.is_empty() {
            return Ok(());
        }
        let message = format_args!("it has bitmaps ({}); move or remove them first", names.join(", "));
        Err(Error::new(Kind::Busy, message).at(&node.name))
    }

    /// Actions are run after all edits: one of this change would not find the node any more.
    fn refuse_touched(&self, name: &str) -> Result<()> {
        if !self.touched.contains(&self.topology.id(name)?) {
            return Ok(());
        }
        Err(Error::new(Kind::Busy, "an earlier action of the same change works on it").at(name))
    }

    /// Makes `node` the child of that name of `parent` (`None`: no child).
    pub fn set_child(&mut self, parent: &str, child: &str, node: Option<&str>) -> Result<()> {
        let parent_id = self.topology.id(parent)?;
        let description = self.topology.at(parent_id).node.driver.description().clone();
        let Some(spec) = description.children.iter().find(|spec| spec.name == child) else {
            let names: Vec<_> = description.children.iter().map(|spec| format!("'{}'", spec.name)).collect();
            let message = format_args!("it has no child '{child}'; it can have {}", names.join(", "));
            return Err(Error::new(Kind::NotFound, message).at(parent));
        };
        let node = match node {
            None if spec.required => {
                return Err(
                    Error::new(Kind::Invalid, format_args!("it needs its child '{child}'")).at(parent)
                );
            }
            None => None,
            Some(node) => Some(self.topology.id(node)?),
        };
        if let Some(node) = node {
            self.topology.check_acyclic(parent_id, node)?;
        }
        let placed = self.topology.nodes.get_mut(&parent_id).expect("looked up above");
        placed.children.retain(|edge| edge.name != spec.name);
        if let Some(node) = node {
            placed.children.push(ChildEdge { name: spec.name.clone(), role: spec.role, node });
        }
        placed
            .children
            .sort_by_key(|edge| description.children.iter().position(|spec| spec.name == edge.name));
        Ok(())
    }

    /// Puts `node` in the place of `old` under all of its parents, except roots that stay at their node, and
    /// except where that would make a cycle (parents at or below `node`).
    pub fn replace_node(&mut self, old: &str, node: &str) -> Result<()> {
        let (old, new) = (self.topology.id(old)?, self.topology.id(node)?);
        self.move_parents(old, new);
        Ok(())
    }

    pub(super) fn move_parents(&mut self, old: NodeId, new: NodeId) {
        let below_new = self.topology.reach(new);
        for parent in self.topology.parents(old) {
            if !matches!(&parent, Parent::Node(id, _) if below_new.contains(id)) {
                self.topology.repoint(&parent, new);
            }
        }
    }

    /// Opens a filter above a node, in the place that the node had under its parents:
    ///
    /// ```text
    ///   parent ─▶ node      parent ─▶ filter ─▶ node
    /// ```
    ///
    /// With the name of a drive it goes between the drive and its root, and other parents stay where they are.
    /// Roots that stay at their node stay (those of jobs), others go along. `definition` leaves its filtered child out.
    pub async fn insert_filter(&mut self, mut definition: Options, above: &str) -> Result<Arc<Node>> {
        let drive = (!self.topology.names.contains_key(above)).then_some(above);
        let below = self.topology.node_or_drive(above)?;
        let driver_name = definition.get("driver").and_then(|d| d.as_str()).unwrap_or_default().to_owned();
        let driver = self.graph.driver(&driver_name)?;
        let Some(spec) = driver.description().children.iter().find(|spec| spec.role == Role::Filtered) else {
            let message = format_args!("driver '{driver_name}' is no filter");
            return Err(Error::new(Kind::Invalid, message));
        };
        if driver.description().effects & driveline_op::effect::NOT_LIVE != 0
            && !self.topology.parents(below).is_empty()
        {
            let message =
                format_args!("filter '{driver_name}' says that it cannot be inserted above a node in use");
            return Err(Error::new(Kind::NotSupported, message));
        }
        definition.insert(spec.name.to_string(), self.topology.name(below).to_string().into());
        let mut definition = self.graph.parse_in(&self.topology, definition)?;
        let in_front = self.topology.at(below).common.in_front();
        definition.common.discard = definition.common.discard.or(in_front.discard);
        let parents = self.topology.parents(below);
        let name = definition.name.clone();
        let filter = self.open(definition, false, Some(self.topology.at(below).read_only)).await;
        let filter = filter.map_err(|error| name.map_or(error.clone(), |name| error.at(&name)))?;
        self.put_above(filter, parents, drive);
        Ok(self.topology.at(filter).node.clone())
    }

    /// Gives a filter the parents of the node that it was opened above; with a drive, that drive alone.
    pub(super) fn put_above(&mut self, filter: NodeId, parents: Vec<Parent>, drive: Option<&str>) {
        // A target of the filter may itself be backed by the node: led to the filter it would lead to itself.
        let below = self.topology.reach(filter);
        for parent in parents {
            if matches!(&parent, Parent::Node(id, _) if below.contains(id)) {
                continue;
            }
            let moves = match &parent {
                Parent::Drive(name) => drive.is_none_or(|drive| *drive == **name),
                Parent::Node(..) | Parent::Root(_) => drive.is_none(),
            };
            if moves {
                self.topology.repoint(&parent, filter);
            }
        }
    }

    /// Takes a filter out: its parents get its child, and it is closed. One that holds bitmaps is refused, unless
    /// the same change moves them away first (then use [`Change::remove_emptied_filter`]).
    pub fn remove_filter(&mut self, name: &str) -> Result<()> {
        let id = self.topology.id(name)?;
        self.refuse_with_bitmaps(id)?;
        self.refuse_touched(name)?;
        self.bypass(id, name)
    }

    /// As [`Change::remove_filter`], for a filter whose bitmaps an earlier action of this change moves away. If
    /// any is left when the change is made, the change is refused.
    pub fn remove_emptied_filter(&mut self, name: &str) -> Result<()> {
        let id = self.topology.id(name)?;
        let node = self.topology.at(id).node.clone();
        let children = &self.topology.at(id).children;
        let targets = children.iter().filter(|child| child.role == Role::Target).map(|child| child.node);
        let targets: Vec<NodeId> = targets.collect();
        self.bypass(id, name)?;
        self.must_be_emptied(node);
        // A job that ends must not depend on who still looks at what it kept: they see what is written from now on, as in QEMU.
        for target in targets {
            let looked_at = !self.topology.parents(target).is_empty();
            if let Some(placed) = self.topology.nodes.get_mut(&target).filter(|_| looked_at) {
                placed.was_target = true;
            }
        }
        Ok(())
    }

    fn bypass(&mut self, id: NodeId, name: &str) -> Result<()> {
        let Some(below) = self.topology.filtered(id) else {
            return Err(Error::new(Kind::Invalid, "it is no filter").at(name));
        };
        let mut stay: Vec<_> = self
            .topology
            .roots
            .values()
            .filter(|root| root.to == Attachment::Node(id))
            .map(|root| root.root.user().to_owned())
            .collect();
        let parents = self.topology.parents(id);
        let pasts = parents.iter().filter(|parent| match parent {
            Parent::Node(above, child) => self.topology.is_past(*above, child),
            Parent::Drive(_) | Parent::Root(_) => false,
        });
        stay.extend(pasts.map(|parent| self.topology.describe(parent)));
        if !stay.is_empty() {
            return Err(Error::new(Kind::Busy, format_args!("it is in use by {}", stay.join(", "))).at(name));
        }
        for parent in self.topology.parents(id) {
            self.topology.repoint(&parent, below);
        }
        self.topology.names.remove(name);
        self.topology.nodes.remove(&id);
        Ok(())
    }
}

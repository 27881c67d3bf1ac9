//! Children of drivers that take a list of them: added and removed while the node is in use.

use super::Change;
use crate::{
    error::{Error, Kind, Result},
    topology::ChildEdge,
};
use std::borrow::Cow;

impl Change {
    /// Adds a node to the children of one whose driver takes a list: it becomes `children.N`, with a number behind all there
    /// are. Returns that name.
    ///
    /// Errors: the driver takes no list, or not so many; the node has another size; a cycle.
    pub fn add_child(&mut self, parent: &str, node: &str) -> Result<String> {
        let (parent_id, id) = (self.topology.id(parent)?, self.topology.id(node)?);
        let placed = self.topology.at(parent_id);
        let Some(spec) = placed.node.driver.description().children.iter().find(|spec| spec.list).cloned()
        else {
            let text = format_args!("The node {parent} does not support adding a child");
            return Err(Error::new(Kind::NotSupported, text));
        };
        placed.node.open.check_children(placed.children.len() + 1)?;
        let size = |id| self.before.wired.get(&id).map(|wired| wired.info.size_bytes);
        if let (Some(has), Some(new)) = (size(parent_id), size(id))
            && has != new
        {
            let text = format_args!("it has {new} bytes, and the children of '{parent}' have {has}");
            return Err(Error::new(Kind::Invalid, text).at(node));
        }
        self.topology.check_acyclic(parent_id, id)?;
        let number = |edge: &ChildEdge| spec.number(&edge.name);
        let placed = self.topology.nodes.get_mut(&parent_id).expect("looked up above");
        let next = placed.children.iter().filter_map(number).max().map_or(0, |last| last + 1);
        let name = format!("{}.{next}", spec.name);
        placed.children.push(ChildEdge { name: Cow::Owned(name.clone()), role: spec.role, node: id });
        Ok(name)
    }

    /// Takes one of such children away. The node stays, unless it was made for its parent.
    ///
    /// Errors: there is no child of that name, or too few would be left.
    pub fn remove_child(&mut self, parent: &str, child: &str) -> Result<()> {
        let parent_id = self.topology.id(parent)?;
        let placed = self.topology.at(parent_id);
        if !placed.node.driver.description().children.iter().any(|spec| spec.list) {
            let text = format_args!("The node {parent} does not support removing a child");
            return Err(Error::new(Kind::NotSupported, text));
        }
        if !placed.children.iter().any(|edge| edge.name == child) {
            let text = format_args!("Node '{parent}' does not have child '{child}'");
            return Err(Error::new(Kind::NotFound, text));
        }
        placed.node.open.check_children(placed.children.len() - 1)?;
        let placed = self.topology.nodes.get_mut(&parent_id).expect("looked up above");
        placed.children.retain(|edge| edge.name != child);
        Ok(())
    }
}

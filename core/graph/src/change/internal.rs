//! Nodes that the program itself puts in: filters of jobs, whose drivers nobody can name in a definition.

use super::Change;
use crate::{
    definition::{ChildDefinition, Definition, check_name},
    driver::{Driver, Options, Role},
    error::{Error, Kind, Result},
    node::Node,
    topology::Parent,
};
use std::{collections::BTreeSet, fmt, sync::Arc};

/// A node to be put in by [`Change::insert_internal`].
pub struct Internal {
    /// What makes it work: a filter. It need not be registered.
    pub driver: Arc<dyn Driver>,
    /// Its name; without one, one is made up.
    pub name: Option<String>,
    /// Its options, without children.
    pub options: Options,
    /// Its children beside the filtered one: their names, and the nodes.
    pub children: Vec<(String, String)>,
}

impl fmt::Debug for Internal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Internal").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Change {
    /// As [`Change::insert_filter`], for a driver that is given as it is: opens a filter above a node, or between a
    /// drive and its root. [`Change::remove_filter`] takes it out again.
    ///
    /// Errors: [`Kind::Exists`] for a name that is taken, [`Kind::NotFound`] for a node that is not there,
    /// [`Kind::Invalid`] for a driver that is no filter, or the driver's own.
    pub async fn insert_internal(&mut self, node: Internal, above: &str) -> Result<Arc<Node>> {
        let drive = (!self.topology.names.contains_key(above)).then_some(above);
        let below = self.topology.node_or_drive(above)?;
        let below_name = self.topology.name(below).to_string();
        let description = node.driver.description();
        if !description.children.iter().any(|spec| spec.role == Role::Filtered) {
            let message = format_args!("driver '{}' is no filter", description.name);
            return Err(Error::new(Kind::Invalid, message));
        }
        node.name.as_deref().map_or(Ok(()), check_name)?;
        let mut children = Vec::new();
        for spec in &description.children {
            let given = node.children.iter().find(|(name, _)| *name == spec.name);
            let child = match given {
                Some((_, child)) => child.clone(),
                None if spec.role == Role::Filtered => below_name.clone(),
                None if !spec.required => continue,
                None => return Err(Error::new(Kind::Invalid, "it must be given").key(&spec.name)),
            };
            children.push((spec.clone(), ChildDefinition::Node(child)));
        }
        // A child may lead to `below` itself (the target of a mirror has its source as backing): that edge stays.
        let given = children.iter().filter(|(spec, _)| spec.role != Role::Filtered);
        let names = given.filter_map(|(_, child)| match child {
            ChildDefinition::Node(name) => Some(name.clone()),
            _ => None,
        });
        let mut reached = BTreeSet::new();
        for name in names.collect::<Vec<_>>() {
            reached.extend(self.topology.reach(self.topology.id(&name)?));
        }
        let mut parents = self.topology.parents(below);
        parents.retain(|parent| !matches!(parent, Parent::Node(id, _) if reached.contains(id)));
        let definition = Definition {
            name: node.name.clone(),
            driver: description.name.to_string(),
            options: node.options,
            common: self.topology.at(below).common.in_front(),
            read_only: None,
            children,
        };
        let read_only = Some(self.topology.at(below).read_only);
        let filter = self.open_with(node.driver.clone(), definition, false, read_only).await;
        let filter = filter.map_err(|error| node.name.map_or(error.clone(), |name| error.at(&name)))?;
        self.put_above(filter, parents, drive);
        Ok(self.topology.at(filter).node.clone())
    }
}

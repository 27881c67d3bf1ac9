//! Edits of what a node is: read-only or not, its size, its backing file.

use super::{Change, Undo, undo};
use crate::{
    driver::{Permissions, Role},
    error::{Error, Kind, Result},
    node::NodeId,
    permission::{self, Granted},
    topology::{Parent, Topology},
};

impl Change {
    /// Makes a node read-only or writable (with the file that it keeps its data in, if that was made for it).
    pub fn set_read_only(&mut self, name: &str, read_only: bool) -> Result<()> {
        let id = self.topology.id(name)?;
        let mut order = vec![id];
        let below = |id| {
            let children = &self.topology.at(id).children;
            let own = |role| !matches!(role, Role::Backing | Role::Target | Role::PointInTime);
            children.iter().filter(|c| own(c.role)).map(|c| c.node).collect::<Vec<_>>()
        };
        let mut at = 0;
        while at < order.len() {
            order.extend(below(order[at]));
            at += 1;
        }
        self.set_read_only_of(order, read_only);
        Ok(())
    }

    /// The same for these nodes, parents first.
    pub(super) fn set_read_only_of(&mut self, mut order: Vec<NodeId>, read_only: bool) {
        order.retain(|id| self.topology.at(*id).read_only != read_only);
        // Writable from the leaf up, read-only from the top down: a node never writes to a read-only child.
        if !read_only {
            order.reverse();
        } else {
            self.settling.extend(order.first());
        }
        for id in order {
            let placed = self.topology.nodes.get_mut(&id).expect("it is there");
            placed.read_only = read_only;
            // What is inactive is read-only as long as it is.
            if placed.common.active {
                self.switch_read_only(id, read_only);
            }
        }
    }

    pub(super) fn switch_read_only(&mut self, id: NodeId, read_only: bool) {
        self.action([id], move |staged| {
            Box::pin(async move {
                // Who nobody uses any more goes with the same change, and may be gone from the topology by now.
                let node = staged.any_node(id)?;
                let (open, name) = (node.open.clone(), node.name.clone());
                let children = staged.wired.get(&id).map(|wired| wired.children.clone()).unwrap_or_default();
                open.set_read_only(&children, read_only).await.map_err(|error| error.at(&name))?;
                let back: Undo = Box::new(move || {
                    Box::pin(async move {
                        if let Err(error) = open.set_read_only(&children, !read_only).await {
                            tracing::error!("undo of a graph change: {error}");
                        }
                    })
                });
                Ok(back)
            })
        });
    }

    /// Writes another backing file into the header of an image, and makes that node its backing.
    pub fn set_backing(
        &mut self,
        node: &str,
        backing: Option<&str>,
        file_in_header: Option<(&str, &str)>,
    ) -> Result<()> {
        let id = self.topology.id(node)?;
        self.set_child(node, "backing", backing)?;
        let header = file_in_header.map(|(file, format)| (file.to_owned(), format.to_owned()));
        self.write_backing_file(id, header);
        Ok(())
    }

    pub(super) fn write_backing_file(&mut self, id: NodeId, header: Option<(String, String)>) {
        self.action([id], move |staged| {
            Box::pin(async move {
                let node = staged.any_node(id)?;
                let (open, name) = (node.open.clone(), node.name.clone());
                let children = staged.wired.get(&id).map(|wired| wired.children.clone()).unwrap_or_default();
                let header = header.as_ref().map(|(file, format)| (file.as_str(), format.as_str()));
                let before = open.backing_file();
                open.set_backing_file(&children, header).await.map_err(|error| error.at(&name))?;
                let back: Undo = Box::new(move || {
                    Box::pin(async move {
                        let before = before.as_ref().map(|(file, format)| (file.as_str(), format.as_str()));
                        if let Err(error) = open.set_backing_file(&children, before).await {
                            tracing::error!("undo of a graph change: {error}");
                        }
                    })
                });
                Ok(back)
            })
        });
    }

    /// Gives up all that an image has allocated (after a commit, say).
    pub fn make_empty(&mut self, node: &str) -> Result<()> {
        let id = self.topology.id(node)?;
        self.action([id], move |staged| {
            Box::pin(async move {
                let node = staged.any_node(id)?;
                let children = staged.wired.get(&id).map(|wired| wired.children.clone()).unwrap_or_default();
                node.open.make_empty(&children).await.map_err(|error| error.at(&node.name))?;
                Ok(undo(|| {}))
            })
        });
        Ok(())
    }

    /// Changes the size of a node. All nodes above take the new size with it, and all bitmaps on the way: what a
    /// drive has grown by counts as dirty for its bitmaps.
    pub fn resize(&mut self, name: &str, size_bytes: u64) -> Result<()> {
        self.resize_overruling(name, size_bytes, &[])
    }

    /// As [`Change::resize`], but the claims of some parents on the node do not count: a commit grows the image
    /// below those that it is about to take away.
    pub fn resize_overruling(&mut self, name: &str, size_bytes: u64, overruled: &[String]) -> Result<()> {
        let id = self.topology.node_or_drive(name)?;
        let id = self.topology.skip_filters(id);
        let name = self.topology.name(id);
        if self.topology.at(id).read_only {
            return Err(Error::new(Kind::NotPermitted, "it is read-only").at(&name));
        }
        self.check_resize_of_nodes(id, overruled)?;
        self.check_resize_of_roots(id)?;
        // A node with a list of children has their size, which is that of each of them.
        let members = self.topology.members(id);
        for member in &members {
            let member = self.topology.name(*member);
            self.resize_overruling(&member, size_bytes, overruled)?;
        }
        self.action([id], move |staged| {
            Box::pin(async move {
                let placed = staged.topology.at(id);
                let (open, wired) = (placed.node.open.clone(), &staged.wired[&id]);
                let (children, before) = (wired.children.clone(), wired.info.size_bytes);
                reserve_above(&staged.topology, id, before, size_bytes)?;
                if !members.is_empty() {
                    return Ok(undo(|| {}));
                }
                open.resize(&children, size_bytes).await.map_err(|error| error.at(&name))?;
                let back: Undo = Box::new(move || {
                    Box::pin(async move {
                        if let Err(error) = open.resize(&children, before).await {
                            tracing::error!("undo of a resize: {error}");
                        }
                    })
                });
                Ok(back)
            })
        });
        Ok(())
    }

    /// Nodes that read through this one, themselves or by filters, would see another size; unless nobody uses them.
    fn check_resize_of_nodes(&self, id: NodeId, overruled: &[String]) -> Result<()> {
        let granted = permission::compute(&self.topology)?;
        let mut below = vec![id];
        while let Some(node) = below.pop() {
            for parent in self.topology.parents(node) {
                let Parent::Node(above, child) = &parent else { continue };
                let role =
                    self.topology.at(*above).children.iter().find(|c| c.name == *child).map(|c| c.role);
                let unused = granted.get(above).is_some_and(Granted::is_unused);
                let named = overruled.iter().any(|name| **name == *self.topology.name(*above));
                match role {
                    // What keeps a point in time keeps its size.
                    Some(Role::Filtered) if !self.topology.copies(*above) => below.push(*above),
                    Some(Role::Data) => {}
                    Some(Role::Backing) if unused => {}
                    _ if named => {}
                    _ => {
                        let user = self.topology.describe(&parent);
                        let message = format_args!("{user} does not share 'resize'");
                        return Err(Error::new(Kind::Busy, message).at(&self.topology.name(id)));
                    }
                }
            }
        }
        Ok(())
    }

    /// Roots above through filters and drives must share the resize too.
    fn check_resize_of_roots(&self, id: NodeId) -> Result<()> {
        for attached in self.topology.roots.values() {
            let top = self.topology.root_node(attached);
            let above = self.topology.skip_filters(top) == id || self.topology.reach(id).contains(&top);
            if above && !attached.shares.contains(Permissions::RESIZE) {
                let message = format_args!("{} does not share 'resize'", attached.root.user());
                return Err(Error::new(Kind::Busy, message).at(&self.topology.name(id)));
            }
        }
        Ok(())
    }
}

/// What keeps the bitmaps of a node and of those above that show its size gets room for the new size first: then the resize
/// cannot lose a bitmap to a full disk.
fn reserve_above(topology: &Topology, id: NodeId, before: u64, size_bytes: u64) -> Result<()> {
    for placed in topology.nodes.values() {
        if topology.reach(placed.node.id).contains(&id) {
            for bitmap in placed.node.bitmaps.lock().iter().filter(|bitmap| bitmap.length() == before) {
                bitmap.reserve(size_bytes).map_err(|error| Error::from(error).at(&placed.node.name))?;
            }
        }
    }
    Ok(())
}

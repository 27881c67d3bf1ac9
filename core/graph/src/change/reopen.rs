//! A node takes new options, and other children, in its place.
//!
//! ```text
//!   parent ─▶ node (old options) ─▶ child      parent ─▶ node (new options) ─▶ another child
//! ```
//!
//! The node keeps its name, its bitmaps and its parents. While nothing is in flight its driver takes the new options, or opens
//! another instance beside the old one, which is closed once nothing can fail any more. An error takes all of it back.

use super::{Change, Undo, undo};
use crate::{
    definition::{ChildDefinition, Definition},
    driver::{BoxFuture, DriverKind, OpenArgs, OpenChild, OpenNode, Reopened, Role},
    error::{Error, Kind, Result},
    node::{Node, NodeId},
    topology::ChildEdge,
    wiring::{wire, wire_one},
};
use driveline_bitmap::Bitmap;
use std::sync::Arc;

impl Change {
    /// Gives a node that is there a new set of options: what the definition leaves out is at its default again. A child that
    /// is named is the one from then on; one that is defined in place must be there already, and is reopened with it.
    ///
    /// Errors: an option that its driver cannot change, by name; a child that is left out although the node has it; a cycle.
    pub fn reopen(&mut self, definition: Definition) -> Result<()> {
        let Some(name) = definition.name.clone() else {
            return Err(Error::new(Kind::Invalid, "node-name not specified"));
        };
        let id = self.topology.id(&name)?;
        let mut closing = Vec::new();
        self.reopen_at(id, definition, None, &mut closing).map_err(|error| error.at(&name))?;
        closing.reverse();
        self.set_read_only_of(closing, true);
        Ok(())
    }

    /// Nodes that are to be read-only go into `closing`, children first: each still writes what it holds back into its own.
    fn reopen_at(
        &mut self,
        id: NodeId,
        definition: Definition,
        above_read_only: Option<bool>,
        closing: &mut Vec<NodeId>,
    ) -> Result<()> {
        let placed = self.topology.at(id).clone();
        if definition.driver != placed.node.driver_name() {
            return Err(cannot_change("driver"));
        }
        // What has become read-only by itself stays so: why it did may still be there.
        let by_itself = definition.common.auto_read_only && placed.read_only;
        let read_only = definition.read_only.or(above_read_only).unwrap_or(by_itself);
        if definition.common.force_share && !read_only {
            let text = "force-share=on can only be used with read-only images";
            return Err(Error::new(Kind::Invalid, text));
        }
        if definition.common.active != placed.common.active {
            return Err(cannot_change("active"));
        }
        placed.node.driver.check(&definition.options)?;
        let mut children = placed.children.clone();
        let mut said = Vec::new();
        for (spec, child) in definition.children {
            said.push(spec.name.clone());
            let there = children.iter().position(|edge| edge.name == spec.name);
            let node = match child {
                ChildDefinition::Null => None,
                ChildDefinition::Node(child) => {
                    let node = self.topology.id(&child).map_err(|error| error.key(&spec.name))?;
                    if self.topology.reach(node).contains(&id) {
                        let (child, own) = (self.topology.name(node), self.topology.name(id));
                        let text = format_args!(
                            "Making '{child}' a {} child of '{own}' would create a cycle",
                            spec.name
                        );
                        return Err(Error::new(Kind::Invalid, text));
                    }
                    Some(node)
                }
                ChildDefinition::Inline(inner) => {
                    let own = there.map(|at| children[at].node).filter(|own| self.topology.at(*own).implicit);
                    let Some(own) = own else { return Err(cannot_change(&format!("{}.driver", spec.name))) };
                    if inner.name.as_deref().is_some_and(|name| *name != *self.topology.name(own)) {
                        return Err(cannot_change("node-name"));
                    }
                    let below_read_only = read_only || spec.role == Role::Backing;
                    self.reopen_at(own, *inner, Some(below_read_only), closing).map_err(|error| {
                        let key = format!("{}.{}", spec.name, error.option().unwrap_or_default());
                        error.key(key.trim_end_matches('.'))
                    })?;
                    Some(own)
                }
            };
            children.retain(|edge| edge.name != spec.name);
            children.extend(node.map(|node| ChildEdge { name: spec.name, role: spec.role, node }));
        }
        if let Some(left_out) =
            children.iter().find(|edge| edge.role == Role::Backing && !said.contains(&edge.name))
        {
            let text = format_args!("{} is missing for '{}'", left_out.name, placed.node.name);
            return Err(Error::new(Kind::Invalid, text));
        }
        let specs = &placed.node.driver.description().children;
        children.sort_by_key(|edge| specs.iter().position(|spec| spec.name == edge.name));
        let new_children = children != placed.children;
        let filter = self.topology.filtered(id).is_some();
        let options = definition.options;
        let there = self.topology.nodes.get_mut(&id).expect("it was looked up above");
        there.children = children;
        there.common = definition.common;
        if options != placed.node.options || filter && new_children {
            self.reopen_driver(id, options);
        }
        if read_only {
            closing.push(id);
        } else {
            self.set_read_only_of(vec![id], false);
        }
        Ok(())
    }

    /// The driver takes other options, while nothing is in flight.
    fn reopen_driver(&mut self, id: NodeId, options: crate::Options) {
        let (trace, directory) = (self.graph.0.trace, self.directory.clone());
        let closing = self.replaced.clone();
        let children_before = self.before.wired.get(&id).map(|wired| wired.children.clone());
        self.action([id], move |staged| {
            Box::pin(async move {
                let placed = staged.topology.at(id).clone();
                let node = &placed.node;
                // A filter leaves its children as they shall be found before another instance looks at them, and never while
                // that one writes to them.
                let settled = match &children_before {
                    Some(children)
                        if node.driver.description().kind == DriverKind::Filter
                            && !placed.was_read_only(&staged.before) =>
                    {
                        node.open.set_read_only(children, true).await.map_err(|e| e.at(&node.name))?;
                        Some((node.open.clone(), children.clone()))
                    }
                    _ => None,
                };
                let wired = wire(&staged.topology, trace);
                let args = OpenArgs {
                    node_name: &node.name,
                    cookie: id.0,
                    options: &options,
                    children: wired[&id].children.clone(),
                    read_only: placed.was_read_only(&staged.before),
                    directory: &directory,
                };
                let reopened = node.driver.reopen(&node.open, &node.options, args).await;
                let Reopened { open, undo: take_back, close_old } = match reopened {
                    Ok(reopened) => reopened,
                    Err(error) => {
                        unsettle(settled).await;
                        return Err(error.at(&node.name));
                    }
                };
                let new = Arc::new(Node {
                    id,
                    name: node.name.clone(),
                    driver: node.driver.clone(),
                    open: open.clone(),
                    options,
                    bitmaps: node.bitmaps.clone(),
                    ranges: node.ranges.clone(),
                    info: Default::default(),
                    failed: Default::default(),
                    threshold: node.threshold.clone(),
                });
                let placed = staged.topology.nodes.get_mut(&id).expect("it was looked up above");
                let old = std::mem::replace(&mut placed.node, new);
                let children = wired[&id].children.clone();
                staged.wired.extend(wire(&staged.topology, trace));
                if close_old {
                    // With the children that it had.
                    closing.lock().push((old, children_before.unwrap_or_else(|| children.clone())));
                }
                let back: Undo = Box::new(move || -> BoxFuture<'static, ()> {
                    Box::pin(async move {
                        take_back();
                        if close_old && let Err(error) = open.close(&children).await {
                            tracing::warn!("closing after a failed change: {error}");
                        }
                        unsettle(settled).await;
                    })
                });
                Ok(back)
            })
        });
    }

    // ---- active or not

    /// Makes a node active or inactive, with what is below it. An inactive node holds no locks, takes no writes, and has written
    /// everything: another program may use its files. One that becomes active reads anew what that may have changed.
    ///
    /// Errors: it has an active parent, or a user that writes.
    pub fn set_active(&mut self, name: &str, active: bool) -> Result<()> {
        let id = self.topology.id(name)?;
        if !active && self.has_active_parent(id, &[]) {
            return Err(Error::new(Kind::NotPermitted, "Node has active parent node"));
        }
        for id in self.switched(id, active) {
            let writable = !self.topology.at(id).read_only;
            self.topology.nodes.get_mut(&id).expect("it is there").common.active = active;
            if active {
                self.refresh(id);
                self.doubt_bitmaps(id);
            }
            if writable {
                self.switch_read_only(id, !active);
            }
        }
        Ok(())
    }

    /// The nodes that [`Change::set_active`] would make active or inactive now, by name and in its order.
    pub fn switched_by(&self, name: &str, active: bool) -> Result<Vec<String>> {
        let id = self.topology.id(name)?;
        let switched = self.switched(id, active).into_iter();
        Ok(switched.map(|id| self.topology.at(id).node.name().to_owned()).collect())
    }

    fn switched(&self, id: NodeId, active: bool) -> Vec<NodeId> {
        let reach = self.topology.reach(id);
        let mut order: Vec<NodeId> =
            self.topology.top_down().into_iter().filter(|id| reach.contains(id)).collect();
        if active {
            order.reverse();
        }
        let mut switched = Vec::new();
        for id in order {
            // What another, active parent uses stays active.
            let is_kept = !active && self.has_active_parent(id, &switched);
            if self.topology.at(id).common.active != active && !is_kept {
                switched.push(id);
            }
        }
        switched
    }

    /// Is there an active parent, besides those that become inactive?
    fn has_active_parent(&self, id: NodeId, besides: &[NodeId]) -> bool {
        let mut nodes = self.topology.nodes.iter();
        nodes.any(|(parent, placed)| {
            let uses = || placed.children.iter().any(|child| child.node == id);
            placed.common.active && !besides.contains(parent) && uses()
        })
    }

    fn refresh(&mut self, id: NodeId) {
        let trace = self.graph.0.trace;
        self.action([id], move |staged| {
            Box::pin(async move {
                let placed = staged.topology.at(id);
                // Wired anew: what is below may be longer by now, and an edge says what it was when it was made.
                let children = wire_one(&staged.topology, id, trace).children;
                placed.node.open.refresh(&children).await.map_err(|error| error.at(&placed.node.name))?;
                Ok(undo(|| {}))
            })
        });
    }

    /// What another program wrote meanwhile is in no bitmap: all of a node that becomes active may have changed.
    fn doubt_bitmaps(&mut self, id: NodeId) {
        self.action([id], move |staged| {
            Box::pin(async move {
                let mut bitmaps: Vec<Arc<Bitmap>> =
                    staged.topology.at(id).node.bitmaps.lock().iter().cloned().collect();
                bitmaps.retain(|bitmap| bitmap.is_recording());
                let doubt = |bitmap: Arc<Bitmap>| {
                    let bits = bitmap.recording_bits().clone();
                    bitmap.mark_unconditionally(0..bitmap.length());
                    (bitmap, bits)
                };
                let saved: Vec<_> = bitmaps.into_iter().map(doubt).collect();
                Ok(undo(move || saved.into_iter().for_each(|(bitmap, bits)| drop(bitmap.restore(&bits)))))
            })
        });
    }

    // ---- the rest

    /// Tells once of a write to a node that ends behind that offset ([`Event::WriteThreshold`](crate::Event)); 0: of none.
    pub fn set_write_threshold(&mut self, node: &str, bytes: u64) -> Result<()> {
        let id = self.topology.id(node)?;
        self.action([id], move |staged| {
            Box::pin(async move {
                let threshold = staged.topology.at(id).node.threshold.clone();
                let before = threshold.set(bytes);
                Ok(undo(move || {
                    threshold.set(before);
                }))
            })
        });
        Ok(())
    }

    /// Makes the roots of a user lead to another node, and follow that node's place from then on. Roots that stay at their
    /// node are no such users.
    ///
    /// Errors: [`Kind::NotFound`] if the user has no root that can follow.
    pub fn replace_under_user(&mut self, user: &str, node: &str) -> Result<()> {
        let id = self.topology.id(node)?;
        let mut found = false;
        for attached in self.topology.roots.values_mut() {
            let stays = matches!(attached.to, crate::topology::Attachment::Node(_));
            if attached.root.user() == user && !stays {
                attached.to = crate::topology::Attachment::Place(id);
                found = true;
            }
        }
        if found {
            return Ok(());
        }
        Err(Error::new(Kind::NotFound, format_args!("there is no {user} that could be given another node")))
    }

    /// Writes another backing file into the header of an image, and leaves the graph as it is. An image that is read-only is
    /// written to all the same.
    pub fn set_backing_file(&mut self, node: &str, file: &str) -> Result<()> {
        let id = self.topology.id(node)?;
        let placed = self.topology.at(id);
        let Some((_, format)) = placed.node.open.backing_file() else {
            let text = "not allowing backing file change on an image without a backing file";
            return Err(Error::new(Kind::Invalid, text));
        };
        let (read_only, file) = (placed.read_only, file.to_owned());
        if read_only {
            self.set_read_only(node, false)?;
        }
        self.write_backing_file(id, Some((file, format)));
        if read_only {
            self.set_read_only(node, true)?;
        }
        Ok(())
    }
}

/// An instance that was settled goes on after all.
async fn unsettle(settled: Option<(Arc<dyn OpenNode>, Vec<OpenChild>)>) {
    if let Some((open, children)) = settled
        && let Err(error) = open.set_read_only(&children, false).await
    {
        tracing::error!("undo of a graph change: {error}");
    }
}

fn cannot_change(option: &str) -> Error {
    Error::new(Kind::NotSupported, format_args!("Cannot change the option '{option}'"))
}

/// For a driver that can change no option: names the first that differs.
pub fn refuse_changes(before: &crate::Options, after: &crate::Options) -> Result<()> {
    let keys = after.keys().chain(before.keys().filter(|key| !after.contains_key(*key)));
    let mut differing = keys.filter(|key| before.get(*key) != after.get(*key));
    differing.next().map_or(Ok(()), |key| Err(cannot_change(key)))
}

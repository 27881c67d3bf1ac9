//! The part of a backing chain that a job works on.

use driveline_graph::{Error, Filenames, Kind, Layout, NodeView, Result};
use std::sync::Arc;

/// A stretch of a chain: from `top` down to just above `base`.
#[derive(Clone, Debug)]
pub(crate) struct Chain {
    /// The format nodes, the upper one first, without `base`.
    pub(crate) layers: Vec<Arc<str>>,
    /// The format node below them.
    pub(crate) base: Option<Arc<str>>,
}

impl Chain {
    /// From `top` down to above `base`; without a base, to the end.
    pub(crate) fn find(layout: &Layout, top: &str, base: Option<&str>) -> Result<Self> {
        let nodes = layout.chain(top)?;
        let base = match base {
            None => None,
            // A filter above the base stands for it.
            Some(base) => Some(layout.chain(base)?.remove(0)),
        };
        let names: Vec<Arc<str>> = nodes.iter().map(|node| node.name().into()).collect();
        let end = match &base {
            None => names.len(),
            Some(base) => match names.iter().position(|name| **name == *base.name()) {
                Some(0) => {
                    let message = format_args!("'{}' cannot be base of itself", names[0]);
                    return Err(Error::new(Kind::Invalid, message));
                }
                Some(at) => at,
                None => {
                    let message = format_args!(
                        "'{}' is not in the backing chain of '{top}' ({})",
                        base.name(),
                        names.join(" -> ")
                    );
                    return Err(Error::new(Kind::Invalid, message));
                }
            },
        };
        Ok(Self { layers: names[..end].to_vec(), base: names.get(end).cloned() })
    }

    /// The node below them, as the lowest layer refers to it now: a filter, if one is on top of the base. Filters may have
    /// come and gone there since the job began.
    pub(crate) fn below(&self, layout: &Layout) -> Result<Option<Arc<str>>> {
        if self.base.is_none() {
            return Ok(None);
        }
        let lowest = layout.view_node(self.layers.last().expect("a chain has a top"))?;
        let backing = lowest.children.iter().find(|child| child.name == "backing");
        Ok(backing.map(|child| child.node.clone()))
    }

    pub(crate) fn top(&self) -> &Arc<str> {
        &self.layers[0]
    }

    /// Is a depth that block_status of `top` reports in one of the layers?
    pub(crate) fn holds(&self, depth: u32) -> bool {
        depth >= 1 && depth as usize <= self.layers.len()
    }
}

/// What an image above writes into its header to name a node: the file, or what else says all about it, and the format.
pub fn file_and_format(layout: &Layout, node: &str) -> Result<(String, String)> {
    let names = Filenames::of(layout.nodes());
    let first = layout.chain(node)?.remove(0);
    let view = names
        .get(first.name())
        .ok_or_else(|| Error::new(Kind::NotFound, "it is not in the graph").at(node))?;
    // A leaf that is referred to without a format above it holds raw data.
    let format = if view.children.is_empty() { "raw" } else { view.node.driver_name() };
    Ok((names.for_header(view), format.to_owned()))
}

/// The node of a chain whose file has that name.
pub(crate) fn by_file(layout: &Layout, device: &str, file: &str) -> Result<String> {
    for node in layout.chain(device)? {
        if file_and_format(layout, node.name())
            .is_ok_and(|(name, _)| name == file || name.ends_with(&format!("/{file}")))
        {
            return Ok(node.name().to_owned());
        }
    }
    Err(Error::new(Kind::NotFound, format_args!("Can't find '{file}' in the backing chain")))
}

/// Nodes whose backing is that node, filters between left out.
pub(crate) fn overlays(layout: &Layout, node: &str) -> Vec<NodeView> {
    let is_overlay = |view: &NodeView| {
        let backing = view.children.iter().find(|child| child.name == "backing");
        backing.is_some_and(|child| layout.chain(&child.node).is_ok_and(|chain| chain[0].name() == node))
    };
    layout.nodes().into_iter().filter(is_overlay).collect()
}

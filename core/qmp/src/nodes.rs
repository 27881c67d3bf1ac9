//! Commands on nodes: what there is, and adding, removing, resizing, and filters put in and taken out.

use crate::{
    changes::{not_found, of_named},
    command::{Done, Nothing},
    control::NodesGoing,
    error::{Error, Result},
    image::{self, BlockDeviceInfo, BlockInfo, Depth},
    monitor::Monitor,
    transaction::{Action, alone},
    translate::Translator,
};
use driveline_bitmap::{Bitmap, View};
use driveline_graph::{BoxFuture, Change, Kind, Layout, Options, Role};
use driveline_jobs::Start;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::sync::Arc;

pub(crate) async fn query_block(monitor: &Monitor, _: Nothing) -> Result<Vec<BlockInfo>> {
    Ok(image::drives(monitor.graph()))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct QueryNamedBlockNodes {
    flat: Option<bool>,
}

pub(crate) async fn query_named_block_nodes(
    monitor: &Monitor,
    query: QueryNamedBlockNodes,
) -> Result<Vec<BlockDeviceInfo>> {
    let depth = if query.flat == Some(true) { Depth::Flat } else { Depth::Chain };
    Ok(image::nodes(monitor.graph(), depth))
}

/// A node as QEMU's clients write it.
#[derive(Deserialize)]
pub(crate) struct BlockdevOptions(Options);

impl Action for BlockdevOptions {
    fn stage<'a>(&'a mut self, monitor: &'a Monitor, start: &'a mut Start) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let change = start.change();
            let name = self.0.get("node-name").and_then(Value::as_str).unwrap_or_default().to_owned();
            if change.node_or_drive(&name).is_ok() {
                return Err(Error::generic(format_args!("Duplicate nodes with node-name='{name}'")));
            }
            // A driver that is missing, or a name that is no string, is said first.
            let options = Translator::in_change(monitor.graph(), change).node(self.0.clone())?;
            if name.is_empty() {
                return Err(Error::generic("'node-name' must be specified for the root node"));
            }
            let definition = change.parse(options).map_err(|error| of_named(&error, &name))?;
            change.add_node(definition).await.map_err(|error| of_named(&error, &name))?;
            Ok(())
        })
    }

    fn adds_nodes(&self) -> bool {
        true
    }
}

pub(crate) async fn blockdev_add(monitor: &Monitor, add: BlockdevOptions) -> Result<Done> {
    alone(monitor, add).await
}

/// Takes a node out that has no persistent bitmaps: putting those away first is a change of its own.
pub(crate) struct BlockdevDel(pub(crate) NodeName);

impl Action for BlockdevDel {
    fn stage<'a>(&'a mut self, _: &'a Monitor, start: &'a mut Start) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let name = &self.0.node_name;
            take_out(start.change(), name, false).map_err(|error| match error.kind() {
                Kind::NotFound => not_found(name),
                _ => error.into(),
            })
        })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct NodeName {
    node_name: String,
}

pub(crate) async fn blockdev_del(monitor: &Monitor, del: NodeName) -> Result<Done> {
    let NodeName { node_name: name } = del;
    let mut going = monitor.control().nodes_going(std::slice::from_ref(&name)).await?;
    let mut change = monitor.graph().change().await;
    let staged = remove_node(&mut *going, &mut change, &name);
    make_with(going, change, staged).await?;
    Ok(Done {})
}

/// Cuts the connections of a node, without waiting for anybody.
pub(crate) async fn yank(monitor: &Monitor, node: NodeName) -> Result<Done> {
    yank_now(monitor, &node)
}

pub(crate) fn yank_now(monitor: &Monitor, node: &NodeName) -> Result<Done> {
    let name = &node.node_name;
    let node = monitor.graph().node(name).map_err(|_| not_found(name))?;
    node.open_node().yank().map_err(|error| error.at(name))?;
    Ok(Done {})
}

fn remove_node(going: &mut dyn NodesGoing, change: &mut Change, name: &str) -> Result<()> {
    let put_away = going.stage(change, name)?;
    take_out(change, name, put_away).map_err(|error| match error.kind() {
        Kind::NotFound => Error::generic(format_args!("Failed to find node with node-name='{name}'")),
        _ => error.into(),
    })
}

/// Makes a change in which bitmaps are put away, unless staging it has failed.
pub(crate) async fn make_with(going: Box<dyn NodesGoing>, change: Change, staged: Result<()>) -> Result<()> {
    let made = match staged {
        Ok(()) => change.make().await.map_err(Error::from),
        Err(error) => {
            change.give_up().await;
            Err(error)
        }
    };
    let ended = going.ended(made.is_ok()).await;
    made?.closed?;
    ended
}

/// Takes a node out, and its own bitmaps with it that are in memory, as in QEMU. Those of a drive are to outlive its nodes: a node
/// that has such stays, and one with persistent bitmaps that this change does not put away.
fn take_out(change: &mut Change, name: &str, put_away: bool) -> driveline_graph::Result<()> {
    let mut bitmaps = change.layout().view_node(name).map(|view| view.bitmaps).unwrap_or_default();
    bitmaps.retain(|bitmap| !(put_away && bitmap.is_persistent()));
    let is_own = |bitmap: &Arc<Bitmap>| bitmap.view() == View::Node && !bitmap.is_persistent();
    if bitmaps.is_empty() && !put_away || !bitmaps.iter().all(is_own) {
        return change.remove_node(name);
    }
    bitmaps.iter().try_for_each(|bitmap| change.remove_bitmap(name, bitmap.name().as_str()))?;
    change.remove_emptied_node(name)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct BlockResize {
    device: Option<String>,
    node_name: Option<String>,
    size: i64,
}

pub(crate) async fn block_resize(monitor: &Monitor, resize: BlockResize) -> Result<Done> {
    let graph = monitor.graph();
    let (device, node) = (resize.device.unwrap_or_default(), resize.node_name.unwrap_or_default());
    let there = |name: &&&str| !name.is_empty() && graph.node_or_drive(name).is_ok();
    let Some(name) = [&*device, &*node].iter().find(there).copied() else {
        let text = format_args!("Cannot find device='{device}' nor node-name='{node}'");
        return Err(Error::generic(text));
    };
    let size =
        u64::try_from(resize.size).map_err(|_| Error::generic("Parameter 'size' expects a >0 size"))?;
    let mut change = graph.change().await;
    change.resize(name, size)?;
    change.commit().await?;
    Ok(Done {})
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct InsertFilter {
    options: Options,
    above: String,
    /// What the filter is called, once it is staged.
    #[serde(skip)]
    name: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Inserted {
    node_name: String,
}

impl Action for InsertFilter {
    fn stage<'a>(&'a mut self, monitor: &'a Monitor, start: &'a mut Start) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            start.change().node_or_drive(&self.above).map_err(|_| Error::no_node(&self.above))?;
            let definition = Translator::in_change(monitor.graph(), start.change())
                .filter(self.options.clone(), "options")?;
            let filter = start.change().insert_filter(definition, &self.above).await?;
            self.name = filter.name().to_owned();
            Ok(())
        })
    }
}

/// Takes a filter out. Bitmaps that a drive has there go to what the filter was put above: they are the drive's, and it still
/// shows that.
pub(crate) struct RemoveFilter(pub(crate) NodeName);

impl Action for RemoveFilter {
    fn stage<'a>(&'a mut self, _: &'a Monitor, start: &'a mut Start) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let name = &self.0.node_name;
            let change = start.change();
            let layout = change.layout();
            let of_drive: Vec<_> = match below_in_drive(&layout, name) {
                Some(below) => {
                    let there = layout.view_node(name).map(|view| view.bitmaps).unwrap_or_default();
                    let of_drive = there.into_iter().filter(|bitmap| bitmap.view() == View::Drive);
                    of_drive.map(|bitmap| (bitmap, below.clone())).collect()
                }
                None => Vec::new(),
            };
            let is_emptied = !of_drive.is_empty();
            for (bitmap, below) in of_drive {
                change.move_bitmap(name, bitmap.name().as_str(), &below)?;
            }
            let removed =
                if is_emptied { change.remove_emptied_filter(name) } else { change.remove_filter(name) };
            removed.map_err(|error| match error.kind() {
                Kind::NotFound => Error::generic(format_args!("Failed to find node with node-name='{name}'")),
                _ => error.into(),
            })
        })
    }
}

/// What is below a filter that is between a drive and its data.
fn below_in_drive(layout: &Layout, filter: &str) -> Option<String> {
    let below = |node: &str| {
        let view = layout.view_node(node).ok()?;
        let child = view.children.iter().find(|child| child.role == Role::Filtered)?;
        Some(child.node.to_string())
    };
    let roots = layout.drives().into_iter().map(|drive| drive.root.to_string());
    let is_on_path =
        |root: String| std::iter::successors(Some(root), |node| below(node)).any(|node| node == filter);
    roots.into_iter().any(is_on_path).then(|| below(filter)).flatten()
}

pub(crate) async fn insert_filter(monitor: &Monitor, mut insert: InsertFilter) -> Result<Inserted> {
    let mut start = monitor.jobs().begin().await;
    let staged = insert.stage(monitor, &mut start).await;
    start.make_if(staged).await?;
    Ok(Inserted { node_name: insert.name })
}

pub(crate) async fn remove_filter(monitor: &Monitor, filter: NodeName) -> Result<Done> {
    alone(monitor, RemoveFilter(filter)).await
}

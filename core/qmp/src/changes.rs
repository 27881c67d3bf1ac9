//! Commands that change what nodes are and where they stand: new options, another node in a place, active or not. Each is
//! staged in a change of the graph, so that a transaction can hold several.

use crate::{
    command::Done,
    control::NodesGoing,
    error::{Class, Error, Result, plain},
    monitor::Monitor,
    nodes::make_with,
    transaction::{Action, alone},
    translate::Translator,
};
use driveline_graph::{BoxFuture, Change, Kind, Options};
use driveline_jobs::Start;
use serde::{Deserialize, Deserializer, de::Visitor};
use serde_json::Value;
use std::fmt;

/// No node of that name, in the words of QEMU's newer commands.
pub(crate) fn not_found(name: &str) -> Error {
    Error::generic(format_args!("Failed to find node with node-name='{name}'"))
}

/// An error about the node that the client named itself: QEMU does not name it again.
pub(crate) fn of_named(error: &driveline_graph::Error, name: &str) -> Error {
    let own = error.node().is_none_or(|node| node == name);
    match (own, error.option()) {
        (true, None) => Error::generic(error.message()),
        // The text names the file already, or the option.
        (true, Some(_)) if error.message().starts_with(|c: char| c.is_uppercase() || c == '\'') => {
            Error::generic(error.message())
        }
        _ => Error::generic(error),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BlockdevReopen {
    options: Vec<Options>,
}

impl Action for BlockdevReopen {
    fn stage<'a>(&'a mut self, monitor: &'a Monitor, start: &'a mut Start) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            for (at, options) in self.options.iter().enumerate() {
                let at = format!("options[{at}]");
                let change = start.change();
                let options = Translator::in_change(monitor.graph(), change).node_at(options.clone(), &at)?;
                let Some(name) = options.get("node-name").and_then(Value::as_str).map(str::to_owned) else {
                    return Err(Error::generic("node-name not specified"));
                };
                if !change.has_node(&name) {
                    return Err(not_found(&name));
                }
                let definition = change.parse(options).map_err(|error| of_named(&error, &name))?;
                change.reopen(definition).map_err(|error| of_named(&error, &name))?;
            }
            Ok(())
        })
    }

    fn explain(&self, _: &Monitor, error: driveline_graph::Error) -> Error {
        let mut names = self.options.iter().rev().filter_map(|options| options.get("node-name")?.as_str());
        match names.next() {
            Some(name) => of_named(&error, name),
            None => error.into(),
        }
    }
}

pub(crate) async fn blockdev_reopen(monitor: &Monitor, reopen: BlockdevReopen) -> Result<Done> {
    alone(monitor, reopen).await
}

/// Whose node is replaced. (Proposed for QEMU on qemu-devel since 2021, by Vladimir Sementsov-Ogievskiy, and not in it: "block:
/// blockdev-replace".)
#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum ParentType {
    /// A drive, by its name: what a guest's device is in QEMU.
    Qdev,
    /// A node, by its name and that of its child.
    Driver,
    /// An export, by its id.
    Export,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct BlockdevReplace {
    parent_type: ParentType,
    new_child: String,
    qdev_id: Option<String>,
    node_name: Option<String>,
    child: Option<String>,
    export_id: Option<String>,
}

impl Action for BlockdevReplace {
    fn stage<'a>(&'a mut self, _: &'a Monitor, start: &'a mut Start) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move { stage_replace(start.change(), self) })
    }
}

pub(crate) async fn blockdev_replace(monitor: &Monitor, replace: BlockdevReplace) -> Result<Done> {
    alone(monitor, replace).await
}

fn stage_replace(change: &mut Change, replace: &BlockdevReplace) -> Result<()> {
    let BlockdevReplace { parent_type, new_child: new, qdev_id, node_name, child, export_id } = replace;
    let (wanted, others) = match parent_type {
        ParentType::Qdev => {
            (&["qdev-id"][..], [("node-name", node_name), ("child", child), ("export-id", export_id)])
        }
        ParentType::Driver => (
            &["node-name", "child"][..],
            [("qdev-id", qdev_id), ("export-id", export_id), ("export-id", export_id)],
        ),
        ParentType::Export => {
            (&["export-id"][..], [("qdev-id", qdev_id), ("node-name", node_name), ("child", child)])
        }
    };
    let given = |name: &str| match name {
        "qdev-id" => qdev_id.as_deref(),
        "node-name" => node_name.as_deref(),
        "child" => child.as_deref(),
        _ => export_id.as_deref(),
    };
    if let Some(missing) = wanted.iter().find(|name| given(name).is_none()) {
        return Err(Error::generic(format_args!("Parameter '{missing}' is missing")));
    }
    if let Some((unexpected, _)) = others.iter().find(|(_, value)| value.is_some()) {
        return Err(Error::generic(format_args!("Parameter '{unexpected}' is unexpected")));
    }
    if !change.has_node(new) {
        return Err(not_found(new));
    }
    match (parent_type, given(wanted[0]), child) {
        (ParentType::Qdev, Some(drive), _) => {
            if !change.has_drive(drive) {
                return Err(Error::new(Class::DeviceNotFound, format_args!("Device '{drive}' not found")));
            }
            change.set_drive(drive, new)?;
        }
        (ParentType::Driver, Some(parent), Some(child)) => {
            if !change.has_node(parent) {
                return Err(not_found(parent));
            }
            change.set_child(parent, child, Some(new)).map_err(|error| of_named(&error, parent))?;
        }
        (ParentType::Export, Some(id), _) => {
            change.replace_under_user(&format!("export '{id}'"), new).map_err(|error| {
                match error.kind() {
                    Kind::NotFound => Error::generic(format_args!("Export '{id}' is not found")),
                    _ => error.into(),
                }
            })?;
        }
        _ => unreachable!("what is missing was said above"),
    }
    Ok(())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct XBlockdevChange {
    parent: String,
    child: Option<String>,
    node: Option<String>,
}

/// Adds a child to a node whose driver takes a list of them (`quorum`), or takes one away.
pub(crate) async fn x_blockdev_change(monitor: &Monitor, args: XBlockdevChange) -> Result<Done> {
    let mut change = monitor.graph().change().await;
    let XBlockdevChange { parent, child, node } = args;
    let at = change.node_or_drive(&parent).map_err(|_| Error::no_node(&parent))?.name().to_owned();
    match (child, node) {
        (Some(_), Some(_)) => {
            return Err(Error::generic("The parameters child and node are in conflict"));
        }
        (None, None) => return Err(Error::generic("Either child or node must be specified")),
        (Some(child), None) => {
            if !change.layout().view_node(&at)?.children.iter().any(|there| there.name == child) {
                return Err(Error::generic(format_args!("Node '{parent}' does not have child '{child}'")));
            }
            change.remove_child(&at, &child).map_err(|error| Error::generic(plain(&error)))?;
        }
        (None, Some(node)) => {
            if !change.has_node(&node) {
                return Err(Error::generic(format_args!("Node '{node}' not found")));
            }
            change.add_child(&at, &node).map_err(|error| Error::generic(plain(&error)))?;
        }
    }
    change.commit().await?;
    Ok(Done {})
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct BlockdevSetActive {
    node_name: Option<String>,
    active: bool,
}

/// Bitmaps that an image keeps go into it as another program may have it, and come out of it as it is ours again.
pub(crate) async fn blockdev_set_active(monitor: &Monitor, set: BlockdevSetActive) -> Result<Done> {
    let mut going = monitor.control().nodes_going(&[]).await?;
    let mut change = monitor.graph().change().await;
    let staged = match &set.node_name {
        Some(name) if !change.has_node(name) => Err(not_found(name)),
        Some(name) => set_active(&mut *going, &mut change, name, set.active),
        // Parents come first, so that each one's parents are inactive when its turn comes.
        None => change
            .layout()
            .nodes()
            .iter()
            .try_for_each(|view| set_active(&mut *going, &mut change, view.node.name(), set.active)),
    };
    make_with(going, change, staged).await?;
    // Those that are read-only are shown.
    monitor.control().nodes_added().await;
    Ok(Done {})
}

fn set_active(going: &mut dyn NodesGoing, change: &mut Change, name: &str, active: bool) -> Result<()> {
    let switched = change.switched_by(name, active)?;
    if !active {
        switched.iter().try_for_each(|node| going.stage_inactive(change, node))?;
    }
    change.set_active(name, active).map_err(|error| of_named(&error, name))?;
    if active {
        switched.iter().try_for_each(|node| going.stage_active(change, node))?;
    }
    Ok(())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct ChangeBackingFile {
    device: String,
    image_node_name: String,
    backing_file: String,
}

pub(crate) async fn change_backing_file(monitor: &Monitor, args: ChangeBackingFile) -> Result<Done> {
    let graph = monitor.graph();
    let ChangeBackingFile { device, image_node_name: node, backing_file } = args;
    let device_node = graph.node_or_drive(&device).map_err(|_| Error::no_node(&device))?;
    if graph.node(&node).is_err() {
        return Err(Error::generic(format_args!("Cannot find device='' nor node-name='{node}'")));
    }
    let in_chain = graph.chain(&device)?.iter().any(|image| image.name() == node);
    let mut change = graph.change().await;
    if in_chain || device_node.name() == node {
        change.set_backing_file(&node, &backing_file).map_err(|error| of_named(&error, &node))?;
    } else {
        let text = "not allowing backing file change on an image without a backing file";
        let has = graph.node(&node)?.open_node().backing_file().is_some();
        let other = format!("'{device}' and image file are not in the same chain");
        return Err(Error::generic(if has { other } else { text.to_owned() }));
    }
    change.commit().await.map_err(|error| of_named(&error, &node))?;
    Ok(Done {})
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct BlockSetWriteThreshold {
    node_name: String,
    write_threshold: u64,
}

pub(crate) async fn block_set_write_threshold(
    monitor: &Monitor,
    set: BlockSetWriteThreshold,
) -> Result<Done> {
    let mut change = monitor.graph().change().await;
    change.set_write_threshold(&set.node_name, set.write_threshold).map_err(|_| {
        let text = format_args!("Device '{}' not found", set.node_name);
        Error::generic(text)
    })?;
    change.commit().await?;
    Ok(Done {})
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct XBlockdevSetIothread {
    node_name: String,
    iothread: StrOrNull,
    #[expect(dead_code, reason = "no node is bound to a thread, so nothing has to be forced")]
    force: Option<bool>,
}

/// Requests run on the thread that they come in on, and nodes are shared by all threads: so there is nothing to move. Names
/// are checked all the same.
pub(crate) async fn x_blockdev_set_iothread(monitor: &Monitor, set: XBlockdevSetIothread) -> Result<Done> {
    monitor.graph().node(&set.node_name).map_err(|_| not_found(&set.node_name))?;
    match &set.iothread.0 {
        Some(name) if monitor.objects().iothread(name).is_err() => {
            Err(Error::generic(format_args!("Cannot find iothread {name}")))
        }
        _ => Ok(Done {}),
    }
}

/// QAPI's `StrOrNull`.
struct StrOrNull(Option<String>);

impl<'de> Deserialize<'de> for StrOrNull {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl Visitor<'_> for Either {
            type Value = StrOrNull;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("StrOrNull")
            }
            fn visit_str<E>(self, text: &str) -> Result<StrOrNull, E> {
                Ok(StrOrNull(Some(text.to_owned())))
            }
            fn visit_unit<E>(self) -> Result<StrOrNull, E> {
                Ok(StrOrNull(None))
            }
        }
        deserializer.deserialize_any(Either)
    }
}

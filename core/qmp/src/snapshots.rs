//! Snapshots: another image on top of a node or drive (`blockdev-snapshot`, `-sync`), or the data kept inside the image
//! (`-internal-sync`, `-delete-internal-sync`). All but the deletion can be actions of a `transaction`: what a snapshot
//! deletes cannot be brought back if another action fails.
//!
//! What is slow comes before anybody waits: the new image is made, opened and durable, and what was written to the old one
//! is written back. Files that were made are removed again if nothing comes of it; QEMU leaves them.
//!
//! On a drive's name the image is kept that the drive shows: filters stay on the drive. On a node's name the overlay is put
//! on that very node.
//!
//! Source: QEMU qapi/block-core.json, `BlockdevSnapshot`, `BlockdevSnapshotSync`, `BlockdevSnapshotInternal`.

use crate::{
    command::Done,
    error::{Error, Result, plain},
    image::{self, SnapshotInfo},
    monitor::Monitor,
    transaction::{Action, alone},
};
use driveline_graph::{BoxFuture, CreatedImage, NewImage, Node, Options, Snapshot, check_name};
use driveline_jobs::Start;
use serde::Deserialize;
use serde_json::json;
use std::sync::Arc;

/// `blockdev-snapshot`: a node that is there goes on top.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BlockdevSnapshot {
    node: String,
    overlay: String,
}

impl Action for BlockdevSnapshot {
    fn stage<'a>(&'a mut self, _: &'a Monitor, start: &'a mut Start) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let change = start.change();
            for name in [&self.node, &self.overlay] {
                change.node_or_drive(name).map_err(|_| Error::no_node(name))?;
            }
            change.snapshot(&self.node, &self.overlay).map_err(in_qemus_words)
        })
    }
}

/// Where the image of `blockdev-snapshot-sync` comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum NewImageMode {
    /// It is there.
    Existing,
    /// It is made, and names the old one by its absolute path.
    #[default]
    AbsolutePaths,
}

/// `blockdev-snapshot-sync`: an image goes on top that is made, or opened, for that.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct BlockdevSnapshotSync {
    device: Option<String>,
    node_name: Option<String>,
    snapshot_file: String,
    snapshot_node_name: Option<String>,
    format: Option<String>,
    #[serde(default)]
    mode: NewImageMode,
    /// What was made, until it is known that it stays.
    #[serde(skip)]
    made: Option<CreatedImage>,
}

impl Action for BlockdevSnapshotSync {
    fn stage<'a>(&'a mut self, monitor: &'a Monitor, start: &'a mut Start) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let (device, node) = (self.device.as_deref(), self.node_name.as_deref());
            let mut named = [device, node].into_iter().flatten();
            let there = |name: &&str| start.change().node_or_drive(name).is_ok();
            let Some(target) = named.find(there).map(str::to_owned) else {
                let (device, node) = (device.unwrap_or_default(), node.unwrap_or_default());
                let text = format_args!("Cannot find device='{device}' nor node-name='{node}'");
                return Err(Error::generic(text));
            };
            match &self.snapshot_node_name {
                None if node.is_some() => return Err(Error::generic("New overlay node-name missing")),
                Some(name) => {
                    if start.change().node_or_drive(name).is_ok() {
                        return Err(Error::generic("New overlay node-name already in use"));
                    }
                    let invalid = |_| Error::generic(format_args!("Invalid node-name: '{name}'"));
                    check_name(name).map_err(invalid)?;
                }
                None => {}
            }
            let layout = start.layout();
            let old = layout.chain(&target)?.remove(0);
            let format = self.format.clone().unwrap_or_else(|| "qcow2".to_owned());
            if self.mode == NewImageMode::AbsolutePaths {
                let backing = image::filename(&layout, old.name()).ok_or_else(|| Error::no_node(&target))?;
                let new = NewImage {
                    path: self.snapshot_file.clone(),
                    format: format.clone(),
                    size_bytes: layout.size_bytes(old.name())?,
                    backing: Some((backing, Some(old.driver_name().to_owned()))),
                };
                let made = monitor.graph().create_image(&new).await;
                self.made = Some(made.map_err(|error| Error::generic(plain(&error)))?);
            }
            let mut file = Options::new();
            file.insert("driver".into(), "file".into());
            file.insert("path".into(), self.snapshot_file.clone().into());
            if image::is_direct(&layout, old.name()) == Some(true) {
                file.insert("cache".into(), "none".into());
            }
            let mut overlay = Options::new();
            overlay.insert("driver".into(), format.clone().into());
            overlay.extend(self.snapshot_node_name.clone().map(|name| ("node-name".into(), name.into())));
            overlay.insert("file".into(), file.into());
            overlay.insert("discard".into(), image::discard_of(&layout, old.name()).into());
            overlay.insert("backing".into(), json!(null));
            let unknown = |_| Error::generic(format_args!("Unknown driver '{format}'"));
            let driver = monitor.graph().driver(&format).map_err(unknown)?;
            if !driver.description().children.iter().any(|spec| spec.name == "backing") {
                return Err(Error::generic("The overlay does not support backing images"));
            }
            let definition = monitor.graph().parse(overlay, &[])?;
            let overlay = start.change().add_node(definition).await?.name().to_owned();
            start.change().snapshot(&target, &overlay).map_err(in_qemus_words)
        })
    }

    fn adds_nodes(&self) -> bool {
        true
    }

    fn made<'a>(&'a mut self, _: &'a Monitor) -> BoxFuture<'a, ()> {
        self.made = None;
        Box::pin(async {})
    }

    fn undo<'a>(&'a mut self, _: &'a Monitor) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            if let Some(Err(error)) = self.made.take().map(CreatedImage::remove) {
                tracing::warn!(target: "driveline::qmp", "a snapshot that was not taken: {error}");
            }
        })
    }
}

/// `blockdev-snapshot-internal-sync`: the data is kept inside the image.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct InternalSnapshot {
    device: String,
    name: String,
}

impl Action for InternalSnapshot {
    fn stage<'a>(&'a mut self, _: &'a Monitor, start: &'a mut Start) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let (device, name) = (&self.device, &self.name);
            let image = image_of(start, device)?;
            if start.layout().view_node(image.name())?.read_only {
                return Err(Error::generic(format_args!("Device '{device}' is read only")));
            }
            if !has_snapshots(&image) {
                let format = image.driver_name();
                let text = format_args!(
                    "Block format '{format}' used by device '{device}' does not support internal snapshots"
                );
                return Err(Error::generic(text));
            }
            if name.is_empty() {
                return Err(Error::generic("Name is empty"));
            }
            if image.open_node().snapshots().iter().any(|snapshot| snapshot.name == *name) {
                let text = format_args!("Snapshot with name '{name}' already exists on device '{device}'");
                return Err(Error::generic(text));
            }
            start.change().take_internal_snapshot(image.name(), name)?;
            Ok(())
        })
    }
}

/// `blockdev-snapshot-delete-internal-sync`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DeleteInternal {
    device: String,
    id: Option<String>,
    name: Option<String>,
}

pub(crate) async fn blockdev_snapshot(monitor: &Monitor, snapshot: BlockdevSnapshot) -> Result<Done> {
    alone(monitor, snapshot).await
}

pub(crate) async fn blockdev_snapshot_sync(
    monitor: &Monitor,
    snapshot: BlockdevSnapshotSync,
) -> Result<Done> {
    alone(monitor, snapshot).await
}

pub(crate) async fn internal(monitor: &Monitor, snapshot: InternalSnapshot) -> Result<Done> {
    alone(monitor, snapshot).await
}

pub(crate) async fn delete_internal(monitor: &Monitor, delete: DeleteInternal) -> Result<SnapshotInfo> {
    let mut start = monitor.jobs().begin().await;
    let image = image_of(&mut start, &delete.device)?;
    if delete.id.is_none() && delete.name.is_none() {
        return Err(Error::generic("Name or id must be provided"));
    }
    if !has_snapshots(&image) {
        return Err(Error::generic("Failed to get a snapshot list: Operation not supported"));
    }
    let wanted = |snapshot: &Snapshot| {
        delete.id.as_ref().is_none_or(|id| snapshot.id == *id)
            && delete.name.as_ref().is_none_or(|name| snapshot.name == *name)
    };
    let Some(found) = image.open_node().snapshots().into_iter().find(wanted) else {
        let null = || "null".to_owned();
        let (id, name) = (delete.id.unwrap_or_else(null), delete.name.unwrap_or_else(null));
        let device = delete.device;
        let text =
            format_args!("Snapshot with id '{id}' and name '{name}' does not exist on device '{device}'");
        return Err(Error::generic(text));
    };
    let id = found.id.clone();
    let work = move |open: Arc<dyn driveline_graph::OpenNode>, children: Vec<_>| {
        Box::pin(async move { open.delete_snapshot(&children, &id).await }) as BoxFuture<'static, _>
    };
    start.change().visit(image.name(), work)?;
    start.make(driveline_jobs::Completion::Individual).await?;
    Ok(SnapshotInfo::of(&found))
}

/// The image that a drive or node shows.
fn image_of(start: &mut Start, device: &str) -> Result<Arc<Node>> {
    start.change().node_or_drive(device).map_err(|_| Error::no_node(device))?;
    Ok(start.layout().chain(device)?.remove(0))
}

/// Only formats that have a place for them do.
fn has_snapshots(image: &Node) -> bool {
    image.open_node().can_snapshot()
}

/// What QEMU's clients know by its text is said without the node; the rest says where.
fn in_qemus_words(error: driveline_graph::Error) -> Error {
    Error::generic(plain(&error))
}

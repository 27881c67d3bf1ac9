//! Commands on bitmaps. Each is an action in a change of the graph: alone it has a change of its own, and in a
//! `transaction` it shares one with others.

use crate::{
    checkpoints::{refuse_epoch, refuse_new_name},
    command::Done,
    error::{Error, Result},
    monitor::Monitor,
    transaction::{Action, alone},
};
use driveline_bitmap::{Durability, View};
use driveline_graph::{BoxFuture, Change, Kind, NewBitmap};
use driveline_jobs::Start;
use serde::{
    Deserialize, Deserializer,
    de::{self, MapAccess, Visitor},
};
use std::fmt;

/// An action on a bitmap.
pub(crate) trait BitmapAction: Send + Sync {
    /// Puts it into a change.
    fn edit(&self, change: &mut Change) -> Result<()>;

    /// The node or drive and the bitmap that it is about.
    fn about(&self) -> (&str, &str);

    /// What a bitmap is called by it from now on.
    fn new_name(&self) -> Option<&str> {
        None
    }
}

impl<T: BitmapAction> Action for T {
    fn stage<'a>(&'a mut self, monitor: &'a Monitor, start: &'a mut Start) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let (node, name) = self.about();
            refuse_epoch(name)?;
            refuse_of_job(monitor, name)?;
            self.new_name().map_or(Ok(()), |name| refuse_new_name(monitor, name))?;
            let change = start.change();
            change.node_or_drive(node).map_err(|_| Error::no_node(node))?;
            self.edit(change)
        })
    }

    /// Two errors that everybody makes read as in QEMU.
    fn explain(&self, monitor: &Monitor, error: driveline_graph::Error) -> Error {
        let (node, name) = self.about();
        match (error.kind(), monitor.graph().bitmap(node, name)) {
            (Kind::NotFound, Err(_)) => Error::generic(format_args!("Dirty bitmap '{name}' not found")),
            (Kind::Exists, Ok(_)) => {
                let taken = self.new_name().unwrap_or(name);
                Error::generic(format_args!("Bitmap already exists: {taken}"))
            }
            _ => error.into(),
        }
    }
}

/// What a commit or mirror still has to copy is in a bitmap of its own: without it guests' writes would be lost in the end.
pub(crate) fn refuse_of_job(monitor: &Monitor, bitmap: &str) -> Result<()> {
    let job = ["#commit-", "#mirror-"].into_iter().find_map(|prefix| bitmap.strip_prefix(prefix));
    match job.filter(|id| monitor.jobs().get(id).is_ok()) {
        Some(id) => Err(Error::generic(format_args!("Bitmap '{bitmap}' belongs to job '{id}'"))),
        None => Ok(()),
    }
}

/// A bitmap by its node or drive and its name.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BitmapRef {
    pub(crate) node: String,
    pub(crate) name: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Add {
    node: String,
    name: String,
    granularity: Option<u32>,
    persistent: Option<bool>,
    disabled: Option<bool>,
    x_driveline_view: Option<ViewName>,
    x_driveline_durability: Option<DurabilityName>,
}

/// What a persistent bitmap survives.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum DurabilityName {
    Volatile,
    Process,
    Power,
}

impl From<DurabilityName> for Durability {
    fn from(name: DurabilityName) -> Self {
        match name {
            DurabilityName::Volatile => Durability::Volatile,
            DurabilityName::Process => Durability::Process,
            DurabilityName::Power => Durability::Power,
        }
    }
}

/// Whose changes a bitmap records.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum ViewName {
    Drive,
    Node,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Merge {
    node: String,
    target: String,
    bitmaps: Vec<Source>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Move {
    node: String,
    name: String,
    target: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Rename {
    node: String,
    name: String,
    new_name: String,
}

impl BitmapAction for Add {
    fn edit(&self, change: &mut Change) -> Result<()> {
        let durability = match (self.persistent, self.x_driveline_durability) {
            (Some(true), durability) => Some(durability.map_or_else(Durability::default, Into::into)),
            (_, Some(_)) => {
                return Err(Error::generic("'x-driveline-durability' needs 'persistent' to be true"));
            }
            (_, None) => None,
        };
        // A drive's user wants to know what changed on the drive; who names a node wants what changed in the node.
        let layout = change.layout();
        let drive = layout.is_drive(&self.node) && layout.node(&self.node).is_err();
        let view = match self.x_driveline_view {
            Some(ViewName::Drive) => View::Drive,
            Some(ViewName::Node) => View::Node,
            None if drive => View::Drive,
            None => View::Node,
        };
        if self.name.is_empty() {
            return Err(Error::generic("Bitmap name cannot be empty"));
        }
        let granularity = self.granularity.map(u64::from);
        if granularity.is_some_and(|bytes| !bytes.is_power_of_two() || bytes < 512) {
            return Err(Error::generic("Granularity must be power of 2 and at least 512"));
        }
        let recording = self.disabled != Some(true);
        let new = NewBitmap { name: self.name.clone(), granularity, view, recording, durability };
        change.add_bitmap(&self.node, new).map_err(Error::from)
    }

    fn about(&self) -> (&str, &str) {
        (&self.node, &self.name)
    }
}

impl BitmapAction for Merge {
    fn edit(&self, change: &mut Change) -> Result<()> {
        let of = |source: &Source| match source {
            Source::Name(name) => (self.node.clone(), name.clone()),
            Source::Bitmap(BitmapRef { node, name }) => (node.clone(), name.clone()),
        };
        let sources: Vec<_> = self.bitmaps.iter().map(of).collect();
        if let Some((node, _)) = sources.iter().find(|(node, _)| change.node_or_drive(node).is_err()) {
            return Err(Error::no_node(node));
        }
        change.merge_bitmaps(&self.node, &self.target, sources).map_err(Error::from)
    }

    fn about(&self) -> (&str, &str) {
        (&self.node, &self.target)
    }
}

impl BitmapAction for Move {
    fn edit(&self, change: &mut Change) -> Result<()> {
        change.node_or_drive(&self.target).map_err(|_| Error::no_node(&self.target))?;
        change.move_bitmap(&self.node, &self.name, &self.target).map_err(Error::from)
    }

    fn about(&self) -> (&str, &str) {
        (&self.node, &self.name)
    }
}

impl BitmapAction for Rename {
    fn edit(&self, change: &mut Change) -> Result<()> {
        change.rename_bitmap(&self.node, &self.name, &self.new_name).map_err(Error::from)
    }

    fn new_name(&self) -> Option<&str> {
        Some(&self.new_name)
    }

    fn about(&self) -> (&str, &str) {
        (&self.node, &self.name)
    }
}

/// What is done to a bitmap that needs no more than its name.
type Simple = fn(&mut Change, &str, &str) -> driveline_graph::Result<()>;

/// [`Simple`], with the bitmap.
pub(crate) struct Of(pub(crate) BitmapRef, pub(crate) Simple);

impl BitmapAction for Of {
    fn edit(&self, change: &mut Change) -> Result<()> {
        self.1(change, &self.0.node, &self.0.name).map_err(Error::from)
    }

    fn about(&self) -> (&str, &str) {
        (&self.0.node, &self.0.name)
    }
}

pub(crate) async fn add(monitor: &Monitor, add: Add) -> Result<Done> {
    alone(monitor, add).await
}

pub(crate) async fn remove(monitor: &Monitor, bitmap: BitmapRef) -> Result<Done> {
    alone(monitor, Of(bitmap, Change::remove_bitmap)).await
}

pub(crate) async fn clear(monitor: &Monitor, bitmap: BitmapRef) -> Result<Done> {
    alone(monitor, Of(bitmap, Change::clear_bitmap)).await
}

pub(crate) async fn enable(monitor: &Monitor, bitmap: BitmapRef) -> Result<Done> {
    alone(monitor, Of(bitmap, Change::enable_bitmap)).await
}

pub(crate) async fn disable(monitor: &Monitor, bitmap: BitmapRef) -> Result<Done> {
    alone(monitor, Of(bitmap, Change::disable_bitmap)).await
}

pub(crate) async fn populate(monitor: &Monitor, bitmap: BitmapRef) -> Result<Done> {
    alone(monitor, Of(bitmap, Change::populate_bitmap)).await
}

pub(crate) async fn adopt(monitor: &Monitor, bitmap: BitmapRef) -> Result<Done> {
    alone(monitor, Of(bitmap, Change::adopt_bitmap)).await
}

pub(crate) async fn merge(monitor: &Monitor, merge: Merge) -> Result<Done> {
    alone(monitor, merge).await
}

pub(crate) async fn move_to(monitor: &Monitor, moved: Move) -> Result<Done> {
    alone(monitor, moved).await
}

pub(crate) async fn rename(monitor: &Monitor, rename: Rename) -> Result<Done> {
    alone(monitor, rename).await
}

/// QAPI's `BlockDirtyBitmapOrStr`: a bitmap of the same node by name, or one of any node.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    Name(String),
    Bitmap(BitmapRef),
}

impl<'de> Deserialize<'de> for Source {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Source;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("BlockDirtyBitmapOrStr")
            }
            fn visit_str<E>(self, name: &str) -> Result<Source, E> {
                Ok(Source::Name(name.to_owned()))
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Source, A::Error> {
                BitmapRef::deserialize(de::value::MapAccessDeserializer::new(map)).map(Source::Bitmap)
            }
        }
        deserializer.deserialize_any(Either)
    }
}

//! Commands on checkpoints: moments of drives that are kept by name, and what changed between them.

mod lost;
mod view;

pub(crate) use lost::past_lost;
pub(crate) use view::Views;

use self::view::{View, ViewOptions};
use crate::{
    bitmaps::{DurabilityName, refuse_of_job},
    command::Done,
    error::{Error, Result},
    monitor::Monitor,
    transaction::{Action, alone},
};
use driveline_checkpoints::{self as checkpoints, Checkpoint, Epoch, NewCheckpoint};
use driveline_graph::{BoxFuture, Graph, Layout};
use driveline_jobs::Start;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// As many areas in one reply; with more, `next` says where to go on.
const AREAS_MAX: usize = 4096;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Create {
    name: String,
    drives: Vec<String>,
    granularity: Option<u64>,
    persistent: Option<bool>,
    durability: Option<DurabilityName>,
    view: Option<ViewOptions>,
}

impl Action for Create {
    fn stage<'a>(&'a mut self, monitor: &'a Monitor, start: &'a mut Start) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            if self.view.is_some() {
                return Err(Error::generic("A checkpoint with a 'view' cannot be part of a transaction"));
            }
            if self.drives.is_empty() {
                return Err(Error::generic("Parameter 'drives' expects at least one drive"));
            }
            let durability = match (self.persistent, self.durability) {
                (Some(false), Some(_)) => {
                    return Err(Error::generic("'durability' needs 'persistent' to be true"));
                }
                (_, Some(durability)) => Some(durability.into()),
                (Some(true), None) => Some(Default::default()),
                (_, None) => None,
            };
            let graph = monitor.graph();
            for drive in &self.drives {
                graph.node_or_drive(drive).map_err(|_| Error::no_node(drive))?;
                refuse_second(graph, start, drive)?;
                let last = of(graph, drive).pop();
                if let Some(last) =
                    last.filter(|last| last.bitmap.is_persistent() && self.persistent == Some(false))
                {
                    return Err(Error::generic(format_args!(
                        "The checkpoint after '{}' of '{drive}', which is persistent, is persistent as well: expected 'persistent' to be true or absent",
                        last.epoch.checkpoint
                    )));
                }
            }
            let new = NewCheckpoint {
                drives: self.drives.clone(),
                granularity: self.granularity,
                durability,
                ..NewCheckpoint::named(&self.name, "")
            };
            Ok(checkpoints::create(graph, start.change(), &new)?)
        })
    }
}

/// The views of a checkpoint that was made, if it was to have some.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Created {
    #[serde(skip_serializing_if = "Option::is_none")]
    views: Option<Vec<View>>,
}

pub(crate) async fn create(monitor: &Monitor, mut create: Create) -> Result<Created> {
    let views = match create.view.take() {
        Some(options) => Some(view::create(monitor, create, options).await?),
        None => {
            alone(monitor, create).await?;
            None
        }
    };
    Ok(Created { views })
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Release {
    name: String,
}

pub(crate) async fn release(monitor: &Monitor, release: Release) -> Result<Done> {
    view::release(monitor, &release.name).await?;
    Ok(Done {})
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Delete {
    name: String,
    drives: Option<Vec<String>>,
}

impl Action for Delete {
    fn stage<'a>(&'a mut self, monitor: &'a Monitor, start: &'a mut Start) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let graph = monitor.graph();
            let drives = match &self.drives {
                Some(drives) => drives.clone(),
                None => {
                    let has = |drive: &String| {
                        of(graph, drive).iter().any(|kept| kept.epoch.checkpoint == self.name)
                    };
                    targets(graph).into_iter().filter(has).collect()
                }
            };
            if drives.is_empty() {
                return Err(Error::generic(format_args!("Checkpoint '{}' not found", self.name)));
            }
            for drive in &drives {
                graph.node_or_drive(drive).map_err(|_| Error::no_node(drive))?;
                refuse_second(graph, start, drive)?;
                refuse_viewed(monitor, drive, &self.name)?;
                checkpoints::delete(graph, start.change(), drive, &self.name)?;
            }
            Ok(())
        })
    }
}

pub(crate) async fn delete(monitor: &Monitor, delete: Delete) -> Result<Done> {
    alone(monitor, delete).await
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Query {
    drive: Option<String>,
}

/// A checkpoint of one drive.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Shown {
    name: String,
    drive: String,
    /// Seconds since 1970.
    created: u64,
    /// The bitmap of what changed until the next one, or until now.
    bitmap: String,
    /// Bytes that did.
    count: u64,
    granularity: u64,
    recording: bool,
    /// Its view, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    view: Option<View>,
}

pub(crate) async fn query(monitor: &Monitor, query: Query) -> Result<Vec<Shown>> {
    let graph = monitor.graph();
    let drives = match query.drive {
        Some(drive) => {
            graph.node_or_drive(&drive).map_err(|_| Error::no_node(&drive))?;
            vec![drive]
        }
        None => targets(graph),
    };
    let views = monitor.views().lock().clone();
    let views = &views;
    let shown = |drive: String| {
        let kept = of(graph, &drive);
        kept.into_iter().map(move |Checkpoint { epoch, bitmap }| Shown {
            name: epoch.checkpoint.clone(),
            drive: drive.clone(),
            created: epoch.created_s,
            bitmap: bitmap.name().to_string(),
            count: bitmap.bits().dirty_bytes(),
            granularity: bitmap.granularity().bytes(),
            recording: bitmap.is_recording(),
            view: views
                .get(&epoch.checkpoint)
                .and_then(|views| views.iter().find(|view| view.is_of(&drive)))
                .map(|view| lost::looked_at(graph, view)),
        })
    };
    Ok(drives.into_iter().flat_map(shown).collect())
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Delta {
    drive: String,
    from: String,
    to: Option<String>,
    /// A bitmap of this name is made of it at the drive.
    bitmap: Option<String>,
    /// The first byte that is asked for.
    start: Option<u64>,
}

/// What changed.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Changed {
    /// Bytes, in all.
    count: u64,
    granularity: u64,
    /// Areas that changed, in ascending order.
    areas: Vec<Area>,
    /// There are more; this is where they begin.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Area {
    offset: u64,
    length: u64,
}

pub(crate) async fn delta(monitor: &Monitor, delta: Delta) -> Result<Changed> {
    let graph = monitor.graph();
    let drive = &*delta.drive;
    graph.node_or_drive(drive).map_err(|_| Error::no_node(drive))?;
    // A change waits for the one before: no checkpoint is made or deleted meanwhile.
    let mut change = graph.change().await;
    let bits = if let Some(name) = &delta.bitmap {
        refuse_new_name(monitor, name)?;
        let between = (drive, &*delta.from, delta.to.as_deref());
        checkpoints::add_delta(graph, &mut change, between, (drive, name))?;
        change.commit().await?;
        // What was written before the change was made is in it, and so it is told.
        graph.bitmap(drive, name)?.bits().clone()
    } else {
        let bits = checkpoints::delta(graph, drive, &delta.from, delta.to.as_deref())?;
        drop(change);
        bits
    };
    let start = delta.start.unwrap_or(0);
    let mut areas = Vec::new();
    let mut next = None;
    for range in bits.iter_dirty().filter(|range| range.end > start) {
        let offset = range.start.max(start);
        if areas.len() == AREAS_MAX {
            next = Some(offset);
            break;
        }
        areas.push(Area { offset, length: range.end - offset });
    }
    Ok(Changed { count: bits.dirty_bytes(), granularity: bits.granularity().bytes(), areas, next })
}

/// The drives, and nodes that are the root of none: where checkpoints can be.
fn targets(graph: &Graph) -> Vec<String> {
    let drives = graph.drives();
    let of_drives: Vec<_> =
        drives.iter().flat_map(|drive| graph.bitmap_places(&drive.name).unwrap_or_default()).collect();
    let mut targets: Vec<String> = drives.iter().map(|drive| drive.name.to_string()).collect();
    for view in graph.nodes() {
        let is_epoch =
            |bitmap: &&std::sync::Arc<driveline_bitmap::Bitmap>| Epoch::is_name(bitmap.name().as_str());
        let at_drive = |bitmap: &std::sync::Arc<driveline_bitmap::Bitmap>| {
            of_drives.iter().any(|(_, of_drive)| of_drive.id() == bitmap.id())
        };
        if view.bitmaps.iter().filter(is_epoch).any(|bitmap| !at_drive(bitmap)) {
            targets.push(view.node.name().to_owned());
        }
    }
    targets
}

fn of(graph: &Graph, drive: &str) -> Vec<Checkpoint> {
    checkpoints::of_drive(graph, drive).unwrap_or_default()
}

/// An action on checkpoints goes by those that are there, so a second one on the same drive would not know of the first, by
/// whatever name of the drive it comes.
fn refuse_second(graph: &Graph, start: &mut Start, drive: &str) -> Result<()> {
    let images = [graph.layout(), start.layout()].into_iter().filter_map(|layout| image(&layout, drive));
    let images: BTreeSet<String> = images.collect();
    // All of them are heard of, be one known already or not.
    let known = images.into_iter().filter(|image| !start.is_first(format!("checkpoints of {image}"))).count();
    match known {
        0 => Ok(()),
        _ => {
            let text = format_args!("A transaction has at most one action on checkpoints of '{drive}'");
            Err(Error::generic(text))
        }
    }
}

/// The top image of a drive or node, which is the same for all of its names.
fn image(layout: &Layout, drive: &str) -> Option<String> {
    layout.chain(drive).ok()?.first().map(|image| image.name().to_owned())
}

/// A view of a moment that is forgotten would be taken for that of the next checkpoint of the name.
fn refuse_viewed(monitor: &Monitor, drive: &str, checkpoint: &str) -> Result<()> {
    let layout = monitor.graph().layout();
    let has_view = monitor.views().lock().get(checkpoint).is_some_and(|views| {
        // Those that come or go are not in the list.
        let is_of = |view: &View| image(&layout, view.drive()) == image(&layout, drive);
        views.is_empty() || views.iter().any(is_of)
    });
    match has_view {
        true => Err(Error::generic(format_args!(
            "Checkpoint '{checkpoint}' has a view: release it first, with x-driveline-checkpoint-release"
        ))),
        false => Ok(()),
    }
}

/// Bitmaps that are to be called so would be taken for those of checkpoints, or of a job.
pub(crate) fn refuse_new_name(monitor: &Monitor, bitmap: &str) -> Result<()> {
    if Epoch::is_name(bitmap) {
        let text = format_args!("Bitmap name '{bitmap}' is not allowed: only checkpoints have such names");
        return Err(Error::generic(text));
    }
    refuse_of_job(monitor, bitmap)
}

/// Bitmaps of checkpoints are changed by checkpoints alone: a delta would be less than the truth. They may be looked at, and
/// shown by exports.
pub(crate) fn refuse_epoch(bitmap: &str) -> Result<()> {
    match bitmap.parse::<Epoch>() {
        Ok(epoch) => {
            let text = format_args!(
                "Bitmap '{bitmap}' belongs to checkpoint '{}'; use x-driveline-checkpoint-delete",
                epoch.checkpoint
            );
            Err(Error::generic(text))
        }
        Err(_) => Ok(()),
    }
}

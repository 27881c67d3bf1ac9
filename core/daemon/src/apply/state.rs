//! What a file says and what runs, in one form, so that they can be compared.

use crate::{
    config::{Address, BitmapSection, Config, StorePlace},
    exports::NewExport,
};
use driveline_bitmap::{Bitmap, Durability, View};
use driveline_checkpoints::Epoch;
use driveline_graph::{ChildDefinition, Definition, Graph, NodeOptions, NodeView, Options, Result, Role};
use driveline_jobs::HOLDER_DRIVER;
use std::{collections::BTreeMap, sync::Arc};

/// Nodes, drives and exports by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct State {
    pub(crate) nodes: BTreeMap<String, Shape>,
    pub(crate) drives: BTreeMap<String, DriveShape>,
    pub(crate) exports: BTreeMap<String, ExportShape>,
    /// Filters that somebody put in without a name: no file can have them.
    pub(crate) inserted: BTreeMap<String, Inserted>,
}

/// A filter that was put in without a name.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Inserted {
    /// Without what it was put above.
    pub(crate) shape: Shape,
    /// The node, or the drive at whose root it is.
    pub(crate) above: String,
    /// Why it cannot go, if it cannot.
    pub(crate) stays: Option<String>,
}

/// A node without its name, unless it is one that is defined in place and given one.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Shape {
    pub(crate) name: Option<String>,
    pub(crate) driver: String,
    /// `None`: as the node around it.
    pub(crate) read_only: Option<bool>,
    pub(crate) options: Options,
    pub(crate) children: BTreeMap<String, Child>,
}

/// A child of a node.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Child {
    /// A node that has a name of its own.
    Named(String),
    /// One that is defined in place.
    Inside(Box<Shape>),
    /// None, and not what the image says either.
    None,
}

/// A drive.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct DriveShape {
    /// The node that it leads to below its holders.
    pub(crate) root: String,
    pub(crate) bitmaps: BTreeMap<String, BitmapShape>,
    /// Moments that are kept by name. No file says any.
    pub(crate) checkpoints: Vec<String>,
    pub(crate) permanent_holder: bool,
    /// `None`: the program chooses.
    pub(crate) store: Option<StorePlace>,
}

/// A bitmap of a drive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BitmapShape {
    /// `None`: the default of its node.
    pub(crate) granularity: Option<u64>,
    pub(crate) view: View,
    pub(crate) recording: bool,
    pub(crate) durability: Option<Durability>,
}

/// An export, and where it is served.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ExportShape {
    pub(crate) at: Address,
    pub(crate) export: NewExport,
}

impl State {
    /// What a file says. It has been checked.
    pub(crate) fn wanted(config: &Config, graph: &Graph) -> Result<Self> {
        let definitions = config.definitions(graph)?;
        let nodes = definitions.iter().map(|d| (d.name.clone().unwrap_or_default(), Shape::wanted(d)));
        let drive = |drive: &crate::config::DriveSection| {
            let bitmaps = drive.bitmaps.iter().map(|b| (b.name.get_ref().clone(), BitmapShape::wanted(b)));
            let shape = DriveShape {
                root: drive.root.get_ref().clone(),
                bitmaps: bitmaps.collect(),
                checkpoints: Vec::new(),
                permanent_holder: drive.permanent_holder,
                store: drive.store.as_ref().map(|store| store.get_ref().clone()),
            };
            (drive.name.get_ref().clone(), shape)
        };
        let export = |section: &crate::config::ExportSection| {
            let at = section.address.get_ref().clone();
            (section.id.get_ref().clone(), ExportShape { at, export: NewExport::of(section) })
        };
        Ok(Self {
            nodes: nodes.collect(),
            drives: config.drives.iter().map(drive).collect(),
            exports: config.exports.iter().map(export).collect(),
            inserted: BTreeMap::new(),
        })
    }

    /// What runs: nodes that were given a name, all drives, and the exports of a file (`exports`).
    pub(crate) fn running(
        graph: &Graph,
        exports: BTreeMap<String, ExportShape>,
        stores: &BTreeMap<String, StorePlace>,
    ) -> Self {
        let views: BTreeMap<String, NodeView> =
            graph.nodes().into_iter().map(|view| (view.node.name().to_owned(), view)).collect();
        let holders: Vec<String> = graph.drives().iter().map(|drive| holder_of(&drive.name)).collect();
        let own = |view: &&NodeView| {
            let name = view.node.name();
            let for_good = is_holder(view) && holders.iter().any(|holder| holder == name);
            !(view.implicit || is_generated(name) || for_good)
        };
        let nodes = views
            .values()
            .filter(own)
            .map(|view| (view.node.name().to_owned(), Shape::running(view, &views)));
        let drive = |drive: driveline_graph::DriveView| {
            let mut root = drive.root.to_string();
            let mut permanent_holder = false;
            // What the program put there by itself is not in any file.
            while let Some(view) = views.get(&root).filter(|view| !own(view))
                && let Some(below) = view.children.first()
            {
                permanent_holder |= root == holder_of(&drive.name);
                root = below.node.to_string();
            }
            let bitmaps = graph.bitmaps(&drive.name).unwrap_or_default();
            let is_internal = |name: &str| name.starts_with('#') || Epoch::is_name(name);
            let epochs = bitmaps.iter().filter_map(|bitmap| bitmap.name().as_str().parse::<Epoch>().ok());
            let checkpoints = epochs.map(|epoch| epoch.checkpoint).collect();
            let bitmaps = bitmaps.iter().filter(|bitmap| !is_internal(bitmap.name().as_str()));
            let shape = DriveShape {
                root,
                bitmaps: bitmaps.map(|b| (b.name().to_string(), BitmapShape::running(b))).collect(),
                checkpoints,
                permanent_holder,
                store: stores.get(&*drive.name).cloned(),
            };
            (drive.name.to_string(), shape)
        };
        let drives = graph.drives().into_iter().map(drive).collect();
        let inserted = views.values().filter(|view| is_inserted(graph, view));
        let inserted = inserted.map(|view| (view.node.name().to_owned(), Inserted::of(graph, view, &views)));
        Self { nodes: nodes.collect(), drives, exports, inserted: inserted.collect() }
    }
}

impl Inserted {
    fn of(graph: &Graph, view: &NodeView, views: &BTreeMap<String, NodeView>) -> Self {
        let name = view.node.name();
        let mut shape = Shape::running(view, views);
        let filtered = view.children.iter().find(|child| child.role == Role::Filtered);
        if let Some(child) = filtered {
            shape.children.remove(&child.name);
        }
        // What is put above a drive has the drive alone as its parent.
        let at_root = graph.drives().into_iter().find(|drive| {
            let above = |node: &String| Some(views.get(node)?.children.first()?.node.to_string());
            let path = std::iter::successors(Some(drive.root.to_string()), above);
            path.take_while(|node| is_generated(node)).any(|node| node == name)
        });
        let below = || filtered.map(|child| child.node.to_string()).unwrap_or_default();
        let above = at_root.map_or_else(below, |drive| drive.name.to_string());
        let looks = |view: &&NodeView| {
            view.children.iter().any(|child| child.role == Role::PointInTime && *child.node == *name)
        };
        let stays = views.values().find(looks).map(|looking| {
            let users: Vec<&str> = looking.parents.iter().map(String::as_str).collect();
            let users = if users.is_empty() { String::new() } else { format!(" for {}", users.join(", ")) };
            format!("node '{}' shows what it keeps{users}", looking.node.name())
        });
        Self { shape, above, stays }
    }
}

/// Did somebody put this filter in without giving it a name? Those of jobs are their own: holders, and drivers that are not
/// registered.
fn is_inserted(graph: &Graph, view: &NodeView) -> bool {
    let is_registered = |name: &str| {
        let own = Arc::as_ptr(view.node.driver()).cast::<()>();
        graph.driver(name).is_ok_and(|registered| Arc::as_ptr(&registered).cast::<()>() == own)
    };
    view.is_filter()
        && is_generated(view.node.name())
        && !view.implicit
        && !is_holder(view)
        && is_registered(view.node.driver_name())
}

/// The permanent holder of a drive.
pub(crate) fn holder_of(drive: &str) -> String {
    format!("{drive}-holder")
}

fn is_holder(view: &NodeView) -> bool {
    view.node.driver_name() == HOLDER_DRIVER
}

/// A name that the program made up. No file can have it.
fn is_generated(name: &str) -> bool {
    name.starts_with('#')
}

impl Shape {
    /// Does it become read-only by itself, where it has to?
    pub(super) fn is_auto_read_only(&self) -> bool {
        self.options.get("auto-read-only").and_then(serde_json::Value::as_bool).unwrap_or_default()
    }

    fn wanted(definition: &Definition) -> Self {
        let child = |child: &ChildDefinition| match child {
            ChildDefinition::Node(name) => Child::Named(name.clone()),
            ChildDefinition::Null => Child::None,
            ChildDefinition::Inline(inner) => {
                Child::Inside(Box::new(Self { name: inner.name.clone(), ..Self::wanted(inner) }))
            }
        };
        let children = definition.children.iter().map(|(spec, of)| (spec.name.to_string(), child(of)));
        Self {
            name: None,
            driver: definition.driver.clone(),
            read_only: definition.read_only,
            options: with_common(&definition.options, &definition.common),
            children: children.collect(),
        }
    }

    fn running(view: &NodeView, views: &BTreeMap<String, NodeView>) -> Self {
        let child = |of: &driveline_graph::ChildView| {
            let mut below = &views[&*of.node];
            // A filter that somebody put in between is no part of the node.
            while !below.implicit
                && is_generated(below.node.name())
                && below.is_filter()
                && let Some(next) = below.children.iter().find(|child| child.role == Role::Filtered)
            {
                below = &views[&*next.node];
            }
            let name = below.node.name().to_owned();
            let child = if below.implicit {
                let name = (!is_generated(&name)).then_some(name);
                Child::Inside(Box::new(Self { name, ..Self::running(below, views) }))
            } else {
                Child::Named(name)
            };
            (of.name.clone(), child)
        };
        Self {
            name: None,
            driver: view.node.driver_name().to_owned(),
            read_only: Some(view.read_only),
            options: with_common(view.node.options(), &view.common),
            children: view.children.iter().map(child).collect(),
        }
    }
}

/// The options of a node: its driver's, and those that every node takes. Where a driver has a word of its own, that says it.
fn with_common(own: &Options, common: &NodeOptions) -> Options {
    let mut options = own.clone();
    for (key, value) in common.to_options() {
        if !options.contains_key(&key) {
            options.insert(key, value);
        }
    }
    options
}

impl BitmapShape {
    fn wanted(section: &BitmapSection) -> Self {
        let BitmapSection { granularity, view, recording, durability, .. } = section;
        Self { granularity: *granularity, view: *view, recording: *recording, durability: *durability }
    }

    fn running(bitmap: &Bitmap) -> Self {
        Self {
            granularity: Some(bitmap.granularity().bytes()),
            view: bitmap.view(),
            recording: bitmap.is_recording(),
            durability: bitmap.durability(),
        }
    }
}

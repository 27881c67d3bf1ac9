//! What queries say about nodes and drives, in the words of QEMU's schema.
//!
//! Fields that have one value here always (no encryption, no throttling at the drive) are there all the same: the schema
//! promises them. What only Driveline has is prefixed with `x-driveline-`.

use driveline_bitmap::Bitmap;
use driveline_graph::{DriverKind, Graph, Layout, NodeView, Options, Role};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{collections::BTreeMap, os::unix::fs::MetadataExt, sync::Arc};

/// QAPI's `BlockInfo`: a drive.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct BlockInfo {
    device: String,
    r#type: String,
    removable: bool,
    locked: bool,
    inserted: BlockDeviceInfo,
}

/// QAPI's `BlockDeviceInfo`: a node, in QEMU's mixture of dashes and underscores.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct BlockDeviceInfo {
    file: String,
    #[serde(rename = "node-name")]
    node_name: String,
    ro: bool,
    drv: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_file: Option<String>,
    backing_file_depth: u64,
    active: bool,
    encrypted: bool,
    detect_zeroes: DetectZeroes,
    bps: u64,
    bps_rd: u64,
    bps_wr: u64,
    iops: u64,
    iops_rd: u64,
    iops_wr: u64,
    image: ImageInfo,
    cache: CacheInfo,
    write_threshold: u64,
    #[serde(rename = "dirty-bitmaps", skip_serializing_if = "Vec::is_empty")]
    dirty_bitmaps: Vec<DirtyInfo>,
}

/// QAPI's `BlockdevDetectZeroesOptions`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum DetectZeroes {
    Off,
    On,
    Unmap,
}

/// QAPI's `BlockdevCacheInfo`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct CacheInfo {
    writeback: bool,
    direct: bool,
    no_flush: bool,
}

/// QAPI's `ImageInfo`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ImageInfo {
    filename: String,
    format: String,
    virtual_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    actual_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dirty_flag: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    full_backing_filename: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename_format: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    format_specific: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_image: Option<Box<ImageInfo>>,
}

/// QAPI's `BlockDirtyInfo`: a bitmap.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct DirtyInfo {
    name: String,
    count: u64,
    granularity: u64,
    recording: bool,
    busy: bool,
    persistent: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    inconsistent: bool,
    /// `drive` or `node`: whose changes it records.
    x_driveline_view: String,
}

impl DirtyInfo {
    fn of(bitmap: &Arc<Bitmap>) -> Self {
        let info = bitmap.info();
        Self {
            name: info.name.to_string(),
            count: info.count,
            granularity: info.granularity.bytes(),
            recording: info.recording,
            busy: info.busy,
            persistent: info.persistent,
            inconsistent: info.inconsistent,
            x_driveline_view: info.view.to_string(),
        }
    }
}

/// How much is said about what is below a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Depth {
    /// Nothing.
    Flat,
    /// The images below, each within the one above.
    Chain,
}

/// All drives.
pub(crate) fn drives(graph: &Graph) -> Vec<BlockInfo> {
    let views = Views::of(graph);
    let drive = |drive: driveline_graph::DriveView| {
        // One that went away meanwhile is left out.
        let root = views.get(&drive.root)?;
        let inserted = views.device(root, Depth::Chain, graph.bitmaps(&drive.name).unwrap_or_default());
        let device = drive.name.to_string();
        Some(BlockInfo { device, r#type: "unknown".into(), removable: false, locked: false, inserted })
    };
    graph.drives().into_iter().filter_map(drive).collect()
}

/// All nodes, parents first.
pub(crate) fn nodes(graph: &Graph, depth: Depth) -> Vec<BlockDeviceInfo> {
    let views = Views::of(graph);
    // A parked bitmap counts as at its home, too.
    let bitmaps = |view: &NodeView| graph.bitmaps(view.node.name()).unwrap_or_else(|_| view.bitmaps.clone());
    views.order.iter().map(|view| views.device(view, depth, bitmaps(view))).collect()
}

/// Does a node, or what it keeps its data in, go past the page cache? `None` where there is no file below.
pub(crate) fn is_direct(graph: &Graph, node: &str) -> Option<bool> {
    let views = Views::of(graph);
    views.direct(views.get(node)?)
}

/// What an image above names a node by: the file that it is, or shows all of; else its definition.
pub(crate) fn filename(layout: &Layout, node: &str) -> Option<String> {
    let views = Views::from(layout.nodes());
    Some(views.filename(views.get(node)?))
}

/// QAPI's `ImageInfoSpecificQCow2`, of what the driver says.
fn specific_to_qcow2(details: &Value) -> Value {
    let fields = ["compat", "compression-type", "lazy-refcounts", "refcount-bits", "corrupt"];
    let said = fields.iter().filter_map(|field| Some(((*field).to_owned(), details.get(field)?.clone())));
    json!({ "type": "qcow2", "data": said.collect::<Options>() })
}

/// All nodes at one moment.
struct Views {
    order: Vec<NodeView>,
    by_name: BTreeMap<String, usize>,
}

impl Views {
    fn of(graph: &Graph) -> Self {
        Self::from(graph.nodes())
    }

    fn from(order: Vec<NodeView>) -> Self {
        let by_name = order.iter().enumerate().map(|(at, view)| (view.node.name().to_owned(), at)).collect();
        Self { order, by_name }
    }

    fn get(&self, name: &str) -> Option<&NodeView> {
        self.by_name.get(name).map(|at| &self.order[*at])
    }

    fn child(&self, view: &NodeView, is: impl Fn(Role) -> bool) -> Option<&NodeView> {
        view.children.iter().find(|child| is(child.role)).and_then(|child| self.get(&child.node))
    }

    fn backing(&self, view: &NodeView) -> Option<&NodeView> {
        self.child(view, |role| role == Role::Backing)
    }

    /// The image below: a filter's child, or the backing.
    fn below(&self, view: &NodeView) -> Option<&NodeView> {
        self.child(view, |role| matches!(role, Role::Filtered | Role::Backing))
    }

    fn device(&self, view: &NodeView, depth: Depth, bitmaps: Vec<Arc<Bitmap>>) -> BlockDeviceInfo {
        let chain = || std::iter::successors(self.below(view), |view| self.below(view));
        BlockDeviceInfo {
            file: self.filename(view),
            node_name: view.node.name().to_owned(),
            ro: view.read_only,
            drv: view.node.driver_name().to_owned(),
            backing_file: self.backing(view).map(|backing| self.filename(backing)),
            backing_file_depth: if depth == Depth::Flat { 0 } else { chain().count() as u64 },
            active: view.common.active,
            encrypted: false,
            detect_zeroes: DetectZeroes::Off,
            bps: 0,
            bps_rd: 0,
            bps_wr: 0,
            iops: 0,
            iops_rd: 0,
            iops_wr: 0,
            image: self.image(view, depth),
            cache: CacheInfo {
                writeback: true,
                direct: self.direct(view).unwrap_or(false),
                no_flush: view.common.no_flush,
            },
            write_threshold: view.node.write_threshold(),
            dirty_bitmaps: bitmaps.iter().map(DirtyInfo::of).collect(),
        }
    }

    fn image(&self, view: &NodeView, depth: Depth) -> ImageInfo {
        let info = view.node.info();
        let below = self.below(view).filter(|_| depth == Depth::Chain);
        let named = view.node.open_node().backing_file();
        let (backing_filename, backing_filename_format) = named.unzip();
        let backing_filename_format = backing_filename_format.filter(|format| !format.is_empty());
        let details = view.node.open_node().details();
        let qcow2 = view.node.driver_name() == "qcow2";
        ImageInfo {
            filename: self.filename(view),
            format: view.node.driver_name().to_owned(),
            virtual_size: info.size_bytes,
            actual_size: self.actual_size(view),
            dirty_flag: details.get("dirty").and_then(Value::as_bool),
            cluster_size: (info.cluster_bytes > 0).then_some(info.cluster_bytes.into()),
            full_backing_filename: backing_filename
                .is_some()
                .then(|| self.backing(view).map(|backing| self.filename(backing)))
                .flatten(),
            backing_filename,
            backing_filename_format,
            format_specific: qcow2.then(|| specific_to_qcow2(&details)),
            backing_image: below.map(|below| Box::new(self.image(below, depth))),
        }
    }

    /// The file's name where a name says all; else the node's definition as `json:`, as QEMU does.
    fn filename(&self, view: &NodeView) -> String {
        let whole = || format!("json:{}", Value::Object(self.definition(view)));
        self.file_name(view).unwrap_or_else(whole)
    }

    /// The name of the file that a node is, or that it shows all of.
    fn file_name(&self, view: &NodeView) -> Option<String> {
        if let Some(path) = view.node.open_node().filename() {
            return Some(path.to_string_lossy().into_owned());
        }
        let format = view.node.driver().description().kind == DriverKind::Format;
        let window = ["offset", "size"].iter().any(|key| view.node.options().contains_key(*key));
        if format && !window { self.file_name(self.file(view)?) } else { None }
    }

    /// A node's driver, options and children (but for a backing, which the image names).
    fn definition(&self, view: &NodeView) -> Options {
        let mut definition = Options::new();
        definition.insert("driver".into(), view.node.driver_name().into());
        definition.extend(view.node.options().clone());
        for child in view.children.iter().filter(|child| child.role != Role::Backing) {
            if let Some(below) = self.get(&child.node) {
                definition.insert(child.name.clone(), self.definition(below).into());
            }
        }
        definition
    }

    /// What a node keeps its bytes in.
    fn file(&self, view: &NodeView) -> Option<&NodeView> {
        self.child(view, |role| matches!(role, Role::Storage | Role::Data | Role::Filtered))
    }

    fn direct(&self, view: &NodeView) -> Option<bool> {
        match self.file(view) {
            Some(file) => self.direct(file),
            None => {
                view.node.open_node().filename()?;
                Some(view.node.options().get("cache").and_then(Value::as_str) == Some("none"))
            }
        }
    }

    fn actual_size(&self, view: &NodeView) -> Option<u64> {
        match (view.node.open_node().filename(), self.file(view)) {
            // A file that is gone from its folder, or no file at all, has no size to tell.
            (Some(path), _) => std::fs::metadata(path).ok().map(|found| found.blocks() * 512),
            (None, Some(file)) => self.actual_size(file),
            (None, None) => None,
        }
    }
}

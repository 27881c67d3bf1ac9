//! What queries say about nodes and drives, in the words of QEMU's schema.
//!
//! Fields that have one value here always (no encryption, no throttling at the drive) are there all the same: the schema
//! promises them. What only Driveline has is prefixed with `x-driveline-`.

use driveline_bitmap::Bitmap;
use driveline_graph::{DriverKind, Filenames, Graph, Layout, NodeView, Role};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{os::unix::fs::MetadataExt, sync::Arc};

mod specific;

pub(crate) use specific::SnapshotInfo;

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
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    snapshots: Vec<SnapshotInfo>,
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
    let layout = graph.layout();
    // Of all nodes it would take long in a daemon that has many more.
    let views = Views(Filenames::of(layout.nodes_of_drives()));
    let drive = |drive: driveline_graph::DriveView| {
        let root = views.get(&drive.root)?;
        let inserted = views.device(root, Depth::Chain, graph.bitmaps(&drive.name).unwrap_or_default());
        let device = drive.name.to_string();
        Some(BlockInfo { device, r#type: "unknown".into(), removable: false, locked: false, inserted })
    };
    layout.drives().into_iter().filter_map(drive).collect()
}

/// All nodes, parents first.
pub(crate) fn nodes(graph: &Graph, depth: Depth) -> Vec<BlockDeviceInfo> {
    let views = Views::of(graph);
    // A parked bitmap counts as at its home, too.
    let bitmaps = |view: &NodeView| graph.bitmaps(view.node.name()).unwrap_or_else(|_| view.bitmaps.clone());
    views.0.nodes().iter().map(|view| views.device(view, depth, bitmaps(view))).collect()
}

/// Does a node, or what it keeps its data in, go past the page cache? `None` where there is no file below.
pub(crate) fn is_direct(layout: &Layout, node: &str) -> Option<bool> {
    let views = Views(Filenames::of(layout.nodes()));
    views.direct(views.get(node)?)
}

/// What becomes of discards at a node, for one that is made after its pattern.
pub(crate) fn discard_of(layout: &Layout, node: &str) -> &'static str {
    let ignores = layout.view_node(node).is_ok_and(|view| view.common.discard == Some(false));
    if ignores { "ignore" } else { "unmap" }
}

/// What an image above names a node by: the file that it is, or shows all of; else its definition.
pub(crate) fn filename(layout: &Layout, node: &str) -> Option<String> {
    let names = Filenames::of(layout.nodes());
    Some(names.for_header(names.get(node)?))
}

/// All nodes at one moment.
struct Views(Filenames);

impl Views {
    fn of(graph: &Graph) -> Self {
        Self(Filenames::of(graph.nodes()))
    }

    fn get(&self, name: &str) -> Option<&NodeView> {
        self.0.get(name)
    }

    fn filename(&self, view: &NodeView) -> String {
        self.0.filename(view)
    }

    /// The size as it is now. What the graph keeps is of its last change, and a file below a format grows without one, with what
    /// shows it: a filter, whatever children it has beside the first, or a format with that child alone.
    fn size_bytes(&self, view: &NodeView) -> u64 {
        let mut way = vec![view];
        while let Some(NodeView { children, .. }) = way.last()
            && let Some(child) = children.first()
            && (child.role == Role::Filtered || child.role == Role::Data && children.len() == 1)
            && let Some(below) = self.get(&child.node)
        {
            way.push(below);
        }
        let is_leaf = |view: &&NodeView| view.node.driver().description().kind == DriverKind::Protocol;
        let Some(leaf) = way.pop().filter(is_leaf) else { return view.node.info().size_bytes };
        let mut info = leaf.node.open_node().info(&[]);
        while let Some(above) = way.pop() {
            let beside = above.children.iter().skip(1).filter_map(|child| self.get(&child.node));
            let infos: Vec<_> =
                std::iter::once(info).chain(beside.map(|beside| beside.node.info())).collect();
            info = above.node.open_node().info(&infos);
        }
        info.size_bytes
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
            detect_zeroes: match view.common.detect_zeroes {
                driveline_graph::DetectZeroes::Off => DetectZeroes::Off,
                driveline_graph::DetectZeroes::On => DetectZeroes::On,
                driveline_graph::DetectZeroes::Unmap => DetectZeroes::Unmap,
            },
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
        let below = self.below(view).filter(|_| depth == Depth::Chain);
        let open = view.node.open_node();
        let (backing_filename, backing_filename_format) = open.backing_file().unzip();
        let backing_filename_format = backing_filename_format.filter(|format| !format.is_empty());
        let clusters = self.clusters(view);
        ImageInfo {
            filename: self.filename(view),
            format: view.node.driver_name().to_owned(),
            virtual_size: self.size_bytes(view),
            actual_size: self.actual_size(view),
            dirty_flag: clusters.map(|(dirty, _)| dirty),
            cluster_size: clusters.map(|(_, size)| size).filter(|size| *size > 0),
            full_backing_filename: backing_filename.as_ref().map(|named| self.0.full_name(named, view)),
            backing_filename,
            backing_filename_format,
            snapshots: open.snapshots().iter().map(SnapshotInfo::of).collect(),
            format_specific: specific::of(view.node.driver_name(), &open.details()),
            backing_image: below.map(|below| Box::new(self.image(below, depth))),
        }
    }

    /// Does an image have to be repaired, and how large are its clusters (0: it has none)? `None` if the driver says nothing of
    /// the kind. Filters say it of what they are put on.
    fn clusters(&self, view: &NodeView) -> Option<(bool, u64)> {
        match view.node.driver_name() {
            "qcow2" => {
                let details = view.node.open_node().details();
                Some((details.get("dirty")?.as_bool()?, details.get("cluster-size")?.as_u64()?))
            }
            "file" | "host_device" => Some((false, 0)),
            "raw" => self.clusters(self.file(view)?),
            _ if view.is_filter() => self.clusters(self.file(view)?),
            _ => None,
        }
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

    /// The space that its data takes, and what is below it as far as that is its own.
    fn actual_size(&self, view: &NodeView) -> Option<u64> {
        if let Some(path) = view.node.open_node().filename() {
            // A file that is gone from its folder has no size to tell.
            return std::fs::metadata(path).ok().map(|found| found.blocks() * 512);
        }
        match view.node.driver().description().kind {
            DriverKind::Protocol => {
                ["null", "null-co", "null-aio"].contains(&view.node.driver_name()).then_some(0)
            }
            DriverKind::Filter => self.actual_size(self.file(view)?),
            DriverKind::Format => {
                let own = |role| matches!(role, Role::Storage | Role::Data | Role::PointInTime);
                let children = view.children.iter().filter(|child| own(child.role));
                children.map(|child| self.actual_size(self.get(&child.node)?)).sum()
            }
        }
    }
}

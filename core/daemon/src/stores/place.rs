//! The places of bitmaps: an image that can hold some, or a file of their own.

use super::beside;
use crate::config::StorePlace;
use driveline_bitmap::Bitmap;
use driveline_graph::{Error, Graph, Kind, Layout, Node, NodeView, Result};
use driveline_store::{Fingerprint, ImageFile};
use std::{
    collections::BTreeSet,
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Where the bitmaps of a drive are when nobody has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In a qcow2 image.
    Image {
        /// Its node.
        node: String,
        /// Its file, by its absolute path.
        file: PathBuf,
    },
    /// In a file of their own, by its absolute path.
    File(PathBuf),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Image { node, .. } => write!(f, "qcow2:{node}"),
            Place::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}

impl Place {
    /// What the configuration says.
    pub(crate) fn configured(graph: &Graph, place: &StorePlace) -> Result<Self> {
        match place {
            StorePlace::Qcow2(node) => Self::of_image(graph, node),
            StorePlace::File(path) => Ok(Place::File(path.clone())),
        }
    }

    /// As a configuration would say it.
    pub(crate) fn said(&self) -> StorePlace {
        match self {
            Place::Image { node, .. } => StorePlace::Qcow2(node.clone()),
            Place::File(path) => StorePlace::File(path.clone()),
        }
    }

    /// The top image of a drive if that can hold bitmaps, else a file beside the lowest one.
    pub(crate) fn default_for(graph: &Graph, drive: &str) -> Result<Self> {
        let chain = graph.chain(drive)?;
        let top = chain.first().expect("a drive leads to a node");
        if let Ok(place) = Self::of_image(graph, top.name()) {
            return Ok(place);
        }
        // Beside a device is no place for files that outlive the machine's next start.
        let lowest = chain.iter().rev().find_map(|node| file_of(graph, node.name()));
        let lowest = lowest.filter(|file| file.is_file());
        let Some(directory) = lowest.as_deref().and_then(Path::parent) else {
            let message = format_args!(
                "there is no regular file that bitmaps of drive '{drive}' could be kept beside; expected \
                 bitmap-store = \"file:PATH\" in [drive.{drive}]"
            );
            return Err(Error::new(Kind::NotSupported, message));
        };
        Ok(Place::File(directory.join(format!("{drive}.dlbitmaps"))))
    }

    /// An image that is to hold bitmaps.
    ///
    /// Errors: the node is none that can, or is not in a file.
    pub(crate) fn of_image(graph: &Graph, node: &str) -> Result<Self> {
        let view = graph.view_node(node)?;
        let refused = |why: &str| {
            Err(Error::new(Kind::NotSupported, format_args!("it cannot keep bitmaps: {why}")).at(node))
        };
        if view.node.open_node().witness().is_none() {
            return refused("it is no qcow2 image of version 3");
        }
        if view.read_only {
            return refused("it is read-only");
        }
        match file_of(graph, node) {
            Some(file) => Ok(Place::Image { node: node.to_owned(), file }),
            None => refused("it is not in a file, beside which they could be while they are in use"),
        }
    }

    /// The file that has the bitmaps while somebody has them.
    pub(crate) fn store_path(&self) -> PathBuf {
        match self {
            Place::Image { file, .. } => beside(file),
            Place::File(path) => path.clone(),
        }
    }

    /// The node of the image.
    pub(crate) fn node(&self) -> Option<&str> {
        match self {
            Place::Image { node, .. } => Some(node),
            Place::File(_) => None,
        }
    }

    /// Could a bitmap be kept here? An image has limits that are known before it is stored there.
    pub(crate) fn check(&self, bitmap: &Bitmap) -> Result<()> {
        /// Bits of a bitmap in a qcow2 image. Source: QEMU 10.0.2 block/qcow2-bitmap.c, `BME_MAX_PHYS_SIZE`.
        const IMAGE_BYTES_MAX: u64 = 512 << 20;
        let granules = bitmap.length().div_ceil(bitmap.granularity().bytes());
        if let Place::Image { node, .. } = self
            && granules.div_ceil(8) > IMAGE_BYTES_MAX
        {
            let message = format_args!(
                "bitmap '{}' has {granules} granules, and a qcow2 image holds {} of a bitmap at most; expected a \
                 coarser granularity",
                bitmap.name(),
                IMAGE_BYTES_MAX * 8
            );
            return Err(Error::new(Kind::Invalid, message).at(node));
        }
        Ok(())
    }
}

/// The nodes that show what a drive shows: its root, the filters below, and the first node that is none.
pub(crate) fn shown(graph: &Graph, drive: &str) -> Vec<Arc<str>> {
    let layout = graph.layout();
    let find = |name: &str| layout.view_node(name).ok();
    let mut shown = Vec::new();
    let root = layout.drives().into_iter().find(|view| *view.name == *drive).map(|view| view.root);
    let mut at = root.as_deref().and_then(find);
    while let Some(view) = at {
        shown.push(Arc::from(view.node.name()));
        let below = view.children.iter().find(|child| child.role == driveline_graph::Role::Filtered);
        at = below.filter(|_| view.is_filter()).and_then(|child| find(&child.node));
    }
    shown
}

/// The file that the data of a node are in, if they are in one.
pub(crate) fn file_of(graph: &Graph, node: &str) -> Option<PathBuf> {
    file_in(&graph.layout(), node)
}

/// The same, at one moment.
pub(crate) fn file_in(layout: &Layout, node: &str) -> Option<PathBuf> {
    let mut at = layout.view_node(node).ok()?;
    loop {
        if let Some(path) = at.node.open_node().filename() {
            return Some(std::path::absolute(&path).unwrap_or(path));
        }
        let child = at.children.iter().find(|child| child.role != driveline_graph::Role::Backing)?;
        at = layout.view_node(&child.node).ok()?;
    }
}

/// All files of a graph.
pub(crate) fn all_files(graph: &Graph) -> Vec<PathBuf> {
    let file = |view: &NodeView| view.node.open_node().filename();
    let mut files: Vec<PathBuf> = graph.nodes().iter().filter_map(file).collect();
    files.iter_mut().for_each(|path| *path = std::path::absolute(&*path).unwrap_or(std::mem::take(path)));
    files.sort();
    files.dedup();
    files
}

/// All files below a drive or node: those of its images and of their backing files.
pub(crate) fn files_below(graph: &Graph, target: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = leaves_below(graph, target).into_iter().map(|(path, _)| path).collect();
    files.sort();
    files.dedup();
    files
}

/// The same files as they were before this program wrote to them.
pub(crate) fn files_at_open(graph: &Graph, target: &str) -> Fingerprint {
    let of =
        |(path, node): &(PathBuf, Arc<Node>)| Some(ImageFile::of(path, node.open_node().file_at_open()?));
    let mut files: Vec<ImageFile> = leaves_below(graph, target).iter().filter_map(of).collect();
    files.sort_by(|a, b| a.path.cmp(&b.path));
    files.dedup_by(|a, b| a.path == b.path);
    Fingerprint { files }
}

fn leaves_below(graph: &Graph, target: &str) -> Vec<(PathBuf, Arc<Node>)> {
    let layout = graph.layout();
    let Ok(start) = layout.node_or_drive(target) else { return Vec::new() };
    let find = |name: &str| layout.view_node(name).ok();
    let (mut seen, mut leaves) = (BTreeSet::new(), Vec::new());
    let mut rest: Vec<NodeView> = find(start.name()).into_iter().collect();
    while let Some(view) = rest.pop() {
        if seen.insert(view.node.name().to_owned()) {
            let path = view.node.open_node().filename();
            leaves.extend(path.map(|path| (std::path::absolute(&path).unwrap_or(path), view.node.clone())));
            rest.extend(view.children.iter().filter_map(|child| find(&child.node)));
        }
    }
    leaves
}

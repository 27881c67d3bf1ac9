//! Images in files that nothing else uses: without a graph, for tools.

use super::{CheckReport, Qcow2Driver, Repair, check_image};
use crate::{FileDriver, conformance::OpenNodeArgs};
use driveline_graph::{Error, OpenChild, Permissions, Result, Snapshot};
use std::path::Path;

/// Opens a file, with locks that keep others from changing it meanwhile.
async fn open_file(path: &Path, read_only: bool) -> Result<OpenChild> {
    let Some(text) = path.to_str() else {
        return Err(Error::new(driveline_graph::Kind::Invalid, "the name of the file is not UTF-8"));
    };
    let args = OpenNodeArgs { read_only, ..OpenNodeArgs::default() };
    let file = args.open(&FileDriver::default(), serde_json::json!({ "path": text }), vec![]).await?;
    let writes = if read_only { Permissions::NONE } else { Permissions::WRITE.or(Permissions::RESIZE) };
    let needs = Permissions::CONSISTENT_READ.or(writes);
    if let Err(error) = file.node.set_permissions(needs, Permissions::CONSISTENT_READ).await {
        // It is the lock that tells what is wrong.
        let _ = file.node.close(&[]).await;
        return Err(error);
    }
    Ok(file)
}

/// Checks the image in a file, and repairs it as far as asked for: see [`check_image`]. Must run on an engine.
///
/// Errors: also if another program writes to the file, or, for a repair, uses it at all.
pub async fn check_file(path: &Path, repair: Repair) -> Result<CheckReport> {
    let file = open_file(path, repair == Repair::Nothing).await?;
    let report = check_image(&file.edge, repair).await;
    let closed = file.node.close(&[]).await;
    let report = report?;
    closed?;
    Ok(report)
}

/// An image that is open, without its backing file.
struct Image {
    image: OpenChild,
    children: [OpenChild; 1],
}

impl Image {
    async fn open(path: &Path, read_only: bool) -> Result<Self> {
        let children = [open_file(path, read_only).await?];
        let args = OpenNodeArgs { name: "image", read_only, ..OpenNodeArgs::default() };
        let options = serde_json::json!({ "backing": null });
        match args.open(&Qcow2Driver::new(), options, children.to_vec()).await {
            Ok(image) => Ok(Self { image, children }),
            Err(error) => {
                // It is the image that is wrong.
                let _ = children[0].node.close(&[]).await;
                Err(error)
            }
        }
    }

    /// Closes it after something was done that left the data as it was: bitmaps elsewhere stay true.
    async fn close_as_it_was<T>(self, done: Result<T>) -> Result<T> {
        let node = &self.image.node;
        let witnessed = match done {
            Ok(done) if node.witness().is_some_and(|witness| witness.at_open) => {
                node.set_witness(&self.children, true).await.map(|()| done)
            }
            done => done,
        };
        self.close(witnessed).await
    }

    /// Closes it after something was done; what was done comes first.
    async fn close<T>(self, done: Result<T>) -> Result<T> {
        let closed = self.image.node.close(&self.children).await;
        let file_closed = self.children[0].node.close(&[]).await;
        let done = done?;
        closed.and(file_closed)?;
        Ok(done)
    }
}

/// The snapshots inside the image in a file. Must run on an engine, like all of these.
pub async fn snapshots_of_file(path: &Path) -> Result<Vec<Snapshot>> {
    let opened = Image::open(path, true).await?;
    let found = opened.image.node.snapshots();
    opened.close(Ok(found)).await
}

/// Keeps the disk of the image in a file as a snapshot; returns its id.
/// See [`take_snapshot`](driveline_graph::OpenNode::take_snapshot).
pub async fn take_snapshot_of_file(path: &Path, name: &str) -> Result<String> {
    let opened = Image::open(path, false).await?;
    let id = opened.image.node.take_snapshot(&opened.children, name).await;
    opened.close_as_it_was(id).await
}

/// Makes the disk of the image in a file what it was: see [`apply_snapshot`](driveline_graph::OpenNode::apply_snapshot).
pub async fn apply_snapshot_of_file(path: &Path, snapshot: &str) -> Result<()> {
    let opened = Image::open(path, false).await?;
    let applied = opened.image.node.apply_snapshot(&opened.children, snapshot).await;
    opened.close(applied).await
}

/// Forgets a snapshot of the image in a file: see [`delete_snapshot`](driveline_graph::OpenNode::delete_snapshot).
pub async fn delete_snapshot_of_file(path: &Path, snapshot: &str) -> Result<()> {
    let opened = Image::open(path, false).await?;
    let deleted = opened.image.node.delete_snapshot(&opened.children, snapshot).await;
    opened.close_as_it_was(deleted).await
}

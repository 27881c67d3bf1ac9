//! Images in files that nothing else uses: without a graph, for tools.

use super::{CheckReport, Repair, check_image};
use crate::{FileDriver, conformance::OpenNodeArgs};
use driveline_graph::{Error, OpenChild, Permissions, Result};
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
    if let Err(error) = file.node.set_permissions(needs, Permissions::CONSISTENT_READ) {
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

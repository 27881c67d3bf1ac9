//! `x-driveline-apply`: the running graph becomes what a configuration file says.

use crate::{control::ApplyWish, error::Result, monitor::Monitor};
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Apply {
    file: String,
    dry_run: Option<bool>,
    prune_bitmaps: Option<bool>,
}

pub(crate) async fn apply(monitor: &Monitor, apply: Apply) -> Result<Value> {
    let wish = ApplyWish {
        dry_run: apply.dry_run.unwrap_or(false),
        prune_bitmaps: apply.prune_bitmaps.unwrap_or(false),
    };
    let applied = monitor.control().apply(apply.file.as_ref(), wish).await?;
    Ok(json!({ "steps": applied.steps, "kept": applied.kept, "restart": applied.restart }))
}

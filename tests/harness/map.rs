//! What `nbdinfo` reads from a metadata context.

use super::run;
use serde_json::Value;
use std::collections::BTreeSet;

/// The extents of a context, in order: offset, length, flags.
pub(crate) fn extents(uri: &str, context: &str) -> Vec<(u64, u64, u64)> {
    let map = run("nbdinfo", &["--json", &format!("--map={context}"), uri]);
    let map: Value = serde_json::from_str(&map).unwrap();
    let number = |extent: &Value, key: &str| extent[key].as_u64().unwrap();
    let entry = |extent: &Value| (number(extent, "offset"), number(extent, "length"), number(extent, "type"));
    map.as_array().unwrap().iter().map(entry).collect()
}

/// The granules that a bitmap of the export says are dirty.
pub(crate) fn dirty(uri: &str, bitmap: &str, granularity: u64) -> BTreeSet<u64> {
    let extents = extents(uri, &format!("qemu:dirty-bitmap:{bitmap}"));
    let dirty = extents.into_iter().filter(|(_, _, flags)| flags & 1 == 1);
    dirty
        .flat_map(|(offset, length, _)| offset / granularity..(offset + length).div_ceil(granularity))
        .collect()
}

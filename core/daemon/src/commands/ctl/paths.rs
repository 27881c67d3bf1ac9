//! Which nodes show a drive: what is on them is the drive's, wherever it is at the moment.

use super::{list, number, text};
use crate::drivers::kinds_of_data;
use driveline_checkpoints::Epoch;
use serde_json::Value;
use std::collections::BTreeMap;

/// The nodes from the roots of drives down through filters to the first image, each with its drive. While a job works, bitmaps
/// are on a holder and still found at their home: both are such nodes.
pub(super) fn of_drives(edges: &Value, nodes: &Value, drives: &Value) -> BTreeMap<String, String> {
    let names: BTreeMap<u64, &str> =
        list(&edges["nodes"]).iter().map(|node| (number(&node["id"]), text(&node["name"]))).collect();
    let mut children: BTreeMap<&str, Vec<(&str, &str)>> = BTreeMap::new();
    for edge in list(&edges["edges"]) {
        let end = |id: &Value| names.get(&number(id)).copied();
        if let (Some(parent), Some(child)) = (end(&edge["parent"]), end(&edge["child"])) {
            children.entry(parent).or_default().push((text(&edge["name"]), child));
        }
    }
    let data = kinds_of_data();
    let drivers: BTreeMap<&str, &str> =
        list(nodes).iter().map(|node| (text(&node["node-name"]), text(&node["drv"]))).collect();
    let below = |node: &str| {
        let is_filter = drivers.get(node).is_some_and(|driver| !data.contains(*driver));
        let children = children.get(node).filter(|_| is_filter)?;
        let filtered = children.iter().find(|(name, _)| ["file", "child", "image"].contains(name));
        filtered.or(children.first()).map(|(_, child)| (*child).to_owned())
    };
    let mut found = BTreeMap::new();
    for drive in list(drives).iter().filter(|drive| !text(&drive["device"]).is_empty()) {
        let root = text(&drive["inserted"]["node-name"]).to_owned();
        for node in std::iter::successors(Some(root), |node| below(node)) {
            found.insert(node, text(&drive["device"]).to_owned());
        }
    }
    found
}

/// A bitmap's name for people. What a checkpoint records is no bitmap that anybody made.
pub(super) fn shown(bitmap: &str) -> String {
    match bitmap.parse::<Epoch>() {
        Ok(epoch) => format!("(checkpoint {})", epoch.checkpoint.escape_debug()),
        Err(_) => bitmap.escape_debug().to_string(),
    }
}

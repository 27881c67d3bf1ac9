//! Bitmaps of a running daemon.

use super::{
    Result, Talk, given, is, list, number,
    paths::{of_drives, shown},
    table::{Table, amount},
    text,
};
use crate::cli::ctl::{Bitmap, OneBitmap};
use serde_json::{Value, json};
use std::{collections::BTreeMap, process::ExitCode};

impl Talk {
    pub(super) fn bitmaps(&mut self, target: Option<&str>) -> Result<ExitCode> {
        let drives = self.client.run("query-block", json!({}))?;
        let nodes = self.client.run("query-named-block-nodes", json!({ "flat": true }))?;
        let edges = self.client.run("x-debug-query-block-graph", json!({}))?;
        let found = found(&drives, &nodes, &of_drives(&edges, &nodes, &drives), target);
        self.answer(&found, bitmaps)
    }

    pub(super) fn change_bitmap(&mut self, change: Bitmap) -> Result<ExitCode> {
        let of = |one: OneBitmap| json!({ "node": one.drive, "name": one.bitmap });
        match change {
            Bitmap::Add { one, granularity, persistent, durability, disabled } => {
                let persistent = persistent || durability.is_some();
                let arguments = given([
                    ("node", one.drive.into()),
                    ("name", one.bitmap.into()),
                    ("granularity", granularity.map(|bytes| bytes.0).into()),
                    ("persistent", persistent.then_some(true).into()),
                    ("disabled", disabled.then_some(true).into()),
                    ("x-driveline-durability", durability.into()),
                ]);
                self.simple("block-dirty-bitmap-add", arguments)
            }
            Bitmap::Remove(one) => self.simple("block-dirty-bitmap-remove", of(one)),
            Bitmap::Clear(one) => self.simple("block-dirty-bitmap-clear", of(one)),
            Bitmap::Enable(one) => self.simple("block-dirty-bitmap-enable", of(one)),
            Bitmap::Disable(one) => self.simple("block-dirty-bitmap-disable", of(one)),
            Bitmap::Merge { drive, from, into } => {
                let arguments = json!({ "node": drive, "target": into, "bitmaps": from });
                self.simple("block-dirty-bitmap-merge", arguments)
            }
            Bitmap::Move { one, to } => {
                let arguments = json!({ "node": one.drive, "name": one.bitmap, "target": to });
                self.simple("x-driveline-block-dirty-bitmap-move", arguments)
            }
            Bitmap::Rename { one, to } => {
                let arguments = json!({ "node": one.drive, "name": one.bitmap, "new-name": to });
                self.simple("x-driveline-block-dirty-bitmap-rename", arguments)
            }
            Bitmap::Populate(one) => self.simple("x-driveline-block-dirty-bitmap-populate", of(one)),
            Bitmap::Adopt(one) => self.simple("x-driveline-block-dirty-bitmap-adopt", of(one)),
        }
    }

    pub(super) fn recovered(&mut self) -> Result<ExitCode> {
        let answer = self.client.run("x-driveline-query-recovered-bitmaps", json!({}))?;
        self.answer(&answer, recovered)
    }

    pub(super) fn store(&mut self, drive: String, to: Option<String>, flush: bool) -> Result<ExitCode> {
        let arguments =
            given([("node", drive.into()), ("store", to.into()), ("flush", flush.then_some(true).into())]);
        let answer = self.client.run("x-driveline-block-dirty-bitmap-store", arguments)?;
        self.answer(&answer, |answer| {
            let running = match answer["file"].as_str() {
                Some(file) => format!("; while the daemon runs, in {file}"),
                None => String::new(),
            };
            format!("{}{running}\n", text(&answer["store"]))
        })
    }
}

/// The bitmaps of a drive, or of a node, or all: each with `of`, the drive or node that it is listed at. `paths` are the nodes
/// that show drives.
fn found(drives: &Value, nodes: &Value, paths: &BTreeMap<String, String>, target: Option<&str>) -> Value {
    let listed = |of: &Value, bitmaps: &Value| -> Vec<Value> {
        let with = |bitmap: &Value| {
            let mut bitmap = bitmap.clone();
            bitmap["of"] = of.clone();
            bitmap
        };
        list(bitmaps).iter().map(with).collect()
    };
    let mut all = Vec::new();
    for drive in list(drives).iter().filter(|drive| !text(&drive["device"]).is_empty()) {
        if target.is_none_or(|target| drive["device"] == target) {
            all.extend(listed(&drive["device"], &drive["inserted"]["dirty-bitmaps"]));
        }
    }
    for node in list(nodes) {
        // With all drives, what is on the nodes that show them has been listed.
        let wanted = match target {
            Some(target) => node["node-name"] == target,
            None => !paths.contains_key(text(&node["node-name"])),
        };
        if wanted {
            all.extend(listed(&node["node-name"], &node["dirty-bitmaps"]));
        }
    }
    all.into()
}

fn bitmaps(found: &Value) -> String {
    let mut table = Table::new(&["of", "bitmap", "granularity", "dirty", "state"], &[2, 3]);
    for bitmap in list(found) {
        let flag = |key: &str, word: &'static str| is(&bitmap[key]).then_some(word);
        let recording = if is(&bitmap["recording"]) { "recording" } else { "disabled" };
        let more = [flag("persistent", "persistent"), flag("busy", "busy"), flag("inconsistent", "lost")];
        let state: Vec<&str> = [Some(recording)].into_iter().chain(more).flatten().collect();
        table.row([
            text(&bitmap["of"]).to_owned(),
            shown(text(&bitmap["name"])),
            amount(number(&bitmap["granularity"])),
            if is(&bitmap["inconsistent"]) { "?".to_owned() } else { amount(number(&bitmap["count"])) },
            state.join(", "),
        ]);
    }
    table.text("no bitmaps")
}

fn recovered(answer: &Value) -> String {
    let mut table = Table::new(&["of", "bitmap", "contents", "why"], &[]);
    for bitmap in list(answer) {
        let why = match bitmap["bytes"].as_u64() {
            Some(bytes) => format!("at most {} too much", amount(bytes)),
            None => text(&bitmap["reason"]).to_owned(),
        };
        table.row([
            text(&bitmap["node"]).to_owned(),
            text(&bitmap["name"]).escape_debug().to_string(),
            text(&bitmap["verdict"]).to_owned(),
            why,
        ]);
    }
    table.text("no bitmaps were found at the start")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bitmap_is_listed_once_at_its_drive_or_else_at_its_node() {
        let bitmap = |name: &str| {
            json!({ "name": name, "granularity": 65536, "count": 131072, "recording": true, "busy": false,
                "persistent": name == "daily" })
        };
        let epoch = bitmap("checkpoint:1:0:1700000000:monday");
        let drives = json!([{ "device": "vda",
            "inserted": { "node-name": "#holder", "dirty-bitmaps": [bitmap("daily"), epoch] } }]);
        // A job is at work: the bitmap is on a holder, and found at its home as well.
        let nodes = json!([
            { "node-name": "#holder", "drv": "bitmap-holder", "dirty-bitmaps": [bitmap("daily"), epoch] },
            { "node-name": "active", "drv": "qcow2", "dirty-bitmaps": [bitmap("daily"), epoch] },
            { "node-name": "base", "drv": "qcow2", "dirty-bitmaps": [bitmap("own")] },
            { "node-name": "file", "drv": "file" },
        ]);
        let node = |id: u64, name: &str| json!({ "id": id, "type": "block-driver", "name": name });
        let edge =
            |parent: u64, name: &str, child: u64| json!({ "parent": parent, "child": child, "name": name });
        let edges = json!({
            "nodes": [node(1, "#holder"), node(2, "active"), node(3, "base"), node(4, "file")],
            "edges": [edge(1, "child", 2), edge(2, "file", 4), edge(2, "backing", 3)],
        });
        let paths = of_drives(&edges, &nodes, &drives);
        let expected = "\
of    bitmap               granularity    dirty  state
vda   daily                     64 KiB  128 KiB  recording, persistent
vda   (checkpoint monday)       64 KiB  128 KiB  recording
base  own                       64 KiB  128 KiB  recording
";
        assert_eq!(bitmaps(&found(&drives, &nodes, &paths, None)), expected);
        let of = |target| list(&found(&drives, &nodes, &paths, Some(target))).len();
        assert_eq!((of("vda"), of("active"), of("base"), of("file")), (2, 2, 1, 0));
    }
}

//! Nodes, drives, and the picture of them.

use super::{
    Result, Talk, is, list, number,
    paths::{of_drives, shown},
    print,
    table::{Table, amount},
    text,
};
use crate::{
    cli::PictureFormat,
    picture::{Item, Picture, Shape},
};
use serde_json::{Value, json};
use std::{collections::BTreeMap, process::ExitCode};

impl Talk {
    pub(super) fn nodes(&mut self) -> Result<ExitCode> {
        let answer = self.client.run("query-named-block-nodes", json!({ "flat": true }))?;
        self.answer(&answer, nodes)
    }

    pub(super) fn drives(&mut self) -> Result<ExitCode> {
        let answer = self.client.run("query-block", json!({}))?;
        self.answer(&answer, drives)
    }

    pub(super) fn graph(&mut self, format: PictureFormat) -> Result<ExitCode> {
        let edges = self.client.run("x-debug-query-block-graph", json!({}))?;
        if self.json {
            return Ok(print(&format!("{edges:#}\n")));
        }
        let nodes = self.client.run("query-named-block-nodes", json!({ "flat": true }))?;
        let drives = self.client.run("query-block", json!({}))?;
        let exports = self.client.run("query-block-exports", json!({}))?;
        let picture = picture(&edges, &nodes, &drives, &exports);
        Ok(print(&match format {
            PictureFormat::Text => picture.text(),
            PictureFormat::Dot => picture.dot(),
            PictureFormat::Svg => picture.svg(),
        }))
    }
}

fn nodes(answer: &Value) -> String {
    let mut table = Table::new(&["node", "driver", "size", "access", "bitmaps", "file"], &[2, 4]);
    let mut nodes: Vec<&Value> = list(answer).iter().collect();
    nodes.sort_by_key(|node| text(&node["node-name"]));
    for node in nodes {
        table.row([
            text(&node["node-name"]).to_owned(),
            text(&node["drv"]).to_owned(),
            amount(number(&node["image"]["virtual-size"])),
            if is(&node["ro"]) { "read-only" } else { "writable" }.to_owned(),
            match list(&node["dirty-bitmaps"]).len() {
                0 => String::new(),
                count => count.to_string(),
            },
            text(&node["file"]).to_owned(),
        ]);
    }
    table.text("no nodes")
}

fn drives(answer: &Value) -> String {
    let mut table = Table::new(&["drive", "root", "size", "access", "bitmaps"], &[2]);
    for drive in list(answer).iter().filter(|drive| !text(&drive["device"]).is_empty()) {
        let root = &drive["inserted"];
        let bitmaps: Vec<String> =
            list(&root["dirty-bitmaps"]).iter().map(|bitmap| shown(text(&bitmap["name"]))).collect();
        table.row([
            text(&drive["device"]).to_owned(),
            text(&root["node-name"]).to_owned(),
            amount(number(&root["image"]["virtual-size"])),
            if is(&root["ro"]) { "read-only" } else { "writable" }.to_owned(),
            bitmaps.join(", "),
        ]);
    }
    table.text("no drives")
}

/// Boxes for what there is, and lines for what the daemon says leads where.
fn picture(edges: &Value, nodes: &Value, drives: &Value, exports: &Value) -> Picture {
    let mut picture = Picture::default();
    let of_drives = of_drives(edges, nodes, drives);
    let bitmaps = |of: &Value| -> Vec<String> {
        let bitmaps = list(&of["dirty-bitmaps"]).iter();
        bitmaps.map(|bitmap| format!("bitmap {}", shown(text(&bitmap["name"])))).collect()
    };
    let mut places = BTreeMap::new();
    for node in list(nodes) {
        let name = text(&node["node-name"]);
        let mut details = Vec::new();
        let is_leaf = node["image"]["filename"] == node["file"]
            && ["file", "host_device"].contains(&text(&node["drv"]));
        details.extend(is_leaf.then(|| text(&node["file"]).to_owned()));
        details.extend(is(&node["ro"]).then(|| "read-only".to_owned()));
        if !of_drives.contains_key(name) {
            details.extend(bitmaps(node));
        }
        let (name, kind) = (name.to_owned(), text(&node["drv"]).to_owned());
        places.insert(name.clone(), picture.items.len());
        picture.items.push(Item { shape: Shape::Node, name, kind, details, below: Vec::new() });
    }
    let of_id: BTreeMap<u64, &str> =
        list(&edges["nodes"]).iter().map(|node| (number(&node["id"]), text(&node["name"]))).collect();
    for edge in list(&edges["edges"]) {
        let end = |id: &Value| of_id.get(&number(id)).and_then(|name| places.get(*name)).copied();
        if let (Some(parent), Some(child)) = (end(&edge["parent"]), end(&edge["child"])) {
            picture.items[parent].below.push((text(&edge["name"]).to_owned(), child));
        }
    }
    let mut roots = BTreeMap::new();
    for drive in list(drives).iter().filter(|drive| !text(&drive["device"]).is_empty()) {
        let root = text(&drive["inserted"]["node-name"]);
        let below = places.get(root).map(|at| (String::new(), *at));
        let name = text(&drive["device"]).to_owned();
        // An export is shown with the node that it leads to, which is the drive's if it is one of the drive.
        roots.insert(root.to_owned(), picture.items.len());
        let (kind, details) = ("drive".to_owned(), bitmaps(&drive["inserted"]));
        picture.items.push(Item {
            shape: Shape::Drive,
            name,
            kind,
            details,
            below: below.into_iter().collect(),
        });
    }
    for export in list(exports) {
        let target = text(&export["node-name"]);
        let below = roots.get(target).or_else(|| places.get(target)).map(|at| (String::new(), *at));
        let (name, kind) = (text(&export["id"]).to_owned(), text(&export["type"]).to_owned());
        let below = below.into_iter().collect();
        picture.items.push(Item { shape: Shape::Export, name, kind, details: Vec::new(), below });
    }
    picture
}

#[cfg(test)]
mod tests {
    use super::*;

    fn world() -> [Value; 4] {
        let file = |name: &str, path: &str| json!({ "node-name": name, "drv": "file", "file": path, "ro": false, "image": { "filename": path, "virtual-size": 1 << 20 } });
        [
            json!({
                "nodes": [{ "id": 1, "type": "block-driver", "name": "active" }, { "id": 2, "type": "block-driver", "name": "f" }],
                "edges": [{ "parent": 1, "child": 2, "name": "file", "perm": [], "shared-perm": [] }],
            }),
            json!([
                file("f", "/a.qcow2"),
                { "node-name": "active", "drv": "qcow2", "file": "/a.qcow2", "ro": false,
                  "image": { "filename": "/a.qcow2", "virtual-size": 3 << 29 },
                  "dirty-bitmaps": [{ "name": "daily" }] },
            ]),
            json!([{ "device": "vda", "inserted": { "node-name": "active", "ro": false,
                "image": { "virtual-size": 3 << 29 }, "dirty-bitmaps": [{ "name": "daily" }] } }]),
            json!([{ "id": "e", "type": "nbd", "node-name": "active", "shutting-down": false }]),
        ]
    }

    #[test]
    fn nodes_and_drives_are_a_line_each() {
        let [_, all, those, _] = world();
        let expected = "\
node    driver     size  access    bitmaps  file
active  qcow2   1.5 GiB  writable        1  /a.qcow2
f       file      1 MiB  writable           /a.qcow2
";
        assert_eq!(nodes(&all), expected);
        assert_eq!(
            drives(&those),
            "drive  root       size  access    bitmaps\nvda    active  1.5 GiB  writable  daily\n"
        );
    }

    #[test]
    fn the_picture_is_what_the_daemon_says() {
        let [edges, nodes, drives, exports] = world();
        let expected = "\
export e (nbd)
└─ drive vda  bitmap daily
   └─ active (qcow2)
      └─ f (file)  /a.qcow2
";
        assert_eq!(picture(&edges, &nodes, &drives, &exports).text(), expected);
    }
}

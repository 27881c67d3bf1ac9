//! After a drive has gone on with another image: what has to be said in its file, before the next start.

use super::{Result, Talk, list, paths::of_drives, print, text};
use crate::drivers::kinds_of_data;
use serde_json::{Value, json};
use std::{collections::BTreeSet, process::ExitCode};

/// What a drive shows.
#[derive(Debug)]
pub(super) struct Shows {
    /// The node of its image.
    node: String,
    /// Its file.
    file: String,
    /// The file that backs it.
    backing: String,
    /// All nodes that there are.
    nodes: BTreeSet<String>,
}

impl Talk {
    /// What a drive shows now. `None`: it is none, or its data is in no image.
    pub(super) fn shows(&mut self, drive: &str) -> Result<Option<Shows>> {
        let drives = self.client.run("query-block", json!({}))?;
        if !list(&drives).iter().any(|known| known["device"] == drive) {
            return Ok(None);
        }
        let nodes = self.client.run("query-named-block-nodes", json!({ "flat": true }))?;
        let edges = self.client.run("x-debug-query-block-graph", json!({}))?;
        Ok(shows(&edges, &nodes, &drives, drive))
    }

    /// Says where a drive has gone, if it has.
    pub(super) fn say_moved(&mut self, drive: &str, before: Option<Shows>) -> Result<ExitCode> {
        let after = self.shows(drive)?;
        match before.zip(after) {
            Some((before, after)) if before.file != after.file && !self.json => {
                Ok(print(&moved(drive, &before, &after)))
            }
            _ => Ok(ExitCode::SUCCESS),
        }
    }
}

fn shows(edges: &Value, nodes: &Value, drives: &Value, drive: &str) -> Option<Shows> {
    let (path, data) = (of_drives(edges, nodes, drives), kinds_of_data());
    let image = list(nodes).iter().find(|node| {
        path.get(text(&node["node-name"])).is_some_and(|of| of == drive) && data.contains(text(&node["drv"]))
    })?;
    Some(Shows {
        node: text(&image["node-name"]).to_owned(),
        file: text(&image["file"]).to_owned(),
        backing: text(&image["backing_file"]).to_owned(),
        nodes: list(nodes).iter().map(|node| text(&node["node-name"]).to_owned()).collect(),
    })
}

/// Two lines: what happened, and what to write where.
fn moved(drive: &str, before: &Shows, after: &Shows) -> String {
    let Shows { node, file, .. } = after;
    let old = &before.node;
    let todo = if before.nodes.contains(node) && !node.starts_with('#') {
        format!("write root = {node:?} in [drive.{drive}]")
    } else if after.backing == before.file {
        format!(
            "write a [node.NAME] of {file} with backing = {old:?}, and root = \"NAME\" in [drive.{drive}]"
        )
    } else {
        format!("write file = {file:?} in [node.{old}]")
    };
    format!("{drive} goes on with {file} after {}\nbefore the next start, in its file: {todo}\n", before.file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_to_change_is_named() {
        let shows = |node: &str, file: &str, backing: &str| Shows {
            node: node.into(),
            file: file.into(),
            backing: backing.into(),
            nodes: ["active", "base"].map(String::from).into(),
        };
        let before = shows("active", "/a.qcow2", "/base.qcow2");
        let line = |after| moved("vda", &before, &after).lines().nth(1).unwrap().to_owned();
        let begin = "before the next start, in its file: write";
        assert_eq!(line(shows("base", "/base.qcow2", "")), format!("{begin} root = \"base\" in [drive.vda]"));
        assert_eq!(
            line(shows("#block7", "/copy.qcow2", "")),
            format!("{begin} file = \"/copy.qcow2\" in [node.active]")
        );
        assert_eq!(
            line(shows("snap", "/snap.qcow2", "/a.qcow2")),
            format!(
                "{begin} a [node.NAME] of /snap.qcow2 with backing = \"active\", and root = \"NAME\" in [drive.vda]"
            )
        );
    }
}

//! After a drive has gone on with another image: what has to be said in its file, before the next start.

use super::{Result, Talk, list, paths::of_drives, print, text};
use crate::{
    drivers::kinds_of_data,
    moved::{Advice, Image, Lead, Relation},
};
use serde_json::{Value, json};
use std::{collections::BTreeMap, process::ExitCode};

/// What a drive shows.
#[derive(Debug)]
pub(super) struct Shows {
    /// The node of its image.
    node: String,
    image: Image,
    /// The nodes of it and of all below it, with their files and drivers, from the top.
    chain: Vec<Layer>,
    /// What names it.
    lead: Lead,
    /// The nodes of images, by their files.
    nodes: BTreeMap<String, String>,
}

/// One of the images that a drive shows together.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Layer {
    node: String,
    file: String,
    driver: String,
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
        let said = before.zip(after).filter(|_| !self.json).and_then(|(before, after)| {
            match before.image.file == after.image.file {
                true => rebased(&before, &after),
                false => Some(moved(drive, &before, &after)),
            }
        });
        Ok(said.map_or(ExitCode::SUCCESS, |said| print(&said)))
    }
}

fn shows(edges: &Value, nodes: &Value, drives: &Value, drive: &str) -> Option<Shows> {
    let (path, data) = (of_drives(edges, nodes, drives), kinds_of_data());
    let names_drive = |node: &str| path.get(node).is_some_and(|of| of == drive);
    let is_data = |node: &&Value| data.contains(text(&node["drv"]));
    let named = |id: &Value| list(&edges["nodes"]).iter().find(|node| node["id"] == *id);
    let name_of = |id: &Value| named(id).map(|node| text(&node["name"]));
    let by_name = |name: &str| list(nodes).iter().find(|node| text(&node["node-name"]) == name);
    // What an image is in has its file's name, too.
    let is_inside = |node: &Value| {
        list(&edges["edges"]).iter().any(|edge| {
            name_of(&edge["child"]) == Some(text(&node["node-name"]))
                && text(&edge["name"]) != "backing"
                && name_of(&edge["parent"]).and_then(by_name).is_some_and(|parent| is_data(&parent))
        })
    };
    let is_image = |node: &&Value| is_data(node) && !is_inside(node);
    let image = list(nodes).iter().find(|node| names_drive(text(&node["node-name"])) && is_image(node))?;
    let name = text(&image["node-name"]);
    let of_file = |file: &str| list(nodes).iter().filter(is_image).find(|node| text(&node["file"]) == file);
    let backing = Some(text(&image["backing_file"])).filter(|file| !file.is_empty());
    let driver = |file: &str| of_file(file).map(|node| text(&node["drv"])).unwrap_or("qcow2").to_owned();
    let below = |above: &str| {
        let edge =
            |edge: &&Value| name_of(&edge["parent"]) == Some(above) && text(&edge["name"]) == "backing";
        name_of(&list(&edges["edges"]).iter().find(edge)?["child"])
    };
    let chain = std::iter::successors(Some(name), |above| below(above)).filter_map(by_name);
    let layer = |node: &Value| Layer {
        node: text(&node["node-name"]).to_owned(),
        file: text(&node["file"]).to_owned(),
        driver: text(&node["drv"]).to_owned(),
    };
    let known = list(nodes).iter().filter(is_image);
    let known = known.map(|node| (text(&node["file"]).to_owned(), text(&node["node-name"]).to_owned()));
    Some(Shows {
        node: name.to_owned(),
        image: Image {
            driver: text(&image["drv"]).to_owned(),
            file: text(&image["file"]).to_owned(),
            backing: backing.map(|file| (driver(file), file.to_owned())),
        },
        chain: chain.map(layer).collect(),
        lead: lead(edges, drive, name, names_drive),
        nodes: known.filter(|(_, node)| !node.starts_with('#')).collect(),
    })
}

/// The lowest filter of a drive that a file can have, and its option; or the drive itself.
fn lead(edges: &Value, drive: &str, image: &str, is_ours: impl Fn(&str) -> bool) -> Lead {
    let nodes = list(&edges["nodes"]);
    let name = |id: &Value| nodes.iter().find(|node| node["id"] == *id).map(|node| text(&node["name"]));
    let mut at = image;
    loop {
        let above = list(&edges["edges"]).iter().find_map(|edge| {
            let parent =
                name(&edge["parent"]).filter(|parent| name(&edge["child"]) == Some(at) && is_ours(parent))?;
            Some((parent, text(&edge["name"])))
        });
        match above {
            None => return Lead::Root,
            Some((parent, _)) if parent.starts_with('#') || parent == format!("{drive}-holder") => {
                at = parent
            }
            Some((parent, option)) => return Lead::Filter(parent.to_owned(), option.to_owned()),
        }
    }
}

/// Two lines: what happened, and what to write where.
fn moved(drive: &str, before: &Shows, after: &Shows) -> String {
    let file = &after.image.file;
    let relation = match &after.image.backing {
        _ if before.chain.iter().any(|layer| layer.file == *file) => Relation::Below,
        Some((_, backing)) if *backing == before.image.file => Relation::Above,
        _ => Relation::Copy,
    };
    let happened = format!("{drive} goes on with {file} after {}\n", before.image.file);
    if before.node.starts_with('#') {
        // It came while the program ran: how the file calls it is not known here.
        return format!(
            "{happened}before the next start, its file has to change: `driveline check FILE` says how\n"
        );
    }
    let backing = after.image.backing.as_ref().and_then(|(_, file)| before.nodes.get(file));
    let advice = Advice {
        drive,
        lead: &before.lead,
        old: &before.node,
        relation,
        image: &after.image,
        known: before.nodes.get(file).map(String::as_str),
        backing_known: backing.map(String::as_str),
    };
    format!("{happened}before the next start, in its file: {advice}\n")
}

/// The line to write when an image that a file names got another one below it. `None`: there is none, or the image itself says what is
/// below it, and the file does not.
fn rebased(before: &Shows, after: &Shows) -> Option<String> {
    let was_below = |node: &str| {
        let at = before.chain.iter().position(|layer| layer.node == node)?;
        before.chain.get(at + 1)
    };
    after.chain.iter().enumerate().find_map(|(at, Layer { node, .. })| {
        let (was, now) = (was_below(node)?, after.chain.get(at + 1));
        if [node, &was.node].iter().any(|name| name.starts_with('#')) || now == Some(was) {
            return None;
        }
        let backing = match now {
            None => "false".to_owned(),
            Some(Layer { node, .. }) if !node.starts_with('#') => format!("{node:?}"),
            Some(Layer { file, driver, .. }) => {
                format!("{{ driver = {driver:?}, file = {file:?}, read-only = true }}")
            }
        };
        Some(format!("before the next start, in its file: write backing = {backing} in [node.{node}]\n"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Done as it says, the drive shows the same data again: a copy without a backing that kept the old one's showed what that has where
    /// the copy has zeroes.
    #[test]
    fn all_that_has_to_change_is_named() {
        let image = |driver: &str, file: &str, backing: Option<&str>| Image {
            driver: driver.into(),
            file: file.into(),
            backing: backing.map(|file| ("qcow2".into(), file.into())),
        };
        let layers = |names: &[&str]| -> Vec<Layer> {
            let layer = |name: &&str| Layer {
                node: (*name).into(),
                file: format!("/{}.qcow2", name.trim_start_matches('#')),
                driver: "qcow2".into(),
            };
            names.iter().map(layer).collect()
        };
        let shows = |node: &str, lead: &Lead, image| Shows {
            node: node.into(),
            image,
            chain: layers(&["a", "middle", "base"]),
            lead: lead.clone(),
            nodes: [("/a.qcow2", "active"), ("/base.qcow2", "base")]
                .map(|(a, b)| (a.into(), b.into()))
                .into(),
        };
        let filter = Lead::Filter("limit".into(), "child".into());
        let line = |lead: &Lead, after: Image| {
            let before = shows("active", lead, image("qcow2", "/a.qcow2", Some("/base.qcow2")));
            let said = moved("vda", &before, &shows("#block7", lead, after));
            said.lines()
                .nth(1)
                .unwrap()
                .strip_prefix("before the next start, in its file: ")
                .unwrap()
                .to_owned()
        };
        let below = || image("qcow2", "/base.qcow2", None);
        let no_more = ", and let [node.base] be no more read-only";
        assert_eq!(line(&Lead::Root, below()), format!("write root = \"base\" in [drive.vda]{no_more}"));
        assert_eq!(line(&filter, below()), format!("write child = \"base\" in [node.limit]{no_more}"));
        for (copy, is) in [
            (image("qcow2", "/c.qcow2", None), "driver = \"qcow2\", file = \"/c.qcow2\", backing = false"),
            (image("raw", "/c.raw", None), "driver = \"raw\", file = \"/c.raw\""),
            (
                image("qcow2", "/c.qcow2", Some("/base.qcow2")),
                "driver = \"qcow2\", file = \"/c.qcow2\", backing = \"base\"",
            ),
            (
                image("qcow2", "/c.qcow2", Some("/else.qcow2")),
                "driver = \"qcow2\", file = \"/c.qcow2\", \
                 backing = { driver = \"qcow2\", file = \"/else.qcow2\", read-only = true }",
            ),
        ] {
            assert_eq!(line(&filter, copy), format!("write {is} and nothing else in [node.active]"));
        }
        assert_eq!(
            line(&filter, image("qcow2", "/snap.qcow2", Some("/a.qcow2"))),
            "write [node.NAME] with driver = \"qcow2\", file = \"/snap.qcow2\", backing = \"active\", \
             and child = \"NAME\" in [node.limit]"
        );
        // Its name is not known to the file.
        let (before, after) = (shows("#block7", &filter, below()), image("raw", "/c.raw", None));
        let said = moved("vda", &before, &shows("#block9", &filter, after));
        assert!(said.ends_with("its file has to change: `driveline check FILE` says how\n"), "{said}");

        let of = |names: &[&str]| Shows { chain: layers(names), ..shows(names[0], &Lead::Root, below()) };
        let stays = |before: &[&str], after: &[&str]| rebased(&of(before), &of(after));
        let write =
            |what: &str| Some(format!("before the next start, in its file: write backing = {what}\n"));
        assert_eq!(stays(&["a", "middle", "base"], &["a"]), write("false in [node.a]"));
        assert_eq!(stays(&["a", "middle", "base"], &["a", "base"]), write("\"base\" in [node.a]"));
        assert_eq!(stays(&["a", "b", "middle", "base"], &["a", "b", "base"]), write("\"base\" in [node.b]"));
        let inline = "{ driver = \"qcow2\", file = \"/base.qcow2\", read-only = true } in [node.a]";
        assert_eq!(stays(&["a", "middle", "#base"], &["a", "#base"]), write(inline));
        assert_eq!(stays(&["a", "#middle", "#base"], &["a"]), None, "the image says it itself");
        assert_eq!(stays(&["a", "base"], &["a", "base"]), None);
    }
}

//! A graph that is drawn: as a tree, for Graphviz, or as SVG.

mod dot;
mod layout;
mod svg;
mod text;

use crate::config::{Config, ExportTarget};
use driveline_bitmap::View;
use driveline_drivers::Bytes;
use driveline_graph::{ChildDefinition, Definition};
use std::collections::BTreeMap;

/// What a box stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Where clients come in.
    Export,
    /// A name for a root.
    Drive,
    /// A node.
    Node,
}

/// One box.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// What it stands for.
    pub shape: Shape,
    /// Its name; empty for nodes that were not given any.
    pub name: String,
    /// The driver, or what kind of thing it is.
    pub kind: String,
    /// What else there is to say about it.
    pub details: Vec<String>,
    /// What it leads to: a word for the line, and the number of the box.
    pub below: Vec<(String, usize)>,
}

/// Boxes, those that nothing leads to first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Picture {
    /// All of them.
    pub items: Vec<Item>,
}

impl Picture {
    /// The graph of a configuration.
    pub fn new(config: &Config, definitions: &[Definition]) -> Self {
        let mut picture = Self::default();
        let mut names = BTreeMap::new();
        for definition in definitions {
            let at = picture.node(definition);
            names.insert(definition.name.clone().unwrap_or_default(), at);
        }
        // Names can be used before they are defined, so they are looked up when all are known.
        let mut todo: Vec<(usize, &Definition)> =
            definitions.iter().map(|d| (names[d.name.as_deref().unwrap_or_default()], d)).collect();
        while let Some((at, definition)) = todo.pop() {
            for (spec, child) in &definition.children {
                let below = match child {
                    ChildDefinition::Null => continue,
                    ChildDefinition::Node(name) => names.get(name).copied(),
                    ChildDefinition::Inline(inner) => {
                        let below = picture.node(inner);
                        todo.push((below, inner));
                        Some(below)
                    }
                };
                picture.items[at].below.extend(below.map(|below| (spec.name.to_string(), below)));
            }
        }
        let mut drives = BTreeMap::new();
        for drive in &config.drives {
            let name = drive.name.get_ref();
            drives.insert(name.clone(), picture.items.len());
            let mut details: Vec<String> = drive
                .bitmaps
                .iter()
                .map(|bitmap| {
                    let granularity = bitmap.granularity.map(|bytes| format!(" {}", Bytes(bytes)));
                    let view = if bitmap.view == View::Node { ", node view" } else { "" };
                    let off = if bitmap.recording { "" } else { ", off" };
                    format!("bitmap {}{}{view}{off}", bitmap.name.get_ref(), granularity.unwrap_or_default())
                })
                .collect();
            details.extend(drive.permanent_holder.then(|| "permanent holder".to_owned()));
            let below = names.get(drive.root.get_ref()).map(|at| (String::new(), *at));
            picture.add(Shape::Drive, name, "drive", details, below.into_iter().collect());
        }
        for export in &config.exports {
            let mut details = vec![export.address.get_ref().to_string()];
            details.push(if export.writable { "writable".into() } else { "read-only".into() });
            if export.name.get_ref() != export.id.get_ref() {
                details.push(format!("as '{}'", export.name.get_ref()));
            }
            details.extend(export.bitmaps.iter().map(|bitmap| format!("shows {}", bitmap.get_ref())));
            let below = match &export.target {
                ExportTarget::Drive(name) => drives.get(name.get_ref()),
                ExportTarget::Node(name) => names.get(name.get_ref()),
            };
            let below = below.map(|at| (String::new(), *at));
            picture.add(Shape::Export, export.id.get_ref(), "nbd", details, below.into_iter().collect());
        }
        picture
    }

    fn add(
        &mut self,
        shape: Shape,
        name: &str,
        kind: &str,
        details: Vec<String>,
        below: Vec<(String, usize)>,
    ) -> usize {
        let (name, kind) = (name.to_owned(), kind.to_owned());
        self.items.push(Item { shape, name, kind, details, below });
        self.items.len() - 1
    }

    fn node(&mut self, definition: &Definition) -> usize {
        let plain = |value: &serde_json::Value| match value {
            serde_json::Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        let option = |(key, value): (&String, &serde_json::Value)| match key.as_str() {
            // What is read most is said shortest.
            "path" => plain(value),
            _ => format!("{key}={}", plain(value)),
        };
        let mut details: Vec<String> = definition.options.iter().map(option).collect();
        details.extend((definition.read_only == Some(true)).then(|| "read-only".to_owned()));
        let name = definition.name.as_deref().unwrap_or_default();
        self.add(Shape::Node, name, &definition.driver, details, Vec::new())
    }

    /// Boxes that nothing leads to: exports, then drives that are not exported, then nodes that nobody uses.
    pub(crate) fn tops(&self) -> Vec<usize> {
        let is_below =
            |at: usize| self.items.iter().any(|item| item.below.iter().any(|(_, below)| *below == at));
        let mut tops: Vec<usize> = (0..self.items.len()).filter(|at| !is_below(*at)).collect();
        tops.sort_by_key(|at| self.items[*at].shape as u8);
        tops
    }
}

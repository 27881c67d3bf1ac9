//! What a node is called by its data: a file's name where a name says all, else its definition as `json:`.
//!
//! Source: QEMU's block.c, `bdrv_refresh_filename`.

use super::Views;
use driveline_graph::{DriverKind, NodeView, Options};
use serde_json::Value;
use std::path::Path;

impl Views {
    pub(super) fn filename(&self, view: &NodeView) -> String {
        let whole = || format!("json:{}", Value::Object(self.definition(view)));
        self.name(view).filter(|_| !self.has_other_backing(view)).unwrap_or_else(whole)
    }

    /// As [`Views::filename`], for an image above to name it by: another backing than the one that the image itself names does not
    /// make it `json:`, which other programs cannot read.
    pub(super) fn filename_for_header(&self, view: &NodeView) -> String {
        self.name(view).unwrap_or_else(|| self.filename(view))
    }

    /// The name that says all about it, but for its backing.
    fn name(&self, view: &NodeView) -> Option<String> {
        let open = view.node.open_node();
        if let Some(path) = open.filename() {
            return Some(path.to_string_lossy().into_owned());
        }
        match view.node.driver_name() {
            "nbd" => open.details()["filename"].as_str().map(str::to_owned),
            name @ ("null-co" | "null-aio") => view.node.options().is_empty().then(|| format!("{name}://")),
            // They show what they are put on.
            "copy-before-write" | "snapshot-access" => {
                let child = self.get(&view.children.first()?.node)?;
                self.name(child).filter(|_| !self.has_other_backing(child))
            }
            _ => {
                let description = view.node.driver().description();
                let window = ["offset", "size"].iter().any(|key| view.node.options().contains_key(*key));
                if description.kind != DriverKind::Format || window {
                    return None;
                }
                let file = view.children.iter().find(|child| child.name == "file")?;
                let file = self.get(&file.node)?;
                let is_file = file.node.driver().description().kind == DriverKind::Protocol;
                if is_file { self.name(file) } else { None }
            }
        }
    }

    /// Is an image opened with another backing than the one that it names?
    fn has_other_backing(&self, view: &NodeView) -> bool {
        let named = view.node.open_node().backing_file();
        let mut backing = self.backing(view);
        while let Some(filter) = backing.filter(|backing| backing.is_filter()) {
            backing = self.below(filter);
        }
        match (named, backing) {
            (None, None) => false,
            (Some((name, _)), Some(backing)) => self.full_name(&name, view) != self.filename(backing),
            _ => true,
        }
    }

    /// A name in an image's header as it is opened by: relative to the image.
    pub(super) fn full_name(&self, name: &str, image: &NodeView) -> String {
        let image = &self.name(image).unwrap_or_default();
        let is_protocol = |name: &str| name.split('/').next().is_some_and(|first| first.contains(':'));
        match Path::new(image).parent() {
            Some(folder) if !is_protocol(name) && !is_protocol(image) => {
                folder.join(name).to_string_lossy().into_owned()
            }
            _ => name.to_owned(),
        }
    }

    /// A node's driver, the options that decide what its data is, and its children (a backing only if the image names another).
    fn definition(&self, view: &NodeView) -> Options {
        let mut definition = Options::new();
        definition.insert("driver".into(), view.node.driver_name().into());
        match view.node.driver_name() {
            "file" | "host_device" => {
                let path = view.node.open_node().filename().unwrap_or_default();
                definition.insert("filename".into(), path.to_string_lossy().into());
            }
            "qcow2" => {}
            _ => definition.extend(view.node.options().clone()),
        }
        let other_backing = self.has_other_backing(view);
        if other_backing && self.backing(view).is_none() {
            definition.insert("backing".into(), Value::Null);
        }
        let has_backing = |child: &&driveline_graph::ChildView| child.role == driveline_graph::Role::Backing;
        for child in view.children.iter().filter(|child| other_backing || !has_backing(child)) {
            let Some(below) = self.get(&child.node).map(|below| self.definition(below)) else { continue };
            // The members of a list are called `NAME.0` and so on.
            match child.name.split_once('.') {
                Some((list, _)) => {
                    let list = definition.entry(list).or_insert_with(|| Vec::<Value>::new().into());
                    list.as_array_mut().into_iter().for_each(|list| list.push(Value::Object(below.clone())));
                }
                None => drop(definition.insert(child.name.to_string(), below.into())),
            }
        }
        definition
    }
}

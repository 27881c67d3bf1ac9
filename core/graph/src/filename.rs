//! What a node is called by its data: a file's name where a name says all, else its definition as `json:`.
//!
//! Source: QEMU's block.c, `bdrv_refresh_filename`.

use crate::{
    driver::{DriverKind, Options, Role},
    layout::{ChildView, NodeView},
};
use serde_json::Value;
use std::{collections::BTreeMap, path::Path};

/// The filters that QEMU has as well. Names of images on others are for programs that lack them: what does not change the data is
/// left out of those.
const FILTERS_OF_QEMU: [&str; 10] = [
    "blkdebug",
    "blklogwrites",
    "blkreplay",
    "blkverify",
    "commit_top",
    "compress",
    "copy-on-read",
    "mirror_top",
    "preallocate",
    "throttle",
];

/// All nodes of one moment, and what each is called.
#[derive(Debug)]
pub struct Filenames {
    order: Vec<NodeView>,
    by_name: BTreeMap<String, usize>,
    /// By the place of each node in the order.
    named: Vec<Named>,
}

/// What a node is called, and why.
#[derive(Clone, Debug, Default)]
struct Named {
    /// The name that says all about it, but for its backing.
    name: Option<String>,
    /// It is opened with another backing than the image names.
    other_backing: bool,
    /// The whole name, if that is its definition.
    json: Option<String>,
}

impl Filenames {
    /// Of all nodes, as [`Layout::nodes`](crate::Layout::nodes) has them: parents before children.
    pub fn of(order: Vec<NodeView>) -> Self {
        let by_name = order.iter().enumerate().map(|(at, view)| (view.node.name().to_owned(), at)).collect();
        let named = vec![Named::default(); order.len()];
        let mut names = Self { order, by_name, named };
        // Each is named once, after what is below it: a name asks for those below several times.
        for at in (0..names.order.len()).rev() {
            if let Some(below) = names.left_out(&names.order[at]) {
                names.named[at] = names.named(below).cloned().unwrap_or_default();
                continue;
            }
            names.named[at].name = names.find_name(&names.order[at]);
            names.named[at].other_backing = names.find_other_backing(&names.order[at]);
            if names.named[at].name.is_none() || names.named[at].other_backing {
                let definition = names.definition(&names.order[at]);
                names.named[at].json = Some(format!("json:{}", Value::Object(definition)));
            }
        }
        names
    }

    /// The nodes, in their order.
    pub fn nodes(&self) -> &[NodeView] {
        &self.order
    }

    /// A node by its name in the graph.
    pub fn get(&self, name: &str) -> Option<&NodeView> {
        self.by_name.get(name).map(|at| &self.order[*at])
    }

    fn named(&self, view: &NodeView) -> Option<&Named> {
        self.by_name.get(view.node.name()).map(|at| &self.named[*at])
    }

    /// What a node is called. One that is opened with another backing than the image names is only told by its definition.
    pub fn filename(&self, view: &NodeView) -> String {
        let named = self.named(view);
        named.and_then(|named| named.json.clone().or_else(|| named.name.clone())).unwrap_or_default()
    }

    /// As [`Filenames::filename`], for an image above to name it by: another backing than the one that the image itself names does
    /// not make it `json:`, which other programs cannot read.
    pub fn for_header(&self, view: &NodeView) -> String {
        self.name(view).unwrap_or_else(|| self.filename(view))
    }

    fn name(&self, view: &NodeView) -> Option<String> {
        self.named(view)?.name.clone()
    }

    /// Is an image opened with another backing than the one that it names?
    fn has_other_backing(&self, view: &NodeView) -> bool {
        self.named(view).is_some_and(|named| named.other_backing)
    }

    /// What is below a filter that has no place in a name.
    fn left_out(&self, view: &NodeView) -> Option<&NodeView> {
        let description = view.node.driver().description();
        if !description.shows_data_as_it_is() || FILTERS_OF_QEMU.contains(&&*description.name) {
            return None;
        }
        let child = view.children.iter().find(|child| child.role == Role::Filtered)?;
        self.get(&child.node).filter(|_| !view.children.iter().any(looks_on))
    }

    /// A node without the filters that have no place in a name.
    fn shown<'a>(&'a self, mut view: &'a NodeView) -> &'a NodeView {
        while let Some(below) = self.left_out(view) {
            view = below;
        }
        view
    }

    /// Finds [`Named::name`] of a node, when all below it are named.
    fn find_name(&self, view: &NodeView) -> Option<String> {
        let (open, description) = (view.node.open_node(), view.node.driver().description());
        if let Some(path) = open.filename() {
            return Some(path.to_string_lossy().into_owned());
        }
        if let Some(uri) = open.uri() {
            return Some(uri);
        }
        let first = || self.get(&view.children.first()?.node);
        match description.kind {
            // What has nothing to say but what it is.
            DriverKind::Protocol => {
                view.node.options().is_empty().then(|| format!("{}://", description.name))
            }
            _ if view.children.iter().any(looks_on) => {
                first().filter(|child| !self.has_other_backing(child)).and_then(|child| self.name(child))
            }
            DriverKind::Filter => None,
            DriverKind::Format => {
                let window = ["offset", "size"].iter().any(|key| view.node.options().contains_key(*key));
                let file = view.children.iter().find(|child| child.name == "file" && !window)?;
                let file = self.shown(self.get(&file.node)?);
                let is_file = file.node.driver().description().kind == DriverKind::Protocol;
                if is_file { self.name(file) } else { None }
            }
        }
    }

    fn backing(&self, view: &NodeView) -> Option<&NodeView> {
        let backing = view.children.iter().find(|child| child.role == Role::Backing)?;
        self.get(&backing.node)
    }

    /// Finds [`Named::other_backing`] of a node, when all below it are named.
    fn find_other_backing(&self, view: &NodeView) -> bool {
        let named = view.node.open_node().backing_file();
        let mut backing = self.backing(view);
        while let Some(filter) = backing.filter(|backing| backing.is_filter()) {
            backing = filter.children.first().and_then(|child| self.get(&child.node));
        }
        match (named, backing) {
            (None, None) => false,
            (Some((name, _)), Some(backing)) => self.full_name(&name, view) != self.filename(backing),
            _ => true,
        }
    }

    /// A name in an image's header as it is opened by: relative to the image.
    pub fn full_name(&self, name: &str, image: &NodeView) -> String {
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
        let view = self.shown(view);
        let mut definition = Options::new();
        definition.insert("driver".into(), view.node.driver_name().into());
        let description = view.node.driver().description();
        let keeps_metadata = view.children.iter().any(|child| child.role == Role::Storage);
        match view.node.open_node().filename() {
            Some(path) => drop(definition.insert("filename".into(), path.to_string_lossy().into())),
            // Options of such a format are about how it works, not about what is read.
            None if keeps_metadata => {}
            None => definition.extend(view.node.options().clone()),
        }
        let other_backing = self.has_other_backing(view);
        if other_backing && self.backing(view).is_none() {
            definition.insert("backing".into(), Value::Null);
        }
        let shown = |child: &&ChildView| other_backing || child.role != Role::Backing;
        for child in view.children.iter().filter(shown) {
            let Some(below) = self.get(&child.node).map(|below| self.definition(below)) else { continue };
            // The members of a list are called `NAME.0` and so on.
            match child.name.split_once('.') {
                Some((list, _)) => {
                    let list = definition.entry(list).or_insert_with(|| Vec::<Value>::new().into());
                    list.as_array_mut().into_iter().for_each(|list| list.push(Value::Object(below.clone())));
                }
                None => drop(
                    definition.insert(description.word(&child.name, child.role).to_owned(), below.into()),
                ),
            }
        }
        definition
    }
}

/// Does its parent only look at it, as something else's point in time or copy?
fn looks_on(child: &ChildView) -> bool {
    matches!(child.role, Role::Target | Role::PointInTime)
}

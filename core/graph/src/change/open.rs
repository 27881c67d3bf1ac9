//! Nodes are opened beside the graph, children first, before anything of it changes.

use super::Change;
use crate::{
    definition::{ChildDefinition, Definition, in_order},
    driver::{BoxFuture, ChildSpec, Driver, OpenArgs, OpenChild, Options, Role},
    error::{Error, Kind, Result},
    guard::Threshold,
    node::{Node, NodeId},
    topology::{ChildEdge, Placed},
    wiring::wire_one,
};
use std::{
    borrow::Cow,
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
};

/// So many images may follow each other by the names in their headers. A cycle whose files have no names to know them by ends
/// here, and not when memory does.
const IMAGES_MAX: usize = 200;

impl Change {
    /// Opens nodes. Those that refer to each other may come in any order. Returns them in the order of opening.
    pub async fn add_nodes(&mut self, definitions: Vec<Definition>) -> Result<Vec<Arc<Node>>> {
        let mut nodes = Vec::new();
        for definition in in_order(definitions)? {
            let name = definition.name.clone();
            let id = self.open(definition, false, None).await.map_err(|error| match &name {
                Some(name) => error.at(name),
                None => error,
            })?;
            nodes.push(self.topology.at(id).node.clone());
        }
        Ok(nodes)
    }

    /// Opens a node.
    pub async fn add_node(&mut self, definition: Definition) -> Result<Arc<Node>> {
        Ok(self.add_nodes(vec![definition]).await?.remove(0))
    }

    /// Opens a node that goes when its last user goes.
    pub async fn add_implicit(&mut self, definition: Definition) -> Result<Arc<Node>> {
        let id = self.open(definition, true, None).await?;
        Ok(self.topology.at(id).node.clone())
    }

    pub(super) fn open(
        &mut self,
        definition: Definition,
        implicit: bool,
        inherited_read_only: Option<bool>,
    ) -> BoxFuture<'_, Result<NodeId>> {
        Box::pin(async move {
            let driver = self.graph.driver(&definition.driver)?;
            self.open_with(driver, definition, implicit, inherited_read_only).await
        })
    }

    /// As `open`, with a driver that need not be known by name.
    pub(super) fn open_with(
        &mut self,
        driver: Arc<dyn Driver>,
        definition: Definition,
        implicit: bool,
        inherited_read_only: Option<bool>,
    ) -> BoxFuture<'_, Result<NodeId>> {
        Box::pin(async move {
            // An error of a node without a name of its own is told by the node around it, see `within_child`.
            let given = definition.name.clone();
            let at = |error: Error| given.as_deref().map_or(error.clone(), |name| error.at(name));
            let name: Arc<str> = match definition.name {
                Some(name) => name.into(),
                None => self.graph.new_name(&definition.driver),
            };
            if self.topology.names.contains_key(&name) || self.topology.drives.contains_key(&name) {
                return Err(Error::new(Kind::Exists, format_args!("the name '{name}' is taken")));
            }
            driver.check(&definition.options).map_err(at)?;
            let common = definition.common;
            let read_only = definition.read_only.or(inherited_read_only).unwrap_or(false);
            if common.force_share && !read_only {
                return Err(at(Error::new(
                    Kind::Invalid,
                    "force-share=on can only be used with read-only images",
                )));
            }
            let mut children = Vec::new();
            let mut said = BTreeSet::new();
            for (spec, child) in definition.children {
                said.insert(spec.name.clone());
                children.extend(self.open_child(spec, child, read_only).await?);
            }
            self.open_implied(&driver, &definition.options, &said, &mut children).await?;
            for child in &children {
                let below = self.topology.at(child.node);
                if common.active && !below.common.active {
                    let text = format_args!(
                        "Inactive '{}' can't be a {} child of active '{name}'",
                        below.node.name, child.name
                    );
                    return Err(at(Error::new(Kind::NotPermitted, text)));
                }
            }
            // What stands on something that takes no writes takes none either.
            let on_read_only =
                |child: &ChildEdge| child.role != Role::Backing && self.topology.at(child.node).read_only;
            let read_only = read_only
                || common.auto_read_only
                    && definition.read_only.is_none()
                    && children.iter().any(on_read_only);
            let id = NodeId::new();
            let open_children = self.open_children(&children)?;
            let args = OpenArgs {
                node_name: &name,
                cookie: id.0,
                options: &definition.options,
                children: open_children.clone(),
                read_only: read_only || !common.active,
                directory: &self.directory,
            };
            let mut opened = driver.open_in(&self.graph, args).await;
            let mut read_only = read_only;
            if common.auto_read_only && !read_only && matches!(&opened, Err(error) if is_write_denied(error))
            {
                read_only = true;
                let args = OpenArgs {
                    node_name: &name,
                    cookie: id.0,
                    options: &definition.options,
                    children: open_children.clone(),
                    read_only,
                    directory: &self.directory,
                };
                opened = driver.open_in(&self.graph, args).await;
            }
            let open = opened.map_err(at)?;
            let node = Arc::new(Node {
                id,
                name: name.clone(),
                driver,
                open,
                options: definition.options,
                bitmaps: Default::default(),
                ranges: Default::default(),
                info: Default::default(),
                failed: Default::default(),
                threshold: Arc::new(Threshold::new(&self.graph)),
            });
            self.opened.push((node.clone(), open_children));
            self.topology.names.insert(name, id);
            self.topology
                .nodes
                .insert(id, Placed { node, children, read_only, implicit, was_target: false, common });
            Ok(id)
        })
    }

    async fn open_child(
        &mut self,
        spec: ChildSpec,
        child: ChildDefinition,
        read_only: bool,
    ) -> Result<Option<ChildEdge>> {
        let node = match child {
            ChildDefinition::Null => return Ok(None),
            ChildDefinition::Node(name) => self.topology.id(&name).map_err(|error| error.key(&spec.name))?,
            ChildDefinition::Inline(inner) => {
                let read_only = read_only || spec.role == Role::Backing;
                self.open(*inner, true, Some(read_only)).await.map_err(|e| within_child(e, &spec.name))?
            }
        };
        Ok(Some(ChildEdge { name: spec.name, role: spec.role, node }))
    }

    /// Opens the children that the image names, and puts all into the order of the description.
    async fn open_implied(
        &mut self,
        driver: &Arc<dyn Driver>,
        options: &Options,
        said: &BTreeSet<Cow<'static, str>>,
        children: &mut Vec<ChildEdge>,
    ) -> Result<()> {
        let specs = driver.description().children.clone();
        // What the image names does not matter then, not even if it is not there any more.
        if specs.iter().all(|spec| said.contains(&spec.name)) {
            return Ok(());
        }
        let given = self.open_children(children)?;
        if self.images.len() == IMAGES_MAX {
            let text = format_args!("more than {IMAGES_MAX} images name each other as backing files");
            return Err(Error::new(Kind::Invalid, text));
        }
        let here = given.iter().find_map(OpenChild::filename).map(|path| canonical(&path));
        // One that is no file has no name; it counts all the same.
        self.images.push(here.unwrap_or_default());
        let opened = self.open_each_implied(driver, options, &given, said, children).await;
        self.images.pop();
        opened?;
        children.sort_by_key(|child| specs.iter().position(|spec| spec.name == child.name));
        Ok(())
    }

    async fn open_each_implied(
        &mut self,
        driver: &Arc<dyn Driver>,
        options: &Options,
        given: &[OpenChild],
        said: &BTreeSet<Cow<'static, str>>,
        children: &mut Vec<ChildEdge>,
    ) -> Result<()> {
        let specs = driver.description().children.clone();
        // What is decided need not be looked for, so it cannot fail either.
        let mut options = options.clone();
        options.extend(said.iter().map(|name| (name.to_string(), serde_json::Value::Null)));
        for implied in driver.implied_children(&options, given).await? {
            let Some(spec) = specs.iter().find(|spec| spec.name == implied.name) else { continue };
            if said.contains(&spec.name) {
                continue;
            }
            let definition = self.graph.parse(implied.definition, &[])?;
            self.check_image_cycle(&definition)?;
            let node = self.open(definition, true, Some(spec.role == Role::Backing)).await;
            let node = node.map_err(|error| within_child(error, &spec.name))?;
            children.push(ChildEdge { name: spec.name.clone(), role: spec.role, node });
        }
        Ok(())
    }

    /// A chain of images that leads back to itself would be opened for ever: it is refused by the files on the way.
    fn check_image_cycle(&self, definition: &Definition) -> Result<()> {
        let Some(next) = image_path(definition).map(|path| canonical(&self.directory.join(path))) else {
            return Ok(());
        };
        let Some(from) = self.images.iter().position(|image| *image == next) else { return Ok(()) };
        let names: Vec<_> =
            self.images[from..].iter().chain([&next]).map(|image| image.display().to_string()).collect();
        Err(Error::new(Kind::Invalid, format_args!("a cycle of backing files: {}", names.join(" -> "))))
    }

    fn open_children(&self, children: &[ChildEdge]) -> Result<Vec<OpenChild>> {
        let trace = self.graph.0.trace;
        let open = |child: &ChildEdge| OpenChild {
            name: child.name.clone(),
            edge: wire_one(&self.topology, child.node, trace).edge_for(child.role),
            node: self.topology.at(child.node).node.open.clone(),
            unfiltered: self.topology.unfiltered(child.node),
            node_name: self.topology.name(child.node),
        };
        Ok(children.iter().map(open).collect())
    }
}

/// A file that cannot be opened for writing: no permission, or a read-only file system.
fn is_write_denied(error: &Error) -> bool {
    const EPERM: i32 = 1;
    const EACCES: i32 = 13;
    const EROFS: i32 = 30;
    [EPERM, EACCES, EROFS].contains(&error.errno_code())
}

/// An error of a child that has no name of its own is one of its parent's option: `file.path`.
fn within_child(error: Error, child: &str) -> Error {
    if error.node().is_some() {
        return error;
    }
    let key = match error.option() {
        Some(key) => format!("{child}.{key}"),
        None => child.to_owned(),
    };
    error.key(&key)
}

/// The file that a definition names, its own or that of its first child.
fn image_path(definition: &Definition) -> Option<&str> {
    let own = ["path", "filename"].into_iter().find_map(|key| definition.options.get(key)?.as_str());
    own.or_else(|| match definition.children.first() {
        Some((_, ChildDefinition::Inline(file))) => image_path(file),
        _ => None,
    })
}

fn canonical(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

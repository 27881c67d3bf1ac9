//! Making new images: what a driver is asked for, and in which nodes it works.
//!
//! A protocol makes a file by its name. A format makes its image in nodes that are there: those of the graph
//! ([`Graph::create`]), or files that are made for it ([`Graph::create_image`]) and that no graph knows yet.

use crate::{
    change::Change,
    driver::{ChildSpec, Driver, OpenArgs, OpenChild, OpenNode, Options, Permissions, Role, resize_through},
    error::{Error, Kind, Result},
    graph::Graph,
    node::{Node, NodeId},
    root::{Root, RootOptions},
    topology::{Placed, Topology},
    wiring::wire_one,
};
use driveline_op::Edge;
use serde::Deserialize;
use serde_json::{Value, json};
use std::{
    borrow::Cow,
    fmt,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

/// How much of a new image gets its space at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// What maps data: later writes change no metadata. The file stays sparse.
    Metadata,
    /// Everything has its space, but it is not written.
    Falloc,
    /// Everything is written, as zeroes.
    Full,
}

impl Preallocation {
    /// Its word in options.
    pub fn name(self) -> &'static str {
        match self {
            Preallocation::Off => "off",
            Preallocation::Metadata => "metadata",
            Preallocation::Falloc => "falloc",
            Preallocation::Full => "full",
        }
    }
}

/// What became of a creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Created {
    /// There is a file now that was not there before.
    New,
    /// What was there is lost.
    Overwritten,
}

/// What an image is made with.
#[derive(Debug)]
pub struct CreateArgs<'a> {
    /// Options by QEMU's names, without `driver` and the nodes that the image is made in.
    pub options: &'a Options,
    /// Those nodes, in the order of [`Driver::created_in`]; missing optional ones are left out.
    pub targets: Vec<CreateTarget>,
    /// Relative paths start here.
    pub directory: &'a Path,
}

impl CreateArgs<'_> {
    /// The node of that name.
    pub fn target(&self, name: &str) -> Option<&CreateTarget> {
        self.targets.iter().find(|target| target.name == name)
    }
}

/// A node that an image is made in. Nobody else writes to it meanwhile.
#[derive(Clone)]
pub struct CreateTarget {
    /// What it is to the image: `file`, `data-file`.
    pub name: Cow<'static, str>,
    /// To read and write it, beyond its end too.
    pub edge: Edge,
    /// The node itself.
    pub node: Arc<dyn OpenNode>,
    children: Vec<OpenChild>,
    /// Whose data it shows as it is: the node itself, or one below.
    shown: Arc<dyn OpenNode>,
}

impl fmt::Debug for CreateTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CreateTarget").field("name", &self.name).finish_non_exhaustive()
    }
}

impl CreateTarget {
    /// A node with its children.
    pub fn new(child: OpenChild, children: Vec<OpenChild>) -> Self {
        Self { name: child.name, edge: child.edge, shown: child.node.clone(), node: child.node, children }
    }

    /// The file or device that the image's data will be in, byte for byte, through filters that do not change it.
    pub fn filename(&self) -> Option<PathBuf> {
        self.shown.filename()
    }

    /// Changes its size, in itself or, through the filters that it may consist of, in what is below.
    pub async fn resize(&self, size_bytes: u64) -> Result<()> {
        resize_through(&self.node, &self.children, &self.edge, size_bytes).await
    }

    /// See [`OpenNode::preallocate`].
    pub async fn preallocate(&self, range: Range<u64>, how: Preallocation) -> Result<()> {
        self.node.preallocate(&self.children, range, how).await
    }
}

/// A new image in a file, as `blockdev-snapshot-sync`, `drive-mirror` and `drive-backup` make theirs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewImage {
    /// Where. A regular file that is there is overwritten; a block device must be large enough.
    pub path: String,
    /// The driver of its format: `qcow2`, `raw`.
    pub format: String,
    /// The size of the disk. It is rounded up to a sector.
    pub size_bytes: u64,
    /// Name and format of the backing file, as they are written into the image. Nobody looks for it.
    pub backing: Option<(String, Option<String>)>,
}

/// An image that [`Graph::create_image`] made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreatedImage {
    path: PathBuf,
    created: Created,
}

impl CreatedImage {
    /// Was a file made that was not there?
    pub fn created(&self) -> Created {
        self.created
    }

    /// Takes back what can be: a file that was not there is removed. One that was overwritten stays as it is.
    pub fn remove(self) -> Result<()> {
        match self.created {
            Created::Overwritten => Ok(()),
            Created::New => std::fs::remove_file(&self.path).map_err(|error| {
                let doing = format_args!("removing '{}'", self.path.display());
                Error::io(error.raw_os_error().unwrap_or(5), doing)
            }),
        }
    }
}

impl Graph {
    /// Makes an image as `options` say: `driver`, the nodes that it is made in (by name, or defined in place), and the
    /// driver's own, all by QEMU's names. What is in those nodes is lost.
    ///
    /// Errors: [`Kind::NotSupported`] if the driver makes no images, what is wrong with an option, or what the world did.
    /// After an error of the world the nodes hold no image.
    pub async fn create(&self, mut options: Options) -> Result<Created> {
        let driver = match options.shift_remove("driver") {
            Some(Value::String(name)) => self.driver(&name)?,
            _ => return Err(Error::new(Kind::Invalid, "missing; an image has a driver").key("driver")),
        };
        let roots = self.open_targets(&*driver, &mut options).await?;
        let units = Root::enter_all(roots.iter().map(|(_, root)| root)).await;
        let targets = self.targets(&roots, &units);
        let created = match targets {
            Ok(targets) => {
                driver.create(CreateArgs { options: &options, targets, directory: Path::new("") }).await
            }
            Err(error) => Err(error),
        };
        drop(units);
        let mut change = self.change().await;
        roots.iter().for_each(|(_, root)| change.detach_root(root));
        let closed = change.commit().await;
        let created = created?;
        closed.map(|()| created)
    }

    /// Opens a root on each node that an image is made in; those defined in place are opened first.
    async fn open_targets(
        &self,
        driver: &dyn Driver,
        options: &mut Options,
    ) -> Result<Vec<(Cow<'static, str>, Root)>> {
        let name = &driver.description().name;
        let Some(specs) = driver.created_in() else {
            let message = format_args!("Driver '{name}' does not support image creation");
            return Err(Error::new(Kind::NotSupported, message));
        };
        let mut change = self.change().await;
        let roots = self.attach_targets(&mut change, name, specs, options).await;
        change.commit_if(roots).await
    }

    async fn attach_targets(
        &self,
        change: &mut Change,
        driver: &str,
        specs: &[ChildSpec],
        options: &mut Options,
    ) -> Result<Vec<(Cow<'static, str>, Root)>> {
        let mut roots = Vec::new();
        for spec in specs {
            let node = match options.shift_remove(&*spec.name) {
                None if spec.required => {
                    let message = format_args!("missing; an image of driver '{driver}' is made in a node");
                    return Err(Error::new(Kind::Invalid, message).key(&spec.name));
                }
                None => continue,
                Some(Value::String(node)) => node,
                Some(Value::Object(inner)) => {
                    let definition = self.parse(inner, &[])?;
                    change.add_implicit(definition).await?.name().to_owned()
                }
                Some(_) => {
                    let message = "expected the name of a node, or a node defined in place";
                    return Err(Error::new(Kind::Invalid, message).key(&spec.name));
                }
            };
            let needs = Permissions::CONSISTENT_READ.or(Permissions::WRITE).or(Permissions::RESIZE);
            let user = format!("the creation of an image ({})", spec.name);
            let root = change.attach_to_node(&node, &RootOptions { needs, ..RootOptions::reader(user) })?;
            roots.push((spec.name.clone(), root));
        }
        Ok(roots)
    }

    fn targets(
        &self,
        roots: &[(Cow<'static, str>, Root)],
        units: &[crate::Unit],
    ) -> Result<Vec<CreateTarget>> {
        let state = self.0.state.lock().clone();
        let target = |((name, root), unit): (&(Cow<'static, str>, Root), &crate::Unit)| {
            let id = state.topology.id(&root.node_name())?;
            Ok(CreateTarget {
                name: name.clone(),
                edge: unit.edge().clone(),
                node: state.topology.at(id).node.open.clone(),
                children: state.wired[&id].children.clone(),
                shown: state.topology.at(state.topology.skip_plain_filters(id)).node.open.clone(),
            })
        };
        roots.iter().zip(units).map(target).collect()
    }

    /// Makes an image in a file that no node of the graph is: see [`NewImage`]. It waits for no change of the graph, so it can
    /// be made while one is in the making.
    ///
    /// Errors: as [`Graph::create`]; a file that was not there before is removed again.
    pub async fn create_image(&self, image: &NewImage) -> Result<CreatedImage> {
        let driver = self.driver(&image.format).map_err(|_| {
            Error::new(Kind::NotFound, format_args!("Unknown file format '{}'", image.format))
        })?;
        let specs = driver.created_in().filter(|specs| !specs.is_empty()).ok_or_else(|| {
            let message = format_args!("Format driver '{}' does not support image creation", image.format);
            Error::new(Kind::NotSupported, message)
        })?;
        // Said before the file is made, or one that is there is emptied.
        let backs = driver.description().children.iter().any(|spec| spec.role == Role::Backing);
        if image.backing.is_some() && !backs {
            let message = format_args!("Backing file not supported for file format '{}'", image.format);
            return Err(Error::new(Kind::Invalid, message).key("backing-file"));
        }
        if image.backing.as_ref().is_some_and(|(backing, _)| *backing == image.path) {
            let message = "Error: Trying to create an image with the same filename as the backing file";
            return Err(Error::new(Kind::Invalid, message));
        }
        let size_bytes =
            image.size_bytes.checked_next_multiple_of(512).filter(|size| *size <= i64::MAX as u64);
        let Some(size_bytes) = size_bytes else {
            return Err(Error::new(
                Kind::Invalid,
                format_args!("a disk of {} bytes is too large", image.size_bytes),
            ));
        };
        let mut options = Options::new();
        options.insert("size".into(), size_bytes.into());
        if let Some((backing, format)) = &image.backing {
            options.insert("backing-file".into(), backing.clone().into());
            if let Some(format) = format {
                options.insert("backing-fmt".into(), format.clone().into());
            }
        }
        let file_driver = self.driver("file")?;
        let file = object(json!({ "filename": image.path, "size": 0 }));
        let args = CreateArgs { options: &file, targets: Vec::new(), directory: Path::new("") };
        let created = file_driver.create(args).await?;
        let created = CreatedImage { path: image.path.clone().into(), created };
        let made = async {
            let standalone = Standalone::open(file_driver, &image.path).await?;
            let target = standalone.target(specs[0].name.clone());
            let args = CreateArgs { options: &options, targets: vec![target], directory: Path::new("") };
            let made = driver.create(args).await;
            let closed = standalone.node.close(&[]).await;
            made.and(closed)
        };
        match made.await {
            Ok(()) => Ok(created),
            Err(error) => {
                if let Err(error) = created.remove() {
                    tracing::warn!("after a creation that failed: {error}");
                }
                Err(error)
            }
        }
    }
}

/// A file that is open outside every graph.
struct Standalone {
    node: Arc<dyn OpenNode>,
    edge: Edge,
}

impl Standalone {
    async fn open(driver: Arc<dyn Driver>, path: &str) -> Result<Self> {
        let options = object(json!({ "path": path }));
        let (id, name): (_, Arc<str>) = (NodeId::new(), path.into());
        let args = OpenArgs {
            node_name: &name,
            cookie: id.0,
            options: &options,
            children: Vec::new(),
            read_only: false,
            directory: Path::new(""),
        };
        let open = driver.open(args).await?;
        let needs = Permissions::CONSISTENT_READ.or(Permissions::WRITE).or(Permissions::RESIZE);
        if let Err(error) = open.set_permissions(needs, Permissions::CONSISTENT_READ).await {
            // It is the lock that tells what is wrong.
            let _ = open.close(&[]).await;
            return Err(error);
        }
        let node = Arc::new(Node {
            id,
            name: name.clone(),
            driver,
            open: open.clone(),
            options,
            bitmaps: Default::default(),
            ranges: Default::default(),
            info: Default::default(),
            failed: Default::default(),
            threshold: Default::default(),
        });
        let mut topology = Topology::default();
        topology.names.insert(name, id);
        topology.nodes.insert(
            id,
            Placed {
                node,
                children: Vec::new(),
                read_only: false,
                implicit: false,
                was_target: false,
                common: Default::default(),
            },
        );
        let edge = wire_one(&topology, id, false).edge;
        Ok(Self { node: open, edge })
    }

    fn target(&self, name: Cow<'static, str>) -> CreateTarget {
        CreateTarget {
            name,
            edge: self.edge.clone(),
            node: self.node.clone(),
            children: Vec::new(),
            shown: self.node.clone(),
        }
    }
}

fn object(value: Value) -> Options {
    match value {
        Value::Object(object) => object,
        _ => Options::new(),
    }
}

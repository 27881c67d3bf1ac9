//! qcow2 as a driver of the graph.

use super::{Qcow2, header::Header, io::Io};
use crate::Bytes;
use driveline_bitmap::Bits;
use driveline_graph::{
    BitmapToStore, BoxFuture, ChildSpec, CreateArgs, Created, Description, Driver, DriverKind, Error,
    ImpliedChild, Kind, OpenArgs, OpenChild, OpenNode, Options, Result, Role, Snapshot, StoredBitmaps,
    Witness, parse_options,
};
use driveline_op::{Body, Edge, Info, Instance, OpTable, info};
use serde::Deserialize;
use std::{
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering::Relaxed},
};

/// The driver `qcow2`.
///
/// | option | default | meaning |
/// |---|---|---|
/// | `file` | (required) | the child that the image is in |
/// | `data-file` | as the image says | the child that data is in, for images that keep it outside `file` |
/// | `backing` | as the image says | the child that unallocated clusters are read from; `null`: none |
/// | `cache-size` | `"1MiB"` | memory for L2 tables and refcount blocks, half and half |
#[derive(Debug)]
pub struct Qcow2Driver {
    description: Description,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Qcow2Options {
    #[serde(default = "cache_size_default")]
    cache_size: Bytes,
}

fn cache_size_default() -> Bytes {
    Bytes(1 << 20)
}

/// Below this a single request could not keep what it needs at once.
const CACHE_BYTES_MIN: u64 = 128 << 10;
const CACHE_BYTES_MAX: u64 = 64 << 30;

fn options(options: &Options) -> Result<Qcow2Options> {
    let mut options = options.clone();
    // Nothing but the absence of a child: `"backing": null`.
    if options.get("backing").is_some_and(serde_json::Value::is_null) {
        options.remove("backing");
    }
    let parsed: Qcow2Options = parse_options(&options)?;
    if !(CACHE_BYTES_MIN..=CACHE_BYTES_MAX).contains(&parsed.cache_size.0) {
        return Err(Error::new(
            Kind::Invalid,
            format_args!(
                "{} is no cache size; expected {} to {}",
                parsed.cache_size,
                Bytes(CACHE_BYTES_MIN),
                Bytes(CACHE_BYTES_MAX)
            ),
        )
        .key("cache-size"));
    }
    Ok(parsed)
}

impl Default for Qcow2Driver {
    fn default() -> Self {
        Self::new()
    }
}

impl Qcow2Driver {
    /// The driver.
    pub fn new() -> Self {
        let summary = "QEMU's image format: backing files, subclusters, compression, snapshots, bitmaps";
        Self {
            description: Description {
                children: vec![
                    ChildSpec::required("file", Role::Storage),
                    ChildSpec::optional("data-file", Role::Data),
                    ChildSpec::optional("backing", Role::Backing),
                ],
                options: vec!["cache-size".into()],
                ..Description::builtin("qcow2", DriverKind::Format, summary)
            },
        }
    }
}

impl Driver for Qcow2Driver {
    fn description(&self) -> &Description {
        &self.description
    }

    fn check(&self, given: &Options) -> Result<()> {
        options(given).map(drop)
    }

    fn implied_children<'a>(
        &'a self,
        options: &'a Options,
        given: &'a [OpenChild],
    ) -> BoxFuture<'a, Result<Vec<ImpliedChild>>> {
        Box::pin(async move {
            let decided =
                |name: &str| options.contains_key(name) || given.iter().any(|child| child.name == name);
            let file = given.iter().find(|child| child.name == "file");
            let Some(file) = file.filter(|_| !decided("backing") || !decided("data-file")) else {
                return Ok(Vec::new());
            };
            let edges = [file.edge.clone()];
            let header = super::open::read_header(&mut Io::Edges(&edges)).await?;
            let mut implied = Vec::new();
            if header.geometry().data_file && !decided("data-file") {
                implied.push(data_file(&header, file)?);
            }
            let Some(name) = header.backing.as_ref().filter(|_| !decided("backing")) else {
                return Ok(implied);
            };
            let path = named_path("backing", name, file.node.filename().as_deref())?;
            let format = match &header.backing_format {
                Some(format) => format.clone(),
                None => probe(&path)?.to_owned(),
            };
            let definition = serde_json::json!({
                "driver": format,
                "read-only": true,
                "file": { "driver": "file", "path": path },
            });
            let serde_json::Value::Object(definition) = definition else { unreachable!("it is an object") };
            implied.push(ImpliedChild { name: "backing".into(), definition });
            Ok(implied)
        })
    }

    fn created_in(&self) -> Option<&[ChildSpec]> {
        const FILES: [ChildSpec; 2] =
            [ChildSpec::required("file", Role::Storage), ChildSpec::optional("data-file", Role::Data)];
        Some(const { &FILES })
    }

    fn create<'a>(&'a self, args: CreateArgs<'a>) -> BoxFuture<'a, Result<Created>> {
        Box::pin(async { super::creation::create(args).await.map(|()| Created::Overwritten) })
    }

    fn open<'a>(&'a self, args: OpenArgs<'a>) -> BoxFuture<'a, Result<Arc<dyn OpenNode>>> {
        Box::pin(async move {
            let options = options(args.options)?;
            let edges = edges(&args.children)?;
            let data_file = args.child("data-file").is_some();
            if super::open::read_header(&mut Io::Edges(&edges)).await?.geometry().data_file != data_file {
                let text = if data_file {
                    "the image keeps its data in itself"
                } else {
                    "the image keeps its data there"
                };
                return Err(Error::new(Kind::Invalid, text).key("data-file"));
            }
            let qcow2 = Qcow2::open(&mut Io::Edges(&edges), options.cache_size.0, args.read_only).await?;
            let node: Arc<dyn OpenNode> =
                Arc::new(Qcow2Node(Arc::new(Body { cookie: args.cookie, driver: qcow2 })));
            Ok(node)
        })
    }
}

/// The edges of the children, in the order of their numbers.
fn edges(children: &[OpenChild]) -> Result<Vec<Edge>> {
    let of = |name: &str| children.iter().find(|child| child.name == name).map(|child| child.edge.clone());
    let file = of("file").ok_or_else(|| Error::new(Kind::Invalid, "qcow2 needs a file").key("file"))?;
    Ok([Some(file), of("data-file"), of("backing")].into_iter().flatten().collect())
}

/// The data file that a header names.
fn data_file(header: &Header, file: &OpenChild) -> Result<ImpliedChild> {
    let name = header.data_file().ok_or_else(|| {
        Error::new(Kind::Invalid, "the image keeps its data in another file and does not say in which")
            .key("data-file")
    })?;
    let path = named_path("data-file", &name, file.node.filename().as_deref())?;
    let definition = serde_json::json!({
        "driver": "raw",
        "read-only": file.edge.info().flags & info::READ_ONLY != 0,
        "file": { "driver": "file", "path": path },
    });
    let serde_json::Value::Object(definition) = definition else { unreachable!("it is an object") };
    Ok(ImpliedChild { name: "data-file".into(), definition })
}

/// Where a file is that an image names: relative names start at the image's own directory.
fn named_path(child: &str, name: &str, image: Option<&Path>) -> Result<PathBuf> {
    let what = if child == "backing" { "backing file" } else { "data file" };
    let refused = |why: std::fmt::Arguments<'_>| {
        Error::new(Kind::NotSupported, format_args!("the image's {what} '{name}' {why}")).key(child)
    };
    let name = match name.split_once(':') {
        Some(("file", path)) => path,
        // As in QEMU, a colon before the first slash ends the name of a protocol.
        Some((protocol, _)) if !protocol.contains('/') => {
            return Err(refused(format_args!("is not a file; give the child as an option")));
        }
        _ => name,
    };
    let path = Path::new(name);
    if path.is_absolute() {
        return Ok(path.to_owned());
    }
    let image = image.ok_or_else(|| {
        refused(format_args!("is relative, but the image is no file that it could be relative to"))
    })?;
    Ok(image.parent().unwrap_or(Path::new("")).join(path))
}

/// The format of a backing file whose image does not name it.
fn probe(path: &Path) -> Result<&'static str> {
    use std::io::Read;
    let doing = |error: std::io::Error| {
        Error::io(error.raw_os_error().unwrap_or(5), format_args!("backing file {}", path.display()))
            .key("backing")
    };
    let mut magic = Vec::new();
    std::fs::File::open(path).map_err(doing)?.take(4).read_to_end(&mut magic).map_err(doing)?;
    Ok(if magic == super::header::MAGIC { "qcow2" } else { "raw" })
}

static OPS: OpTable<Qcow2> = OpTable::new()
    .read(Qcow2::read)
    .write(Qcow2::write)
    .flush(Qcow2::flush)
    .discard(Qcow2::discard)
    .write_zeroes(Qcow2::write_zeroes)
    .block_status(Qcow2::block_status);

/// An open image, as the graph sees it.
struct Qcow2Node(Arc<Body<Qcow2>>);

impl OpenNode for Qcow2Node {
    fn instance(&self) -> Instance {
        Instance::new(Arc::clone(&self.0), &OPS)
    }

    fn info(&self, children: &[Info]) -> Info {
        let qcow2 = &self.0.driver;
        let read_only = if qcow2.read_only.load(Relaxed) { info::READ_ONLY } else { 0 };
        let fast_zero = if qcow2.geometry.version >= 3 { info::FAST_ZERO } else { 0 };
        // What is in another file is there as it is.
        let compresses = if qcow2.geometry.data_file { 0 } else { info::COMPRESSES };
        Info {
            size_bytes: qcow2.size_bytes(),
            flags: read_only | fast_zero | compresses | info::DISCARD,
            cluster_bytes: qcow2.geometry.cluster_bytes() as u32,
            memory_alignment: children.iter().map(|child| child.memory_alignment).max().unwrap_or(1),
            ..Info::default()
        }
    }

    fn details(&self) -> serde_json::Value {
        self.0.driver.details()
    }

    fn resize<'a>(&'a self, children: &'a [OpenChild], size_bytes: u64) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move { self.0.driver.resize(&mut Io::Edges(&edges(children)?), size_bytes).await })
    }

    fn backing_file(&self) -> Option<(String, String)> {
        self.0.driver.backing_file()
    }

    fn set_backing_file<'a>(
        &'a self,
        children: &'a [OpenChild],
        backing: Option<(&'a str, &'a str)>,
    ) -> BoxFuture<'a, Result<()>> {
        Box::pin(
            async move { self.0.driver.set_backing_file(&mut Io::Edges(&edges(children)?), backing).await },
        )
    }

    fn write_compressed<'a>(
        &'a self,
        children: &'a [OpenChild],
        offset: u64,
        data: &'a [u8],
    ) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            self.0.driver.write_compressed(&mut Io::Edges(&edges(children)?), offset, data).await
        })
    }

    fn can_snapshot(&self) -> bool {
        true
    }

    fn snapshots(&self) -> Vec<Snapshot> {
        self.0.driver.snapshots()
    }

    fn take_snapshot<'a>(
        &'a self,
        children: &'a [OpenChild],
        name: &'a str,
    ) -> BoxFuture<'a, Result<String>> {
        Box::pin(async move { self.0.driver.take_snapshot(&mut Io::Edges(&edges(children)?), name).await })
    }

    fn apply_snapshot<'a>(
        &'a self,
        children: &'a [OpenChild],
        snapshot: &'a str,
    ) -> BoxFuture<'a, Result<()>> {
        Box::pin(
            async move { self.0.driver.apply_snapshot(&mut Io::Edges(&edges(children)?), snapshot).await },
        )
    }

    fn delete_snapshot<'a>(
        &'a self,
        children: &'a [OpenChild],
        snapshot: &'a str,
    ) -> BoxFuture<'a, Result<()>> {
        Box::pin(
            async move { self.0.driver.delete_snapshot(&mut Io::Edges(&edges(children)?), snapshot).await },
        )
    }

    fn make_empty<'a>(&'a self, children: &'a [OpenChild]) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move { self.0.driver.make_empty(&mut Io::Edges(&edges(children)?)).await })
    }

    fn set_read_only<'a>(&'a self, children: &'a [OpenChild], read_only: bool) -> BoxFuture<'a, Result<()>> {
        Box::pin(
            async move { self.0.driver.set_read_only(&mut Io::Edges(&edges(children)?), read_only).await },
        )
    }

    fn close<'a>(&'a self, children: &'a [OpenChild]) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let qcow2 = &self.0.driver;
            if !qcow2.read_only.load(Relaxed) && !qcow2.damaged.load(Relaxed) {
                qcow2.end_writing(&mut Io::Edges(&edges(children)?)).await?;
            }
            Ok(())
        })
    }

    fn stored_bitmaps<'a>(&'a self, children: &'a [OpenChild]) -> BoxFuture<'a, Result<StoredBitmaps>> {
        Box::pin(async move { self.0.driver.stored_bitmaps(&mut Io::Edges(&edges(children)?)).await })
    }

    fn load_bitmap<'a>(&'a self, children: &'a [OpenChild], name: &'a str) -> BoxFuture<'a, Result<Bits>> {
        Box::pin(async move { self.0.driver.load_bitmap(&mut Io::Edges(&edges(children)?), name).await })
    }

    fn store_bitmaps<'a>(
        &'a self,
        children: &'a [OpenChild],
        bitmaps: &'a [BitmapToStore<'a>],
    ) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move { self.0.driver.store_bitmaps(&mut Io::Edges(&edges(children)?), bitmaps).await })
    }

    fn set_bitmaps_in_use<'a>(
        &'a self,
        children: &'a [OpenChild],
        names: &'a [&'a str],
        in_use: bool,
    ) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            self.0.driver.set_bitmaps_in_use(&mut Io::Edges(&edges(children)?), names, in_use).await
        })
    }

    fn witness(&self) -> Option<Witness> {
        self.0.driver.witness()
    }

    fn set_witness<'a>(&'a self, children: &'a [OpenChild], set: bool) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move { self.0.driver.set_witness(&mut Io::Edges(&edges(children)?), set).await })
    }
}

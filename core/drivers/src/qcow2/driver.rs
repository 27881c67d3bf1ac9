//! qcow2 as a driver of the graph.

use super::{Qcow2, header::Header, io::Io, named};
use crate::Bytes;
use driveline_bitmap::Bits;
use driveline_graph::{
    BitmapToStore, BoxFuture, ChildSpec, CreateArgs, Created, Description, Driver, DriverKind, Error,
    ImpliedChild, Kind, OpenArgs, OpenChild, OpenNode, Options, Reopened, Result, Role, Snapshot,
    StoredBitmaps, Witness, parse_options,
};
use driveline_op::{Body, Edge, Info, Instance, OpTable, info};
use serde::Deserialize;
use std::sync::{Arc, atomic::Ordering::Relaxed};

/// The driver `qcow2`.
///
/// | option | default | meaning |
/// |---|---|---|
/// | `file` | (required) | the child that the image is in |
/// | `data-file` | as the image says | the child that data is in, for images that keep it outside `file` |
/// | `backing` | as the image says | the child that unallocated clusters are read from; `null`: none |
/// | `cache-size` | `"1MiB"` | memory for L2 tables and refcount blocks, half and half; at least 128 KiB are used |
/// | `l2-cache-size`, `refcount-cache-size` | | the half for each, from which the size of both follows |
/// | `l2-cache-entry-size` | | a power of two from 512 to the cluster size; taken and checked, slices have one size here |
/// | `cache-clean-interval` | | seconds; taken, without effect: the cache never grows beyond its size |
/// | `pass-discard-request` | `true` | what is discarded here is discarded in the file, too |
/// | `pass-discard-snapshot`, `pass-discard-other` | | taken, without effect: clusters that a snapshot or the driver itself gave up are used again first |
/// | `discard-no-unref` | `false` | taken, without effect: it is about where data lies, not about what is read |
/// | `lazy-refcounts` | | taken, without effect: refcounts are written in order and cost no flush of their own |
/// | `overlap-check` | `"all"` | QEMU's words and tables; taken and checked: every metadata that is known is protected |
/// | `encrypt` | | refused: the image is not encrypted, or cannot be read |
#[derive(Debug)]
pub struct Qcow2Driver {
    description: Description,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
#[expect(dead_code, reason = "of some only the type is checked")]
struct Qcow2Options {
    cache_size: Option<Bytes>,
    l2_cache_size: Option<Bytes>,
    refcount_cache_size: Option<Bytes>,
    l2_cache_entry_size: Option<Bytes>,
    cache_clean_interval: Option<u32>,
    pass_discard_request: Option<bool>,
    pass_discard_snapshot: Option<bool>,
    pass_discard_other: Option<bool>,
    discard_no_unref: Option<bool>,
    lazy_refcounts: Option<bool>,
    overlap_check: Option<OverlapCheck>,
}

/// QEMU's words for which metadata is looked after.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Overlap {
    None,
    Constant,
    Cached,
    All,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
#[expect(dead_code, reason = "only the type is checked")]
enum OverlapCheck {
    Mode(Overlap),
    Flags(OverlapFlags),
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(dead_code, reason = "only the type is checked")]
struct OverlapFlags {
    template: Option<Overlap>,
    #[serde(flatten)]
    flags: std::collections::BTreeMap<String, bool>,
}

const OVERLAPS: [&str; 9] = [
    "main-header",
    "active-l1",
    "active-l2",
    "refcount-table",
    "refcount-block",
    "snapshot-table",
    "inactive-l1",
    "inactive-l2",
    "bitmap-directory",
];

const CACHE_BYTES_DEFAULT: u64 = 1 << 20;

const OPTIONS: [&str; 12] = [
    "cache-size",
    "l2-cache-size",
    "refcount-cache-size",
    "l2-cache-entry-size",
    "cache-clean-interval",
    "pass-discard-request",
    "pass-discard-snapshot",
    "pass-discard-other",
    "discard-no-unref",
    "lazy-refcounts",
    "overlap-check",
    "encrypt",
];

/// Below this a single request could not keep what it needs at once.
const CACHE_BYTES_MIN: u64 = 128 << 10;
const CACHE_BYTES_MAX: u64 = 64 << 30;

fn options(options: &Options) -> Result<Qcow2Options> {
    let mut options = options.clone();
    // Nothing but the absence of a child: `"backing": null`.
    if options.get("backing").is_some_and(serde_json::Value::is_null) {
        options.remove("backing");
    }
    if let Some(encrypt) = options.get("encrypt") {
        let format = encrypt.get("format").and_then(serde_json::Value::as_str).unwrap_or_default();
        let text = format_args!("No encryption in image header, but options specified format '{format}'");
        return Err(Error::new(Kind::Invalid, text));
    }
    let modes = ["none", "constant", "cached", "all"];
    if let Some(mode) = options.get("overlap-check").and_then(serde_json::Value::as_str)
        && !modes.contains(&mode)
    {
        let text = format_args!("unknown variant `{mode}`, expected one of {}", modes.join(", "));
        return Err(Error::new(Kind::Invalid, text).key("overlap-check"));
    }
    let parsed: Qcow2Options = parse_options(&options)?;
    parsed.check()?;
    Ok(parsed)
}

impl Qcow2Options {
    fn check(&self) -> Result<()> {
        let wrong = |text: &str| Err(Error::new(Kind::Invalid, text));
        if self.cache_size.is_some() && self.l2_cache_size.is_some() && self.refcount_cache_size.is_some() {
            return wrong(
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
            );
        }
        if let Some(size) = self.cache_size {
            if self.l2_cache_size.is_some_and(|part| part > size) {
                return wrong("l2-cache-size may not exceed cache-size");
            }
            if self.refcount_cache_size.is_some_and(|part| part > size) {
                return wrong("refcount-cache-size may not exceed cache-size");
            }
        }
        if let Some(OverlapCheck::Flags(OverlapFlags { flags, .. })) = &self.overlap_check
            && let Some(unknown) = flags.keys().find(|flag| !OVERLAPS.contains(&flag.as_str()))
        {
            let text = format_args!("there is no such check; expected {}", OVERLAPS.join(", "));
            return Err(Error::new(Kind::Invalid, text).key(&format!("overlap-check.{unknown}")));
        }
        Ok(())
    }

    /// The memory for both caches, within what makes sense.
    fn cache_bytes(&self) -> u64 {
        let half = self.l2_cache_size.max(self.refcount_cache_size);
        let both = half.map(|Bytes(half)| half.saturating_mul(2));
        let bytes = self.cache_size.map(|size| size.0).or(both).unwrap_or(CACHE_BYTES_DEFAULT);
        bytes.clamp(CACHE_BYTES_MIN, CACHE_BYTES_MAX)
    }

    /// What the image says about its clusters has to fit.
    fn check_against(&self, cluster_bytes: u64) -> Result<()> {
        let fits = |size: u64| size.is_power_of_two() && (512..=cluster_bytes).contains(&size);
        if self.l2_cache_entry_size.is_some_and(|size| !fits(size.0)) {
            let text = format_args!(
                "L2 cache entry size must be a power of two between 512 and the cluster size ({cluster_bytes})"
            );
            return Err(Error::new(Kind::Invalid, text));
        }
        Ok(())
    }
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
                options: OPTIONS.into_iter().map(Into::into).collect(),
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
            let image = file.filename();
            let definition = named::backing(name, header.backing_format.as_deref(), image.as_deref())?;
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
            let geometry = super::open::read_header(&mut Io::Edges(&edges)).await?.geometry();
            options.check_against(geometry.cluster_bytes())?;
            if geometry.data_file != data_file {
                let text = if data_file {
                    "the image keeps its data in itself"
                } else {
                    "the image keeps its data there"
                };
                return Err(Error::new(Kind::Invalid, text).key("data-file"));
            }
            let mut qcow2 =
                Qcow2::open(&mut Io::Edges(&edges), options.cache_bytes(), args.read_only).await?;
            qcow2.cookie = args.cookie;
            qcow2.pass_discard.store(options.pass_discard_request != Some(false), Relaxed);
            let node: Arc<dyn OpenNode> =
                Arc::new(Qcow2Node(Arc::new(Body { cookie: args.cookie, driver: qcow2 })));
            Ok(node)
        })
    }

    /// Whether discards are passed on is changed in place. What the caches were made with stays.
    fn reopen<'a>(
        &'a self,
        old: &'a Arc<dyn OpenNode>,
        before: &'a Options,
        args: OpenArgs<'a>,
    ) -> BoxFuture<'a, Result<Reopened>> {
        Box::pin(async move {
            let new = options(args.options)?;
            let Some(node) = old.as_any().and_then(|old| old.downcast_ref::<Qcow2Node>()) else {
                return Err(Error::new(Kind::NotSupported, "it is no node of this driver"));
            };
            let caches = ["cache-size", "l2-cache-size", "refcount-cache-size"];
            if let Some(key) = caches.into_iter().find(|key| before.get(*key) != args.options.get(*key)) {
                let text = format_args!("Cannot change the option '{key}'");
                return Err(Error::new(Kind::NotSupported, text));
            }
            new.check_against(node.0.driver.geometry.cluster_bytes())?;
            let body = node.0.clone();
            let was = body.driver.pass_discard.swap(new.pass_discard_request != Some(false), Relaxed);
            let undo = Box::new(move || body.driver.pass_discard.store(was, Relaxed));
            Ok(Reopened { open: old.clone(), undo, close_old: false })
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
    let path = named::path("data-file", &name, file.filename().as_deref())?;
    let definition = serde_json::json!({
        "driver": "file",
        "read-only": file.edge.info().flags & info::READ_ONLY != 0,
        "path": path,
    });
    let serde_json::Value::Object(definition) = definition else { unreachable!("it is an object") };
    Ok(ImpliedChild { name: "data-file".into(), definition })
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

    fn as_any(&self) -> Option<&dyn std::any::Any> {
        Some(self)
    }

    fn refresh<'a>(&'a self, children: &'a [OpenChild]) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let edges = edges(children)?;
            self.0.driver.refresh(&mut Io::Edges(&edges)).await
        })
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

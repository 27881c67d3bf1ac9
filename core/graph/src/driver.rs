//! What makes a node work: the contract of drivers outside the data path.
//!
//! The data path of a driver is an [`OpTable`](driveline_op::OpTable); here is the rest: how a node is opened from
//! options, what it says about itself, and what is done with it while nothing is in flight.

pub use crate::permission::Permissions;
use crate::{
    BitmapToStore, CreateArgs, Created, Error, Graph, Kind, ObjectCall, Preallocation, Result, StoredBitmaps,
    Witness, stored,
};
use driveline_bitmap::Bits;
use driveline_op::{Ask, Buffer, Call, Edge, Info, Instance, effect, op};
use std::{
    borrow::Cow,
    fmt,
    future::Future,
    ops::Range,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
};

/// A boxed future, for paths where an allocation does not matter.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Options of a node: a JSON object, without the keys that the graph keeps for itself (`driver`, `node-name`,
/// `read-only`, and the names of children).
pub type Options = serde_json::Map<String, serde_json::Value>;

/// Reads options into a driver's own struct. It should `deny_unknown_fields`; the error names the key.
pub fn parse_options<T: serde::de::DeserializeOwned>(options: &Options) -> Result<T> {
    let value = serde_json::Value::Object(options.clone());
    serde_path_to_error::deserialize(value).map_err(|error| {
        let (path, text) = (error.path().to_string(), error.inner().to_string());
        let base = path.trim_end_matches('.');
        // A field that is missing has no place, so its path is that of the table it is missing from.
        let missing = text.strip_prefix("missing field `").and_then(|rest| rest.split_once('`'));
        match missing {
            Some((key, _)) if base.is_empty() => Error::new(Kind::Invalid, "it must be given").key(key),
            Some((key, _)) => Error::new(Kind::Invalid, "it must be given").key(&format!("{base}.{key}")),
            None => Error::new(Kind::Invalid, text).key(base),
        }
    })
}

/// The three kinds of drivers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DriverKind {
    /// Passes requests to one child and shows the same data.
    Filter,
    /// Interprets a child's bytes: qcow2, raw.
    Format,
    /// A leaf: file, memory.
    Protocol,
}

/// What a child is to its parent. Permissions follow from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The child of a filter: same data, same offsets.
    Filtered,
    /// The file of a format that keeps data and metadata in it.
    Storage,
    /// Data only, at other offsets perhaps (raw with a window; further children of filters).
    Data,
    /// Where unallocated ranges are read from.
    Backing,
    /// Where a filter copies the old data to that is about to be overwritten. It may be an image whose backing is that
    /// very data: see `wiring.rs` for how its readers are kept right.
    Target,
    /// The point in time that a node shows beside its present (see [`OpenNode::point_in_time`]). Such an edge stays where it
    /// is, whatever is put on top of the child or takes its place.
    PointInTime,
}

/// A child that a driver takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChildSpec {
    /// Its option: `child`, `file`, `backing`, `target`.
    pub name: Cow<'static, str>,
    /// What it is to the node.
    pub role: Role,
    /// Must it be there?
    pub required: bool,
    /// It is a list of them, whose members are called `NAME.0`, `NAME.1` and so on.
    pub list: bool,
}

impl ChildSpec {
    /// A child that must be there.
    pub const fn required(name: &'static str, role: Role) -> Self {
        Self { name: Cow::Borrowed(name), role, required: true, list: false }
    }

    /// A list of children, one at least.
    pub const fn list(name: &'static str, role: Role) -> Self {
        Self { name: Cow::Borrowed(name), role, required: true, list: true }
    }

    /// A member of a list.
    pub fn member(&self, number: usize) -> Self {
        Self { name: Cow::Owned(format!("{}.{number}", self.name)), list: false, ..self.clone() }
    }

    /// Of a list, the number of a child that has that name.
    pub fn number(&self, child: &str) -> Option<u64> {
        child.strip_prefix(&*self.name)?.strip_prefix('.')?.parse().ok().filter(|_| self.list)
    }

    /// A child that may be missing.
    pub const fn optional(name: &'static str, role: Role) -> Self {
        Self { name: Cow::Borrowed(name), role, required: false, list: false }
    }
}

/// What becomes of operations that a driver leaves out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// They go to child 0 as they are.
    Pass,
    /// They are emulated through those it has, else refused.
    Deny,
}

/// What a driver declares about itself, for the core and for people.
#[derive(Clone, Debug)]
pub struct Description {
    /// The driver's name in a graph.
    pub name: Cow<'static, str>,
    /// Filter, format or protocol.
    pub kind: DriverKind,
    /// Its version.
    pub version: Cow<'static, str>,
    /// One line for people.
    pub summary: Cow<'static, str>,
    /// The children it takes, in the order of their numbers.
    pub children: Vec<ChildSpec>,
    /// Names of the options it accepts.
    pub options: Vec<Cow<'static, str>>,
    /// How many operations it knew when it was built; see "lower, never bypass".
    pub operations_known: u32,
    /// What becomes of known operations that it leaves out.
    pub missing: Missing,
    /// Bits of `driveline_abi::effect`.
    pub effects: u64,
    /// Bits of `driveline_abi::flag` that it knew when it was built. Others are taken from requests before it gets them.
    pub flags_known: u32,
    /// Other words for child 0, beside its name (QEMU calls it `image` in some drivers, `raw` in another).
    pub child_words: Vec<Cow<'static, str>>,
    /// Kinds of objects that it keeps; see [`Driver::object`].
    pub objects: Vec<Cow<'static, str>>,
}

impl Description {
    /// A built-in driver: it knows every operation.
    pub fn builtin(name: &'static str, kind: DriverKind, summary: &'static str) -> Self {
        Self {
            name: name.into(),
            kind,
            version: env!("CARGO_PKG_VERSION").into(),
            summary: summary.into(),
            children: Vec::new(),
            options: Vec::new(),
            operations_known: op::COUNT as u32,
            missing: if kind == DriverKind::Filter { Missing::Pass } else { Missing::Deny },
            effects: 0,
            flags_known: u32::MAX,
            child_words: Vec::new(),
            objects: Vec::new(),
        }
    }

    /// Has what a filter shows the same bytes at the same offsets as what is below it?
    pub fn shows_data_as_it_is(&self) -> bool {
        self.kind == DriverKind::Filter
            && self.effects & (effect::CHANGES_DATA | effect::CHANGES_OFFSETS) == 0
    }

    /// What QEMU calls a child: that of a filter is its `file`, unless the driver has another word of QEMU's for it.
    pub fn word<'a>(&'a self, child: &'a str, role: Role) -> &'a str {
        match role {
            Role::Filtered if child == "child" => self.child_words.first().map_or("file", |word| word),
            _ => child,
        }
    }
}

/// A kind of node.
pub trait Driver: Send + Sync + 'static {
    /// What it is.
    fn description(&self) -> &Description;

    /// Would `open` take these options? Looks at nothing outside them, and has no effect.
    fn check(&self, options: &Options) -> Result<()>;

    /// Children that the options leave out and that the image itself names (the backing file of a qcow2 header).
    /// `given` are the children that were opened already; `options` have `null` for each child that the definition decides
    /// about. The graph opens what is returned, and passes it to `open`.
    fn implied_children<'a>(
        &'a self,
        options: &'a Options,
        given: &'a [OpenChild],
    ) -> BoxFuture<'a, Result<Vec<ImpliedChild>>> {
        let _ = (options, given);
        Box::pin(async { Ok(Vec::new()) })
    }

    /// The nodes that a new image of this driver is made in: none for a driver that makes files by their names. `None`: it
    /// makes no images.
    fn created_in(&self) -> Option<&[ChildSpec]> {
        None
    }

    /// Makes a new image, durably. What is in the nodes that it is made in is lost; wrong options are refused before that.
    fn create<'a>(&'a self, args: CreateArgs<'a>) -> BoxFuture<'a, Result<Created>> {
        let _ = args;
        Box::pin(async { Err(Error::new(Kind::NotSupported, "its driver makes no images")) })
    }

    /// Opens a node. On an error nothing was changed.
    fn open<'a>(&'a self, args: OpenArgs<'a>) -> BoxFuture<'a, Result<Arc<dyn OpenNode>>>;

    /// As [`Driver::open`], for a driver whose options name other things of the graph (a bitmap). It must not change the
    /// graph, nor wait for a change of it.
    fn open_in<'a>(
        &'a self,
        graph: &'a Graph,
        args: OpenArgs<'a>,
    ) -> BoxFuture<'a, Result<Arc<dyn OpenNode>>> {
        let _ = graph;
        self.open(args)
    }

    /// Gives an open node new options instead of those `before`, while nothing is in flight; `args.read_only` is what it is
    /// now. On an error nothing was changed.
    ///
    /// Unless a driver knows better, a filter is opened anew beside the old instance, and others cannot change their options:
    /// then the error names the first that differs.
    fn reopen<'a>(
        &'a self,
        old: &'a Arc<dyn OpenNode>,
        before: &'a Options,
        args: OpenArgs<'a>,
    ) -> BoxFuture<'a, Result<Reopened>> {
        Box::pin(async move {
            if self.description().kind == DriverKind::Filter {
                let open = self.open(args).await?;
                return Ok(Reopened { open, undo: Box::new(|| {}), close_old: true });
            }
            crate::refuse_changes(before, args.options)?;
            Ok(Reopened::same(old))
        })
    }

    /// Does something with an object: what nodes of this driver share by name and is no node itself (a throttle group).
    /// `kind` is one of [`Description::objects`]. Returns its properties as they are then; [`ObjectCall::Check`] and
    /// [`ObjectCall::Delete`] return none. On an error nothing was changed.
    ///
    /// Errors: [`Kind::NotFound`], [`Kind::Exists`], [`Kind::Busy`] for one that nodes use and that shall go, and
    /// [`Kind::Invalid`] with the property's name as the key.
    fn object(&self, kind: &str, name: &str, call: ObjectCall<'_>) -> Result<Options> {
        let _ = (name, call);
        Err(Error::new(
            Kind::NotSupported,
            format_args!("driver '{}' has no '{kind}'", self.description().name),
        ))
    }
}

/// What became of a node that was given new options.
pub struct Reopened {
    /// The instance that goes on: the old one, or another.
    pub open: Arc<dyn OpenNode>,
    /// Takes it back, if the change of the graph fails after all.
    pub undo: Box<dyn FnOnce() + Send>,
    /// It is another, and the old one is to be closed once the change is made (or the new one if it is not).
    pub close_old: bool,
}

impl fmt::Debug for Reopened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reopened").field("close_old", &self.close_old).finish_non_exhaustive()
    }
}

impl Reopened {
    /// The same instance goes on, and there is nothing to take back.
    pub fn same(old: &Arc<dyn OpenNode>) -> Self {
        Self { open: old.clone(), undo: Box::new(|| {}), close_old: false }
    }
}

/// A child named by an image.
#[derive(Clone, Debug)]
pub struct ImpliedChild {
    /// Which child of the driver's description.
    pub name: Cow<'static, str>,
    /// A node definition, `driver` included, as it could stand in a configuration.
    pub definition: Options,
}

/// A child at the time of opening, and in calls outside the data path.
#[derive(Clone)]
pub struct OpenChild {
    /// Which child of the driver's description.
    pub name: Cow<'static, str>,
    /// To read and write it.
    pub edge: Edge,
    /// The node itself.
    pub node: Arc<dyn OpenNode>,
    /// The first node from there down that is no filter: the node itself, if it is none.
    pub unfiltered: Arc<dyn OpenNode>,
    /// The node's name.
    pub node_name: Arc<str>,
}

impl OpenChild {
    /// The file or device that its data are, through whatever filters: what names in an image's header are relative to.
    pub fn filename(&self) -> Option<PathBuf> {
        self.unfiltered.filename()
    }

    /// Changes its size, in itself or, through the filters that it may consist of, in what is below.
    pub async fn resize(&self, size_bytes: u64) -> Result<()> {
        resize_through(&self.node, &[], &self.edge, size_bytes).await
    }
}

/// Changes a node's size in itself, or else with the request for it, which filters pass on.
pub(crate) async fn resize_through(
    node: &Arc<dyn OpenNode>,
    children: &[OpenChild],
    edge: &Edge,
    size_bytes: u64,
) -> Result<()> {
    match node.resize(children, size_bytes).await {
        Err(error) if error.kind() == Kind::NotSupported && !edge.refuses(op::RESIZE) => {
            let ask = Ask { op: op::RESIZE, offset: size_bytes, ..Ask::default() };
            let done = Call::new(edge.clone(), ask, Buffer::default()).await.result;
            done.map_err(|other| match Kind::of_errno(other.code()) {
                // The node knows better why not.
                Kind::NotSupported => error,
                _ => Error::io(other.code(), "resizing"),
            })
        }
        done => done,
    }
}

impl fmt::Debug for OpenChild {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenChild")
            .field("name", &self.name)
            .field("node", &self.node_name)
            .finish_non_exhaustive()
    }
}

/// What a node is opened with.
#[derive(Debug)]
pub struct OpenArgs<'a> {
    /// Its name.
    pub node_name: &'a str,
    /// Names it to the panic hook; goes into [`Body::cookie`](driveline_op::Body::cookie).
    pub cookie: u64,
    /// Its options.
    pub options: &'a Options,
    /// Its children in the order of the description; missing optional ones are left out.
    pub children: Vec<OpenChild>,
    /// Must nothing be written?
    pub read_only: bool,
    /// Relative paths start here.
    pub directory: &'a Path,
}

impl OpenArgs<'_> {
    /// The child of that name.
    pub fn child(&self, name: &str) -> Option<&OpenChild> {
        self.children.iter().find(|child| child.name == name)
    }
}

/// A snapshot inside an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Names it for good.
    pub id: String,
    /// What its maker called it.
    pub name: String,
    /// When it was taken, since 1970.
    pub date_ns: u64,
    /// How long the guest had run by then.
    pub vm_clock_ns: u64,
    /// The size of the VM's state that was saved with it.
    pub vm_state_bytes: u64,
    /// The size of the disk then, if it was noted.
    pub size_bytes: Option<u64>,
    /// How many instructions the guest had run, if it was noted.
    pub icount: Option<u64>,
}

/// An open node, outside the data path. `children` are its present ones, in the order of the description.
///
/// The graph calls the `&self` methods that change something only while nothing is in flight in the node, except
/// [`OpenNode::info`] and the questions, which may come at any time.
pub trait OpenNode: Send + Sync {
    /// Its operations.
    fn instance(&self) -> Instance;

    /// Size and limits, given those of its children. Called again after each change below.
    fn info(&self, children: &[Info]) -> Info;

    /// Its operations on a point in time, over the same children, for parents whose edge has [`Role::PointInTime`]. Those
    /// that it leaves out are refused.
    fn point_in_time(&self) -> Option<Instance> {
        None
    }

    /// Hears of its children each time that the graph is wired, before any request comes that way: for a node that goes on with
    /// something after the request it began with (see [`OpenNode::own_work`]).
    fn wired(&self, children: &[OpenChild]) {
        let _ = children;
    }

    /// What the node does by itself, after the request that it began with was answered: is ready when there is nothing more of
    /// it. Whatever drains the node waits for that, too. `None`: there is nothing.
    fn own_work(&self) -> Option<BoxFuture<'static, ()>> {
        None
    }

    /// A drain that waits for requests in it begins (`true`) or ends: what it holds back for a time it lets go at once, until
    /// then. Requests may be at work. It does not wait; each beginning has its end, and several may be on at a time.
    fn set_drained(&self, drained: bool) {
        let _ = drained;
    }

    /// Cuts its connections to what it is a client of: what was asked there fails, and is not asked again. Later requests do
    /// what they do when a connection is lost.
    ///
    /// Errors: [`Kind::NotSupported`] if it has none.
    fn yank(&self) -> Result<()> {
        Err(Error::new(Kind::NotSupported, "its driver has no connection that could be cut"))
    }

    /// While it waits for answers over a connection: how many it has had so far. One who sees the same number for long
    /// waits for a server that does not answer. `None`: it waits for none.
    fn awaited(&self) -> Option<u64> {
        None
    }

    /// The file or device that it is, for people and for images that name their backing file.
    fn filename(&self) -> Option<PathBuf> {
        None
    }

    /// The address of what it is, if that is no file and a URI says all of it.
    fn uri(&self) -> Option<String> {
        None
    }

    /// That file as it was when the node was opened and had it for itself, before the node or its parents changed anything.
    fn file_at_open(&self) -> Option<&std::fs::Metadata> {
        None
    }

    /// The node as its own type, for a driver that reopens it.
    fn as_any(&self) -> Option<&dyn std::any::Any> {
        None
    }

    /// Reads anew what others may have changed while the node was inactive.
    fn refresh<'a>(&'a self, children: &'a [OpenChild]) -> BoxFuture<'a, Result<()>> {
        let _ = children;
        Box::pin(async { Ok(()) })
    }

    /// What there is to say about it, for queries (a JSON object).
    fn details(&self) -> serde_json::Value {
        serde_json::Value::Object(Options::new())
    }

    /// What it needs of a child, and does not let others do with it, beyond what follows from its kind and the child's role:
    /// for child number `child` of those that it was opened with, while it is read-only or not. Else it does not change.
    fn claim(&self, child: usize, read_only: bool) -> (Permissions, Permissions) {
        let _ = (child, read_only);
        (Permissions::NONE, Permissions::NONE)
    }

    /// Takes a new size. It may write to its children, and resize them through their nodes.
    fn resize<'a>(&'a self, children: &'a [OpenChild], size_bytes: u64) -> BoxFuture<'a, Result<()>> {
        let _ = (children, size_bytes);
        Box::pin(async { Err(Error::new(Kind::NotSupported, "its driver cannot change the size")) })
    }

    /// Gives a range its space; it reads as zeroes afterwards, and the node reaches its end at least.
    ///
    /// Errors: [`Kind::NotSupported`] for a way that the driver does not have, [`Kind::NoSpace`].
    fn preallocate<'a>(
        &'a self,
        children: &'a [OpenChild],
        range: Range<u64>,
        how: Preallocation,
    ) -> BoxFuture<'a, Result<()>> {
        let _ = (children, range);
        Box::pin(async move {
            let text = format_args!("Unsupported preallocation mode '{}'", how.name());
            Err(Error::new(Kind::NotSupported, text))
        })
    }

    /// Becomes read-only, or writable. When this fails it stays what it was.
    fn set_read_only<'a>(&'a self, children: &'a [OpenChild], read_only: bool) -> BoxFuture<'a, Result<()>> {
        let _ = (children, read_only);
        Box::pin(async { Ok(()) })
    }

    /// Takes what its users together need and let others do (a file takes locks). When this fails it keeps the old.
    fn set_permissions(&self, needs: Permissions, shares: Permissions) -> BoxFuture<'_, Result<()>> {
        let _ = (needs, shares);
        Box::pin(async { Ok(()) })
    }

    /// May it have so many children, if its driver takes a list of them?
    fn check_children(&self, count: usize) -> Result<()> {
        let _ = count;
        Ok(())
    }

    /// The backing file that the image names, and its format.
    fn backing_file(&self) -> Option<(String, String)> {
        None
    }

    /// Writes another backing file into the image (`None`: none). The child itself is the graph's business.
    fn set_backing_file<'a>(
        &'a self,
        children: &'a [OpenChild],
        backing: Option<(&'a str, &'a str)>,
    ) -> BoxFuture<'a, Result<()>> {
        let _ = (children, backing);
        Box::pin(async { Err(Error::new(Kind::NotSupported, "its driver has no backing file")) })
    }

    /// Gives up everything that this layer has allocated, so that all is read from the backing.
    fn make_empty<'a>(&'a self, children: &'a [OpenChild]) -> BoxFuture<'a, Result<()>> {
        let _ = children;
        Box::pin(async { Err(Error::new(Kind::NotSupported, "its driver cannot be emptied")) })
    }

    /// Writes one cluster compressed: `data` is a cluster from `offset` on, which is where one begins, or ends with the
    /// node. What does not become smaller is written as it is. Nothing is durable before a flush.
    fn write_compressed<'a>(
        &'a self,
        children: &'a [OpenChild],
        offset: u64,
        data: &'a [u8],
    ) -> BoxFuture<'a, Result<()>> {
        let _ = (children, offset, data);
        Box::pin(async { Err(Error::new(Kind::NotSupported, "its driver does not compress")) })
    }

    /// Has the format a place for snapshots inside the image?
    fn can_snapshot(&self) -> bool {
        false
    }

    /// The snapshots inside the image, in the order of its table.
    fn snapshots(&self) -> Vec<Snapshot> {
        Vec::new()
    }

    /// Keeps the data as it is now as a snapshot inside the image; returns its id. It is durable then.
    ///
    /// Errors: [`Kind::Exists`] if one has that name, [`Kind::Invalid`] if none can have it, or what the format lacks.
    fn take_snapshot<'a>(
        &'a self,
        children: &'a [OpenChild],
        name: &'a str,
    ) -> BoxFuture<'a, Result<String>> {
        let _ = (children, name);
        Box::pin(async { Err(Error::new(Kind::NotSupported, "its driver has no snapshots")) })
    }

    /// Makes the data, and the size, what they were when a snapshot was taken: the one with that id, or else that name.
    /// Everything since is lost.
    ///
    /// Errors: [`Kind::NotFound`], or [`Kind::NotSupported`] while there are persistent bitmaps in the image.
    fn apply_snapshot<'a>(
        &'a self,
        children: &'a [OpenChild],
        snapshot: &'a str,
    ) -> BoxFuture<'a, Result<()>> {
        let _ = (children, snapshot);
        Box::pin(async { Err(Error::new(Kind::NotSupported, "its driver has no snapshots")) })
    }

    /// Forgets a snapshot: the one with that id, or else that name.
    ///
    /// Errors: [`Kind::NotFound`].
    fn delete_snapshot<'a>(
        &'a self,
        children: &'a [OpenChild],
        snapshot: &'a str,
    ) -> BoxFuture<'a, Result<()>> {
        let _ = (children, snapshot);
        Box::pin(async { Err(Error::new(Kind::NotSupported, "its driver has no snapshots")) })
    }

    /// The bitmaps that the image holds.
    fn stored_bitmaps<'a>(&'a self, children: &'a [OpenChild]) -> BoxFuture<'a, Result<StoredBitmaps>> {
        let _ = children;
        stored::none()
    }

    /// The contents of one of them, as long as the node: as they were stored, whatever was written since.
    ///
    /// Errors: [`Kind::NotFound`]; [`Kind::Corrupt`] for one that is inconsistent, with the reason.
    fn load_bitmap<'a>(&'a self, children: &'a [OpenChild], name: &'a str) -> BoxFuture<'a, Result<Bits>> {
        let _ = (children, name);
        stored::none()
    }

    /// Makes exactly these the bitmaps that the image holds, durably. When this fails, or never comes to its end, the
    /// image holds the old ones.
    fn store_bitmaps<'a>(
        &'a self,
        children: &'a [OpenChild],
        bitmaps: &'a [BitmapToStore<'a>],
    ) -> BoxFuture<'a, Result<()>> {
        let _ = (children, bitmaps);
        stored::none()
    }

    /// Says of some bitmaps in the image, durably, that what is stored must not be trusted (`in_use`), or may be again.
    /// When this fails, those that are not in use are as they were stored, but more than before may be in use.
    fn set_bitmaps_in_use<'a>(
        &'a self,
        children: &'a [OpenChild],
        names: &'a [&'a str],
        in_use: bool,
    ) -> BoxFuture<'a, Result<()>> {
        let _ = (children, names, in_use);
        stored::none()
    }

    /// The mark that proves that nobody else wrote to the image since it was set; `None`: the image can have none.
    fn witness(&self) -> Option<Witness> {
        None
    }

    /// Sets or takes away that mark, durably.
    fn set_witness<'a>(&'a self, children: &'a [OpenChild], set: bool) -> BoxFuture<'a, Result<()>> {
        let _ = (children, set);
        Box::pin(async { Err(Error::new(Kind::NotSupported, "its driver has no witness")) })
    }

    /// Writes what is held back and gives everything up. No request comes afterwards.
    fn close<'a>(&'a self, children: &'a [OpenChild]) -> BoxFuture<'a, Result<()>> {
        let _ = children;
        Box::pin(async { Ok(()) })
    }
}

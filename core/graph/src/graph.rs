//! The graph: drivers, nodes, drives, roots, and the one place where changes of it begin.

use crate::{
    change::{Change, Opened},
    definition::Definition,
    driver::{Description, Driver, Options},
    error::{Error, Kind, Result},
    event::{Event, NodeEvent},
    keeper::Keeper,
    layout::{DriveView, Layout, NodeView},
    node::{Node, NodeId},
    permission::{self, Granted},
    root::{Root, RootOptions, RootShared},
    stats::AllStats,
    topology::{Attached, Attachment, Topology, nearest},
    wiring::{Wired, wire},
};
use driveline_bitmap::{Bitmap, BitmapId};
use driveline_op::Info;
use parking_lot::{Mutex, RwLock};
use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

/// A storage graph. Cheap to clone; all clones are the same graph.
#[derive(Clone)]
pub struct Graph(pub(crate) Arc<Inner>);

pub(crate) struct Inner {
    drivers: RwLock<BTreeMap<String, Arc<dyn Driver>>>,
    pub(crate) state: Mutex<State>,
    pub(crate) changing: Arc<async_lock::Mutex<()>>,
    pub(crate) trace: bool,
    next_root: AtomicU64,
    next_name: AtomicU64,
    listeners: RwLock<Vec<Listener>>,
    pub(crate) keeper: RwLock<Option<Arc<dyn Keeper>>>,
    /// What roots that count have counted.
    pub(crate) stats: Mutex<AllStats>,
    /// What changes that were dropped had opened: see [`Change`].
    pub(crate) left_open: Mutex<Opened>,
}

type Listener = Box<dyn Fn(&Event) + Send + Sync>;

/// The graph as it is. Replaced as a whole by a change.
#[derive(Clone, Default)]
pub(crate) struct State {
    pub(crate) topology: Arc<Topology>,
    pub(crate) wired: Arc<BTreeMap<NodeId, Wired>>,
    pub(crate) granted: Arc<BTreeMap<NodeId, Granted>>,
    /// Bitmaps that are away from home, parked on a holder: their ids and home nodes.
    pub(crate) parked: BTreeMap<BitmapId, NodeId>,
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.0.state.lock();
        let names: Vec<_> = state.topology.names.keys().collect();
        f.debug_struct("Graph").field("nodes", &names).finish_non_exhaustive()
    }
}

/// How a graph works.
#[derive(Clone, Copy, Debug, Default)]
pub struct GraphOptions {
    /// Every node emits trace events for every request that it gets (target `driveline::io`). It costs some
    /// nanoseconds a node, so it is decided once.
    pub trace: bool,
}

/// Graphs of this process, for the panic hook: a filter's panic marks its node as failed.
static GRAPHS: OnceLock<Mutex<Vec<Weak<Inner>>>> = OnceLock::new();

/// Tells every graph that an operation of the node with this cookie panicked. `driveline_op::set_panic_hook` gets
/// this for drivers in the program itself; the loader calls it for plugins.
pub fn node_failed(cookie: u64, text: &str) {
    let graphs = GRAPHS.get_or_init(Default::default).lock().clone();
    for graph in graphs.iter().filter_map(Weak::upgrade) {
        Graph(graph).mark_failed(NodeId(cookie), text);
    }
}

/// Tells of something in an operation of the node with this cookie, whatever graph it is in. One that is only being opened
/// has nobody to tell it to.
pub fn node_tells(cookie: u64, event: &NodeEvent) {
    let graphs = GRAPHS.get_or_init(Default::default).lock().clone();
    for graph in graphs.iter().filter_map(Weak::upgrade) {
        Graph(graph).tell_of_node(NodeId(cookie), event);
    }
}

/// The name of the node with this cookie, whatever graph it is in: what `driveline_op::set_name_hook` gets for drivers
/// in the program itself.
fn node_name(cookie: u64) -> Option<String> {
    let graphs = GRAPHS.get_or_init(Default::default).lock().clone();
    let mut graphs = graphs.iter().filter_map(Weak::upgrade);
    graphs.find_map(|graph| {
        Graph(graph).topology().nodes.get(&NodeId(cookie)).map(|placed| placed.node.name().to_owned())
    })
}

impl Graph {
    /// An empty graph without drivers.
    pub fn new(options: GraphOptions) -> Self {
        let graph = Self(Arc::new(Inner {
            drivers: RwLock::default(),
            state: Mutex::default(),
            changing: Arc::default(),
            trace: options.trace,
            next_root: AtomicU64::new(1),
            next_name: AtomicU64::new(0),
            listeners: RwLock::default(),
            keeper: RwLock::default(),
            stats: Mutex::default(),
            left_open: Mutex::default(),
        }));
        driveline_op::set_panic_hook(node_failed);
        driveline_op::set_name_hook(node_name);
        let mut graphs = GRAPHS.get_or_init(Default::default).lock();
        graphs.retain(|graph| graph.strong_count() > 0);
        graphs.push(Arc::downgrade(&graph.0));
        drop(graphs);
        graph
    }

    /// Makes a driver known. A name that is taken is refused.
    pub fn register(&self, driver: Arc<dyn Driver>) -> Result<()> {
        let name = driver.description().name.to_string();
        let mut drivers = self.0.drivers.write();
        if drivers.contains_key(&name) {
            return Err(Error::new(Kind::Exists, format_args!("there is a driver '{name}' already")));
        }
        drivers.insert(name, driver);
        Ok(())
    }

    /// A driver by name.
    pub fn driver(&self, name: &str) -> Result<Arc<dyn Driver>> {
        let drivers = self.0.drivers.read();
        drivers.get(name).cloned().ok_or_else(|| {
            let nearest = nearest(name, drivers.keys().map(String::as_str));
            let hint = nearest.map(|n| format!("; did you mean '{n}'?")).unwrap_or_default();
            Error::new(Kind::NotFound, format_args!("unknown driver '{name}'{hint}")).key("driver")
        })
    }

    /// What all known drivers say about themselves.
    pub fn drivers(&self) -> Vec<Description> {
        self.0.drivers.read().values().map(|driver| driver.description().clone()).collect()
    }

    /// Reads a node definition from a JSON object. `beside` are names of nodes that are defined together with it.
    pub fn parse(&self, object: Options, beside: &[&str]) -> Result<Definition> {
        let drivers: BTreeMap<String, Description> =
            self.drivers().into_iter().map(|d| (d.name.to_string(), d)).collect();
        let describe = |name: &str| match drivers.get(name) {
            Some(description) => Ok(description),
            None => Err(self.driver(name).err().expect("it is not there")),
        };
        let topology = self.topology();
        let is_node = |name: &str| beside.contains(&name) || topology.names.contains_key(name);
        Definition::parse(object, &describe, &is_node)
    }

    /// The same, where the nodes of a topology in the making count as there.
    pub(crate) fn parse_in(&self, topology: &Topology, object: Options) -> Result<Definition> {
        let beside: Vec<&str> = topology.names.keys().map(|name| &**name).collect();
        self.parse(object, &beside)
    }

    /// Begins a change. Changes follow each other; this waits for the one before.
    pub async fn change(&self) -> Change {
        let turn = self.0.changing.lock_arc().await;
        self.close_left_open().await;
        Change::new(self.clone(), turn)
    }

    pub(crate) fn topology(&self) -> Arc<Topology> {
        self.0.state.lock().topology.clone()
    }

    /// Opens a root on a drive, or on a node, by name (a drive's goes first). On a drive it follows the drive, and on a node
    /// it stays.
    pub async fn open_root(&self, name: &str, options: RootOptions) -> Result<Root> {
        let mut change = self.change().await;
        let root = change.attach(name, &options)?;
        change.commit().await?;
        Ok(root)
    }

    /// As [`Graph::open_root`], but on a node it keeps its place in the graph: what is put above the node, or takes its
    /// place, takes the root along. Exports do this, as a drive does.
    pub async fn open_following_root(&self, name: &str, options: RootOptions) -> Result<Root> {
        let mut change = self.change().await;
        let root = change.attach_following(name, &options)?;
        change.commit().await?;
        Ok(root)
    }

    pub(crate) fn new_root(&self, options: &RootOptions, at: NodeId) -> Arc<RootShared> {
        let id = self.0.next_root.fetch_add(1, Relaxed);
        let state = self.0.state.lock();
        // A node that the same change adds is not wired yet; the commit rewires the root before anyone has it.
        let edge = state.wired.get(&at).map(|wired| wired.edge.clone());
        let ranges =
            state.topology.nodes.get(&at).map(|placed| placed.node.ranges.clone()).unwrap_or_default();
        let edge =
            edge.unwrap_or_else(|| driveline_op::Edge::new(Info::default(), |_| driveline_op::Route::Refuse));
        RootShared::new(id, options, edge, ranges)
    }

    pub(crate) fn root_node_name(&self, id: u64) -> Arc<str> {
        let topology = self.topology();
        topology
            .roots
            .get(&id)
            .map(|attached| topology.name(topology.root_node(attached)))
            .unwrap_or_else(|| "".into())
    }

    pub(crate) fn forget_root(&self, id: u64) {
        let mut state = self.0.state.lock();
        if state.topology.roots.contains_key(&id) {
            Arc::make_mut(&mut state.topology).roots.remove(&id);
        }
    }

    /// A name for a node that was given none: `#qcow2-1`.
    pub(crate) fn new_name(&self, driver: &str) -> Arc<str> {
        format!("#{driver}-{}", self.0.next_name.fetch_add(1, Relaxed) + 1).into()
    }

    /// The graph as it is now, for several questions about one moment.
    pub fn layout(&self) -> Layout {
        self.0.state.lock().clone().into()
    }

    /// A node by name.
    pub fn node(&self, name: &str) -> Result<Arc<Node>> {
        self.layout().node(name)
    }

    /// The node of a name, or the root node of a drive of that name.
    pub fn node_or_drive(&self, name: &str) -> Result<Arc<Node>> {
        self.layout().node_or_drive(name)
    }

    /// All nodes with their places, parents before children.
    pub fn nodes(&self) -> Vec<NodeView> {
        self.layout().nodes()
    }

    /// A node with its place.
    pub fn view_node(&self, name: &str) -> Result<NodeView> {
        self.layout().view_node(name)
    }

    /// All drives: names and root nodes.
    pub fn drives(&self) -> Vec<DriveView> {
        self.layout().drives()
    }

    /// Is it the name of a drive?
    pub fn is_drive(&self, name: &str) -> bool {
        self.topology().drives.contains_key(name)
    }

    /// The chain of format nodes from a node or drive down, filters left out: the top image first.
    pub fn chain(&self, name: &str) -> Result<Vec<Arc<Node>>> {
        self.layout().chain(name)
    }

    /// The drive that a node belongs to: the first whose graph reaches it.
    pub fn drive_of(&self, node: &str) -> Option<Arc<str>> {
        self.layout().drive_of(node)
    }

    /// Size of the drive or node.
    pub fn size_bytes(&self, name: &str) -> Result<u64> {
        self.layout().size_bytes(name)
    }

    /// A bitmap of a node or drive. On a drive it is looked for from the root down to the first node that is no
    /// filter. A parked bitmap is still found at its home.
    pub fn bitmap(&self, target: &str, name: &str) -> Result<Arc<Bitmap>> {
        let state = self.0.state.lock().clone();
        Ok(find_bitmap(&state.topology, &state.parked, target, name)?.1)
    }

    /// All bitmaps of a node or drive, as [`Graph::bitmap`] finds them.
    pub fn bitmaps(&self, target: &str) -> Result<Vec<Arc<Bitmap>>> {
        let state = self.0.state.lock().clone();
        let places = bitmap_places(&state.topology, &state.parked, target)?;
        Ok(places.into_iter().map(|(_, bitmap)| bitmap).collect())
    }

    /// Where bitmaps of a node or drive are: the node that each is attached to.
    pub fn bitmap_places(&self, target: &str) -> Result<Vec<(Arc<str>, Arc<Bitmap>)>> {
        self.layout().bitmap_places(target)
    }

    /// Hears of what happens in the graph.
    pub fn on_event(&self, listener: impl Fn(&Event) + Send + Sync + 'static) {
        self.0.listeners.write().push(Box::new(listener));
    }

    pub(crate) fn emit(&self, event: &Event) {
        self.0.listeners.read().iter().for_each(|listener| listener(event));
    }

    fn tell_of_node(&self, id: NodeId, event: &NodeEvent) {
        let topology = self.topology();
        let Some(placed) = topology.nodes.get(&id) else { return };
        let drive = || {
            let shows = |(_, root): &(&Arc<str>, &NodeId)| topology.skip_filters(**root) == id;
            topology.drives.iter().find(shows).map(|(name, _)| name.clone())
        };
        match event {
            NodeEvent::ImageCorrupted { message, fatal } => {
                let (drive, node) = (drive().unwrap_or_default(), placed.node.name.clone());
                self.emit(&Event::ImageCorrupted { drive, node, message: message.clone(), fatal: *fatal });
            }
            NodeEvent::PastLost { message } => {
                let (node, message) = (placed.node.name.clone(), message.clone());
                self.emit(&Event::PastLost { node, message });
            }
            NodeEvent::QuorumBad { child, operation, error, range } => {
                let Some(child) = placed.children.get(*child) else { return };
                let (operation, error, range) = (*operation, *error, range.clone());
                self.emit(&Event::QuorumBad { node: topology.name(child.node), operation, error, range });
            }
            NodeEvent::QuorumFailure { range } => {
                let reference = drive().unwrap_or_else(|| placed.node.name.clone());
                self.emit(&Event::QuorumFailure { reference, range: range.clone() });
            }
        }
    }

    fn mark_failed(&self, id: NodeId, text: &str) {
        let topology = self.topology();
        let Some(placed) = topology.nodes.get(&id) else { return };
        let first = placed.node.failed.lock().replace(text.to_owned()).is_none();
        tracing::error!(
            node = placed.node.name(),
            driver = placed.node.driver_name(),
            "the node failed: {text}"
        );
        if first {
            self.emit(&Event::NodeFailed { node: placed.node.name.clone(), message: text.to_owned() });
        }
    }

    /// Ends everything: waits for what is in flight, closes all nodes from the top down. The graph is empty then.
    /// Goes on after an error, and returns the first.
    pub async fn close(&self) -> Result<()> {
        let mut change = self.change().await;
        change.clear();
        change.commit().await
    }

    /// What would be granted and wired for a topology; used by changes.
    pub(crate) fn plan(
        &self,
        topology: &Topology,
    ) -> Result<(BTreeMap<NodeId, Granted>, BTreeMap<NodeId, Wired>)> {
        let granted = permission::compute(topology)?;
        let wired = wire(topology, self.0.trace);
        permission::check_ends(topology, &granted, |id| wired[&id].info)?;
        Ok((granted, wired))
    }
}

/// The nodes in which a bitmap of `target` is looked for, each with the bitmaps that count as there.
pub(crate) fn bitmap_places(
    topology: &Topology,
    parked: &BTreeMap<BitmapId, NodeId>,
    target: &str,
) -> Result<Vec<(NodeId, Arc<Bitmap>)>> {
    let start = topology.node_or_drive(target)?;
    let mut nodes = vec![start];
    if !topology.names.contains_key(target) {
        // A drive: from its root down through the filters.
        while let Some(below) = topology.filtered(*nodes.last().expect("not empty")) {
            nodes.push(below);
        }
    }
    let mut places = Vec::new();
    for placed in topology.nodes.values() {
        let id = placed.node.id;
        for bitmap in placed.node.bitmaps.lock().iter() {
            let home = parked.get(&bitmap.id());
            if nodes.contains(&id) || home.is_some_and(|home| nodes.contains(home)) {
                places.push((id, bitmap.clone()));
            }
        }
    }
    let depth = |id: &NodeId| nodes.iter().position(|n| n == id).unwrap_or(usize::MAX);
    places.sort_by_key(|(id, _)| depth(id));
    Ok(places)
}

pub(crate) fn find_bitmap(
    topology: &Topology,
    parked: &BTreeMap<BitmapId, NodeId>,
    target: &str,
    name: &str,
) -> Result<(NodeId, Arc<Bitmap>)> {
    let places = bitmap_places(topology, parked, target)?;
    let names: Vec<String> = places.iter().map(|(_, bitmap)| bitmap.name().to_string()).collect();
    places.into_iter().find(|(_, bitmap)| bitmap.name().as_str() == name).ok_or_else(|| {
        let hint = match nearest(name, names.iter().map(String::as_str)) {
            Some(nearest) => format!("; did you mean '{nearest}'?"),
            None if names.is_empty() => "; it has none".to_owned(),
            None => {
                format!("; it has {}", names.iter().map(|n| format!("'{n}'")).collect::<Vec<_>>().join(", "))
            }
        };
        Error::new(Kind::NotFound, format_args!("'{target}' has no bitmap '{name}'{hint}"))
    })
}

/// Adds a root to a topology. On a node it stays there, or `follows` what takes the node's place.
pub(crate) fn attach(
    topology: &mut Topology,
    graph: &Graph,
    name: &str,
    options: &RootOptions,
    follows: bool,
) -> Result<Arc<RootShared>> {
    let (to, at) = match topology.drives.get_key_value(name) {
        Some((drive, root)) => (Attachment::Drive(drive.clone()), *root),
        None => {
            let id = topology.node_or_drive(name)?;
            (if follows { Attachment::Place(id) } else { Attachment::Node(id) }, id)
        }
    };
    let overrules = options.overrules.iter().map(|name| topology.id(name)).collect::<Result<_>>()?;
    let root = graph.new_root(options, at);
    let attached = Attached {
        root: root.clone(),
        to,
        needs: options.needs,
        shares: options.shares,
        locks: options.locks,
        past: false,
        overrules,
        may_be_inactive: false,
    };
    topology.roots.insert(root.id, attached);
    Ok(root)
}

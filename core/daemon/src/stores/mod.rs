//! Persistent bitmaps: where each drive's are kept, how they are found again, and how they follow their drive.
//!
//! A [`driveline_store::Store`], a file beside the images, holds the bitmaps of a drive while the program runs, so that they
//! survive whatever ends it. What the *place* of a drive's bitmaps says is where they are in between:
//!
//! ```text
//!              while it runs, and after a crash         after an orderly end
//!   a file     DIRECTORY/vda.dlbitmaps                  the same file, closed
//!   a qcow2    DIRECTORY/active.qcow2.dlbitmaps         the image, as QEMU keeps bitmaps; the file is gone
//! ```
//!
//! An image whose bitmaps are in such a file says that they are in use, as the format demands, and has a witness mark that
//! every other program takes away that opens it for writing: so a change from outside is noticed. This one does so with the
//! first write that is not recorded in such a file.

mod find;
mod follow;
mod going;
mod offline;
mod open;
mod owner;
mod place;
mod report;
mod save;
#[cfg(test)]
mod tests;

pub use self::report::{Recovered, Trust};

pub(crate) use self::{
    going::Going,
    offline::{Look, Seen, inspect, put},
    open::changes_outside,
    owner::Owned,
    place::{Place, all_files, file_in, file_of, files_at_open},
    save::Remaining,
};

use crate::{
    journal::Journals,
    moved::{self, ByFile},
};
use driveline_bitmap::{Bitmap, Bits, Durability, Ledger, StoreBinding, View};
use driveline_graph::{Error, Graph, Keeper, Kind, Layout, NodeId, Result, Root};
use driveline_store::{BootId, LogOptions, Options, Spec, Store};
use parking_lot::Mutex;
use std::{
    collections::BTreeSet,
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock, Weak},
};

/// All stores of the program.
#[derive(Debug)]
pub(crate) struct Stores {
    graph: Graph,
    boot_id: BootId,
    state: Mutex<State>,
    /// Rings when there may be something to follow.
    changed: event_listener::Event,
    reports: Mutex<Vec<Recovered>>,
    /// What was written since a bitmap was frozen that was found frozen, by whose it is and its name.
    since: Mutex<Vec<(String, String, Bits)>>,
    /// Other files that say whether the program lives.
    journals: OnceLock<Weak<Journals>>,
    /// Drives that are led elsewhere because a file says so.
    pub(crate) by_file: ByFile,
    /// Held by whoever moves bitmaps or tells images of them.
    turn: Arc<async_lock::Mutex<()>>,
}

#[derive(Debug, Default)]
struct State {
    kept: Vec<Arc<Kept>>,
    in_batch: bool,
    /// The program ends: nothing follows any more.
    closing: bool,
    /// Images whose bitmaps were looked for.
    seen: BTreeSet<NodeId>,
    /// What was found at the start has been told to people. What is found later goes to the log.
    told: bool,
}

/// Whose bitmaps a store keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// A drive's, wherever they are attached.
    Drive(String),
    /// Those of an image that is no drive's place.
    Node(String),
}

impl Owner {
    /// The name of the drive or node.
    pub(crate) fn name(&self) -> &str {
        match self {
            Owner::Drive(name) | Owner::Node(name) => name,
        }
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Owner::Drive(name) => write!(f, "drive '{name}'"),
            Owner::Node(name) => write!(f, "node '{name}'"),
        }
    }
}

/// The bitmaps of one drive or image, and what keeps them.
#[derive(Debug)]
pub(crate) struct Kept {
    owner: Owner,
    inner: Mutex<KeptInner>,
}

#[derive(Debug)]
struct KeptInner {
    place: Place,
    /// The configuration or a monitor said the place: it does not change by itself.
    fixed: bool,
    /// None as long as no bitmap is persistent.
    store: Option<Store>,
    /// A change of the graph is being made: a store has a batch open for as long.
    in_batch: bool,
    /// What the store holds is attached to the graph. Before that, a graph without its bitmaps says nothing about it.
    attached: bool,
    /// Keeps the image from going away.
    pin: Option<Root>,
    /// The bitmaps that the image knows to be in use.
    announced: Vec<String>,
    /// Bitmaps of the image that this program has nothing to do with; their names.
    foreign: Vec<String>,
    /// What an image does not say of the bitmaps that were put into it, for when they come back: names, views, durabilities.
    lent: Vec<(String, View, Durability)>,
    /// The owner section as the store has it.
    said: Vec<u8>,
}

impl Stores {
    /// Keeps the persistent bitmaps of a graph.
    ///
    /// Errors: the system does not tell which boot this is.
    pub(crate) fn new(graph: &Graph) -> Result<Arc<Self>> {
        let boot_id = BootId::current()
            .map_err(|error| Error::io(error.raw_os_error().unwrap_or(5), "reading the boot id"))?;
        let stores = Arc::new(Self {
            graph: graph.clone(),
            boot_id,
            state: Mutex::default(),
            changed: event_listener::Event::new(),
            reports: Mutex::default(),
            since: Mutex::default(),
            journals: OnceLock::new(),
            by_file: ByFile::default(),
            turn: Arc::default(),
        });
        graph.set_keeper(Arc::new(Clerk(Arc::downgrade(&stores))));
        let bell = Arc::downgrade(&stores);
        graph.on_event(move |event| {
            if let (driveline_graph::Event::Changed, Some(stores)) = (event, bell.upgrade()) {
                stores.changed.notify(usize::MAX);
            }
        });
        Ok(stores)
    }

    /// What became of the bitmaps that were found.
    pub(crate) fn reports(&self) -> Vec<Recovered> {
        self.reports.lock().clone()
    }

    /// What was found after a crash when the program started, for whoever started it to tell.
    pub(crate) fn to_tell(&self) -> Vec<Recovered> {
        self.state.lock().told = true;
        self.reports().into_iter().filter(|report| report.crashed).collect()
    }

    /// Which boot this is.
    pub(crate) fn boot_id(&self) -> BootId {
        self.boot_id
    }

    /// These say that the program lives, too.
    pub(crate) fn set_journals(&self, journals: &Arc<Journals>) {
        let _ = self.journals.set(Arc::downgrade(journals));
    }

    /// What was written since a bitmap of a drive or image was frozen, if it was found frozen.
    pub(crate) fn since(&self, owner: &str, name: &str) -> Option<Bits> {
        let since = self.since.lock();
        let found = since.iter().find(|(whose, called, _)| whose == owner && called == name);
        found.map(|(_, _, bits)| bits.clone())
    }

    /// The file that the bitmaps of a drive are in, or would be.
    pub(crate) fn path_of(&self, drive: &str) -> Option<PathBuf> {
        let kept = self.all().into_iter().find(|kept| kept.owner == Owner::Drive(drive.to_owned()))?;
        let path = kept.inner.lock().place.store_path();
        Some(path)
    }

    fn clerk(self: &Arc<Self>) -> Arc<dyn Keeper> {
        Arc::new(Clerk(Arc::downgrade(self)))
    }

    /// Begins to follow changes of the graph. Images know of their bitmaps before this returns.
    pub(crate) async fn begin(self: &Arc<Self>, engine: &driveline_engine::Handle) {
        self.settle().await;
        engine.spawn(self.clone().follow()).detach();
        follow::beat(Arc::downgrade(self));
    }

    fn all(&self) -> Vec<Arc<Kept>> {
        self.state.lock().kept.clone()
    }

    /// What is known of an owner of before that had the same name, and kept nothing, is replaced.
    fn add(&self, owner: Owner, place: Place, fixed: bool) -> Arc<Kept> {
        let mut state = self.state.lock();
        state.kept.retain(|kept| kept.owner != owner || kept.inner.lock().store.is_some());
        let inner = KeptInner {
            place,
            fixed,
            store: None,
            in_batch: state.in_batch,
            attached: false,
            pin: None,
            announced: Vec::new(),
            foreign: Vec::new(),
            lent: Vec::new(),
            said: Vec::new(),
        };
        let kept = Arc::new(Kept { owner, inner: Mutex::new(inner) });
        state.kept.push(kept.clone());
        kept
    }

    /// A batch begins or ends. Returns those that do not know it yet; any that come later do.
    fn set_in_batch(&self, in_batch: bool) -> Vec<Arc<Kept>> {
        let mut state = self.state.lock();
        state.in_batch = in_batch;
        state.kept.clone()
    }

    /// What keeps the bitmaps of a drive or node, by its name.
    ///
    /// A node's are those of its drive, if it is what the drive shows: its top image, or a filter above that. Another
    /// image can keep its own.
    fn of(&self, target: &str) -> Result<Arc<Kept>> {
        let named = |name: &str| self.all().into_iter().find(|kept| kept.owner.name() == name);
        if let Some(kept) = named(target) {
            return Ok(kept);
        }
        let is_drive = self.graph.is_drive(target);
        let drives = self.graph.drives();
        let shown = |name: &str| place::shown(&self.graph, name).iter().any(|node| **node == *target);
        let drive = drives.iter().find(|drive| is_drive && *drive.name == *target || shown(&drive.name));
        if let Some(drive) = drive {
            if let Some(kept) = named(&drive.name) {
                return Ok(kept);
            }
            let place = Place::default_for(&self.graph, &drive.name)?;
            return Ok(self.add(Owner::Drive(drive.name.to_string()), place, false));
        }
        let place = Place::of_image(&self.graph, target)?;
        Ok(self.add(Owner::Node(target.to_owned()), place, true))
    }

    /// All bitmaps that a store keeps, with the nodes that they are on now.
    fn bitmaps_of(&self, store: &Path) -> Vec<Arc<Bitmap>> {
        let here = StoreBinding::Sidecar { path: store.to_owned() };
        let nodes = self.graph.nodes();
        let bitmaps = nodes.iter().flat_map(|view| view.bitmaps.iter());
        bitmaps
            .filter(|bitmap| bitmap.ledger().is_some() && bitmap.store().as_ref() == Some(&here))
            .cloned()
            .collect()
    }
}

impl Kept {
    /// What the store says of itself while it is in use.
    fn owned(&self, stores: &Stores, inner: &KeptInner) -> owner::Owned {
        let (place, lost) = (inner.place.clone(), inner.foreign.clone());
        let images = place::files_at_open(&stores.graph, self.owner.name());
        owner::Owned { owner: self.owner.clone(), place, lost, images }
    }

    /// The store, made if there is none yet.
    fn store(&self, stores: &Stores, drive_size: u64) -> Result<()> {
        let mut inner = self.inner.lock();
        if inner.store.is_none() {
            let path = inner.place.store_path();
            let owner = self.owned(stores, &inner);
            let options = Options {
                drive_size,
                boot_id: stores.boot_id,
                owner: owner.encode(),
                log: LogOptions::default(),
            };
            let store = Store::create(&path, &options).map_err(store_error)?;
            store.heartbeat(std::time::SystemTime::now());
            inner.put(store)?;
        }
        Ok(())
    }
}

impl KeptInner {
    /// From now on this store keeps the bitmaps. If a change is being made, its records wait for the end of that.
    fn put(&mut self, store: Store) -> Result<()> {
        if self.in_batch {
            store.begin_batch().map_err(store_error)?;
        }
        self.store = Some(store);
        Ok(())
    }
}

/// The graph's keeper. It does not keep the stores alive, since they have the graph.
#[derive(Debug)]
struct Clerk(Weak<Stores>);

impl Clerk {
    fn stores(&self) -> Result<Arc<Stores>> {
        self.0.upgrade().ok_or_else(|| Error::new(Kind::NotSupported, "the program is ending"))
    }
}

impl Keeper for Clerk {
    fn new_ledger(&self, target: &str, bitmap: &Bitmap, durability: Durability) -> Result<Arc<dyn Ledger>> {
        let stores = self.stores()?;
        if stores.state.lock().closing {
            return Err(Error::new(Kind::NotSupported, "the program is ending"));
        }
        let kept = stores.of(target)?;
        let place = kept.inner.lock().place.clone();
        place.check(bitmap)?;
        if let Some(view) = place.node().and_then(|node| stores.graph.view_node(node).ok())
            && !view.common.active
            && kept.inner.lock().store.is_none()
        {
            let why = "it is inactive: its image is another program's";
            return Err(Error::new(Kind::NotPermitted, why).at(view.node.name()));
        }
        kept.store(&stores, bitmap.length())?;
        let spec = Spec {
            record: bitmap.record(),
            granularity: bitmap.granularity(),
            view: bitmap.view(),
            durability,
        };
        let mut inner = kept.inner.lock();
        inner.attached = true;
        inner.store.as_ref().expect("it was just made").add(&spec).map_err(store_error)
    }

    fn drives_move(&self, before: &Layout, after: &Layout) {
        if let Ok(stores) = self.stores() {
            moved::remember(before, after, &stores.by_file);
        }
    }

    fn begin_batch(&self) {
        let Ok(stores) = self.stores() else { return };
        for kept in stores.set_in_batch(true) {
            let mut inner = kept.inner.lock();
            inner.in_batch = true;
            if let Some(store) = &inner.store
                && let Err(error) = store.begin_batch()
            {
                tracing::error!("{error}");
            }
        }
    }

    fn end_batch(&self) -> Result<()> {
        let Ok(stores) = self.stores() else { return Ok(()) };
        let mut first = Ok(());
        for kept in stores.set_in_batch(false) {
            let mut inner = kept.inner.lock();
            inner.in_batch = false;
            if let Some(store) = &inner.store {
                first = first.and(store.end_batch().map_err(store_error));
            }
        }
        first
    }
}

/// An error of a store, as one of the graph.
pub(crate) fn store_error(error: driveline_store::Error) -> Error {
    match &error {
        driveline_store::Error::Io { source, .. } => {
            Error::io_text(source.raw_os_error().unwrap_or(5), format_args!("{error}: {source}"))
        }
        driveline_store::Error::Locked { .. } => Error::new(Kind::Busy, error),
        driveline_store::Error::HeaderFull { .. } => Error::io_text(28, error),
        _ => Error::io_text(5, error),
    }
}

/// A bitmap of a drive shows the drive; one of another image, that image.
fn view_for(owner: &Owner, view: View) -> View {
    match owner {
        Owner::Drive(_) => view,
        Owner::Node(_) => View::Node,
    }
}

/// The file beside an image in which its bitmaps are while somebody has them.
pub(crate) fn beside(image: &Path) -> PathBuf {
    let mut name = image.as_os_str().to_owned();
    name.push(".dlbitmaps");
    name.into()
}

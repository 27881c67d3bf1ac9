//! What commands need of the program around the graph: its exports, its NBD server, its end.

use crate::{
    error::{Error, Result},
    objects::{Objects, TlsX509},
};
use driveline_bitmap::Bitmap;
use driveline_graph::{BoxFuture, Change};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

/// The program, as seen from a monitor.
pub trait Control: Send + Sync + 'static {
    /// All exports.
    fn exports(&self) -> Vec<ExportInfo>;

    /// Adds an NBD export. An id or name that is taken and a server that does not run are errors.
    fn add_export(&self, export: NbdExport) -> BoxFuture<'_, Result<()>>;

    /// Prepares an NBD export as part of a change: its user is in the change, its id and name are taken, and nobody can connect before
    /// [`ExportToCome::publish`]. `bitmaps` are those that it names. Errors: as of [`Control::add_export`]; nothing is left then.
    fn prepare_export<'a>(
        &'a self,
        change: &'a mut Change,
        export: NbdExport,
        bitmaps: Vec<Arc<Bitmap>>,
    ) -> BoxFuture<'a, Result<Box<dyn ExportToCome>>> {
        let _ = (change, export, bitmaps);
        Box::pin(async { Err(Error::generic("This program adds no exports in a transaction")) })
    }

    /// Would [`RemoveMode::Safe`] be an error?
    fn is_export_used(&self, id: &str) -> bool {
        let _ = id;
        false
    }

    /// Removes an export. [`RemoveMode::Safe`] with clients connected is an error. Once the export is gone the program
    /// emits [`Event::ExportDeleted`](crate::Event::ExportDeleted).
    fn remove_export<'a>(&'a self, id: &'a str, mode: RemoveMode) -> BoxFuture<'a, Result<()>>;

    /// Starts the NBD server that monitors add exports to.
    fn start_nbd_server(&self, server: NbdServer) -> BoxFuture<'_, Result<()>>;

    /// Stops it, and removes its exports.
    fn stop_nbd_server(&self) -> BoxFuture<'_, Result<()>>;

    /// The objects that the program made before there was a monitor, and that it looks up; without them a monitor has its own.
    fn objects(&self) -> Option<Objects> {
        None
    }

    /// Where the persistent bitmaps of a node or drive are kept; after they were moved to `place` if one is given, and brought
    /// to stable storage if `flush` is set.
    fn bitmap_store<'a>(
        &'a self,
        target: &'a str,
        place: Option<BitmapPlace>,
        flush: bool,
    ) -> BoxFuture<'a, Result<BitmapStore>> {
        let _ = (target, place, flush);
        Box::pin(async { Err(Error::generic("This program keeps no persistent bitmaps")) })
    }

    /// What became of the bitmaps that were found in stores and images.
    fn recovered_bitmaps(&self) -> Vec<RecoveredBitmap> {
        Vec::new()
    }

    /// The jobs that were interrupted when the program ended the last time, and what became of them.
    fn interrupted_jobs(&self) -> Vec<InterruptedJob> {
        Vec::new()
    }

    /// Tries once more with one that could not go on.
    fn resume_interrupted<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<()>> {
        let _ = id;
        Box::pin(async { Err(Error::generic("This program writes no jobs down")) })
    }

    /// Gives up one that could not go on.
    fn drop_interrupted<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<()>> {
        let _ = id;
        Box::pin(async { Err(Error::generic("This program writes no jobs down")) })
    }

    /// Nodes were added: bitmaps that their images hold are attached before this is ready.
    fn nodes_added(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }

    /// What moves persistent bitmaps in a change that is not begun yet, and that makes nodes active or inactive, or removes
    /// those that are named.
    fn nodes_going<'a>(&'a self, nodes: &'a [String]) -> BoxFuture<'a, Result<Box<dyn NodesGoing>>> {
        let _ = nodes;
        Box::pin(async { Ok(Box::new(NothingKept) as Box<dyn NodesGoing>) })
    }

    /// Changes the running graph to what a configuration file says, as one, or says what would be done.
    fn apply<'a>(&'a self, file: &'a Path, wish: ApplyWish) -> BoxFuture<'a, Result<Applied>> {
        let _ = (file, wish);
        Box::pin(async { Err(Error::generic("This program has no configuration file")) })
    }

    /// Asks the program to end, and returns at once. Before it goes it calls
    /// [`Monitor::close`](crate::Monitor::close), so that the last replies arrive.
    fn quit(&self);
}

/// An export that a change brings. Dropped, it never was.
pub trait ExportToCome: Send + Sync {
    /// The change is made: clients can connect from now on.
    fn publish(self: Box<Self>);
}

/// Puts bitmaps away in the change that takes their nodes out, or makes them inactive: nobody can come in between and write
/// what they would not record.
pub trait NodesGoing: Send {
    /// Adds to the change: the persistent bitmaps of a node go into its image, and off it. `false`: it has none, or somebody uses it.
    fn stage(&mut self, change: &mut Change, node: &str) -> Result<bool>;

    /// Adds to the change, before a node is made inactive by it: the persistent bitmaps that its image keeps go into it, whoever
    /// uses the node.
    fn stage_inactive(&mut self, change: &mut Change, node: &str) -> Result<()>;

    /// Adds to the change, after a node was made active by it: the bitmaps of its image are found again.
    fn stage_active(&mut self, change: &mut Change, node: &str) -> Result<()>;

    /// The change was made, or not. Errors: a file of bitmaps that is not needed any more could not be removed.
    fn ended(self: Box<Self>, made: bool) -> BoxFuture<'static, Result<()>>;
}

/// For a program that keeps no bitmaps.
struct NothingKept;

impl NodesGoing for NothingKept {
    fn stage(&mut self, _: &mut Change, _: &str) -> Result<bool> {
        Ok(false)
    }

    fn stage_inactive(&mut self, _: &mut Change, _: &str) -> Result<()> {
        Ok(())
    }

    fn stage_active(&mut self, _: &mut Change, _: &str) -> Result<()> {
        Ok(())
    }

    fn ended(self: Box<Self>, _: bool) -> BoxFuture<'static, Result<()>> {
        Box::pin(async { Ok(()) })
    }
}

/// How a configuration file is applied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ApplyWish {
    /// Nothing is changed.
    pub dry_run: bool,
    /// Bitmaps of drives that the file does not name are removed for good.
    pub prune_bitmaps: bool,
}

/// What becomes, or would become, of the running graph.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// The steps, a line each: `+` comes, `-` goes, `~` changes.
    pub steps: Vec<String>,
    /// What is in no file and stays all the same, and why.
    pub kept: Vec<String>,
    /// What the file says and takes a restart.
    pub restart: Vec<String>,
}

/// A place for persistent bitmaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BitmapPlace {
    /// A qcow2 image, by the name of its node.
    Qcow2(String),
    /// A file of their own.
    File(PathBuf),
}

/// Where the bitmaps of a drive or node are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapStore {
    /// `qcow2:NODE` or `file:PATH`.
    pub place: String,
    /// The file that they are in while the program runs, if any is persistent.
    pub file: Option<PathBuf>,
}

/// A bitmap that was found in a store or an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecoveredBitmap {
    /// The drive, or the node of the image.
    pub node: String,
    /// Its name.
    pub name: String,
    /// `exact`, `superset`, `all-dirty` or `lost`.
    pub verdict: String,
    /// Areas of the drive that count as dirty because they were being written, if it is a superset.
    pub extents: Option<u64>,
    /// Bytes that became dirty by them.
    pub bytes: Option<u64>,
    /// Why, if it is all dirty or lost.
    pub reason: Option<String>,
}

/// A job that was interrupted when the program ended the last time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterruptedJob {
    /// Its id.
    pub id: String,
    /// What it does, if that can be told.
    pub kind: Option<String>,
    /// The drive or node that it was started on.
    pub device: Option<String>,
    /// `resumed`, `finished`, `dropped` or `failed`: then it waits for its user's decision.
    pub outcome: String,
    /// Why.
    pub reason: Option<String>,
    /// How many bytes were left to copy when it went on.
    pub left: Option<u64>,
}

/// An export, for `query-block-exports`. All are NBD's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Its id.
    pub id: String,
    /// The node that it leads to now.
    pub node_name: String,
    /// It is on its way out.
    pub shutting_down: bool,
}

/// An NBD export to be added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdExport {
    /// Its id.
    pub id: String,
    /// The node or drive that it shows.
    pub node_name: String,
    /// Its name for clients.
    pub name: String,
    /// A text for clients.
    pub description: Option<String>,
    /// May clients write?
    pub writable: bool,
    /// Is what they write on stable storage before it is reported?
    pub writethrough: bool,
    /// May the node be inactive? Clients cannot use it then until it is made active.
    pub allow_inactive: bool,
    /// The engine's thread that its sessions run on.
    pub thread: Option<usize>,
    /// Bitmaps that clients may see: of the export's own node or drive, or of the one that is named.
    pub bitmaps: Vec<(Option<String>, String)>,
    /// May clients see the depth of the layer that each range comes from?
    pub allocation_depth: bool,
}

/// How an export is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RemoveMode {
    /// Only if no client is connected.
    Safe,
    /// Clients lose their connections.
    Hard,
}

/// Where an NBD server listens, and whom it takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdServer {
    /// Where it listens.
    pub address: Address,
    /// Clients must use TLS, with these credentials.
    pub tls: Option<TlsX509>,
    /// Those of them may connect whom the object of this id allows when they come, see [`Objects::authorize`]. Never without `tls`.
    pub authz: Option<String>,
    /// How many clients at once; 0 for any number.
    pub max_connections: u32,
    /// How long a client may take until it transmits; 0 for any time.
    pub handshake_max_seconds: u32,
}

/// A socket's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// A unix socket by an abstract name, which is no file.
    Abstract(Vec<u8>),
    /// TCP.
    Inet(Inet),
    /// A socket that was passed to the program and listens already: its number, or its name in `LISTEN_FDNAMES`.
    Fd(String),
}

/// A TCP address to listen on. The fields are QEMU's `InetSocketAddress`.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Inet {
    /// A name or an address; empty for any.
    pub host: String,
    /// The port; 0 for one that is free.
    pub port: u16,
    /// If it is taken, the next one that is free up to this.
    pub to: Option<u16>,
    /// Is it IPv4?
    pub ipv4: Option<bool>,
    /// Is it IPv6? To ask for one leaves the other out, unless that is asked for too.
    pub ipv6: Option<bool>,
    /// Does the kernel look whether clients that say nothing are still there?
    pub keep_alive: bool,
}

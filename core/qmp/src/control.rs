//! What commands need of the program around the graph: its exports, its NBD server, its end.

use crate::error::Result;
use driveline_graph::BoxFuture;
use std::path::PathBuf;

/// The program, as seen from a monitor.
pub trait Control: Send + Sync + 'static {
    /// All exports.
    fn exports(&self) -> Vec<ExportInfo>;

    /// Adds an NBD export. An id or name that is taken and a server that does not run are errors.
    fn add_export(&self, export: NbdExport) -> BoxFuture<'_, Result<()>>;

    /// Removes an export. [`RemoveMode::Safe`] with clients connected is an error. Once the export is gone the program
    /// emits [`Event::ExportDeleted`](crate::Event::ExportDeleted).
    fn remove_export<'a>(&'a self, id: &'a str, mode: RemoveMode) -> BoxFuture<'a, Result<()>>;

    /// Starts the NBD server that monitors add exports to.
    fn start_nbd_server(&self, server: NbdServer) -> BoxFuture<'_, Result<()>>;

    /// Stops it, and removes its exports.
    fn stop_nbd_server(&self) -> BoxFuture<'_, Result<()>>;

    /// Asks the program to end, and returns at once. Before it goes it calls
    /// [`Monitor::close`](crate::Monitor::close), so that the last replies arrive.
    fn quit(&self);
}

/// An export, for `query-block-exports`. All are NBD's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Its id.
    pub id: String,
    /// The node or drive that it shows.
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
    /// TCP: a host and a port.
    Inet(String, u16),
}

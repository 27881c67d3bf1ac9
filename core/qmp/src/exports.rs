//! Commands on exports and on the NBD server. The program does them; here they are read and checked.

use crate::{
    arguments,
    bitmaps::{BitmapRef, Source, refuse_of_job},
    command::{Done, Nothing},
    control::{Address, ExportToCome, Inet, NbdExport, NbdServer, RemoveMode},
    error::{Error, Result},
    monitor::Monitor,
    objects::{Endpoint, is_identifier},
    schema::{Shape, trace},
    transaction::Action,
};
use driveline_bitmap::Bitmap;
use driveline_graph::{BoxFuture, Change, Graph, Layout, Role};
use driveline_jobs::Start;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::sync::Arc;

/// The longest abstract name of a unix socket.
const ABSTRACT_BYTES_MAX: usize = 107;
/// The longest name or description that NBD's strings hold.
const STRING_BYTES_MAX: usize = 4096;
/// QEMU's default limit of connections.
const CONNECTIONS_DEFAULT: u32 = 100;
/// QEMU's default time for a handshake.
const HANDSHAKE_SECONDS_DEFAULT: u32 = 10;

/// QAPI's `BlockExportInfo`.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct BlockExportInfo {
    id: String,
    r#type: ExportType,
    node_name: String,
    shutting_down: bool,
}

pub(crate) async fn query_block_exports(monitor: &Monitor, _: Nothing) -> Result<Vec<BlockExportInfo>> {
    let info = |export: crate::control::ExportInfo| BlockExportInfo {
        id: export.id,
        r#type: ExportType::Nbd,
        node_name: export.node_name,
        shutting_down: export.shutting_down,
    };
    Ok(monitor.control().exports().into_iter().map(info).collect())
}

/// The kinds of exports.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum ExportType {
    Nbd,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct BlockExportAdd {
    r#type: ExportType,
    id: String,
    node_name: String,
    writable: Option<bool>,
    writethrough: Option<bool>,
    iothread: Option<String>,
    #[serde(rename = "fixed-iothread")]
    _fixed_iothread: Option<bool>,
    allow_inactive: Option<bool>,
    name: Option<String>,
    description: Option<String>,
    bitmaps: Option<Vec<Source>>,
    allocation_depth: Option<bool>,
}

impl BlockExportAdd {
    /// Checks it against the graph as it is, or as a change would have it.
    fn check(self, monitor: &Monitor, layout: &Layout) -> Result<(NbdExport, Vec<Source>)> {
        let add = self;
        let ExportType::Nbd = add.r#type;
        if !is_identifier(&add.id) {
            return Err(Error::generic("Invalid block export id"));
        }
        refuse_taken(monitor, &add.id)?;
        let node = layout.node_or_drive(&add.node_name).map_err(|_| {
            Error::generic(format_args!("Cannot find device='' nor node-name='{}'", add.node_name))
        })?;
        let writable = add.writable.unwrap_or(false);
        if writable && layout.view_node(node.name()).is_ok_and(|view| view.read_only) {
            return Err(Error::generic("Cannot export read-only node as writable"));
        }
        // Nothing moves a session away from there, so it is fixed in any case. The object only names the thread.
        let thread = match &add.iothread {
            Some(id) => Some(monitor.objects().iothread(id)?.0.thread),
            None => None,
        };
        let export = NbdExport {
            name: add.name.unwrap_or_else(|| add.node_name.clone()),
            id: add.id,
            node_name: add.node_name,
            description: add.description,
            writable,
            writethrough: add.writethrough.unwrap_or(false),
            thread,
            allow_inactive: add.allow_inactive.unwrap_or(false),
            bitmaps: Vec::new(),
            allocation_depth: add.allocation_depth.unwrap_or(false),
        };
        check_texts(&export)?;
        Ok((export, add.bitmaps.unwrap_or_default()))
    }
}

pub(crate) async fn block_export_add(monitor: &Monitor, add: BlockExportAdd) -> Result<Done> {
    let (export, bitmaps) = add.check(monitor, &monitor.graph().layout())?;
    let mut change = monitor.graph().change().await;
    if activate(&mut change, &export)? {
        change.commit().await?;
        monitor.control().nodes_added().await;
    } else {
        drop(change);
    }
    add_export(monitor, export, bitmaps).await
}

/// What is exported is made active, unless the export may wait for that. `false`: there is nothing to do.
fn activate(change: &mut Change, export: &NbdExport) -> Result<bool> {
    let layout = change.layout();
    let node = layout.node_or_drive(&export.node_name)?;
    if export.allow_inactive || layout.view_node(node.name())?.common.active {
        return Ok(false);
    }
    change.set_active(node.name(), true)?;
    Ok(true)
}

/// An export that comes with a transaction.
pub(crate) struct AddExport {
    add: Option<BlockExportAdd>,
    coming: Option<Box<dyn ExportToCome>>,
}

impl From<BlockExportAdd> for AddExport {
    fn from(add: BlockExportAdd) -> Self {
        Self { add: Some(add), coming: None }
    }
}

impl Action for AddExport {
    fn stage<'a>(&'a mut self, monitor: &'a Monitor, start: &'a mut Start) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let Some(add) = self.add.take() else { return Ok(()) };
            let layout = start.layout();
            let (mut export, bitmaps) = add.check(monitor, &layout)?;
            activate(start.change(), &export)?;
            let found = find_bitmaps(monitor, &layout, &mut export, bitmaps)?;
            self.coming = Some(monitor.control().prepare_export(start.change(), export, found).await?);
            Ok(())
        })
    }

    // Its node may be activated by it.
    fn adds_nodes(&self) -> bool {
        true
    }

    fn made<'a>(&'a mut self, _: &'a Monitor) -> BoxFuture<'a, ()> {
        if let Some(coming) = self.coming.take() {
            coming.publish();
        }
        Box::pin(async {})
    }

    fn undo<'a>(&'a mut self, _: &'a Monitor) -> BoxFuture<'a, ()> {
        Box::pin(async { drop(self.coming.take()) })
    }
}

/// An export that goes with a transaction: once it is made, not before. Whoever connects in between is disconnected.
pub(crate) struct DelExport(pub(crate) BlockExportDel);

impl Action for DelExport {
    fn stage<'a>(&'a mut self, monitor: &'a Monitor, start: &'a mut Start) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let BlockExportDel { id, mode } = &self.0;
            let control = monitor.control();
            let there = control.exports().into_iter().any(|export| export.id == *id && !export.shutting_down);
            if !there || !start.is_first(format!("block-export-del {id}")) {
                return Err(Error::generic(format_args!("Export '{id}' is not found")));
            }
            if RemoveMode::from(*mode) == RemoveMode::Safe && control.is_export_used(id) {
                return Err(Error::generic(format_args!("export '{id}' still in use")));
            }
            Ok(())
        })
    }

    fn made<'a>(&'a mut self, monitor: &'a Monitor) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            let id = &self.0.id;
            // It may have gone by another way meanwhile.
            if let Err(error) = monitor.control().remove_export(id, RemoveMode::Hard).await {
                tracing::debug!(target: "driveline::qmp", id, "removing an export: {}", error.desc);
            }
        })
    }
}

async fn add_export(monitor: &Monitor, mut export: NbdExport, bitmaps: Vec<Source>) -> Result<Done> {
    check_texts(&export)?;
    find_bitmaps(monitor, &monitor.graph().layout(), &mut export, bitmaps)?;
    monitor.control().add_export(export).await?;
    Ok(Done {})
}

fn check_texts(export: &NbdExport) -> Result<()> {
    let texts =
        [("export name", &export.name), ("description", export.description.as_ref().unwrap_or(&export.name))];
    match texts.into_iter().find(|(_, text)| text.len() > STRING_BYTES_MAX) {
        Some((what, text)) => Err(Error::generic(format_args!("{what} '{text}' too long"))),
        None => Ok(()),
    }
}

/// The bitmaps that an export is to show: their names go into the export.
///
/// A drive's are shown as they live on, whoever uses them. Those of nodes are QEMU's: nobody else uses them meanwhile.
fn find_bitmaps(
    monitor: &Monitor,
    layout: &Layout,
    export: &mut NbdExport,
    bitmaps: Vec<Source>,
) -> Result<Vec<Arc<Bitmap>>> {
    let mut all = Vec::new();
    for bitmap in bitmaps {
        let (node, name) = match bitmap {
            Source::Name(name) => (None, name),
            Source::Bitmap(BitmapRef { node, name }) => (Some(node), name),
        };
        let at = node.as_deref().unwrap_or(&export.node_name);
        layout.node_or_drive(at).map_err(|_| Error::no_node(at))?;
        refuse_of_job(monitor, &name)?;
        let of_drive = layout.is_drive(at);
        let there = match node.is_some() || of_drive {
            true => find_bitmap(layout, at, &name)?.map(|found| (at.to_owned(), found)),
            false => find_bitmap_below(layout, at, &name)?,
        };
        let Some((at, found)) = there else {
            return Err(match node {
                Some(_) => Error::generic(format_args!("Dirty bitmap '{name}' not found")),
                None => Error::generic(format_args!("Bitmap '{name}' is not found")),
            });
        };
        if node.is_none() && !of_drive {
            let writable = layout.view_node(&at).is_ok_and(|view| !view.read_only && view.common.active);
            if writable && !export.writable && found.is_recording() {
                let text = format_args!("Enabled bitmap '{name}' incompatible with readonly export");
                return Err(Error::generic(text));
            }
        }
        if !of_drive && found.is_busy() {
            let text = "is currently in use by another operation and cannot be used";
            let users = found.users().join(", ");
            return Err(Error::generic(format_args!("Bitmap '{name}' {text} ({users})")));
        }
        all.push(found);
        let elsewhere = Some(at).filter(|at| *at != export.node_name);
        export.bitmaps.push((node.or(elsewhere), name));
    }
    Ok(all)
}

fn find_bitmap(layout: &Layout, at: &str, name: &str) -> Result<Option<Arc<Bitmap>>> {
    let places = layout.bitmap_places(at)?;
    Ok(places.into_iter().map(|(_, bitmap)| bitmap).find(|bitmap| bitmap.name().as_str() == name))
}

/// The same on the images below, as QEMU looks: the first node that has it.
fn find_bitmap_below(layout: &Layout, top: &str, name: &str) -> Result<Option<(String, Arc<Bitmap>)>> {
    let mut at = Some(top.to_owned());
    while let Some(node) = at {
        if let Some(found) = find_bitmap(layout, &node, name)? {
            return Ok(Some((node, found)));
        }
        let children = layout.view_node(&node)?.children;
        let below = children.into_iter().find(|child| matches!(child.role, Role::Filtered | Role::Backing));
        at = below.map(|child| child.node.to_string());
    }
    Ok(None)
}

fn refuse_taken(monitor: &Monitor, id: &str) -> Result<()> {
    match monitor.control().exports().iter().any(|export| export.id == id) {
        true => Err(Error::generic(format_args!("Block export id '{id}' is already in use"))),
        false => Ok(()),
    }
}

fn is_read_only(graph: &Graph, node: &str) -> bool {
    graph.view_node(node).is_ok_and(|view| view.read_only)
}

/// QAPI's `BlockExportRemoveMode`.
#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum RemoveModeName {
    Safe,
    Hard,
}

impl From<Option<RemoveModeName>> for RemoveMode {
    fn from(name: Option<RemoveModeName>) -> Self {
        match name {
            None | Some(RemoveModeName::Safe) => RemoveMode::Safe,
            Some(RemoveModeName::Hard) => RemoveMode::Hard,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BlockExportDel {
    id: String,
    mode: Option<RemoveModeName>,
}

pub(crate) async fn block_export_del(monitor: &Monitor, del: BlockExportDel) -> Result<Done> {
    remove(monitor, &del.id, del.mode).await
}

async fn remove(monitor: &Monitor, id: &str, mode: Option<RemoveModeName>) -> Result<Done> {
    let control = monitor.control();
    if !control.exports().iter().any(|export| export.id == id) {
        return Err(Error::generic(format_args!("Export '{id}' is not found")));
    }
    control.remove_export(id, mode.into()).await?;
    Ok(Done {})
}

/// QAPI's `NbdServerAddOptions`: an export whose id is its name.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NbdServerAdd {
    name: Option<String>,
    description: Option<String>,
    device: String,
    writable: Option<bool>,
    bitmap: Option<String>,
}

pub(crate) async fn nbd_server_add(monitor: &Monitor, add: NbdServerAdd) -> Result<Done> {
    let graph = monitor.graph();
    let node = graph.node_or_drive(&add.device).map_err(|_| Error::no_node(&add.device))?;
    let name = add.name.unwrap_or_else(|| add.device.clone());
    refuse_taken(monitor, &name)?;
    let export = NbdExport {
        id: name.clone(),
        name,
        description: add.description,
        // This one says nothing when it cannot be: clients see that it is read-only.
        writable: add.writable.unwrap_or(false) && !is_read_only(graph, node.name()),
        writethrough: false,
        thread: None,
        allow_inactive: false,
        bitmaps: Vec::new(),
        allocation_depth: false,
        node_name: add.device,
    };
    add_export(monitor, export, add.bitmap.map(Source::Name).into_iter().collect()).await
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NbdServerRemove {
    name: String,
    mode: Option<RemoveModeName>,
}

pub(crate) async fn nbd_server_remove(monitor: &Monitor, remove_: NbdServerRemove) -> Result<Done> {
    remove(monitor, &remove_.name, remove_.mode).await
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct NbdServerStart {
    addr: SocketAddressLegacy,
    tls_creds: Option<String>,
    tls_authz: Option<String>,
    max_connections: Option<u32>,
    handshake_max_seconds: Option<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SocketAddressLegacy {
    r#type: SocketAddressType,
    data: Value,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum SocketAddressType {
    Inet,
    Unix,
    Fd,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct UnixSocketAddress {
    path: String,
    r#abstract: Option<bool>,
    /// Of an abstract address only: its name is no longer than what is said, and not filled up with zeroes.
    tight: Option<bool>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct InetSocketAddress {
    host: String,
    port: String,
    numeric: Option<bool>,
    to: Option<u16>,
    ipv4: Option<bool>,
    ipv6: Option<bool>,
    keep_alive: Option<bool>,
    mptcp: Option<bool>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FdSocketAddress {
    str: String,
}

/// What `data` is for each type of address, for the schema.
pub(crate) fn address_shapes() -> [(&'static str, Shape); 3] {
    [
        ("inet", trace::<InetSocketAddress>()),
        ("unix", trace::<UnixSocketAddress>()),
        ("fd", trace::<FdSocketAddress>()),
    ]
}

impl SocketAddressLegacy {
    fn read(self) -> Result<Address> {
        const AT: &str = "addr.data";
        let refused =
            |option: &str| Error::generic(format_args!("Parameter '{AT}.{option}' is not supported"));
        match self.r#type {
            SocketAddressType::Unix => {
                let UnixSocketAddress { path, r#abstract, tight } = arguments::parse(self.data, AT)?;
                if r#abstract == Some(true) {
                    let mut name = path.into_bytes();
                    if name.len() > ABSTRACT_BYTES_MAX {
                        let path = String::from_utf8_lossy(&name);
                        return Err(Error::generic(format_args!("UNIX socket path '{path}' is too long")));
                    }
                    if tight == Some(false) {
                        name.resize(ABSTRACT_BYTES_MAX, 0);
                    }
                    return Ok(Address::Abstract(name));
                }
                Ok(Address::Unix(path.into()))
            }
            SocketAddressType::Inet => {
                let inet: InetSocketAddress = arguments::parse(self.data, AT)?;
                if inet.mptcp == Some(true) {
                    return Err(refused("mptcp"));
                }
                if (inet.ipv4, inet.ipv6) == (Some(false), Some(false)) {
                    return Err(Error::generic("Cannot disable IPv4 and IPv6 at same time"));
                }
                let InetSocketAddress { host, port, numeric, to, ipv4, ipv6, keep_alive, .. } = inet;
                if numeric == Some(true) && host.parse::<std::net::IpAddr>().is_err() {
                    return Err(Error::generic(format_args!("host '{host}' is not a numeric address")));
                }
                let number = port.parse().map_err(|_| {
                    Error::generic(format_args!("Parameter '{AT}.port' does not accept value '{port}'"))
                })?;
                let keep_alive = keep_alive == Some(true);
                Ok(Address::Inet(Inet { host, port: number, to, ipv4, ipv6, keep_alive }))
            }
            SocketAddressType::Fd => {
                let FdSocketAddress { str } = arguments::parse(self.data, AT)?;
                Ok(Address::Fd(str))
            }
        }
    }
}

pub(crate) async fn nbd_server_start(monitor: &Monitor, start: NbdServerStart) -> Result<Done> {
    let creds = |id: String| monitor.objects().tls_creds(&id, Endpoint::Server).map(|(creds, _)| creds);
    let tls = start.tls_creds.map(creds).transpose()?;
    // QEMU lets everybody in then, as if there were no list.
    if start.tls_authz.is_some() && !tls.as_ref().is_some_and(|creds| creds.verify_peer) {
        let text = "Parameter 'tls-authz' needs 'tls-creds' with 'verify-peer': without certificates clients have no names";
        return Err(Error::generic(text));
    }
    let server = NbdServer {
        address: start.addr.read()?,
        tls,
        authz: start.tls_authz,
        max_connections: start.max_connections.unwrap_or(CONNECTIONS_DEFAULT),
        handshake_max_seconds: start.handshake_max_seconds.unwrap_or(HANDSHAKE_SECONDS_DEFAULT),
    };
    monitor.control().start_nbd_server(server).await?;
    Ok(Done {})
}

pub(crate) async fn nbd_server_stop(monitor: &Monitor, _: Nothing) -> Result<Done> {
    monitor.control().stop_nbd_server().await?;
    Ok(Done {})
}

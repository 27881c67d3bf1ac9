//! Commands on exports and on the NBD server. The program does them; here they are read and checked.

use crate::{
    bitmaps::{BitmapRef, Source},
    command::{Done, Nothing},
    control::{Address, NbdExport, NbdServer, RemoveMode},
    error::{Error, Result},
    monitor::Monitor,
};
use serde::Deserialize;
use serde_json::{Value, json};

/// The longest description that NBD's strings hold.
const DESCRIPTION_BYTES_MAX: usize = 4096;
/// QEMU's default limit of connections.
const CONNECTIONS_DEFAULT: u32 = 100;
/// QEMU's default time for a handshake.
const HANDSHAKE_SECONDS_DEFAULT: u32 = 10;

pub(crate) async fn query_block_exports(monitor: &Monitor, _: Nothing) -> Result<Value> {
    let exports = monitor.control().exports().into_iter().map(|export| {
        json!({
            "id": export.id,
            "type": "nbd",
            "node-name": export.node_name,
            "shutting-down": export.shutting_down,
        })
    });
    Ok(exports.collect())
}

/// The kinds of exports.
#[derive(Deserialize)]
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
    name: Option<String>,
    description: Option<String>,
    bitmaps: Option<Vec<Source>>,
    allocation_depth: Option<bool>,
}

pub(crate) async fn block_export_add(monitor: &Monitor, add: BlockExportAdd) -> Result<Done> {
    let ExportType::Nbd = add.r#type;
    let graph = monitor.graph();
    graph.node_or_drive(&add.node_name).map_err(|_| Error::no_node(&add.node_name))?;
    if add.writethrough == Some(true) {
        return Err(Error::generic("Parameter 'writethrough' does not accept value 'true'"));
    }
    if add.description.as_ref().is_some_and(|text| text.len() > DESCRIPTION_BYTES_MAX) {
        let text = format_args!("description is longer than {DESCRIPTION_BYTES_MAX} bytes");
        return Err(Error::generic(text));
    }
    let mut bitmaps = Vec::new();
    for bitmap in add.bitmaps.unwrap_or_default() {
        let (node, name) = match bitmap {
            Source::Name(name) => (None, name),
            Source::Bitmap(BitmapRef { node, name }) => (Some(node), name),
        };
        let at = node.as_deref().unwrap_or(&add.node_name);
        graph.node_or_drive(at).map_err(|_| Error::no_node(at))?;
        if graph.bitmap(at, &name).is_err() {
            return Err(Error::generic(format_args!("Bitmap '{name}' is not found")));
        }
        bitmaps.push((node, name));
    }
    let export = NbdExport {
        name: add.name.unwrap_or_else(|| add.node_name.clone()),
        id: add.id,
        node_name: add.node_name,
        description: add.description,
        writable: add.writable.unwrap_or(false),
        bitmaps,
        allocation_depth: add.allocation_depth.unwrap_or(false),
    };
    monitor.control().add_export(export).await?;
    Ok(Done {})
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum RemoveModeName {
    Safe,
    Hard,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BlockExportDel {
    id: String,
    mode: Option<RemoveModeName>,
}

pub(crate) async fn block_export_del(monitor: &Monitor, del: BlockExportDel) -> Result<Done> {
    let control = monitor.control();
    if !control.exports().iter().any(|export| export.id == del.id) {
        return Err(Error::generic(format_args!("Export '{}' is not found", del.id)));
    }
    let mode = match del.mode {
        None | Some(RemoveModeName::Safe) => RemoveMode::Safe,
        Some(RemoveModeName::Hard) => RemoveMode::Hard,
    };
    control.remove_export(&del.id, mode).await?;
    Ok(Done {})
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct NbdServerStart {
    addr: SocketAddressLegacy,
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
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct UnixSocketAddress {
    path: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct InetSocketAddress {
    host: String,
    port: String,
}

pub(crate) async fn nbd_server_start(monitor: &Monitor, start: NbdServerStart) -> Result<Done> {
    let SocketAddressLegacy { r#type, data } = start.addr;
    let address = match r#type {
        SocketAddressType::Unix => {
            let UnixSocketAddress { path } = crate::arguments::parse(data, "addr.data")?;
            Address::Unix(path.into())
        }
        SocketAddressType::Inet => {
            let InetSocketAddress { host, port } = crate::arguments::parse(data, "addr.data")?;
            let number = port.parse().map_err(|_| {
                let text = format_args!("Parameter 'addr.data.port' does not accept value '{port}'");
                Error::generic(text)
            })?;
            Address::Inet(host, number)
        }
    };
    let server = NbdServer {
        address,
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

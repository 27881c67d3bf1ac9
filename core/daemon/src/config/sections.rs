//! The parts of a file that need no driver to be understood.

use super::{
    Config,
    mistake::{Mistake, Mistakes, Span},
    section::{Section, unknown_key},
    value::Value,
};
use driveline_bitmap::{BitmapName, Durability, Granularity, View};
use driveline_engine::Backend;
use driveline_graph::check_name;
use driveline_jobs::OnRestart;
use driveline_transport::{Endpoint, TlsCreds};
use std::{
    fmt,
    path::{Path, PathBuf},
};
use toml::Spanned;

/// The longest path of a unix socket that the kernel takes, its final NUL left out.
const SOCKET_PATH_LENGTH_MAX: usize = 107;

/// Where something listens.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Address {
    /// A unix socket, by its absolute path.
    Unix(PathBuf),
    /// TCP: `host:port`.
    Tcp(String),
    /// A socket that was passed to the program, by number or name. No file says so.
    Passed(String),
    /// TCP, with what a monitor says of it. No file says so.
    Inet(driveline_qmp::Inet),
    /// A unix socket by an abstract name. No file says so.
    Abstract(Vec<u8>),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "{}", path.display()),
            Address::Tcp(address) => f.write_str(address),
            Address::Passed(name) => write!(f, "fd:{name}"),
            Address::Inet(inet) => write!(f, "{}:{}", inet.host, inet.port),
            Address::Abstract(name) => {
                write!(f, "@{}", String::from_utf8_lossy(name).trim_end_matches('\0'))
            }
        }
    }
}

/// `[engine]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineSection {
    /// How many I/O threads.
    pub threads: Option<usize>,
    /// What they wait with.
    pub backend: Backend,
}

/// `[node.NAME]`.
#[derive(Clone, Debug)]
pub struct NodeSection {
    /// NAME.
    pub name: Spanned<String>,
    /// Its options as they are written.
    pub value: Spanned<Value>,
}

/// `[drive.NAME]`.
#[derive(Clone, Debug)]
pub struct DriveSection {
    /// NAME.
    pub name: Spanned<String>,
    /// The node that it leads to.
    pub root: Spanned<String>,
    /// Its bitmaps.
    pub bitmaps: Vec<BitmapSection>,
    /// Its bitmaps stay on a holder of its own for good.
    pub permanent_holder: bool,
    /// Where its persistent bitmaps are kept; without it, the program chooses.
    pub store: Option<Spanned<StorePlace>>,
    /// What becomes of its jobs when the program is killed and started again.
    pub on_restart: Option<OnRestart>,
}

/// Where the persistent bitmaps of a drive are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StorePlace {
    /// In a qcow2 image, by the name of its node.
    Qcow2(String),
    /// In a file of their own, by its absolute path.
    File(PathBuf),
}

impl fmt::Display for StorePlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StorePlace::Qcow2(node) => write!(f, "qcow2:{node}"),
            StorePlace::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}

/// A bitmap of a drive.
#[derive(Clone, Debug)]
pub struct BitmapSection {
    /// Its name.
    pub name: Spanned<String>,
    /// Its granularity; without it the node's default.
    pub granularity: Option<u64>,
    /// Whose changes it records.
    pub view: View,
    /// Does it record?
    pub recording: bool,
    /// What it survives; without it, nothing.
    pub durability: Option<Durability>,
}

/// `[export.NAME]`.
#[derive(Clone, Debug)]
pub struct ExportSection {
    /// NAME, which is also its id for QMP.
    pub id: Spanned<String>,
    /// What it serves.
    pub target: ExportTarget,
    /// Where.
    pub address: Spanned<Address>,
    /// The name that clients ask for; NAME unless it is said.
    pub name: Spanned<String>,
    /// May clients write?
    pub writable: bool,
    /// Bitmaps that clients can look at.
    pub bitmaps: Vec<Spanned<String>>,
    /// May clients ask in which layer data is?
    pub allocation_depth: bool,
    /// A text that clients show.
    pub description: String,
    /// Whose socket it is: one for clients of TLS, by the name of credentials.
    pub tls: Option<Spanned<String>>,
}

/// `[tls.NAME]`.
#[derive(Clone, Debug)]
pub struct TlsSection {
    /// NAME.
    pub name: Spanned<String>,
    /// Where the certificates are, and what for.
    pub creds: TlsCreds,
}

/// What an export serves.
#[derive(Clone, Debug)]
pub enum ExportTarget {
    /// A drive: the export follows it through changes of the graph.
    Drive(Spanned<String>),
    /// A node.
    Node(Spanned<String>),
}

impl ExportTarget {
    /// The name of the drive or node.
    pub fn name(&self) -> &Spanned<String> {
        match self {
            ExportTarget::Drive(name) | ExportTarget::Node(name) => name,
        }
    }
}

impl Config {
    pub(super) fn read_part(
        &mut self,
        key: &Spanned<String>,
        value: &Spanned<Value>,
        mistakes: &mut Mistakes,
    ) {
        let name = key.get_ref().as_str();
        let mut section = Section::new(format!("[{name}]"), key.span(), value, mistakes);
        match name {
            "plugins" => {
                let path =
                    |text: Spanned<String>| Spanned::new(text.span(), self.directory.join(text.get_ref()));
                self.plugins = section.strings("path").into_iter().map(path).collect();
                section.finish();
            }
            "engine" => {
                self.engine.threads = section.integer("threads", 1..=64).map(|threads| threads as usize);
                let backends =
                    [("auto", Backend::Auto), ("io_uring", Backend::IoUring), ("epoll", Backend::Fallback)];
                self.engine.backend = section.choice("backend", &backends).unwrap_or_default();
                section.finish();
            }
            "monitor" => {
                self.monitor = address(&self.directory, &mut section, "qmp", "qmp = \"qmp.sock\"");
                section.finish();
            }
            _ => {
                for (key, value) in section.entries() {
                    let what = format!("{name} '{}'", key.get_ref());
                    let entry = Section::new(what, key.span(), value, section.mistakes);
                    self.read_entry(name, key, value, entry);
                }
            }
        }
    }

    fn read_entry(
        &mut self,
        part: &str,
        name: &Spanned<String>,
        value: &Spanned<Value>,
        section: Section<'_, '_>,
    ) {
        if part != "export"
            && let Err(error) = check_name(name.get_ref())
        {
            section.mistakes.add(Mistake::new(name.span(), error.message()));
        }
        match part {
            "node" => self.nodes.push(NodeSection { name: name.clone(), value: value.clone() }),
            "tls" => self.tls.extend(read_tls(&self.directory, name, section)),
            "drive" => self.drives.extend(read_drive(&self.directory, name, section)),
            _ => self.exports.extend(read_export(&self.directory, name, section)),
        }
    }
}

fn read_drive(
    directory: &Path,
    name: &Spanned<String>,
    mut section: Section<'_, '_>,
) -> Option<DriveSection> {
    let root = section.string("root");
    if root.is_none() && !section.has("root") {
        section.missing("root", "root = \"NODE\"");
    }
    let what = section.what.clone();
    let mut bitmaps: Vec<BitmapSection> = Vec::new();
    for item in section.array("bitmaps", "tables") {
        let Some(bitmap) = read_bitmap(&what, item, section.mistakes) else { continue };
        if bitmaps.iter().any(|other| other.name.get_ref() == bitmap.name.get_ref()) {
            let message = format_args!("{what} has two bitmaps '{}'", bitmap.name.get_ref());
            section.mistakes.add(Mistake::new(bitmap.name.span(), message).label("the second"));
        }
        bitmaps.push(bitmap);
    }
    let holder = section.choice("holder", &[("permanent", true), ("when-needed", false)]);
    let store = section.string("bitmap-store").and_then(|text| read_store(directory, text, &mut section));
    let on_restart =
        section.choice("on-restart", &[("resume", OnRestart::Resume), ("drop", OnRestart::Drop)]);
    section.finish();
    let permanent_holder = holder.unwrap_or(false);
    Some(DriveSection { name: name.clone(), root: root?, bitmaps, permanent_holder, store, on_restart })
}

fn read_tls(directory: &Path, name: &Spanned<String>, mut section: Section<'_, '_>) -> Option<TlsSection> {
    let dir = section.string("dir");
    if dir.is_none() && !section.has("dir") {
        section.missing("dir", "dir = \"certificates\"");
    }
    let endpoint = section.choice("endpoint", &[("server", Endpoint::Server), ("client", Endpoint::Client)]);
    let verify_peer = section.boolean("verify-peer").is_none_or(Spanned::into_inner);
    let sanity_check = section.boolean("sanity-check").is_none_or(Spanned::into_inner);
    section.finish();
    let dir = directory.join(dir?.get_ref());
    let creds = TlsCreds { dir, endpoint: endpoint.unwrap_or_default(), verify_peer, sanity_check };
    Some(TlsSection { name: name.clone(), creds })
}

fn read_store(
    directory: &Path,
    text: Spanned<String>,
    section: &mut Section<'_, '_>,
) -> Option<Spanned<StorePlace>> {
    let place = match text.get_ref().split_once(':') {
        Some(("qcow2", node)) if !node.is_empty() => StorePlace::Qcow2(node.to_owned()),
        Some(("file", path)) if !path.is_empty() => StorePlace::File(directory.join(path)),
        _ => {
            let message = format_args!("'{}' is no place for bitmaps", text.get_ref());
            let mistake = Mistake::new(text.span(), message).label("expected qcow2:NODE or file:PATH");
            section.mistakes.add(mistake);
            return None;
        }
    };
    Some(Spanned::new(text.span(), place))
}

fn read_bitmap(of: &str, item: &Spanned<Value>, mistakes: &mut Mistakes) -> Option<BitmapSection> {
    let mut section = Section::new(format!("a bitmap of {of}"), item.span(), item, mistakes);
    let name = section.string("name");
    match &name {
        None if !section.has("name") && matches!(item.get_ref(), Value::Table(_)) => {
            section.missing("name", "{ name = \"daily\" }");
        }
        None => {}
        Some(name) => {
            if let Err(error) = BitmapName::new(name.get_ref()) {
                section.mistakes.add(Mistake::new(name.span(), error));
            }
        }
    }
    let granularity = section.bytes("granularity");
    if let Some(bytes) = &granularity
        && let Err(error) = Granularity::new(*bytes.get_ref())
    {
        section.mistakes.add(Mistake::new(bytes.span(), error));
    }
    let view = section.choice("view", &[("drive", View::Drive), ("node", View::Node)]);
    let recording = section.boolean("recording").is_none_or(Spanned::into_inner);
    let persistent = section.boolean("persistent");
    let words =
        [("volatile", Durability::Volatile), ("process", Durability::Process), ("power", Durability::Power)];
    let durability = section.choice("durability", &words);
    if let (Some(_), Some(no)) = (durability, persistent.as_ref().filter(|persistent| !persistent.get_ref()))
    {
        let message = "a bitmap with a durability is persistent";
        section.mistakes.add(Mistake::new(no.span(), message).label("remove this, or the durability"));
    }
    let persistent = persistent.is_some_and(Spanned::into_inner);
    let durability = durability.or_else(|| persistent.then(Durability::default));
    section.finish();
    Some(BitmapSection {
        name: name?,
        granularity: granularity.map(Spanned::into_inner),
        view: view.unwrap_or(View::Drive),
        recording,
        durability,
    })
}

fn read_export(
    directory: &Path,
    id: &Spanned<String>,
    mut section: Section<'_, '_>,
) -> Option<ExportSection> {
    if section.choice("type", &[("nbd", ())]).is_none() && !section.has("type") {
        section.missing("type", "type = \"nbd\"");
    }
    let target = match (section.string("drive"), section.string("node")) {
        (Some(drive), None) => Some(ExportTarget::Drive(drive)),
        (None, Some(node)) => Some(ExportTarget::Node(node)),
        (Some(drive), Some(node)) => {
            let message = format_args!("{} serves a drive or a node, not both", section.what);
            section.mistakes.add(Mistake::new(node.span(), message));
            // What else is wrong is told as well.
            Some(ExportTarget::Drive(drive))
        }
        (None, None) => {
            if !section.has("drive") && !section.has("node") {
                section.missing("drive", "drive = \"NAME\", or node = \"NAME\"");
            }
            None
        }
    };
    let address =
        address(directory, &mut section, "socket", "socket = \"vda.sock\", or listen = \"127.0.0.1:10809\"");
    let name = section.string("name");
    if let Some(name) = &name {
        check_text(name, "name", &mut section);
    }
    let description = section.string("description");
    if let Some(description) = &description {
        check_text(description, "description", &mut section);
    }
    let writable = section.boolean("writable").is_some_and(Spanned::into_inner);
    let bitmaps = section.strings("bitmaps");
    let allocation_depth = section.boolean("allocation-depth").is_some_and(Spanned::into_inner);
    let tls = section.string("tls");
    section.finish();
    Some(ExportSection {
        tls,
        name: name.unwrap_or_else(|| id.clone()),
        id: id.clone(),
        target: target?,
        address: address?,
        writable,
        bitmaps,
        allocation_depth,
        description: description.map(Spanned::into_inner).unwrap_or_default(),
    })
}

/// NBD sends names and descriptions as strings of at most 4096 bytes.
fn check_text(text: &Spanned<String>, key: &str, section: &mut Section<'_, '_>) {
    if text.get_ref().len() > 4096 || text.get_ref().contains('\0') {
        let message = format_args!("the {key} of {} has at most 4096 bytes and no NUL", section.what);
        section.mistakes.add(Mistake::new(text.span(), message));
    }
}

/// Reads a place to listen at: a unix socket under `key`, or TCP under `listen`.
fn address(
    directory: &Path,
    section: &mut Section<'_, '_>,
    key: &'static str,
    example: &str,
) -> Option<Spanned<Address>> {
    match (section.string(key), section.string("listen")) {
        (Some(path), None) => {
            let full = directory.join(path.get_ref());
            check_socket_path(&full, path.span(), section);
            Some(Spanned::new(path.span(), Address::Unix(full)))
        }
        (None, Some(listen)) => {
            let port = listen.get_ref().rsplit_once(':').filter(|(host, _)| !host.is_empty());
            if port.is_none_or(|(_, port)| port.parse::<u16>().is_err()) {
                let message = format_args!("'{}' is no address to listen on", listen.get_ref());
                let mistake = Mistake::new(listen.span(), message);
                section
                    .mistakes
                    .add(mistake.label("expected host:port").help("for example: \"127.0.0.1:10809\""));
            }
            Some(Spanned::new(listen.span(), Address::Tcp(listen.into_inner())))
        }
        (Some(path), Some(listen)) => {
            let message = format_args!("{} has '{key}' or 'listen', not both", section.what);
            section.mistakes.add(Mistake::new(listen.span(), message));
            // What else is wrong is told as well.
            let full = directory.join(path.get_ref());
            check_socket_path(&full, path.span(), section);
            Some(Spanned::new(path.span(), Address::Unix(full)))
        }
        (None, None) => {
            if !section.has(key) && !section.has("listen") {
                section.missing(key, example);
            }
            None
        }
    }
}

fn check_socket_path(path: &Path, span: Span, section: &mut Section<'_, '_>) {
    let length = path.as_os_str().len();
    if length > SOCKET_PATH_LENGTH_MAX {
        let message = format_args!(
            "the path of this socket has {length} bytes, and the kernel takes {SOCKET_PATH_LENGTH_MAX} at most"
        );
        section.mistakes.add(Mistake::new(span, message).help("write an absolute path that is shorter"));
    }
}

/// A key of a node that is not known.
pub(super) fn unknown_option(key: &Spanned<String>, what: &str, driver: &str, known: &[String]) -> Mistake {
    unknown_key(key, &format!("{what} (driver '{driver}')"), known.iter().map(String::as_str))
}

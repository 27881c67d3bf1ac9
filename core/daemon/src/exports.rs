//! What is served: exports by id, on servers by address.

use crate::config::{Address, ExportSection};
use driveline_bitmap::{Bitmap, Keep, Use};
use driveline_engine::{Handle, net::Listener};
use driveline_graph::{Change, Error, Graph, Kind, Result, Root, RootOptions, RootPlace};
use driveline_nbd::{AddError, Address as Socket, Export, Server, ServerOptions};
use driveline_transport::{ServerTls, TlsRegistry};
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry as Slot},
    fmt,
    sync::Arc,
};

mod coming;
mod inet;
mod sockets;

pub(crate) use coming::Coming;
use coming::Taken;
pub(crate) use sockets::reason;
pub use sockets::{Reserved, uri};
use sockets::{Unheard, bind, bound};

/// An export to be added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewExport {
    /// Its id.
    pub id: String,
    /// The drive or node that it shows.
    pub target: String,
    /// Its name for clients.
    pub name: String,
    /// A text that clients show.
    pub description: String,
    /// May clients write?
    pub writable: bool,
    /// Is what they write on stable storage before it is reported?
    pub writethrough: bool,
    /// Bitmaps that clients may look at: the drive or node (the export's own, if none is said), and the name.
    pub bitmaps: Vec<(Option<String>, String)>,
    /// Bitmaps of nodes, too, are shown while others use and change them, as a drive's are.
    pub live_bitmaps: bool,
    /// May clients ask in which layer data is?
    pub allocation_depth: bool,
    /// The engine thread that its sessions run on.
    pub thread: Option<usize>,
    /// May what it shows be inactive?
    pub allow_inactive: bool,
    /// What its socket is to be protected with. (For a monitor's server that is said when it is started.)
    pub tls: Option<String>,
}

impl NewExport {
    /// What a file says.
    pub fn of(section: &ExportSection) -> Self {
        Self {
            id: section.id.get_ref().clone(),
            target: section.target.name().get_ref().clone(),
            name: section.name.get_ref().clone(),
            description: section.description.clone(),
            writable: section.writable,
            writethrough: false,
            bitmaps: section.bitmaps.iter().map(|bitmap| (None, bitmap.get_ref().clone())).collect(),
            live_bitmaps: true,
            allocation_depth: section.allocation_depth,
            allow_inactive: false,
            thread: None,
            tls: section.tls.as_ref().map(|name| name.get_ref().clone()),
        }
    }
}

/// An export that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportView {
    /// Its id.
    pub id: String,
    /// The drive or node that it was opened on.
    pub target: String,
    /// The node that it leads to now.
    pub node: String,
    /// Its name for clients.
    pub name: String,
    /// Where clients find it.
    pub uri: String,
    /// It is on its way out.
    pub shutting_down: bool,
}

/// The exports of a program, and the servers that offer them.
pub struct Exports {
    engine: Handle,
    graph: Graph,
    tls: TlsRegistry,
    /// Whoever adds or removes something waits for its turn.
    turn: futures::lock::Mutex<()>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    servers: BTreeMap<Address, Arc<Listening>>,
    /// The server that was started by a monitor.
    of_monitor: Option<Address>,
    /// Sockets that listen, and from which nobody is taken before all exports are there.
    held: Option<Vec<(Arc<Listening>, Listener)>>,
    exports: BTreeMap<String, Entry>,
    /// Ids of exports that are on their way, and the names on their sockets: nobody else takes these meanwhile.
    coming: BTreeMap<String, (Address, String)>,
    /// Sockets that stay although nothing is served on them for a moment.
    kept: BTreeSet<Address>,
    /// The program ends: bitmaps are put away, so nothing is served any more.
    closed: bool,
}

impl State {
    fn is_in_use(&self, address: &Address) -> bool {
        self.exports.values().any(|entry| entry.at == *address)
    }

    fn check_id(&self, id: &str) -> Result<()> {
        if self.exports.contains_key(id) || self.coming.contains_key(id) {
            return Err(Error::new(
                Kind::Exists,
                format_args!("an export with the id '{id}' exists already"),
            ));
        }
        Ok(())
    }

    /// Hears clients on a socket: now, or as soon as anybody is let in.
    fn hear(&mut self, listening: &Arc<Listening>, listener: Listener) -> Result<()> {
        match &mut self.held {
            Some(held) => held.push((listening.clone(), listener)),
            None => drop(listening.server.accept_from(listener).map_err(Unheard::Io)?),
        }
        Ok(())
    }
}

struct Listening {
    server: Server,
    /// As it is bound: port 0 is a real one here.
    socket: Socket,
}

impl Listening {
    /// Where clients find an export.
    fn uri(&self, name: &str) -> String {
        let uri = uri(&self.socket, name);
        match uri.strip_prefix("nbd") {
            Some(rest) if self.server.is_tls() => format!("nbds{rest}"),
            _ => uri,
        }
    }
}

/// Exports of a file, as far as they have come.
#[derive(Default)]
struct Begun {
    /// New servers, and the socket of each, on which nobody is heard yet.
    servers: BTreeMap<Address, (Server, Option<(Listener, Socket)>)>,
    /// Those on servers that were there before.
    added: Vec<(Arc<Listening>, String)>,
    entries: Vec<(String, Entry)>,
}

struct Entry {
    new: NewExport,
    at: Address,
    /// It is of a file, not of a monitor.
    configured: bool,
    shutting_down: bool,
    shown: Shown,
}

impl Entry {
    fn new(new: &NewExport, at: Address, configured: bool, shown: Shown) -> Self {
        Self { new: new.clone(), at, configured, shutting_down: false, shown }
    }
}

impl fmt::Debug for Exports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.state.lock().exports.keys()).finish()
    }
}

impl Exports {
    /// None yet, of this graph, with credentials that exports may name.
    pub fn new(engine: Handle, graph: Graph, tls: TlsRegistry) -> Self {
        Self { engine, graph, tls, turn: Default::default(), state: Mutex::default() }
    }

    /// Takes the sockets that are needed to serve at these addresses and are not there yet. That is what fails most often, so it
    /// is done before anything that cannot be taken back.
    pub fn reserve<'a>(&self, addresses: impl IntoIterator<Item = &'a Address>) -> Result<Reserved> {
        let mut reserved = Reserved::default();
        for address in addresses {
            if !self.state.lock().servers.contains_key(address) {
                reserved.add(address)?;
            }
        }
        Ok(reserved)
    }

    /// Serves all of these at once, or none: on a new socket nobody is heard before all are there. What is not reserved is taken
    /// now.
    pub async fn start(&self, exports: Vec<(Address, NewExport)>, mut reserved: Reserved) -> Result<()> {
        let _turn = self.turn.lock().await;
        self.check_open()?;
        let mut taken = Taken::none(&self.state);
        exports.iter().try_for_each(|(address, new)| taken.take(new, address))?;
        let mut begun = Begun::default();
        if let Err(error) = self.begin(exports, &mut reserved, &mut begun).await {
            self.take_back(begun).await;
            return Err(error);
        }
        self.publish(begun).await
    }

    /// Hears clients on the new sockets, on all of them or on none.
    async fn publish(&self, begun: Begun) -> Result<()> {
        let Begun { servers, added, entries } = begun;
        let (mut new, mut heard) = (Vec::new(), Ok(()));
        {
            let mut state = self.state.lock();
            for (address, (server, listener)) in servers {
                let (listener, socket) = listener.expect("all of them have one by now");
                let listening = Arc::new(Listening { server, socket });
                heard = heard.and_then(|()| state.hear(&listening, listener));
                new.push((address, listening));
            }
            if heard.is_ok() {
                state.servers.extend(new);
                state.exports.extend(entries);
                return Ok(());
            }
            if let Some(held) = &mut state.held {
                held.retain(|(there, _)| !new.iter().any(|(_, gone)| Arc::ptr_eq(gone, there)));
            }
        }
        for (_, listening) in new {
            listening.server.close().await;
        }
        self.take_back(Begun { added, entries, ..Begun::default() }).await;
        heard
    }

    async fn begin(
        &self,
        exports: Vec<(Address, NewExport)>,
        reserved: &mut Reserved,
        begun: &mut Begun,
    ) -> Result<()> {
        // Those on sockets that are there already can be reached at once, so they come last, and go if one fails.
        let is_there = |address: &Address| self.state.lock().servers.contains_key(address);
        let (late, early): (Vec<_>, Vec<_>) = exports.into_iter().partition(|(address, _)| is_there(address));
        for (address, new) in early {
            let (server, _) = match begun.servers.entry(address.clone()) {
                Slot::Occupied(there) => there.into_mut(),
                Slot::Vacant(free) => {
                    let options = ServerOptions { tls: self.server_tls(&new)?, ..ServerOptions::default() };
                    free.insert((Server::new(self.engine.clone(), options), None))
                }
            };
            let shown = add(&self.graph, server, &new).await?;
            begun.entries.push((new.id.clone(), Entry::new(&new, address, true, shown)));
        }
        for (address, (_, listener)) in &mut begun.servers {
            let taken = reserved.take(address)?;
            let socket = bound(&taken)?;
            *listener = Some((taken, socket));
        }
        for (address, new) in late {
            let listening = self.state.lock().servers[&address].clone();
            self.check_tls(&address, &new, &BTreeSet::new())?;
            let shown = add(&self.graph, &listening.server, &new).await?;
            begun.added.push((listening, new.name.clone()));
            begun.entries.push((new.id.clone(), Entry::new(&new, address, true, shown)));
        }
        Ok(())
    }

    /// Clients that were quick get their answers and are disconnected; then nobody of them has anything open.
    async fn take_back(&self, begun: Begun) {
        for (listening, name) in begun.added {
            listening.server.remove_export(&name).await;
        }
        for (server, _) in begun.servers.into_values() {
            server.close().await;
        }
        drop(begun.entries);
        self.settle().await;
    }

    /// Monitors are served for a while after [`Exports::close`].
    fn check_open(&self) -> Result<()> {
        match self.state.lock().closed {
            true => Err(Error::new(Kind::NotSupported, "the program is ending")),
            false => Ok(()),
        }
    }

    fn check_id(&self, id: &str) -> Result<()> {
        self.state.lock().check_id(id)
    }

    /// An export of a file, and where it is served.
    pub(crate) fn configured(&self, id: &str) -> Option<(Address, NewExport)> {
        let state = self.state.lock();
        let entry = state.exports.get(id).filter(|entry| entry.configured)?;
        Some((entry.at.clone(), entry.new.clone()))
    }

    /// All exports of files.
    pub(crate) fn all_configured(&self) -> Vec<(Address, NewExport)> {
        let state = self.state.lock();
        let configured = state.exports.values().filter(|entry| entry.configured);
        configured.map(|entry| (entry.at.clone(), entry.new.clone())).collect()
    }

    /// What a new socket is protected with.
    fn server_tls(&self, new: &NewExport) -> Result<Option<ServerTls>> {
        let found = new.tls.as_ref().map(|name| self.tls.server(name)).transpose();
        found.map_err(|error| Error::new(Kind::Invalid, format_args!("export '{}': {error}", new.id)))
    }

    /// A socket that is there stays as it is protected: nobody is to be served in the clear who was promised otherwise.
    fn check_tls(&self, address: &Address, new: &NewExport, gone: &BTreeSet<&str>) -> Result<()> {
        let state = self.state.lock();
        let protected = state.servers.get(address).is_some_and(|there| there.server.is_tls());
        if protected != new.tls.is_some() {
            let how = if protected { "with" } else { "without" };
            let message = format_args!("export '{}': {address} is served {how} TLS already", new.id);
            return Err(Error::new(Kind::Invalid, message));
        }
        let mut stays = state.exports.iter().filter(|(id, _)| !gone.contains(&***id)).map(|(_, entry)| entry);
        let differs = |entry: &&Entry| entry.at == *address && entry.configured && entry.new.tls != new.tls;
        match stays.find(differs) {
            None => Ok(()),
            Some(other) => {
                let message = format_args!(
                    "export '{}' cannot have another 'tls' than export '{}' on the same socket",
                    new.id, other.new.id
                );
                Err(Error::new(Kind::Invalid, message))
            }
        }
    }

    /// The server that a monitor's export is added to.
    fn place_for(&self, new: &NewExport) -> Result<(Address, Arc<Listening>)> {
        self.check_open()?;
        self.check_id(&new.id)?;
        let state = self.state.lock();
        let at = match (&state.of_monitor, state.servers.len()) {
            (Some(address), _) => address.clone(),
            (None, 1) => state.servers.keys().next().expect("there is one").clone(),
            (None, 0) => return Err(Error::new(Kind::Invalid, "NBD server not running")),
            (None, count) => {
                let text = format_args!(
                    "NBD server not running, and the configuration has {count} sockets: which one is not known; expected \
                     nbd-server-start before, or [export.{}] in the file",
                    new.id
                );
                return Err(Error::new(Kind::Invalid, text));
            }
        };
        if state.coming.values().any(|coming| *coming == (at.clone(), new.name.clone())) {
            return Err(name_taken(&new.name));
        }
        Ok((at.clone(), state.servers[&at].clone()))
    }

    /// Does anybody look at the export?
    pub(crate) fn is_used(&self, id: &str) -> bool {
        let state = self.state.lock();
        let sessions = |entry: &Entry| {
            let server = &state.servers.get(&entry.at)?.server;
            server.exports().sessions(&entry.new.name)
        };
        state.exports.get(id).and_then(sessions).is_some_and(|count| count > 0)
    }

    /// Adds an export for a monitor: on the server that a monitor started, or else on the only one there is.
    pub async fn add(&self, new: NewExport) -> Result<()> {
        let _turn = self.turn.lock().await;
        let (at, listening) = self.place_for(&new)?;
        let mut taken = Taken::none(&self.state);
        taken.take(&new, &at)?;
        let shown = add(&self.graph, &listening.server, &new).await?;
        let entry = Entry::new(&new, at, false, shown);
        self.state.lock().exports.insert(new.id, entry);
        Ok(())
    }

    /// Takes an export away; its clients are disconnected. With `safe`, only if it has none.
    pub async fn remove(&self, id: &str, safe: bool) -> Result<()> {
        let _turn = self.turn.lock().await;
        let (name, listening) = {
            let mut state = self.state.lock();
            let unknown = || Error::new(Kind::NotFound, format_args!("export '{id}' is not found"));
            let State { servers, exports, .. } = &mut *state;
            let entry = exports.get_mut(id).ok_or_else(unknown)?;
            let listening = servers[&entry.at].clone();
            if safe && listening.server.exports().sessions(&entry.new.name).is_some_and(|count| count > 0) {
                let message = format_args!("export '{id}' still has clients connected");
                return Err(Error::new(Kind::Busy, message));
            }
            entry.shutting_down = true;
            (entry.new.name.clone(), listening)
        };
        listening.server.remove_export(&name).await;
        self.settle().await;
        let unused = {
            let mut state = self.state.lock();
            let gone = state.exports.remove(id).filter(|entry| entry.configured);
            let at = gone.map(|entry| entry.at).filter(|at| state.of_monitor.as_ref() != Some(at));
            at.filter(|at| !state.is_in_use(at) && !state.kept.contains(at))
        };
        // A socket that a file asked for goes with the last export on it.
        if let Some(address) = unused {
            self.close_server(&address).await;
        }
        Ok(())
    }

    /// These sockets stay when the last export of a file on them goes, until [`Exports::close_unused_sockets`]: others come.
    pub(crate) fn keep_sockets(&self, addresses: BTreeSet<Address>) {
        self.state.lock().kept = addresses;
    }

    /// Closes those of them on which no other came.
    pub(crate) async fn close_unused_sockets(&self) {
        let _turn = self.turn.lock().await;
        let unused: Vec<Address> = {
            let mut state = self.state.lock();
            let kept = std::mem::take(&mut state.kept).into_iter();
            kept.filter(|at| !state.is_in_use(at) && state.of_monitor.as_ref() != Some(at)).collect()
        };
        for address in unused {
            self.close_server(&address).await;
        }
    }

    /// Whether an export of a file could be added, once others are gone.
    ///
    /// Errors: those of [`Exports::start`] that can be told without the graph.
    pub(crate) fn check(&self, at: &Address, new: &NewExport, gone: &BTreeSet<&str>) -> Result<()> {
        self.check_open()?;
        if !gone.contains(&*new.id) {
            self.check_id(&new.id)?;
        }
        self.server_tls(new)?;
        let state = self.state.lock();
        let mut stay = state.exports.iter().filter(|(id, entry)| entry.at == *at && !gone.contains(&***id));
        if stay.clone().any(|(_, entry)| entry.new.name == new.name) {
            return Err(name_taken(&new.name));
        }
        let stays = stay.next().is_some() || state.of_monitor.as_ref() == Some(at);
        drop(state);
        if stays { self.check_tls(at, new, gone) } else { Ok(()) }
    }

    /// Starts a server for exports that monitors add.
    pub async fn start_server(&self, address: Address, options: ServerOptions) -> Result<()> {
        let _turn = self.turn.lock().await;
        self.check_open()?;
        if self.state.lock().of_monitor.is_some() {
            return Err(Error::new(Kind::Exists, "NBD server already running"));
        }
        if self.state.lock().servers.contains_key(&address) {
            let message = format_args!("exports of the configuration are served at {address} already");
            return Err(Error::new(Kind::Exists, message));
        }
        let server = Server::new(self.engine.clone(), options);
        let listener = bind(&address).map_err(|error| error.in_qemus_words(&address))?;
        let socket = bound(&listener)?;
        let mut state = self.state.lock();
        let listening = Arc::new(Listening { server, socket });
        state.hear(&listening, listener)?;
        state.servers.insert(address.clone(), listening);
        state.of_monitor = Some(address);
        Ok(())
    }

    /// From now on, clients of new servers wait until [`Exports::let_in`]: for a program that begins, and has more to do before
    /// anybody is served.
    pub fn hold(&self) {
        self.state.lock().held.get_or_insert_default();
    }

    /// Lets clients in.
    pub fn let_in(&self) -> Result<()> {
        for (listening, listener) in self.state.lock().held.take().unwrap_or_default() {
            listening.server.accept_from(listener).map_err(Unheard::Io)?;
        }
        Ok(())
    }

    /// Serves what the server of an export serves on one more socket, too. Without an id: of the first export.
    pub fn also_on(&self, id: Option<&str>, listener: Listener) -> Result<()> {
        let mut state = self.state.lock();
        let entry = match id {
            Some(id) => state.exports.get(id),
            None => state.exports.values().next(),
        };
        let none =
            || Error::new(Kind::NotFound, "there is no export for the socket that was passed to the program");
        let listening = state.servers[&entry.ok_or_else(none)?.at].clone();
        state.hear(&listening, listener)
    }

    /// Stops that server, with its exports. Returns their ids.
    pub async fn stop_server(&self) -> Result<Vec<String>> {
        let _turn = self.turn.lock().await;
        let Some(address) = self.state.lock().of_monitor.take() else {
            return Err(Error::new(Kind::Invalid, "NBD server not running"));
        };
        Ok(self.close_server(&address).await)
    }

    /// Ends all servers: what was accepted is answered, then clients are disconnected and the sockets are gone. Returns the
    /// ids of their exports. No others come.
    pub async fn close(&self) -> Vec<String> {
        let _turn = self.turn.lock().await;
        self.state.lock().closed = true;
        let addresses: Vec<Address> = self.state.lock().servers.keys().cloned().collect();
        let mut gone = Vec::new();
        for address in addresses {
            gone.extend(self.close_server(&address).await);
        }
        let mut state = self.state.lock();
        (state.of_monitor, state.held) = (None, None);
        gone
    }

    async fn close_server(&self, address: &Address) -> Vec<String> {
        let listening = {
            let mut state = self.state.lock();
            state
                .exports
                .values_mut()
                .filter(|entry| entry.at == *address)
                .for_each(|e| e.shutting_down = true);
            state.servers.remove(address)
        };
        if let Some(listening) = listening {
            listening.server.close().await;
            self.settle().await;
        }
        let mut state = self.state.lock();
        let (gone, left) =
            std::mem::take(&mut state.exports).into_iter().partition(|(_, entry)| entry.at == *address);
        state.exports = left;
        let gone: BTreeMap<String, Entry> = gone;
        gone.into_keys().collect()
    }

    /// Those who went had permissions; others may have them from now on, and files are locked for those that are left.
    async fn settle(&self) {
        if let Err(error) = self.graph.change().await.commit().await {
            tracing::warn!("permissions of exports that are gone: {error}");
        }
    }

    /// All exports, by id.
    pub fn list(&self) -> Vec<ExportView> {
        let state = self.state.lock();
        let view = |(id, entry): (&String, &Entry)| ExportView {
            id: id.clone(),
            target: entry.new.target.clone(),
            node: entry
                .shown
                .place
                .node_name()
                .map_or_else(|| entry.new.target.clone(), |node| node.to_string()),
            name: entry.new.name.clone(),
            uri: state.servers.get(&entry.at).map(|l| l.uri(&entry.new.name)).unwrap_or_default(),
            shutting_down: entry.shutting_down,
        };
        state.exports.iter().map(view).collect()
    }
}

/// What an export shows.
struct Shown {
    place: RootPlace,
    /// What it shows is there as long as it is.
    _bitmaps: Vec<Held>,
}

/// How an export holds what it shows.
enum Held {
    /// A drive's bitmap lives on: it is only not removed.
    Live { _keep: Keep },
    /// Of a monitor's export of a node: nobody else uses it meanwhile, as in QEMU.
    Still { _use: Use },
}

/// Offers an export. The result is to be held until it is gone.
async fn add(graph: &Graph, server: &Server, new: &NewExport) -> Result<Shown> {
    let mut bitmaps = Vec::new();
    for (of, name) in &new.bitmaps {
        bitmaps.push(graph.bitmap(of.as_ref().unwrap_or(&new.target), name)?);
    }
    let held = new.hold(graph, &bitmaps)?;
    let mut change = graph.change().await;
    let root = new.attach(&mut change)?;
    change.commit().await?;
    offer(server, new, root, (bitmaps, held))
}

impl NewExport {
    fn user(&self) -> String {
        format!("export '{}'", self.id)
    }

    /// Holds the bitmaps that it names.
    fn hold(&self, graph: &Graph, bitmaps: &[Arc<Bitmap>]) -> Result<Vec<Held>> {
        let hold = |((of, _), bitmap): (&(Option<String>, String), &Arc<Bitmap>)| {
            let of_drive = graph.is_drive(of.as_ref().unwrap_or(&self.target));
            if self.live_bitmaps || of_drive {
                return Ok(Held::Live { _keep: bitmap.keep(&self.user()) });
            }
            Ok(Held::Still { _use: bitmap.begin_use(&self.user())? })
        };
        self.bitmaps.iter().zip(bitmaps).map(hold).collect()
    }

    /// Attaches its user.
    fn attach(&self, change: &mut Change) -> Result<Root> {
        let user = self.user();
        let options = if self.writable { RootOptions::writer(user) } else { RootOptions::reader(user) };
        let root = change.attach_following(&self.target, &options)?;
        if self.allow_inactive {
            change.let_be_inactive(&root);
        }
        Ok(root)
    }
}

/// Lets clients see an export.
fn offer(
    server: &Server,
    new: &NewExport,
    root: Root,
    (bitmaps, held): (Vec<Arc<Bitmap>>, Vec<Held>),
) -> Result<Shown> {
    let place = root.place();
    root.count();
    if new.writethrough {
        root.write_through();
    }
    let export = Export {
        storage: root,
        writable: new.writable,
        description: new.description.clone(),
        bitmaps,
        allocation_depth: new.allocation_depth,
        thread: new.thread,
    };
    server.add_export(&new.name, export).map_err(|error| match error {
        AddError::Exists { name } => name_taken(&name),
        other => Error::new(Kind::Invalid, other),
    })?;
    Ok(Shown { place, _bitmaps: held })
}

fn name_taken(name: &str) -> Error {
    Error::new(Kind::Exists, format_args!("NBD server already has export named '{name}'"))
}

#[cfg(test)]
mod tests;

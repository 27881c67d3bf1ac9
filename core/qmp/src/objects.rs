//! Objects: what users create by name beside the graph, for exports, filters and TLS to refer to. QEMU's `--object` and `object-add`.
//!
//! The registry keeps and checks them. What they mean is the business of who looks them up: an export takes the thread of an
//! `iothread`, a filter the limits of a `throttle-group`, a server the certificates of `tls-creds-x509`. Who uses one holds it
//! ([`Objects::hold`]), so that it is not deleted meanwhile.
//!
//! QEMU's other types are refused by name. `tls-creds-psk` and `tls-creds-anon` are among them: TLS here has certificates only. So
//! is `authz-pam`: what PAM is asked may come from anywhere.

mod authz;
pub(crate) mod commands;
mod kept;
mod limits;
mod secret;

pub use authz::{AuthzList, AuthzListFile, AuthzPolicy, AuthzRule};
pub use limits::{Limit, ThrottleLimits};
pub use secret::Secret;

use crate::{
    arguments,
    error::{Class, Error, Result},
    schema::{Shape, trace},
};
use authz::{AuthzListArguments, AuthzListFileArguments, AuthzSimpleArguments};
use limits::GivenLimits;
use parking_lot::Mutex;
use secret::SecretArguments;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::{
    collections::BTreeMap,
    fmt, fs,
    path::PathBuf,
    sync::{Arc, OnceLock},
};

/// An object, as it is now.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Object {
    /// A thread for I/O.
    IoThread(IoThread),
    /// Limits that several nodes share.
    ThrottleGroup(ThrottleLimits),
    /// A password or key.
    Secret(Secret),
    /// A directory of certificates.
    TlsX509(TlsX509),
    /// The one name that may connect.
    AuthzSimple(String),
    /// Names that may connect, and names that may not.
    AuthzList(AuthzList),
    /// Such a list in a file.
    AuthzListFile(AuthzListFile),
}

/// An `iothread`. Driveline's threads are there from the start: each object names one of them, in turn.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct IoThread {
    /// The number of the engine's thread.
    #[serde(skip)]
    pub thread: usize,
    /// How long it polls before it sleeps, at most, in ns. The engine adapts that by itself: this is what was asked for.
    pub poll_max_ns: i64,
    /// By what the time of polling grows; 0 for the default.
    pub poll_grow: i64,
    /// By what it shrinks; 0 for the default.
    pub poll_shrink: i64,
    /// How many requests go to the kernel at once; 0 for the default.
    pub aio_max_batch: i64,
    /// The least number of threads for blocking work.
    pub thread_pool_min: i64,
    /// The largest number of them.
    pub thread_pool_max: i64,
}

/// A `tls-creds-x509`: where certificates are, by the names that QEMU has for the files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct TlsX509 {
    /// The directory.
    pub dir: PathBuf,
    /// For which side.
    pub endpoint: Endpoint,
    /// Must the other side show a certificate? A client always looks at the server's.
    pub verify_peer: bool,
    /// Are the certificates themselves to be looked at?
    pub sanity_check: bool,
    /// The id of the secret that the private key is encrypted with.
    pub passwordid: Option<String>,
}

/// A side of a TLS connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Endpoint {
    /// Connects.
    Client,
    /// Is connected to.
    Server,
}

/// A kind of object, as QEMU's QOM describes it.
struct Type {
    name: &'static str,
    parent: &'static str,
    properties: &'static [(&'static str, &'static str)],
}

const TYPES: [Type; 7] = [
    Type { name: "authz-list", parent: "authz", properties: authz::LIST },
    Type { name: "authz-listfile", parent: "authz", properties: authz::LIST_FILE },
    Type { name: "authz-simple", parent: "authz", properties: authz::SIMPLE },
    Type {
        name: "iothread",
        parent: "event-loop-base",
        properties: &[
            ("aio-max-batch", "int"),
            ("poll-grow", "int"),
            ("poll-max-ns", "int"),
            ("poll-shrink", "int"),
            ("thread-pool-max", "int"),
            ("thread-pool-min", "int"),
        ],
    },
    Type { name: "secret", parent: "secret_common", properties: secret::PROPERTIES },
    Type { name: "throttle-group", parent: "object", properties: limits::PROPERTIES },
    Type {
        name: "tls-creds-x509",
        parent: "tls-creds",
        properties: &[
            ("dir", "string"),
            ("endpoint", "QCryptoTLSCredsEndpoint"),
            ("passwordid", "string"),
            ("priority", "string"),
            ("sanity-check", "bool"),
            ("verify-peer", "bool"),
        ],
    },
];

impl Object {
    fn type_name(&self) -> &'static str {
        match self {
            Object::IoThread(_) => "iothread",
            Object::ThrottleGroup(_) => "throttle-group",
            Object::Secret(_) => "secret",
            Object::TlsX509(_) => "tls-creds-x509",
            Object::AuthzSimple(_) => "authz-simple",
            Object::AuthzList(_) => "authz-list",
            Object::AuthzListFile(_) => "authz-listfile",
        }
    }

    fn kind(&self) -> &'static Type {
        let name = self.type_name();
        TYPES.iter().find(|kind| kind.name == name).expect("every object has a type")
    }

    /// All properties but `type`, with their values.
    fn properties(&self) -> Map<String, Value> {
        let object = |value: serde_json::Result<Value>| match value {
            Ok(Value::Object(object)) => object,
            _ => Map::new(),
        };
        match self {
            Object::IoThread(thread) => object(serde_json::to_value(thread)),
            Object::ThrottleGroup(limits) => limits.properties(),
            Object::Secret(secret) => object(serde_json::to_value(&secret.given)),
            Object::TlsX509(creds) => {
                let mut properties = object(serde_json::to_value(creds));
                properties.insert("priority".into(), "".into());
                properties
            }
            Object::AuthzSimple(identity) => Map::from_iter([("identity".into(), identity.clone().into())]),
            Object::AuthzList(list) => object(serde_json::to_value(list)),
            Object::AuthzListFile(file) => object(serde_json::to_value(file)),
        }
    }
}

/// What happened to an object.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum ObjectChange {
    /// It is there.
    Added(Object),
    /// A property was set.
    Changed(Object),
    /// It is gone.
    Removed,
}

type Listener = Box<dyn Fn(&str, &ObjectChange) + Send + Sync>;
type Taker = Box<dyn Fn(&str, &Object) -> Result<()> + Send + Sync>;

/// All objects of a program, by id. Cheap to clone; all clones are the same.
#[derive(Clone)]
pub struct Objects(Arc<Inner>);

struct Inner {
    threads: usize,
    state: Mutex<State>,
    listeners: Mutex<Vec<Listener>>,
    takers: Mutex<Vec<Taker>>,
    /// Whose drivers keep objects for their nodes.
    graph: OnceLock<driveline_graph::Graph>,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Entry>,
    /// The thread that the next `iothread` names.
    next_thread: usize,
}

struct Entry {
    object: Object,
    users: usize,
}

impl fmt::Debug for Objects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.state.lock().objects.keys()).finish()
    }
}

impl Default for Objects {
    fn default() -> Self {
        Self::new(1)
    }
}

/// Keeps an object from being deleted.
#[derive(Debug)]
pub struct ObjectUse {
    objects: Objects,
    id: String,
}

impl Drop for ObjectUse {
    fn drop(&mut self) {
        if let Some(entry) = self.objects.0.state.lock().objects.get_mut(&self.id) {
            entry.users -= 1;
        }
    }
}

impl Objects {
    /// None yet, in a program whose engine has so many threads.
    pub fn new(threads: usize) -> Self {
        let (state, listeners, takers, graph) = Default::default();
        Self(Arc::new(Inner { threads: threads.max(1), state, listeners, takers, graph }))
    }

    /// Hears of every change, in their order. It is called with the registry unlocked.
    pub fn on_change(&self, listener: impl Fn(&str, &ObjectChange) + Send + Sync + 'static) {
        self.0.listeners.lock().push(Box::new(listener));
    }

    /// Is asked for every object that is to be added, by whoever has to use it: on an error it is not added. All who said yes hear of
    /// its end by [`Objects::on_change`]; the one that refuses comes last.
    pub fn on_add(&self, taker: impl Fn(&str, &Object) -> Result<()> + Send + Sync + 'static) {
        self.0.takers.lock().push(Box::new(taker));
    }

    /// Adds one, from the arguments of `object-add`: `qom-type`, `id`, and properties of that type.
    ///
    /// Errors: an id that is taken or no identifier, a type that is not known, properties that are wrong or too many.
    pub fn add(&self, mut arguments: Map<String, Value>) -> Result<()> {
        let text = |arguments: &mut Map<String, Value>, key: &str| match arguments.shift_remove(key) {
            Some(Value::String(text)) => Ok(text),
            Some(_) => {
                Err(Error::generic(format_args!("Invalid parameter type for '{key}', expected: string")))
            }
            None => Err(Error::generic(format_args!("Parameter '{key}' is missing"))),
        };
        let kind = text(&mut arguments, "qom-type")?;
        if !TYPES.iter().any(|known| known.name == kind) {
            let text = format_args!("Parameter 'qom-type' does not accept value '{kind}'");
            return Err(Error::generic(text));
        }
        let id = text(&mut arguments, "id")?;
        let properties = Value::Object(arguments);
        // What is given is read first, then the id is looked at, then what is given has to make sense: QEMU's order.
        let given = match &*kind {
            "iothread" => Given::IoThread(arguments::parse(properties, "")?),
            "throttle-group" => Given::ThrottleGroup(Box::new(arguments::parse(properties, "")?)),
            "secret" => Given::Secret(arguments::parse(properties, "")?),
            "authz-simple" => Given::AuthzSimple(arguments::parse(properties, "")?),
            "authz-list" => Given::AuthzList(arguments::parse(properties, "")?),
            "authz-listfile" => Given::AuthzListFile(arguments::parse(properties, "")?),
            _ => Given::TlsX509(arguments::parse(properties, "")?),
        };
        if !is_identifier(&id) {
            return Err(Error::generic("Parameter 'id' expects an identifier"));
        }
        let object = match given {
            Given::IoThread(given) => Object::IoThread(given.check()?),
            Given::ThrottleGroup(given) => Object::ThrottleGroup(ThrottleLimits::default().with(&given)?),
            Given::Secret(given) => Object::Secret(given.read()?),
            Given::TlsX509(given) => Object::TlsX509(given.check(self)?),
            Given::AuthzSimple(given) => Object::AuthzSimple(given.identity),
            Given::AuthzList(given) => Object::AuthzList(given.over(AuthzList::default())),
            Given::AuthzListFile(given) => Object::AuthzListFile(given.read()?),
        };
        let object = {
            let mut state = self.0.state.lock();
            if state.objects.contains_key(&id) {
                let text =
                    format_args!("attempt to add duplicate property '{id}' to object (type 'container')");
                return Err(Error::generic(text));
            }
            let object = match object {
                Object::IoThread(thread) => {
                    let at = state.next_thread;
                    state.next_thread = (at + 1) % self.0.threads;
                    Object::IoThread(IoThread { thread: at, ..thread })
                }
                other => other,
            };
            state.objects.insert(id.clone(), Entry { object: object.clone(), users: 0 });
            object
        };
        let taken = self.0.takers.lock().iter().try_for_each(|taker| taker(&id, &object));
        if let Err(error) = taken.and_then(|()| self.create_kept(&id, &object)) {
            self.0.state.lock().objects.remove(&id);
            return Err(error);
        }
        self.tell(&id, &ObjectChange::Added(object));
        Ok(())
    }

    /// Deletes one.
    ///
    /// Errors: there is none of that id, or it is in use.
    pub fn remove(&self, id: &str) -> Result<()> {
        if let Some(object) = self.get(id).filter(|_| !self.is_used(id)) {
            self.delete_kept(id, &object)?;
        }
        {
            let mut state = self.0.state.lock();
            match state.objects.get(id) {
                None => return Err(Error::generic(format_args!("object '{id}' not found"))),
                Some(entry) if entry.users > 0 => {
                    return Err(Error::generic(format_args!("object '{id}' is in use, can not be deleted")));
                }
                Some(_) => state.objects.remove(id),
            };
        }
        self.tell(id, &ObjectChange::Removed);
        Ok(())
    }

    /// One as it is now.
    pub fn get(&self, id: &str) -> Option<Object> {
        self.0.state.lock().objects.get(id).map(|entry| entry.object.clone())
    }

    fn is_used(&self, id: &str) -> bool {
        self.0.state.lock().objects.get(id).is_some_and(|entry| entry.users > 0)
    }

    /// One as it is now, which is not deleted before what comes with it is dropped.
    pub fn hold(&self, id: &str) -> Option<(Object, ObjectUse)> {
        let mut state = self.0.state.lock();
        let entry = state.objects.get_mut(id)?;
        entry.users += 1;
        Some((entry.object.clone(), ObjectUse { objects: self.clone(), id: id.to_owned() }))
    }

    /// The `iothread` of that id.
    ///
    /// Errors: QEMU's, when there is none.
    pub fn iothread(&self, id: &str) -> Result<(IoThread, ObjectUse)> {
        match self.hold(id) {
            Some((Object::IoThread(thread), held)) => Ok((thread, held)),
            _ => Err(Error::generic(format_args!("iothread \"{id}\" not found"))),
        }
    }

    /// The `tls-creds-x509` of that id, for a side.
    ///
    /// Errors: QEMU's, when there is none or it is something else.
    pub fn tls_creds(&self, id: &str, endpoint: Endpoint) -> Result<(TlsX509, ObjectUse)> {
        let text = match self.hold(id) {
            Some((Object::TlsX509(creds), held)) if creds.endpoint == endpoint => return Ok((creds, held)),
            Some((Object::TlsX509(_), _)) => {
                let side = if endpoint == Endpoint::Server { "server" } else { "client" };
                format!("Expected TLS credentials for a {side} endpoint")
            }
            Some(_) => format!("Object with id '{id}' is not TLS credentials"),
            None => format!("No TLS credentials with id '{id}'"),
        };
        Err(Error::generic(text))
    }

    /// What the `secret` of that id says.
    ///
    /// Errors: QEMU's, when there is none or it is something else.
    pub fn secret(&self, id: &str) -> Result<Vec<u8>> {
        match self.get(id) {
            Some(Object::Secret(secret)) => Ok(secret.bytes),
            Some(_) => Err(Error::generic(format_args!("Object with id '{id}' is not a secret"))),
            None => Err(Error::generic(format_args!("No secret with id '{id}'"))),
        }
    }

    /// All ids with the names of their types.
    pub fn list(&self) -> Vec<(String, &'static str)> {
        let state = self.0.state.lock();
        state.objects.iter().map(|(id, entry)| (id.clone(), entry.object.type_name())).collect()
    }

    /// Sets a property, as `qom-set` does.
    ///
    /// Errors: no such object or property, a value that it does not take, a property that is fixed.
    pub fn set(&self, id: &str, property: &str, value: Value) -> Result<()> {
        let object = {
            let mut state = self.0.state.lock();
            let Some(entry) = state.objects.get_mut(id) else { return Err(no_device(id)) };
            let kind = entry.object.kind();
            if !kind.properties.iter().any(|(name, _)| *name == property) {
                return Err(no_property(kind.name, property));
            }
            let mut given = Map::new();
            given.insert(property.to_owned(), value);
            let given = Value::Object(given);
            match &entry.object {
                Object::IoThread(thread) => {
                    Object::IoThread(arguments::parse::<IoThreadArguments>(given, "")?.over(thread.clone())?)
                }
                Object::ThrottleGroup(limits) if property == "limits" => {
                    Object::ThrottleGroup(limits.with(&arguments::parse(given, "")?)?)
                }
                Object::AuthzSimple(_) => {
                    Object::AuthzSimple(arguments::parse::<AuthzSimpleArguments>(given, "")?.identity)
                }
                Object::AuthzList(list) => {
                    Object::AuthzList(arguments::parse::<AuthzListArguments>(given, "")?.over(list.clone()))
                }
                _ => return Err(Error::generic("Property cannot be set after initialization")),
            }
        };
        // Who keeps it may refuse; then nothing has changed.
        self.change_kept(id, &object)?;
        if let Some(entry) = self.0.state.lock().objects.get_mut(id) {
            entry.object = object.clone();
        }
        self.tell(id, &ObjectChange::Changed(object));
        Ok(())
    }

    fn tell(&self, id: &str, change: &ObjectChange) {
        self.0.listeners.lock().iter().for_each(|listener| listener(id, change));
    }
}

/// Properties, as they are given.
enum Given {
    IoThread(IoThreadArguments),
    ThrottleGroup(Box<GivenLimits>),
    Secret(SecretArguments),
    TlsX509(TlsX509Arguments),
    AuthzSimple(AuthzSimpleArguments),
    AuthzList(AuthzListArguments),
    AuthzListFile(AuthzListFileArguments),
}

/// What each type takes, for the schema.
pub(crate) fn shapes() -> [(&'static str, Shape); 7] {
    [
        ("authz-list", trace::<AuthzListArguments>()),
        ("authz-listfile", trace::<AuthzListFileArguments>()),
        ("authz-simple", trace::<AuthzSimpleArguments>()),
        ("iothread", trace::<IoThreadArguments>()),
        ("secret", trace::<SecretArguments>()),
        ("throttle-group", trace::<GivenLimits>()),
        ("tls-creds-x509", trace::<TlsX509Arguments>()),
    ]
}

fn no_device(path: &str) -> Error {
    Error::new(Class::DeviceNotFound, format_args!("Device '{path}' not found"))
}

fn no_property(kind: &str, property: &str) -> Error {
    Error::generic(format_args!("Property '{kind}.{property}' not found"))
}

/// Begins with a letter, and goes on with letters, digits, `-`, `.` and `_`.
pub(crate) fn is_identifier(id: &str) -> bool {
    let part = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    id.starts_with(|c: char| c.is_ascii_alphabetic()) && id.chars().all(part)
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct IoThreadArguments {
    aio_max_batch: Option<i64>,
    thread_pool_min: Option<i64>,
    thread_pool_max: Option<i64>,
    poll_max_ns: Option<i64>,
    poll_grow: Option<i64>,
    poll_shrink: Option<i64>,
}

impl IoThreadArguments {
    /// QEMU's defaults, where nothing else is said.
    fn check(self) -> Result<IoThread> {
        self.over(IoThread {
            thread: 0,
            poll_max_ns: 32768,
            poll_grow: 0,
            poll_shrink: 0,
            aio_max_batch: 0,
            thread_pool_min: 0,
            thread_pool_max: 64,
        })
    }

    fn over(self, mut thread: IoThread) -> Result<IoThread> {
        let fields = [
            ("aio-max-batch", self.aio_max_batch, &mut thread.aio_max_batch),
            ("thread-pool-min", self.thread_pool_min, &mut thread.thread_pool_min),
            ("thread-pool-max", self.thread_pool_max, &mut thread.thread_pool_max),
            ("poll-max-ns", self.poll_max_ns, &mut thread.poll_max_ns),
            ("poll-grow", self.poll_grow, &mut thread.poll_grow),
            ("poll-shrink", self.poll_shrink, &mut thread.poll_shrink),
        ];
        for (name, given, field) in fields {
            if given.is_some_and(|value| value < 0) {
                return Err(Error::generic(format_args!("{name} value must be in range [0, {}]", i64::MAX)));
            }
            *field = given.unwrap_or(*field);
        }
        if thread.thread_pool_min > thread.thread_pool_max || thread.thread_pool_max == 0 {
            return Err(Error::generic("bad thread-pool-min/thread-pool-max values"));
        }
        Ok(thread)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct TlsX509Arguments {
    dir: Option<PathBuf>,
    endpoint: Option<Endpoint>,
    verify_peer: Option<bool>,
    sanity_check: Option<bool>,
    passwordid: Option<String>,
    priority: Option<String>,
}

impl TlsX509Arguments {
    fn check(self, objects: &Objects) -> Result<TlsX509> {
        if self.priority.is_some() {
            let text = "Parameter 'priority' is not supported: it is a text of the GnuTLS library";
            return Err(Error::generic(text));
        }
        let Some(dir) = self.dir else { return Err(Error::generic("Missing 'dir' property value")) };
        if let Some(id) = &self.passwordid {
            objects.secret(id)?;
        }
        // QEMU's default is what connects.
        let endpoint = self.endpoint.unwrap_or(Endpoint::Client);
        let needed: &[&str] = match endpoint {
            Endpoint::Server => &["ca-cert.pem", "server-cert.pem", "server-key.pem"],
            Endpoint::Client => &["ca-cert.pem"],
        };
        for name in needed {
            let path = dir.join(name);
            fs::metadata(&path).map_err(|error| {
                let why = match error.kind() {
                    std::io::ErrorKind::NotFound => "No such file or directory".to_owned(),
                    _ => error.to_string(),
                };
                let text = format_args!("Unable to access credentials {}: {why}", path.display());
                Error::generic(text)
            })?;
        }
        Ok(TlsX509 {
            dir,
            endpoint,
            verify_peer: self.verify_peer.unwrap_or(true),
            sanity_check: self.sanity_check.unwrap_or(true),
            passwordid: self.passwordid,
        })
    }
}

#[cfg(test)]
mod tests;

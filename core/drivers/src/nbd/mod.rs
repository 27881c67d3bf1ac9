//! `nbd`: an export of an NBD server, somewhere else.
//!
//! | option | default | meaning |
//! |---|---|---|
//! | `server` | required | `{ type = "unix", path }`, or `{ type = "inet", host, port }` (and `numeric`, `ipv4`, `ipv6`, `keep-alive`) |
//! | `export` | `""` | the export; the empty name is the server's default |
//! | `tls-creds` | none | the name of credentials for a client: TLS, or no connection |
//! | `tls-hostname` | the host | what the server's certificate has to be for |
//! | `x-dirty-bitmap` | none | a metadata context, such as `qemu:dirty-bitmap:NAME`, in place of block status: where it is set (dirty), there is no data |
//! | `reconnect-delay` | `0` | seconds that requests wait for a server that went away |
//! | `open-timeout` | `0` | seconds in which the first connection is tried again and again; `0`: it is tried once |
//!
//! [`parse_filename`] makes options of a URI, or of the form `nbd:...` that QEMU writes into images.
//!
//! It uses what the server offers: extended headers or structured replies, block status by `base:allocation`, FUA (or else a
//! flush after the write), fast zeroes, trims, hints to the cache, and several connections, one for each engine thread. What
//! the server lacks is done without it: zeroes are written, other hints are nothing. Minimum block size and maximum payload are limits of
//! the node, to which the graph cuts requests. The size is what it was when the node was opened.
//!
//! A server that goes away is connected to again, for as long as the node is open. Requests that were in flight are sent once
//! more then; meanwhile they wait for `reconnect-delay` seconds, and fail with EIO after that. A server that comes back with
//! another size or other abilities is refused, and tried again: somebody may put it right. One that breaks the protocol is not
//! tried again.
//!
//! [`OpenNode::yank`] cuts the connections: what was asked fails with EIO, and is not sent again.
//!
//! What was sent and not answered may have been done, or may even be done *after* it was sent again, if the old server is not
//! dead but only cut off. The same is so in QEMU; nothing in NBD would tell.

mod address;
mod calls;
mod connect;
mod filename;
mod link;
mod negotiate;
mod node;
mod options;
mod replies;
mod session;
mod terms;

use self::{
    connect::Target,
    link::Link,
    negotiate::Wanted,
    node::{Client, NbdNode},
    options::NbdOptions,
};
use driveline_engine::{Handle, current_thread};
use driveline_graph::{
    BoxFuture, Description, Driver, DriverKind, Error, Kind, OpenArgs, OpenNode, Options, Result,
};
use driveline_op::Body;
use driveline_transport::{TlsError, TlsRegistry};
use driveline_wire::TransmissionFlags;
use futures::channel::oneshot;
use std::{
    path::Path,
    sync::{Arc, OnceLock},
    time::Duration,
};

pub use filename::{is_filename, parse_filename};

/// The driver `nbd`.
#[derive(Debug)]
pub struct NbdDriver {
    description: Description,
    credentials: TlsRegistry,
}

impl Default for NbdDriver {
    fn default() -> Self {
        Self::new(TlsRegistry::default())
    }
}

impl NbdDriver {
    /// A driver that looks `tls-creds` up here, each time that a node is opened.
    pub fn new(credentials: TlsRegistry) -> Self {
        let options = [
            "server",
            "export",
            "tls-creds",
            "tls-hostname",
            "x-dirty-bitmap",
            "reconnect-delay",
            "open-timeout",
        ];
        let description = Description {
            options: options.map(Into::into).to_vec(),
            ..Description::builtin("nbd", DriverKind::Protocol, "An export of an NBD server")
        };
        Self { description, credentials }
    }

    fn target(&self, options: &NbdOptions, directory: &Path) -> Result<Target> {
        let address = options.address(directory)?;
        let tls = match &options.tls_creds {
            None => None,
            Some(id) => {
                let about = |key: &'static str| {
                    move |error: TlsError| {
                        let kind = if matches!(error, TlsError::NotFound { .. }) {
                            Kind::NotFound
                        } else {
                            Kind::Invalid
                        };
                        Error::new(kind, error).key(key)
                    }
                };
                let tls = self.credentials.client(id).map_err(about("tls-creds"))?;
                let hostname = options.tls_hostname.as_deref().or(address.host()).map(str::to_owned);
                tls.check_name(hostname.as_deref()).map_err(about("tls-hostname"))?;
                Some((tls, hostname))
            }
        };
        let context = options.x_dirty_bitmap.clone();
        Ok(Target {
            address,
            wanted: Wanted {
                export: options.export.clone(),
                context_required: context.is_some(),
                context: context.unwrap_or_else(|| "base:allocation".into()),
            },
            tls,
            reconnect_delay: Duration::from_secs(options.reconnect_delay.into()),
            open_timeout: Duration::from_secs(options.open_timeout.into()),
        })
    }

    async fn open_node(&self, args: OpenArgs<'_>) -> Result<Arc<dyn OpenNode>> {
        let target = self.target(&NbdOptions::parse(args.options)?, args.directory)?;
        let (Some(engine), Some(thread)) = (Handle::try_current(), current_thread()) else {
            return Err(Error::new(Kind::NotSupported, "an 'nbd' node is opened on an engine thread"));
        };
        let target = Arc::new(target);
        let terms = Arc::new(OnceLock::new());
        let links: Vec<_> =
            (0..engine.threads()).map(|_| Link::new(Arc::clone(&target), Arc::clone(&terms))).collect();
        let (ready, opened) = oneshot::channel();
        let link = Arc::clone(&links[thread]);
        let began = link.begin();
        debug_assert!(began);
        // From here on the task ends when `client` goes.
        let task = engine.spawn_on(thread, move || link.live(Some(ready)));
        let client = Client::new(links, thread, engine, target, terms, task);
        let terms = match opened.await {
            Ok(Ok(terms)) => terms,
            Ok(Err(error)) => return Err(Error::io_text(errno(&error), error)),
            Err(_) => return Err(Error::new(Kind::Io, "the engine was shut down")),
        };
        if terms.can(TransmissionFlags::READ_ONLY) && !args.read_only {
            client.close().await;
            return Err(Error::new(Kind::NotPermitted, "NBD export is read-only"));
        }
        client.set_read_only(args.read_only);
        Ok(Arc::new(NbdNode(Arc::new(Body { cookie: args.cookie, driver: client }))))
    }
}

impl Driver for NbdDriver {
    fn description(&self) -> &Description {
        &self.description
    }

    fn check(&self, options: &Options) -> Result<()> {
        NbdOptions::parse(options).map(drop)
    }

    fn open<'a>(&'a self, args: OpenArgs<'a>) -> BoxFuture<'a, Result<Arc<dyn OpenNode>>> {
        Box::pin(self.open_node(args))
    }
}

/// The number of an error that may have none of its own.
fn errno(error: &std::io::Error) -> i32 {
    use std::io::ErrorKind;
    error.raw_os_error().unwrap_or(match error.kind() {
        ErrorKind::NotFound => libc::ENOENT,
        ErrorKind::ConnectionRefused => libc::ECONNREFUSED,
        ErrorKind::PermissionDenied => libc::EACCES,
        ErrorKind::TimedOut => libc::ETIMEDOUT,
        _ => libc::EIO,
    })
}

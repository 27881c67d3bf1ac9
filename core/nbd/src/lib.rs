//! Network block device: the protocol as a pure codec, and the server that exports drives over it.
//!
//! It is fixed newstyle with everything that clients use today: structured replies and extended headers, block sizes, FUA,
//! fast zeroes, many connections, and block status with `base:allocation`, `qemu:allocation-depth`,
//! `qemu:dirty-bitmap:NAME`, and `driveline:backup:NAME`, which tells a backup tool what is dirty and has to be copied (1), and what is
//! dirty and reads as zeroes (2). It is not a client (that is a driver).
//!
//! Three nouns:
//! * [`wire`]: the bytes and nothing else; no socket, no storage, no thread. A client can use it as well.
//! * an [`Export`]: a root of a graph (or other [`Storage`]) with what clients may do and see, under a name in
//!   [`Exports`], which change while clients are connected;
//! * a *session*: one connection to one export, from [`serve`]. A [`Server`] accepts connections and gives each a session
//!   on one of the engine's threads.
//!
//! ```
//! # use std::sync::Arc;
//! use driveline_engine::{Config, Engine};
//! use driveline_graph::{Graph, GraphOptions, RootOptions};
//! use driveline_nbd::{Address, Export, Server, ServerOptions};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
//! # let directory = tempfile::tempdir()?;
//! let engine = Engine::start(Config::default())?;
//! let server = Server::new(engine.handle(), ServerOptions::default());
//! let socket = Address::Unix(directory.path().join("vda.sock"));
//! engine.block_on(async {
//!     let graph = Graph::new(GraphOptions::default());
//!     graph.register(Arc::new(driveline_drivers::MemoryDriver::default()))?;
//!     let disk = serde_json::json!({ "driver": "memory", "size": "1GiB", "node-name": "disk" });
//!     let mut change = graph.change().await;
//!     change.add_node(graph.parse(disk.as_object().unwrap().clone(), &[])?).await?;
//!     change.set_drive("vda", "disk")?;
//!     change.commit().await?;
//!
//!     let root = graph.open_root("vda", RootOptions::writer("export 'vda'")).await?;
//!     server.add_export("vda", Export::new(root.clone()).writable(true))?;
//!     println!("serving {}", server.listen(&socket)?); // for as long as you like
//!     server.close().await;
//!     root.close().await?;
//!     graph.close().await?;
//! #   Ok(())
//! })
//! # }
//! ```
//!
//! # What a client can and cannot do
//!
//! Whatever bytes it sends, it gets an error or is disconnected. It can make the server hold [`REQUESTS_MAX`] requests and
//! [`PAYLOAD_BYTES_MAX`] bytes of payload; then it has to take answers before more is read from it. It has to choose
//! an export in [`ServerOptions::handshake_limit`], and may then stay for ever. A request that began runs to its end,
//! even if its client vanishes.
//!
//! The size of an export is what it was when the session began: NBD has no way to tell of a change. Requests beyond the end of
//! an export that has shrunk fail, and what has grown is seen by those who connect anew.
//!
//! # TLS
//!
//! With [`ServerOptions::tls`] a client has to upgrade before it is told anything: other options are answered with
//! `ERR_TLS_REQD`, and `EXPORT_NAME` ends the connection. What was agreed before is forgotten then, and what was sent between the wish
//! and its answer ends the connection. Credentials are x509 certificates only, see [`TlsCreds`].
//!
//! Of those whose certificates are good, [`ServerOptions::authorize`] may let in some by name. The others are disconnected as soon
//! as TLS is on, without a word: so they are by QEMU.
//!
//! # What it costs
//!
//! A session is one task. Requests are begun where they are read, 32 pipelined ones out of a single `recv`; those that storage
//! completes at once are answered without a queue, a task or an allocation; all answers go out in a single `sendmsg`. So
//! of 4 KiB random reads at depth 32 from the page cache, each needs one `preadv2` and a sixteenth of a socket call, and
//! what a profile shows is the kernel copying data.

#![forbid(unsafe_code)]

mod authorize;
mod contexts;
mod export;
mod fault;
mod handshake;
mod limits;
mod serve;
mod server;
mod session;

pub use authorize::Authorize;
pub use driveline_transport::{Endpoint, ServerTls, TlsCreds, TlsError, TlsRegistry, Transport};
pub use driveline_wire as wire;
pub use export::{AddError, Export, Exports, Removed, Storage};
pub use fault::Fault;
pub use limits::{PAYLOAD_BYTES_MAX, REQUESTS_MAX};
pub use serve::{serve, serve_tls};
pub use server::{Address, Server, ServerOptions};

//! The driver `nbd` with servers of all kinds: those of others, our own, and one that does whatever a test wants.

mod kit;
mod malformed;
mod options;
mod reconnect;
mod servers;
mod tls;

//! Whole monitors: a real graph, a real socket, and clients that know only the protocol.

mod bitmaps;
mod checkpoints;
mod create;
mod events;
mod exports;
mod fields;
mod interop;
mod jobs;
mod kit;
mod mirror;
mod nodes;
mod options;
mod queries;
mod quorum;
mod schema;
mod session;
mod snapshots;

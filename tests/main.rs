//! Tests across the whole of Driveline: what no crate can show alone.

mod apply;
mod apply_undone;
mod backup;
mod checkpoints;
mod clients;
mod ctl;
mod differential;
mod filters;
mod guest_os;
mod harness;
mod kills;
mod memory;
mod mends;
mod offline;
mod path_of_a_write;
mod persistent;
mod plugins;
mod pull;
mod real_job;
mod restarts;
mod robust;
mod servers;
mod story;
mod tidy;
mod worlds;

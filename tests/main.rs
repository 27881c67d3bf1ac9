//! Tests across the whole of Driveline: what no crate can show alone.

mod harness;
mod plugins;
mod real_job;

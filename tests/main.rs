//! Tests across the whole of Driveline: what no crate can show alone.

mod filters;
mod harness;
mod path_of_a_write;
mod plugins;
mod real_job;

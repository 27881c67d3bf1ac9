//! The crate against killed processes, power cuts, failing disks and damaged files.

mod cuts;
mod disk;
mod faults;
mod kill;
mod model;

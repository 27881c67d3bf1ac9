//! The crate against killed processes, power cuts, failing disks and damaged files.

mod cuts;
mod damage;
mod disk;
mod faults;
mod kill;
mod model;
mod museum;
mod rebind;

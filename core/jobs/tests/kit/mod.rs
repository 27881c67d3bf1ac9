//! A world for jobs to be tested in: a scheduler that picks the next task by a seed, virtual time, and drivers that
//! stop at random points and fail when they are told to.

pub mod bench;
pub mod drivers;
pub mod notes;
pub mod sim;

//! The threads that everything runs on: one executor per I/O thread, over io_uring or epoll.

mod driver;
mod engine;
mod epoll;
mod executor;
pub mod file;
pub mod net;
mod ops;
mod pool;
mod ring;
pub mod signal;
mod timers;

pub use engine::{Backend, Config, Engine, Handle, current_thread, spawn_local, yield_now};
pub use executor::{JoinError, JoinHandle};
pub use pool::unblock;
pub use timers::{Sleep, now, sleep, sleep_until};

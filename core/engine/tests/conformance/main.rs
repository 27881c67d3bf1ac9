//! One set of claims, held against both backends.

use driveline_engine::{Backend, Config, Engine};

/// Makes of each function a test per backend.
macro_rules! conformance {
    ($($name:ident),* $(,)?) => {
        mod io_uring {
            $(#[test] fn $name() { super::$name(driveline_engine::Backend::IoUring) })*
        }
        mod epoll {
            $(#[test] fn $name() { super::$name(driveline_engine::Backend::Fallback) })*
        }
    };
}

mod files;
mod sockets;
mod tasks;

fn engine(backend: Backend, threads: usize) -> Engine {
    Engine::start(Config { threads, backend, ..Config::default() }).expect("the engine starts")
}

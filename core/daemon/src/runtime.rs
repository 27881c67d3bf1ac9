//! Jobs run on the engine.

use driveline_engine::Handle;
use driveline_graph::BoxFuture;
use driveline_jobs::Runtime;
use std::time::{Duration, Instant};

/// The engine, as jobs see it.
#[derive(Debug)]
pub struct EngineRuntime {
    engine: Handle,
    start: Instant,
}

impl EngineRuntime {
    /// Runs jobs on this engine.
    pub fn new(engine: Handle) -> Self {
        Self { engine, start: Instant::now() }
    }
}

impl Runtime for EngineRuntime {
    fn spawn(&self, future: BoxFuture<'static, ()>) {
        self.engine.spawn(future).detach();
    }

    fn spawn_here(&self, future: BoxFuture<'static, ()>) {
        match driveline_engine::current_thread() {
            Some(_) => driveline_engine::spawn_local(future).detach(),
            None => self.spawn(future),
        }
    }

    fn sleep(&self, time: Duration) -> BoxFuture<'static, ()> {
        Box::pin(driveline_engine::sleep(time))
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }
}

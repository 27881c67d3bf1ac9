//! Events and spans of a plugin are the program's.

use super::{sets::library, world::World};
use futures::executor::block_on;
use serde_json::json;
use std::{
    io::{self, Write},
    sync::{Arc, Mutex},
};
use tracing_subscriber::{EnvFilter, fmt::MakeWriter};

#[derive(Clone, Default)]
struct Captured(Arc<Mutex<Vec<u8>>>);

impl Write for Captured {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Captured {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

#[test]
fn events_of_a_plugin_reach_the_program_with_target_fields_and_spans() {
    let captured = Captured::default();
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new("off,driveline_filter_set=info,set::opened=info,driveline_op=warn"))
        .with_writer(captured.clone())
        .without_time()
        .with_ansi(false)
        .finish();
    // Tests beside this one have no subscriber. With a second one about, `tracing` asks all of them what they want to
    // hear, and not only the thread that gets to a place in the code first.
    let _second = tracing::Dispatch::new(tracing::subscriber::NoSubscriber::default());
    tracing::subscriber::with_default(subscriber, || {
        driveline_loader::log_refresh();
        let world = World::new(&[&library("current", "set")]);
        driveline_loader::log_refresh();
        let root = world.filter("logs", json!({}));
        let span = tracing::info_span!(target: "driveline_filter_set", "request", id = 7);
        span.in_scope(|| block_on(root.read(512..1024))).unwrap();
        let full = World::new(&[&library("current", "set")]).filter("only-write", json!({}));
        assert_eq!(block_on(full.write(0, b"data", 0)).unwrap_err().errno_code(), 28);
    });
    let text = String::from_utf8(captured.0.lock().unwrap().clone()).unwrap();
    let lines: Vec<_> = text.lines().map(str::trim).collect();
    assert_eq!(
        lines,
        [
            "INFO set::opened: opened node=\"filter\"",
            "INFO request{id=7}:reading{offset=512}: driveline_filter_set::logs: a read node=\"filter\" length=512 \
             negative=-1 exact=true half=0.5 range=512..1024",
            "WARN driveline_op::error: nothing fits node=\"filter\" operation=\"write\" errno=28",
        ]
    );
}

//! A server on a graph of one node, in this process.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use driveline_bitmap::Bitmap;
use driveline_drivers::{FileDriver, MemoryDriver};
use driveline_engine::{Config, Engine};
use driveline_graph::{Graph, GraphOptions, NewBitmap, Options, Root, RootOptions};
use driveline_nbd::{Address, Export, Server, ServerOptions};
use tempfile::TempDir;

pub(crate) struct Fixture {
    // Before the engine, whose threads its sessions run on.
    pub(crate) server: Server,
    pub(crate) graph: Graph,
    pub(crate) engine: Engine,
    pub(crate) directory: TempDir,
}

impl Fixture {
    /// A server without exports, listening on a unix socket.
    pub(crate) fn new(options: ServerOptions) -> Fixture {
        let engine = Engine::start(Config::default()).unwrap();
        let server = Server::new(engine.handle(), options);
        let graph = Graph::new(GraphOptions::default());
        graph.register(Arc::new(FileDriver::default())).unwrap();
        graph.register(Arc::new(MemoryDriver::default())).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let fixture = Fixture { server, graph, engine, directory };
        fixture.server.listen(&Address::Unix(fixture.socket())).unwrap();
        fixture
    }

    /// With an export `disk` of `size` bytes of memory, writable, with a bitmap `daily`.
    pub(crate) fn disk(size: u64) -> Fixture {
        let fixture = Fixture::new(ServerOptions::default());
        fixture.add_disk("disk", size);
        fixture
    }

    pub(crate) fn add_disk(&self, name: &str, size: u64) -> (Root, Arc<Bitmap>) {
        let definition =
            serde_json::json!({ "driver": "memory", "size": size, "node-name": format!("n-{name}") });
        let definition: Options = definition.as_object().unwrap().clone();
        self.engine.block_on(async {
            let node = format!("n-{name}");
            let mut change = self.graph.change().await;
            change.add_node(self.graph.parse(definition, &[]).unwrap()).await.unwrap();
            change.set_drive(name, &node).unwrap();
            change.add_bitmap(name, NewBitmap::named("daily")).unwrap();
            change.commit().await.unwrap();
            let user = format!("export '{name}'");
            let root = self.graph.open_root(name, RootOptions::writer(user)).await.unwrap();
            let bitmap = self.graph.bitmap(name, "daily").unwrap();
            let mut export = Export::new(root.clone()).writable(true).bitmap(bitmap.clone());
            export.description = format!("the disk {name}");
            self.server.add_export(name, export).unwrap();
            (root, bitmap)
        })
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path("nbd.sock")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    /// QEMU's way to name it, with the driver chosen.
    pub(crate) fn image_options(&self, export: &str) -> String {
        format!("driver=nbd,export={export},server.type=unix,server.path={}", self.socket().display())
    }

    /// A file of so many bytes, half of it holes, no two blocks alike.
    pub(crate) fn random_file(&self, name: &str, size: usize) -> PathBuf {
        let path = self.path(name);
        let mut data = vec![0u8; size];
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        for (index, block) in data.chunks_mut(64 << 10).enumerate() {
            if index % 2 == 0 {
                for byte in block {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    *byte = (state >> 56) as u8;
                }
            }
        }
        std::fs::write(&path, data).unwrap();
        path
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.engine.block_on(self.server.close());
        assert!(!self.socket().exists(), "the socket is gone with the server");
    }
}

/// Runs a tool. `None`: it is not installed.
pub(crate) fn run(program: &str, arguments: &[&str]) -> Option<Output> {
    let mut command = Command::new(program);
    // The tools' own interpreter, where somebody has put another one before it.
    let path = std::env::var("PATH").unwrap_or_default();
    command.args(arguments).env("PATH", format!("/usr/bin:{path}"));
    match command.output() {
        Ok(output) => Some(output),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("SKIPPED: {program} is not installed");
            assert!(std::env::var_os("CI").is_none(), "in CI no test is skipped: {program} is not installed");
            None
        }
        Err(error) => panic!("{program}: {error}"),
    }
}

/// What a tool prints when it succeeds, as it must.
pub(crate) fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = run(program, arguments)?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}\n{}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    Some(text(&output.stdout))
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

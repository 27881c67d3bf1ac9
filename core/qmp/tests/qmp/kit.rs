//! A monitor with a graph behind it, and a client that talks to it.

use driveline_drivers::{
    CopyBeforeWriteDriver, FileDriver, MemoryDriver, NbdDriver, NullDriver, QuorumDriver, RawDriver,
    SnapshotAccessDriver, qcow2::Qcow2Driver,
};
use driveline_engine::{Config, Engine, Handle, net::UnixListener};
use driveline_graph::{
    BoxFuture, ChildSpec, Description, Driver, DriverKind, Graph, GraphOptions, OpenArgs, OpenNode, Options,
    Role,
};
use driveline_jobs::{Jobs, Runtime};
use driveline_op::{Body, Info, Instance, OpTable};
use driveline_qmp::{Control, Error, ExportInfo, Monitor, NbdExport, NbdServer, RemoveMode, Result};
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

/// A program around a graph.
pub(crate) struct World {
    pub(crate) engine: Engine,
    pub(crate) graph: Graph,
    pub(crate) monitor: Monitor,
    pub(crate) program: Arc<Program>,
    pub(crate) folder: tempfile::TempDir,
}

/// What the program was asked for.
#[derive(Default)]
pub(crate) struct Program {
    pub(crate) server: Mutex<Option<NbdServer>>,
    pub(crate) exports: Mutex<Vec<NbdExport>>,
    pub(crate) quits: Mutex<u32>,
    /// Is told of an export, which is refused then.
    pub(crate) refuses: Mutex<Option<Box<dyn Fn(&NbdExport) + Send>>>,
}

impl Control for Program {
    fn exports(&self) -> Vec<ExportInfo> {
        let info = |export: &NbdExport| ExportInfo {
            id: export.id.clone(),
            node_name: export.node_name.clone(),
            shutting_down: false,
        };
        self.exports.lock().iter().map(info).collect()
    }

    fn add_export(&self, export: NbdExport) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            if self.server.lock().is_none() {
                return Err(Error::generic("NBD server not running"));
            }
            if let Some(told) = &*self.refuses.lock() {
                told(&export);
                return Err(Error::generic("no more exports"));
            }
            self.exports.lock().push(export);
            Ok(())
        })
    }

    fn remove_export<'a>(&'a self, id: &'a str, mode: RemoveMode) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            if mode == RemoveMode::Safe && id == "used" {
                return Err(Error::generic("export 'used' still in use"));
            }
            self.exports.lock().retain(|export| export.id != id);
            Ok(())
        })
    }

    fn start_nbd_server(&self, server: NbdServer) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            match self.server.lock().replace(server) {
                Some(_) => Err(Error::generic("NBD server already running")),
                None => Ok(()),
            }
        })
    }

    fn stop_nbd_server(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.exports.lock().clear();
            self.server.lock().take().map(drop).ok_or_else(|| Error::generic("NBD server not running"))
        })
    }

    fn quit(&self) {
        *self.quits.lock() += 1;
    }
}

struct Threads(Handle, Instant);

impl Runtime for Threads {
    fn spawn(&self, future: BoxFuture<'static, ()>) {
        self.0.spawn(future).detach();
    }

    fn sleep(&self, time: Duration) -> BoxFuture<'static, ()> {
        Box::pin(driveline_engine::sleep(time))
    }

    fn now(&self) -> Duration {
        self.1.elapsed()
    }
}

/// A filter that does nothing.
struct Idle(Description);

static NOTHING: OpTable<()> = OpTable::new();

struct IdleNode(Arc<Body<()>>);

impl OpenNode for IdleNode {
    fn instance(&self) -> Instance {
        Instance::new(self.0.clone(), &NOTHING)
    }

    fn info(&self, children: &[Info]) -> Info {
        children[0]
    }
}

impl Driver for Idle {
    fn description(&self) -> &Description {
        &self.0
    }

    fn check(&self, _: &Options) -> driveline_graph::Result<()> {
        Ok(())
    }

    fn open<'a>(&'a self, args: OpenArgs<'a>) -> BoxFuture<'a, driveline_graph::Result<Arc<dyn OpenNode>>> {
        Box::pin(async move {
            Ok(Arc::new(IdleNode(Arc::new(Body { cookie: args.cookie, driver: () }))) as Arc<dyn OpenNode>)
        })
    }
}

fn drivers() -> Vec<Arc<dyn Driver>> {
    let idle = |name| {
        let mut description = Description::builtin(name, DriverKind::Filter, "for tests");
        description.children = vec![ChildSpec::required("child", Role::Filtered)];
        Arc::new(Idle(description)) as Arc<dyn Driver>
    };
    let logging = {
        let mut description = Description::builtin("blklogwrites", DriverKind::Filter, "for tests");
        let log = ChildSpec::required("log", Role::Data);
        description.children = vec![ChildSpec::required("child", Role::Filtered), log];
        Arc::new(Idle(description))
    };
    let [null_co, null_aio] = NullDriver::of_qemu();
    vec![
        Arc::new(null_co),
        Arc::new(null_aio),
        Arc::new(FileDriver::host_device()),
        Arc::new(NullDriver::default()),
        Arc::new(MemoryDriver::default()),
        Arc::new(RawDriver::default()),
        Arc::new(QuorumDriver::default()),
        Arc::new(CopyBeforeWriteDriver::default()),
        Arc::new(SnapshotAccessDriver::default()),
        Arc::new(NbdDriver::default()),
        Arc::new(FileDriver::default()),
        Arc::new(Qcow2Driver::default()),
        idle("idle"),
        idle("bitmap-holder"),
        logging,
    ]
}

impl World {
    pub(crate) fn new() -> Self {
        let engine = Engine::start(Config { threads: 2, ..Config::default() }).unwrap();
        let graph = Graph::new(GraphOptions::default());
        drivers().into_iter().for_each(|driver| graph.register(driver).unwrap());
        let runtime = Threads(engine.handle(), Instant::now());
        let jobs = Jobs::new(graph.clone(), Arc::new(runtime));
        let program = Arc::new(Program::default());
        let monitor = Monitor::new(graph.clone(), jobs, program.clone());
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("qmp.sock")).unwrap();
        let serving = monitor.clone();
        engine.handle().spawn_on(0, move || async move { serving.serve(listener).await }).detach();
        Self { engine, graph, monitor, program, folder }
    }

    /// With a memory node `disk` of 1 MiB and a drive `vda` on it.
    pub(crate) fn with_disk() -> (Self, Client) {
        let world = Self::new();
        let mut client = world.client();
        let disk = json!({ "driver": "memory", "node-name": "disk", "size": 1 << 20 });
        client.ok("blockdev-add", disk);
        world.drive("vda", "disk");
        (world, client)
    }

    /// Makes a drive, as the configuration does.
    pub(crate) fn drive(&self, name: &'static str, node: &'static str) {
        self.engine.block_on(async {
            let mut change = self.graph.change().await;
            change.set_drive(name, node).unwrap();
            change.commit().await.unwrap();
        });
    }

    /// Writes as a guest of a drive.
    pub(crate) fn write(&self, drive: &str, offset: u64, data: &[u8]) {
        self.engine.block_on(async {
            let options = driveline_graph::RootOptions::writer("a guest");
            let root = self.graph.open_root(drive, options).await.unwrap();
            root.write(offset, data, 0).await.unwrap();
        });
    }

    /// Closes all nodes: what they hold back is in their files then.
    pub(crate) fn close(&self) {
        self.engine.block_on(self.graph.close()).unwrap();
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("qmp.sock")
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    /// A client that has not negotiated yet.
    pub(crate) fn connect(&self) -> Client {
        Client::connect(&self.socket())
    }

    pub(crate) fn client(&self) -> Client {
        let mut client = self.connect();
        client.ok("qmp_capabilities", json!({}));
        client
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.engine.block_on(async {
            self.monitor.close(driveline_qmp::Reason::Signal).await;
            let _ = self.graph.close().await;
        });
    }
}

/// One end of a monitor's socket.
pub(crate) struct Client {
    pub(crate) stream: UnixStream,
    lines: BufReader<UnixStream>,
    pub(crate) greeting: Value,
    /// What came while a reply was waited for.
    pub(crate) events: Vec<Value>,
}

impl Client {
    pub(crate) fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let lines = BufReader::new(stream.try_clone().unwrap());
        let mut client = Self { stream, lines, greeting: Value::Null, events: Vec::new() };
        client.greeting = client.message().expect("a greeting");
        client
    }

    pub(crate) fn send(&mut self, text: impl AsRef<[u8]>) {
        self.stream.write_all(text.as_ref()).unwrap();
    }

    /// The next message; `None` once the other side has hung up.
    pub(crate) fn message(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.lines.read_line(&mut line) {
            Ok(0) => None,
            Ok(_) => Some(serde_json::from_str(&line).unwrap()),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => None,
            Err(error) => panic!("{error}"),
        }
    }

    /// The next message that is no event.
    pub(crate) fn reply(&mut self) -> Value {
        loop {
            let message = self.message().expect("a reply");
            if message.get("event").is_none() {
                return message;
            }
            self.events.push(message);
        }
    }

    /// Waits for an event of a name, and gives its data.
    pub(crate) fn event(&mut self, name: &str) -> Value {
        loop {
            let next = match self.events.is_empty() {
                false => self.events.remove(0),
                true => self.message().expect("an event"),
            };
            if next["event"] == name {
                return next["data"].clone();
            }
        }
    }

    pub(crate) fn raw(&mut self, text: impl AsRef<[u8]>) -> Value {
        self.send(text);
        self.reply()
    }

    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Value {
        self.raw(json!({ "execute": command, "arguments": arguments }).to_string())
    }

    #[track_caller]
    pub(crate) fn ok(&mut self, command: &str, arguments: Value) -> Value {
        let mut reply = self.execute(command, arguments);
        assert!(reply.get("error").is_none(), "{command}: {reply}");
        reply["return"].take()
    }

    /// The text of the error that a command must give.
    #[track_caller]
    pub(crate) fn wrong(&mut self, command: &str, arguments: Value) -> String {
        let reply = self.execute(command, arguments);
        assert!(reply.get("return").is_none(), "{command}: {reply}");
        reply["error"]["desc"].as_str().unwrap().to_owned()
    }
}

/// Is a tool there? Without it a test is skipped, and says so; in CI that is a failure.
pub(crate) fn has(tool: &str, try_it: &mut Command) -> bool {
    let there = try_it.output().is_ok_and(|output| output.status.success());
    if !there {
        assert!(std::env::var_os("CI").is_none(), "{tool} is missing");
        eprintln!("SKIPPED: {tool} is missing");
    }
    there
}

/// What `differences.md` lists of one kind: the first column of its rows, without the kind.
pub(crate) fn differences(kind: &str) -> Vec<String> {
    let table = include_str!("../../differences.md");
    let rows = table.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` |"));
    let rows =
        rows.filter_map(|(subject, _)| Some(subject.strip_prefix(kind)?.strip_prefix(": ")?.to_owned()));
    rows.collect()
}

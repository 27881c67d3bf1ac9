//! Small drivers for tests of the graph: `memory`, a leaf; filters that pass, deny, or know old operations only.

use driveline_graph::*;
use driveline_op::{
    BlockStatus, BlockStatusRequest, Body, Buffer, DiscardRequest, FlushRequest, Info, Instance, Next,
    OpTable, ReadRequest, WriteRequest, WriteZeroesRequest, status,
};
use parking_lot::Mutex;
use std::sync::{
    Arc,
    atomic::{AtomicI32, AtomicU64, Ordering::SeqCst},
};

type OpResult = driveline_op::Result<()>;

/// What all leaves flush to: it may take its time, or fail.
#[derive(Default)]
pub struct Disk {
    /// Flushes that pass before one waits; nothing: all pass.
    passes: Mutex<Option<usize>>,
    errno: AtomicI32,
    freed: event_listener::Event,
    /// The node whose flushes fail.
    pub broken: Mutex<Option<String>>,
}

impl Disk {
    /// So many flushes pass; later ones wait.
    pub fn pass(&self, flushes: usize) {
        *self.passes.lock() = Some(flushes);
    }

    /// All pass from now on, also those that wait; with an error, unless it is 0.
    pub fn free(&self, errno: i32) {
        self.errno.store(errno, SeqCst);
        *self.passes.lock() = None;
        self.freed.notify(usize::MAX);
    }

    fn passes(&self) -> bool {
        let mut passes = self.passes.lock();
        match &mut *passes {
            None => true,
            Some(0) => false,
            Some(left) => {
                *left -= 1;
                true
            }
        }
    }

    async fn flush(&self) -> OpResult {
        loop {
            let freed = self.freed.listen();
            if self.passes() {
                break;
            }
            freed.await;
        }
        match self.errno.load(SeqCst) {
            0 => Ok(()),
            errno => Err(driveline_op::Error::errno(errno)),
        }
    }
}

/// A leaf that keeps its bytes, and remembers what it was asked.
pub struct Memory {
    name: String,
    disk: Arc<Disk>,
    bytes: Mutex<Vec<u8>>,
    pub log: Arc<Mutex<Vec<String>>>,
    alignment: u32,
    transfer_max: u64,
}

static MEMORY: OpTable<Memory> = OpTable::new()
    .read(Memory::read)
    .write(Memory::write)
    .flush(Memory::flush)
    .write_zeroes(Memory::write_zeroes)
    .discard(Memory::discard)
    .block_status(Memory::block_status);

impl Memory {
    fn note(&self, op: &str, range: std::ops::Range<u64>, flags: u32) {
        assert_eq!(range.start % u64::from(self.alignment), 0, "aligned, as it asked");
        assert_eq!(range.end % u64::from(self.alignment), 0, "aligned, as it asked");
        self.log.lock().push(format!("{op} {}+{} flags {flags}", range.start, range.end - range.start));
    }
    async fn read(&self, _: &mut Next<'_>, r: &ReadRequest<'_>) -> OpResult {
        self.note("read", r.range(), r.flags());
        assert!(self.transfer_max == 0 || r.length() <= self.transfer_max);
        r.fill(0, &self.bytes.lock()[r.offset() as usize..][..r.length() as usize]);
        Ok(())
    }
    async fn write(&self, _: &mut Next<'_>, r: &WriteRequest<'_>) -> OpResult {
        self.note("write", r.range(), r.flags());
        assert!(self.transfer_max == 0 || r.length() <= self.transfer_max);
        r.copy_to(0, &mut self.bytes.lock()[r.offset() as usize..][..r.length() as usize]);
        Ok(())
    }
    async fn write_zeroes(&self, _: &mut Next<'_>, r: &WriteZeroesRequest<'_>) -> OpResult {
        self.note("write_zeroes", r.range(), r.flags());
        self.bytes.lock()[r.offset() as usize..][..r.length() as usize].fill(0);
        Ok(())
    }
    async fn discard(&self, _: &mut Next<'_>, r: &DiscardRequest<'_>) -> OpResult {
        self.note("discard", r.range(), r.flags());
        Ok(())
    }
    async fn flush(&self, _: &mut Next<'_>, _: &FlushRequest<'_>) -> OpResult {
        self.log.lock().push("flush".into());
        self.disk.flush().await?;
        let is_broken = self.disk.broken.lock().as_ref() == Some(&self.name);
        if is_broken { Err(driveline_op::Error::IO) } else { Ok(()) }
    }
    async fn block_status(&self, _: &mut Next<'_>, r: &BlockStatusRequest<'_>) -> OpResult {
        self.note("block_status", r.range(), r.flags());
        r.answer(BlockStatus { flags: status::ZERO, depth: 0, length: r.length(), ..Default::default() });
        Ok(())
    }
}

/// A filter that has the operations of its table, and notes what passes.
pub struct Note(pub &'static str, Arc<Mutex<Vec<String>>>);

impl Note {
    async fn read(&self, next: &mut Next<'_>, r: &ReadRequest<'_>) -> OpResult {
        self.1.lock().push(format!("{}.read", self.0));
        next.read(r).await
    }
    async fn write(&self, next: &mut Next<'_>, r: &WriteRequest<'_>) -> OpResult {
        self.1.lock().push(format!("{}.write {}+{}", self.0, r.offset(), r.length()));
        next.write(r).await
    }
    async fn block_status(&self, next: &mut Next<'_>, r: &BlockStatusRequest<'_>) -> OpResult {
        self.1.lock().push(format!("{}.block_status flags {}", self.0, r.flags()));
        next.block_status(r).await
    }
    async fn panic(&self, _: &mut Next<'_>, _: &WriteRequest<'_>) -> OpResult {
        panic!("I cannot write")
    }
    async fn own_write(&self, next: &mut Next<'_>, r: &ReadRequest<'_>) -> OpResult {
        next.read(r).await?;
        next.write_at(0, r.offset(), &vec![0; r.length() as usize], driveline_op::flag::UNCHANGED).await
    }
}

impl Note {
    /// A format whose data lie behind the end of its file.
    async fn write_behind(&self, next: &mut Next<'_>, r: &WriteRequest<'_>) -> OpResult {
        let end = next.info(0).size_bytes;
        next.write(&r.at(r.offset() + end)).await
    }
}

static BEHIND: OpTable<Note> = OpTable::new().read(Note::read).write(Note::write_behind);
static NOTHING: OpTable<Note> = OpTable::new();
static READ_WRITE: OpTable<Note> = OpTable::new().read(Note::read).write(Note::write);
static READ: OpTable<Note> = OpTable::new().read(Note::read);
static STATUS: OpTable<Note> = OpTable::new().block_status(Note::block_status);
static PANIC: OpTable<Note> = OpTable::new().write(Note::panic);
static POPULATE: OpTable<Note> = OpTable::new().read(Note::own_write);

struct Open {
    instance: Instance,
    info: Option<Arc<(AtomicU64, Info)>>,
    /// What a node without a size of its own wants requests to be a multiple of.
    alignment: u32,
    closed: Arc<AtomicU64>,
}

impl OpenNode for Open {
    fn instance(&self) -> Instance {
        self.instance.clone()
    }
    fn info(&self, children: &[Info]) -> Info {
        match &self.info {
            Some(own) => Info { size_bytes: own.0.load(SeqCst), ..own.1 },
            None => Info { request_alignment: self.alignment, ..children[0] },
        }
    }
    fn resize<'a>(&'a self, _: &'a [OpenChild], size: u64) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let own =
                self.info.as_ref().ok_or_else(|| Error::new(Kind::NotSupported, "no size of its own"))?;
            own.0.store(size, SeqCst);
            Ok(())
        })
    }
    fn set_read_only<'a>(&'a self, _: &'a [OpenChild], _: bool) -> BoxFuture<'a, Result<()>> {
        Box::pin(async { Ok(()) })
    }
    fn close<'a>(&'a self, _: &'a [OpenChild]) -> BoxFuture<'a, Result<()>> {
        self.closed.fetch_add(1, SeqCst);
        Box::pin(async { Ok(()) })
    }
}

struct Kind0 {
    description: Description,
    table: Option<&'static OpTable<Note>>,
    bench: Bench,
}

/// A graph with the drivers, and what they noted.
#[derive(Clone)]
pub struct Bench {
    pub graph: Graph,
    pub log: Arc<Mutex<Vec<String>>>,
    pub closed: Arc<AtomicU64>,
    pub disk: Arc<Disk>,
}

impl Driver for Kind0 {
    fn description(&self) -> &Description {
        &self.description
    }
    fn check(&self, options: &Options) -> Result<()> {
        match options.keys().find(|key| !self.description.options.iter().any(|o| o == *key)) {
            Some(key) => Err(Error::new(Kind::Invalid, "unknown option").key(key)),
            None => Ok(()),
        }
    }
    fn open<'a>(&'a self, args: OpenArgs<'a>) -> BoxFuture<'a, Result<Arc<dyn OpenNode>>> {
        Box::pin(async move {
            let number = |key: &str, or: u64| args.options.get(key).and_then(|v| v.as_u64()).unwrap_or(or);
            let (cookie, log, closed) = (args.cookie, self.bench.log.clone(), self.bench.closed.clone());
            let open = match self.table {
                Some(table) => {
                    let name: &'static str = args.node_name.to_owned().leak();
                    let body = Arc::new(Body { cookie, driver: Note(name, log) });
                    let alignment = number("alignment", 1) as u32;
                    Open { instance: Instance::new(body, table), info: None, alignment, closed }
                }
                None => {
                    let (size, alignment) = (number("size", 1 << 20), number("alignment", 1) as u32);
                    let transfer_max = number("transfer-max", 0);
                    let (disk, bytes) = (self.bench.disk.clone(), Mutex::new(vec![0; 4 << 20]));
                    let body = Arc::new(Body {
                        cookie,
                        driver: Memory {
                            name: args.node_name.to_owned(),
                            disk,
                            bytes,
                            log,
                            alignment,
                            transfer_max,
                        },
                    });
                    let info = Info {
                        request_alignment: alignment,
                        transfer_bytes_max: transfer_max,
                        ..Info::default()
                    };
                    let info = Some(Arc::new((AtomicU64::new(size), info)));
                    Open { instance: Instance::new(body, &MEMORY), info, alignment, closed }
                }
            };
            Ok(Arc::new(open) as Arc<dyn OpenNode>)
        })
    }
}

impl Bench {
    pub fn new() -> Self {
        let graph = Graph::new(GraphOptions::default());
        let bench =
            Self { graph, log: Default::default(), closed: Default::default(), disk: Default::default() };
        let mut leaf = Description::builtin("memory", DriverKind::Protocol, "");
        leaf.options = ["size", "alignment", "transfer-max"].map(Into::into).to_vec();
        bench.driver(leaf, None);
        let overlay = {
            let mut overlay = Description::builtin("overlay", DriverKind::Format, "");
            overlay.children = vec![
                ChildSpec::required("file", Role::Storage),
                ChildSpec::optional("backing", Role::Backing),
            ];
            overlay
        };
        bench.driver(overlay, Some(&READ_WRITE));
        let mut growing = Description::builtin("growing", DriverKind::Format, "");
        growing.children = vec![ChildSpec::required("file", Role::Storage)];
        bench.driver(growing, Some(&BEHIND));
        let filter = |name, missing, known, table, effects| {
            let mut filter = Description::builtin(name, DriverKind::Filter, "");
            filter.children = vec![ChildSpec::required("child", Role::Filtered)];
            (filter.missing, filter.operations_known, filter.effects) = (missing, known, effects);
            filter.options = vec!["alignment".into()];
            bench.driver(filter, Some(table));
        };
        let mut debug = Description::builtin("debug", DriverKind::Filter, "");
        debug.children = vec![ChildSpec::required("child", Role::Filtered)];
        debug.child_words = vec!["image".into()];
        bench.driver(debug, Some(&NOTHING));
        let mut early = Description::builtin("status-before-1-2", DriverKind::Filter, "");
        early.children = vec![ChildSpec::required("child", Role::Filtered)];
        early.flags_known = driveline_op::flag::KNOWN_BEFORE_1_2;
        bench.driver(early, Some(&STATUS));
        let all = driveline_op::op::COUNT as u32;
        filter("holder", Missing::Pass, all, &NOTHING, 0);
        filter("throttle", Missing::Pass, all, &NOTHING, 0);
        filter("shifted", Missing::Deny, all, &READ_WRITE, driveline_op::effect::CHANGES_OFFSETS);
        filter("pass", Missing::Pass, all, &READ_WRITE, 0);
        filter("deny", Missing::Deny, all, &READ_WRITE, 0);
        filter("read-only-deny", Missing::Deny, all, &READ, 0);
        filter("old", Missing::Pass, 2, &READ_WRITE, 0);
        filter("status", Missing::Pass, all, &STATUS, 0);
        filter("panic", Missing::Pass, all, &PANIC, 0);
        filter("populate", Missing::Pass, all, &POPULATE, driveline_op::effect::OWN_WRITES);
        filter("not-live", Missing::Pass, all, &NOTHING, driveline_op::effect::NOT_LIVE);
        bench
    }

    fn driver(&self, description: Description, table: Option<&'static OpTable<Note>>) {
        self.graph.register(Arc::new(Kind0 { description, table, bench: self.clone() })).unwrap();
    }

    pub fn run<T>(&self, future: impl Future<Output = T>) -> T {
        futures::executor::block_on(future)
    }

    /// Adds nodes, given as JSON objects.
    pub fn add(&self, nodes: serde_json::Value) -> Result<()> {
        self.run(async {
            let mut change = self.graph.change().await;
            let nodes: Vec<Options> =
                nodes.as_array().unwrap().iter().map(|n| n.as_object().unwrap().clone()).collect();
            let names: Vec<String> =
                nodes.iter().filter_map(|n| n.get("node-name")?.as_str().map(str::to_owned)).collect();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let added = async {
                let definitions =
                    nodes.into_iter().map(|n| self.graph.parse(n, &names)).collect::<Result<_>>()?;
                change.add_nodes(definitions).await.map(drop)
            };
            let added = added.await;
            change.commit_if(added).await
        })
    }

    pub fn change(&self, edit: impl FnOnce(&mut Change) -> Result<()>) -> Result<()> {
        self.run(async {
            let mut change = self.graph.change().await;
            edit(&mut change)?;
            change.commit().await
        })
    }

    pub fn insert(&self, driver: &str, name: &str, above: &str) -> Result<()> {
        self.run(async {
            let mut change = self.graph.change().await;
            let filter = serde_json::json!({ "driver": driver, "node-name": name });
            change.insert_filter(filter.as_object().unwrap().clone(), above).await?;
            change.commit().await
        })
    }

    pub fn root(&self, on: &str) -> Root {
        self.run(self.graph.open_root(on, RootOptions::writer("a guest"))).unwrap()
    }

    pub fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock())
    }

    pub fn bytes(&self, root: &Root, range: std::ops::Range<u64>) -> Buffer {
        self.run(root.read(range)).unwrap()
    }

    pub fn dirty(&self, target: &str, name: &str) -> Vec<(u64, u64)> {
        let bitmap = self.graph.bitmap(target, name).unwrap();
        bitmap.bits().iter_dirty().map(|r| (r.start, r.end)).collect()
    }
}

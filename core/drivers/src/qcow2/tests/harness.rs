//! A file in memory, an image on top of it, and QEMU's tools.

use crate::qcow2::Qcow2Driver;
use driveline_graph::{BoxFuture, Driver, OpenArgs, OpenChild, OpenNode, Options, Result as GraphResult};
use driveline_op::*;
use futures::executor::block_on;
use parking_lot::Mutex;
use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

/// What happened to a leaf.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    Write(u64, Vec<u8>),
    /// What happened before this number is durable.
    Flush(usize),
}

/// A file in memory that grows when it is written past its end.
#[derive(Debug)]
pub(crate) struct Leaf {
    pub(crate) data: Mutex<Vec<u8>>,
    /// Everything that happened, if it is to be recorded.
    pub(crate) log: Mutex<Option<Vec<Event>>>,
    /// How often a read lets others run before it looks, and a write before it stores.
    pub(crate) slow: AtomicUsize,
    /// Each so-manieth write or flush fails; 0: none.
    pub(crate) failing: AtomicUsize,
    /// All writes and flushes fail from this one on, by number.
    pub(crate) fail_from: AtomicUsize,
    /// This one fails.
    pub(crate) fail_only: AtomicUsize,
    /// What cannot be read.
    pub(crate) bad: Mutex<std::ops::Range<u64>>,
    done: AtomicUsize,
}

impl Default for Leaf {
    fn default() -> Self {
        let never = || AtomicUsize::new(usize::MAX);
        Self {
            data: Mutex::default(),
            log: Mutex::default(),
            slow: AtomicUsize::new(0),
            failing: AtomicUsize::new(0),
            fail_from: never(),
            fail_only: never(),
            bad: Mutex::new(0..0),
            done: AtomicUsize::new(0),
        }
    }
}

impl Leaf {
    /// Writes and flushes so far.
    pub(crate) fn count(&self) -> usize {
        self.done.load(Relaxed)
    }

    async fn read(&self, _: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        for _ in 0..self.slow.load(Relaxed) {
            yield_now().await;
        }
        let data = self.data.lock();
        let range = request.range();
        let bad = self.bad.lock().clone();
        if range.start < bad.end && bad.start < range.end {
            return Err(Error::IO);
        }
        if range.end > data.len() as u64 {
            return Err(Error::invalid(format_args!("read of {range:?} past {}", data.len())));
        }
        request.fill(0, &data[range.start as usize..range.end as usize]);
        Ok(())
    }

    async fn write(&self, _: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        for _ in 0..=self.slow.load(Relaxed) {
            yield_now().await;
        }
        self.may_fail()?;
        let mut bytes = vec![0; request.length() as usize];
        request.copy_to(0, &mut bytes);
        self.put(request.offset(), bytes);
        Ok(())
    }

    fn put(&self, offset: u64, bytes: Vec<u8>) {
        let mut data = self.data.lock();
        let end = offset as usize + bytes.len();
        if data.len() < end {
            data.resize(end, 0);
        }
        data[offset as usize..end].copy_from_slice(&bytes);
        if let Some(log) = &mut *self.log.lock() {
            log.push(Event::Write(offset, bytes));
        }
    }

    fn may_fail(&self) -> Result<()> {
        let (each, done) = (self.failing.load(Relaxed), self.done.fetch_add(1, Relaxed));
        let fails = each > 0 && done % each == each - 1
            || done >= self.fail_from.load(Relaxed)
            || done == self.fail_only.load(Relaxed);
        if fails { Err(Error::IO) } else { Ok(()) }
    }

    /// How much was recorded.
    pub(crate) fn log_len(&self) -> usize {
        self.log.lock().as_ref().map_or(0, Vec::len)
    }

    async fn flush(&self, _: &mut Next<'_>, _: &FlushRequest<'_>) -> Result<()> {
        let before = self.log_len();
        yield_now().await;
        self.may_fail()?;
        if let Some(log) = &mut *self.log.lock() {
            log.push(Event::Flush(before));
        }
        Ok(())
    }

    /// What is given up becomes garbage: nobody may look at it.
    async fn discard(&self, _: &mut Next<'_>, request: &DiscardRequest<'_>) -> Result<()> {
        let end = (self.data.lock().len() as u64).min(request.range().end);
        if request.offset() < end {
            self.put(request.offset(), vec![0xdd; (end - request.offset()) as usize]);
        }
        Ok(())
    }

    async fn write_zeroes(&self, _: &mut Next<'_>, request: &WriteZeroesRequest<'_>) -> Result<()> {
        self.put(request.offset(), vec![0; request.length() as usize]);
        Ok(())
    }
}

/// Lets others run.
pub(crate) async fn yield_now() {
    let mut first = true;
    std::future::poll_fn(|cx| {
        if std::mem::take(&mut first) {
            cx.waker().wake_by_ref();
            std::task::Poll::Pending
        } else {
            std::task::Poll::Ready(())
        }
    })
    .await;
}

static LEAF: OpTable<Leaf> = OpTable::new()
    .read(Leaf::read)
    .write(Leaf::write)
    .flush(Leaf::flush)
    .discard(Leaf::discard)
    .write_zeroes(Leaf::write_zeroes);

/// The leaf as a node, for `OpenChild`.
struct LeafNode(Arc<Body<Leaf>>, Option<PathBuf>);

impl OpenNode for LeafNode {
    fn instance(&self) -> Instance {
        Instance::new(Arc::clone(&self.0), &LEAF)
    }
    fn info(&self, _: &[Info]) -> Info {
        Info { size_bytes: self.0.driver.data.lock().len() as u64, ..Info::default() }
    }
    fn filename(&self) -> Option<PathBuf> {
        self.1.clone()
    }
    fn resize<'a>(&'a self, _: &'a [OpenChild], size_bytes: u64) -> BoxFuture<'a, GraphResult<()>> {
        self.0.driver.data.lock().resize(size_bytes as usize, 0);
        Box::pin(async { Ok(()) })
    }
}

/// A node with its children, wired.
#[derive(Clone)]
pub(crate) struct World {
    pub(crate) leaf: Arc<Body<Leaf>>,
    pub(crate) children: Vec<OpenChild>,
    pub(crate) node: Arc<dyn OpenNode>,
}

/// A file with these bytes, as a child.
pub(crate) fn file_child(leaf: &Arc<Body<Leaf>>, path: Option<&Path>) -> OpenChild {
    let node: Arc<dyn OpenNode> = Arc::new(LeafNode(Arc::clone(leaf), path.map(Path::to_owned)));
    let edge = Edge::to(node.info(&[]), &Target::new(node.instance(), vec![]));
    OpenChild { name: "file".into(), edge, unfiltered: Arc::clone(&node), node, node_name: "file".into() }
}

pub(crate) fn leaf(bytes: Vec<u8>) -> Arc<Body<Leaf>> {
    Arc::new(Body { cookie: 0, driver: Leaf { data: Mutex::new(bytes), ..Leaf::default() } })
}

impl World {
    /// Opens an image in memory, perhaps with a backing.
    pub(crate) fn open(bytes: Vec<u8>, backing: Option<&World>, read_only: bool) -> GraphResult<World> {
        Self::open_with(bytes, backing, read_only, serde_json::json!({}))
    }

    pub(crate) fn open_with(
        bytes: Vec<u8>,
        backing: Option<&World>,
        read_only: bool,
        options: serde_json::Value,
    ) -> GraphResult<World> {
        Self::on(leaf(bytes), backing, read_only, options)
    }

    pub(crate) fn on(
        leaf: Arc<Body<Leaf>>,
        backing: Option<&World>,
        read_only: bool,
        options: serde_json::Value,
    ) -> GraphResult<World> {
        Self::with_data(leaf, None, backing, read_only, options)
    }

    /// The same with a data file.
    pub(crate) fn with_data(
        leaf: Arc<Body<Leaf>>,
        data: Option<&Arc<Body<Leaf>>>,
        backing: Option<&World>,
        read_only: bool,
        options: serde_json::Value,
    ) -> GraphResult<World> {
        let mut children = vec![file_child(&leaf, None)];
        children.extend(data.map(|data| OpenChild { name: "data-file".into(), ..file_child(data, None) }));
        children.extend(backing.map(|backing| OpenChild {
            name: "backing".into(),
            edge: backing.edge(),
            node: Arc::clone(&backing.node),
            unfiltered: Arc::clone(&backing.node),
            node_name: "backing".into(),
        }));
        let options: Options = options.as_object().unwrap().clone();
        let args = OpenArgs {
            node_name: "image",
            cookie: 1,
            options: &options,
            children: children.clone(),
            read_only,
            directory: Path::new("."),
        };
        let node = block_on(Qcow2Driver::new().open(args))?;
        Ok(World { leaf, children, node })
    }

    pub(crate) fn edge(&self) -> Edge {
        let infos: Vec<_> = self.children.iter().map(|child| *child.edge.info()).collect();
        let edges = self.children.iter().map(|child| child.edge.clone()).collect();
        Edge::to(self.node.info(&infos), &Target::new(self.node.instance(), edges))
    }

    pub(crate) fn size(&self) -> u64 {
        self.edge().info().size_bytes
    }

    pub(crate) async fn ask(&self, op: u32, offset: u64, length: u64, flags: u32, buffer: Buffer) -> Answer {
        Call::new(self.edge(), Ask { op, offset, length, flags, ..Ask::default() }, buffer).await
    }

    pub(crate) fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>> {
        let answer = block_on(self.ask(op::READ, offset, 0, 0, Buffer::new(length)));
        answer.result.map(|()| answer.buffer.to_vec())
    }

    pub(crate) fn plain(&self, op: u32, offset: u64, length: u64, flags: u32) -> Result<()> {
        block_on(self.ask(op, offset, length, flags, Buffer::default())).result
    }

    pub(crate) fn flush(&self) -> Result<()> {
        self.plain(op::FLUSH, 0, 0, 0)
    }

    pub(crate) fn status(&self, offset: u64, length: u64) -> Result<BlockStatus> {
        let answer = block_on(self.ask(op::BLOCK_STATUS, offset, length, 0, Buffer::default()));
        answer.result.map(|()| answer.status)
    }

    /// Everything that the guest sees.
    pub(crate) fn contents(&self) -> Vec<u8> {
        self.read(0, self.size() as usize).unwrap()
    }

    pub(crate) fn close(&self) -> GraphResult<()> {
        block_on(self.node.close(&self.children))
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.leaf.driver.data.lock().clone()
    }
}

/// Is this tool there? Says so if not, and fails in CI.
pub(crate) fn have(tool: &str) -> bool {
    let found = Command::new(tool).arg("--version").output().is_ok_and(|out| out.status.success());
    if !found {
        assert!(std::env::var_os("CI").is_none(), "{tool} is missing, and CI must not skip tests");
        eprintln!("SKIPPED: {tool} is missing, so this test shows nothing");
    }
    found
}

/// Runs a command that must succeed.
pub(crate) fn run(tool: &str, args: &[&str]) -> String {
    let out = output(tool, args);
    assert!(
        out.status.success(),
        "{tool} {args:?}: {}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8_lossy(&out.stdout).into_owned()
}

pub(crate) fn output(tool: &str, args: &[&str]) -> Output {
    Command::new(tool).args(args).output().unwrap()
}

/// Runs `qemu-io` commands on an image.
pub(crate) fn qemu_io(path: &Path, commands: &[String]) {
    let mut args = vec!["-f", "qcow2"];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(path.to_str().unwrap());
    let out = run("qemu-io", &args);
    assert!(!out.contains("failed"), "qemu-io {args:?}: {out}");
}

/// The seeds to try: one, or `DRIVELINE_QCOW2_SEEDS` many.
pub(crate) fn seeds() -> std::ops::Range<u64> {
    0..std::env::var("DRIVELINE_QCOW2_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(1)
}

/// Bytes that depend on where they are and on a seed. Some are mostly zeroes, if they are long.
pub(crate) fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    let mut bytes: Vec<u8> = (0..length).map(next).collect();
    if seed % 4 == 2 {
        let from = (length / 8) & !511;
        bytes[from..(length - length / 8).max(from)].fill(0);
    }
    bytes
}

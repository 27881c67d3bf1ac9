//! What a filter under test stands on: memory that remembers what was asked of it, and fails where it is told to.

use crate::{
    BlockStatus, BlockStatusRequest, CacheRequest, DiscardRequest, Error, EventRequest, FlushRequest, Info,
    Next, ReadRequest, ResizeRequest, Result, WriteRequest, WriteZeroesRequest, event, flag, sleep, status,
};
use driveline_op::{Body, Edge, Instance, OpTable, Target, op};
use std::{
    fmt,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Memory of that many bytes, all zero.
pub fn memory(size_bytes: u64) -> Leaf {
    let size = usize::try_from(size_bytes).expect("it fits in memory");
    let state = State {
        data: vec![0; size],
        seen: Vec::new(),
        faults: Vec::new(),
        latency: Duration::ZERO,
        grows: false,
    };
    let info = Info { size_bytes, ..Info::default() };
    Leaf { body: Arc::new(Body { cookie: 0, driver: Inner(Mutex::new(state)) }), info }
}

/// The same, but it grows when something is written behind its end, as a file does.
pub fn growing(size_bytes: u64) -> Leaf {
    let leaf = memory(size_bytes);
    leaf.body.driver.state().grows = true;
    leaf
}

/// See [`memory`]. Clones are the same leaf.
#[derive(Clone)]
pub struct Leaf {
    body: Arc<Body<Inner>>,
    info: Info,
}

struct Inner(Mutex<State>);

struct State {
    data: Vec<u8>,
    seen: Vec<String>,
    faults: Vec<Fault>,
    latency: Duration,
    grows: bool,
}

struct Fault {
    operation: String,
    range: Range<u64>,
    errno: i32,
    times: u32,
}

static OPERATIONS: OpTable<Inner> = OpTable::new()
    .read(Inner::read)
    .write(Inner::write)
    .flush(Inner::flush)
    .discard(Inner::discard)
    .write_zeroes(Inner::write_zeroes)
    .block_status(Inner::block_status)
    .cache(Inner::cache)
    .resize(Inner::resize)
    .event(Inner::event);

impl fmt::Debug for Leaf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leaf").field("info", &self.info).finish_non_exhaustive()
    }
}

impl Leaf {
    /// What was asked since the last call, as `read 0+512`, `write 512+512 fua`, `flush`.
    pub fn seen(&self) -> Vec<String> {
        std::mem::take(&mut self.body.driver.state().seen)
    }

    /// What it holds.
    pub fn data(&self, range: Range<u64>) -> Vec<u8> {
        self.body.driver.state().data[range.start as usize..range.end as usize].to_vec()
    }

    /// Makes it hold something.
    pub fn set_data(&self, offset: u64, data: &[u8]) {
        self.body.driver.state().data[offset as usize..][..data.len()].copy_from_slice(data);
    }

    /// From now on an operation (`"read"`, ...) that touches `range` fails, so many times. (A flush touches all.)
    pub fn fail(&self, operation: &str, range: Range<u64>, errno: i32, times: u32) {
        assert!(op::NAMES.contains(&operation), "an operation is one of {:?}", op::NAMES);
        let fault = Fault { operation: operation.to_owned(), range, errno, times };
        self.body.driver.state().faults.push(fault);
    }

    /// The same leaf with other limits.
    #[must_use]
    pub fn with_info(self, change: impl FnOnce(&mut Info)) -> Self {
        let mut leaf = self;
        change(&mut leaf.info);
        leaf
    }

    /// How long it is.
    pub fn size_bytes(&self) -> u64 {
        self.body.driver.state().data.len() as u64
    }

    /// From now on each operation takes that long, in virtual time.
    pub fn set_latency(&self, latency: Duration) {
        self.body.driver.state().latency = latency;
    }

    pub(super) fn edge(&self) -> Edge {
        let target = Target::new(Instance::new(self.body.clone(), &OPERATIONS), vec![]);
        Edge::to(Info { size_bytes: self.size_bytes(), ..self.info }, &target)
    }
}

fn flag_names(flags: u32) -> String {
    let names = [
        (flag::FUA, " fua"),
        (flag::UNCHANGED, " unchanged"),
        (flag::MAY_UNMAP, " may-unmap"),
        (flag::NO_FALLBACK, " no-fallback"),
        (flag::SERIALISING, " serialising"),
        (flag::COMPRESSED, " compressed"),
    ];
    names.iter().filter(|(bit, _)| flags & bit != 0).map(|(_, name)| *name).collect()
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers a request, waits, and fails it if it shall fail.
    async fn take(&self, operation: u32, range: Range<u64>, flags: u32) -> Result<()> {
        let name = op::NAMES[operation as usize];
        let (latency, errno) = {
            let mut state = self.state();
            state.seen.push(match operation {
                op::FLUSH => format!("flush{}", flag_names(flags)),
                op::RESIZE => format!("resize {}", range.start),
                op::EVENT => format!("event {}", event::NAMES[range.start as usize]),
                _ => format!("{name} {}+{}{}", range.start, range.end - range.start, flag_names(flags)),
            });
            let (size, grows) = (state.data.len() as u64, state.grows);
            let fault = state.faults.iter_mut().find(|fault| {
                let touched = fault.range.start < range.end && range.start < fault.range.end;
                fault.times > 0 && fault.operation == name && (touched || operation == op::FLUSH)
            });
            let errno = match fault {
                Some(fault) => {
                    fault.times -= 1;
                    Some(fault.errno)
                }
                None if matches!(operation, op::RESIZE | op::EVENT) => None,
                None if range.end > size && grows && matches!(operation, op::WRITE | op::WRITE_ZEROES) => {
                    state.data.resize(range.end as usize, 0);
                    None
                }
                None if range.end > size => Some(5),
                None => None,
            };
            (state.latency, errno)
        };
        if latency > Duration::ZERO {
            sleep(latency).await;
        }
        errno.map_or(Ok(()), |errno| Err(Error::errno(errno)))
    }

    async fn read(&self, _: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        self.take(op::READ, request.range(), request.flags()).await?;
        request.fill(0, &self.state().data[request.offset() as usize..][..request.length() as usize]);
        Ok(())
    }

    async fn write(&self, _: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        self.take(op::WRITE, request.range(), request.flags()).await?;
        request.copy_to(0, &mut self.state().data[request.offset() as usize..][..request.length() as usize]);
        Ok(())
    }

    async fn flush(&self, _: &mut Next<'_>, request: &FlushRequest<'_>) -> Result<()> {
        self.take(op::FLUSH, 0..0, request.flags()).await
    }

    async fn discard(&self, _: &mut Next<'_>, request: &DiscardRequest<'_>) -> Result<()> {
        self.take(op::DISCARD, request.range(), request.flags()).await?;
        self.state().data[request.offset() as usize..][..request.length() as usize].fill(0);
        Ok(())
    }

    async fn write_zeroes(&self, _: &mut Next<'_>, request: &WriteZeroesRequest<'_>) -> Result<()> {
        self.take(op::WRITE_ZEROES, request.range(), request.flags()).await?;
        self.state().data[request.offset() as usize..][..request.length() as usize].fill(0);
        Ok(())
    }

    /// All is data, but runs of zero bytes are told as such.
    async fn block_status(&self, _: &mut Next<'_>, request: &BlockStatusRequest<'_>) -> Result<()> {
        self.take(op::BLOCK_STATUS, request.range(), request.flags()).await?;
        let state = self.state();
        let data = &state.data[request.offset() as usize..][..request.length() as usize];
        let zero = data.first().is_none_or(|byte| *byte == 0);
        let length = data.iter().take_while(|byte| (**byte == 0) == zero).count() as u64;
        let flags = if zero { status::ZERO } else { status::DATA };
        request.answer(BlockStatus { flags, depth: 1, length, ..BlockStatus::default() });
        Ok(())
    }

    async fn cache(&self, _: &mut Next<'_>, request: &CacheRequest<'_>) -> Result<()> {
        self.take(op::CACHE, request.range(), request.flags()).await
    }

    async fn resize(&self, _: &mut Next<'_>, request: &ResizeRequest<'_>) -> Result<()> {
        self.take(op::RESIZE, request.range(), request.flags()).await?;
        self.state().data.resize(request.size_bytes() as usize, 0);
        Ok(())
    }

    async fn event(&self, _: &mut Next<'_>, request: &EventRequest<'_>) -> Result<()> {
        self.take(op::EVENT, request.range(), request.flags()).await
    }
}

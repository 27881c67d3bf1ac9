//! An open node: the operations, cut and spelled as the server takes them.

use super::{
    calls::{Asked, Reply},
    connect::Target,
    link::{Link, Phase},
    terms::Terms,
};
use driveline_engine::{Handle, JoinHandle, current_thread};
use driveline_graph::{BoxFuture, Error, Kind, OpenChild, OpenNode, Result};
use driveline_op::{
    BlockStatus, BlockStatusRequest, Body, Buffer, CacheRequest, DiscardRequest, Error as OpError,
    FlushRequest, Info, Instance, Next, OpTable, ReadRequest, WriteRequest, WriteZeroesRequest, flag, status,
};
use driveline_wire::{AllocationFlags, Command, CommandFlags, TransmissionFlags};
use parking_lot::Mutex;
use std::{
    ops::Range,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

/// How much is zeroed with one write, where the server cannot do it by itself.
const ZEROES_BYTES_MAX: u64 = 1 << 20;

type Done = driveline_op::Result<()>;

/// The links of a node, and who may use which.
pub(super) struct Client {
    /// By engine thread. All but the first are idle until their thread has a request.
    links: Vec<Arc<Link>>,
    /// The one that was there when the node was opened.
    first: usize,
    engine: Handle,
    target: Arc<Target>,
    terms: Arc<OnceLock<Terms>>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
    read_only: AtomicBool,
}

impl Drop for Client {
    fn drop(&mut self) {
        self.links.iter().for_each(|link| link.close());
    }
}

impl Client {
    pub(super) fn new(
        links: Vec<Arc<Link>>,
        first: usize,
        engine: Handle,
        target: Arc<Target>,
        terms: Arc<OnceLock<Terms>>,
        task: JoinHandle<()>,
    ) -> Client {
        let tasks = Mutex::new(vec![task]);
        Client { links, first, engine, target, terms, tasks, read_only: AtomicBool::new(false) }
    }

    pub(super) fn set_read_only(&self, read_only: bool) {
        self.read_only.store(read_only, Relaxed);
    }

    fn terms(&self) -> &Terms {
        self.terms.get().expect("a node is open once its first link has terms")
    }

    /// Ends the connections in good order.
    pub(super) async fn close(&self) {
        self.links.iter().for_each(|link| link.close());
        let tasks = std::mem::take(&mut *self.tasks.lock());
        for task in tasks {
            // A task that panicked, or whose engine is gone, is at its end as well.
            let _ = task.await;
        }
    }

    /// The link of this thread, if it is connected; else the first. That of this thread is begun when it is missed.
    fn link(&self) -> &Arc<Link> {
        let first = &self.links[self.first];
        let thread = match current_thread() {
            Some(thread) if thread != self.first && thread < self.links.len() => thread,
            _ => return first,
        };
        if !self.terms().can(TransmissionFlags::CAN_MULTI_CONN) {
            return first;
        }
        let own = &self.links[thread];
        match own.phase() {
            Phase::Connected => own,
            Phase::Idle => {
                if own.begin() {
                    let link = Arc::clone(own);
                    let task = self.engine.spawn_on(thread, move || link.live(None));
                    self.tasks.lock().push(task);
                }
                first
            }
            _ => first,
        }
    }

    /// One request to the server, and its answer.
    async fn call(
        &self,
        link: &Link,
        command: Command,
        flags: CommandFlags,
        range: Range<u64>,
        payload: Option<Buffer>,
    ) -> driveline_op::Result<Reply> {
        let asked = Asked { command, flags, offset: range.start, length: range.end - range.start };
        let payload = payload.map(Arc::new);
        let pending = match link.submit(asked, payload.clone()) {
            Some(pending) => pending,
            // It went just now; the first one may still be there.
            None => self.links[self.first].submit(asked, payload.clone()).ok_or(OpError::IO)?,
        };
        // Kept by the link alone, so that it is used again.
        drop(payload);
        pending.await.map_err(|errno| OpError::errno(errno.to_system()))
    }

    async fn simple(&self, command: Command, flags: CommandFlags, range: Range<u64>) -> Done {
        self.call(self.link(), command, flags, range, None).await.map(drop)
    }

    /// A range in pieces that the server takes at once.
    fn pieces(range: Range<u64>, longest: u64) -> impl Iterator<Item = Range<u64>> {
        let count = (range.end - range.start).div_ceil(longest);
        (0..count).map(move |index| {
            let start = range.start + index * longest;
            start..range.end.min(start.saturating_add(longest))
        })
    }

    fn inside(&self, range: &Range<u64>, beyond: OpError) -> Done {
        let alignment = u64::from(self.terms().alignment());
        if range.end > self.terms().size_bytes {
            return Err(beyond);
        }
        let aligned = range.start.is_multiple_of(alignment) && range.end.is_multiple_of(alignment);
        if aligned { Ok(()) } else { Err(OpError::INVALID.because("a request that is not aligned")) }
    }

    fn about_to_write(&self, range: &Range<u64>) -> Done {
        if self.read_only.load(Relaxed) || self.terms().can(TransmissionFlags::READ_ONLY) {
            return Err(OpError::NOT_PERMITTED);
        }
        self.inside(range, OpError::NO_SPACE)
    }

    async fn read(&self, _: &mut Next<'_>, request: &ReadRequest<'_>) -> Done {
        self.inside(&request.range(), OpError::INVALID)?;
        for piece in Self::pieces(request.range(), self.terms().transfer_bytes_max()) {
            let link = self.link();
            let at = piece.start - request.offset();
            match self.call(link, Command::READ, CommandFlags::EMPTY, piece, None).await? {
                Reply::Data(data) => {
                    request.fill(at, &data);
                    link.give(data);
                }
                _ => return Err(OpError::IO),
            }
        }
        Ok(())
    }

    async fn write(&self, _: &mut Next<'_>, request: &WriteRequest<'_>) -> Done {
        self.about_to_write(&request.range())?;
        let (fua, flush_after) = self.fua(request.flags());
        for piece in Self::pieces(request.range(), self.terms().transfer_bytes_max()) {
            let link = self.link();
            // A copy of its own: it may be sent again, and after the requester has gone.
            let mut data = link.buffer((piece.end - piece.start) as usize);
            request.copy_to(piece.start - request.offset(), &mut data);
            self.call(link, Command::WRITE, fua, piece, Some(data)).await?;
        }
        if flush_after { self.flush_now().await } else { Ok(()) }
    }

    async fn write_zeroes(&self, _: &mut Next<'_>, request: &WriteZeroesRequest<'_>) -> Done {
        self.about_to_write(&request.range())?;
        let fast = request.flags() & flag::NO_FALLBACK != 0;
        if fast && !self.terms().can(TransmissionFlags::SEND_FAST_ZERO) {
            return Err(OpError::NOT_SUPPORTED);
        }
        let (fua, flush_after) = self.fua(request.flags());
        if self.terms().can(TransmissionFlags::SEND_WRITE_ZEROES) {
            let flags = fua
                .with(CommandFlags::NO_HOLE, request.flags() & flag::MAY_UNMAP == 0)
                .with(CommandFlags::FAST_ZERO, fast);
            // One step of many that is refused as slow leaves those before it done; that is allowed, as it is in QEMU.
            for piece in Self::pieces(request.range(), self.terms().effect_bytes_max()) {
                self.simple(Command::WRITE_ZEROES, flags, piece).await?;
            }
        } else {
            let longest = self.terms().transfer_bytes_max();
            let longest = longest.min(ZEROES_BYTES_MAX.max(u64::from(self.terms().alignment())));
            for piece in Self::pieces(request.range(), longest) {
                let link = self.link();
                let mut data = link.buffer((piece.end - piece.start) as usize);
                data.fill(0);
                self.call(link, Command::WRITE, fua, piece, Some(data)).await?;
            }
        }
        if flush_after { self.flush_now().await } else { Ok(()) }
    }

    /// How a write becomes durable: by a flag, or by a flush after it.
    fn fua(&self, flags: u32) -> (CommandFlags, bool) {
        let wanted = flags & flag::FUA != 0;
        let can = self.terms().can(TransmissionFlags::SEND_FUA);
        (CommandFlags::EMPTY.with(CommandFlags::FUA, wanted && can), wanted && !can)
    }

    async fn flush(&self, _: &mut Next<'_>, _: &FlushRequest<'_>) -> Done {
        self.flush_now().await
    }

    async fn flush_now(&self) -> Done {
        match self.terms().can(TransmissionFlags::SEND_FLUSH) {
            // One flush covers what all connections have written: else there is but one.
            true => self.simple(Command::FLUSH, CommandFlags::EMPTY, 0..0).await,
            false => Ok(()),
        }
    }

    async fn discard(&self, _: &mut Next<'_>, request: &DiscardRequest<'_>) -> Done {
        self.about_to_write(&request.range())?;
        if !self.terms().can(TransmissionFlags::SEND_TRIM) {
            return Ok(());
        }
        let (fua, flush_after) = self.fua(request.flags());
        for piece in Self::pieces(request.range(), self.terms().effect_bytes_max()) {
            self.simple(Command::TRIM, fua, piece).await?;
        }
        if flush_after { self.flush_now().await } else { Ok(()) }
    }

    async fn cache(&self, _: &mut Next<'_>, request: &CacheRequest<'_>) -> Done {
        self.inside(&request.range(), OpError::INVALID)?;
        if !self.terms().can(TransmissionFlags::SEND_CACHE) {
            return Ok(());
        }
        // A server may hold it to the limit of reads.
        for piece in Self::pieces(request.range(), self.terms().transfer_bytes_max()) {
            self.simple(Command::CACHE, CommandFlags::EMPTY, piece).await?;
        }
        Ok(())
    }

    async fn block_status(&self, _: &mut Next<'_>, request: &BlockStatusRequest<'_>) -> Done {
        let range = request.range();
        self.inside(&range, OpError::INVALID)?;
        if range.is_empty() {
            return Ok(());
        }
        let mut answer = BlockStatus {
            flags: status::DATA | status::MAPPED,
            depth: 1,
            length: request.length(),
            map: range.start,
            reserved: 0,
        };
        if self.terms().context.is_some() {
            let end = range.end.min(range.start.saturating_add(self.terms().effect_bytes_max()));
            let asked = range.start..end;
            let flags = CommandFlags::REQ_ONE;
            match self.call(self.link(), Command::BLOCK_STATUS, flags, asked, None).await? {
                Reply::Status(extent) => self.extent(extent, &mut answer),
                _ => return Err(OpError::IO),
            }
        }
        request.answer(answer);
        Ok(())
    }

    /// What a server says, made whole blocks. A status of a part of a block is that of no block: then it is data.
    ///
    /// Source: QEMU block/nbd.c, `nbd_parse_blockstatus_payload` and `nbd_client_co_block_status`; there, too, a depth
    /// above 2 counts as 2.
    fn extent(&self, extent: driveline_wire::Extent, answer: &mut BlockStatus) {
        let alignment = u64::from(self.terms().alignment());
        let status = match &*self.target.wanted.context {
            "qemu:allocation-depth" => extent.status.min(2),
            _ => extent.status,
        };
        // The server may know of more than was asked for.
        let whole = extent.length / alignment * alignment;
        if whole == 0 {
            answer.length = answer.length.min(alignment);
            return;
        }
        answer.length = answer.length.min(whole);
        answer.flags = status::MAPPED;
        if status & AllocationFlags::HOLE.0 == 0 {
            answer.flags |= status::DATA;
        }
        if status & AllocationFlags::ZERO.0 != 0 {
            answer.flags |= status::ZERO;
        }
    }
}

static OPERATIONS: OpTable<Client> = OpTable::new()
    .read(Client::read)
    .write(Client::write)
    .flush(Client::flush)
    .discard(Client::discard)
    .write_zeroes(Client::write_zeroes)
    .block_status(Client::block_status)
    .cache(Client::cache);

/// An open node.
pub(super) struct NbdNode(pub(super) Arc<Body<Client>>);

impl OpenNode for NbdNode {
    fn instance(&self) -> Instance {
        Instance::new(self.0.clone(), &OPERATIONS)
    }

    fn info(&self, _: &[Info]) -> Info {
        let client = &self.0.driver;
        client.terms().info(client.read_only.load(Relaxed))
    }

    fn yank(&self) -> Result<()> {
        let client = &self.0.driver;
        tracing::warn!(target: "driveline::nbd", server = %client.target.address, "the connections are cut");
        client.links.iter().for_each(|link| link.cut());
        Ok(())
    }

    fn awaited(&self) -> Option<u64> {
        let counts = self.0.driver.links.iter().filter_map(|link| link.awaited());
        counts.reduce(u64::wrapping_add)
    }

    fn uri(&self) -> Option<String> {
        let target = &self.0.driver.target;
        Some(target.address.uri(&target.wanted.export))
    }

    fn details(&self) -> serde_json::Value {
        let client = &self.0.driver;
        let (terms, wanted) = (client.terms(), &client.target.wanted);
        let connected = client.links.iter().filter(|link| link.phase() == Phase::Connected).count();
        let state = match client.links[client.first].phase() {
            Phase::Connected => "connected",
            Phase::Waiting => "reconnecting: requests wait",
            Phase::Failing => "reconnecting: requests fail",
            Phase::Broken => "given up: the server broke the protocol",
            Phase::Idle | Phase::Starting | Phase::Closed => "closed",
        };
        serde_json::json!({
            "filename": client.target.address.uri(&wanted.export),
            "export": wanted.export,
            "tls": client.target.tls.is_some(),
            "state": state,
            "connections": connected,
            "structured-replies": terms.structured,
            "extended-headers": terms.headers == driveline_wire::Headers::Extended,
            "block-status": if terms.context.is_some() { wanted.context.as_str() } else { "none" },
        })
    }

    fn resize<'a>(&'a self, _: &'a [OpenChild], size_bytes: u64) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            match size_bytes == self.0.driver.terms().size_bytes {
                true => Ok(()),
                false => Err(Error::new(Kind::NotSupported, "Cannot resize NBD nodes")),
            }
        })
    }

    fn set_read_only<'a>(&'a self, _: &'a [OpenChild], read_only: bool) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let client = &self.0.driver;
            if !read_only && client.terms().can(TransmissionFlags::READ_ONLY) {
                let text = "Can't reopen read-only NBD mount as read/write";
                return Err(Error::new(Kind::NotPermitted, text));
            }
            if read_only && !client.read_only.load(Relaxed) {
                // What was written belongs to the time before.
                client.flush_now().await?;
            }
            client.read_only.store(read_only, Relaxed);
            Ok(())
        })
    }

    fn close<'a>(&'a self, _: &'a [OpenChild]) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            self.0.driver.close().await;
            Ok(())
        })
    }
}

//! Stream: data moves up into the image on top, until nothing below is needed (or nothing above a base).
//!
//! ```text
//!   drive ─▶ holder ─▶ top ─▶ mid ─▶ base          drive ─▶ top ─▶ base
//!                       ▲──────┘                   (without a base: drive ─▶ top)
//! ```
//!
//! It writes into `top` what a reader of `top` saw there before, so its writes are UNCHANGED: bitmaps of `top`
//! and above do not want them, however many filters lie between. A range is locked while it is copied, so that a
//! guest's write is never overwritten with what was there before it.

use crate::{
    chain::{Chain, ReadOnly, by_file, file_and_format},
    copy::{self, Buffers, Next, PIECE_BYTES_MAX, PieceError, Source},
    holder::UsedHolder,
    job::{Common, Job, JobKind, Stopped},
    manager::{Jobs, Work},
    state::OnError,
};
use driveline_graph::{BoxFuture, Error, Kind, Permissions, Result, Root, RootOptions};
use driveline_op::{Ask, Buffer, flag, op, status};
use parking_lot::Mutex;
use std::{ops::Range, sync::Arc};

/// How far a question about extents looks ahead.
const LOOK_AHEAD: u64 = 1 << 30;

/// Where a stream ends: what stays below.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Base {
    /// A node by name.
    Node(String),
    /// A node by the name of its file.
    File(String),
    /// The node above the base: the last one whose data moves.
    Bottom(String),
}

/// What a stream is started with. The fields are QEMU's `block-stream`.
#[derive(Clone, Debug, Default)]
pub struct StreamArgs {
    /// Its id; without one, the device's name.
    pub job_id: Option<String>,
    /// The drive or node to stream into.
    pub device: String,
    /// What stays below; without it, nothing does.
    pub base: Option<Base>,
    /// What `top`'s header says of its backing afterwards; without it, the base's file.
    pub backing_file: Option<String>,
    /// Bytes per second; 0: no limit.
    pub speed: u64,
    /// What becomes of errors.
    pub on_error: OnError,
    /// The name of the holder, if one is needed.
    pub filter_node_name: Option<String>,
    /// Its user finalizes it.
    pub manual_finalize: bool,
    /// Its user dismisses it.
    pub manual_dismiss: bool,
}

struct Stream {
    jobs: Jobs,
    chain: Chain,
    /// What the header of `top` will say of its backing.
    header: Option<(String, String)>,
    root: Mutex<Option<Root>>,
    holder: Option<UsedHolder>,
    /// `top` was made writable for the job.
    was_read_only: bool,
}

impl Jobs {
    /// Starts a stream. When this returns its holder is in place, and the job is at work.
    pub async fn stream(&self, args: StreamArgs) -> Result<String> {
        let graph = &self.0.graph;
        let top = graph.chain(&args.device)?[0].name().to_owned();
        let base = match &args.base {
            None => None,
            Some(Base::Node(node)) => Some(node.clone()),
            Some(Base::File(file)) => Some(by_file(graph, &args.device, file)?),
            Some(Base::Bottom(bottom)) => {
                let below = graph.chain(bottom)?;
                below.get(1).map(|node| node.name().to_owned())
            }
        };
        let chain = Chain::find(graph, &top, base.as_deref())?;
        let header = match (&chain.base, &args.backing_file) {
            (None, Some(_)) => {
                return Err(Error::new(
                    Kind::Invalid,
                    "backing file specified, but streaming the entire chain",
                ));
            }
            (None, None) => None,
            (Some(base), Some(file)) => Some((file.clone(), file_and_format(graph, base)?.1)),
            (Some(base), None) => Some(file_and_format(graph, base)?),
        };
        let common = Common {
            id: args.job_id.clone().unwrap_or_else(|| args.device.clone()),
            kind: JobKind::Stream,
            device: args.device.clone(),
            speed: args.speed,
            on_error: args.on_error,
            auto_finalize: !args.manual_finalize,
            auto_dismiss: !args.manual_dismiss,
        };
        let mut claims = chain.layers.clone();
        claims.extend(chain.base.clone());
        let job = self.reserve(common, &claims)?;
        let id = job.common.id.clone();
        match self.begin_stream(&job, chain, header, &args).await {
            Ok(work) => self.start(job, work),
            Err(error) => {
                self.unreserve(&job);
                return Err(error);
            }
        }
        Ok(id)
    }

    async fn begin_stream(
        &self,
        job: &Arc<Job>,
        chain: Chain,
        header: Option<(String, String)>,
        args: &StreamArgs,
    ) -> Result<Stream> {
        let graph = &self.0.graph;
        let was_read_only = graph.view_node(chain.top())?.read_only;
        let mut holders = self.0.holders.lock().await;
        let mut change = graph.change().await;
        let drive = graph.drive_of(chain.top());
        let holder = match &drive {
            Some(drive) => holders.park(graph, &mut change, drive, args.filter_node_name.as_deref()).await?,
            None => None,
        };
        let made = async {
            if was_read_only {
                change.set_read_only(chain.top(), false)?;
            }
            let options = RootOptions {
                user: format!("job '{}'", job.common.id),
                needs: Permissions::CONSISTENT_READ.or(Permissions::WRITE_UNCHANGED),
                shares: Permissions::ALL.without(Permissions::RESIZE),
                locks: true,
                overrules: Vec::new(),
            };
            let root = change.attach_to_node(chain.top(), &options)?;
            change.commit().await.map(|()| root)
        };
        let root = made.await;
        match (&root, &holder) {
            (Ok(_), Some(used)) => holders.parked(used),
            (Err(_), Some(used)) => holders.not_parked(used),
            _ => {}
        }
        drop(holders);
        let root = Mutex::new(Some(root?));
        Ok(Stream { jobs: self.clone(), chain, header, root, holder, was_read_only })
    }
}

impl Work for Stream {
    fn run<'a>(&'a self, job: &'a Arc<Job>) -> BoxFuture<'a, Result<(), Stopped>> {
        Box::pin(async move {
            let root = self.root.lock().clone().expect("it has its root until it is over");
            let size = root.info().size_bytes;
            job.set_total(size);
            let pull = Pull { chain: &self.chain, root, cursor: Mutex::default(), end: size };
            let ignored = copy::run(job, &self.jobs.0.runtime, &pull, &Buffers::default()).await?;
            match ignored {
                // What could not be copied is still read from below: the chain must stay.
                Some(error) => Err(Stopped::Failed(error.into())),
                None => Ok(()),
            }
        })
    }

    fn finalize<'a>(&'a self, _: &'a Arc<Job>) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move { self.end(true, ReadOnly::AsBefore).await })
    }

    fn abort<'a>(&'a self, job: &'a Arc<Job>) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            let Err(error) = self.end(false, ReadOnly::AsBefore).await else { return };
            tracing::error!(job = job.common.id, "cleaning up after a stream: {error}");
            // An image that cannot be made read-only again, because its disk fails, keeps no bitmap from home.
            if let Err(error) = self.end(false, ReadOnly::Leave).await {
                tracing::error!(job = job.common.id, "cleaning up after a stream: {error}");
            }
        })
    }
}

impl Stream {
    /// Ends in one change: the new backing (if it was a success), bitmaps home, holder gone, root gone.
    async fn end(&self, success: bool, read_only: ReadOnly) -> Result<()> {
        let graph = &self.jobs.0.graph;
        let mut holders = self.jobs.0.holders.lock().await;
        let mut change = graph.change().await;
        let root = self.root.lock().clone();
        if success {
            // What is on its way in the image on top must not be lost when the layers below are gone.
            if let Some(root) = &root {
                root.flush().await?;
            }
            let header = self.header.as_ref().map(|(file, format)| (file.as_str(), format.as_str()));
            change.set_backing(self.chain.top(), self.chain.below.as_deref(), header)?;
        }
        if let Some(used) = &self.holder {
            holders.bring_home(graph, &mut change, used)?;
        }
        if let Some(root) = &root {
            change.detach_root(root);
        }
        if self.was_read_only && read_only == ReadOnly::AsBefore {
            change.set_read_only(self.chain.top(), true)?;
        }
        change.commit().await?;
        if let Some(used) = &self.holder {
            holders.leave(used);
        }
        *self.root.lock() = None;
        Ok(())
    }
}

/// What a stream copies: what is in the layers below the top one.
struct Pull<'a> {
    chain: &'a Chain,
    root: Root,
    cursor: Mutex<Cursor>,
    end: u64,
}

/// How far a stream has come.
#[derive(Clone, Copy, Default)]
struct Cursor {
    at: u64,
    /// From `at` to here all is to be copied, as far as was known when it was asked; whoever copies looks again.
    wanted_until: u64,
}

impl Pull<'_> {
    /// Does an extent have to be written to `top`? And if so, as zeroes?
    fn wanted(&self, found: &driveline_op::BlockStatus) -> Option<bool> {
        if found.depth < 2 || !self.chain.holds(found.depth) {
            return None;
        }
        let zero = found.flags & status::ZERO != 0;
        // Zeroes hide what a base has below them; without a base nothing is there to hide.
        if zero && self.chain.base.is_none() { None } else { Some(zero) }
    }
}

impl Source for Pull<'_> {
    fn next(&self) -> BoxFuture<'_, Result<Next, PieceError>> {
        Box::pin(async move {
            let Cursor { at, mut wanted_until } = *self.cursor.lock();
            if at >= self.end {
                return Ok(Next::Nothing);
            }
            if at >= wanted_until {
                let range = at..self.end.min(at + LOOK_AHEAD);
                let ask = Ask { op: op::BLOCK_STATUS, offset: at, length: range.end - at, ..Ask::default() };
                let answer = self.root.submit(ask, Buffer::default()).await;
                answer.result.map_err(PieceError::reading)?;
                let length = answer.status.length;
                if self.wanted(&answer.status).is_none() {
                    self.cursor.lock().at = at + length;
                    return Ok(Next::Skip(length));
                }
                wanted_until = at + length;
            }
            // Pieces end on round offsets, so that they are whole clusters of most images.
            let round = (at / PIECE_BYTES_MAX + 1) * PIECE_BYTES_MAX;
            let end = wanted_until.min(round);
            *self.cursor.lock() = Cursor { at: end, wanted_until };
            Ok(Next::Piece(at..end))
        })
    }

    fn copy<'a>(&'a self, piece: Range<u64>, buffers: &'a Buffers) -> BoxFuture<'a, Result<(), PieceError>> {
        Box::pin(async move {
            let unit = self.root.enter().await;
            let _lock = unit.lock(piece.clone()).await;
            let mut at = piece.start;
            while at < piece.end {
                let ask = Ask { op: op::BLOCK_STATUS, offset: at, length: piece.end - at, ..Ask::default() };
                let answer = unit.submit(ask, Buffer::default()).await;
                answer.result.map_err(PieceError::reading)?;
                let end = at + answer.status.length;
                match self.wanted(&answer.status) {
                    None => {}
                    Some(true) => {
                        let flags = flag::UNCHANGED | flag::MAY_UNMAP;
                        let ask = Ask {
                            op: op::WRITE_ZEROES,
                            flags,
                            offset: at,
                            length: end - at,
                            ..Ask::default()
                        };
                        unit.submit(ask, Buffer::default()).await.result.map_err(PieceError::writing)?;
                    }
                    Some(false) => {
                        let ask = Ask { op: op::READ, offset: at, ..Ask::default() };
                        let read = unit.submit(ask, buffers.take(end - at)).await;
                        if let Err(error) = read.result {
                            buffers.give(read.buffer);
                            return Err(PieceError::reading(error));
                        }
                        let ask = Ask { op: op::WRITE, flags: flag::UNCHANGED, offset: at, ..Ask::default() };
                        let written = unit.submit(ask, read.buffer).await;
                        buffers.give(written.buffer);
                        written.result.map_err(PieceError::writing)?;
                    }
                }
                at = end;
            }
            Ok(())
        })
    }

    fn retries(&self) -> bool {
        false
    }
}

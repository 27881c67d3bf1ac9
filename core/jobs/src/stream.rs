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
    chain::{Chain, by_file, file_and_format},
    copy::{self, Buffers, Next, PIECE_BYTES_MAX, PieceError, Source},
    group::{End, Ending, Work},
    holder::UsedHolder,
    job::{Common, Job, JobKind, Stopped},
    manager::Jobs,
    record::{JobArgs, OnRestart, Phase},
    start::Start,
    state::OnError,
};
use driveline_graph::{BoxFuture, Error, Kind, Permissions, Result, Root, RootOptions};
use driveline_op::{Ask, Buffer, flag, op, status};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::{ops::Range, sync::Arc};

/// How far a question about extents looks ahead.
const LOOK_AHEAD: u64 = 1 << 30;

/// Where a stream ends: what stays below.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Base {
    /// A node by name.
    Node(String),
    /// A node by the name of its file.
    File(String),
    /// The node above the base: the last one whose data moves.
    Bottom(String),
}

/// What a stream is started with. The fields are QEMU's `block-stream`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
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
    /// What becomes of it if the program is killed and started again; without it, what the drive says.
    pub on_restart: Option<OnRestart>,
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
        let mut start = self.begin().await;
        let staged = start.stream(args).await;
        start.make_one(staged).await
    }
}

impl Start {
    /// Stages a stream. Returns the id that it will have.
    pub async fn stream(&mut self, args: StreamArgs) -> Result<String> {
        let layout = self.layout();
        let top = layout.chain(&args.device)?[0].name().to_owned();
        let base = match &args.base {
            None => None,
            Some(Base::Node(node)) => Some(node.clone()),
            Some(Base::File(file)) => Some(by_file(&layout, &args.device, file)?),
            Some(Base::Bottom(bottom)) => {
                let below = layout.chain(bottom)?;
                if !layout.chain(&args.device)?.iter().any(|node| node.name() == below[0].name()) {
                    let text =
                        format_args!("Node '{bottom}' is not in a chain starting from '{}'", args.device);
                    return Err(Error::new(Kind::Invalid, text));
                }
                below.get(1).map(|node| node.name().to_owned())
            }
        };
        let chain = Chain::find(&layout, &top, base.as_deref())?;
        let header = match (&chain.base, &args.backing_file) {
            (None, Some(_)) => {
                return Err(Error::new(
                    Kind::Invalid,
                    "backing file specified, but streaming the entire chain",
                ));
            }
            (None, None) => None,
            (Some(base), Some(file)) => Some((file.clone(), file_and_format(&layout, base)?.1)),
            (Some(base), None) => Some(file_and_format(&layout, base)?),
        };
        let common = Common {
            id: args.job_id.clone().unwrap_or_else(|| args.device.clone()),
            kind: JobKind::Stream,
            device: args.device.clone(),
            speed: args.speed,
            on_source_error: args.on_error,
            on_target_error: args.on_error,
            auto_finalize: !args.manual_finalize,
            auto_dismiss: !args.manual_dismiss,
        };
        let mut claims = chain.layers.clone();
        claims.extend(chain.base.clone());
        let job = self.reserve(common, &claims)?;
        self.write_down(
            &job,
            args.on_restart,
            JobArgs::Stream(args.clone()),
            (chain.top(), chain.base.as_deref()),
        )?;
        let was_read_only = layout.view_node(chain.top())?.read_only;
        let holder = self.park(chain.top(), args.filter_node_name.as_deref()).await?;
        let change = self.change();
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
        let root = Mutex::new(Some(change.attach_to_node(chain.top(), &options)?));
        let jobs = self.jobs.clone();
        Ok(self.stage(Stream { jobs, chain, header, root, holder, was_read_only }))
    }
}

impl Work for Stream {
    fn run<'a>(&'a self, job: &'a Arc<Job>) -> BoxFuture<'a, Result<(), Stopped>> {
        Box::pin(async move {
            let root = self.root.lock().clone().expect("it has its root until it is over");
            let size = root.info().size_bytes;
            job.set_total(size);
            if let Some(kept) = job.kept.get() {
                // The images say how far it has come.
                kept.warn(kept.set_phase(Phase::Working));
            }
            let (cursor, buffers) = Default::default();
            let pull = Pull { chain: self.chain.clone(), root, buffers, cursor, end: size };
            let ignored = copy::run(job, &self.jobs.0.runtime, Arc::new(pull)).await?;
            match ignored {
                // What could not be copied is still read from below: the chain must stay.
                Some(error) => Err(Stopped::Failed(error.into())),
                None => Ok(()),
            }
        })
    }

    /// What is on its way in the image on top must not be lost when the layers below are gone.
    fn prepare<'a>(&'a self, job: &'a Arc<Job>) -> BoxFuture<'a, Result<()>> {
        let root = self.root.lock().clone();
        Box::pin(async move {
            match root {
                Some(root) => copy::flush_or_outlast(job, &self.jobs.0.runtime, &root).await,
                None => Ok(()),
            }
        })
    }

    /// The new backing (if it was a success), bitmaps home, holder gone, root gone.
    fn end<'a>(&'a self, _: &'a Arc<Job>, end: End, into: &'a mut Ending) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let change = &mut into.change;
            if end.is_success() {
                let header = self.header.as_ref().map(|(file, format)| (file.as_str(), format.as_str()));
                let below = self.chain.below(&change.layout())?;
                change.set_backing(self.chain.top(), below.as_deref(), header)?;
            }
            if let Some(used) = &self.holder {
                into.holders.leave(change, used)?;
            }
            if let Some(root) = &*self.root.lock() {
                change.detach_root(root);
            }
            if self.was_read_only && end.restores_read_only() {
                change.set_read_only(self.chain.top(), true)?;
            }
            Ok(())
        })
    }

    fn own_nodes(&self) -> Vec<Arc<str>> {
        self.holder.iter().map(|holder| holder.node().clone()).collect()
    }

    fn ended(&self, _: End) {
        *self.root.lock() = None;
    }
}

/// What a stream copies: what is in the layers below the top one.
struct Pull {
    chain: Chain,
    root: Root,
    buffers: Buffers,
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

impl Pull {
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

impl Source for Pull {
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

    fn copy(self: Arc<Self>, piece: Range<u64>) -> BoxFuture<'static, Result<(), PieceError>> {
        Box::pin(async move {
            let buffers = &self.buffers;
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

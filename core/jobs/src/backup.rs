//! Backup: data as it was at one moment is put away, while the guest writes on.
//!
//! ```text
//!   drive ─▶ holder? ─▶ limit ─▶ active        drive ─▶ copy-before-write ─▶ limit ─▶ active
//!                                                              └─▶ target         └ daily, frozen
//! ```
//!
//! The filter goes in, and the bitmap is frozen, in one change: that is the moment. From then on a write of the guest
//! first has copied what it overwrites, and the job copies the rest by orders to the point in time of the filter. The job writes
//! nothing above the target, so it marks no bitmap of the drive; the guest's writes mark as ever.
//!
//! What happens to the bitmap at the end is QEMU's rule (`bitmap-mode`). Where a failed backup leaves something to be copied,
//! `always` keeps exactly that dirty: QEMU keeps whole clusters. If the target could not be flushed it keeps all.
//!
//! Source: QEMU qapi/block-core.json, `BackupCommon`, and its answers, whose texts the errors have.

mod args;

pub use args::{BackupArgs, BackupSync, Perf};

use crate::{
    bitmap_mode::BitmapMode,
    copy::{self, Next, PieceError, Source},
    group::{End, Ending, Work},
    job::{Common, Job, JobKind, Stopped},
    journal::Kept,
    manager::Jobs,
    push::saving_meanwhile,
    record::{JobArgs, Phase},
    safe::{Pace, holds_back},
    start::Start,
    state::ErrorAction,
};
use driveline_bitmap::{BitmapName, Bits, Frozen};
use driveline_drivers::copy_before_write::{
    Compress, CopyBeforeWrite, CopyingFilter, MakeSafe, Safe, Settings, Side,
};
use driveline_graph::{
    BoxFuture, Error, Graph, Internal, Kind, Options, Permissions, Result, Root, RootOptions,
};
use driveline_op::{Ask, Buffer, op, status};
use futures::future::select;
use parking_lot::Mutex;
use std::{ops::Range, pin::pin, sync::Arc, time::Duration};

/// The longest piece of data, unless a cluster is longer.
const PIECE_BYTES: u64 = 256 << 10;
/// The longest piece of zeroes: without a speed limit, and with one.
const ZEROES_BYTES: (u64, u64) = (1 << 30, 1 << 20);
/// How often a backup that only waits for the guest's writes tells its progress.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// The bitmaps of its journal: clusters that are copied or left out, and those that are left out.
pub(crate) const COPIED: &str = "#copied";
pub(crate) const LEFT_OUT: &str = "#left-out";

struct Backup {
    jobs: Jobs,
    args: BackupArgs,
    filter: Arc<str>,
    state: Arc<CopyBeforeWrite>,
    piece_bytes: u64,
    root: Mutex<Option<Root>>,
    frozen: Arc<Mutex<Option<Frozen>>>,
    /// It goes on after a restart, and what guests wrote since the bitmap was frozen is not known apart from the rest of it.
    keeps_all: bool,
    pace: Pace,
    fault: Fault,
}

/// The error of a flush that saved the progress, until the policy has decided about it.
type Fault = Arc<Mutex<Option<driveline_op::Error>>>;

impl Jobs {
    /// Starts a backup. When this returns the moment was, and the job is at work.
    pub async fn backup(&self, args: BackupArgs) -> Result<String> {
        let mut start = self.begin().await;
        let staged = start.backup(args).await;
        start.make_one(staged).await
    }
}

impl Start {
    /// Stages a backup: its moment is when the change is made. Returns the id that it will have.
    pub async fn backup(&mut self, args: BackupArgs) -> Result<String> {
        args.check()?;
        let layout = self.layout();
        let (source, target) = (layout.node_or_drive(&args.device)?, layout.node_or_drive(&args.target)?);
        if source.id() == target.id() {
            return Err(Error::new(Kind::Invalid, "Source and target cannot be the same"));
        }
        if layout.size_bytes(source.name())? != layout.size_bytes(target.name())? {
            return Err(Error::new(Kind::Invalid, "Source and target image have different sizes"));
        }
        if args.compress && target.driver_name() != "qcow2" {
            let text = format_args!("Compression is not supported for this drive {}", target.name());
            return Err(Error::new(Kind::NotSupported, text));
        }
        if let Some(name) = args.filter_node_name.as_deref().filter(|name| layout.node_or_drive(name).is_ok())
        {
            let text = format_args!("Could not create node: Duplicate nodes with node-name='{name}'");
            return Err(Error::new(Kind::Exists, text));
        }
        let common = Common {
            id: args.job_id.clone().unwrap_or_else(|| args.device.clone()),
            kind: JobKind::Backup,
            device: args.device.clone(),
            speed: args.speed,
            on_source_error: args.on_source_error,
            on_target_error: args.on_target_error,
            auto_finalize: !args.manual_finalize,
            auto_dismiss: !args.manual_dismiss,
        };
        let job = self.reserve(common, &[target.name().into()])?;
        let written = JobArgs::Backup(args.clone());
        let source_image = layout.chain(source.name())?.remove(0);
        let places = (source_image.name(), Some(target.name()));
        let kept = self.write_down(&job, args.on_restart, written, places)?;
        let flushes = holds_back(&layout, target.name());
        let jobs = self.jobs.clone();
        let settings = Settings {
            safe: kept.clone().filter(|kept| kept.resumes()).map(|kept| make_safe(kept, flushes)),
            cluster_bytes_min: args.perf.cluster_bytes_min,
            compress: args.compress.then(|| compressor(jobs.0.graph.clone(), target.name())),
            discard_source: args.discard_source,
            tells_failures: true,
            ..Settings::default()
        };
        let driver = CopyingFilter::new(settings).map_err(could_not_create)?;
        let internal = Internal {
            driver: driver.clone(),
            name: args.filter_node_name.clone(),
            options: Options::new(),
            children: vec![("target".into(), target.name().into())],
        };
        let change = self.change();
        let filter = change.insert_internal(internal, &args.device).await.map_err(could_not_create)?;
        let filter: Arc<str> = filter.name().into();
        // It goes at the end: nobody else may count on its place.
        jobs.claim(&job, filter.clone());
        let state = driver.opened().ok_or_else(|| Error::new(Kind::Invalid, "the filter was not opened"))?;
        let piece_bytes = args.piece_bytes(state.cluster_bytes())?;
        let writes = if args.discard_source { Permissions::WRITE } else { Permissions::NONE };
        let options = RootOptions {
            user: format!("job '{}'", job.common.id),
            needs: Permissions::CONSISTENT_READ.or(writes),
            shares: Permissions::ALL.without(Permissions::RESIZE),
            locks: false,
            overrules: Vec::new(),
        };
        let root = Mutex::new(Some(change.attach_to_past(&filter, &options)?));
        let frozen = Arc::default();
        let restarted = kept.filter(|kept| kept.is_restart);
        let since = restarted.as_ref().and_then(|kept| kept.since.lock().take());
        let keeps_all = restarted.is_some() && since.is_none();
        // One that was not persistent ended with the program.
        let is_there = |name: &str| {
            let places = layout.bitmap_places(&args.device).unwrap_or_default();
            restarted.is_none() || places.iter().any(|(_, bitmap)| bitmap.name().as_str() == name)
        };
        if let Some(bitmap) = args.bitmap.as_deref().filter(|name| is_there(name)) {
            let by_bitmap = args.sync.is_by_bitmap() && restarted.is_none();
            let state = state.clone();
            change.freeze_bitmap(&args.device, bitmap, &options.user, &frozen, move |frozen| {
                // It was frozen before: what was written since is its successor's again.
                let again = since.iter().flat_map(Bits::iter_dirty);
                again.for_each(|range| frozen.bitmap().mark_unconditionally(range));
                if by_bitmap { state.restrict(frozen.bits()) } else { Ok(()) }
            })?;
        }
        let pace = Pace::default();
        let fault = Fault::default();
        Ok(self.stage(Backup {
            jobs,
            args,
            filter,
            state,
            piece_bytes,
            root,
            frozen,
            keeps_all,
            pace,
            fault,
        }))
    }
}

/// What keeps how far it has come: see [`Safe`].
fn make_safe(kept: Arc<Kept>, flushes: bool) -> MakeSafe {
    Arc::new(move |cluster, size| {
        let bitmap = |name: &str| kept.bitmap(BitmapName::new(name)?, cluster, size, true);
        Ok(Safe::new(bitmap(COPIED)?, bitmap(LEFT_OUT)?, flushes))
    })
}

fn could_not_create(error: Error) -> Error {
    Error::new(error.kind(), format_args!("Could not create node: {}", error.message()))
}

/// Writes compressed to a node by name: it stays the target while the filter has it.
fn compressor(graph: Graph, target: &str) -> Compress {
    let target: Arc<str> = target.into();
    Arc::new(move |offset, data: Buffer| {
        let (graph, target) = (graph.clone(), target.clone());
        Box::pin(async move { graph.write_compressed(&target, offset, &data).await.map(|()| data) })
    })
}

impl Work for Backup {
    fn run<'a>(&'a self, job: &'a Arc<Job>) -> BoxFuture<'a, Result<(), Stopped>> {
        Box::pin(async move {
            let root = self.root.lock().clone().expect("it has its root until it is over");
            let runtime = &self.jobs.0.runtime;
            let kept = job.kept.get();
            let is_found = kept.is_some_and(|kept| kept.phase() == Phase::Working);
            if self.args.sync == BackupSync::Top && !is_found {
                self.leave_out_unallocated(job, &root).await?;
            }
            if let Some(kept) = kept {
                kept.warn(kept.set_phase(Phase::Working));
            }
            job.set_total(self.state.wanted_bytes(0..self.state.size_bytes()));
            if self.args.sync == BackupSync::None {
                let mut told = 0;
                loop {
                    job.pause_point().await?;
                    let copied = self.state.copied().by_writes;
                    job.add_done(copied - told);
                    told = copied;
                    if self.pace.pause(runtime.now()).is_zero() {
                        self.save(&root).await;
                        copy::decide(job, self.take_fault())?;
                    }
                    select(pin!(job.user_acted()), runtime.sleep(LOOK_AGAIN)).await;
                }
            }
            let rest = Rest {
                job: job.clone(),
                state: self.state.clone(),
                fault: self.fault.clone(),
                root: root.clone(),
                piece_bytes: self.piece_bytes,
                in_flight: self.args.perf.in_flight(),
                cursor: Mutex::default(),
            };
            let copying = copy::run(job, runtime, Arc::new(rest));
            match kept.filter(|kept| kept.resumes()) {
                Some(_) => {
                    let pause = |now| self.pace.pause(now);
                    saving_meanwhile(copying, runtime, pause, || self.save(&root)).await?
                }
                None => copying.await?,
            };
            copy::decide(job, self.take_fault())
        })
    }

    /// What is said to be copied must not be lost to a power cut, or when the target is closed: nobody hears of that.
    fn prepare<'a>(&'a self, job: &'a Arc<Job>) -> BoxFuture<'a, Result<()>> {
        let root = self.root.lock().clone();
        Box::pin(async move {
            let Some(root) = root else { return Ok(()) };
            copy::flush_or_outlast(job, &self.jobs.0.runtime, &root).await?;
            if self.args.discard_source {
                self.save(&root).await;
                if let Some(error) = self.take_fault() {
                    job.outlast(PieceError::writing(error), &self.jobs.0.runtime).await?;
                }
            }
            Ok(())
        })
    }

    /// The filter goes, and so does the root. Bitmaps that somebody added above it meanwhile stay with the drive.
    fn end<'a>(&'a self, job: &'a Arc<Job>, end: End, into: &'a mut Ending) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let change = &mut into.change;
            let (kept, phase) = (job.kept.get().cloned(), Phase::at_end(end.is_success(), false));
            change.while_drained_first(&[&self.filter], move |_| {
                Box::pin(async move { kept.map_or(Ok(()), |kept| kept.end(phase)) })
            })?;
            if let Some(root) = &*self.root.lock() {
                change.detach_root(root);
            }
            let view = change.layout().view_node(&self.filter)?;
            for bitmap in &view.bitmaps {
                let below = view.children.iter().find(|child| child.name == "file");
                if let Some(below) = below {
                    change.move_bitmap(&self.filter, bitmap.name().as_str(), &below.node)?;
                }
            }
            change.remove_emptied_filter(&self.filter)
        })
    }

    fn own_nodes(&self) -> Vec<Arc<str>> {
        vec![self.filter.clone()]
    }

    fn ended(&self, end: End) {
        *self.root.lock() = None;
        let Some(frozen) = self.frozen.lock().take() else { return };
        match (self.args.mode(), end.is_success()) {
            _ if self.keeps_all => frozen.reclaim(),
            // Nobody knows what of it the target has, whatever its policy made of that.
            _ if self.state.has_unflushed() => frozen.reclaim(),
            (Some(BitmapMode::Always), false) => {
                self.keep_left(&frozen);
                frozen.abdicate();
            }
            (Some(BitmapMode::Always | BitmapMode::OnSuccess), true) => frozen.abdicate(),
            _ => frozen.reclaim(),
        }
    }
}

impl Backup {
    /// Saves how far it has come. If the flush for it fails, more is copied after a restart; what becomes of the job by it its policy
    /// decides, since the target may not say it a second time. From then on nothing is safe, nor given up by the source.
    async fn save(&self, root: &Root) {
        if self.state.has_unflushed() {
            return;
        }
        let now = || self.jobs.0.runtime.now();
        if let Err(error) = self.pace.keep(now, self.state.save(|| root.flush())).await {
            self.fault.lock().get_or_insert(driveline_op::Error::new(error.errno_code(), error.message()));
            return;
        }
        // What is safe by now the source may give up: nothing is left to copy there.
        let mut at = 0;
        while let Some(run) = self.state.next_to_give_up(at..self.state.size_bytes()) {
            at = run.end;
            let length = run.end - run.start;
            let ask = Ask { op: op::CACHE, offset: run.start, length, ..Ask::default() };
            let _hint = root.submit(ask, Buffer::default()).await;
        }
    }

    fn take_fault(&self) -> Option<driveline_op::Error> {
        self.fault.lock().take()
    }

    /// What was not copied stays dirty, into the bits that record by now.
    fn keep_left(&self, frozen: &Frozen) {
        let (bitmap, size) = (frozen.bitmap(), self.state.size_bytes().min(frozen.bitmap().length()));
        let mut at = 0;
        while let Some(run) = self.state.next_left(at..size) {
            at = run.end;
            if self.args.sync.is_by_bitmap() {
                let wanted = frozen.bits().extents(run).filter(|extent| extent.dirty);
                wanted.for_each(|extent| bitmap.mark_unconditionally(extent.range));
            } else {
                bitmap.mark_unconditionally(run);
            }
        }
    }

    /// What no layer but those below the top one has is not copied.
    async fn leave_out_unallocated(&self, job: &Arc<Job>, root: &Root) -> Result<(), Stopped> {
        let (size, cluster) = (self.state.size_bytes(), self.state.cluster_bytes());
        let here = Bits::new(driveline_bitmap::Granularity::new(cluster).map_err(Error::from)?, size);
        let mut at = 0;
        while at < size {
            job.pause_point().await?;
            // Before a restart some may have been left out already.
            let Some(run) = self.state.next_wanted(at..size) else { break };
            at = run.start;
            let length = (run.end - at).min(ZEROES_BYTES.0);
            let ask = Ask { op: op::BLOCK_STATUS, offset: at, length, ..Ask::default() };
            let answer = root.submit(ask, Buffer::default()).await;
            if let Err(error) = answer.result {
                match job.on_io_error(&error, "read") {
                    ErrorAction::Report => return Err(Stopped::Failed(error.into())),
                    ErrorAction::Ignore | ErrorAction::Stop => self.jobs.0.runtime.sleep(LOOK_AGAIN).await,
                }
                continue;
            }
            if answer.status.depth == 1 {
                here.mark(at..at + answer.status.length);
            }
            at += answer.status.length.max(1);
        }
        self.state.restrict(&here)?;
        Ok(())
    }
}

/// What is left to copy: what neither the job nor a write of the guest has had copied yet.
struct Rest {
    job: Arc<Job>,
    state: Arc<CopyBeforeWrite>,
    fault: Fault,
    root: Root,
    piece_bytes: u64,
    in_flight: usize,
    cursor: Mutex<Cursor>,
}

/// How far it has come.
#[derive(Clone, Copy, Default)]
struct Cursor {
    at: u64,
    /// From `at` to here it is data, as far as was known when it was asked.
    data_until: u64,
}

impl Rest {
    /// The first run that is left from `at` on. `Err`: before it so many bytes were copied by others.
    fn next_left(&self, at: u64) -> Result<Option<Range<u64>>, u64> {
        let end = self.state.size_bytes();
        let run = self.state.next_left(at..end);
        let until = run.as_ref().map_or(end, |run| run.start);
        match self.state.wanted_bytes(at..until) {
            0 => Ok(run),
            others => {
                self.cursor.lock().at = until;
                Err(others)
            }
        }
    }

    /// How far from its beginning a long run is one piece: as far as it is zeroes, or else a piece of data.
    async fn piece_end(&self, run: &Range<u64>, data_until: u64) -> Result<(u64, u64), PieceError> {
        // Pieces end on round offsets, so that they are whole clusters of most images.
        let round = run.end.min((run.start / self.piece_bytes + 1) * self.piece_bytes);
        if round == run.end || run.start < data_until {
            return Ok((round, data_until));
        }
        let longest = if self.job.speed() == 0 { ZEROES_BYTES.0 } else { ZEROES_BYTES.1 };
        let length = (run.end - run.start).min(longest.max(self.piece_bytes));
        let ask = Ask { op: op::BLOCK_STATUS, offset: run.start, length, ..Ask::default() };
        let answer = self.root.submit(ask, Buffer::default()).await;
        answer.result.map_err(PieceError::reading)?;
        let end = run.start + answer.status.length;
        if answer.status.flags & status::ZERO == 0 {
            return Ok((round, end));
        }
        let whole = if end >= run.end { run.end } else { end - end % self.state.cluster_bytes() };
        Ok((whole.max(round), data_until))
    }
}

impl Source for Rest {
    fn next(&self) -> BoxFuture<'_, Result<Next, PieceError>> {
        Box::pin(async move {
            let Cursor { at, data_until } = *self.cursor.lock();
            let run = match self.next_left(at) {
                Err(copied) => return Ok(Next::Skip(copied)),
                Ok(None) => return Ok(Next::Nothing),
                Ok(Some(run)) => run,
            };
            let (end, data_until) = self.piece_end(&run, data_until).await?;
            *self.cursor.lock() = Cursor { at: end, data_until };
            Ok(Next::Piece(run.start..end))
        })
    }

    fn copy(self: Arc<Self>, piece: Range<u64>) -> BoxFuture<'static, Result<(), PieceError>> {
        Box::pin(async move {
            let (offset, length) = (piece.start, piece.end - piece.start);
            let ask = Ask { op: op::CACHE, offset, length, ..Ask::default() };
            let Err(error) = self.root.submit(ask, Buffer::default()).await.result else { return Ok(()) };
            Err(match self.state.take_failure(offset) {
                Some(Side::Target) => PieceError::writing(error),
                Some(Side::Source) | None => PieceError::reading(error),
            })
        })
    }

    /// Flushing the point in time flushes what was copied of it.
    fn target(&self) -> Option<Root> {
        Some(self.root.clone())
    }

    fn take_fault(&self) -> Option<driveline_op::Error> {
        self.fault.lock().take()
    }

    fn retries(&self) -> bool {
        true
    }

    fn in_flight_max(&self) -> usize {
        self.in_flight
    }
}

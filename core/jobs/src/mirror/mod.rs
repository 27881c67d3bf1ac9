//! Mirror: a drive's data goes to another node and follows what guests write, until that takes the drive's place, or not.
//!
//! ```text
//!   drive ─▶ holder ─▶ mirror_top ─▶ source            drive ─▶ target        (completed)
//!                          └─▶ target                   drive ─▶ source        (cancelled; softly: target is a copy)
//! ```
//!
//! What is to be copied is in a bitmap of the job's own on the source, as with an active commit, and the copying is the
//! same ([`Push`]). The filter makes the difference in write-blocking mode, see `top.rs`; it also keeps the target busy.
//!
//! QEMU's mirror begins with everything, the top image or nothing. Here it can begin with what a bitmap says, too: the
//! target is then what it was when the bitmap was cleared, and little has to be copied. What becomes of the bitmap is said
//! as with a backup: it is clean afterwards ([`BitmapMode::OnSuccess`]), it says what is still missing in the target also
//! after a failure ([`BitmapMode::Always`]), or it is not touched ([`BitmapMode::Never`]).

mod top;

use crate::{
    bitmap_mode::BitmapMode,
    commit::{Own, has_found, own_bitmap, user},
    copy::{PIECE_BYTES_MAX, PieceError},
    group::{End, Ending, Work},
    holder::{HOLDER_DRIVER, UsedHolder},
    job::{Common, Job, JobKind, Stopped},
    journal::Kept,
    manager::Jobs,
    push::{Faults, How, Push, copy_rest},
    record::{JobArgs, OnRestart, Phase},
    safe::Copied,
    start::Start,
    state::{ErrorAction, OnError, Verb},
};
use driveline_bitmap::{Granularity, Operation, Use, View};
use driveline_graph::{
    BoxFuture, Error, Internal, Kind, Layout, Options, Permissions, Result, Root, RootOptions,
};
use driveline_op::{Ask, Buffer, flag, op, status};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};
use top::{Shared, TopDriver};

/// How far a question about extents looks ahead.
const LOOK_AHEAD: u64 = 1 << 30;
/// After an error that was ignored a question is asked again in a while.
const ASK_AGAIN: Duration = Duration::from_millis(50);
/// QEMU's limits of a granularity.
const GRANULARITY_RANGE: std::ops::RangeInclusive<u64> = 512..=64 << 20;

/// What is copied at first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MirrorSync {
    /// All of it.
    #[default]
    Full,
    /// What is allocated in the top image. The target should have the same backing.
    Top,
    /// Nothing: only what is written from now on.
    None,
    /// What the bitmap says.
    Bitmap,
}

/// When a guest's write is answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CopyMode {
    /// When the source has it; the target gets it later.
    #[default]
    Background,
    /// When both have it.
    WriteBlocking,
}

/// What a mirror is started with. The fields are QEMU's `blockdev-mirror`, and `bitmap` as in `blockdev-backup`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MirrorArgs {
    /// Its id; without one, the device's name.
    pub job_id: Option<String>,
    /// The drive or node whose data goes to the target.
    pub device: String,
    /// The node that it goes to. Nobody else may write to it.
    pub target: String,
    /// The node that the target takes the place of; without it, the source's.
    pub replaces: Option<String>,
    /// What is copied at first.
    pub sync: MirrorSync,
    /// What says what is copied at first.
    pub bitmap: Option<String>,
    /// What becomes of that.
    pub bitmap_mode: BitmapMode,
    /// Bytes per second; 0: no limit.
    pub speed: u64,
    /// How exactly it is kept what has to be copied, in bytes; without it, the target's cluster size within 4 to 64 KiB.
    pub granularity: Option<u64>,
    /// How many bytes may be in flight; 0: as many as are fast.
    pub buffer_bytes: u64,
    /// What becomes of errors of the source.
    pub on_source_error: OnError,
    /// What becomes of errors of the target.
    pub on_target_error: OnError,
    /// Zeroes stay zeroes, but the target keeps their space.
    pub keep_allocated: bool,
    /// The target reads as zeroes where nothing is written to it.
    pub target_is_zero: bool,
    /// A node that becomes the target's backing when it takes the source's place.
    pub target_backing: Option<String>,
    /// The name of the job's filter.
    pub filter_node_name: Option<String>,
    /// When a guest's write is answered.
    pub copy_mode: CopyMode,
    /// Its user finalizes it.
    pub manual_finalize: bool,
    /// Its user dismisses it.
    pub manual_dismiss: bool,
    /// What becomes of it if the program is killed and started again; without it, what the drive says.
    pub on_restart: Option<OnRestart>,
}

/// The filter of a running mirror.
pub(crate) struct MirrorTop {
    node: Arc<str>,
    shared: Arc<Shared>,
}

struct Mirror {
    jobs: Jobs,
    source: Arc<str>,
    target: Arc<str>,
    top: Arc<str>,
    replaces: Option<String>,
    sync: MirrorSync,
    bitmap: Mutex<Option<Use>>,
    bitmap_mode: BitmapMode,
    target_is_zero: bool,
    target_backing: Option<String>,
    how: How,
    shared: Arc<Shared>,
    faults: Arc<Faults>,
    own: Own,
    /// It is known what is left to copy.
    has_found: bool,
    roots: Mutex<Option<Roots>>,
    holder: Option<UsedHolder>,
}

#[derive(Clone)]
struct Roots {
    source: Root,
    target: Root,
    /// It keeps the filter in its place.
    top: Root,
}

impl Jobs {
    /// Starts a mirror. When this returns its filter is in place, and the job is at work.
    pub async fn mirror(&self, args: MirrorArgs) -> Result<String> {
        let mut start = self.begin().await;
        let staged = start.mirror(args).await;
        start.make_one(staged).await
    }

    /// Changes when guests' writes are answered, between two of them.
    ///
    /// Errors: [`Kind::NotFound`], [`Kind::NotSupported`] for a job that is no mirror, [`Kind::Invalid`] for one that is at its
    /// end.
    pub async fn set_copy_mode(&self, id: &str, mode: CopyMode) -> Result<()> {
        let job = self.find(id)?;
        job.check(Verb::Change)?;
        let Some(MirrorTop { node, shared }) = job.mirror.get() else {
            return Err(Error::new(Kind::NotSupported, "Job type does not support change"));
        };
        let mut change = self.0.graph.change().await;
        let (shared, blocking) = (shared.clone(), mode == CopyMode::WriteBlocking);
        // Nor may a piece be in flight: one that guests need not wait for is no match for a write that goes to the target.
        let source = change.layout().view_node(node)?.children[0].node.clone();
        change.visit(&source, |_, _| Box::pin(async { Ok(()) }))?;
        change.visit(node, move |_, _| {
            shared.blocking.store(blocking, Relaxed);
            Box::pin(async { Ok(()) })
        })?;
        change.commit().await?;
        if !blocking {
            job.set_synced(false);
        }
        job.note(|record| {
            if let JobArgs::Mirror(args) = &mut record.args {
                args.copy_mode = mode;
            }
        });
        Ok(())
    }
}

impl Start {
    /// Stages a mirror. Returns the id that it will have.
    pub async fn mirror(&mut self, args: MirrorArgs) -> Result<String> {
        let layout = self.layout();
        let source = find_source(&layout, &args.device)?;
        let target: Arc<str> = layout.node_or_drive(&args.target)?.name().into();
        if source == target {
            return Err(Error::new(Kind::Invalid, "Can't mirror node into itself"));
        }
        if layout.reaches(&source, &target) {
            let message = format_args!("'{target}' is below '{source}', and cannot be its mirror");
            return Err(Error::new(Kind::Invalid, message));
        }
        let size = layout.size_bytes(&source)?;
        if layout.size_bytes(&target)? != size {
            return Err(Error::new(Kind::Invalid, "Source and target image have different sizes"));
        }
        check_replaces(&layout, args.replaces.as_deref(), &source, size)?;
        let source_chain = layout.chain(&source)?;
        let sync = match args.sync {
            MirrorSync::Top if source_chain.len() == 1 => MirrorSync::Full,
            sync => sync,
        };
        let common = Common {
            id: args.job_id.clone().unwrap_or_else(|| args.device.clone()),
            kind: JobKind::Mirror,
            device: args.device.clone(),
            speed: args.speed,
            on_source_error: args.on_source_error,
            on_target_error: args.on_target_error,
            auto_finalize: !args.manual_finalize,
            auto_dismiss: !args.manual_dismiss,
        };
        let mut claims = vec![source.clone(), source_chain[0].name().into(), target.clone()];
        claims.push(layout.chain(&target)?[0].name().into());
        if sync == MirrorSync::Top {
            claims.push(source_chain[1].name().into());
        }
        claims.extend(args.replaces.as_deref().map(Into::into));
        claims.sort();
        claims.dedup();
        let job = self.reserve(common, &claims)?;
        let is_restart = self.restarting.is_some();
        let bitmap = find_bitmap(&layout, &args, &job, is_restart)?;
        let granularity = granularity(&layout, &args, sync, &target)?;
        let written = JobArgs::Mirror(MirrorArgs { granularity: Some(granularity), ..args.clone() });
        let kept =
            self.write_down(&job, args.on_restart, written, (source_chain[0].name(), Some(&target)))?;
        // If it is not known, everything is left.
        let is_unknown =
            |kept: &Kept| kept.is_restart && (kept.lost.is_some() || kept.phase() == Phase::Working);
        let has_found = has_found(&job) || kept.as_deref().is_some_and(is_unknown);
        let (dirty, own) = own_bitmap(&job, granularity, size, true)?;
        // It was killed before it had looked at a bitmap that ended with the program.
        let is_persistent = bitmap.as_ref().is_some_and(|used| used.bitmap().is_persistent());
        if is_restart && !has_found && args.bitmap.is_some() && !is_persistent {
            dirty.mark_unconditionally(0..size);
        }
        self.change().attach_bitmap(&source, dirty.clone())?;
        let copied = kept.as_ref().and_then(|_| Copied::new(&dirty, &layout, &source, &target));
        let shared = Shared::new(dirty, copied, args.copy_mode == CopyMode::WriteBlocking, &job);
        let top = Internal {
            driver: Arc::new(TopDriver::new(shared.clone())),
            name: args.filter_node_name.clone(),
            options: Options::new(),
            children: vec![("target".into(), target.to_string())],
        };
        let top: Arc<str> = self.change().insert_internal(top, &source).await?.name().into();
        // It goes at the end: no other job may be of it, as one would whose device is the drive.
        self.jobs.claim(&job, top.clone());
        let holder = self.park(&source, None).await?;
        let roots = self.mirror_roots(&job, &source, &target, &top)?;
        job.set_synced(false);
        let _ = job.mirror.set(MirrorTop { node: top.clone(), shared: shared.clone() });
        let how = How {
            zero_flags: if args.keep_allocated { 0 } else { flag::MAY_UNMAP },
            in_flight_bytes: args.buffer_bytes,
            ..How::default()
        };
        let work = Mirror {
            jobs: self.jobs.clone(),
            source,
            target,
            top,
            replaces: args.replaces,
            sync,
            bitmap: Mutex::new(bitmap),
            bitmap_mode: args.bitmap_mode,
            // It was, before the job wrote to it.
            target_is_zero: args.target_is_zero && kept.is_none_or(|kept| !kept.is_restart),
            target_backing: args.target_backing,
            how,
            shared,
            faults: Arc::default(),
            own,
            has_found,
            roots: Mutex::new(Some(roots)),
            holder,
        };
        Ok(self.stage(work))
    }

    fn mirror_roots(&mut self, job: &Job, source: &str, target: &str, top: &str) -> Result<Roots> {
        let shares = Permissions::ALL.without(Permissions::RESIZE);
        let user = format!("job '{}'", job.common.id);
        let reader = RootOptions {
            user: user.clone(),
            needs: Permissions::CONSISTENT_READ,
            shares,
            locks: true,
            overrules: Vec::new(),
        };
        let keeper = RootOptions { needs: Permissions::NONE, ..RootOptions::reader(user.clone()) };
        let writer = RootOptions {
            user,
            needs: Permissions::CONSISTENT_READ.or(Permissions::WRITE),
            shares: Permissions::CONSISTENT_READ.or(Permissions::WRITE_UNCHANGED),
            locks: false,
            overrules: vec![top.to_owned()],
        };
        let change = self.change();
        Ok(Roots {
            source: change.attach_to_node(source, &reader)?,
            target: change.attach_to_node(target, &writer)?,
            top: change.attach_to_node(top, &keeper)?,
        })
    }
}

/// The node that a mirror of a drive or node is of: a holder on top of it keeps the drive's bitmaps, and stays.
fn find_source(layout: &Layout, device: &str) -> Result<Arc<str>> {
    let mut view = layout.view_node(layout.node_or_drive(device)?.name())?;
    while view.node.driver_name() == HOLDER_DRIVER {
        view = layout.view_node(&view.children[0].node)?;
    }
    let name = view.node.name();
    let is_parent = |parent: &driveline_graph::NodeView| {
        parent.node.driver_name() != HOLDER_DRIVER && parent.children.iter().any(|child| *child.node == *name)
    };
    if layout.node(device).is_ok() && layout.nodes().iter().any(is_parent) {
        return Err(Error::new(Kind::Invalid, "Need a root block node"));
    }
    Ok(name.into())
}

fn check_replaces(layout: &Layout, replaces: Option<&str>, source: &str, size: u64) -> Result<()> {
    let Some(replaces) = replaces else { return Ok(()) };
    let missing =
        |_| Error::new(Kind::NotFound, format_args!("Failed to find node with node-name='{replaces}'"));
    layout.node(replaces).map_err(missing)?;
    if layout.size_bytes(replaces)? != size {
        let message = "cannot replace image with a mirror image of different size";
        return Err(Error::new(Kind::Invalid, message));
    }
    if !layout.reaches(source, replaces) {
        let message = format_args!("'{replaces}' is not below '{source}', so the target cannot replace it");
        return Err(Error::new(Kind::Invalid, message));
    }
    Ok(())
}

/// `is_restart`: what it said is in the job's own bitmap, and one that was not persistent ended with the program.
fn find_bitmap(layout: &Layout, args: &MirrorArgs, job: &Job, is_restart: bool) -> Result<Option<Use>> {
    let name = match (&args.bitmap, args.sync) {
        (None, MirrorSync::Bitmap) => {
            return Err(Error::new(Kind::Invalid, "must provide a valid bitmap name for 'bitmap' sync mode"));
        }
        (Some(_), MirrorSync::None | MirrorSync::Top | MirrorSync::Full) => {
            return Err(Error::new(
                Kind::Invalid,
                "a bitmap says what is copied with 'bitmap' sync mode only",
            ));
        }
        (None, _) => return Ok(None),
        (Some(name), _) => name,
    };
    let places = layout.bitmap_places(&args.device)?;
    let Some((_, bitmap)) = places.into_iter().find(|(_, bitmap)| bitmap.name().as_str() == name) else {
        if is_restart {
            return Ok(None);
        }
        return Err(Error::new(Kind::NotFound, format_args!("Bitmap '{name}' could not be found")));
    };
    bitmap.check(match args.bitmap_mode {
        BitmapMode::Never => Operation::MergeFrom,
        BitmapMode::OnSuccess | BitmapMode::Always => Operation::Clear,
    })?;
    Ok(Some(bitmap.begin_use(&format!("job '{}'", job.common.id))?))
}

/// The granularity of the job's bitmap. What is coarser than a piece is not needed. But a target that gets its backing only
/// at the end, or afterwards from somebody who knows what was not copied, has to be written in whole clusters: what is written of
/// one is filled up with what the target shows, and that are zeroes until then.
fn granularity(layout: &Layout, args: &MirrorArgs, sync: MirrorSync, target: &str) -> Result<u64> {
    let cluster = u64::from(layout.info(target)?.cluster_bytes);
    let bytes = match args.granularity {
        None | Some(0) => Granularity::default_for((cluster > 0).then_some(cluster)).bytes(),
        Some(bytes) if !GRANULARITY_RANGE.contains(&bytes) => {
            let message = "Parameter 'granularity' expects a value in range [512B, 64MB]";
            return Err(Error::new(Kind::Invalid, message));
        }
        Some(bytes) if !bytes.is_power_of_two() => {
            return Err(Error::new(Kind::Invalid, "Parameter 'granularity' expects a power of 2"));
        }
        Some(bytes) => bytes,
    };
    let is_alone = sync != MirrorSync::Full && layout.chain(target)?.len() == 1;
    let is_filled_up = args.target_backing.is_some() || is_alone;
    let whole = if is_filled_up && cluster.is_power_of_two() { cluster } else { 0 };
    Ok(bytes.min(PIECE_BYTES_MAX).max(whole))
}

impl Work for Mirror {
    fn run<'a>(&'a self, job: &'a Arc<Job>) -> BoxFuture<'a, Result<(), Stopped>> {
        Box::pin(async move {
            let Some(roots) = self.roots.lock().clone() else { return Ok(()) };
            if !self.has_found {
                self.find_work(job, &roots).await?;
            }
            job.set_total(self.shared.dirty.bits().dirty_bytes());
            if let Some(kept) = job.kept.get() {
                kept.warn(kept.set_phase(Phase::Working));
            }
            let push = self.push(&roots);
            let caught_up = || job.set_synced(self.shared.is_blocking());
            push.follow(job, &self.jobs.0.runtime, caught_up).await
        })
    }

    fn prepare<'a>(&'a self, job: &'a Arc<Job>) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let Some(roots) = self.roots.lock().clone() else { return Ok(()) };
            self.push(&roots).once_more(job, &self.jobs.0.runtime).await
        })
    }

    fn end<'a>(&'a self, job: &'a Arc<Job>, end: End, into: &'a mut Ending) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move { self.stage_end(job, end, into) })
    }

    fn take_fault(&self) -> Option<PieceError> {
        self.faults.take()
    }

    fn own_nodes(&self) -> Vec<Arc<str>> {
        let holder = self.holder.iter().map(|holder| holder.node().clone());
        std::iter::once(self.top.clone()).chain(holder).collect()
    }

    fn ended(&self, _: End) {
        *self.roots.lock() = None;
        *self.bitmap.lock() = None;
    }
}

impl Mirror {
    fn push(&self, roots: &Roots) -> Arc<Push> {
        let blocking = self.shared.blocking.clone();
        let Shared { dirty, copied, .. } = &*self.shared;
        Push::new(
            dirty,
            (&roots.source, &roots.target),
            self.how,
            blocking,
            copied.clone(),
            self.faults.clone(),
        )
    }

    /// Marks what is to be copied. What guests write is marked by its way through the source.
    async fn find_work(&self, job: &Arc<Job>, roots: &Roots) -> Result<(), Stopped> {
        let bitmap = self.bitmap.lock().as_ref().map(|used| used.bitmap().clone());
        if let Some(bitmap) = bitmap {
            bitmap.bits().iter_dirty().for_each(|range| self.shared.dirty.mark_unconditionally(range));
        }
        match self.sync {
            MirrorSync::None | MirrorSync::Bitmap => Ok(()),
            MirrorSync::Full | MirrorSync::Top => self.look_for_data(job, roots).await,
        }
    }

    async fn look_for_data(&self, job: &Arc<Job>, roots: &Roots) -> Result<(), Stopped> {
        let size = roots.source.info().size_bytes;
        let mut at = 0;
        while at < size {
            job.pause_point().await?;
            let end = size.min(at + LOOK_AHEAD);
            let Some(found) = self.ask(job, &roots.source, at..end).await? else { continue };
            let end = at + found.length;
            let dirty = &self.shared.dirty;
            match self.sync {
                MirrorSync::Top if found.depth != 1 => {}
                MirrorSync::Full if found.flags & status::ZERO != 0 => {
                    while at < end && !self.target_is_zero {
                        let Some(there) = self.ask(job, &roots.target, at..end).await? else {
                            job.pause_point().await?;
                            continue;
                        };
                        if there.flags & status::ZERO == 0 {
                            dirty.mark_unconditionally(at..at + there.length);
                        }
                        at += there.length;
                    }
                }
                _ => dirty.mark_unconditionally(at..end),
            }
            at = end;
        }
        Ok(())
    }

    /// Describes the first extent of a range. `None`: it failed, and is to be asked again.
    async fn ask(
        &self,
        job: &Arc<Job>,
        root: &Root,
        range: std::ops::Range<u64>,
    ) -> Result<Option<driveline_op::BlockStatus>, Stopped> {
        let length = range.end - range.start;
        let ask = Ask { op: op::BLOCK_STATUS, offset: range.start, length, ..Ask::default() };
        let answer = root.submit(ask, Buffer::default()).await;
        let Err(error) = answer.result else { return Ok(Some(answer.status)) };
        match job.on_io_error(&error, "read") {
            ErrorAction::Report => Err(Stopped::Failed(error.into())),
            ErrorAction::Ignore | ErrorAction::Stop => {
                self.jobs.0.runtime.sleep(ASK_AGAIN).await;
                Ok(None)
            }
        }
    }

    fn stage_end(&self, job: &Job, end: End, into: &mut Ending) -> Result<()> {
        let change = &mut into.change;
        let layout = change.layout();
        let (source, target, top) = (&self.source, &self.target, &self.top);
        let pivots = end.is_success() && job.wants_complete();
        if let Some(roots) = &*self.roots.lock() {
            for root in [&roots.source, &roots.target, &roots.top] {
                change.detach_root(root);
            }
        }
        let (dirty, how, success) = (self.shared.dirty.clone(), self.how, end.is_success());
        let (kept, phase) = (job.kept.get().cloned(), Phase::at_end(success, pivots));
        let faults = self.faults.clone();
        change.while_drained_first(&[source, target], move |edges| {
            Box::pin(async move {
                if success {
                    copy_rest(&dirty, &edges[0], &edges[1], how, &faults).await?;
                }
                kept.map_or(Ok(()), |kept| kept.end(phase))
            })
        })?;
        let says = match self.bitmap_mode {
            BitmapMode::Never => false,
            // If the target may have lost some, the bitmap goes on saying all that it said.
            BitmapMode::OnSuccess => end.is_success() && !self.faults.has_unflushed(),
            BitmapMode::Always => !self.faults.has_unflushed(),
        };
        if let Some(used) = self.bitmap.lock().as_ref().filter(|_| says) {
            change.set_bits(used.bitmap(), &self.shared.dirty);
        }
        change.remove_own_bitmap(source, &self.own, &user(job))?;
        let drive = layout.drive_of(source);
        if pivots {
            let replaced = self.replaces.as_deref().unwrap_or(source);
            let read_only = layout.view_node(replaced)?.read_only;
            if let Some(backing) = &self.target_backing {
                change.set_child(target, "backing", Some(backing))?;
            }
            change.replace_node(replaced, target)?;
            if read_only {
                change.set_read_only(target, true)?;
            }
            // Bitmaps that the drive got during the job, with no holder there, are on nodes that go.
            if let Some(drive) = drive.as_deref().filter(|_| self.replaces.is_none()) {
                for (at, bitmap) in layout.bitmap_places(drive)? {
                    if layout.reaches(source, &at) && bitmap.view() == View::Drive {
                        change.move_bitmap(&at, bitmap.name().as_str(), target)?;
                    }
                }
            }
        }
        let below = if pivots && self.replaces.is_none() { target } else { source };
        for bitmap in layout.view_node(top)?.bitmaps {
            change.move_bitmap(top, bitmap.name().as_str(), below)?;
        }
        change.remove_emptied_filter(top)?;
        match &self.holder {
            Some(used) => into.holders.leave(change, used),
            None => Ok(()),
        }
    }
}

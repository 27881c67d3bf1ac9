//! Commit: data moves down into a backing image, and the layers that it came from are taken out.
//!
//! ```text
//!   intermediate:  active ─▶ top ─▶ mid ─▶ base      active ─▶ base
//!                             └──────────────▲
//!   active:        drive ─▶ holder ─▶ limit ─▶ active ─▶ base      drive ─▶ limit ─▶ base
//!                                                └────────▲
//! ```
//!
//! The base changes, the drive does not: the job's writes are UNCHANGED with the scope `top`. Bitmaps of the base
//! with the `node` view record them; a drive's bitmaps do not.
//!
//! An active commit has guests writing above it. It marks what they write in a bitmap of its own, copies until
//! nothing is left, is ready then, and goes on copying what comes. On completion the graph is drained, what is
//! left is copied, and the base takes the place of the top node, in one change.

use crate::{
    chain::{Chain, by_file, file_and_format, overlays},
    copy::PieceError,
    group::{End, Ending, Work},
    holder::UsedHolder,
    job::{Common, Job, JobKind, Stopped},
    manager::Jobs,
    push::{Faults, How, Push, copy_rest, unchanged_from},
    record::{JobArgs, OnRestart, Phase},
    safe::Copied,
    start::Start,
    state::{ErrorAction, OnError},
};
use driveline_bitmap::{Bitmap, BitmapName, Granularity, Use, View};
use driveline_graph::{
    BoxFuture, Change, Error, Kind, Layout, NodeId, Permissions, Result, Root, RootOptions,
};
use driveline_op::{Ask, Buffer, op};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::{ops::Range, sync::Arc, time::Duration};

/// After an error that was ignored a question is asked again in a while.
const ASK_AGAIN: Duration = Duration::from_millis(50);
/// How far a question about extents looks ahead, and how much is zeroed at once.
const LOOK_AHEAD: u64 = 1 << 30;
/// The granularity of its own bitmap.
const GRANULARITY: u64 = 65536;

/// What a commit is started with. The fields are QEMU's `block-commit`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CommitArgs {
    /// Its id; without one, the device's name.
    pub job_id: Option<String>,
    /// The drive, or a node of the chain.
    pub device: String,
    /// The uppermost node whose data moves; without it, the top of the chain.
    pub top_node: Option<String>,
    /// The same, by the name of its file.
    pub top: Option<String>,
    /// The node that the data moves into; without it, the lowest of the chain.
    pub base_node: Option<String>,
    /// The same, by the name of its file.
    pub base: Option<String>,
    /// What the headers of the images above `top` say of their backing afterwards; without it, the base's file.
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

struct Commit {
    jobs: Jobs,
    chain: Chain,
    base: Arc<str>,
    top_id: NodeId,
    active: bool,
    header: Option<(String, String)>,
    state: Mutex<Roots>,
    holder: Option<UsedHolder>,
    base_was_read_only: bool,
    /// What the base has beyond the end of the top: images above see zeroes there, and still have to.
    hidden: Range<u64>,
    /// What is left to copy.
    dirty: Arc<Bitmap>,
    own: Own,
    copied: Option<Arc<Copied>>,
    faults: Arc<Faults>,
    /// It is known what is left to copy.
    has_found: bool,
}

#[derive(Clone)]
struct Roots {
    top: Option<Root>,
    base: Option<Root>,
}

impl Jobs {
    /// Starts a commit. When this returns its holder is in place, and the job is at work.
    pub async fn commit(&self, args: CommitArgs) -> Result<String> {
        let mut start = self.begin().await;
        let staged = start.commit(args).await;
        start.make_one(staged).await
    }
}

impl Start {
    /// Stages a commit. Returns the id that it will have.
    pub async fn commit(&mut self, args: CommitArgs) -> Result<String> {
        let layout = self.layout();
        let whole = layout.chain(&args.device)?;
        let one = |node: &Option<String>, file: &Option<String>, words: &str| match (node, file) {
            (Some(_), Some(_)) => Err(Error::new(
                Kind::Invalid,
                format_args!("'{words}-node' and '{words}' are mutually exclusive"),
            )),
            (Some(node), None) => Ok(Some(layout.chain(node)?[0].name().to_owned())),
            (None, Some(file)) => by_file(&layout, &args.device, file).map(Some),
            (None, None) => Ok(None),
        };
        let top = one(&args.top_node, &args.top, "top")?.unwrap_or_else(|| whole[0].name().to_owned());
        let base = one(&args.base_node, &args.base, "base")?;
        let base = base.unwrap_or_else(|| whole[whole.len() - 1].name().to_owned());
        if !whole.iter().any(|node| node.name() == top) {
            let message = format_args!("'{top}' is not in this backing file chain of '{}'", args.device);
            return Err(Error::new(Kind::Invalid, message));
        }
        if top == base {
            return Err(Error::new(Kind::Invalid, "cannot commit an image into itself"));
        }
        let chain = Chain::find(&layout, &top, Some(&base))?;
        let active = overlays(&layout, &top).is_empty();
        if active && args.backing_file.is_some() {
            let message = "'backing-file' specified, but 'top' is the active layer";
            return Err(Error::new(Kind::Invalid, message));
        }
        let header = match (&args.backing_file, active) {
            (_, true) => None,
            (Some(file), false) => Some((file.clone(), file_and_format(&layout, &base)?.1)),
            (None, false) => Some(file_and_format(&layout, &base)?),
        };
        let common = Common {
            id: args.job_id.clone().unwrap_or_else(|| args.device.clone()),
            kind: JobKind::Commit,
            device: args.device.clone(),
            speed: args.speed,
            on_source_error: args.on_error,
            on_target_error: args.on_error,
            auto_finalize: !args.manual_finalize,
            auto_dismiss: !args.manual_dismiss,
        };
        let mut claims = chain.layers.clone();
        claims.push(base.as_str().into());
        let job = self.reserve(common, &claims)?;
        let written = JobArgs::Commit(args.clone());
        let kept = self.write_down(&job, args.on_restart, written, (&top, Some(&base)))?;
        let holder = self.park(&top, args.filter_node_name.as_deref()).await?;
        let base_was_read_only = layout.view_node(&base)?.read_only;
        let change = self.change();
        let overruled: Vec<String> = chain.layers.iter().map(|name| name.to_string()).collect();
        if base_was_read_only {
            change.set_read_only(&base, false)?;
        }
        let (size, base_size) = (layout.size_bytes(&top)?, layout.size_bytes(&base)?);
        if base_size < size {
            change.resize_overruling(&base, size, &overruled)?;
        }
        let above = overlays(&layout, &top);
        let above = above.iter().filter_map(|overlay| layout.size_bytes(overlay.node.name()).ok());
        let hidden = size..above.max().unwrap_or(size).min(base_size);
        let shares = Permissions::ALL.without(Permissions::RESIZE);
        let user = format!("job '{}'", job.common.id);
        let reader = RootOptions {
            user: user.clone(),
            needs: Permissions::CONSISTENT_READ,
            shares,
            locks: active,
            overrules: Vec::new(),
        };
        let writer = RootOptions {
            user,
            needs: Permissions::CONSISTENT_READ.or(Permissions::WRITE),
            shares: Permissions::CONSISTENT_READ.or(Permissions::WRITE_UNCHANGED),
            locks: false,
            overrules: overruled,
        };
        let roots = Roots {
            top: Some(change.attach_to_node(&top, &reader)?),
            base: Some(change.attach_to_node(&base, &writer)?),
        };
        // If nothing is known of what guests have written since, the layers still say what they hold.
        let has_found = kept.as_ref().is_some_and(|kept| kept.lost.is_none() && has_found(&job));
        if let Some(kept) = kept.as_ref().filter(|kept| kept.is_restart && !has_found) {
            kept.look_again();
        }
        let (dirty, own) = own_bitmap(&job, GRANULARITY, size, false)?;
        let change = self.change();
        change.attach_bitmap(&top, dirty.clone())?;
        let copied = kept.and_then(|_| Copied::new(&dirty, &layout, &top, &base));
        let work = Commit {
            jobs: self.jobs.clone(),
            base: base.as_str().into(),
            top_id: layout.node(&top)?.id(),
            active,
            header,
            state: Mutex::new(roots),
            holder,
            base_was_read_only,
            hidden,
            dirty,
            own,
            copied,
            faults: Arc::default(),
            has_found,
            chain,
        };
        Ok(self.stage(work))
    }
}

fn own_name(job: &Job) -> Result<BitmapName> {
    Ok(BitmapName::new(&format!("#{}-{}", job.common.kind.name(), job.common.id))?)
}

/// What keeps a job's own bitmap busy: whoever cleared it, or took it for a backup, would have the job leave out what is in it.
pub(crate) type Own = Arc<Mutex<Option<Use>>>;

/// A bitmap of a job's own, for what it still has to copy.
///
/// `or_all`: after a restart all is to be copied, if it is not known what.
pub(crate) fn own_bitmap(
    job: &Job,
    granularity: u64,
    size_bytes: u64,
    or_all: bool,
) -> Result<(Arc<Bitmap>, Own)> {
    let name = own_name(job)?;
    let bitmap = match job.kept.get() {
        Some(kept) => kept.bitmap(name, granularity, size_bytes, or_all)?,
        None => {
            let granularity = Granularity::new(granularity)?;
            Arc::new(Bitmap::new(name, granularity, size_bytes).with_view(View::Node))
        }
    };
    let own = Arc::new(Mutex::new(Some(bitmap.begin_use(&user(job))?)));
    Ok((bitmap, own))
}

/// What a job is called by those whom it is in the way of.
pub(crate) fn user(job: &Job) -> String {
    format!("job '{}'", job.common.id)
}

/// Does it go on after a restart, with a bitmap of its own that was found, and that all of what is left to copy was in?
pub(crate) fn has_found(job: &Job) -> bool {
    job.kept.get().filter(|kept| kept.is_restart && kept.phase() == Phase::Working).is_some_and(|kept| {
        let name = own_name(job);
        name.is_ok_and(|name| kept.has_found(&name))
    })
}

impl Work for Commit {
    fn run<'a>(&'a self, job: &'a Arc<Job>) -> BoxFuture<'a, Result<(), Stopped>> {
        Box::pin(async move {
            let roots = self.state.lock().clone();
            let (top, base) = (roots.top.expect("until it is over"), roots.base.expect("until it is over"));
            if !self.has_found {
                self.find_allocated(job, &top).await?;
            }
            job.set_total(self.dirty.bits().dirty_bytes());
            if let Some(kept) = job.kept.get() {
                kept.warn(kept.set_phase(Phase::Working));
            }
            let push = self.push(&top, &base);
            let runtime = &self.jobs.0.runtime;
            if self.active {
                return push.follow(job, runtime, || {}).await;
            }
            push.run(job, runtime).await?;
            self.hide(job, &base).await
        })
    }

    fn prepare<'a>(&'a self, job: &'a Arc<Job>) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let Roots { top: Some(top), base: Some(base) } = self.state.lock().clone() else { return Ok(()) };
            self.push(&top, &base).once_more(job, &self.jobs.0.runtime).await
        })
    }

    fn end<'a>(&'a self, job: &'a Arc<Job>, end: End, into: &'a mut Ending) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move { self.stage_end(job, end, into) })
    }

    fn take_fault(&self) -> Option<PieceError> {
        self.faults.take()
    }

    fn own_nodes(&self) -> Vec<Arc<str>> {
        self.holder.iter().map(|holder| holder.node().clone()).collect()
    }

    fn ended(&self, _: End) {
        *self.state.lock() = Roots { top: None, base: None };
    }
}

impl Commit {
    /// Nobody but the job writes to the base.
    fn push(&self, top: &Root, base: &Root) -> Arc<Push> {
        let how = unchanged_from(self.top_id);
        Push::new(&self.dirty, (top, base), how, Arc::default(), self.copied.clone(), self.faults.clone())
    }

    /// Zeroes in the base what the end of the top has hidden of it.
    async fn hide(&self, job: &Arc<Job>, base: &Root) -> Result<(), Stopped> {
        let mut left = self.hidden.clone();
        while !left.is_empty() {
            job.pause_point().await?;
            let (offset, length) = (left.start, (left.end - left.start).min(LOOK_AHEAD));
            let How { flags, zero_flags, scope, .. } = unchanged_from(self.top_id);
            let flags = flags | zero_flags;
            let ask = Ask { op: op::WRITE_ZEROES, flags, offset, length, scope, ..Ask::default() };
            match base.submit(ask, Buffer::default()).await.result {
                Ok(()) => left.start += length,
                Err(error) => match job.on_io_error(&error, "write") {
                    ErrorAction::Report => return Err(Stopped::Failed(error.into())),
                    ErrorAction::Ignore | ErrorAction::Stop => self.jobs.0.runtime.sleep(ASK_AGAIN).await,
                },
            }
        }
        Ok(())
    }

    /// Marks what the layers hold. The guest's writes are marked by their way through `top`.
    async fn find_allocated(&self, job: &Arc<Job>, top: &Root) -> Result<(), Stopped> {
        let size = top.info().size_bytes;
        let mut at = 0;
        while at < size {
            job.pause_point().await?;
            let length = (size - at).min(LOOK_AHEAD);
            let ask = Ask { op: op::BLOCK_STATUS, offset: at, length, ..Ask::default() };
            let answer = top.submit(ask, Buffer::default()).await;
            if let Err(error) = answer.result {
                match job.on_io_error(&error, "read") {
                    ErrorAction::Report => return Err(Stopped::Failed(error.into())),
                    ErrorAction::Ignore | ErrorAction::Stop => self.jobs.0.runtime.sleep(ASK_AGAIN).await,
                }
                continue;
            }
            if self.chain.holds(answer.status.depth) {
                self.dirty.mark_unconditionally(at..at + answer.status.length);
            }
            at += answer.status.length;
        }
        Ok(())
    }

    /// The base is seen where the top was, by all who are left there.
    fn put_base_in_place(&self, change: &mut Change, layout: &Layout) -> Result<()> {
        let top = self.chain.top();
        change.replace_node(top, &self.base)?;
        // Bitmaps that the drive got during the job, with no holder there, are on the node that goes.
        if let Some(drive) = layout.drive_of(top) {
            for (at, bitmap) in layout.bitmap_places(&drive)? {
                if at == *top && bitmap.view() == View::Drive {
                    change.move_bitmap(top, bitmap.name().as_str(), &drive)?;
                }
            }
        }
        Ok(())
    }

    fn stage_end(&self, job: &Job, end: End, into: &mut Ending) -> Result<()> {
        let (top, base, success) = (self.chain.top(), &self.base, end.is_success());
        let pivots = success && self.active && job.wants_complete();
        let change = &mut into.change;
        let layout = change.layout();
        let roots = self.state.lock().clone();
        for root in [&roots.top, &roots.base].into_iter().flatten() {
            change.detach_root(root);
        }
        change.remove_own_bitmap(top, &self.own, &user(job))?;
        if self.active {
            let (dirty, how) = (self.dirty.clone(), unchanged_from(self.top_id));
            let (kept, phase) = (job.kept.get().cloned(), Phase::at_end(success, pivots));
            let faults = self.faults.clone();
            change.while_drained_first(&[top, base], move |edges| {
                Box::pin(async move {
                    if success {
                        copy_rest(&dirty, &edges[0], &edges[1], how, &faults).await?;
                    }
                    kept.map_or(Ok(()), |kept| kept.end(phase))
                })
            })?;
        }
        if pivots {
            self.put_base_in_place(change, &layout)?;
        }
        if success && !self.active {
            let header = self.header.as_ref().map(|(file, format)| (file.as_str(), format.as_str()));
            let below = self.chain.below(&layout)?;
            for overlay in &overlays(&layout, top) {
                let name = overlay.node.name();
                if overlay.read_only {
                    change.set_read_only(name, false)?;
                }
                change.set_backing(name, below.as_deref(), header)?;
                if overlay.read_only {
                    change.set_read_only(name, true)?;
                }
            }
            // Who else looks at the top, an export say, goes along: nothing keeps what is there as it was.
            self.put_base_in_place(change, &layout)?;
        }
        if self.base_was_read_only && !pivots && end.restores_read_only() {
            change.set_read_only(base, true)?;
        }
        match &self.holder {
            Some(used) => into.holders.leave(change, used),
            None => Ok(()),
        }
    }
}

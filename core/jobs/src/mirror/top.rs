//! The filter of a mirror: it sees what guests write, and in write-blocking mode writes it to the target as well.
//!
//! A write that is blocking is done to the source, then to the target, and is answered when both have it. Writes that
//! overlap follow each other, so that source and target get them in one order. The source's bitmap, which the job copies
//! from, was marked on the way; what has reached the target whole is taken out of it again. If the target fails, the range
//! is marked, the guest does not notice, and the job copies it later or fails by its own policy. A discard goes to the
//! source alone, and what it leaves there is copied by the job; it waits for writes under way like one of them, or such a
//! write would take its mark away.

use crate::{job::Job, safe::Copied};
use driveline_bitmap::Bitmap;
use driveline_graph::{
    BoxFuture, ChildSpec, Description, Driver, DriverKind, OpenArgs, OpenNode, Options, Ranges, Result, Role,
};
use driveline_op::{
    Body, DiscardRequest, Info, Instance, Next, OpTable, WriteRequest, WriteZeroesRequest, flag,
};
use std::{
    ops::Range,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

/// What QEMU calls it. Nobody can make one by `blockdev-add`.
pub(crate) const MIRROR_TOP: &str = "mirror_top";

/// Which child the target is.
const TARGET: usize = 1;

/// What the filter and its job share.
pub(crate) struct Shared {
    pub(crate) dirty: Arc<Bitmap>,
    /// If its progress is kept.
    pub(crate) copied: Option<Arc<Copied>>,
    /// Changed only while the filter is drained: writes of both modes at once would not know of each other.
    pub(crate) blocking: Arc<AtomicBool>,
    job: Weak<Job>,
    ranges: Arc<Ranges>,
}

impl Shared {
    pub(crate) fn new(
        dirty: Arc<Bitmap>,
        copied: Option<Arc<Copied>>,
        blocking: bool,
        job: &Arc<Job>,
    ) -> Arc<Self> {
        let (blocking, job) = (Arc::new(AtomicBool::new(blocking)), Arc::downgrade(job));
        Arc::new(Self { dirty, copied, blocking, job, ranges: Arc::default() })
    }

    pub(crate) fn is_blocking(&self) -> bool {
        self.blocking.load(Relaxed)
    }

    /// The granules that a range touches.
    fn granules(&self, range: &Range<u64>) -> Range<u64> {
        let granule = self.dirty.granularity().bytes();
        range.start / granule * granule..range.end.next_multiple_of(granule)
    }

    fn written(&self, range: Range<u64>, result: driveline_op::Result<()>) {
        match result {
            Ok(()) => {
                // First: while it is clean, and not known to be fresh, it would count as saved.
                if let Some(copied) = &self.copied {
                    copied.add(range.clone());
                }
                self.dirty.bits().clear_range(range);
            }
            Err(error) => {
                tracing::debug!("a mirror's target is behind: {error}");
                // The job may have copied it meanwhile, and nobody knows what the target has now.
                self.dirty.mark_unconditionally(range);
                if let Some(job) = self.job.upgrade() {
                    job.set_synced(false);
                }
            }
        }
    }
}

/// The driver of one mirror's filter.
pub(crate) struct TopDriver {
    description: Description,
    shared: Arc<Shared>,
}

impl TopDriver {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        let mut description = Description::builtin(MIRROR_TOP, DriverKind::Filter, "the filter of a mirror");
        description.children =
            vec![ChildSpec::required("backing", Role::Filtered), ChildSpec::required("target", Role::Data)];
        Self { description, shared }
    }
}

impl Driver for TopDriver {
    fn description(&self) -> &Description {
        &self.description
    }

    fn check(&self, _: &Options) -> Result<()> {
        Ok(())
    }

    fn open<'a>(&'a self, args: OpenArgs<'a>) -> BoxFuture<'a, Result<Arc<dyn OpenNode>>> {
        let body = Arc::new(Body { cookie: args.cookie, driver: Top(self.shared.clone()) });
        Box::pin(async move { Ok(Arc::new(OpenTop(body)) as Arc<dyn OpenNode>) })
    }
}

struct OpenTop(Arc<Body<Top>>);

impl OpenNode for OpenTop {
    fn instance(&self) -> Instance {
        Instance::new(self.0.clone(), &TOP)
    }

    fn info(&self, children: &[Info]) -> Info {
        children[0]
    }
}

struct Top(Arc<Shared>);

static TOP: OpTable<Top> =
    OpTable::new().write(Top::write).write_zeroes(Top::write_zeroes).discard(Top::discard);

impl Top {
    /// Does a change go to the target at once? What does not change the source does not change the target. With a scope the
    /// data changes for those below that scope, and the source may be one of them.
    fn copies(&self, flags: u32, scope: u64) -> bool {
        self.0.is_blocking() && (flags & flag::UNCHANGED == 0 || scope != 0)
    }

    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> driveline_op::Result<()> {
        if !self.copies(request.flags(), request.scope()) {
            return next.write(request).await;
        }
        let _hold = self.0.ranges.hold(self.0.granules(&request.range()), true).await;
        next.write(request).await?;
        let copy = request.with_flags(request.flags() & flag::FUA).with_scope(0);
        let written = next.child(TARGET).write(&copy).await;
        self.0.written(request.range(), written);
        Ok(())
    }

    async fn write_zeroes(
        &self,
        next: &mut Next<'_>,
        request: &WriteZeroesRequest<'_>,
    ) -> driveline_op::Result<()> {
        if !self.copies(request.flags(), request.scope()) {
            return next.write_zeroes(request).await;
        }
        let _hold = self.0.ranges.hold(self.0.granules(&request.range()), true).await;
        next.write_zeroes(request).await?;
        // The target may be slower with zeroes than the source: that is no reason to fail here.
        let flags = request.flags() & (flag::FUA | flag::MAY_UNMAP);
        let copy = request.with_flags(flags).with_scope(0);
        let written = next.child(TARGET).write_zeroes(&copy).await;
        self.0.written(request.range(), written);
        Ok(())
    }

    async fn discard(&self, next: &mut Next<'_>, request: &DiscardRequest<'_>) -> driveline_op::Result<()> {
        if !self.copies(request.flags(), request.scope()) {
            return next.discard(request).await;
        }
        let _hold = self.0.ranges.hold(self.0.granules(&request.range()), true).await;
        next.discard(request).await
    }
}

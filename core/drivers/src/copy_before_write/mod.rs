//! `copy-before-write`: before data is overwritten it is copied to a target, so that a point in time can still be read.
//!
//! | option | default | meaning |
//! |---|---|---|
//! | `file` | required | the child whose data changes |
//! | `target` | required | the child that the old data is copied to; at least as large |
//! | `bitmap` | all | `{ "node", "name" }`: only what is dirty in it now belongs to the point in time |
//! | `on-cbw-error` | `"break-guest-write"` | a copy fails: so does the write (`break-guest-write`), or the point in time is lost for good (`break-snapshot`) |
//! | `cbw-timeout` | `0` | after so many seconds a copy that a write waits for has failed; 0: never |
//! | `min-cluster-size` | `0` | copies are made in clusters: the largest of this power of two, 64 KiB and the target's |
//!
//! ```text
//!   guest ─▶ copy-before-write ─▶ file           snapshot-access ─▶ (the point in time of) copy-before-write
//!                  └────────────▶ target                               not copied yet: file │ copied: target
//! ```
//!
//! The point in time is when the node began to get the writes of its parents. A write waits until what it overwrites is
//! copied and the target has acknowledged it; what is copied already costs it a look at a bit. Writes that do not change the data
//! ([`flag::UNCHANGED`]) pass. Reading the point in time fails with `EACCES` outside of the bitmap and where it was discarded, and
//! with `EIO` everywhere once it is lost, which [`NodeEvent::PastLost`](driveline_graph::NodeEvent::PastLost) tells of.
//!
//! A copy that takes longer than `cbw-timeout` is not given up: it goes on by itself, because nobody can take back what a disk
//! or a server was asked for. Its write is answered, and who drains or closes the node waits for the copy.
//!
//! Copies in flight have 128 MiB of memory together, or one cluster if that is longer: the others wait.
//!
//! Source: QEMU qapi/block-core.json, `BlockdevOptionsCbw`; docs of fleecing. A `min-cluster-size` of 1 GiB and more ends QEMU
//! 10.0.2 with an assertion; here 1 GiB can be used, and more is refused.

mod copy;
mod lost;
mod past;
mod safe;
mod state;
#[cfg(test)]
mod tests;
mod timed;

pub use safe::{MakeSafe, Safe};
pub use state::{Compress, Copied, CopyBeforeWrite, OnCopyError, Settings, Side};

use crate::Bytes;
use copy::Failure;
use driveline_bitmap::{Bitmap, Granularity};
use driveline_graph::{
    BoxFuture, ChildSpec, Description, Driver, DriverKind, Error, Graph, Kind, OpenArgs, OpenChild, OpenNode,
    Options, Reopened, Result, Role, parse_options, refuse_changes,
};
use driveline_op::{
    Body, DiscardRequest, Info, Instance, Next, OpTable, WriteRequest, WriteZeroesRequest, flag,
};
use past::Past;
use serde::Deserialize;
use std::{
    ops::Range,
    sync::{Arc, OnceLock},
    time::Duration,
};
use timed::Copies;

/// The largest cluster.
const CLUSTER_BYTES_MAX: u64 = 1 << 30;

/// The options of a `copy-before-write` node.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct CbwOptions {
    bitmap: Option<BitmapOf>,
    on_cbw_error: OnCopyError,
    cbw_timeout: u32,
    min_cluster_size: Bytes,
}

/// A bitmap by the node that it is on.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct BitmapOf {
    node: String,
    name: String,
}

impl CbwOptions {
    fn read(options: &Options) -> Result<Self> {
        let parsed: Self = parse_options(options)?;
        check_cluster(parsed.min_cluster_size.0)?;
        Ok(parsed)
    }

    fn settings(&self) -> Settings {
        Settings {
            on_error: self.on_cbw_error,
            timeout: Duration::from_secs(self.cbw_timeout.into()),
            cluster_bytes_min: self.min_cluster_size.0,
            ..Settings::default()
        }
    }
}

/// Refuses a smallest cluster that can be none. 0 is one: the user does not care.
fn check_cluster(bytes: u64) -> Result<()> {
    let text = match bytes {
        0 => return Ok(()),
        _ if !bytes.is_power_of_two() => {
            "Cannot create block-copy-state: min-cluster-size needs to be a power of 2".to_owned()
        }
        _ if bytes > CLUSTER_BYTES_MAX => {
            format!("{bytes} is too large: expected at most {CLUSTER_BYTES_MAX}")
        }
        _ => return Ok(()),
    };
    Err(Error::new(Kind::Invalid, text).key("min-cluster-size"))
}

fn description() -> Description {
    Description {
        children: vec![
            ChildSpec::required("file", Role::Filtered),
            ChildSpec::required("target", Role::Target),
        ],
        options: ["bitmap", "on-cbw-error", "cbw-timeout", "min-cluster-size"].map(Into::into).to_vec(),
        ..Description::builtin(
            "copy-before-write",
            DriverKind::Filter,
            "Copies data to a target before it is overwritten",
        )
    }
}

/// The driver `copy-before-write`.
#[derive(Debug)]
pub struct CopyBeforeWriteDriver(Description);

impl Default for CopyBeforeWriteDriver {
    fn default() -> Self {
        Self(description())
    }
}

impl Driver for CopyBeforeWriteDriver {
    fn description(&self) -> &Description {
        &self.0
    }

    fn check(&self, options: &Options) -> Result<()> {
        CbwOptions::read(options).map(drop)
    }

    fn open<'a>(&'a self, args: OpenArgs<'a>) -> BoxFuture<'a, Result<Arc<dyn OpenNode>>> {
        Box::pin(async move {
            let options = CbwOptions::read(args.options)?;
            if options.bitmap.is_some() {
                let text = "there is no graph here to find it in";
                return Err(Error::new(Kind::NotSupported, text).key("bitmap"));
            }
            Ok(Arc::new(CbwNode::new(&args, open(&args, options.settings())?)) as _)
        })
    }

    fn open_in<'a>(
        &'a self,
        graph: &'a Graph,
        args: OpenArgs<'a>,
    ) -> BoxFuture<'a, Result<Arc<dyn OpenNode>>> {
        Box::pin(async move {
            let options = CbwOptions::read(args.options)?;
            let bitmap = options.bitmap.as_ref().map(|of| find_bitmap(graph, of)).transpose()?;
            let state = open(&args, options.settings())?;
            if let Some(bitmap) = bitmap {
                bitmap.check(driveline_bitmap::Operation::MergeFrom)?;
                state.restrict(bitmap.bits())?;
            }
            Ok(Arc::new(CbwNode::new(&args, state)) as _)
        })
    }

    /// What was copied so far is the state of this very node: a new one beside it would begin another point in time.
    fn reopen<'a>(
        &'a self,
        old: &'a Arc<dyn OpenNode>,
        before: &'a Options,
        args: OpenArgs<'a>,
    ) -> BoxFuture<'a, Result<Reopened>> {
        Box::pin(async move {
            refuse_changes(before, args.options)?;
            Ok(Reopened::same(old))
        })
    }
}

/// Source: QEMU's answers, whose texts these are.
fn find_bitmap(graph: &Graph, BitmapOf { node, name }: &BitmapOf) -> Result<Arc<Bitmap>> {
    if graph.node_or_drive(node).is_err() {
        return Err(Error::new(Kind::NotFound, format_args!("Node '{node}' not found")).key("bitmap"));
    }
    let missing =
        |_| Error::new(Kind::NotFound, format_args!("Dirty bitmap '{name}' not found")).key("bitmap");
    graph.bitmap(node, name).map_err(missing)
}

/// The same filter as a part of a job, which shares its state.
#[derive(Debug)]
pub struct CopyingFilter {
    description: Description,
    settings: Settings,
    opened: OnceLock<Arc<CopyBeforeWrite>>,
}

impl CopyingFilter {
    /// A driver that opens one node.
    ///
    /// Errors: a smallest cluster that can be none.
    pub fn new(settings: Settings) -> Result<Arc<Self>> {
        check_cluster(settings.cluster_bytes_min)?;
        Ok(Arc::new(Self { description: description(), settings, opened: OnceLock::new() }))
    }

    /// The state of its node, once that is open.
    pub fn opened(&self) -> Option<Arc<CopyBeforeWrite>> {
        self.opened.get().cloned()
    }
}

impl Driver for CopyingFilter {
    fn description(&self) -> &Description {
        &self.description
    }

    fn check(&self, options: &Options) -> Result<()> {
        CbwOptions::read(options).map(drop)
    }

    fn open<'a>(&'a self, args: OpenArgs<'a>) -> BoxFuture<'a, Result<Arc<dyn OpenNode>>> {
        Box::pin(async move {
            let state = open(&args, self.settings.clone())?;
            if self.opened.set(state.clone()).is_err() {
                return Err(Error::new(Kind::Busy, "it has its one node already"));
            }
            Ok(Arc::new(CbwNode::new(&args, state)) as _)
        })
    }

    /// What was copied so far is the state of this very node: a new one beside it would begin another point in time.
    fn reopen<'a>(
        &'a self,
        old: &'a Arc<dyn OpenNode>,
        before: &'a Options,
        args: OpenArgs<'a>,
    ) -> BoxFuture<'a, Result<Reopened>> {
        Box::pin(async move {
            refuse_changes(before, args.options)?;
            Ok(Reopened::same(old))
        })
    }
}

fn open(args: &OpenArgs<'_>, settings: Settings) -> Result<Arc<CopyBeforeWrite>> {
    let child =
        |name| args.child(name).ok_or_else(|| Error::new(Kind::Invalid, "a child is required").key(name));
    let (file, target) = (child("file")?, child("target")?);
    let (size, room) = (file.edge.info().size_bytes, target.edge.info().size_bytes);
    if room < size {
        let text = format_args!("'{}' has {room} bytes, expected at least {size}", target.node_name);
        return Err(Error::new(Kind::Invalid, text).key("target"));
    }
    let target_cluster = u64::from(target.edge.info().cluster_bytes);
    let cluster =
        settings.cluster_bytes_min.max(state::CLUSTER_BYTES).max(target_cluster.next_power_of_two());
    let granularity = Granularity::new(cluster)?;
    let safe = settings.safe.as_ref().map(|make| make(cluster, size)).transpose()?;
    if let Some(found) = safe.as_ref().map(|safe| safe.copied().granularity().bytes())
        && found != cluster
    {
        let text = format_args!("what was copied is known in clusters of {found} bytes; expected {cluster}");
        return Err(Error::new(Kind::Invalid, text).key("target"));
    }
    Ok(Arc::new(CopyBeforeWrite::new(args.cookie, settings, granularity, size, target_cluster, safe)))
}

/// An open node.
struct CbwNode {
    cookie: u64,
    present: Arc<Body<Present>>,
    past: Arc<Body<Past>>,
}

impl CbwNode {
    fn new(args: &OpenArgs<'_>, state: Arc<CopyBeforeWrite>) -> Self {
        let cookie = args.cookie;
        let past = Arc::new(Body { cookie, driver: Past(state.clone()) });
        let copies = Copies::default();
        copies.wire(cookie, &state, &args.children);
        Self { cookie, present: Arc::new(Body { cookie, driver: Present { state, copies } }), past }
    }
}

impl OpenNode for CbwNode {
    fn instance(&self) -> Instance {
        Instance::new(self.present.clone(), &PRESENT)
    }

    fn point_in_time(&self) -> Option<Instance> {
        Some(Instance::new(self.past.clone(), &past::PAST))
    }

    fn wired(&self, children: &[OpenChild]) {
        let Present { state, copies } = &self.present.driver;
        copies.wire(self.cookie, state, children);
    }

    fn own_work(&self) -> Option<BoxFuture<'static, ()>> {
        self.present.driver.copies.own_work()
    }

    fn close<'a>(&'a self, _: &'a [OpenChild]) -> BoxFuture<'a, Result<()>> {
        Box::pin(async {
            let copies = &self.present.driver.copies;
            if let Some(work) = copies.own_work() {
                work.await;
            }
            copies.unwire();
            Ok(())
        })
    }

    fn info(&self, children: &[Info]) -> Info {
        children.first().copied().unwrap_or_default()
    }

    fn details(&self) -> serde_json::Value {
        let state = &self.present.driver.state;
        let Copied { by_writes, by_order } = state.copied();
        let mut details = serde_json::json!({
            "cluster-size": state.cluster_bytes(),
            "copied-before-writes": by_writes,
            "copied-by-order": by_order,
            "broken": state.is_broken(),
        });
        if let Some(why) = state.why_lost() {
            details["broken-because"] = why.into();
        }
        details
    }
}

/// What the parents of the node call.
struct Present {
    state: Arc<CopyBeforeWrite>,
    copies: Copies,
}

static PRESENT: OpTable<Present> =
    OpTable::new().write(Present::write).discard(Present::discard).write_zeroes(Present::write_zeroes);

type Done = driveline_op::Result<()>;

impl Present {
    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Done {
        if self.overwrites(request.flags(), request.scope()) {
            self.before_write(next, request.range()).await?;
        }
        next.write(request).await
    }

    async fn write_zeroes(&self, next: &mut Next<'_>, request: &WriteZeroesRequest<'_>) -> Done {
        if self.overwrites(request.flags(), request.scope()) {
            self.before_write(next, request.range()).await?;
        }
        next.write_zeroes(request).await
    }

    async fn discard(&self, next: &mut Next<'_>, request: &DiscardRequest<'_>) -> Done {
        if self.overwrites(request.flags(), request.scope()) {
            self.before_write(next, request.range()).await?;
        }
        next.discard(request).await
    }

    /// With a scope the data changes for those below that scope, and this node may be one of them.
    #[inline]
    fn overwrites(&self, flags: u32, scope: u64) -> bool {
        flags & flag::UNCHANGED == 0 || scope != 0
    }

    /// Returns when `range` may be overwritten.
    ///
    /// Errors: what it overwrites cannot be copied, and that is to break the write.
    #[inline]
    async fn before_write(&self, next: &mut Next<'_>, range: Range<u64>) -> Done {
        let state = &self.state;
        if state.is_broken() || state.may_overwrite(&range) {
            return Ok(());
        }
        // On the heap: only the first write of a cluster comes here, and the others need no room for it.
        Box::pin(self.copy_first(next, state.whole(&range))).await
    }

    #[cold]
    async fn copy_first(&self, next: &mut Next<'_>, range: Range<u64>) -> Done {
        let (state, settings) = (&self.state, &self.state.settings);
        let copied = match settings.timeout.is_zero() {
            true => state.copy_for_write(next, range).await,
            false => self.copies.copy_in_time(state, range).await,
        };
        match (copied, settings.on_error) {
            (Ok(()), _) => Ok(()),
            (Err(Failure(_, error)), OnCopyError::BreakGuestWrite) => Err(error),
            (Err(Failure(side, error)), OnCopyError::BreakSnapshot) => {
                state.lose(side, &error);
                Ok(())
            }
        }
    }
}

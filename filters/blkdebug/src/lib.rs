//! For tests: makes requests fail, or wait until a test lets them go on, by rules.
//!
//! There are rules of two kinds. Ours say which requests (`rule`), how they fail (`errno`) and how they wait (`suspend`).
//! QEMU's go by events (`event`, `machine`), and may come from a file (`config`). Besides, `limits` splits requests as a
//! device would want them.
use driveline_sdk::{Claim, ConstMemory, Info, flag, permission, prelude::*};
use limits::Limits;
use machine::{InjectError, Machine, SetState};
use rule::{Operation, Rule, RuleOptions};
use std::{
    collections::BTreeMap,
    ops::Range,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::Poll,
};
use suspend::Point;

mod config;
mod errno;
mod event;
mod limits;
mod machine;
mod rule;
mod suspend;

/// The rules, in the order in which they are asked.
#[options]
#[derive(Debug)]
pub struct Options {
    #[serde(default)]
    rules: Vec<RuleOptions>,
    /// Where suspended requests show as files.
    control: Option<PathBuf>,
    /// A file with rules by events.
    config: Option<PathBuf>,
    #[serde(default)]
    inject_error: Vec<InjectError>,
    #[serde(default)]
    set_state: Vec<SetState>,
    align: Option<Bytes>,
    max_transfer: Option<Bytes>,
    opt_write_zero: Option<Bytes>,
    max_write_zero: Option<Bytes>,
    opt_discard: Option<Bytes>,
    max_discard: Option<Bytes>,
    #[serde(default)]
    take_child_perms: Vec<Permission>,
    #[serde(default)]
    unshare_child_perms: Vec<Permission>,
}

/// What somebody may do with the child.
#[options]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Permission {
    ConsistentRead,
    Write,
    WriteUnchanged,
    Resize,
}

impl Permission {
    fn bits(all: &[Self]) -> u32 {
        let bit = |it: &Self| match it {
            Self::ConsistentRead => permission::CONSISTENT_READ,
            Self::Write => permission::WRITE,
            Self::WriteUnchanged => permission::WRITE_UNCHANGED,
            Self::Resize => permission::RESIZE,
        };
        all.iter().map(bit).fold(0, |bits, bit| bits | bit)
    }
}

/// A node with its rules, each with the point where it suspends.
#[derive(Debug)]
pub struct Blkdebug {
    rules: Vec<(Rule, Option<Arc<Point>>)>,
    machine: Machine,
    /// The parent says itself when it reads and writes data.
    parent_tells: AtomicBool,
    limits: Limits,
    claim: Claim,
}

/// How a request fails.
struct Fault {
    errno: i32,
    /// So much of a write is done all the same.
    short_bytes: u64,
}

#[filter(
    name = "blkdebug",
    default = "pass",
    summary = "makes requests fail or wait, for tests",
    child_words("image")
)]
impl Filter for Blkdebug {
    type Options = Options;

    fn check(options: &Options) -> Result<()> {
        for (index, rule) in options.rules.iter().enumerate() {
            rule.check(&format!("rules[{index}]"), options.control.is_some())?;
        }
        Limits::new(options, 1).map(drop)
    }

    fn open(options: Options, cx: &OpenCx<'_>) -> Result<Self> {
        let limits = Limits::new(&options, cx.info(0).request_alignment)?;
        let mut rules = read_config(&options)?;
        rules.errors.extend(options.inject_error);
        rules.states.extend(options.set_state);
        let machine = Machine::new(rules.errors, rules.states);
        machine.event(event::NONE);
        let mut points = BTreeMap::new();
        if let Some(control) = &options.control {
            if !control.is_dir() {
                let text = format!("{} is no directory, expected one that exists", control.display());
                return Err(Error::option("control", text));
            }
            for tag in options.rules.iter().filter_map(|rule| rule.suspend.as_deref()) {
                points.insert(tag, Arc::new(Point::new(control, tag)?));
            }
        }
        let point = |rule: &RuleOptions| points.get(rule.suspend.as_deref()?).cloned();
        Ok(Blkdebug {
            rules: options.rules.iter().map(|rule| (rule.rule(), point(rule))).collect(),
            machine,
            parent_tells: AtomicBool::new(false),
            limits,
            claim: Claim {
                takes: Permission::bits(&options.take_child_perms),
                denies: Permission::bits(&options.unshare_child_perms),
            },
        })
    }

    fn info(&self, _: &[Info], shown: Info) -> Info {
        let least = |a: u64, b: u64| if a == 0 || b == 0 { a.max(b) } else { a.min(b) };
        Info {
            request_alignment: shown.request_alignment.max(self.limits.align as u32),
            transfer_bytes_max: least(self.limits.max_transfer, shown.transfer_bytes_max),
            ..shown
        }
    }

    fn permissions(&self, _: ChildId) -> Claim {
        self.claim
    }

    async fn event(&self, next: &mut Next<'_>, request: &EventRequest<'_>) -> Result<()> {
        self.parent_tells.store(true, Relaxed);
        if request.event() != event::NONE {
            self.machine.event(request.event());
        }
        next.event(request).await
    }

    async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        self.meet(Operation::Read, Some(request.range())).await?;
        self.notice(event::READ_AIO);
        self.inject(Operation::Read, Some(&request.range())).await?;
        next.read(request).await
    }

    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        if let Err(fault) = self.meet(Operation::Write, Some(request.range())).await {
            let short_bytes = fault.short_bytes.min(request.length());
            if short_bytes > 0 {
                let memory = request.part(0..short_bytes);
                let write = memory.write_request(request.offset(), request.flags());
                next.write(&write.with_scope(request.scope())).await?;
            }
            return Err(fault.into());
        }
        self.notice(event::WRITE_AIO);
        self.machine.event(event::PWRITEV);
        let written = match self.inject(Operation::Write, Some(&request.range())).await {
            Ok(()) => next.write(request).await,
            injected => injected,
        };
        self.machine.event(event::PWRITEV_DONE);
        written
    }

    async fn flush(&self, next: &mut Next<'_>, request: &FlushRequest<'_>) -> Result<()> {
        self.meet(Operation::Flush, None).await?;
        self.machine.event(event::FLUSH_TO_OS);
        self.machine.event(event::FLUSH_TO_DISK);
        self.inject(Operation::Flush, None).await?;
        next.flush(request).await
    }

    async fn discard(&self, next: &mut Next<'_>, request: &DiscardRequest<'_>) -> Result<()> {
        self.meet(Operation::Discard, Some(request.range())).await?;
        for piece in self.limits.discards(request.range()) {
            // What is not whole units is not given up: a discard is a wish.
            if piece.whole {
                self.inject(Operation::Discard, Some(&piece.range)).await?;
                let discard = DiscardRequest::new(piece.range, request.flags());
                next.discard(&discard.with_scope(request.scope())).await?;
            }
        }
        Ok(())
    }

    async fn write_zeroes(&self, next: &mut Next<'_>, request: &WriteZeroesRequest<'_>) -> Result<()> {
        self.meet(Operation::WriteZeroes, Some(request.range())).await?;
        self.machine.event(event::PWRITEV_ZERO);
        let mut zeroed = Ok(());
        for piece in self.limits.zeroes(request.range()) {
            zeroed = self.zero_piece(next, request, piece).await;
            if zeroed.is_err() {
                break;
            }
        }
        self.machine.event(event::PWRITEV_DONE);
        zeroed
    }

    async fn block_status(&self, next: &mut Next<'_>, request: &BlockStatusRequest<'_>) -> Result<()> {
        self.meet(Operation::BlockStatus, Some(request.range())).await?;
        self.inject(Operation::BlockStatus, Some(&request.range())).await?;
        next.block_status(request).await
    }

    async fn cache(&self, next: &mut Next<'_>, request: &CacheRequest<'_>) -> Result<()> {
        self.meet(Operation::Cache, Some(request.range())).await?;
        next.cache(request).await
    }
}

/// The rules that a file has.
fn read_config(options: &Options) -> Result<config::Config> {
    let Some(path) = &options.config else { return Ok(config::Config::default()) };
    let text = std::fs::read_to_string(path).map_err(|error| {
        // As the C library says it, without the number.
        let text = error.to_string();
        let text = text.split(" (os error").next().unwrap_or(&text);
        Error::option("config", format_args!("Could not read blkdebug config file: {text}"))
    })?;
    config::parse(&text).map_err(|text| Error::option("config", text))
}

impl Blkdebug {
    /// A request stands for what a parent would tell that tells nothing.
    fn notice(&self, event: u64) {
        if !self.parent_tells.load(Relaxed) {
            self.machine.event(event);
        }
    }

    /// Fails a request that an active error is for.
    async fn inject(&self, operation: Operation, range: Option<&Range<u64>>) -> Result<()> {
        let Some(injected) = self.machine.error(operation, range) else { return Ok(()) };
        tracing::debug!(?operation, ?range, errno = injected.errno, "an error is injected");
        if !injected.immediately {
            let mut first = true;
            std::future::poll_fn(|cx| {
                cx.waker().wake_by_ref();
                if std::mem::take(&mut first) { Poll::Pending } else { Poll::Ready(()) }
            })
            .await;
        }
        Err(Error::errno(injected.errno))
    }

    /// Zeroes a part. What a device would not take is written.
    async fn zero_piece(
        &self,
        next: &mut Next<'_>,
        request: &WriteZeroesRequest<'_>,
        piece: limits::Piece,
    ) -> Result<()> {
        let range = piece.range;
        if piece.whole {
            self.inject(Operation::WriteZeroes, Some(&range)).await?;
            let zeroes = WriteZeroesRequest::new(range, request.flags());
            return next.write_zeroes(&zeroes.with_scope(request.scope())).await;
        }
        if request.flags() & flag::NO_FALLBACK != 0 {
            return Err(Error::NOT_SUPPORTED);
        }
        self.inject(Operation::Write, Some(&range)).await?;
        let zeroes = vec![0; (range.end - range.start) as usize];
        let memory = ConstMemory::of(&zeroes);
        let write = memory.write_request(range.start, request.flags() & (flag::FUA | flag::UNCHANGED));
        next.write(&write.with_scope(request.scope())).await
    }

    /// Asks the rules in order, up to the first by which the request fails.
    async fn meet(&self, op: Operation, range: Option<Range<u64>>) -> Result<(), Fault> {
        for (index, (rule, point)) in self.rules.iter().enumerate() {
            if !rule.applies(op, range.as_ref()) {
                continue;
            }
            tracing::debug!(
                rule = index,
                ?op,
                ?range,
                errno = rule.errno.map(|errno| errno.0),
                "a rule applies"
            );
            if let Some(point) = point {
                point.suspend().await.map_err(|error| Fault { errno: error.code(), short_bytes: 0 })?;
            }
            if let Some(errno) = rule.errno {
                return Err(Fault { errno: errno.0, short_bytes: rule.short_bytes });
            }
        }
        Ok(())
    }
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        Error::errno(fault.errno)
    }
}

export_filters![Blkdebug];

#[cfg(test)]
mod events_tests;
#[cfg(test)]
mod tests;

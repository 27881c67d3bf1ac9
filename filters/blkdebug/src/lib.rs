//! For tests: makes requests fail, or wait until a test lets them go on, by rules.
//!
//! Three parts: `rule` says which requests, `errno` how they fail, `suspend` how they wait.
use driveline_sdk::prelude::*;
use rule::{Operation, Rule, RuleOptions};
use std::{collections::BTreeMap, ops::Range, path::PathBuf, sync::Arc};
use suspend::Point;

mod errno;
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
}

/// A node with its rules, each with the point where it suspends.
#[derive(Debug)]
pub struct Blkdebug {
    rules: Vec<(Rule, Option<Arc<Point>>)>,
}

/// How a request fails.
struct Fault {
    errno: i32,
    /// So much of a write is done all the same.
    short_bytes: u64,
}

#[filter(name = "blkdebug", default = "pass", summary = "makes requests fail or wait, for tests")]
impl Filter for Blkdebug {
    type Options = Options;

    fn check(options: &Options) -> Result<()> {
        for (index, rule) in options.rules.iter().enumerate() {
            rule.check(&format!("rules[{index}]"), options.control.is_some())?;
        }
        Ok(())
    }

    fn open(options: Options, _: &OpenCx<'_>) -> Result<Self> {
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
        Ok(Blkdebug { rules: options.rules.iter().map(|rule| (rule.rule(), point(rule))).collect() })
    }

    async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        self.meet(Operation::Read, Some(request.range())).await?;
        next.read(request).await
    }

    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        let Err(fault) = self.meet(Operation::Write, Some(request.range())).await else {
            return next.write(request).await;
        };
        let short_bytes = fault.short_bytes.min(request.length());
        if short_bytes > 0 {
            let memory = request.part(0..short_bytes);
            let write = memory.write_request(request.offset(), request.flags());
            next.write(&write.with_scope(request.scope())).await?;
        }
        Err(fault.into())
    }

    async fn flush(&self, next: &mut Next<'_>, request: &FlushRequest<'_>) -> Result<()> {
        self.meet(Operation::Flush, None).await?;
        next.flush(request).await
    }

    async fn discard(&self, next: &mut Next<'_>, request: &DiscardRequest<'_>) -> Result<()> {
        self.meet(Operation::Discard, Some(request.range())).await?;
        next.discard(request).await
    }

    async fn write_zeroes(&self, next: &mut Next<'_>, request: &WriteZeroesRequest<'_>) -> Result<()> {
        self.meet(Operation::WriteZeroes, Some(request.range())).await?;
        next.write_zeroes(request).await
    }

    async fn block_status(&self, next: &mut Next<'_>, request: &BlockStatusRequest<'_>) -> Result<()> {
        self.meet(Operation::BlockStatus, Some(request.range())).await?;
        next.block_status(request).await
    }

    async fn cache(&self, next: &mut Next<'_>, request: &CacheRequest<'_>) -> Result<()> {
        self.meet(Operation::Cache, Some(request.range())).await?;
        next.cache(request).await
    }
}

impl Blkdebug {
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
mod tests;

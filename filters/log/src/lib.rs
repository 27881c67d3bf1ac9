//! Tells of the requests that pass, one event each, when they end.
use driveline_sdk::{flag, now, op, prelude::*};
use std::{ops::Range, time::Duration};

/// How much an event matters.
#[options]
#[derive(Clone, Copy, Debug, Default)]
pub enum Level {
    /// Something is wrong.
    Error,
    /// Something may be.
    Warn,
    /// Worth knowing.
    #[default]
    Info,
    /// For those who look for something.
    Debug,
    /// For those who look at everything.
    Trace,
}

/// A kind of request.
#[options]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Operation {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
    BlockStatus,
    Cache,
}

/// What is told, and how.
#[options]
#[derive(Debug)]
pub struct Options {
    #[serde(default)]
    level: Level,
    #[serde(default)]
    ops: Option<Vec<Operation>>,
    #[serde(default)]
    slow: Time,
}

/// A node that tells.
#[derive(Debug)]
pub struct Log {
    node: Box<str>,
    level: Level,
    /// By operation number.
    told: [bool; op::COUNT],
    slow: Duration,
}

#[filter(name = "log", default = "pass", summary = "tells of the requests that pass")]
impl Filter for Log {
    type Options = Options;

    fn check(options: &Options) -> Result<()> {
        match &options.ops {
            Some(ops) if ops.is_empty() => Err(Error::option("ops", "with no operation, nothing is told")),
            _ => Ok(()),
        }
    }

    fn open(options: Options, cx: &OpenCx<'_>) -> Result<Self> {
        let told = |operation: Operation| options.ops.as_ref().is_none_or(|ops| ops.contains(&operation));
        Ok(Log {
            node: cx.node_name().into(),
            level: options.level,
            told: [
                told(Operation::Read),
                told(Operation::Write),
                told(Operation::Flush),
                told(Operation::Discard),
                told(Operation::WriteZeroes),
                told(Operation::BlockStatus),
                told(Operation::Cache),
                // These are no requests of a user.
                false,
                false,
            ],
            slow: *options.slow,
        })
    }

    async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        self.tell(op::READ, request.range(), request.flags(), next.read(request)).await
    }

    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        self.tell(op::WRITE, request.range(), request.flags(), next.write(request)).await
    }

    async fn flush(&self, next: &mut Next<'_>, request: &FlushRequest<'_>) -> Result<()> {
        self.tell(op::FLUSH, request.range(), request.flags(), next.flush(request)).await
    }

    async fn discard(&self, next: &mut Next<'_>, request: &DiscardRequest<'_>) -> Result<()> {
        self.tell(op::DISCARD, request.range(), request.flags(), next.discard(request)).await
    }

    async fn write_zeroes(&self, next: &mut Next<'_>, request: &WriteZeroesRequest<'_>) -> Result<()> {
        self.tell(op::WRITE_ZEROES, request.range(), request.flags(), next.write_zeroes(request)).await
    }

    async fn block_status(&self, next: &mut Next<'_>, request: &BlockStatusRequest<'_>) -> Result<()> {
        self.tell(op::BLOCK_STATUS, request.range(), request.flags(), next.block_status(request)).await
    }

    async fn cache(&self, next: &mut Next<'_>, request: &CacheRequest<'_>) -> Result<()> {
        self.tell(op::CACHE, request.range(), request.flags(), next.cache(request)).await
    }
}

/// Runs a macro of `tracing` with a level that is known only now: each level is a callsite of its own.
macro_rules! at_level {
    ($level:expr, $macro:ident!($($fields:tt)*)) => {
        match $level {
            Level::Error => tracing::$macro!(tracing::Level::ERROR $($fields)*),
            Level::Warn => tracing::$macro!(tracing::Level::WARN $($fields)*),
            Level::Info => tracing::$macro!(tracing::Level::INFO $($fields)*),
            Level::Debug => tracing::$macro!(tracing::Level::DEBUG $($fields)*),
            Level::Trace => tracing::$macro!(tracing::Level::TRACE $($fields)*),
        }
    };
}

impl Log {
    /// Waits for the child's answer, and tells of it.
    async fn tell(
        &self,
        operation: u32,
        range: Range<u64>,
        flags: u32,
        call: impl Future<Output = Result<()>>,
    ) -> Result<()> {
        if !self.told[operation as usize] || !at_level!(self.level, enabled!()) {
            return call.await;
        }
        let start = now();
        let result = call.await;
        let took = now().saturating_sub(start);
        if took >= self.slow {
            let (op, offset, length) = (op::NAMES[operation as usize], range.start, range.end - range.start);
            let (flags, microseconds) = (flag_names(flags), took.as_micros() as u64);
            let result = match &result {
                Ok(()) => "ok".to_owned(),
                Err(error) => error.to_string(),
            };
            at_level!(
                self.level,
                event!(, node = &*self.node, op, offset, length, flags, result, microseconds)
            );
        }
        result
    }
}

fn flag_names(flags: u32) -> String {
    let names = [
        (flag::FUA, "fua"),
        (flag::UNCHANGED, "unchanged"),
        (flag::MAY_UNMAP, "may-unmap"),
        (flag::NO_FALLBACK, "no-fallback"),
        (flag::COMPRESSED, "compressed"),
    ];
    let known: Vec<_> = names.iter().filter(|(bit, _)| flags & bit != 0).map(|(_, name)| *name).collect();
    known.join(",")
}

export_filters![Log];

#[cfg(test)]
mod tests;

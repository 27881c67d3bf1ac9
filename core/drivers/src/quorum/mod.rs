//! `quorum`: several children that hold the same, and vote about what they say.
//!
//! | option | default | meaning |
//! |---|---|---|
//! | `children` | required | a list of nodes, one at least, all of one size |
//! | `vote-threshold` | required | so many must agree, or must have done what was asked |
//! | `blkverify` | `false` | two children that must agree: a difference is an error, with nobody to say who is right |
//! | `rewrite-corrupted` | `false` | a child that was outvoted gets what the others say |
//! | `read-pattern` | `"quorum"` | `"quorum"`: all children are read and vote; `"fifo"`: the first that can be read |
//!
//! A vote is about the whole of a request. Who cannot read, write or flush is told of by
//! [`NodeEvent::QuorumBad`], and a lost vote by [`NodeEvent::QuorumFailure`].
//!
//! Requests that overlap a write wait for it. Without that, two writes could arrive at two children in different orders, which
//! would differ for ever, and a vote taken in the middle of a write would call a good child bad; QEMU has both.
//! Where QEMU's `blkverify` ends the program, the read fails here.
//!
//! Source: QEMU qapi/block-core.json, `BlockdevOptionsQuorum`; docs of its quorum driver.

mod read;
#[cfg(test)]
mod tests;
mod write;

use driveline_graph::{
    BoxFuture, ChildSpec, Description, Driver, DriverKind, Error, Kind, NodeEvent, OpenArgs, OpenChild,
    OpenNode, Options, Permissions, Ranges, Result, Role, node_tells, parse_options,
};
use driveline_op::{Body, Info, Instance, Next, OpTable, info};
use futures::future::join_all;
use serde::Deserialize;
use std::{ops::Range, sync::Arc};

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct QuorumOptions {
    vote_threshold: i64,
    #[serde(default)]
    blkverify: bool,
    #[serde(default)]
    rewrite_corrupted: bool,
    #[serde(default)]
    read_pattern: ReadPattern,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum ReadPattern {
    #[default]
    Quorum,
    Fifo,
}

/// The driver `quorum`.
#[derive(Debug)]
pub struct QuorumDriver(Description);

impl Default for QuorumDriver {
    fn default() -> Self {
        let options = ["vote-threshold", "blkverify", "rewrite-corrupted", "read-pattern"];
        Self(Description {
            children: vec![ChildSpec::list("children", Role::Data)],
            options: options.map(Into::into).to_vec(),
            effects: driveline_abi::effect::OWN_WRITES,
            ..Description::builtin(
                "quorum",
                DriverKind::Format,
                "Lets several children vote about what they hold",
            )
        })
    }
}

impl QuorumDriver {
    fn options(options: &Options) -> Result<QuorumOptions> {
        let parsed: QuorumOptions = parse_options(options)?;
        if parsed.vote_threshold < 1 {
            let text = "Parameter 'vote-threshold' expects a value >= 1";
            return Err(Error::new(Kind::Invalid, text).key("vote-threshold"));
        }
        if parsed.blkverify && parsed.rewrite_corrupted {
            let text = "rewrite-corrupted=on cannot be used with blkverify=on";
            return Err(Error::new(Kind::Invalid, text).key("rewrite-corrupted"));
        }
        Ok(parsed)
    }
}

impl Driver for QuorumDriver {
    fn description(&self) -> &Description {
        &self.0
    }

    fn check(&self, options: &Options) -> Result<()> {
        Self::options(options).map(drop)
    }

    fn open<'a>(&'a self, args: OpenArgs<'a>) -> BoxFuture<'a, Result<Arc<dyn OpenNode>>> {
        Box::pin(async move {
            let options = Self::options(args.options)?;
            let count = args.children.len();
            if count == 0 {
                let text = "Number of provided children must be 1 or more";
                return Err(Error::new(Kind::Invalid, text).key("children"));
            }
            if options.vote_threshold > count as i64 {
                let text = "threshold may not exceed children count";
                return Err(Error::new(Kind::OutOfRange, text).key("vote-threshold"));
            }
            if options.blkverify && (count != 2 || options.vote_threshold != 2) {
                let text =
                    "blkverify=on can only be set if there are exactly two files and vote-threshold is 2";
                return Err(Error::new(Kind::Invalid, text).key("blkverify"));
            }
            let sizes: Vec<u64> = args.children.iter().map(|child| child.edge.info().size_bytes).collect();
            if sizes.iter().any(|size| *size != sizes[0]) {
                let of = args.children.iter().zip(&sizes);
                let said: Vec<_> = of.map(|(child, size)| format!("'{}' {size}", child.node_name)).collect();
                let text = format_args!("the children differ in size: {} bytes", said.join(", "));
                return Err(Error::new(Kind::Invalid, text).key("children"));
            }
            let quorum = Quorum {
                cookie: args.cookie,
                threshold: options.vote_threshold as usize,
                blkverify: options.blkverify,
                rewrite_corrupted: options.rewrite_corrupted,
                pattern: options.read_pattern,
                read_only: args.read_only.into(),
                ranges: Arc::default(),
            };
            Ok(Arc::new(QuorumNode(Arc::new(Body { cookie: args.cookie, driver: quorum }))) as _)
        })
    }
}

/// What children voted with.
#[derive(Debug)]
struct Quorum {
    cookie: u64,
    threshold: usize,
    blkverify: bool,
    rewrite_corrupted: bool,
    pattern: ReadPattern,
    read_only: std::sync::atomic::AtomicBool,
    /// Requests that must not run at the same time: see the module.
    ranges: Arc<Ranges>,
}

static OPERATIONS: OpTable<Quorum> = OpTable::new()
    .read(Quorum::read)
    .write(Quorum::write)
    .flush(Quorum::flush)
    .write_zeroes(Quorum::write_zeroes)
    .block_status(Quorum::block_status);

struct QuorumNode(Arc<Body<Quorum>>);

impl OpenNode for QuorumNode {
    fn instance(&self) -> Instance {
        Instance::new(self.0.clone(), &OPERATIONS)
    }

    fn info(&self, children: &[Info]) -> Info {
        let quorum = &self.0.driver;
        let read_only = quorum.read_only.load(std::sync::atomic::Ordering::Relaxed);
        Info {
            // Should one have become shorter, nobody votes about what only others have.
            size_bytes: children.iter().map(|child| child.size_bytes).min().unwrap_or(0),
            request_alignment: children.iter().map(|child| child.request_alignment).max().unwrap_or(1),
            memory_alignment: children.iter().map(|child| child.memory_alignment).max().unwrap_or(1),
            flags: if read_only { info::READ_ONLY } else { 0 },
            ..Info::default()
        }
    }

    fn details(&self) -> serde_json::Value {
        let quorum = &self.0.driver;
        serde_json::json!({
            "vote-threshold": quorum.threshold,
            "blkverify": quorum.blkverify,
            "rewrite-corrupted": quorum.rewrite_corrupted,
            "read-pattern": if quorum.pattern == ReadPattern::Fifo { "fifo" } else { "quorum" },
        })
    }

    fn set_read_only<'a>(&'a self, _: &'a [OpenChild], read_only: bool) -> BoxFuture<'a, Result<()>> {
        self.0.driver.read_only.store(read_only, std::sync::atomic::Ordering::Relaxed);
        Box::pin(async { Ok(()) })
    }

    /// Who is outvoted is put right while others may only read.
    fn claim(&self, _: usize, read_only: bool) -> (Permissions, Permissions) {
        let rewrites = self.0.driver.rewrite_corrupted && !read_only;
        (if rewrites { Permissions::WRITE } else { Permissions::NONE }, Permissions::NONE)
    }

    fn check_children(&self, count: usize) -> Result<()> {
        let quorum = &self.0.driver;
        if quorum.blkverify {
            return Err(Error::new(Kind::NotSupported, "Cannot add a child to a quorum in blkverify mode"));
        }
        if count < quorum.threshold {
            let text = format_args!(
                "The number of children cannot be lower than the vote threshold {}",
                quorum.threshold
            );
            return Err(Error::new(Kind::Invalid, text));
        }
        Ok(())
    }
}

/// An outcome for each child.
type Outcomes = Vec<driveline_op::Result<()>>;

impl Quorum {
    /// Is who is outvoted put right? Only while others may write as well.
    fn rewrites(&self) -> bool {
        self.rewrite_corrupted && !self.read_only.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Does something with every child at the same time.
    async fn all<'n, F>(next: &'n mut Next<'_>, mut ask: impl FnMut(usize, Next<'n>) -> F) -> Outcomes
    where
        F: Future<Output = driveline_op::Result<()>>,
    {
        let next = &*next;
        join_all((0..next.children()).map(|child| ask(child, next.fork()))).await
    }

    /// Tells of children that failed. Did enough do what was asked? Else the error that most have.
    fn judge(&self, outcomes: Outcomes, what: &'static str, range: &Range<u64>) -> driveline_op::Result<()> {
        let (count, mut errors) = (outcomes.len(), Vec::new());
        for (child, outcome) in outcomes.into_iter().enumerate() {
            if let Err(error) = outcome {
                self.bad(child, what, Some(&error), range);
                errors.push(error);
            }
        }
        if count - errors.len() >= self.threshold {
            return Ok(());
        }
        let votes = |code| errors.iter().filter(|error| error.code() == code).count();
        let most = (0..errors.len()).max_by_key(|at| votes(errors[*at].code()));
        Err(most.map_or(driveline_op::Error::IO, |at| errors.swap_remove(at)))
    }

    fn bad(
        &self,
        child: usize,
        operation: &'static str,
        error: Option<&driveline_op::Error>,
        range: &Range<u64>,
    ) {
        let error = error.map(|error| error.code());
        node_tells(self.cookie, &NodeEvent::QuorumBad { child, operation, error, range: range.clone() });
    }

    fn failed(&self, range: &Range<u64>) {
        node_tells(self.cookie, &NodeEvent::QuorumFailure { range: range.clone() });
    }
}

//! `snapshot-access`: a point in time as a node of its own.
//!
//! | option | default | meaning |
//! |---|---|---|
//! | `file` | required | the `copy-before-write` node whose point in time it is |
//!
//! It can be read, asked about extents, and discarded: what is discarded is not needed any more, cannot be read from
//! then on, and writes of the guest do not wait for it to be copied. A hint that a range will be read has it copied. Writes are refused
//! with `ENOTSUP`.
//!
//! The node has no operations of its own. The graph wires its edge to the past of the child ([`Role::PointInTime`]), where
//! filters that are put above the child never come between.
//!
//! Source: QEMU qapi/block-core.json, `snapshot-access`. Over another child QEMU opens a node of which nothing can be
//! read; here it is refused.

use driveline_graph::{
    BoxFuture, ChildSpec, Description, Driver, DriverKind, Error, Kind, Missing, OpenArgs, OpenNode, Options,
    Result, Role, parse_options,
};
use driveline_op::{Body, Info, Instance, OpTable};
use serde::Deserialize;
use std::sync::Arc;

/// It has none.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NoOptions {}

/// The driver `snapshot-access`.
#[derive(Debug)]
pub struct SnapshotAccessDriver(Description);

impl Default for SnapshotAccessDriver {
    fn default() -> Self {
        Self(Description {
            children: vec![ChildSpec::required("file", Role::PointInTime)],
            missing: Missing::Pass,
            ..Description::builtin(
                "snapshot-access",
                DriverKind::Format,
                "Shows the point in time of a copy-before-write node",
            )
        })
    }
}

impl Driver for SnapshotAccessDriver {
    fn description(&self) -> &Description {
        &self.0
    }

    fn check(&self, options: &Options) -> Result<()> {
        parse_options::<NoOptions>(options).map(drop)
    }

    fn open<'a>(&'a self, args: OpenArgs<'a>) -> BoxFuture<'a, Result<Arc<dyn OpenNode>>> {
        Box::pin(async move {
            self.check(args.options)?;
            let Some(file) = args.child("file") else {
                return Err(Error::new(Kind::Invalid, "a child is required").key("file"));
            };
            if file.node.point_in_time().is_none() {
                let text = format_args!(
                    "'{}' shows no point in time; expected a node of driver 'copy-before-write'",
                    file.node_name
                );
                return Err(Error::new(Kind::Invalid, text).key("file"));
            }
            Ok(Arc::new(SnapshotAccessNode(Arc::new(Body { cookie: args.cookie, driver: () }))) as _)
        })
    }
}

/// An open node.
struct SnapshotAccessNode(Arc<Body<()>>);

static PASS: OpTable<()> = OpTable::new();

impl OpenNode for SnapshotAccessNode {
    fn instance(&self) -> Instance {
        Instance::new(self.0.clone(), &PASS)
    }

    fn info(&self, children: &[Info]) -> Info {
        children.first().copied().unwrap_or_default()
    }
}

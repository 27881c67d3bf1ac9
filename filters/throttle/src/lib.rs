//! Limits operations and bytes per second, for one node or for a group of nodes together.
//!
//! Four parts: `limits` reads the options, `object` keeps the groups that are objects, `bucket` knows when something may
//! pass, and `group` knows whose turn it is.
use driveline_sdk::{ObjectCall, prelude::*, serde_json::Value};
use group::Member;
use limits::Direction;

mod bucket;
mod group;
mod limits;
mod object;

pub use limits::Options;

/// A node of a group; each has one, though it may be the only one in it.
#[derive(Debug)]
pub struct Throttle(Member);

#[filter(
    name = "throttle",
    default = "pass",
    summary = "limits operations and bytes per second",
    objects("throttle-group")
)]
impl Filter for Throttle {
    type Options = Options;

    fn check(options: &Options) -> Result<()> {
        let limits = options.limits()?;
        if options.throttle_group.is_some() && (options.group.is_some() || limits.is_some()) {
            let text =
                "its limits are those of the object, so the node has no 'group' and no limits of its own";
            return Err(Error::option("throttle-group", text));
        }
        match options.group.as_deref() {
            Some("") => Err(Error::option("group", "a group has a name")),
            _ => Ok(()),
        }
    }

    fn open(options: Options, _: &OpenCx<'_>) -> Result<Self> {
        if let Some(name) = options.throttle_group.as_deref() {
            return Ok(Throttle(object::join(name)?));
        }
        Ok(Throttle(Member::join(options.group.as_deref(), options.limits()?)?))
    }

    fn object(_: &str, name: &str, call: ObjectCall) -> Result<Value> {
        object::call(name, call)
    }

    fn drained(&self, drained: bool) {
        self.0.set_drained(drained);
    }

    async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        if let Some(turn) = self.0.turn(Direction::Read, request.length()) {
            turn.await;
        }
        next.read(request).await
    }

    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        if let Some(turn) = self.0.turn(Direction::Write, request.length()) {
            turn.await;
        }
        next.write(request).await
    }

    // These say what a range shall be and transfer none of it, so they are operations without bytes.

    async fn discard(&self, next: &mut Next<'_>, request: &DiscardRequest<'_>) -> Result<()> {
        if let Some(turn) = self.0.turn(Direction::Write, 0) {
            turn.await;
        }
        next.discard(request).await
    }

    async fn write_zeroes(&self, next: &mut Next<'_>, request: &WriteZeroesRequest<'_>) -> Result<()> {
        if let Some(turn) = self.0.turn(Direction::Write, 0) {
            turn.await;
        }
        next.write_zeroes(request).await
    }
}

export_filters![Throttle];

#[cfg(test)]
mod tests;

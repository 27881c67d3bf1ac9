//! Limits operations and bytes per second, for one node or for a group of nodes together.
//!
//! Three parts: `limits` reads the options, `bucket` knows when something may pass, and `group` knows whose turn
//! it is.
use driveline_sdk::prelude::*;
use group::Member;
use limits::Direction;

mod bucket;
mod group;
mod limits;

pub use limits::Options;

/// A node of a group; each has one, though it may be the only one in it.
#[derive(Debug)]
pub struct Throttle(Member);

#[filter(name = "throttle", default = "pass", summary = "limits operations and bytes per second")]
impl Filter for Throttle {
    type Options = Options;

    fn check(options: &Options) -> Result<()> {
        options.limits()?;
        match options.group.as_deref() {
            Some("") => Err(Error::option("group", "a group has a name")),
            _ => Ok(()),
        }
    }

    fn open(options: Options, _: &OpenCx<'_>) -> Result<Self> {
        Ok(Throttle(Member::join(options.group.as_deref(), options.limits()?)?))
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

//! Refuses every change to one range: a partition table, say. `offset` and `length` are numbers or "64KiB".
use driveline_sdk::prelude::*;
use std::ops::Range;

#[options]
struct Options {
    #[serde(default)]
    offset: Bytes,
    length: Bytes,
}

struct Protect(Range<u64>);

impl Protect {
    fn permit(&self, range: Range<u64>) -> Result<()> {
        if range.start.max(self.0.start) < range.end.min(self.0.end) {
            tracing::warn!(?range, "refused");
            return Err(Error::NOT_PERMITTED);
        }
        Ok(())
    }
}

#[filter(name = "protect", default = "pass", summary = "refuses changes to a range")]
impl Filter for Protect {
    type Options = Options;

    fn open(options: Options, _: &OpenCx<'_>) -> Result<Self> {
        let Bytes(start) = options.offset;
        let end = start.checked_add(options.length.0);
        Ok(Protect(start..end.ok_or_else(|| Error::option("length", "it ends beyond all offsets"))?))
    }

    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        self.permit(request.range())?;
        next.write(request).await
    }

    async fn write_zeroes(&self, next: &mut Next<'_>, request: &WriteZeroesRequest<'_>) -> Result<()> {
        self.permit(request.range())?;
        next.write_zeroes(request).await
    }

    async fn discard(&self, next: &mut Next<'_>, request: &DiscardRequest<'_>) -> Result<()> {
        self.permit(request.range())?;
        next.discard(request).await
    }
}

export_filters![Protect];

#[cfg(test)]
mod tests;

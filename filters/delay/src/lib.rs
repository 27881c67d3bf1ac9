//! Waits before each operation, a time of its own for every kind: a slow disk, for tests and demonstrations.
use driveline_sdk::prelude::*;

/// How long each kind of operation waits.
#[options]
#[derive(Debug)]
pub struct Delay {
    #[serde(default)]
    read: Time,
    #[serde(default)]
    write: Time,
    #[serde(default)]
    flush: Time,
    #[serde(default)]
    discard: Time,
    #[serde(default)]
    write_zeroes: Time,
    #[serde(default)]
    block_status: Time,
}

#[filter(name = "delay", default = "pass", summary = "waits before operations")]
impl Filter for Delay {
    type Options = Delay;

    fn open(options: Delay, _: &OpenCx<'_>) -> Result<Self> {
        Ok(options)
    }

    async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        wait(self.read).await;
        next.read(request).await
    }

    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        wait(self.write).await;
        next.write(request).await
    }

    async fn flush(&self, next: &mut Next<'_>, request: &FlushRequest<'_>) -> Result<()> {
        wait(self.flush).await;
        next.flush(request).await
    }

    async fn discard(&self, next: &mut Next<'_>, request: &DiscardRequest<'_>) -> Result<()> {
        wait(self.discard).await;
        next.discard(request).await
    }

    async fn write_zeroes(&self, next: &mut Next<'_>, request: &WriteZeroesRequest<'_>) -> Result<()> {
        wait(self.write_zeroes).await;
        next.write_zeroes(request).await
    }

    async fn block_status(&self, next: &mut Next<'_>, request: &BlockStatusRequest<'_>) -> Result<()> {
        wait(self.block_status).await;
        next.block_status(request).await
    }
}

async fn wait(time: Time) {
    // The clock is not even looked at for an operation that does not wait.
    if !time.is_zero() {
        sleep(*time).await;
    }
}

export_filters![Delay];

#[cfg(test)]
mod tests;

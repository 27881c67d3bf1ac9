//! A filter of the time of ABI 1.2: nobody told it of drains. It holds each write back for a moment.
use driveline_sdk::prelude::*;

struct Old;

#[filter(name = "old-1-2", default = "pass", summary = "was built with the SDK of ABI 1.2")]
impl Filter for Old {
    type Options = NoOptions;

    fn open(_: NoOptions, _: &OpenCx<'_>) -> Result<Self> {
        Ok(Old)
    }

    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        sleep(std::time::Duration::from_millis(20)).await;
        next.write(request).await
    }
}

export_filters![Old];

//! A filter of the time of ABI 1.0: it has never heard of cache.
use driveline_sdk::prelude::*;

#[options]
struct Options {
    #[serde(default)]
    panics: bool,
}

struct Old(bool);

#[filter(name = "old", default = "pass", summary = "was built with the SDK of ABI 1.0")]
impl Filter for Old {
    type Options = Options;

    fn open(options: Options, _: &OpenCx<'_>) -> Result<Self> {
        Ok(Old(options.panics))
    }

    async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        assert!(!self.0, "as it was told");
        sleep(std::time::Duration::from_micros(10)).await;
        next.read(request).await
    }

    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        next.write(request).await
    }

    async fn write_zeroes(&self, next: &mut Next<'_>, request: &WriteZeroesRequest<'_>) -> Result<()> {
        next.write_zeroes(request).await
    }
}

export_filters![Old];

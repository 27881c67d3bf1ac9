//! Passes everything on, and says how far it was asked to go.
use driveline_sdk::prelude::*;

struct Variant;

#[filter(name = "variant", default = "pass", summary = "passes everything on")]
impl Filter for Variant {
    type Options = NoOptions;

    fn open(_: NoOptions, _: &OpenCx<'_>) -> Result<Self> {
        Ok(Variant)
    }

    async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        sleep(std::time::Duration::from_micros(10)).await;
        next.read(request).await
    }

    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        next.write(request).await
    }
}

export_filters![Variant];

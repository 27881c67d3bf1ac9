//! Passes reads on.
use driveline_sdk::prelude::*;

struct It;

#[filter(name = "aborts", default = "pass")]
impl Filter for It {
    type Options = NoOptions;

    fn open(_: NoOptions, _: &OpenCx<'_>) -> Result<Self> {
        Ok(It)
    }

    async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        next.read(request).await
    }
}

export_filters![It];

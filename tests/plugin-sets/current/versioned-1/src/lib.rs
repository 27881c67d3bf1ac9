//! Reads as the number of its version.
use driveline_sdk::prelude::*;

struct Versioned;

#[filter(name = "versioned", default = "pass", effects(changes_data))]
impl Filter for Versioned {
    type Options = NoOptions;

    fn open(_: NoOptions, _: &OpenCx<'_>) -> Result<Self> {
        Ok(Versioned)
    }

    async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        next.read(request).await?;
        request.fill(0, &[1]);
        Ok(())
    }
}

export_filters![Versioned];

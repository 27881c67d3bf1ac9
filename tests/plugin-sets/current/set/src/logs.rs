//! Says what passes.
use driveline_sdk::prelude::*;

pub struct Logs(String);

#[filter(name = "logs", default = "pass")]
impl Filter for Logs {
    type Options = NoOptions;

    fn open(_: NoOptions, cx: &OpenCx<'_>) -> Result<Self> {
        tracing::info!(target: "set::opened", node = cx.node_name(), "opened");
        Ok(Logs(cx.node_name().to_owned()))
    }

    async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        let span = tracing::info_span!("reading", offset = request.offset());
        span.in_scope(|| {
            tracing::info!(node = self.0, length = request.length(), negative = -1, exact = true, half = 0.5, range = ?request.range(), "a read");
            tracing::trace!("nobody hears this");
        });
        next.read(request).await
    }
}

//! A filter of the time of ABI 1.1: it has never heard of compressed writes, of sizes that a node changes by itself, nor
//! of events.
use driveline_sdk::{flag, prelude::*};

/// All flags that there were.
const FLAGS: u32 = flag::FUA
    | flag::UNCHANGED
    | flag::MAY_UNMAP
    | flag::NO_FALLBACK
    | flag::SERIALISING
    | flag::REGISTERED;

struct Old;

#[filter(name = "old-1-1", default = "pass", summary = "was built with the SDK of ABI 1.1")]
impl Filter for Old {
    type Options = NoOptions;

    fn open(_: NoOptions, _: &OpenCx<'_>) -> Result<Self> {
        Ok(Old)
    }

    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        assert_eq!(request.flags() & !FLAGS, 0, "nobody asks for what it does not know");
        next.write(request).await
    }

    async fn cache(&self, next: &mut Next<'_>, request: &CacheRequest<'_>) -> Result<()> {
        next.cache(request).await
    }
}

export_filters![Old];

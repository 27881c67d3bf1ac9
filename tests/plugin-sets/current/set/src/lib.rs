//! Filters that do one thing each, for tests of what is around them.
use driveline_sdk::prelude::*;
use std::time::Duration;

mod chaos;
mod children;
mod logs;

/// Every operation passes through it.
struct Passthrough;

#[filter(name = "passthrough", default = "pass", summary = "every operation passes through it")]
impl Filter for Passthrough {
    type Options = NoOptions;

    fn open(_: NoOptions, _: &OpenCx<'_>) -> Result<Self> {
        Ok(Passthrough)
    }

    async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        next.read(request).await
    }

    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        next.write(request).await
    }

    async fn flush(&self, next: &mut Next<'_>, request: &FlushRequest<'_>) -> Result<()> {
        next.flush(request).await
    }

    async fn discard(&self, next: &mut Next<'_>, request: &DiscardRequest<'_>) -> Result<()> {
        next.discard(request).await
    }

    async fn write_zeroes(&self, next: &mut Next<'_>, request: &WriteZeroesRequest<'_>) -> Result<()> {
        next.write_zeroes(request).await
    }

    async fn block_status(&self, next: &mut Next<'_>, request: &BlockStatusRequest<'_>) -> Result<()> {
        next.block_status(request).await
    }

    async fn cache(&self, next: &mut Next<'_>, request: &CacheRequest<'_>) -> Result<()> {
        next.cache(request).await
    }
}

/// Has no operation at all.
struct Nothing;

#[filter(name = "nothing", default = "pass")]
impl Filter for Nothing {
    type Options = NoOptions;

    fn open(_: NoOptions, _: &OpenCx<'_>) -> Result<Self> {
        Ok(Nothing)
    }
}

/// One operation each, which fails with ENOSPC: so it shows whether it was asked.
macro_rules! only {
    ($($filter:ident $name:literal $operation:ident $request:ident;)*) => { $(
        struct $filter;

        #[filter(name = $name, default = "pass")]
        impl Filter for $filter {
            type Options = NoOptions;

            fn open(_: NoOptions, _: &OpenCx<'_>) -> Result<Self> {
                Ok($filter)
            }

            async fn $operation(&self, _: &mut Next<'_>, _: &$request<'_>) -> Result<()> {
                Err(Error::NO_SPACE.because("nothing fits"))
            }
        }
    )* };
}

only! {
    OnlyRead "only-read" read ReadRequest;
    OnlyWrite "only-write" write WriteRequest;
    OnlyFlush "only-flush" flush FlushRequest;
    OnlyDiscard "only-discard" discard DiscardRequest;
    OnlyWriteZeroes "only-write-zeroes" write_zeroes WriteZeroesRequest;
    OnlyBlockStatus "only-block-status" block_status BlockStatusRequest;
    OnlyCache "only-cache" cache CacheRequest;
}

/// Reads and writes only, and lets nothing pass: bytes are stored inverted, and the upper half is hidden.
struct Invert;

impl Invert {
    fn of(data: &mut [u8]) {
        data.iter_mut().for_each(|byte| *byte = !*byte);
    }
}

#[filter(name = "invert", default = "deny", effects(changes_data), summary = "stores every byte inverted")]
impl Filter for Invert {
    type Options = NoOptions;

    fn open(_: NoOptions, _: &OpenCx<'_>) -> Result<Self> {
        Ok(Invert)
    }

    fn size(&self, child_size_bytes: u64) -> u64 {
        child_size_bytes / 2
    }

    async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        let mut data = vec![0; request.length() as usize];
        next.read_at(0, request.offset(), &mut data).await?;
        Self::of(&mut data);
        request.fill(0, &data);
        Ok(())
    }

    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        let mut data = vec![0; request.length() as usize];
        request.copy_to(0, &mut data);
        Self::of(&mut data);
        next.write_at(0, request.offset(), &data, request.flags()).await
    }
}

/// Sleeps before each read.
struct Sleeper(Time);

#[options]
struct SleeperOptions {
    time: Time,
}

#[filter(name = "sleeper", default = "pass")]
impl Filter for Sleeper {
    type Options = SleeperOptions;

    fn open(options: SleeperOptions, _: &OpenCx<'_>) -> Result<Self> {
        Ok(Sleeper(options.time))
    }

    fn check(options: &SleeperOptions) -> Result<()> {
        if *options.time > Duration::from_secs(60) {
            return Err(Error::option("time", "at most a minute"));
        }
        Ok(())
    }

    async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        sleep(*self.0).await;
        next.read(request).await
    }
}

export_filters![
    Passthrough,
    Nothing,
    OnlyRead,
    OnlyWrite,
    OnlyFlush,
    OnlyDiscard,
    OnlyWriteZeroes,
    OnlyBlockStatus,
    OnlyCache,
    Invert,
    Sleeper,
    chaos::Chaos,
    children::Mirror,
    logs::Logs,
    logs::Silent,
    logs::Ledger,
];

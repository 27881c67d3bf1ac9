//! Filters that say what happens to them.
use driveline_sdk::prelude::*;
use std::{fs::OpenOptions, io::Write, path::PathBuf};

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

/// Has an event on the way that nobody listens to.
pub struct Silent;

#[filter(name = "silent", default = "pass")]
impl Filter for Silent {
    type Options = NoOptions;

    fn open(_: NoOptions, _: &OpenCx<'_>) -> Result<Self> {
        Ok(Silent)
    }

    async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        tracing::trace!(offset = request.offset(), "a read");
        next.read(request).await
    }
}

/// Writes into a file that it was opened and closed.
pub struct Ledger(PathBuf);

#[options]
pub struct LedgerOptions {
    path: PathBuf,
}

impl Ledger {
    fn note(&self, what: &str) {
        let mut file = OpenOptions::new().create(true).append(true).open(&self.0).expect("the ledger can be opened");
        file.write_all(what.as_bytes()).expect("the ledger can be written");
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        self.note("closed\n");
    }
}

#[filter(name = "ledger", default = "pass")]
impl Filter for Ledger {
    type Options = LedgerOptions;

    fn open(options: LedgerOptions, _: &OpenCx<'_>) -> Result<Self> {
        let ledger = Ledger(options.path);
        ledger.note("opened\n");
        Ok(ledger)
    }

    async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        next.read(request).await
    }
}

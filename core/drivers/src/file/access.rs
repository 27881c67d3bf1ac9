//! For what a file is open: with `auto-read-only`, a node that may be written to has it open for writing only while somebody may
//! write. So a file that is only looked at can be on what becomes read-only, and be looked at by who refuses writers.
//!
//! A format writes while it opens, before the graph says what it needs: the file is open for writing until then.
//!
//! Source: QEMU block/file-posix.c, `raw_reconfigure_getfd`.

use super::{node::FileNode, reopen};
use driveline_graph::{Permissions, Result};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// How a file is open, beside what its node says.
#[derive(Debug)]
pub(super) struct Access {
    /// It follows what users need.
    pub(super) auto: bool,
    /// It is open for reading only.
    pub(super) read_only: AtomicBool,
}

impl Access {
    pub(super) fn new(auto: bool, read_only: bool) -> Self {
        Self { auto, read_only: read_only.into() }
    }
}

impl FileNode {
    /// Opens the file as users need it, and takes their locks. Blocks for as long as that takes.
    pub(super) fn serve(&self, needs: Permissions, shares: Permissions) -> Result<()> {
        let file = &self.body.driver;
        let writes = Permissions::WRITE.or(Permissions::WRITE_UNCHANGED).or(Permissions::RESIZE);
        let read_only = !needs.intersects(writes);
        if !self.access.auto || file.read_only.load(Relaxed) {
            return self.locks.take(&file.file, needs, shares, &self.path);
        }
        let opened_now = !read_only && self.open_for(false)?;
        if let Err(error) = self.locks.take(&file.file, needs, shares, &self.path) {
            if opened_now {
                self.end_writing();
            }
            return Err(error);
        }
        if read_only {
            self.end_writing();
        }
        Ok(())
    }

    /// For something that is written outside the data path, without a user who needs it: opens the file for that. `true`: it is
    /// to be ended with [`FileNode::end_writing`].
    pub(super) fn begin_writing(&self) -> Result<bool> {
        if self.access.auto && !self.body.driver.read_only.load(Relaxed) {
            self.open_for(false)
        } else {
            Ok(false)
        }
    }

    /// Nobody may write any more. Where the file cannot be opened for reading it stays as it is.
    pub(super) fn end_writing(&self) {
        if let Err(error) = self.open_for(true) {
            tracing::debug!("'{}' stays open for writing: {error}", self.path.display());
        }
    }

    /// `false`: so it is open already.
    fn open_for(&self, read_only: bool) -> Result<bool> {
        if self.access.read_only.load(Relaxed) == read_only {
            return Ok(false);
        }
        reopen::reopen(&self.body.driver.file, &self.path, self.locks.held(), read_only)?;
        self.access.read_only.store(read_only, Relaxed);
        Ok(true)
    }
}

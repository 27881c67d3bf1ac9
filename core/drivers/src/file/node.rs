//! An open file outside the data path.

use super::{
    PAUSE, TRIES, access::Access, data::File, extent, io_error, lock, lock::Locks, reopen, with_patience,
    zero,
};
use driveline_graph::{
    BoxFuture, Error, Kind, OpenChild, OpenNode, Permissions, Preallocation, Reopened, Result,
};
use driveline_op::{Body, Info, Instance, OpTable, info};
use serde_json::json;
use std::{
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering::Relaxed},
};

pub(super) struct FileNode {
    pub(super) path: PathBuf,
    /// As it was under the locks, before anybody wrote here.
    pub(super) at_open: std::fs::Metadata,
    pub(super) locks: Arc<Locks>,
    pub(super) access: Access,
    pub(super) body: Arc<Body<File>>,
}

static OPERATIONS: OpTable<File> = OpTable::new()
    .read(File::read)
    .write(File::write)
    .flush(File::flush)
    .discard(zero::discard)
    .write_zeroes(zero::write_zeroes)
    .block_status(extent::block_status)
    .cache(File::cache)
    .resize(File::resize);

impl FileNode {
    /// Another instance of the node, with another cache or another way to discard. If it needs an opening of its own, that has
    /// the locks from then on.
    pub(super) async fn reopen(
        &self,
        direct: bool,
        discard: bool,
        auto_read_only: bool,
        cookie: u64,
    ) -> Result<Reopened> {
        let ours = &self.body.driver;
        let read_only = ours.read_only.load(Relaxed);
        let opened_read_only = self.access.read_only.load(Relaxed);
        let file = if direct == ours.file.is_direct() {
            ours.file.clone()
        } else {
            // Pages that are not written back yet would not be seen past the cache, nor what is past it in them.
            if !opened_read_only {
                ours.sync().await.map_err(|error| at_file(&error, "writing back", &self.path))?;
            }
            let (file, path, held) = (ours.file.clone(), self.path.clone(), self.locks.held());
            let opened = move || reopen::open_again(&file, &path, held, opened_read_only, direct);
            Arc::new(driveline_engine::unblock(opened).await?)
        };
        let size_bytes =
            file.len().map_err(|error| io_error(&error, "asking for the size of", &self.path))?;
        let moved = (!Arc::ptr_eq(&file, &ours.file)).then(|| (ours.file.clone(), file.clone()));
        let driver = File::new(file, size_bytes, read_only, discard);
        driver.inherit_loss(ours);
        let body = Arc::new(Body { cookie, driver });
        let (path, at_open, locks) = (self.path.clone(), self.at_open.clone(), self.locks.clone());
        if let Some((from, _)) = &moved {
            lock::unlock_all(from, locks.held());
        }
        let undo = {
            let locks = locks.clone();
            move || {
                // Both openings have the locks for a moment, so nobody gets in between.
                if let Some((from, to)) = moved {
                    if !lock::copy(locks.held(), &from).unwrap_or(false) {
                        tracing::error!("undo of a graph change: a file could not be locked again");
                    }
                    lock::unlock_all(&to, locks.held());
                }
            }
        };
        let access = Access::new(auto_read_only, opened_read_only);
        let open = Arc::new(Self { path, at_open, locks, access, body });
        Ok(Reopened { open, undo: Box::new(undo), close_old: false })
    }
}

impl OpenNode for FileNode {
    fn instance(&self) -> Instance {
        Instance::new(self.body.clone(), &OPERATIONS)
    }

    fn info(&self, _: &[Info]) -> Info {
        let file = &self.body.driver;
        let alignment = file.alignment;
        let (mut flags, device) = (0, file.file.is_block_device());
        for (flag, set) in [
            (info::READ_ONLY, file.read_only.load(Relaxed)),
            (info::FAST_ZERO, file.ways.zeroes_fast(device)),
            (info::DISCARD, file.ways.discards(device)),
        ] {
            flags |= if set { flag } else { 0 };
        }
        Info {
            // With O_DIRECT the last sector of a file is there as a whole: to write to it makes it so.
            size_bytes: file.size_bytes.load(Relaxed).next_multiple_of(u64::from(alignment.offset)),
            request_alignment: alignment.offset,
            memory_alignment: alignment.memory,
            flags,
            ..Info::default()
        }
    }

    fn filename(&self) -> Option<PathBuf> {
        Some(self.path.clone())
    }

    fn file_at_open(&self) -> Option<&std::fs::Metadata> {
        Some(&self.at_open)
    }

    fn as_any(&self) -> Option<&dyn std::any::Any> {
        Some(self)
    }

    fn refresh<'a>(&'a self, _: &'a [OpenChild]) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let file = &self.body.driver;
            let size_bytes =
                file.file.len().map_err(|e| io_error(&e, "asking for the size of", &self.path))?;
            file.size_bytes.store(size_bytes, Relaxed);
            file.extents.forget();
            Ok(())
        })
    }

    fn details(&self) -> serde_json::Value {
        let file = &self.body.driver;
        let (ok, failed, ok_bytes) = file.ways.discarded();
        json!({
            "discards": { "ok": ok, "failed": failed, "ok-bytes": ok_bytes },
            "highest-write": file.highest_write.load(Relaxed),
            "filename": self.path.to_string_lossy(),
            "kind": if file.file.is_block_device() { "block device" } else { "regular file" },
            "cache": if file.file.is_direct() { "none" } else { "writeback" },
            "discard": if file.ways.discards(file.file.is_block_device()) { "unmap" } else { "ignore" },
            "locks": self.locks.details(),
        })
    }

    fn resize<'a>(&'a self, _: &'a [OpenChild], size_bytes: u64) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let file = self.body.driver.file.clone();
            let device = file.is_block_device();
            let opened = self.begin_writing()?;
            let resized = driveline_engine::unblock(move || {
                // A device has the size that it has; it may have changed since we looked.
                if device { file.len() } else { file.set_len(size_bytes).map(|()| size_bytes) }
            });
            let resized = resized.await;
            if opened {
                self.end_writing();
            }
            let now = resized.map_err(|error| io_error(&error, "resizing", &self.path))?;
            self.body.driver.size_bytes.store(now, Relaxed);
            self.body.driver.has_changed();
            self.body.driver.extents.forget();
            if now != size_bytes {
                let text = format_args!("'{}' is a block device of {now} bytes", self.path.display());
                return Err(Error::new(Kind::NotSupported, text));
            }
            Ok(())
        })
    }

    fn preallocate<'a>(
        &'a self,
        _: &'a [OpenChild],
        range: Range<u64>,
        how: Preallocation,
    ) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let opened = self.begin_writing()?;
            let done = self.body.driver.preallocate(range, how).await;
            if opened {
                self.end_writing();
            }
            done.map_err(|error| at_file(&error, "preallocating", &self.path))
        })
    }

    fn set_read_only<'a>(&'a self, _: &'a [OpenChild], read_only: bool) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let file = &self.body.driver;
            if file.read_only.load(Relaxed) == read_only {
                return Ok(());
            }
            if read_only {
                // What was written belongs to the time before.
                file.sync().await.map_err(|error| at_file(&error, "writing back", &self.path))?;
            } else {
                let (locks, ours, path) = (self.locks.clone(), file.file.clone(), self.path.clone());
                let take = move || with_patience(|| locks.take_write(&ours, &path));
                driveline_engine::unblock(take).await?;
            }
            let (ours, path, held) = (file.file.clone(), self.path.clone(), self.locks.held());
            let done = driveline_engine::unblock(move || reopen::reopen(&ours, &path, held, read_only)).await;
            if done.is_ok() {
                file.read_only.store(read_only, Relaxed);
                self.access.read_only.store(read_only, Relaxed);
            }
            if file.read_only.load(Relaxed) {
                self.locks.give_write_up(&file.file);
            }
            done
        })
    }

    fn set_permissions(&self, needs: Permissions, shares: Permissions) -> BoxFuture<'_, Result<()>> {
        // An instance that was closed a moment ago may still be held by what the kernel had of it, and its locks with it.
        // Requests of others on this thread need not wait for that.
        Box::pin(async move {
            for _ in 1..TRIES {
                match self.serve(needs, shares) {
                    Err(error) if error.kind() == Kind::Busy => {
                        driveline_engine::unblock(|| std::thread::sleep(PAUSE)).await;
                    }
                    done => return done,
                }
            }
            self.serve(needs, shares)
        })
    }

    fn close<'a>(&'a self, _: &'a [OpenChild]) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let file = &self.body.driver;
            let written = if file.read_only.load(Relaxed) { Ok(()) } else { file.sync().await };
            // Whoever still holds an edge to us keeps the file open, but not from others.
            self.locks.release(&file.file);
            written.map_err(|error| at_file(&error, "writing back", &self.path))
        })
    }
}

/// The error of an operation outside the data path.
fn at_file(error: &driveline_op::Error, doing: &str, path: &Path) -> Error {
    Error::io(error.code(), format_args!("{doing} '{}'", path.display()))
}

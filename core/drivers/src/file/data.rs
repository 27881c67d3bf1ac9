//! Reading, writing, flushing.

use super::{extent::Extents, zero::Ways};
use crate::range;
use driveline_engine::file::{Alignment, File as EngineFile};
use driveline_op::{
    BUFFER_ALIGNMENT, Buffer, CacheRequest, Error, FlushRequest, IoVec, Memory, Next, ReadRequest,
    ResizeRequest, Result, WriteRequest, flag,
};
use parking_lot::Mutex;
use std::{
    mem::offset_of,
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicI32, AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
};

/// Longer transfers of memory that O_DIRECT cannot take go in steps of this.
const BOUNCE_BYTES: usize = 1 << 20;
/// Bounce buffers that a file keeps.
const BOUNCE_KEPT: usize = 8;
/// The most pieces of memory that the kernel takes in a call.
const PIECES_MAX: usize = 1024;

const _: () = {
    assert!(size_of::<IoVec>() == size_of::<libc::iovec>());
    assert!(offset_of!(IoVec, base) == offset_of!(libc::iovec, iov_base));
    assert!(offset_of!(IoVec, len) == offset_of!(libc::iovec, iov_len));
};

/// The state of a node.
#[derive(Debug)]
pub(super) struct File {
    pub(super) file: Arc<EngineFile>,
    pub(super) alignment: Alignment,
    /// As far as we know: others may have made the file longer.
    pub(super) size_bytes: AtomicU64,
    /// Where the write ended that went farthest, since the node was opened.
    pub(super) highest_write: AtomicU64,
    pub(super) read_only: AtomicBool,
    pub(super) ways: Ways,
    pub(super) extents: Extents,
    /// Something may have been written since the last [`File::sync`] began.
    unsynced: AtomicBool,
    /// How many syncs have begun, and how many of them have ended.
    syncs: [AtomicU64; 2],
    /// The errno of the write-back that failed, or 0.
    lost: AtomicI32,
    bounce: Mutex<Vec<Buffer>>,
}

impl File {
    pub(super) fn new(file: Arc<EngineFile>, size_bytes: u64, read_only: bool, discard: bool) -> Self {
        let alignment = file.alignment();
        assert!(
            alignment.memory as usize <= BUFFER_ALIGNMENT,
            "buffers are aligned to what O_DIRECT asks for"
        );
        Self {
            ways: Ways::new(discard),
            alignment,
            size_bytes: AtomicU64::new(size_bytes),
            highest_write: AtomicU64::new(0),
            read_only: AtomicBool::new(read_only),
            extents: Extents::default(),
            unsynced: AtomicBool::new(true),
            syncs: Default::default(),
            lost: AtomicI32::new(0),
            bounce: Mutex::default(),
            file,
        }
    }

    /// What the kernel lost of this file's data is lost for another instance of the node, too.
    pub(super) fn inherit_loss(&self, from: &Self) {
        self.lost.store(from.lost.load(SeqCst), SeqCst);
    }

    pub(super) async fn read(&self, _: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        self.check(request.offset(), request.length())?;
        if self.must_bounce(request.iov()) {
            return self.read_bounced(request).await;
        }
        self.read_into(request).await
    }

    pub(super) async fn write(&self, _: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        self.about_to_write(request.offset(), request.length())?;
        if self.must_bounce(request.iov()) {
            self.write_bounced(request).await?;
        } else {
            self.write_from(request).await?;
        }
        self.written(request.offset(), request.length(), request.flags()).await
    }

    pub(super) async fn flush(&self, _: &mut Next<'_>, _: &FlushRequest<'_>) -> Result<()> {
        if self.read_only.load(Relaxed) {
            return Ok(()); // what was written was flushed when the file became read-only
        }
        self.sync().await
    }

    pub(super) async fn cache(&self, _: &mut Next<'_>, request: &CacheRequest<'_>) -> Result<()> {
        let Some(length) = std::num::NonZero::new(request.length()) else { return Ok(()) };
        if !self.file.is_direct()
            && range::inside(request.offset(), request.length(), range::SIZE_BYTES_MAX).is_ok()
        {
            let (file, offset) = (self.file.clone(), request.offset());
            // It is a hint: where it cannot be taken nothing is lost.
            let advise =
                move || rustix::fs::fadvise(&*file, offset, Some(length), rustix::fs::Advice::WillNeed);
            let _ = driveline_engine::unblock(advise).await;
        }
        Ok(())
    }

    /// Takes a new size, for a filter above: what it added behind the end of the data, it takes away again.
    pub(super) async fn resize(&self, _: &mut Next<'_>, request: &ResizeRequest<'_>) -> Result<()> {
        let (file, size_bytes) = (self.file.clone(), request.size_bytes());
        if self.read_only.load(Relaxed) {
            return Err(Error::NOT_PERMITTED);
        }
        if file.is_block_device() {
            return Err(Error::NOT_SUPPORTED);
        }
        range::inside(0, size_bytes, range::SIZE_BYTES_MAX)?;
        driveline_engine::unblock(move || file.set_len(size_bytes)).await?;
        self.size_bytes.store(size_bytes, Relaxed);
        self.has_changed();
        self.extents.forget();
        Ok(())
    }

    /// Reads into memory that the kernel can take. What lies beyond the end is zero.
    #[inline]
    async fn read_into(&self, request: &ReadRequest<'_>) -> Result<()> {
        let (iov, length) = (request.iov(), request.length());
        if length == 0 {
            return Ok(());
        }
        let (first, count) = (iov.as_ptr().cast(), iov.len().min(PIECES_MAX) as u32);
        // SAFETY: `IoVec` is laid out as `iovec` (above). Whoever made the request lends array and memory until this
        // operation ends, which is after the future in it has ended or was dropped.
        let done = unsafe { self.file.read_at(first, count, request.offset()) }.await? as u64;
        if done == length { Ok(()) } else { self.read_rest(request, done).await }
    }

    /// Goes on after a read that stopped early.
    async fn read_rest(&self, request: &ReadRequest<'_>, mut done: u64) -> Result<()> {
        let length = request.length();
        while done < length {
            if !done.is_multiple_of(u64::from(self.alignment.offset)) {
                break; // O_DIRECT ends inside a sector only at the end of the file
            }
            let memory = request.part(done..length);
            let rest = memory.read_request(request.offset() + done);
            let (first, count) = (rest.iov().as_ptr().cast(), rest.iov().len().min(PIECES_MAX) as u32);
            // SAFETY: as in `read_into`; the array is in `memory`, which lives on in this future.
            match unsafe { self.file.read_at(first, count, rest.offset()) }.await? {
                0 => break,
                more => done += more as u64,
            }
        }
        request.zero(done..length);
        Ok(())
    }

    /// Writes from memory that the kernel can take.
    #[inline]
    pub(super) async fn write_from(&self, request: &WriteRequest<'_>) -> Result<()> {
        let (iov, length) = (request.iov(), request.length());
        if length == 0 {
            return Ok(());
        }
        let (first, count) = (iov.as_ptr().cast(), iov.len().min(PIECES_MAX) as u32);
        // SAFETY: as in `read_into`.
        let done = unsafe { self.file.write_at(first, count, request.offset()) }.await? as u64;
        if done == length { Ok(()) } else { self.write_rest(request, done).await }
    }

    /// Goes on after a write that stopped early; a full disk says so at the next attempt.
    async fn write_rest(&self, request: &WriteRequest<'_>, mut done: u64) -> Result<()> {
        let length = request.length();
        while done < length {
            let memory = request.part(done..length);
            let rest = memory.write_request(request.offset() + done, 0);
            let (first, count) = (rest.iov().as_ptr().cast(), rest.iov().len().min(PIECES_MAX) as u32);
            // SAFETY: as in `read_rest`.
            match unsafe { self.file.write_at(first, count, rest.offset()) }.await? {
                0 => return Err(Error::NO_SPACE),
                more => done += more as u64,
            }
        }
        Ok(())
    }

    fn must_bounce(&self, iov: &[IoVec]) -> bool {
        let Alignment { memory, offset } = self.alignment;
        let wrong = |v: &IoVec| {
            !v.base.addr().is_multiple_of(memory as usize) || !v.len.is_multiple_of(offset as usize)
        };
        offset > 1 && iov.iter().any(wrong)
    }

    async fn read_bounced(&self, request: &ReadRequest<'_>) -> Result<()> {
        let (length, mut done) = (request.length(), 0);
        let mut buffer = self.bounce_buffer(length);
        while done < length {
            let step = (length - done).min(BOUNCE_BYTES as u64);
            buffer.set_len(step as usize);
            let memory = Memory::of_mut(&mut buffer);
            self.read_into(&memory.read_request(request.offset() + done)).await?;
            request.fill(done, &buffer);
            done += step;
        }
        self.keep(buffer);
        Ok(())
    }

    async fn write_bounced(&self, request: &WriteRequest<'_>) -> Result<()> {
        let (length, mut done) = (request.length(), 0);
        let mut buffer = self.bounce_buffer(length);
        while done < length {
            let step = (length - done).min(BOUNCE_BYTES as u64);
            buffer.set_len(step as usize);
            request.copy_to(done, &mut buffer);
            let memory = Memory::of_mut(&mut buffer);
            self.write_from(&memory.write_request(request.offset() + done, 0)).await?;
            done += step;
        }
        self.keep(buffer);
        Ok(())
    }

    fn bounce_buffer(&self, length: u64) -> Buffer {
        let kept = self.bounce.lock().pop();
        kept.unwrap_or_else(|| Buffer::new(length.min(BOUNCE_BYTES as u64) as usize))
    }

    fn keep(&self, buffer: Buffer) {
        let mut kept = self.bounce.lock();
        if kept.len() < BOUNCE_KEPT {
            kept.push(buffer);
        }
    }

    #[inline]
    pub(super) fn check(&self, offset: u64, length: u64) -> Result<()> {
        range::inside(offset, length, range::SIZE_BYTES_MAX)?;
        let alignment = u64::from(self.alignment.offset);
        if alignment > 1 && !(offset | length).is_multiple_of(alignment) {
            return Err(unaligned(offset, length, alignment));
        }
        Ok(())
    }

    #[inline]
    pub(super) fn about_to_write(&self, offset: u64, length: u64) -> Result<()> {
        if self.read_only.load(Relaxed) {
            return Err(Error::NOT_PERMITTED);
        }
        self.check(offset, length)
    }

    /// After every change of the data: the file may be longer now, and is on stable storage if that was asked for.
    #[inline]
    pub(super) async fn written(&self, offset: u64, length: u64, flags: u32) -> Result<()> {
        for mark in [&self.size_bytes, &self.highest_write] {
            if length > 0 && offset + length > mark.load(Relaxed) {
                mark.fetch_max(offset + length, Relaxed);
            }
        }
        self.has_changed();
        if flags & flag::FUA != 0 {
            self.sync().await?;
        }
        Ok(())
    }

    /// The next sync has something to do.
    #[inline]
    pub(super) fn has_changed(&self) {
        if !self.unsynced.load(SeqCst) {
            self.unsynced.store(true, SeqCst);
        }
    }

    /// Brings what was written to stable storage. The disk is not asked if nothing was written since the last time.
    pub(super) async fn sync(&self) -> Result<()> {
        match self.lost.load(SeqCst) {
            0 => {}
            errno => return Err(Error::errno(errno)),
        }
        if self.is_synced() {
            return Ok(());
        }
        let mut sync = Sync::begin(self);
        let synced = self.file.fsync(true).await;
        sync.done = synced.is_ok();
        if let Err(error) = &synced
            && !self.file.is_direct()
        {
            // The kernel reports a failed write-back once and forgets the data. With O_DIRECT each write tells by itself.
            self.lost.store(error.raw_os_error().unwrap_or(libc::EIO), SeqCst);
        }
        Ok(synced?)
    }

    /// Has everything that was written before now been synced? A sync that is in flight may fail, so it does not count: none
    /// was while the flag was looked at, if as many had begun before and after that as had ended.
    fn is_synced(&self) -> bool {
        let [begun, ended] = &self.syncs;
        let before = begun.load(SeqCst);
        let all_ended = ended.load(SeqCst) == before;
        let clean = !self.unsynced.load(SeqCst);
        all_ended && clean && begun.load(SeqCst) == before
    }
}

/// A sync in flight. If it fails, or is given up, there is as much to sync as before.
struct Sync<'a> {
    file: &'a File,
    done: bool,
}

impl<'a> Sync<'a> {
    fn begin(file: &'a File) -> Self {
        file.syncs[0].fetch_add(1, SeqCst);
        // What is written from here on may come too late for it.
        file.unsynced.store(false, SeqCst);
        Self { file, done: false }
    }
}

impl Drop for Sync<'_> {
    fn drop(&mut self) {
        if !self.done {
            self.file.unsynced.store(true, SeqCst);
        }
        self.file.syncs[1].fetch_add(1, SeqCst);
    }
}

#[cold]
fn unaligned(offset: u64, length: u64, alignment: u64) -> Error {
    Error::invalid(format_args!(
        "{length} bytes at {offset} are not multiples of {alignment}, as O_DIRECT needs"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use driveline_engine::file::OpenOptions;

    fn file() -> (tempfile::NamedTempFile, File) {
        let at = tempfile::NamedTempFile::new().unwrap();
        let how = OpenOptions { read: true, write: true, create: false, direct: false };
        let file = EngineFile::open_blocking(at.path(), how).unwrap();
        (at, File::new(Arc::new(file), 0, false, false))
    }

    #[test]
    fn the_disk_is_asked_only_if_something_was_written_since_the_last_sync() {
        let (_at, file) = file();
        assert!(!file.is_synced(), "who had the file before may have left something");
        futures::executor::block_on(file.sync()).unwrap();
        assert!(file.is_synced());
        futures::executor::block_on(file.written(0, 512, 0)).unwrap();
        assert!(!file.is_synced());
        futures::executor::block_on(file.sync()).unwrap();
        assert!(file.is_synced());
        assert_eq!(file.syncs.each_ref().map(|count| count.load(SeqCst)), [2, 2]);
        futures::executor::block_on(file.sync()).unwrap();
        assert_eq!(file.syncs[0].load(SeqCst), 2);
    }

    #[test]
    fn a_sync_in_flight_does_not_count_and_one_that_fails_leaves_everything_to_sync() {
        let (_at, file) = file();
        let mut sync = Sync::begin(&file);
        assert!(!file.is_synced());
        drop(Sync::begin(&file));
        sync.done = true;
        drop(sync);
        assert!(!file.is_synced(), "the one that was given up");
        let mut sync = Sync::begin(&file);
        futures::executor::block_on(file.written(0, 512, 0)).unwrap();
        sync.done = true;
        drop(sync);
        assert!(!file.is_synced(), "what was written meanwhile");
    }
}

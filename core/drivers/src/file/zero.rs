//! Zeroes and discards: by giving space back where that is allowed and possible.

use super::data::File;
use driveline_graph::Preallocation;
use driveline_op::{Buffer, ConstMemory, DiscardRequest, Error, Next, Result, WriteZeroesRequest, flag};
use std::{
    io,
    ops::Range,
    os::fd::AsRawFd,
    sync::{
        LazyLock,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
};

/// Zeroes to write where nothing better works.
static ZEROES: LazyLock<Buffer> = LazyLock::new(|| Buffer::new(1 << 20));

const KEEP_SIZE: i32 = libc::FALLOC_FL_KEEP_SIZE;
const PUNCH_HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | KEEP_SIZE;
const ZERO_RANGE: i32 = libc::FALLOC_FL_ZERO_RANGE;
/// Space is reserved, and the file made longer if need be.
const ALLOCATE: i32 = 0;

/// What the file system has been found to do.
#[derive(Debug)]
pub(super) struct Ways {
    discard: bool,
    punches: AtomicBool,
    zeroes_ranges: AtomicBool,
    allocates: AtomicBool,
    discards_sectors: AtomicBool,
    discarded: Discarded,
}

/// What became of discards that were to give space back.
#[derive(Debug, Default)]
struct Discarded {
    ok: AtomicU64,
    ok_bytes: AtomicU64,
    failed: AtomicU64,
}

impl Ways {
    pub(super) fn new(discard: bool) -> Self {
        let hoped = || AtomicBool::new(true);
        Self {
            discard,
            punches: hoped(),
            zeroes_ranges: hoped(),
            allocates: hoped(),
            discards_sectors: hoped(),
            discarded: Discarded::default(),
        }
    }

    /// Is a discard to give space back, and does that work as far as is known?
    pub(super) fn discards(&self, device: bool) -> bool {
        let works = if device { &self.discards_sectors } else { &self.punches };
        self.discard && works.load(Relaxed)
    }

    /// How many discards succeeded and failed so far, and the bytes of those that succeeded.
    pub(super) fn discarded(&self) -> (u64, u64, u64) {
        let Discarded { ok, ok_bytes, failed } = &self.discarded;
        (ok.load(Relaxed), failed.load(Relaxed), ok_bytes.load(Relaxed))
    }

    /// Can zeroes be had without writing them, as far as is known?
    pub(super) fn zeroes_fast(&self, device: bool) -> bool {
        self.punches.load(Relaxed) || !device && self.zeroes_ranges.load(Relaxed)
    }
}

pub(super) async fn write_zeroes(
    file: &File,
    _: &mut Next<'_>,
    request: &WriteZeroesRequest<'_>,
) -> Result<()> {
    file.zero(request.offset(), request.length(), request.flags()).await
}

pub(super) async fn discard(file: &File, _: &mut Next<'_>, request: &DiscardRequest<'_>) -> Result<()> {
    let result = file.give_up(request.offset(), request.length(), request.flags()).await;
    if file.ways.discard {
        let Discarded { ok, ok_bytes, failed } = &file.ways.discarded;
        match &result {
            Ok(()) => {
                ok.fetch_add(1, Relaxed);
                ok_bytes.fetch_add(request.length(), Relaxed);
            }
            Err(_) => drop(failed.fetch_add(1, Relaxed)),
        }
    }
    result
}

impl File {
    /// Gives a range its space, as zeroes.
    pub(super) async fn preallocate(&self, range: Range<u64>, how: Preallocation) -> Result<()> {
        let length = range.end.saturating_sub(range.start);
        match how {
            Preallocation::Off | Preallocation::Metadata => {
                self.zero(range.start, length, flag::MAY_UNMAP).await
            }
            Preallocation::Falloc => self.zero(range.start, length, 0).await,
            Preallocation::Full => {
                self.about_to_write(range.start, length)?;
                self.write_plain_zeroes(range.start, length).await?;
                self.extents.forget();
                self.written(range.start, length, 0).await
            }
        }
    }

    async fn zero(&self, offset: u64, length: u64, flags: u32) -> Result<()> {
        self.about_to_write(offset, length)?;
        if length == 0 {
            return Ok(());
        }
        if !self.zero_quickly(offset, length, flags).await? {
            if flags & flag::NO_FALLBACK != 0 {
                return Err(Error::NOT_SUPPORTED);
            }
            self.write_plain_zeroes(offset, length).await?;
        }
        self.extents.forget();
        self.written(offset, length, flags).await
    }

    /// Tries the ways that write nothing. False: there is none.
    async fn zero_quickly(&self, offset: u64, length: u64, flags: u32) -> Result<bool> {
        let (may_unmap, device) =
            (self.ways.discard && flags & flag::MAY_UNMAP != 0, self.file.is_block_device());
        if may_unmap && self.allocate(&self.ways.punches, PUNCH_HOLE, offset, length).await? {
            self.reach(offset, length).await?;
            return Ok(true);
        }
        // A device that cannot do it itself gets zeroes written by the kernel, which is what NO_FALLBACK is against.
        if device && flags & flag::NO_FALLBACK != 0 {
            return Ok(false);
        }
        if self.allocate(&self.ways.zeroes_ranges, ZERO_RANGE, offset, length).await? {
            return Ok(true);
        }
        // tmpfs has no ZERO_RANGE. That the space is there for later writes is what the second step is for.
        Ok(!device
            && self.allocate(&self.ways.punches, PUNCH_HOLE, offset, length).await?
            && self.allocate(&self.ways.allocates, ALLOCATE, offset, length).await?)
    }

    /// `fallocate`, if it is known or hoped to work. False: it does not.
    async fn allocate(&self, works: &AtomicBool, mode: i32, offset: u64, length: u64) -> Result<bool> {
        if !works.load(Relaxed) {
            return Ok(false);
        }
        match self.file.fallocate(mode, offset, length).await {
            Ok(()) => Ok(true),
            Err(error) => match error.raw_os_error() {
                Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV) => {
                    works.store(false, Relaxed);
                    Ok(false)
                }
                // Devices refuse what is not aligned to their sectors; the next request may be.
                Some(libc::EINVAL) if self.file.is_block_device() => Ok(false),
                _ => Err(error.into()),
            },
        }
    }

    /// Makes the file reach to the end of a range that was punched. A truncation to there could cut off what somebody is writing
    /// further on, so the last bytes of the range are written.
    async fn reach(&self, offset: u64, length: u64) -> Result<()> {
        let end = offset + length;
        if end <= self.size_bytes.load(Relaxed) || self.file.is_block_device() {
            return Ok(());
        }
        let last = u64::from(self.alignment.offset);
        self.write_plain_zeroes(end - last, last).await
    }

    async fn write_plain_zeroes(&self, mut offset: u64, length: u64) -> Result<()> {
        let end = offset + length;
        while offset < end {
            let step = (end - offset).min(ZEROES.len() as u64);
            let memory = ConstMemory::of(&ZEROES[..step as usize]);
            self.write_from(&memory.write_request(offset, 0)).await?;
            offset += step;
        }
        Ok(())
    }

    async fn give_up(&self, offset: u64, length: u64, flags: u32) -> Result<()> {
        self.about_to_write(offset, length)?;
        if length == 0 || !self.ways.discard {
            return Ok(());
        }
        if self.file.is_block_device() {
            if self.ways.discards_sectors.load(Relaxed) {
                self.give_up_sectors(offset, length).await?;
            }
        } else {
            self.allocate(&self.ways.punches, PUNCH_HOLE, offset, length).await?;
        }
        self.extents.forget();
        self.written(0, 0, flags).await
    }

    /// Of a device, whole sectors are given up.
    async fn give_up_sectors(&self, offset: u64, length: u64) -> Result<()> {
        let file = self.file.clone();
        let discarded = driveline_engine::unblock(move || {
            let sector = u64::from(rustix::fs::ioctl_blksszget(&*file)?);
            let (start, end) = (offset.next_multiple_of(sector), (offset + length) / sector * sector);
            if start >= end {
                return Ok(());
            }
            let range = [start, end - start];
            /// `BLKDISCARD` of linux/fs.h.
            const BLKDISCARD: libc::Ioctl = 0x1277;
            // SAFETY: the kernel reads two u64 from `range`.
            match unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, range.as_ptr()) } {
                -1 => Err(io::Error::last_os_error()),
                _ => Ok(()),
            }
        });
        match discarded.await {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOTTY)) => {
                self.ways.discards_sectors.store(false, Relaxed);
                Ok(())
            }
            other => Ok(other?),
        }
    }
}

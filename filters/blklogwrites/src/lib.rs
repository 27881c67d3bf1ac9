//! Logs every write, in the format of the kernel's dm-log-writes, so that any state between two flushes can be made again.
//!
//! Two parts: `format` is what stands in a log, and here is when it is written.
use driveline_sdk::{Buffer, Claim, Info, Memory, RangeLock, flag, permission, prelude::*};
use format::{Entry, SUPER_BYTES, Super};
use std::sync::{Mutex, MutexGuard, PoisonError};

mod format;

/// How the log is written.
#[options]
#[derive(Clone, Debug)]
pub struct Options {
    log_sector_size: Option<Bytes>,
    #[serde(default)]
    log_append: bool,
    #[serde(default = "interval_default")]
    log_super_update_interval: u64,
}

fn interval_default() -> u64 {
    4096
}

/// A node with its log.
#[derive(Debug)]
pub struct Blklogwrites {
    log: ChildId,
    append: bool,
    super_update_interval: u64,
    state: Mutex<State>,
    /// Entries share it while they are written: a super block tells only of entries that are there.
    writing: RangeLock,
}

#[derive(Clone, Copy, Debug)]
struct State {
    sector_bytes: u64,
    /// Where the next entry goes.
    next_sector: u64,
    entries: u64,
    /// How many of them the super block told of when it was written last.
    told: u64,
    /// An entry could not be written. What comes behind it would not be found, so nothing is logged any more.
    broken: bool,
}

#[filter(
    name = "blklogwrites",
    default = "pass",
    summary = "logs every write as dm-log-writes does",
    children("log")
)]
impl Filter for Blklogwrites {
    type Options = Options;

    fn check(options: &Options) -> Result<()> {
        if options.log_append && options.log_sector_size.is_some() {
            let text = "log-append and log-sector-size are mutually exclusive";
            return Err(Error::option("log-append", text));
        }
        if let Some(Bytes(size)) = options.log_sector_size
            && !format::valid_sector(size)
        {
            return Err(Error::option("log-sector-size", format_args!("Invalid log sector size {size}")));
        }
        if options.log_super_update_interval == 0 {
            let text = "Invalid log superblock update interval 0";
            return Err(Error::option("log-super-update-interval", text));
        }
        Ok(())
    }

    fn open(options: Options, cx: &OpenCx<'_>) -> Result<Self> {
        let sector_bytes = options.log_sector_size.map_or(512, |size| size.0);
        Ok(Self {
            log: cx.child("log")?,
            append: options.log_append,
            super_update_interval: options.log_super_update_interval,
            state: Mutex::new(State { sector_bytes, next_sector: 1, entries: 0, told: 0, broken: false }),
            writing: RangeLock::new(),
        })
    }

    /// A log that is gone on with says itself how long it is.
    async fn begin(&self, next: &mut Next<'_>, _: &FlushRequest<'_>) -> Result<()> {
        if !self.append || next.info(self.log).size_bytes == 0 {
            return Ok(());
        }
        let mut bytes = [0; SUPER_BYTES];
        let size_bytes = next.info(self.log).size_bytes;
        if size_bytes < SUPER_BYTES as u64 {
            return Err(Error::invalid("Could not read log superblock: the log is too short"));
        }
        next.read_at(self.log, 0, &mut bytes).await?;
        let found = Super::parse(&bytes)?;
        let mut state = State {
            sector_bytes: u64::from(found.sector_bytes),
            next_sector: 1,
            entries: found.entries,
            told: found.entries,
            broken: false,
        };
        for number in 0..found.entries {
            let at = state.next_sector.checked_mul(state.sector_bytes);
            let Some(at) = at.filter(|at| at.saturating_add(Entry::BYTES as u64) <= size_bytes) else {
                let text = format_args!("entry {number} of {} is behind the end of the log", found.entries);
                return Err(Error::invalid(text));
            };
            let mut bytes = [0; Entry::BYTES];
            next.read_at(self.log, at, &mut bytes).await?;
            let entry = Entry::parse(&bytes);
            let sectors =
                entry.sectors_after().and_then(|sectors| state.next_sector.checked_add(1 + sectors));
            state.next_sector = sectors.ok_or_else(|| {
                Error::invalid(format_args!("entry {number} is {entry:?}, which is too long"))
            })?;
        }
        *self.state() = state;
        Ok(())
    }

    /// Whole sectors are logged.
    fn info(&self, _: &[Info], shown: Info) -> Info {
        let sector_bytes = u32::try_from(self.state().sector_bytes).unwrap_or(1 << 23);
        Info { request_alignment: shown.request_alignment.max(sector_bytes), ..shown }
    }

    fn permissions(&self, child: ChildId) -> Claim {
        if child == self.log {
            // Whether or not anybody writes just now, nobody else may.
            return Claim { takes: 0, denies: permission::WRITE | permission::RESIZE };
        }
        Claim::default()
    }

    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        // The guest's memory may change, and what is logged must be what was written.
        let mut data = Buffer::new(request.length() as usize);
        request.copy_to(0, &mut data);
        let memory = Memory::of_mut(&mut data);
        let write = memory.write_request(request.offset(), request.flags()).with_scope(request.scope());
        let written = next.write(&write).await;
        drop(memory);
        let flags = if request.flags() & flag::FUA != 0 { Entry::FUA } else { 0 };
        self.log(next, flags, request.offset(), request.length(), Some(&data)).await?;
        written
    }

    async fn write_zeroes(&self, next: &mut Next<'_>, request: &WriteZeroesRequest<'_>) -> Result<()> {
        let written = next.write_zeroes(request).await;
        if let Err(error) = &written
            && error.code() == Error::NOT_SUPPORTED.code()
        {
            return written; // nothing was done, and the data will come as a write
        }
        let flags = if request.flags() & flag::FUA != 0 { Entry::FUA } else { 0 };
        self.log(next, flags, request.offset(), request.length(), None).await?;
        written
    }

    async fn discard(&self, next: &mut Next<'_>, request: &DiscardRequest<'_>) -> Result<()> {
        let done = next.discard(request).await;
        self.log(next, Entry::DISCARD, request.offset(), request.length(), None).await?;
        done
    }

    async fn flush(&self, next: &mut Next<'_>, request: &FlushRequest<'_>) -> Result<()> {
        let done = next.flush(request).await;
        self.log(next, Entry::FLUSH, 0, 0, None).await?;
        done
    }

    /// What was logged since the last flush is told of, too.
    async fn settle(&self, next: &mut Next<'_>, _: &FlushRequest<'_>) -> Result<()> {
        let state = *self.state();
        if state.told == state.entries || state.broken { Ok(()) } else { self.write_super(next).await }
    }
}

/// An entry that has its place in the log. Dropped, it is not there, and the log has come to its end.
struct Unfinished<'a>(&'a Blklogwrites);

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        self.0.state().broken = true;
    }
}

impl Blklogwrites {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Logs a request that was done: an entry, and its data (zeroes, if there is none and it is no discard). As with QEMU and
    /// with the kernel, one that failed is logged too: nobody knows what it did.
    async fn log(
        &self,
        next: &mut Next<'_>,
        flags: u64,
        offset: u64,
        length: u64,
        data: Option<&[u8]>,
    ) -> Result<()> {
        let has_data = flags & Entry::DISCARD == 0;
        let written = self.writing.lock_shared(0..1).await;
        let (at, sector_bytes, entries) = {
            let mut state = self.state();
            if state.broken {
                return Err(
                    Error::IO.because("the log could not be written before, so it has come to its end")
                );
            }
            let at = state.next_sector;
            let sectors = if has_data { length.div_ceil(state.sector_bytes) } else { 0 };
            state.next_sector += 1 + sectors;
            state.entries += 1;
            (at * state.sector_bytes, state.sector_bytes, state.entries)
        };
        // Until the entry is there the log has a hole; also if nobody waits for it any more.
        let unfinished = Unfinished(self);
        let entry =
            Entry { sector: offset / sector_bytes, sectors: length / sector_bytes, flags, data_length: 0 };
        let mut first = Buffer::new(sector_bytes as usize);
        first[..Entry::BYTES].copy_from_slice(&entry.bytes());
        let mut logged = next.write_at(self.log, at, &first, 0).await;
        let at = at + sector_bytes;
        logged = match (logged, data) {
            (Ok(()), Some(data)) => next.write_at(self.log, at, data, 0).await,
            (Ok(()), None) if has_data && length > 0 => {
                next.child(self.log).write_zeroes(&WriteZeroesRequest::new(at..at + length, 0)).await
            }
            (logged, _) => logged,
        };
        logged?;
        std::mem::forget(unfinished);
        drop(written);
        if flags & Entry::FLUSH != 0 || entries.is_multiple_of(self.super_update_interval) {
            self.write_super(next).await?;
        }
        Ok(())
    }

    async fn write_super(&self, next: &mut Next<'_>) -> Result<()> {
        let _alone = self.writing.lock(0..1).await;
        let state = *self.state();
        if state.broken {
            return Err(Error::IO.because("an entry before this one could not be written"));
        }
        let told = Super { entries: state.entries, sector_bytes: state.sector_bytes as u32 };
        let mut block = Buffer::new(state.sector_bytes as usize);
        block[..SUPER_BYTES].copy_from_slice(&told.bytes());
        next.write_at(self.log, 0, &block, 0).await?;
        next.flush_at(self.log).await?;
        self.state().told = state.entries;
        Ok(())
    }
}

export_filters![Blklogwrites];

#[cfg(test)]
mod tests;

//! Makes a file that grows longer in large steps, ahead of the writes at its end, and as long as its data when it is closed.
//!
//! What is behind the end of the data is nobody's to see: the node shows the end of the data as its size.
use driveline_sdk::{Claim, Info, RangeLock, flag, permission, prelude::*};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How much, and in which steps.
#[options]
#[derive(Clone, Copy, Debug)]
pub struct Options {
    #[serde(default = "align_default")]
    prealloc_align: Bytes,
    #[serde(default = "size_default")]
    prealloc_size: Bytes,
}

fn align_default() -> Bytes {
    Bytes(1 << 20)
}

fn size_default() -> Bytes {
    Bytes(128 << 20)
}

/// A node that reserves space.
#[derive(Debug)]
pub struct Preallocate {
    align: u64,
    size: u64,
    ends: Mutex<Ends>,
    /// One at a time makes the file longer.
    growing: RangeLock,
}

/// Where things end.
#[derive(Clone, Copy, Debug)]
struct Ends {
    /// What was written, or what somebody said the size is. That is what is shown.
    data: u64,
    /// The child.
    file: u64,
    /// How long the child may have been found by our own doing, since it was as it was meant. Somebody may show us one of these
    /// long after we have made it longer: wires are looked at while requests run.
    ours: (u64, u64),
    /// Requests that make one of them larger now.
    at_work: u32,
}

#[filter(name = "preallocate", default = "pass", summary = "makes a growing file longer in large steps")]
impl Filter for Preallocate {
    type Options = Options;

    fn check(options: &Options) -> Result<()> {
        let Bytes(align) = options.prealloc_align;
        if align == 0 || !align.is_multiple_of(512) {
            let text = "prealloc-align parameter of preallocate filter is not aligned to 512";
            return Err(Error::option("prealloc-align", text));
        }
        if options.prealloc_size.0 > i64::MAX as u64 - align {
            return Err(Error::option("prealloc-size", "it is more than a file can have"));
        }
        Ok(())
    }

    fn open(options: Options, cx: &OpenCx<'_>) -> Result<Self> {
        let end = cx.info(0).size_bytes;
        Ok(Self {
            align: options.prealloc_align.0,
            size: options.prealloc_size.0,
            ends: Mutex::new(Ends { data: end, file: end, ours: (end, end), at_work: 0 }),
            growing: RangeLock::new(),
        })
    }

    /// While we do nothing, a child that is as long as we never made it was made so by somebody else, who meant it.
    fn info(&self, _: &[Info], shown: Info) -> Info {
        let mut ends = self.ends();
        let (least, most) = ends.ours;
        if ends.at_work == 0 && !(least..=most).contains(&shown.size_bytes) {
            ends.all_at(shown.size_bytes);
        }
        Info { size_bytes: ends.data, ..shown }
    }

    fn permissions(&self, _: ChildId) -> Claim {
        // Others must not find, or change, what is behind the end of the data.
        Claim { takes: 0, denies: permission::WRITE | permission::RESIZE }
    }

    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        let end = request.range().end;
        if end <= self.ends().data {
            return next.write(request).await;
        }
        let work = self.work();
        self.reserve(next, end).await;
        next.write(request).await?;
        work.reached(end);
        Ok(())
    }

    async fn write_zeroes(&self, next: &mut Next<'_>, request: &WriteZeroesRequest<'_>) -> Result<()> {
        let end = request.range().end;
        if end <= self.ends().data {
            return next.write_zeroes(request).await;
        }
        let work = self.work();
        self.reserve(next, end).await;
        next.write_zeroes(request).await?;
        work.reached(end);
        Ok(())
    }

    async fn resize(&self, next: &mut Next<'_>, request: &ResizeRequest<'_>) -> Result<()> {
        let size_bytes = request.size_bytes();
        let _turn = self.growing.lock(0..1).await;
        let _work = self.work();
        let ends = *self.ends();
        // What was reserved reads as zeroes, as what is new shall.
        if !(ends.data..=ends.file).contains(&size_bytes) {
            next.resize(request).await?;
            let mut ends = self.ends();
            ends.file = size_bytes;
            ends.ours = (ends.ours.0.min(size_bytes), ends.ours.1.max(size_bytes));
        }
        self.ends().data = size_bytes;
        Ok(())
    }

    /// Gives back what was reserved and not used.
    async fn settle(&self, next: &mut Next<'_>, _: &FlushRequest<'_>) -> Result<()> {
        let _turn = self.growing.lock(0..1).await;
        let _work = self.work();
        let ends = *self.ends();
        if ends.file > ends.data || ends.ours.1 > ends.data {
            next.resize_at(0, ends.data).await?;
        }
        self.ends().all_at(ends.data);
        Ok(())
    }
}

impl Ends {
    /// Everything ends there, and nothing else was our doing.
    fn all_at(&mut self, end: u64) {
        (self.data, self.file, self.ours) = (end, end, (end, end));
    }
}

/// A request that makes something larger.
struct Work<'a>(&'a Preallocate);

impl Work<'_> {
    fn reached(&self, end: u64) {
        let mut ends = self.0.ends();
        ends.data = ends.data.max(end);
        ends.file = ends.file.max(end);
        ends.ours.1 = ends.ours.1.max(end);
    }
}

impl Drop for Work<'_> {
    fn drop(&mut self) {
        self.0.ends().at_work -= 1;
    }
}

impl Preallocate {
    fn ends(&self) -> MutexGuard<'_, Ends> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) -> Work<'_> {
        self.ends().at_work += 1;
        Work(self)
    }

    /// Makes the child reach further than `end`, if it does not reach it. If that cannot be had cheaply, the write itself
    /// makes it as long as it must be.
    async fn reserve(&self, next: &mut Next<'_>, end: u64) {
        if end <= self.ends().file {
            return;
        }
        let _turn = self.growing.lock(0..1).await;
        let from = self.ends().file;
        if end <= from {
            return;
        }
        let to = end.checked_add(self.size).and_then(|to| to.checked_next_multiple_of(self.align));
        let reached = match to.filter(|to| *to <= i64::MAX as u64) {
            Some(to) => {
                // Even if nobody waits for the end of it.
                self.may_reach(to);
                let reserved = next.write_zeroes(&WriteZeroesRequest::new(from..to, flag::NO_FALLBACK)).await;
                reserved.map(|()| to).unwrap_or_else(|error| {
                    tracing::debug!(from, to, %error, "no space was reserved");
                    end
                })
            }
            None => end,
        };
        // Where nothing was reserved the write is going to reach `end`: nobody may zero it from now on.
        let mut ends = self.ends();
        ends.file = ends.file.max(reached);
        ends.ours.1 = ends.ours.1.max(reached);
    }

    fn may_reach(&self, end: u64) {
        let mut ends = self.ends();
        ends.ours.1 = ends.ours.1.max(end);
    }
}

export_filters![Preallocate];

#[cfg(test)]
mod tests;

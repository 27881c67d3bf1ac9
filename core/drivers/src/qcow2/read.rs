//! Reads, and what is allocated where.

use super::{
    Qcow2, event,
    io::{FILE, Io},
    layout::Mapping,
    map::Run,
};
use driveline_op::{BlockStatus, BlockStatusRequest, Error, Next, ReadRequest, Result, flag, status};
use std::ops::Range;

impl Qcow2 {
    pub(crate) async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        self.check_range(request.range())?;
        let read = self.read_checked(next, request).await;
        self.judge(&mut Io::Next(next), read).await
    }

    #[inline]
    async fn read_checked(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        let _pin = self.epoch.pin();
        let (mut at, length) = (0, request.length());
        while at < length {
            let Some(run) = self.look(request.offset() + at, length - at, false)? else {
                Box::pin(self.load(&mut Io::Next(next), request.offset() + at)).await?;
                continue;
            };
            let part = at..at + run.length;
            match run.mapping {
                Mapping::Data { .. } => {
                    let file = self.data();
                    let inside = file.end().saturating_sub(run.host).min(run.length);
                    Io::Next(next).tell(file.child, event::READ_AIO).await;
                    if inside == length {
                        return next.child(file.child).read(&request.at(run.host)).await;
                    }
                    if inside > 0 {
                        let memory = request.part(at..at + inside);
                        next.child(file.child).read(&memory.read_request(run.host)).await?;
                    }
                    request.zero(at + inside..part.end);
                }
                Mapping::Zero { .. } => request.zero(part),
                Mapping::Unallocated => {
                    let start = request.offset() + at;
                    let inside = self.in_backing(&Io::Next(next), start..start + run.length);
                    if inside > 0 {
                        Io::Next(next).tell(FILE, event::READ_BACKING_AIO).await;
                        let memory = request.part(at..at + inside);
                        next.child(self.backing()).read(&memory.read_request(start)).await?;
                    }
                    request.zero(at + inside..part.end);
                }
                Mapping::Compressed(entry) => {
                    let from = self.geometry.in_cluster(request.offset() + at) as usize;
                    let data = Box::pin(self.unpacked(&mut Io::Next(next), entry)).await?;
                    request.fill(at, &data[from..from + run.length as usize]);
                }
            }
            at += run.length;
        }
        Ok(())
    }

    /// How many bytes from the beginning of a range the backing file has.
    pub(crate) fn in_backing(&self, io: &Io<'_, '_>, range: Range<u64>) -> u64 {
        let end = io.info(self.backing()).map_or(0, |info| info.size_bytes).min(range.end);
        end.saturating_sub(range.start)
    }

    /// Reads what the guest sees into a buffer of our own; past the image's end that is the backing's, or zeroes.
    pub(crate) async fn read_old(&self, io: &mut Io<'_, '_>, offset: u64, into: &mut [u8]) -> Result<()> {
        let (mut at, length) = (0, into.len() as u64);
        while at < length {
            let start = offset + at;
            let Some(run) = self.look(start, length - at, false)? else {
                self.load(io, start).await?;
                continue;
            };
            let part = &mut into[at as usize..(at + run.length) as usize];
            match run.mapping {
                Mapping::Data { .. } => self.data().read(io, run.host, part).await?,
                Mapping::Zero { .. } => part.fill(0),
                Mapping::Unallocated => {
                    let inside = self.in_backing(io, start..start + run.length) as usize;
                    if inside > 0 {
                        io.tell(FILE, event::READ_BACKING_AIO).await;
                        io.read(self.backing(), start, &mut part[..inside]).await?;
                    }
                    part[inside..].fill(0);
                }
                Mapping::Compressed(entry) => {
                    let from = self.geometry.in_cluster(start) as usize;
                    part.copy_from_slice(&self.unpacked(io, entry).await?[from..from + part.len()]);
                }
            }
            at += run.length;
        }
        Ok(())
    }

    pub(crate) async fn block_status(
        &self,
        next: &mut Next<'_>,
        request: &BlockStatusRequest<'_>,
    ) -> Result<()> {
        self.check_range(request.range())?;
        if request.length() == 0 {
            return Err(Error::invalid("a block status of nothing"));
        }
        let answer = self.status_checked(next, request).await;
        request.answer(self.judge(&mut Io::Next(next), answer).await?);
        Ok(())
    }

    async fn status_checked(
        &self,
        next: &mut Next<'_>,
        request: &BlockStatusRequest<'_>,
    ) -> Result<BlockStatus> {
        let (range, flags) = (request.range(), request.flags());
        let _pin = self.epoch.pin();
        let mut answer: Option<BlockStatus> = None;
        let (mut at, length) = (0, range.end - range.start);
        while at < length {
            let start = range.start + at;
            let Some(run) = self.look(start, length - at, false)? else {
                // What is known already is an answer.
                if answer.is_some() {
                    break;
                }
                Box::pin(self.load(&mut Io::Next(next), start)).await?;
                continue;
            };
            let extent = self.extent(next, start, run, flags).await?;
            match &mut answer {
                None => answer = Some(extent),
                Some(before) if joins(before, &extent) => before.length += extent.length,
                Some(_) => break,
            }
            at += extent.length;
        }
        Ok(answer.expect("a range that is not empty has a first extent"))
    }

    /// The extent that a run begins with.
    async fn extent(&self, next: &mut Next<'_>, start: u64, run: Run, flags: u32) -> Result<BlockStatus> {
        let mut own = BlockStatus { depth: 1, length: run.length, ..BlockStatus::default() };
        if matches!(run.mapping, Mapping::Data { .. }) && flags & flag::PRECISE != 0 {
            let file = self.data();
            // What lies behind the end of the file reads as zeroes, and cannot be asked for.
            let inside = file.end().saturating_sub(run.host).min(run.length);
            let zero = BlockStatus { flags: status::ZERO, ..own };
            if inside == 0 {
                return Ok(zero);
            }
            let found = next.status_with(file.child, run.host..run.host + inside, flags).await?;
            own.length = found.length.clamp(1, inside);
            if found.flags & status::ZERO != 0 {
                return Ok(BlockStatus { length: own.length, ..zero });
            }
        }
        Ok(match run.mapping {
            // A place in another file is none in ours.
            Mapping::Data { .. } if self.data_file.is_some() => BlockStatus { flags: status::DATA, ..own },
            Mapping::Data { .. } => {
                BlockStatus { flags: status::DATA | status::MAPPED, map: run.host, ..own }
            }
            Mapping::Zero { .. } => BlockStatus { flags: status::ZERO, ..own },
            Mapping::Compressed(_) => BlockStatus { flags: status::DATA | status::COMPRESSED, ..own },
            Mapping::Unallocated => {
                let inside = self.in_backing(&Io::Next(next), start..start + run.length);
                if inside == 0 {
                    // A backing that is too short decides that here are zeroes: it hides what is below it.
                    let depth = if next.children() > self.backing() { 2 } else { 0 };
                    return Ok(BlockStatus { flags: status::ZERO, depth, ..own });
                }
                let below = next.status_with(self.backing(), start..start + inside, flags).await?;
                BlockStatus {
                    // The map is about another file than ours.
                    flags: below.flags & !status::MAPPED,
                    depth: below.depth + u32::from(below.depth > 0),
                    length: below.length.clamp(1, inside),
                    ..own
                }
            }
        })
    }
}

/// Is `after` more of what `before` is?
fn joins(before: &BlockStatus, after: &BlockStatus) -> bool {
    (before.flags, before.depth) == (after.flags, after.depth)
        && (before.flags & status::MAPPED == 0 || before.map + before.length == after.map)
}

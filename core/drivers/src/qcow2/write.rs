//! Writes: in place where that is possible, else to clusters that are allocated for them.

use super::{
    Qcow2, event,
    io::{FILE, Io},
    layout::{COPIED, Entry, Mapping},
    meta::Taken,
    sparse,
};
use driveline_op::{FlushRequest, Next, Result, WriteRequest, flag};
use std::ops::Range;

/// Up to so many bytes are copied together with what surrounds them, to be one write.
pub(crate) const MERGE_BYTES_MAX: u64 = 64 << 10;

/// What is written.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Payload<'a> {
    /// Data of a request, from so many bytes after its beginning.
    Of(&'a WriteRequest<'a>, u64),
    /// Bytes of our own, from so many after their beginning.
    Bytes(&'a [u8], u64),
    Zeroes,
}

impl Payload<'_> {
    /// What comes after so many bytes more.
    fn skip(self, bytes: u64) -> Self {
        match self {
            Payload::Of(request, at) => Payload::Of(request, at + bytes),
            Payload::Bytes(data, at) => Payload::Bytes(data, at + bytes),
            Payload::Zeroes => Payload::Zeroes,
        }
    }

    /// Are these bytes of it zeroes? Those that are not mostly show it in the first of them.
    fn is_zero(self, range: Range<u64>) -> bool {
        let mut block = [0_u8; sparse::BLOCK_BYTES as usize];
        let block = &mut block[..(range.end - range.start) as usize];
        let first = block.len().min(64);
        let mut any = |from: usize, to: usize| {
            self.skip(range.start + from as u64).copy_to(&mut block[from..to]);
            // One OR over all: the compiler makes wide instructions of it.
            block[from..to].iter().fold(0, |all, byte| all | byte) != 0
        };
        let length = (range.end - range.start) as usize;
        !any(0, first) && !any(first, length)
    }

    pub(crate) fn copy_to(self, data: &mut [u8]) {
        match self {
            Payload::Bytes(bytes, at) => data.copy_from_slice(&bytes[at as usize..][..data.len()]),
            Payload::Of(request, at) => request.copy_to(at, data),
            Payload::Zeroes => data.fill(0),
        }
    }
}

/// Where a stretch of guest clusters is going to be.
struct Place<'a> {
    taken: Option<Taken<'a>>,
    host: u64,
    clusters: u64,
    /// Nothing was ever written there, so it reads as zeroes.
    fresh: bool,
}

impl Qcow2 {
    pub(crate) async fn flush(&self, next: &mut Next<'_>, request: &FlushRequest<'_>) -> Result<()> {
        if self.is_clean() && self.data_file.is_none() {
            return next.flush(request).await;
        }
        Box::pin(self.flush_all(&mut Io::Next(next))).await
    }

    pub(crate) async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        self.check_writable()?;
        self.check_range(request.range())?;
        if self.bitmaps_need_flags() {
            Box::pin(self.flag_bitmaps(&mut Io::Next(next))).await?;
        }
        let compresses = request.flags() & flag::COMPRESSED != 0 && !self.geometry.data_file;
        let written = if compresses {
            Box::pin(self.write_compressing(&mut Io::Next(next), request)).await
        } else {
            self.write_checked(next, request).await
        };
        self.judge(&mut Io::Next(next), written).await
    }

    #[inline]
    async fn write_checked(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        let durable = request.flags() & flag::FUA != 0;
        // If the map is durable, the file's own FUA is enough for what is written in place. It is asked again in the end: what
        // others linked meanwhile may be what ours lies in.
        let mut flush = durable && !self.is_clean();
        // Data of ours that does not change for our reader does change for the file's.
        let flags = if flush { 0 } else { request.flags() & flag::FUA };
        {
            let _pin = self.epoch.pin();
            let (mut at, length) = (0, request.length());
            while at < length {
                let start = request.offset() + at;
                let Some(run) = self.look(start, length - at, true)? else {
                    Box::pin(self.load(&mut Io::Next(next), start)).await?;
                    continue;
                };
                if let Mapping::Data { copied: true, .. } = run.mapping {
                    let child = self.data().child;
                    Io::Next(next).tell(child, event::WRITE_AIO).await;
                    // A foreign image may map what lies behind the end of its file.
                    self.data().touch(run.host + run.length);
                    if run.length == length {
                        next.child(child)
                            .write(&request.at(run.host).with_flags(flags).with_scope(0))
                            .await?;
                    } else {
                        let memory = request.part(at..at + run.length);
                        next.child(child).write(&memory.write_request(run.host, flags)).await?;
                    }
                    self.data().grown(run.host + run.length);
                    at += run.length;
                } else {
                    let payload = Payload::Of(request, at);
                    at += Box::pin(self.allocate(&mut Io::Next(next), payload, start, run.length)).await?;
                    flush |= durable;
                }
            }
        }
        if flush || durable && !self.is_clean() {
            Box::pin(self.flush_all(&mut Io::Next(next))).await
        } else {
            Ok(())
        }
    }

    /// Writes zeroes as data.
    pub(crate) async fn write_plain_zeroes(&self, io: &mut Io<'_, '_>, range: Range<u64>) -> Result<()> {
        self.write_plain(io, Payload::Zeroes, range).await
    }

    /// Writes what comes from no request.
    pub(crate) async fn write_plain(
        &self,
        io: &mut Io<'_, '_>,
        payload: Payload<'_>,
        range: Range<u64>,
    ) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let Some(run) = self.look(at, range.end - at, true)? else {
                self.load(io, at).await?;
                continue;
            };
            at += if let Mapping::Data { copied: true, .. } = run.mapping {
                self.put(io, payload.skip(at - range.start), run.host, run.length).await?;
                run.length
            } else {
                self.allocate(io, payload.skip(at - range.start), at, run.length).await?
            };
        }
        Ok(())
    }

    /// Writes to clusters that cannot be written in place. Returns how many bytes it did, perhaps none.
    async fn allocate(
        &self,
        io: &mut Io<'_, '_>,
        payload: Payload<'_>,
        offset: u64,
        length: u64,
    ) -> Result<u64> {
        let geometry = self.geometry;
        if geometry.extended_l2 {
            return self.allocate_subclusters(io, payload, offset, length).await;
        }
        let start = geometry.align_down(offset);
        let slice_end = (offset / geometry.slice_coverage() + 1).saturating_mul(geometry.slice_coverage());
        let end = geometry.align_up(offset + length).min(slice_end);
        let _held = self.ranges.hold(start..end).await;
        let Some(place) = self.place(io, start..end).await? else { return Ok(0) };

        let end = start + place.clusters * geometry.cluster_bytes();
        let length = length.min(end - offset);
        // A data file is as long as the disk, so that it can be read as the disk.
        let end = if geometry.data_file { end.min(self.size_bytes()).max(offset + length) } else { end };
        let (head, tail) = (start..offset, offset + length..end);
        let skip = |range: &Range<u64>, zero: bool| range.is_empty() || zero && place.fresh;
        let skip_head = skip(&head, self.old_is_zero(io, &head).await?);
        let skip_tail = skip(&tail, self.old_is_zero(io, &tail).await?);
        let at = |guest: u64| place.host + (guest - start);
        if (!skip_head || !skip_tail) && length <= MERGE_BYTES_MAX {
            let from = if skip_head { offset } else { start };
            let to = if skip_tail { offset + length } else { end };
            let mut buffer = vec![0; (to - from) as usize];
            let (before, rest) = buffer.split_at_mut((offset - from) as usize);
            let (data, after) = rest.split_at_mut(length as usize);
            io.tell(FILE, event::COW_READ).await;
            self.read_old(io, from, before).await?;
            payload.copy_to(data);
            self.read_old(io, offset + length, after).await?;
            io.tell(self.data().child, event::WRITE_AIO).await;
            self.data().write(io, at(from), &buffer).await?;
        } else {
            for (range, skip) in [(head, skip_head), (tail, skip_tail)] {
                if !skip {
                    let mut buffer = vec![0; (range.end - range.start) as usize];
                    io.tell(FILE, event::COW_READ).await;
                    self.read_old(io, range.start, &mut buffer).await?;
                    io.tell(self.data().child, event::COW_WRITE).await;
                    self.data().write(io, at(range.start), &buffer).await?;
                }
            }
            if place.fresh && length > sparse::BLOCK_BYTES {
                for run in sparse::runs(length, |block| payload.is_zero(block)) {
                    let length = run.end - run.start;
                    self.put(io, payload.skip(run.start), at(offset + run.start), length).await?;
                }
            } else {
                self.put(io, payload, at(offset), length).await?;
            }
        }
        self.link(io, start, place).await?;
        Ok(length)
    }

    /// Finds room for guest clusters, the first of them at least. `None`: they may be written in place by now.
    async fn place(&self, io: &mut Io<'_, '_>, range: Range<u64>) -> Result<Option<Place<'_>>> {
        let cluster_bytes = self.geometry.cluster_bytes();
        let count = ((range.end - range.start) / cluster_bytes) as usize;
        let mut meta = self.lock(io).await?;
        let mappings = loop {
            let (slice, first) = self.own_slice(&mut meta, io, range.start).await?;
            let map = self.map.lock();
            let Some(entries) = map.some(slice, first..first + count) else { continue };
            let mappings = entries.into_iter().map(|entry| self.geometry.mapping(entry.word));
            break mappings.collect::<Result<Vec<_>>>()?;
        };
        if self.geometry.data_file {
            // Each guest cluster has its place.
            let needs = |mapping: &&Mapping| !matches!(mapping, Mapping::Data { copied: true, .. });
            let clusters = mappings.iter().take_while(needs).count() as u64;
            let fresh = range.start >= self.data().touched();
            return Ok((clusters > 0).then_some(Place { taken: None, host: range.start, clusters, fresh }));
        }
        match mappings[0] {
            Mapping::Data { copied: true, .. } => Ok(None),
            // Room that was kept, and follows each other.
            Mapping::Zero { host, copied: true } if host != 0 => {
                let same = |(i, mapping): &(usize, &Mapping)| {
                    **mapping == Mapping::Zero { host: host + *i as u64 * cluster_bytes, copied: true }
                };
                let clusters = mappings.iter().enumerate().take_while(same).count() as u64;
                self.map.lock().check_data(host..host + clusters * cluster_bytes)?;
                Ok(Some(Place { taken: None, host, clusters, fresh: false }))
            }
            _ => {
                let needs = |mapping: &&Mapping| match mapping {
                    Mapping::Data { copied, .. } => !copied,
                    Mapping::Zero { host, copied } => *host == 0 || !copied,
                    _ => true,
                };
                let wanted = mappings.iter().take_while(needs).count() as u64;
                let taken = self.take(&mut meta, io, wanted, true).await?;
                let host = taken.clusters.start * cluster_bytes;
                let clusters = taken.clusters.end - taken.clusters.start;
                let fresh = host >= self.data().touched();
                Ok(Some(Place { taken: Some(taken), host, clusters, fresh }))
            }
        }
    }

    /// Does all of a range inside one cluster read as zeroes now?
    async fn old_is_zero(&self, io: &mut Io<'_, '_>, range: &Range<u64>) -> Result<bool> {
        if range.is_empty() {
            return Ok(true);
        }
        loop {
            let Some(run) = self.look(range.start, range.end - range.start, false)? else {
                self.load(io, range.start).await?;
                continue;
            };
            return Ok(match run.mapping {
                Mapping::Zero { .. } => true,
                Mapping::Unallocated => self.in_backing(io, range.clone()) == 0,
                _ => false,
            });
        }
    }

    pub(crate) async fn put(
        &self,
        io: &mut Io<'_, '_>,
        payload: Payload<'_>,
        host: u64,
        length: u64,
    ) -> Result<()> {
        io.tell(self.data().child, event::WRITE_AIO).await;
        match (payload, io) {
            (Payload::Of(request, at), Io::Next(next)) => {
                self.data().touch(host + length);
                let memory = request.part(at..at + length);
                next.child(self.data().child).write(&memory.write_request(host, 0)).await?;
                self.data().grown(host + length);
                Ok(())
            }
            (Payload::Of(..), Io::Edges(_)) => unreachable!("requests come through Next"),
            (Payload::Bytes(bytes, at), io) => {
                self.data().write(io, host, &bytes[at as usize..][..length as usize]).await
            }
            (Payload::Zeroes, io) => self.data().zero(io, host..host + length).await,
        }
    }

    /// Lets the map point to where the data was written.
    async fn link(&self, io: &mut Io<'_, '_>, start: u64, place: Place<'_>) -> Result<()> {
        let mut meta = self.lock(io).await?;
        let bits = self.geometry.cluster_bits;
        let entry = |i, _| Ok(Entry::of((place.host + ((i as u64) << bits)) | COPIED));
        self.remap(&mut meta, io, start, place.clusters as usize, false, entry).await?;
        if let Some(taken) = place.taken {
            taken.keep();
        }
        self.trim(&mut meta, io).await?;
        if self.much_given_up(&meta) { self.flush_locked(&mut meta, io).await } else { Ok(()) }
    }
}

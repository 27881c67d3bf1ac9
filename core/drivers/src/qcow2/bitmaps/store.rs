//! Another set of bitmaps, in one step.
//!
//! Everything new is written to clusters that were free: bits, tables, the directory. A flush makes that durable, with
//! its refcounts. Then one write of the header makes it the image's, and another flush that for good. Only now the old
//! clusters are given up.

use super::{
    Place, Stored,
    codec::{self, Entry, flags},
    survey::joined,
};
use crate::qcow2::{
    Qcow2,
    header::{AUTOCLEAR_BITMAPS, EXT_BITMAPS, EXT_FEATURES, Extension, Header},
    io::Io,
    layout::encode_words,
    meta::{Meta, Taken},
};
use driveline_bitmap::BitmapName;
use driveline_graph::{BitmapToStore, Error, Kind, Result};
use std::{collections::HashSet, sync::atomic::Ordering::Release};

/// So many bytes of bits are written at once.
const WRITE_BYTES_MAX: u64 = 1 << 20;
/// What is written to the header at once, whatever happens meanwhile.
const SECTOR_BYTES: usize = 512;

fn invalid(bitmap: &BitmapToStore<'_>, why: impl std::fmt::Display) -> Error {
    Error::new(Kind::Invalid, format_args!("bitmap '{}' cannot be stored in the image: {why}", bitmap.name))
}

impl Qcow2 {
    /// Makes a set of bitmaps the image's.
    pub(crate) async fn store_bitmaps(
        &self,
        io: &mut Io<'_, '_>,
        bitmaps: &[BitmapToStore<'_>],
    ) -> Result<()> {
        self.check_writable()?;
        self.check_bitmaps(bitmaps)?;
        let mut meta = self.lock(io).await?;
        let has_extension = self.header.lock().extensions.iter().any(|e| e.kind == EXT_BITMAPS);
        if bitmaps.is_empty() && !has_extension {
            return Ok(());
        }
        let mut taken = Vec::new();
        let mut stored = Vec::new();
        for bitmap in bitmaps {
            stored.push(self.write_bitmap(&mut meta, io, bitmap, &mut taken).await?);
        }
        let place = self.write_directory(&mut meta, io, &stored, &mut taken).await?;
        // What the bitmaps say was written is durable before them, and so is what points to nothing yet.
        self.flush_locked(&mut meta, io).await?;
        let header = changed(&self.header.lock(), place.as_ref());
        header.encode()?;
        self.change_header(io, |old| *old = header).await?;
        taken.into_iter().for_each(Taken::keep);
        self.adopt_bitmaps(&mut meta, io, place, stored).await;
        Ok(())
    }

    /// Uses what the header points to by now, and gives up what it pointed to before.
    async fn adopt_bitmaps(
        &self,
        meta: &mut Meta,
        io: &mut Io<'_, '_>,
        place: Option<Place>,
        stored: Vec<Stored>,
    ) {
        let old = {
            let mut state = self.bitmaps.state.lock();
            let kept: HashSet<u64> = stored.iter().map(|stored| stored.entry.table_offset).collect();
            let gone = state.stored.iter().filter(|old| !kept.contains(&old.entry.table_offset));
            let directory = state.place.iter().map(|place| place.range(&self.geometry));
            let old: Vec<_> = gone.flat_map(|old| old.clusters.clone()).chain(directory).collect();
            *state = super::State { place, stored, surveyed: true, ..super::State::default() };
            old
        };
        self.bitmaps.unwritten.store(true, Release);
        self.protect_bitmaps();
        let bits = self.geometry.cluster_bits;
        for range in joined(old) {
            for cluster in range.start >> bits..range.end >> bits {
                // A damaged image may have the directory where something else is.
                if self.map.lock().is_table(cluster << bits) {
                    continue;
                }
                if let Err(error) = meta.refcounts.lower(&self.file, io, cluster).await {
                    tracing::warn!(%error, cluster, "a cluster of an old bitmap stays allocated");
                }
            }
        }
        if let Err(error) = meta.refcounts.write(&self.file, io).await {
            tracing::warn!(%error, "refcounts are written later");
        }
    }

    /// Can this set be stored? Says why not.
    fn check_bitmaps(&self, bitmaps: &[BitmapToStore<'_>]) -> Result<()> {
        if bitmaps.is_empty() {
            return Ok(());
        }
        if self.geometry.version < 3 {
            return Err(Error::new(
                Kind::NotSupported,
                "a version 2 image cannot hold bitmaps; 'qemu-img amend -o compat=1.1' makes it version 3",
            ));
        }
        let size_bytes = self.size_bytes();
        if size_bytes == 0 || !size_bytes.is_multiple_of(512) {
            return Err(Error::new(
                Kind::NotSupported,
                format_args!(
                    "a disk of {size_bytes} bytes cannot have bitmaps in its image; expected a multiple of 512"
                ),
            ));
        }
        if bitmaps.len() > codec::BITMAPS_MAX {
            let text =
                format_args!("{} bitmaps; an image holds {} at most", bitmaps.len(), codec::BITMAPS_MAX);
            return Err(Error::new(Kind::Invalid, text));
        }
        let mut names = HashSet::new();
        for bitmap in bitmaps {
            BitmapName::new(bitmap.name)?;
            if bitmap.name.contains('\0') {
                return Err(invalid(bitmap, "its name contains a zero byte"));
            }
            if !names.insert(bitmap.name) {
                return Err(invalid(bitmap, "another one of the set has that name"));
            }
            if let Some(bits) = bitmap.bits
                && (bits.granularity() != bitmap.granularity || bits.length() != size_bytes)
            {
                let (granularity, length) = (bits.granularity(), bits.length());
                return Err(invalid(
                    bitmap,
                    format_args!(
                        "it has {length} bytes in granules of {granularity}, expected {size_bytes} in granules of {}",
                        bitmap.granularity
                    ),
                ));
            }
            let bytes = size_bytes.div_ceil(bitmap.granularity.bytes()).div_ceil(8);
            if bytes > codec::BITS_BYTES_MAX {
                return Err(invalid(
                    bitmap,
                    format_args!(
                        "at a granularity of {} it has {bytes} bytes, expected {} at most",
                        bitmap.granularity,
                        codec::BITS_BYTES_MAX
                    ),
                ));
            }
        }
        Ok(())
    }

    /// Writes bits and table of one bitmap; or finds that what the image holds of it is to stay.
    async fn write_bitmap<'a>(
        &'a self,
        meta: &mut Meta,
        io: &mut Io<'_, '_>,
        bitmap: &BitmapToStore<'_>,
        taken: &mut Vec<Taken<'a>>,
    ) -> Result<Stored> {
        let in_use = if bitmap.in_use { flags::IN_USE } else { 0 };
        let auto = if bitmap.recording { flags::AUTO } else { 0 };
        let mut entry = Entry::new(bitmap.name, bitmap.granularity, in_use | auto);
        let mut fault = None;
        {
            let state = self.bitmaps.state.lock();
            if let Some(old) = state.find(bitmap.name) {
                if old.entry.has(flags::EXTRA_COMPATIBLE) {
                    entry.flags |= flags::EXTRA_COMPATIBLE;
                    entry.extra = old.entry.extra.clone();
                }
                let same = !old.clusters.is_empty() && old.entry.granularity_bits == entry.granularity_bits;
                if bitmap.bits.is_none() && same && (bitmap.in_use || self.why_not(old).is_none()) {
                    entry.table_offset = old.entry.table_offset;
                    entry.table_entries = old.entry.table_entries;
                    return Ok(Stored { entry, fault: old.fault.clone(), clusters: old.clusters.clone() });
                }
            }
        }
        if bitmap.bits.is_none() {
            if !bitmap.in_use {
                return Err(invalid(bitmap, "the image has no contents of it, and none are given"));
            }
            fault = Some("its contents were never stored".to_owned());
        }
        let (words, mut clusters) = self.write_bits(meta, io, bitmap, taken).await?;
        let cluster_bytes = self.geometry.cluster_bytes();
        let table = self.take(meta, io, (words.len() as u64 * 8).div_ceil(cluster_bytes), false).await?;
        let range = table.clusters.start * cluster_bytes..table.clusters.end * cluster_bytes;
        taken.push(table);
        let mut bytes = vec![0; (range.end - range.start) as usize];
        encode_words(&words, &mut bytes);
        self.file.write(io, range.start, &bytes).await?;
        entry.table_offset = range.start;
        entry.table_entries = words.len() as u32;
        clusters.push(range);
        Ok(Stored { entry, fault, clusters: joined(clusters) })
    }

    /// Writes the bits of a bitmap. Returns its table, and where the bits are.
    async fn write_bits<'a>(
        &'a self,
        meta: &mut Meta,
        io: &mut Io<'_, '_>,
        bitmap: &BitmapToStore<'_>,
        taken: &mut Vec<Taken<'a>>,
    ) -> Result<(Vec<u64>, Vec<std::ops::Range<u64>>)> {
        let size_bytes = self.size_bytes();
        let entries = codec::table_entries(&self.geometry, size_bytes, bitmap.granularity);
        let mut words = vec![0; entries as usize];
        let mut ranges = Vec::new();
        let Some(bits) = bitmap.bits else { return Ok((words, ranges)) };
        let coverage = codec::coverage(&self.geometry, bitmap.granularity);
        let covered = |i: usize| {
            let start = i as u64 * coverage;
            start..start.saturating_add(coverage).min(size_bytes)
        };
        let mut mixed = Vec::new();
        for (i, word) in words.iter_mut().enumerate() {
            let range = covered(i);
            let whole = range.end - range.start == coverage;
            match codec::uniform(bits, range, whole) {
                Some(uniform) => *word = uniform,
                None => mixed.push(i),
            }
        }
        let cluster_bytes = self.geometry.cluster_bytes();
        let at_once = (WRITE_BYTES_MAX / cluster_bytes).max(1);
        let mut rest = &mixed[..];
        while !rest.is_empty() {
            let run = self.take(meta, io, at_once.min(rest.len() as u64), true).await?;
            let range = run.clusters.start * cluster_bytes..run.clusters.end * cluster_bytes;
            let (now, later) = rest.split_at((run.clusters.end - run.clusters.start) as usize);
            taken.push(run);
            let mut bytes = vec![0; (range.end - range.start) as usize];
            for ((&i, into), offset) in now
                .iter()
                .zip(bytes.chunks_mut(cluster_bytes as usize))
                .zip((range.start..).step_by(cluster_bytes as usize))
            {
                codec::encode_bits(bits, covered(i), into);
                words[i] = offset;
            }
            self.file.write(io, range.start, &bytes).await?;
            ranges.push(range);
            rest = later;
        }
        Ok((words, ranges))
    }

    /// Writes the directory of a set.
    async fn write_directory<'a>(
        &'a self,
        meta: &mut Meta,
        io: &mut Io<'_, '_>,
        stored: &[Stored],
        taken: &mut Vec<Taken<'a>>,
    ) -> Result<Option<Place>> {
        if stored.is_empty() {
            return Ok(None);
        }
        let mut bytes = codec::encode_directory(stored.iter().map(|stored| &stored.entry));
        let length = bytes.len() as u64;
        if length > codec::DIRECTORY_BYTES_MAX {
            let text = format_args!(
                "a bitmap directory of {length} bytes; the limit is {}",
                codec::DIRECTORY_BYTES_MAX
            );
            return Err(Error::new(Kind::Invalid, text));
        }
        let cluster_bytes = self.geometry.cluster_bytes();
        let directory = self.take(meta, io, length.div_ceil(cluster_bytes), false).await?;
        let offset = directory.clusters.start * cluster_bytes;
        taken.push(directory);
        bytes.resize(length.next_multiple_of(cluster_bytes) as usize, 0);
        self.file.write(io, offset, &bytes).await?;
        Ok(Some(Place { bitmaps: stored.len() as u32, bytes: length, offset }))
    }
}

/// The header with another directory, or without one.
///
/// With the extension all that follows it moves, so a header of more than a sector could be found half old, half new.
/// The names of features are a service; without them it fits a sector.
fn changed(header: &Header, place: Option<&Place>) -> Header {
    let mut header = header.clone();
    header.extensions.retain(|e| e.kind != EXT_BITMAPS);
    header.autoclear &= !AUTOCLEAR_BITMAPS;
    if let Some(place) = place {
        header.extensions.push(Extension { kind: EXT_BITMAPS, data: place.encode() });
        header.autoclear |= AUTOCLEAR_BITMAPS;
    }
    let bytes = header.encode().map(|bytes| bytes.len());
    if !matches!(bytes, Ok(0..=SECTOR_BYTES)) {
        let mut short = header.clone();
        short.extensions.retain(|e| e.kind != EXT_FEATURES);
        if short.encode().is_ok_and(|short| short.len() <= SECTOR_BYTES || bytes.is_err()) {
            return short;
        }
    }
    header
}

//! Writing compressed clusters: packed one after the other into host clusters, which then count each of them.

use super::{
    Qcow2, event,
    header::Compression,
    io::{FILE, Io},
    layout::{COMPRESSED, Entry, Geometry},
    meta::{Meta, Taken},
    write::Payload,
};
use driveline_graph::{Error, Kind, Result};
use std::{io::Write, ops::Range};

/// Packs a cluster. `None`: it would not become smaller.
pub(crate) fn pack(compression: Compression, data: &[u8]) -> std::io::Result<Option<Vec<u8>>> {
    let packed = match compression {
        Compression::Zlib => {
            let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
            encoder.write_all(data)?;
            encoder.finish()?
        }
        Compression::Zstd => zstd::bulk::compress(data, zstd::DEFAULT_COMPRESSION_LEVEL)?,
    };
    Ok((packed.len() < data.len()).then_some(packed))
}

impl Geometry {
    /// The L2 entry of a compressed cluster; `None`: it is too far from the file's beginning.
    fn compressed_entry(&self, area: Range<u64>) -> Option<u64> {
        let shift = 62 - (self.cluster_bits - 8);
        let further = (area.end - 1) / 512 - area.start / 512;
        (area.end <= 1 << shift.min(56)).then_some(COMPRESSED | further << shift | area.start)
    }
}

/// Where packed data is going to be.
struct Room<'a> {
    offset: u64,
    /// Each cluster that it touches counts once more.
    taken: Vec<Taken<'a>>,
}

impl Qcow2 {
    /// Writes one cluster compressed, if it becomes smaller by that: `offset` is where it begins, and `data` has its
    /// length, or ends where the disk ends. What was there before is given up. Called while nothing is in flight.
    pub(crate) async fn write_compressed(&self, io: &mut Io<'_, '_>, offset: u64, data: &[u8]) -> Result<()> {
        self.check_writable()?;
        if self.geometry.data_file {
            return Err(Error::new(
                Kind::NotSupported,
                "the image keeps its data in another file, where nothing is compressed",
            ));
        }
        let cluster_bytes = self.geometry.cluster_bytes();
        let end = offset.saturating_add(data.len() as u64);
        let whole = data.len() as u64 == cluster_bytes || end == self.size_bytes();
        if self.geometry.in_cluster(offset) != 0 || !whole || data.is_empty() || end > self.size_bytes() {
            return Err(Error::new(
                Kind::Invalid,
                format_args!(
                    "{} bytes at {offset}; expected a cluster of {cluster_bytes} bytes, or the last one of the disk",
                    data.len()
                ),
            ));
        }
        let mut cluster = data.to_vec();
        cluster.resize(cluster_bytes as usize, 0);
        let packed = pack(self.compression, &cluster).map_err(|error| {
            Error::new(Kind::Io, format_args!("compressing {} bytes: {error}", data.len()))
        })?;
        if self.bitmaps_need_flags() {
            self.flag_bitmaps(io).await?;
        }
        let written = match packed {
            Some(packed) => self.write_packed(io, offset, &packed).await,
            None => self.write_plain(io, Payload::Bytes(data, 0), offset..end).await,
        };
        Ok(self.judge(io, written).await?)
    }

    pub(crate) async fn write_packed(
        &self,
        io: &mut Io<'_, '_>,
        guest: u64,
        packed: &[u8],
    ) -> driveline_op::Result<()> {
        let cluster_bytes = self.geometry.cluster_bytes();
        let _held = self.ranges.hold(guest..guest + cluster_bytes).await;
        let mut meta = self.lock(io).await?;
        let length = packed.len() as u64;
        let Room { offset, taken } = self.room(&mut meta, io, length).await?;
        let entry = self.geometry.compressed_entry(offset..offset + length);
        let entry = entry
            .ok_or_else(|| driveline_op::Error::new(27, "compressed data is too far from the beginning"))?;
        io.tell(FILE, event::WRITE_COMPRESSED).await;
        self.file.write(io, offset, packed).await?;
        // Should it be the same entry as that of something else before.
        *self.unpacked.lock() = None;
        io.tell(FILE, event::L2_UPDATE_COMPRESSED).await;
        self.remap(&mut meta, io, guest, 1, false, |_, _| Ok(Entry::of(entry))).await?;
        taken.into_iter().for_each(Taken::keep);
        meta.packed_end = offset + length;
        self.trim(&mut meta, io).await?;
        if self.much_given_up(&meta) { self.flush_locked(&mut meta, io).await } else { Ok(()) }
    }

    /// Finds room for packed data: behind what was packed last, if there is enough of it, or if it goes on there.
    async fn room(
        &self,
        meta: &mut Meta,
        io: &mut Io<'_, '_>,
        length: u64,
    ) -> driveline_op::Result<Room<'_>> {
        let bits = self.geometry.cluster_bits;
        let begun = meta.packed_end;
        // At a cluster's beginning there is nothing left of the one before.
        let left = self.geometry.align_up(begun) - begun;
        if left >= length
            && let Some(shared) = self.share(meta, io, begun >> bits).await?
        {
            return Ok(Room { offset: begun, taken: vec![shared] });
        }
        let own = self.take(meta, io, 1, false).await?;
        let first = own.clusters.start;
        // Whoever was given up meanwhile may have been the last one there.
        if left > 0
            && meta.packed_end == begun
            && first == (begun >> bits) + 1
            && let Some(shared) = self.share(meta, io, begun >> bits).await?
        {
            return Ok(Room { offset: begun, taken: vec![shared, own] });
        }
        Ok(Room { offset: first << bits, taken: vec![own] })
    }

    /// Counts a cluster once more; `None` if that cannot be.
    async fn share(
        &self,
        meta: &mut Meta,
        io: &mut Io<'_, '_>,
        cluster: u64,
    ) -> driveline_op::Result<Option<Taken<'_>>> {
        let raised = meta.refcounts.raise(&self.file, io, cluster).await?;
        Ok(raised.then(|| self.taken(cluster..cluster + 1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_entry_of_packed_data_leads_back_to_it(
            cluster_bits in 9u32..=21, start in 1u64 << 21..1 << 40, length in 1u64..1 << 21
        ) {
            let geometry = Geometry {
                version: 3, cluster_bits, refcount_order: 4, extended_l2: false, data_file: false
            };
            let length = length.min(geometry.cluster_bytes() - 1);
            let entry = geometry.compressed_entry(start..start + length).unwrap();
            let (offset, bytes) = geometry.compressed(entry);
            prop_assert_eq!(offset, start);
            prop_assert!(bytes >= length && bytes < length + 512);
        }
    }
}

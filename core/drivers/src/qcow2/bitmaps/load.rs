//! What the image holds, for who asks.

use super::codec::{self, flags};
use crate::qcow2::{Qcow2, io::Io};
use driveline_bitmap::{BitmapName, Bits};
use driveline_graph::{BitmapLimits, Error, Kind, Result, StoredBitmap, StoredBitmaps};

impl Qcow2 {
    /// The bitmaps in the image.
    pub(crate) async fn stored_bitmaps(&self, io: &mut Io<'_, '_>) -> Result<StoredBitmaps> {
        self.survey(io).await?;
        let state = self.bitmaps.state.lock();
        let limits = BitmapLimits {
            bitmaps_max: if self.geometry.version < 3 { 0 } else { codec::BITMAPS_MAX as u64 },
            name_bytes_max: BitmapName::BYTES_MAX as u64,
            bits_bytes_max: codec::BITS_BYTES_MAX,
        };
        let bitmaps = state.stored.iter().map(|stored| StoredBitmap {
            name: String::from_utf8_lossy(&stored.entry.name).into_owned(),
            granularity: stored.entry.granularity(),
            recording: stored.entry.has(flags::AUTO),
            in_use: stored.entry.has(flags::IN_USE),
            inconsistent: self.why_not(stored),
            clusters: Self::count(&self.geometry, &stored.clusters),
        });
        Ok(StoredBitmaps {
            bitmaps: bitmaps.collect(),
            outdated: state.outdated,
            unreadable: state.unreadable.clone(),
            limits,
        })
    }

    /// Why the contents of a bitmap cannot be used.
    pub(super) fn why_not(&self, stored: &super::Stored) -> Option<String> {
        let size_fault = || stored.entry.size_fault(&self.geometry, self.size_bytes());
        stored.fault.clone().or_else(size_fault)
    }

    /// The contents of a bitmap.
    pub(crate) async fn load_bitmap(&self, io: &mut Io<'_, '_>, name: &str) -> Result<Bits> {
        self.survey(io).await?;
        let entry = {
            let state = self.bitmaps.state.lock();
            let stored = state.find(name).ok_or_else(|| not_found(name, &state))?;
            if let Some(why) = self.why_not(stored) {
                return Err(Error::new(
                    Kind::Corrupt,
                    format_args!("bitmap '{name}' of the image is inconsistent: {why}"),
                ));
            }
            stored.entry.clone()
        };
        let granularity = entry.granularity().expect("an entry without a fault has one");
        let mut bits = Bits::new(granularity, self.size_bytes());
        let coverage = codec::coverage(&self.geometry, granularity);
        let mut bytes = vec![0; self.geometry.cluster_bytes() as usize];
        let words = self.read_table(io, entry.table_offset, entry.table_entries).await?;
        for (start, word) in (0..).step_by(coverage as usize).zip(words) {
            let cluster = codec::cluster(word, &self.geometry).map_err(|why| {
                Error::new(Kind::Corrupt, format_args!("bitmap '{name}' of the image: {why}"))
            })?;
            match cluster {
                Some(offset) => {
                    self.file.read(io, offset, &mut bytes).await?;
                    codec::decode_bits(&bytes, start, &bits);
                }
                None if word == codec::ONES => bits.mark(start..start + coverage),
                None => {}
            }
        }
        bits.compact();
        Ok(bits)
    }
}

/// There is no bitmap of that name.
pub(super) fn not_found(name: &str, state: &super::State) -> Error {
    let present = state.stored.iter().map(|s| String::from_utf8_lossy(&s.entry.name).into_owned());
    driveline_bitmap::Error::NotFound { name: name.to_owned(), present: present.collect() }.into()
}

//! What persistent bitmaps use: their directory, their tables, and the bits.

use super::{Checker, Use};
use crate::qcow2::{
    bitmaps::codec::{self, Entry, Place},
    header::{AUTOCLEAR_BITMAPS, EXT_BITMAPS},
};
use driveline_graph::Result;

impl Checker<'_, '_, '_> {
    /// Counts them, in use or not. If somebody wrote who does not know bitmaps, as the header says, they use nothing.
    pub(super) async fn walk_bitmaps(&mut self) -> Result<()> {
        if self.header.autoclear & AUTOCLEAR_BITMAPS == 0 {
            return Ok(());
        }
        let extension = self.header.extensions.iter().find(|e| e.kind == EXT_BITMAPS);
        let Some(place) = extension.map(|e| Place::parse(&e.data, &self.geometry)) else { return Ok(()) };
        let place = match place {
            Ok(place) => place,
            Err(why) => {
                self.corruption(|| why);
                return Ok(());
            }
        };
        if self.count(place.offset, place.bytes, Use::Other, &"the directory of bitmaps").is_some() {
            return Ok(());
        }
        let mut directory = vec![0; place.bytes as usize];
        self.file.read(self.io, place.offset, &mut directory).await?;
        match codec::parse_directory(&directory, place.bitmaps) {
            Ok(entries) => {
                for entry in entries {
                    self.walk_bitmap(&entry).await?;
                }
            }
            Err(why) => self.corruption(|| why),
        }
        Ok(())
    }

    async fn walk_bitmap(&mut self, entry: &Entry) -> Result<()> {
        let what = format!("bitmap '{}'", String::from_utf8_lossy(&entry.name));
        if let Err(why) = entry.table(&self.geometry) {
            self.corruption(|| format!("{what}: {why}"));
            return Ok(());
        }
        let (table, bytes) = (entry.table_offset, u64::from(entry.table_entries) * 8);
        if self.count(table, bytes, Use::Other, &format_args!("the table of {what}")).is_some() {
            return Ok(());
        }
        for word in self.words(table, bytes).await? {
            match codec::cluster(word, &self.geometry) {
                Ok(Some(offset)) => {
                    let bytes = self.geometry.cluster_bytes();
                    self.count(offset, bytes, Use::Other, &format_args!("bits of {what}"));
                }
                Ok(None) => {}
                Err(why) => self.corruption(|| format!("{what}: {why}")),
            }
        }
        Ok(())
    }
}

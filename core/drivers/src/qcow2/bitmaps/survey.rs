//! Which clusters the bitmaps own. What two of them claim, or something else of the image, is nobody's.

use super::{Place, Stored, codec};
use crate::qcow2::{
    Qcow2,
    io::Io,
    layout::{Geometry, decode_words},
};
use driveline_op::Result;
use std::ops::Range;

/// Sorts ranges and joins those that touch.
pub(super) fn joined(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut out: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match out.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => out.push(range),
        }
    }
    out
}

/// Ranges with their owners, by number; `None` owns what is not a bitmap's.
type Claims = Vec<(Range<u64>, Option<usize>)>;

/// Who claims what somebody else claims, too.
fn disputed(mut claims: Claims) -> Vec<usize> {
    claims.sort_unstable_by_key(|(range, owner)| (range.start, *owner));
    let mut out = Vec::new();
    // Of those before, the one that reaches furthest.
    let mut furthest: Option<(u64, Option<usize>)> = None;
    for (range, owner) in claims {
        if let Some((end, before)) = furthest
            && range.start < end
        {
            out.extend(before);
            out.extend(owner);
        }
        if furthest.is_none_or(|(end, _)| end < range.end) {
            furthest = Some((range.end, owner));
        }
    }
    out.sort_unstable();
    out.dedup();
    out
}

fn fail(stored: &mut Stored, fault: String) {
    stored.clusters.clear();
    // What is wrong already was wrong before.
    stored.fault.get_or_insert(fault);
}

impl Qcow2 {
    /// Finds out which clusters the bitmaps own, once.
    pub(super) async fn survey(&self, io: &mut Io<'_, '_>) -> Result<()> {
        let (place, tables) = {
            let state = self.bitmaps.state.lock();
            let Some(place) = state.place.clone().filter(|_| !state.surveyed) else { return Ok(()) };
            (place, state.stored.iter().map(|stored| self.table(&stored.entry)).collect::<Vec<_>>())
        };
        let geometry = self.geometry;
        // Tables are read only where they are apart, so that together they are no more than the file.
        let others = self.header.lock().metadata().into_iter().chain([place.range(&geometry)]);
        let others: Claims = others.map(|range| (range, None)).collect();
        let claims = tables.iter().enumerate().filter_map(|(i, table)| Some((table.clone().ok()?, Some(i))));
        let overlapping = disputed(others.iter().cloned().chain(claims).collect());
        let mut found: Vec<Result<Vec<Range<u64>>, String>> = Vec::new();
        for (i, table) in tables.into_iter().enumerate() {
            found.push(match table {
                Ok(_) if overlapping.binary_search(&i).is_ok() => {
                    Err("its table is where something else is".into())
                }
                Ok(table) => self.read_clusters(io, i, table).await?,
                Err(fault) => Err(fault),
            });
        }
        let claims = found
            .iter()
            .enumerate()
            .flat_map(|(i, clusters)| clusters.iter().flatten().map(move |range| (range.clone(), Some(i))));
        let mut overlapping = disputed(others.iter().cloned().chain(claims).collect());
        {
            let map = self.map.lock();
            let taken =
                |range: &Range<u64>| self.clusters(range.clone()).any(|cluster| map.is_table(cluster));
            let claimed = found.iter().enumerate();
            overlapping
                .extend(claimed.filter(|(_, clusters)| clusters.iter().flatten().any(taken)).map(|(i, _)| i));
        }
        let mut state = self.bitmaps.state.lock();
        for (stored, clusters) in state.stored.iter_mut().zip(found) {
            match clusters {
                Ok(clusters) => stored.clusters = joined(clusters),
                Err(fault) => fail(stored, fault),
            }
        }
        for i in overlapping {
            fail(&mut state.stored[i], "its bits are where something else is".into());
        }
        state.surveyed = true;
        Ok(())
    }

    /// Where the table of an entry is, if it can be there.
    fn table(&self, entry: &codec::Entry) -> Result<Range<u64>, String> {
        let table = entry.table(&self.geometry)?;
        if table.end > self.geometry.align_up(self.file.end()) {
            return Err(format!("its table is at {table:x?}, behind the end of the file"));
        }
        Ok(table)
    }

    /// The clusters of a bitmap, its table first; or what is wrong with it.
    async fn read_clusters(
        &self,
        io: &mut Io<'_, '_>,
        number: usize,
        table: Range<u64>,
    ) -> Result<Result<Vec<Range<u64>>, String>> {
        let entries = self.bitmaps.state.lock().stored[number].entry.table_entries;
        let words = self.read_table(io, table.start, entries).await?;
        let mut out = vec![table];
        for word in words {
            match codec::cluster(word, &self.geometry) {
                Ok(Some(offset)) if offset >= self.file.end() => {
                    return Ok(Err(format!("its bits are at {offset:#x}, behind the end of the file")));
                }
                Ok(Some(offset)) => out.push(offset..offset + self.geometry.cluster_bytes()),
                Ok(None) => {}
                Err(fault) => return Ok(Err(fault)),
            }
        }
        Ok(Ok(out))
    }

    /// Reads a table.
    pub(super) async fn read_table(
        &self,
        io: &mut Io<'_, '_>,
        offset: u64,
        entries: u32,
    ) -> Result<Vec<u64>> {
        let mut bytes = vec![0; entries as usize * 8];
        self.file.read(io, offset, &mut bytes).await?;
        let mut words = vec![0; entries as usize];
        decode_words(&bytes, &mut words);
        Ok(words)
    }

    /// No write of data may come to where the bitmaps are from now on.
    pub(in crate::qcow2) fn protect_bitmaps(&self) {
        let state = self.bitmaps.state.lock();
        let clusters = state.stored.iter().flat_map(|stored| &stored.clusters);
        let directory = state.place.iter().map(|place: &Place| place.range(&self.geometry));
        let ranges = clusters.cloned().chain(directory);
        self.map.lock().protect_bitmaps(ranges.flat_map(|range| self.clusters(range)));
    }

    /// Where the clusters of a range begin.
    fn clusters(&self, range: Range<u64>) -> impl Iterator<Item = u64> + use<> {
        range.step_by(self.geometry.cluster_bytes() as usize)
    }

    /// Clusters that a bitmap owns.
    pub(super) fn count(geometry: &Geometry, clusters: &[Range<u64>]) -> u64 {
        clusters.iter().map(|range| range.end - range.start).sum::<u64>() >> geometry.cluster_bits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_overlaps_is_found_whatever_lies_between() {
        let of = |claims: &[(Range<u64>, Option<usize>)]| disputed(claims.to_vec());
        assert_eq!(of(&[(0..10, None), (10..20, Some(0)), (20..30, Some(1))]), [0; 0]);
        assert_eq!(of(&[(0..10, None), (9..20, Some(0)), (20..30, Some(1))]), [0]);
        // The long one reaches over the short one.
        assert_eq!(of(&[(0..100, Some(2)), (10..20, Some(0)), (90..120, Some(1))]), [0, 1, 2]);
        assert_eq!(of(&[(5..9, Some(4)), (5..9, Some(4))]), [4]);
    }
}

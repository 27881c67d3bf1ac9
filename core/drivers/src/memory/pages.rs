//! A sparse array of bytes: pages in maps behind several locks.

use driveline_op::{ReadRequest, WriteRequest};
use parking_lot::RwLock;
use std::{collections::HashMap, ops::Range};

const PAGE_BYTES: u64 = 16 << 10;
const SHARDS: u64 = 64;

/// Runs of this many pages are in one shard, so that a long request takes few locks and threads seldom meet.
const RUN_PAGES: u64 = 16;

type Page = Box<[u8]>;

/// The pages that hold anything. A page that is missing reads as zeroes.
pub(super) struct Pages([RwLock<HashMap<u64, Page>>; SHARDS as usize]);

impl Default for Pages {
    fn default() -> Self {
        Self(std::array::from_fn(|_| RwLock::default()))
    }
}

/// A page's part of a range.
struct Part {
    page: u64,
    /// In the page.
    bytes: Range<usize>,
    /// In the request.
    at: u64,
}

impl Part {
    fn is_whole(&self) -> bool {
        self.bytes.len() as u64 == PAGE_BYTES
    }
}

fn parts(range: Range<u64>) -> impl Iterator<Item = Part> {
    let pages =
        if range.is_empty() { 0..0 } else { range.start / PAGE_BYTES..range.end.div_ceil(PAGE_BYTES) };
    pages.map(move |page| {
        let first = page * PAGE_BYTES;
        let (start, end) = (range.start.max(first), range.end.min(first + PAGE_BYTES));
        Part { page, bytes: (start - first) as usize..(end - first) as usize, at: start - range.start }
    })
}

impl Pages {
    fn shard(&self, page: u64) -> &RwLock<HashMap<u64, Page>> {
        &self.0[(page / RUN_PAGES % SHARDS) as usize]
    }

    pub(super) fn read(&self, request: &ReadRequest<'_>) {
        for part in parts(request.range()) {
            match self.shard(part.page).read().get(&part.page) {
                Some(page) => request.fill(part.at, &page[part.bytes]),
                None => request.zero(part.at..part.at + part.bytes.len() as u64),
            }
        }
    }

    pub(super) fn write(&self, request: &WriteRequest<'_>) {
        for part in parts(request.range()) {
            let mut shard = self.shard(part.page).write();
            let page =
                shard.entry(part.page).or_insert_with(|| vec![0; PAGE_BYTES as usize].into_boxed_slice());
            request.copy_to(part.at, &mut page[part.bytes]);
        }
    }

    /// Is it less work to look at each page that there is than at each of so many that there could be?
    fn fewer_than(&self, pages: u64) -> bool {
        pages > RUN_PAGES * SHARDS && self.allocated_bytes() / PAGE_BYTES < pages
    }

    /// Makes a range read as zeroes. Whole pages go away.
    pub(super) fn zero(&self, range: Range<u64>) {
        if self.fewer_than(range.end.div_ceil(PAGE_BYTES) - range.start / PAGE_BYTES) {
            self.zero_of_held(&range);
            return;
        }
        for part in parts(range) {
            zero_part(&mut self.shard(part.page).write(), part);
        }
    }

    fn zero_of_held(&self, range: &Range<u64>) {
        for shard in &self.0 {
            shard.write().retain(|page, bytes| {
                let first = page * PAGE_BYTES;
                let (start, end) = (range.start.max(first), range.end.min(first + PAGE_BYTES));
                if start < end {
                    bytes[(start - first) as usize..(end - first) as usize].fill(0);
                }
                start >= end || end - start < PAGE_BYTES
            });
        }
    }

    /// Is there data at the beginning of the range, and for how many bytes is that so?
    pub(super) fn extent(&self, range: Range<u64>) -> (bool, u64) {
        let has = |page: u64| self.shard(page).read().contains_key(&page);
        let data = has(range.start / PAGE_BYTES);
        let last = range.end.div_ceil(PAGE_BYTES);
        let next = range.start / PAGE_BYTES + 1;
        let end = if !data && self.fewer_than(last.saturating_sub(next)) {
            let later = |shard: &RwLock<HashMap<u64, Page>>| {
                shard.read().keys().copied().filter(|page| *page >= next).min()
            };
            self.0.iter().filter_map(later).min().unwrap_or(last)
        } else {
            (next..last).find(|page| has(*page) != data).unwrap_or(last)
        };
        (data, (end * PAGE_BYTES).min(range.end) - range.start)
    }

    pub(super) fn allocated_bytes(&self) -> u64 {
        self.0.iter().map(|shard| shard.read().len() as u64 * PAGE_BYTES).sum()
    }
}

fn zero_part(shard: &mut HashMap<u64, Page>, part: Part) {
    if part.is_whole() {
        shard.remove(&part.page);
    } else if let Some(page) = shard.get_mut(&part.page) {
        page[part.bytes].fill(0);
    }
}

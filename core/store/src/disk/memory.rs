//! A disk in memory, for tests and fuzzers.

use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering};
use std::io;
use std::sync::Arc;

use rustix::io::Errno;

use super::{Disk, PAGE};
use crate::mapping::Words;

/// Bytes in memory, of which there are only so many: reserving more is a full disk.
#[derive(Debug)]
pub(crate) struct MemoryDisk {
    words: Arc<[AtomicU64]>,
    length: AtomicU64,
}

impl MemoryDisk {
    /// A disk with room for `capacity` bytes, whose file holds `bytes`.
    pub(crate) fn new(capacity: usize, bytes: &[u8]) -> Self {
        let words = capacity.max(bytes.len()).div_ceil(8);
        let words = core::iter::repeat_with(AtomicU64::default).take(words).collect();
        let disk = MemoryDisk { words, length: AtomicU64::new(bytes.len() as u64) };
        for (at, page) in (0..).step_by(PAGE).zip(bytes.chunks(PAGE)) {
            if page != &[0; PAGE][..page.len()] {
                disk.write_at(page, at).expect("it was made large enough");
            }
        }
        disk
    }

    /// All bytes of the file.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.length.load(Ordering::SeqCst) as usize];
        self.read_at(&mut bytes, 0).expect("memory can be read");
        bytes
    }

    fn room(&self, end: u64) -> io::Result<()> {
        match end <= self.words.len() as u64 * 8 {
            true => Ok(()),
            false => Err(Errno::NOSPC.into()),
        }
    }

    fn grow(&self, end: u64) -> io::Result<()> {
        self.room(end)?;
        self.length.fetch_max(end, Ordering::SeqCst);
        Ok(())
    }
}

impl Disk for MemoryDisk {
    fn length(&self) -> io::Result<u64> {
        Ok(self.length.load(Ordering::SeqCst))
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let end = self.length()?;
        let mut at = offset;
        let mut rest = buffer;
        while !rest.is_empty() {
            let skip = (at % 8) as usize;
            let count = rest.len().min(8 - skip);
            let word = if at < end { self.words[(at / 8) as usize].load(Ordering::SeqCst) } else { 0 };
            rest[..count].copy_from_slice(&word.to_ne_bytes()[skip..skip + count]);
            at += count as u64;
            rest = &mut rest[count..];
        }
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.grow(offset + data.len() as u64)?;
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let skip = (at % 8) as usize;
            let count = rest.len().min(8 - skip);
            let word = &self.words[(at / 8) as usize];
            let mut bytes = word.load(Ordering::SeqCst).to_ne_bytes();
            bytes[skip..skip + count].copy_from_slice(&rest[..count]);
            word.store(u64::from_ne_bytes(bytes), Ordering::SeqCst);
            at += count as u64;
            rest = &rest[count..];
        }
        Ok(())
    }

    fn reserve(&self, range: Range<u64>) -> io::Result<()> {
        self.grow(range.end)
    }

    fn release(&self, range: Range<u64>) -> io::Result<()> {
        let end = range.end.min(self.length()?).max(range.start);
        self.write_at(&vec![0; (end - range.start) as usize], range.start)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn map(&self, range: Range<u64>) -> io::Result<Words> {
        self.room(range.end)?;
        Ok(Words::of_memory(&self.words, (range.start / 8) as usize..(range.end / 8) as usize))
    }

    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        Ok(Some(range).filter(|range| range.start < range.end))
    }
}

//! A disk that fails when told to, and knows what a power cut may leave of it.

use core::fmt;
use core::ops::Range;
use std::collections::BTreeMap;
use std::io;

use parking_lot::Mutex;
use rand::Rng;
use rand::rngs::SmallRng;
use rustix::io::Errno;

use crate::disk::{Disk, memory::MemoryDisk};
use crate::mapping::Words;
use crate::region::ALIGN;

const SECTOR: usize = 512;

/// What is done to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Write,
    Reserve,
    Sync,
    Map,
}

/// Decides whether an operation at an offset fails.
pub(crate) type Rule = Box<dyn FnMut(Op, u64) -> Option<Errno> + Send>;
/// Looks on before and after each operation.
pub(crate) type Witness = Box<dyn FnMut(&TestDisk) + Send>;

/// A page cache in memory above a platter.
///
/// What is written, to the file or to a mapping, may reach the platter at any time before a sync, sector by sector and in any
/// order; a sync that succeeds brings it there. One that fails loses it, and takes it as clean, as Linux does: only what
/// is made dirty again is written by the next one.
pub(crate) struct TestDisk {
    pub(crate) memory: MemoryDisk,
    state: Mutex<State>,
    witness: Mutex<Option<Witness>>,
}

#[derive(Default)]
struct State {
    platter: Vec<u8>,
    /// What the page cache had when it was last looked at, by sector; what is not here is as on the platter.
    seen: BTreeMap<usize, Vec<u8>>,
    /// What each sector held since the last sync.
    versions: BTreeMap<usize, Vec<Vec<u8>>>,
    /// Sectors that a failed sync lost.
    lost: BTreeMap<usize, Vec<u8>>,
    mapped: Vec<Range<u64>>,
    rule: Option<Rule>,
    syncs: u64,
    failed: usize,
}

/// Bytes at the start of each mapping that tests use.
const WATCHED: u64 = 1024;

impl TestDisk {
    pub(crate) fn new(capacity: usize, bytes: &[u8]) -> Self {
        let state = State { platter: bytes.to_vec(), ..State::default() };
        let memory = MemoryDisk::new(capacity, bytes);
        TestDisk { memory, state: Mutex::new(state), witness: Mutex::new(None) }
    }

    /// From now on operations fail by this rule.
    pub(crate) fn set_rule(&self, rule: Option<Rule>) {
        self.state.lock().rule = rule;
    }

    pub(crate) fn set_witness(&self, witness: Option<Witness>) {
        *self.witness.lock() = witness;
    }

    /// How many syncs succeeded.
    pub(crate) fn syncs(&self) -> u64 {
        self.state.lock().syncs
    }

    /// What mappings hold now may reach the platter.
    pub(crate) fn write_back(&self) {
        let mapped = self.state.lock().mapped.clone();
        for range in mapped {
            self.look(range.start..range.end.min(range.start + WATCHED));
        }
    }

    /// What the platter may hold if power is cut now.
    pub(crate) fn after_power_cut(&self, random: &mut SmallRng) -> Vec<u8> {
        self.write_back();
        let state = self.state.lock();
        let mut bytes = state.platter.clone();
        let eager = [0.0, 0.5, 0.5, 0.9, 1.0][random.random_range(0..5)];
        for (sector, versions) in &state.versions {
            if random.random_bool(eager) {
                let version = match random.random_bool(0.5) {
                    true => versions.last().unwrap(),
                    false => &versions[random.random_range(0..versions.len())],
                };
                put(&mut bytes, *sector, version);
            }
        }
        bytes
    }

    fn look(&self, range: Range<u64>) {
        let start = range.start / SECTOR as u64 * SECTOR as u64;
        let mut bytes = vec![0; (range.end.next_multiple_of(SECTOR as u64) - start) as usize];
        self.memory.read_at(&mut bytes, start).unwrap();
        let state = &mut *self.state.lock();
        for (sector, now) in (start as usize / SECTOR..).zip(bytes.chunks_exact(SECTOR)) {
            let at = sector * SECTOR;
            let platter = state.platter.get(at..at + SECTOR);
            let same = match state.seen.get(&sector).or(state.lost.get(&sector)) {
                Some(seen) => seen == now,
                None => platter.map_or(now.iter().all(|&byte| byte == 0), |platter| platter == now),
            };
            if !same {
                state.seen.insert(sector, now.to_vec());
                state.versions.entry(sector).or_default().push(now.to_vec());
            }
        }
    }

    fn attempt(&self, op: Op, offset: u64) -> io::Result<()> {
        self.watch();
        let refused = self.state.lock().rule.as_mut().and_then(|rule| rule(op, offset));
        refused.map_or(Ok(()), |errno| Err(errno.into()))
    }

    fn watch(&self) {
        let witness = self.witness.lock().take();
        if let Some(mut witness) = witness {
            witness(self);
            self.witness.lock().get_or_insert(witness);
        }
    }
}

fn put(bytes: &mut Vec<u8>, sector: usize, data: &[u8]) {
    let end = (sector + 1) * SECTOR;
    if bytes.len() < end {
        bytes.resize(end, 0);
    }
    bytes[end - SECTOR..end].copy_from_slice(data);
}

impl fmt::Debug for TestDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TestDisk")
    }
}

impl Disk for TestDisk {
    fn length(&self) -> io::Result<u64> {
        self.memory.length()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.memory.read_at(buffer, offset)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        let attempt = self.attempt(Op::Write, offset);
        let done = {
            let state = &mut *self.state.lock();
            state.failed += usize::from(attempt.is_err());
            // A write that fails may have done a part of its work, up to all of it.
            let done = match attempt {
                Ok(()) => data.len(),
                Err(_) => [0, data.len() / 2 / SECTOR * SECTOR, data.len()][state.failed % 3],
            };
            for sector in offset as usize / SECTOR..(offset as usize + done).div_ceil(SECTOR) {
                state.lost.remove(&sector);
                state.seen.remove(&sector);
            }
            done
        };
        self.memory.write_at(&data[..done], offset)?;
        self.look(offset..offset + done as u64);
        self.watch();
        attempt
    }

    fn reserve(&self, range: Range<u64>) -> io::Result<()> {
        self.attempt(Op::Reserve, range.start)?;
        self.memory.reserve(range)
    }

    fn release(&self, range: Range<u64>) -> io::Result<()> {
        self.memory.release(range.clone())?;
        self.look(range);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let attempt = self.attempt(Op::Sync, 0);
        self.write_back();
        let state = &mut *self.state.lock();
        let seen = core::mem::take(&mut state.seen);
        if attempt.is_err() {
            // It may have been written or not: its versions stay. But nobody tries again.
            state.lost.extend(seen);
            return attempt;
        }
        let versions = core::mem::take(&mut state.versions);
        for (sector, versions) in versions {
            if state.lost.contains_key(&sector) && !seen.contains_key(&sector) {
                state.versions.insert(sector, versions);
                continue;
            }
            let mut now = vec![0; SECTOR];
            self.memory.read_at(&mut now, (sector * SECTOR) as u64)?;
            put(&mut state.platter, sector, &now);
            state.lost.remove(&sector);
        }
        state.syncs += 1;
        let length = self.memory.length()? as usize;
        if state.platter.len() < length {
            state.platter.resize(length, 0);
        }
        Ok(())
    }

    fn map(&self, range: Range<u64>) -> io::Result<Words> {
        self.attempt(Op::Map, range.start)?;
        self.state.lock().mapped.push(range.clone());
        self.memory.map(range)
    }

    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        // What tests do not watch stays zero.
        let start = range.start.is_multiple_of(ALIGN) && range.start < range.end;
        Ok(start.then(|| range.start..range.end.min(range.start + WATCHED)))
    }

    fn redirty(&self, _: &Words) {
        let state = &mut *self.state.lock();
        let mapped = &state.mapped;
        let is_mapped = |at: u64| mapped.iter().any(|mapped| mapped.contains(&at));
        state.lost.retain(|&sector, _| !is_mapped((sector * SECTOR) as u64));
    }
}

//! How often each host cluster is used, and as what.

use std::collections::BTreeMap;

/// Clusters that are counted together.
const CHUNK: u64 = 256;
const COUNT: u32 = (1 << 28) - 1;
const OVERFLOWN: u32 = 1 << 28;

/// What a cluster is used as; one that is an L2 table and something else is a contradiction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::qcow2) enum Use {
    Table = 1 << 29,
    Other = 1 << 30,
}

/// Counts of clusters. It takes memory for those that are used only, and a little around them.
#[derive(Debug, Default)]
pub(in crate::qcow2) struct Counts(BTreeMap<u64, Box<[u32]>>);

impl Counts {
    fn word(&self, cluster: u64) -> u32 {
        self.0.get(&(cluster / CHUNK)).map_or(0, |chunk| chunk[(cluster % CHUNK) as usize])
    }

    pub(in crate::qcow2) fn get(&self, cluster: u64) -> u64 {
        (self.word(cluster) & COUNT).into()
    }

    /// Counts a use. False if there would be more than `max`.
    pub(in crate::qcow2) fn add(&mut self, cluster: u64, max: u64, as_what: Use) -> bool {
        let chunk = self.0.entry(cluster / CHUNK).or_insert_with(|| vec![0; CHUNK as usize].into());
        let word = &mut chunk[(cluster % CHUNK) as usize];
        *word |= as_what as u32;
        if u64::from(*word & COUNT) >= max.min(COUNT.into()) {
            *word |= OVERFLOWN;
            return false;
        }
        *word += 1;
        true
    }

    /// Is it an L2 table and something else?
    pub(in crate::qcow2) fn contradictory(&self, cluster: u64) -> bool {
        contradicts(self.word(cluster))
    }

    /// Is any cluster?
    pub(in crate::qcow2) fn any_contradictory(&self) -> bool {
        self.0.values().any(|chunk| chunk.iter().any(|&word| contradicts(word)))
    }

    /// Is it used more often than can be counted?
    pub(in crate::qcow2) fn overflown(&self, cluster: u64) -> bool {
        self.word(cluster) & OVERFLOWN != 0
    }

    /// Clusters that are used, ascending, with their counts.
    pub(in crate::qcow2) fn used(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.0.iter().flat_map(|(number, chunk)| {
            let first = number * CHUNK;
            let used = chunk.iter().enumerate().filter(|(_, word)| **word & COUNT > 0);
            used.map(move |(i, word)| (first + i as u64, u64::from(word & COUNT)))
        })
    }

    /// The cluster after the last one that is used.
    pub(in crate::qcow2) fn end(&self) -> u64 {
        self.0.iter().next_back().map_or(0, |(number, chunk)| {
            let last = chunk.iter().rposition(|word| word & COUNT > 0);
            number * CHUNK + last.map_or(0, |last| last as u64 + 1)
        })
    }
}

fn contradicts(word: u32) -> bool {
    let both = Use::Table as u32 | Use::Other as u32;
    word & both == both
}

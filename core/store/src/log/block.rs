//! The log as bytes: a ring of 4 KiB blocks whose every sector is sealed.
//!
//! A disk writes sectors of 512 bytes whole or not at all, so a block that was cut off has sound sectors of two ages, and is the
//! end of the log. A sector that is not sound was never cut off: it was damaged, and then the log cannot be trusted.
//!
//! ```text
//! sector   500 bytes of the block | sequence u64 | crc32c u32 of uuid, epoch, number of the sector and the 508 bytes above
//! block    magic "DRVLLOG1" | seal of the block before u32 | seal u32: crc32c of the other 3996 bytes and the sequence |
//!          updates u16, at most 64 | slots told u16 | first of them u32 | 64 updates: slot u32, extent u64 |
//!          401 slots: extent u64, or 2^64 - 1
//! ```
//!
//! Each block tells a slice of all slots, and slices go round: the set can be told from any run of blocks that is long enough.
//! Each names the seal of the one before, so that a block which a failed flight left behind is not taken for the next one.

use crate::Uuid;

pub(crate) const BLOCK: usize = 4096;
pub(crate) const UPDATES_MAX: usize = 64;
/// How many blocks a flight may write. Fewer than half a ring, so that what it may tear is never the longest run.
pub(crate) const BLOCKS_MAX: usize = 7;

const SECTOR: usize = 512;
const SECTORS: usize = BLOCK / SECTOR;
const PART: usize = 500;
const PAYLOAD: usize = PART * SECTORS;
const MAGIC: &[u8; 8] = b"DRVLLOG1";
const UPDATES_AT: usize = 24;
const SLICE_AT: usize = UPDATES_AT + 12 * UPDATES_MAX;
const SLICE: usize = (PAYLOAD - SLICE_AT) / 8;

/// A slot without an extent.
pub(crate) const NONE: u64 = u64::MAX;

/// How many blocks tell all slots.
fn round(slots: u32) -> u64 {
    (slots as usize).div_ceil(SLICE) as u64
}

fn blocks(slots: u32) -> u64 {
    2 * round(slots) + 2 * BLOCKS_MAX as u64 + 2
}

pub(crate) fn ring_bytes(slots: u32) -> u64 {
    blocks(slots) * BLOCK as u64
}

/// Where a ring is, and what seals it.
#[derive(Clone, Debug)]
pub(crate) struct Ring {
    seed: u32,
    pub(crate) slots: u32,
    pub(crate) place: u64,
}

/// What one block says.
pub(crate) struct Block<'a> {
    pub(crate) sequence: u64,
    /// The seal of the block before.
    pub(crate) before: u32,
    pub(crate) updates: &'a [(u32, u64)],
}

impl Ring {
    pub(crate) fn new(uuid: Uuid, epoch: u64, slots: u32, place: u64) -> Self {
        let seed = crc32c::crc32c_append(crc32c::crc32c(&uuid.0), &epoch.to_le_bytes());
        Ring { seed, slots, place }
    }

    pub(crate) fn bytes(&self) -> u64 {
        ring_bytes(self.slots)
    }

    /// Where the block of this sequence number is in the file.
    pub(crate) fn place_of(&self, sequence: u64) -> u64 {
        self.place + self.position(sequence) * BLOCK as u64
    }

    fn position(&self, sequence: u64) -> u64 {
        sequence % blocks(self.slots)
    }

    /// A whole ring that says that nothing is active, with the sequence number and the seal of its last block.
    pub(crate) fn blank(&self) -> (Vec<u8>, u64, u32) {
        let count = blocks(self.slots);
        let mut bytes = vec![0; self.bytes() as usize];
        let mut seal = 0;
        for sequence in 0..count {
            let block = Block { sequence, before: seal, updates: &[] };
            let (encoded, its) = self.encode(&block, &|_| NONE);
            bytes[sequence as usize * BLOCK..][..BLOCK].copy_from_slice(&encoded);
            seal = its;
        }
        (bytes, count - 1, seal)
    }

    /// A block as bytes, and its seal. `slot` tells what is in a slot, with the updates.
    pub(crate) fn encode(&self, block: &Block<'_>, slot: &dyn Fn(u32) -> u64) -> (Vec<u8>, u32) {
        let mut payload = vec![0; PAYLOAD];
        let first = (block.sequence % round(self.slots)) as u32 * SLICE as u32;
        let told = (self.slots - first).min(SLICE as u32);
        payload[..8].copy_from_slice(MAGIC);
        payload[8..12].copy_from_slice(&block.before.to_le_bytes());
        payload[16..18].copy_from_slice(&(block.updates.len() as u16).to_le_bytes());
        payload[18..20].copy_from_slice(&(told as u16).to_le_bytes());
        payload[20..24].copy_from_slice(&first.to_le_bytes());
        for (bytes, (slot, extent)) in payload[UPDATES_AT..].chunks_exact_mut(12).zip(block.updates) {
            bytes[..4].copy_from_slice(&slot.to_le_bytes());
            bytes[4..].copy_from_slice(&extent.to_le_bytes());
        }
        for (bytes, at) in payload[SLICE_AT..].chunks_exact_mut(8).zip(first..first + told) {
            bytes.copy_from_slice(&slot(at).to_le_bytes());
        }
        let seal = seal(&payload, block.sequence);
        payload[12..16].copy_from_slice(&seal.to_le_bytes());

        let mut bytes = Vec::with_capacity(BLOCK);
        for (number, part) in payload.chunks_exact(PART).enumerate() {
            let start = bytes.len();
            bytes.extend(part);
            bytes.extend(block.sequence.to_le_bytes());
            let crc = self.sector_crc(block.sequence, number, &bytes[start..]);
            bytes.extend(crc.to_le_bytes());
        }
        (bytes, seal)
    }

    fn sector_crc(&self, sequence: u64, number: usize, bytes: &[u8]) -> u32 {
        let at = self.position(sequence) * SECTORS as u64 + number as u64;
        crc32c::crc32c_append(crc32c::crc32c_append(self.seed, &at.to_le_bytes()), bytes)
    }

    /// The extents that a ring says are active.
    ///
    /// Errors: in words, if it is damaged.
    pub(crate) fn replay(&self, bytes: &[u8]) -> Result<Vec<u64>, String> {
        let mut found = Vec::new();
        for (position, block) in bytes.chunks_exact(BLOCK).enumerate() {
            found.extend(self.decode(position as u64, block)?);
        }
        found.sort_by_key(|block| block.sequence);
        let mut best = 0..0;
        let mut start = 0;
        for at in 0..found.len() {
            let follows =
                |two: &[Found]| two[1].sequence == two[0].sequence + 1 && two[1].before == two[0].seal;
            if at > 0 && !follows(&found[at - 1..=at]) {
                start = at;
            }
            if at + 1 - start > best.len() {
                best = start..at + 1;
            }
        }
        if (best.len() as u64) < round(self.slots).max(BLOCKS_MAX as u64 + 1) {
            return Err(format!(
                "the log has no run of blocks that is long enough, its longest has {}",
                best.len()
            ));
        }
        let mut slots = vec![NONE; self.slots as usize];
        for block in &found[best] {
            for (slot, extent) in block.slice.iter().chain(&block.updates) {
                *slots.get_mut(*slot as usize).ok_or("the log names slots that there are not")? = *extent;
            }
        }
        slots.retain(|&extent| extent != NONE);
        slots.sort_unstable();
        slots.dedup();
        Ok(slots)
    }

    /// One block, or none if its write was cut off.
    fn decode(&self, position: u64, bytes: &[u8]) -> Result<Option<Found>, String> {
        let number_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let mut payload = Vec::with_capacity(PAYLOAD);
        let sequence = number_at(PART);
        let mut torn = false;
        for (number, sector) in bytes.chunks_exact(SECTOR).enumerate() {
            let its = number_at(number * SECTOR + PART);
            let crc = self.sector_crc(position, number, &sector[..SECTOR - 4]);
            if crc.to_le_bytes() != sector[SECTOR - 4..] || self.position(its) != position {
                return Err(format!("sector {number} of block {position} of the log is damaged"));
            }
            torn |= its != sequence;
            payload.extend(&sector[..PART]);
        }
        let u16_at = |at: usize| u16::from_le_bytes(payload[at..at + 2].try_into().expect("2 bytes"));
        let u32_at = |at: usize| u32::from_le_bytes(payload[at..at + 4].try_into().expect("4 bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(payload[at..at + 8].try_into().expect("8 bytes"));
        // Two attempts at one block have one sequence number.
        if torn || seal(&payload, sequence) != u32_at(12) {
            return Ok(None);
        }
        let (updates, told, first) = (u16_at(16) as usize, u32::from(u16_at(18)), u32_at(20));
        if &payload[..8] != MAGIC || updates > UPDATES_MAX || told as usize > SLICE {
            return Err(format!("block {position} of the log makes no sense"));
        }
        let update = |at: usize| (u32_at(UPDATES_AT + 12 * at), u64_at(UPDATES_AT + 12 * at + 4));
        let slice = |at: u32| (first.saturating_add(at), u64_at(SLICE_AT + 8 * at as usize));
        Ok(Some(Found {
            sequence,
            before: u32_at(8),
            seal: u32_at(12),
            updates: (0..updates).map(update).collect(),
            slice: (0..told).map(slice).collect(),
        }))
    }
}

struct Found {
    sequence: u64,
    before: u32,
    seal: u32,
    updates: Vec<(u32, u64)>,
    slice: Vec<(u32, u64)>,
}

fn seal(payload: &[u8], sequence: u64) -> u32 {
    let crc = crc32c::crc32c_append(crc32c::crc32c(&sequence.to_le_bytes()), &payload[..12]);
    crc32c::crc32c_append(crc, &payload[16..])
}

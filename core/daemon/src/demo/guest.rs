//! The guest: some connections that write here and there, and remember exactly what they wrote.

use super::client::Client;
use driveline_bitmap::Bits;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use std::{
    io,
    ops::Range,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

/// Where each connection writes; no two of them overlap, so that the last write of every byte is known.
pub(crate) const PLACES: [Range<u64>; 3] =
    [(1 << 20)..(5 << 20), (7 << 20)..(13 << 20), (20 << 20)..(27 << 20)];
/// The longest write.
const LENGTH_MAX: u64 = 16 << 10;
/// After a write a connection waits so long.
const PAUSE: Duration = Duration::from_millis(15);

/// What all connections share.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) socket: PathBuf,
    /// What was written, at the granularity of the drive's bitmap.
    pub(crate) written: Bits,
    pub(crate) requests: AtomicU64,
    pub(crate) stop: AtomicBool,
}

impl Guest {
    /// Writes until it is told to stop. Returns the content of its place that is to be expected.
    pub(crate) async fn run(self: Arc<Self>, number: usize, mut content: Vec<u8>) -> io::Result<Vec<u8>> {
        let place = PLACES[number].clone();
        let mut random = SmallRng::seed_from_u64(number as u64);
        let mut client = Client::connect(&self.socket, "vda").await?;
        while !self.stop.load(Relaxed) {
            let offset = random.random_range(place.start..place.end) & !511;
            let length = random.random_range(1..=LENGTH_MAX).min(place.end - offset);
            let data: Vec<u8> = (0..length).map(|_| random.random()).collect();
            // Counted first: what fails half-way may have changed something.
            self.written.mark(offset..offset + length);
            client.write(offset, &data).await?;
            let at = (offset - place.start) as usize;
            content[at..at + data.len()].copy_from_slice(&data);
            self.requests.fetch_add(1, Relaxed);
            driveline_engine::sleep(PAUSE).await;
        }
        client.disconnect().await?;
        Ok(content)
    }
}

/// Reads the whole disk.
pub(crate) async fn read_all(socket: &std::path::Path) -> io::Result<Vec<u8>> {
    let mut client = Client::connect(socket, "vda").await?;
    let mut content = vec![0; client.size_bytes() as usize];
    for (index, chunk) in content.chunks_mut(1 << 20).enumerate() {
        client.read((index as u64) << 20, chunk).await?;
    }
    client.disconnect().await?;
    Ok(content)
}

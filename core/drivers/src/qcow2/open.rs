//! Opening an image: everything is checked before anything is changed.

use super::{
    Qcow2,
    epoch::Epoch,
    header::Header,
    io::{FILE, File, Io},
    layout::decode_words,
    map::Map,
    snapshot,
};
use driveline_graph::{Error, Kind, Result};
use parking_lot::Mutex;
use std::sync::atomic::AtomicU64;

/// Reads and checks the header.
pub(crate) async fn read_header(io: &mut Io<'_, '_>) -> Result<Header> {
    let file = File::new(io.info(FILE).map_or(0, |info| info.size_bytes));
    if file.end() < 72 {
        return Err(Error::new(
            Kind::Invalid,
            format_args!("not a qcow2 image: it has {} bytes, and a header has 72 at least", file.end()),
        ));
    }
    let mut bytes = vec![0; 512];
    file.read(io, 0, &mut bytes).await?;
    let cluster_bytes = Header::cluster_bytes_of(&bytes)?;
    bytes.resize(cluster_bytes, 0);
    file.read(io, 0, &mut bytes).await?;
    Header::parse(&bytes)
}

/// Reads a table of words.
async fn read_table(io: &mut Io<'_, '_>, file: &File, offset: u64, entries: usize) -> Result<Vec<u64>> {
    let mut bytes = vec![0; entries * 8];
    file.read(io, offset, &mut bytes).await?;
    let mut words = vec![0; entries];
    decode_words(&bytes, &mut words);
    Ok(words)
}

impl Qcow2 {
    /// Opens the image in child `FILE`. Unless `read_only`, it clears the autoclear bits.
    pub(crate) async fn open(io: &mut Io<'_, '_>, cache_bytes: u64, read_only: bool) -> Result<Self> {
        let header = read_header(io).await?;
        if !read_only {
            header.check_writable()?;
        }
        let geometry = header.geometry();
        let file = File::new(io.info(FILE).map_or(0, |info| info.size_bytes));
        snapshot::read(io, &file, &header).await?;
        let l1 = read_table(io, &file, header.l1_offset, header.l1_entries as usize).await?;
        Ok(Self {
            geometry,
            compression: header.compression,
            size_bytes: AtomicU64::new(header.size_bytes),
            file,
            map: Mutex::new(Map::new(geometry, l1, cache_bytes / 2)),
            epoch: Epoch::new(),
            unpacked: Mutex::new(None),
        })
    }
}

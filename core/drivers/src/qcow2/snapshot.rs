//! The table of internal snapshots: read, checked and left alone. Refcounts keep what the snapshots use.

use super::{
    header::{Header, L1_BYTES_MAX},
    io::{File, Io},
    layout::{be32, be64},
};
use driveline_graph::{Error, Kind, Result};

const TABLE_BYTES_MAX: u64 = 64 << 20;
const EXTRA_BYTES_MAX: usize = 1024;
const FIXED_BYTES: usize = 40;

/// A snapshot, as far as it is of interest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Snapshot {
    pub(crate) id: String,
    pub(crate) name: String,
    /// The size of the guest's disk then, if it was noted.
    pub(crate) size_bytes: Option<u64>,
}

/// Reads the snapshot table.
pub(crate) async fn read(io: &mut Io<'_, '_>, file: &File, header: &Header) -> Result<Vec<Snapshot>> {
    let mut out = Vec::new();
    let mut at = header.snapshots_offset;
    for number in 0..header.snapshots {
        let wrong = |text: std::fmt::Arguments<'_>| {
            Error::new(
                Kind::Corrupt,
                format_args!("the qcow2 snapshot table is damaged: snapshot {number} at {at:#x}: {text}"),
            )
        };
        if at - header.snapshots_offset > TABLE_BYTES_MAX {
            return Err(wrong(format_args!("the table is longer than {TABLE_BYTES_MAX} bytes")));
        }
        let mut fixed = [0; FIXED_BYTES];
        file.read(io, at, &mut fixed).await?;
        let l1_offset = be64(&fixed, 0);
        let l1_bytes = u64::from(be32(&fixed, 8)) * 8;
        if l1_bytes > L1_BYTES_MAX
            || !l1_offset.is_multiple_of(1 << header.cluster_bits)
            || l1_offset >= 1 << 56
        {
            return Err(wrong(format_args!(
                "an L1 table of {l1_bytes} bytes at {l1_offset:#x}, expected {L1_BYTES_MAX} at most, at a cluster's beginning"
            )));
        }
        let half = |at: usize| usize::from(u16::from_be_bytes([fixed[at], fixed[at + 1]]));
        let (id_bytes, name_bytes, extra_bytes) = (half(12), half(14), be32(&fixed, 36) as usize);
        if extra_bytes > EXTRA_BYTES_MAX {
            return Err(wrong(format_args!(
                "{extra_bytes} bytes of extra data, expected {EXTRA_BYTES_MAX} at most"
            )));
        }
        let mut rest = vec![0; extra_bytes + id_bytes + name_bytes];
        file.read(io, at + FIXED_BYTES as u64, &mut rest).await?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        out.push(Snapshot {
            id: text(&rest[extra_bytes..extra_bytes + id_bytes]),
            name: text(&rest[extra_bytes + id_bytes..]),
            size_bytes: (extra_bytes >= 16).then(|| be64(&rest, 8)),
        });
        at = (at + (FIXED_BYTES + rest.len()) as u64).next_multiple_of(8);
    }
    Ok(out)
}

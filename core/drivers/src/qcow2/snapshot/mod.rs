//! The table of internal snapshots.

mod change;
mod reach;

use super::{
    header::{Header, L1_BYTES_MAX},
    io::{File, Io},
    layout::{be32, be64},
};
use driveline_graph::{Error, Kind, Result};
use std::borrow::Cow;

pub(crate) const TABLE_BYTES_MAX: u64 = 64 << 20;
const EXTRA_BYTES_MAX: usize = 1024;
const FIXED_BYTES: usize = 40;
/// Extra data that entries of version 3 have at least: sizes of the VM's state and of the disk.
pub(crate) const EXTRA_BYTES_V3: usize = 16;

/// A snapshot, as its entry in the table says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Snapshot {
    pub(crate) l1_offset: u64,
    pub(crate) l1_entries: u32,
    pub(crate) id: Vec<u8>,
    pub(crate) name: Vec<u8>,
    /// When it was taken: seconds since 1970, and nanoseconds.
    pub(crate) date: (u32, u32),
    pub(crate) vm_clock_ns: u64,
    /// Bytes of the VM's state, as far as they fit 32 bits; see `extra`.
    pub(crate) vm_state_bytes: u32,
    /// As it is in the file: 8 bytes of the size of the VM's state, 8 of the size of the disk, and what else there may be.
    pub(crate) extra: Vec<u8>,
}

impl Snapshot {
    pub(crate) fn id(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.id)
    }

    pub(crate) fn name(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.name)
    }

    /// The size of the guest's disk then, if it was noted.
    pub(crate) fn size_bytes(&self) -> Option<u64> {
        (self.extra.len() >= 16).then(|| be64(&self.extra, 8))
    }

    /// How many instructions the guest had run, if it was noted.
    pub(crate) fn icount(&self) -> Option<u64> {
        (self.extra.len() >= 24).then(|| be64(&self.extra, 16)).filter(|icount| *icount != u64::MAX)
    }

    /// Bytes of the VM's state that was saved with it.
    pub(crate) fn vm_state_bytes(&self) -> u64 {
        if self.extra.len() >= 8 { be64(&self.extra, 0) } else { self.vm_state_bytes.into() }
    }

    /// Is its L1 table where one can be? Says why not.
    pub(crate) fn check(&self, header: &Header) -> Result<()> {
        let l1_bytes = u64::from(self.l1_entries) * 8;
        let aligned = self.l1_offset.is_multiple_of(1 << header.cluster_bits);
        if l1_bytes <= L1_BYTES_MAX && aligned && self.l1_offset < 1 << 56 {
            return Ok(());
        }
        Err(Error::new(
            Kind::Corrupt,
            format_args!(
                "the qcow2 snapshot table is damaged: snapshot '{}' has an L1 table of {l1_bytes} bytes at {:#x}, \
                 expected {L1_BYTES_MAX} at most, at a cluster's beginning",
                self.id(),
                self.l1_offset
            ),
        ))
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.extend(self.l1_offset.to_be_bytes());
        out.extend(self.l1_entries.to_be_bytes());
        out.extend((self.id.len() as u16).to_be_bytes());
        out.extend((self.name.len() as u16).to_be_bytes());
        out.extend(self.date.0.to_be_bytes());
        out.extend(self.date.1.to_be_bytes());
        out.extend(self.vm_clock_ns.to_be_bytes());
        out.extend(self.vm_state_bytes.to_be_bytes());
        out.extend((self.extra.len() as u32).to_be_bytes());
        out.extend(&self.extra);
        out.extend(&self.id);
        out.extend(&self.name);
        out.resize(out.len().next_multiple_of(8), 0);
    }
}

/// The table as it is written.
pub(crate) fn encode(snapshots: &[Snapshot]) -> Vec<u8> {
    let mut out = Vec::new();
    for snapshot in snapshots {
        snapshot.encode(&mut out);
    }
    out
}

/// Reads the snapshot table. Where the L1 tables are is not checked: see [`Snapshot::check`].
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
        let half = |at: usize| usize::from(u16::from_be_bytes([fixed[at], fixed[at + 1]]));
        let (id_bytes, name_bytes, extra_bytes) = (half(12), half(14), be32(&fixed, 36) as usize);
        if extra_bytes > EXTRA_BYTES_MAX {
            return Err(wrong(format_args!(
                "{extra_bytes} bytes of extra data, expected {EXTRA_BYTES_MAX} at most"
            )));
        }
        let mut rest = vec![0; extra_bytes + id_bytes + name_bytes];
        file.read(io, at + FIXED_BYTES as u64, &mut rest).await?;
        at = (at + (FIXED_BYTES + rest.len()) as u64).next_multiple_of(8);
        let name = rest.split_off(extra_bytes + id_bytes);
        let id = rest.split_off(extra_bytes);
        out.push(Snapshot {
            l1_offset: be64(&fixed, 0),
            l1_entries: be32(&fixed, 8),
            id,
            name,
            date: (be32(&fixed, 16), be32(&fixed, 20)),
            vm_clock_ns: be64(&fixed, 24),
            vm_state_bytes: be32(&fixed, 32),
            extra: rest,
        });
    }
    Ok(out)
}

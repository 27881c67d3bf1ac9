//! What a server and we agreed on, and the limits of a node that follow.

use driveline_op::{Info, info};
use driveline_wire::{ContextId, Headers, PAYLOAD_LENGTH_MAX, TransmissionFlags};

/// The outcome of a handshake.
#[derive(Clone, Debug)]
pub(super) struct Terms {
    pub(super) size_bytes: u64,
    pub(super) flags: TransmissionFlags,
    pub(super) headers: Headers,
    pub(super) structured: bool,
    /// What offsets and lengths have to be multiples of, if the server said so.
    pub(super) block_bytes_min: Option<u32>,
    /// The longest payload.
    pub(super) payload_bytes_max: u32,
    /// The context that block status is about.
    pub(super) context: Option<ContextId>,
}

impl Terms {
    /// A server that says nothing of alignment takes single bytes if it tells block status, or if its size is odd; one that is
    /// so old that it does neither is better not asked for less than a sector.
    ///
    /// Source: QEMU block/nbd.c, `nbd_refresh_limits`.
    pub(super) fn alignment(&self) -> u32 {
        match self.block_bytes_min {
            Some(bytes) => bytes,
            None if self.context.is_some() || !self.size_bytes.is_multiple_of(512) => 1,
            None => 512,
        }
    }

    /// The longest read or write, a multiple of the alignment.
    pub(super) fn transfer_bytes_max(&self) -> u64 {
        let alignment = self.alignment();
        u64::from(self.payload_bytes_max.min(PAYLOAD_LENGTH_MAX) / alignment * alignment)
    }

    /// The longest request without payload, a multiple of the alignment.
    pub(super) fn effect_bytes_max(&self) -> u64 {
        let alignment = u64::from(self.alignment());
        match self.headers {
            Headers::Extended => u64::MAX / alignment * alignment,
            Headers::Compact => u64::from(i32::MAX as u32) / alignment * alignment,
        }
    }

    pub(super) fn can(&self, flag: TransmissionFlags) -> bool {
        self.flags.contains(flag)
    }

    pub(super) fn info(&self, read_only: bool) -> Info {
        let mut flags = 0;
        for (flag, set) in [
            (info::READ_ONLY, read_only || self.can(TransmissionFlags::READ_ONLY)),
            (info::FAST_ZERO, self.can(TransmissionFlags::SEND_FAST_ZERO)),
            (info::DISCARD, self.can(TransmissionFlags::SEND_TRIM)),
        ] {
            flags |= if set { flag } else { 0 };
        }
        Info {
            size_bytes: self.size_bytes,
            request_alignment: self.alignment(),
            transfer_bytes_max: self.transfer_bytes_max(),
            flags,
            ..Info::default()
        }
    }

    /// Can the node go on with a server that came back like this? It was opened with `self`, and what it promised to others cannot
    /// be taken back.
    pub(super) fn goes_on_with(&self, now: &Terms) -> Result<(), String> {
        let differs = |what: &str, before: &dyn std::fmt::Debug, after: &dyn std::fmt::Debug| {
            Err(format!("the server came back with another {what}: {after:?} instead of {before:?}"))
        };
        if now.size_bytes != self.size_bytes {
            return differs("size", &self.size_bytes, &now.size_bytes);
        }
        if now.flags != self.flags {
            return differs("set of flags", &self.flags, &now.flags);
        }
        if now.alignment() > self.alignment() {
            return differs("minimum block size", &self.alignment(), &now.alignment());
        }
        if now.transfer_bytes_max() < self.transfer_bytes_max() {
            return differs("maximum payload", &self.transfer_bytes_max(), &now.transfer_bytes_max());
        }
        if now.effect_bytes_max() < self.effect_bytes_max() {
            return differs("form of headers", &self.headers, &now.headers);
        }
        if now.context.is_none() && self.context.is_some() {
            return differs("set of metadata contexts", &self.context, &now.context);
        }
        Ok(())
    }
}

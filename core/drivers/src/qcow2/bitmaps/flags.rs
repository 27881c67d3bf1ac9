//! Which bitmaps must not be trusted: their flags, and the bits of the header that other writers take away.
//!
//! Flags are changed where they are. That is one byte of each entry, so whatever of it a crash lets through, each
//! bitmap is one or the other; and it is flagged before the first write, or after the last.

use super::{
    State,
    codec::{self, FLAGS_AT, flags::IN_USE},
    load::not_found,
};
use crate::qcow2::{
    Qcow2,
    header::{AUTOCLEAR_BITMAPS, AUTOCLEAR_WITNESS},
    io::Io,
};
use driveline_graph::{Error, Kind, Result, Witness};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// The unit in which a directory is changed: a sector.
const PART_BYTES: usize = 512;

impl Qcow2 {
    /// Prepares the bitmaps for writes to come. The file is not written to: they are as good as they were until the first write,
    /// see [`Qcow2::flag_bitmaps`]. Returns the bits of `autoclear` that are kept up from now on.
    pub(crate) async fn begin_bitmaps(&self, io: &mut Io<'_, '_>) -> driveline_op::Result<u64> {
        let header = self.header.lock().clone();
        let witness = header.autoclear & AUTOCLEAR_WITNESS != 0 || self.bitmaps.witness_lingers();
        self.bitmaps.witness_at_open.store(witness, Relaxed);
        if self.bitmaps.state.lock().unread {
            let state = State::read(io, &self.file, &header).await?;
            *self.bitmaps.state.lock() = state;
        }
        self.survey(io).await?;
        self.protect_bitmaps();
        if self.bitmaps.state.lock().place.is_none() {
            return Ok(0);
        }
        self.bitmaps.unwritten.store(true, Release);
        Ok(AUTOCLEAR_BITMAPS)
    }

    /// Must the flags be looked after before data is written?
    #[inline]
    pub(crate) fn bitmaps_need_flags(&self) -> bool {
        self.bitmaps.unwritten.load(Acquire)
    }

    /// Data is about to be written: no bitmap in the image looks valid when this returns, and there is no witness but one that we
    /// have set.
    #[cold]
    pub(crate) async fn flag_bitmaps(&self, io: &mut Io<'_, '_>) -> driveline_op::Result<()> {
        let _meta = self.lock(io).await?;
        let flagged: Vec<usize> = {
            let state = self.bitmaps.state.lock();
            let stored = state.stored.iter().enumerate().filter(|(_, stored)| !stored.entry.has(IN_USE));
            if state.place.is_some() { stored.map(|(i, _)| i).collect() } else { Vec::new() }
        };
        self.flip(io, true, &flagged).await?;
        if self.bitmaps.witness_lingers() {
            self.change_header(io, |_| {}).await?;
        }
        self.bitmaps.unwritten.store(false, Release);
        Ok(())
    }

    /// Flags bitmaps, or takes the flags away, because somebody keeps them up.
    pub(crate) async fn set_bitmaps_in_use(
        &self,
        io: &mut Io<'_, '_>,
        names: &[&str],
        in_use: bool,
    ) -> Result<()> {
        self.check_writable()?;
        let _meta = self.lock(io).await?;
        let mut chosen = Vec::new();
        {
            let state = self.bitmaps.state.lock();
            for name in names {
                let stored = state.find(name).filter(|_| state.place.is_some());
                let stored = stored.ok_or_else(|| not_found(name, &state))?;
                if !in_use && let Some(why) = self.why_not(stored) {
                    return Err(Error::new(
                        Kind::Corrupt,
                        format_args!("bitmap '{name}' of the image cannot become valid: {why}"),
                    ));
                }
            }
            for (i, stored) in state.stored.iter().enumerate() {
                let name_is = |name: &&str| name.as_bytes() == stored.entry.name;
                if names.iter().any(name_is) && stored.entry.has(IN_USE) != in_use {
                    chosen.push(i);
                }
            }
        }
        self.flip(io, in_use, &chosen).await?;
        self.bitmaps.unwritten.store(true, Release);
        Ok(())
    }

    /// Sets or takes away the flags of some entries, in memory and durably in the file. After a failure all flags are
    /// written the next time.
    async fn flip(&self, io: &mut Io<'_, '_>, in_use: bool, entries: &[usize]) -> driveline_op::Result<()> {
        let (offset, bytes, parts) = {
            let mut state = self.bitmaps.state.lock();
            let Some(place) = state.place.clone() else { return Ok(()) };
            let mut bytes = codec::encode_directory(state.stored.iter().map(|stored| &stored.entry));
            let (mut at, mut parts) = (0, Vec::new());
            for (i, stored) in state.stored.iter().enumerate() {
                let byte = at + FLAGS_AT;
                let changes = entries.binary_search(&i).is_ok();
                if changes {
                    bytes[byte] = bytes[byte] & !(IN_USE as u8) | u8::from(in_use);
                }
                if changes || state.flags_unsure {
                    parts.push(byte / PART_BYTES);
                }
                at += stored.entry.bytes();
            }
            parts.dedup();
            if parts.is_empty() {
                return Ok(());
            }
            state.flags_unsure = true;
            (place.offset, bytes, parts)
        };
        for part in parts {
            let start = part * PART_BYTES;
            let end = (start + PART_BYTES).min(bytes.len());
            self.file.write(io, offset + start as u64, &bytes[start..end]).await?;
        }
        io.flush().await?;
        let mut state = self.bitmaps.state.lock();
        for &i in entries {
            let flags = &mut state.stored[i].entry.flags;
            *flags = *flags & !IN_USE | u32::from(in_use);
        }
        state.flags_unsure = false;
        Ok(())
    }

    /// The witness; version 2 has no room for one.
    pub(crate) fn witness(&self) -> Option<Witness> {
        let set = self.header.lock().autoclear & AUTOCLEAR_WITNESS != 0;
        let at_open = self.bitmaps.witness_at_open();
        (self.geometry.version >= 3).then_some(Witness { at_open, set })
    }

    /// Sets the witness or takes it away.
    pub(crate) async fn set_witness(&self, io: &mut Io<'_, '_>, set: bool) -> Result<()> {
        self.check_writable()?;
        if self.geometry.version < 3 {
            return Err(Error::new(Kind::NotSupported, "a version 2 image has no room for a witness"));
        }
        let _meta = self.lock(io).await?;
        let bit = if set { AUTOCLEAR_WITNESS } else { 0 };
        let differs = self.header.lock().autoclear & AUTOCLEAR_WITNESS != bit;
        if differs || self.bitmaps.witness_lingers() {
            let change = |header: &mut crate::qcow2::Header| {
                header.autoclear = header.autoclear & !AUTOCLEAR_WITNESS | bit;
            };
            self.change_header(io, change).await?;
        }
        Ok(())
    }
}

//! How a header is written.
//!
//! ```text
//! sync       all bits that the new header counts are on disk      (if a bitmap is to survive power cuts)
//! write      the copy that is not known to be on disk
//! sync       from here on the new header counts; the other copy was there all the time
//! write      the other copy: damage to either one alone takes nothing back
//! ```
//!
//! When the first write or the second sync fails, nobody knows which header a crash will find, and the new one speaks of what did
//! not come true. So the old one is written over it, with a higher number. As long as that fails too, the header is *in
//! doubt*, and no bitmap is safe: writes that wait for it fail, and each of them tries again.

use driveline_bitmap::Half;

use super::Core;
use crate::header::{self, Base, COPIES, COPY_BYTES, Header, Role, Row, encode, index};
use crate::region::{CLEAN_CRC, Region};
use crate::{Error, Result};

impl Core {
    /// What the header will say.
    pub(crate) fn header(&self) -> Header {
        let rows = self.lives.iter().filter_map(|live| {
            let place = live.entry.place();
            Some(Row {
                id: live.entry.id,
                granularity: live.entry.granularity,
                view: live.entry.view,
                durability: live.entry.durability,
                record: live.next.clone()?,
                places: [0, 1].map(|half| Region::places(&place.halves[half])),
                crcs: [CLEAN_CRC; 2],
            })
        });
        let rows = rows.collect();
        let mut base = self.base.clone();
        base.epoch = self.epoch;
        Header { base, owner: self.owner.clone(), rows }
    }

    pub(crate) fn settle_unless_batch(&mut self) -> Result<()> {
        if self.batch { Ok(()) } else { self.settle() }
    }

    /// Makes the header say what it should, or takes back what it should say.
    pub(crate) fn settle(&mut self) -> Result<()> {
        if let Role::Incoming { .. } = self.base.role {
            // It became the store's file, so it counts.
            self.base.role = Role::Counts;
        }
        let header = self.header();
        if self.volume.in_doubt() {
            // What the disk says must be known before something else is said.
            if let Err(error) = self.put_right() {
                self.take_back();
                return Err(error);
            }
        }
        if header != self.settled {
            let power = header.has_power() || self.settled.has_power();
            let synced = if power { self.volume.sync(self.volume.now()) } else { Ok(()) };
            if let Err(error) = synced.and_then(|()| self.write(header)) {
                self.take_back();
                return Err(error);
            }
        }
        for live in &mut self.lives {
            live.settled = live.next.clone();
            for half in Half::BOTH {
                let counts = live.settled.as_ref().is_some_and(|record| header::counts(record, half));
                if core::mem::take(&mut live.wipes[index(half)]) && !counts {
                    live.entry.wipe_now(half);
                }
            }
        }
        self.collect();
        Ok(())
    }

    /// Writes a header, durably; if that fails, the one before.
    pub(crate) fn write(&mut self, header: Header) -> Result<()> {
        match self.put(&header) {
            Ok(()) => {
                self.settled = header;
                Ok(())
            }
            // It was not even tried.
            Err(error @ Error::HeaderFull { .. }) => Err(error),
            Err(error) => {
                self.volume.set_doubt(true);
                if let Err(error) = self.put_right() {
                    tracing::error!(path = %self.volume.path.display(), %error, "the header is in doubt");
                }
                Err(error)
            }
        }
    }

    /// Writes the settled header again, over one that is in doubt.
    pub(crate) fn put_right(&mut self) -> Result<()> {
        let settled = self.settled.clone();
        self.put(&settled)?;
        self.volume.set_doubt(self.closed);
        Ok(())
    }

    fn put(&mut self, header: &Header) -> Result<()> {
        let bytes = encode(header, self.sequence + 1);
        if bytes.len() as u64 > COPY_BYTES {
            let (path, found) = (self.volume.path.clone(), bytes.len());
            return Err(Error::HeaderFull { path, found, expected: COPY_BYTES as usize });
        }
        self.sequence += 1;
        let copy = 1 - self.copy;
        let since = self.volume.now();
        self.volume.write_at(&bytes, COPIES[copy])?;
        self.volume.sync(since)?;
        self.copy = copy;
        if let Err(error) = self.volume.write_at(&bytes, COPIES[1 - copy]) {
            tracing::warn!(%error, "one copy of the header is old or damaged, the other one is good");
        }
        Ok(())
    }

    /// What was taken down and not settled is no more.
    fn take_back(&mut self) {
        // An entry that was added keeps its number as long as it lives.
        self.base = Base { next_id: self.base.next_id, ..self.settled.base.clone() };
        self.owner = self.settled.owner.clone();
        for live in &mut self.lives {
            live.next = live.settled.clone();
            live.wipes = [false; 2];
            if let Some(record) = &live.next {
                live.entry.set_name(&record.name);
            }
        }
    }
}

//! Persistent bitmaps: what the image says about them, and who may believe it.
//!
//! A *directory* names the bitmaps; each has a *table*, which points to clusters of bits. All of that is read once and
//! then known; only bits are read when they are asked for.
//!
//! * `codec`: the bytes, without I/O;
//! * `survey`: which clusters the bitmaps own, and which bitmaps are damaged;
//! * `load`: what the image holds, for who asks;
//! * `store`: another set of bitmaps, in one step;
//! * `flags`: which of them must not be trusted meanwhile.
//!
//! What is damaged in one bitmap is that bitmap's fault: it is listed with the reason, and can be removed. If the
//! directory itself cannot be read, its bitmaps are lost, and the extension stays as it is until a set is stored.
//!
//! # Who may believe it
//!
//! A bitmap in the image is flagged as in use from the first write to the disk on, before that write. Opening the image
//! changes nothing: an open that leads to nothing may never be followed by a close. Whoever keeps bitmaps up loads them, and
//! stores them again in the end; the next write flags them once more.

pub(super) mod codec;
mod flags;
mod load;
mod store;
mod survey;

use self::codec::{Entry, Place};
use super::{
    header::{AUTOCLEAR_BITMAPS, AUTOCLEAR_WITNESS, EXT_BITMAPS, Header},
    io::{File, Io},
};
use driveline_op::Result;
use parking_lot::Mutex;
use std::{
    collections::HashSet,
    ops::Range,
    sync::atomic::{
        AtomicBool,
        Ordering::{Relaxed, Release},
    },
};

/// What an open image knows about its bitmaps.
#[derive(Debug)]
pub(crate) struct Bitmaps {
    state: Mutex<State>,
    /// Nothing was written since the flags in the image were last looked after.
    unwritten: AtomicBool,
    /// The witness was there when the image was opened, or last became writable.
    witness_at_open: AtomicBool,
    /// It is still there, because nothing was written since. The header as we have it, and as we would write it, has it no more.
    witness_lingers: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    /// Where the directory is. `None`: there is none that could be relied on.
    place: Option<Place>,
    stored: Vec<Stored>,
    outdated: bool,
    unreadable: Option<String>,
    /// The world failed when it was to be read, so it must be tried again before anything is written.
    unread: bool,
    surveyed: bool,
    /// Writing flags did not come to its end, so it is not known which ones are in the image.
    flags_unsure: bool,
}

/// A bitmap in the image.
#[derive(Debug)]
struct Stored {
    entry: Entry,
    /// Why its contents cannot be used.
    fault: Option<String>,
    /// Its clusters in the file: none if they cannot be told from those of others.
    clusters: Vec<Range<u64>>,
}

impl State {
    /// Reads the directory.
    async fn read(io: &mut Io<'_, '_>, file: &File, header: &Header) -> Result<Self> {
        let mut state = Self::default();
        let mut extensions = header.extensions.iter().filter(|e| e.kind == EXT_BITMAPS);
        let Some(extension) = extensions.next() else { return Ok(state) };
        state.outdated = header.autoclear & AUTOCLEAR_BITMAPS == 0;
        let twice = extensions.next().map(|_| "there is more than one bitmaps extension".to_owned());
        let geometry = header.geometry();
        let place = twice.map_or_else(|| Place::parse(&extension.data, &geometry), Err).and_then(|place| {
            let range = place.range(&geometry);
            if range.end > geometry.align_up(file.end()) {
                return Err(format!("the bitmap directory is at {range:x?}, behind the end of the file"));
            }
            match header.metadata().iter().find(|p| range.start < p.end && p.start < range.end) {
                Some(other) => {
                    Err(format!("the bitmap directory is at {range:x?}, where other metadata is: {other:x?}"))
                }
                None => Ok(place),
            }
        });
        let read = match place {
            Ok(place) => {
                let mut bytes = vec![0; place.bytes as usize];
                file.read(io, place.offset, &mut bytes).await?;
                codec::parse_directory(&bytes, place.bitmaps).map(|entries| (place, entries))
            }
            Err(why) => Err(why),
        };
        match read {
            Ok((place, entries)) => {
                let mut names = HashSet::new();
                for entry in entries {
                    let again = !names.insert(entry.name.clone());
                    let fault = if state.outdated {
                        Some("a program that knows no bitmaps wrote to the image".into())
                    } else if let Some(fault) = entry.fault() {
                        Some(fault)
                    } else if again {
                        Some("another bitmap has the same name".into())
                    } else {
                        let text = "it was in use, and whoever used it did not store it";
                        entry.has(codec::flags::IN_USE).then(|| text.into())
                    };
                    state.stored.push(Stored { entry, fault, clusters: Vec::new() });
                }
                state.place = Some(place).filter(|_| !state.outdated);
            }
            Err(why) => state.unreadable = Some(why),
        }
        Ok(state)
    }

    /// Reads the directory, or says why it could not be read.
    async fn read_or_remember(io: &mut Io<'_, '_>, file: &File, header: &Header) -> Self {
        Self::read(io, file, header).await.unwrap_or_else(|error| {
            tracing::warn!(%error, "the bitmap directory of a qcow2 image could not be read");
            Self {
                unread: true,
                unreadable: Some(format!("reading the directory: {error}")),
                ..Self::default()
            }
        })
    }

    fn find(&self, name: &str) -> Option<&Stored> {
        self.stored.iter().find(|stored| stored.entry.name == name.as_bytes())
    }
}

impl Bitmaps {
    /// Looks at what the image holds. Data can be read even if that fails, so the failure is only remembered.
    pub(crate) async fn open(io: &mut Io<'_, '_>, file: &File, header: &Header) -> Self {
        Self {
            state: Mutex::new(State::read_or_remember(io, file, header).await),
            unwritten: AtomicBool::new(false),
            witness_at_open: AtomicBool::new(header.autoclear & AUTOCLEAR_WITNESS != 0),
            witness_lingers: AtomicBool::new(false),
        }
    }

    /// Reads anew what another program may have changed: nothing of what is known counts, not even in the same place.
    pub(crate) async fn refresh(&self, io: &mut Io<'_, '_>, file: &File, header: &Header) {
        let found = State::read_or_remember(io, file, header).await;
        *self.state.lock() = found;
        self.witness_lingers.store(false, Relaxed);
        self.unwritten.store(true, Release);
    }

    /// Looks again, because the image was changed as a whole. Of a directory that is where it was all is known: only we
    /// change it.
    pub(crate) async fn reload(&self, io: &mut Io<'_, '_>, file: &File, header: &Header) {
        let found = State::read_or_remember(io, file, header).await;
        let mut state = self.state.lock();
        if !found.unread && (found.place != state.place || state.place.is_none()) {
            *state = found;
            self.unwritten.store(true, Release);
        }
    }

    /// Are there any, as far as can be told? Those that somebody outdated who does not know them do not count.
    pub(crate) fn present(&self) -> bool {
        let state = self.state.lock();
        state.place.is_some() || state.unreadable.is_some() && !state.outdated
    }

    /// What there is to say about them to people.
    pub(crate) fn details(&self) -> serde_json::Value {
        let state = self.state.lock();
        let bitmaps = state.stored.iter().map(|stored| {
            let granularity = stored.entry.granularity().map(driveline_bitmap::Granularity::bytes);
            serde_json::json!({
                "name": String::from_utf8_lossy(&stored.entry.name),
                "granularity": granularity,
                "recording": stored.entry.has(codec::flags::AUTO),
                "in-use": stored.entry.has(codec::flags::IN_USE),
                "inconsistent": stored.fault,
            })
        });
        bitmaps.collect()
    }

    /// The disk has another size than what is stored.
    pub(crate) fn resized(&self) {
        for stored in &mut self.state.lock().stored {
            stored.fault.get_or_insert_with(|| "the disk was resized since it was stored".into());
        }
    }

    /// What is written from now on, and not recorded beside the image, takes the witness away first.
    pub(crate) fn let_witness_linger(&self) {
        self.witness_lingers.store(true, Relaxed);
        self.unwritten.store(true, Release);
    }

    /// Is there a witness in the file that our header does not have?
    pub(crate) fn witness_lingers(&self) -> bool {
        self.witness_lingers.load(Relaxed)
    }

    /// Our header is in the file.
    pub(crate) fn header_written(&self) {
        self.witness_lingers.store(false, Relaxed);
    }

    pub(crate) fn witness_at_open(&self) -> bool {
        self.witness_at_open.load(Relaxed)
    }
}

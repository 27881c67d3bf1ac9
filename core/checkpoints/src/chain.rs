//! The epochs of a drive, in their order, and what is done with them. Everything that changes them is staged in a change of the
//! graph, so that it comes in one step with what else belongs to the moment.

use crate::Epoch;
use driveline_bitmap::{Bitmap, Bits, Durability, View};
use driveline_graph::{Change, Error, Graph, Kind, NewBitmap, Result};
use std::{sync::Arc, time::SystemTime};

/// A moment of a drive.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// Its name and its place in the order.
    pub epoch: Epoch,
    /// What changed from it to the next one, or to now.
    pub bitmap: Arc<Bitmap>,
}

/// A moment to be kept, of one or several drives.
#[derive(Clone, Debug)]
pub struct NewCheckpoint {
    /// What it is called. No other checkpoint of these drives has that name.
    pub name: String,
    /// The drives.
    pub drives: Vec<String>,
    /// The granularity of its bitmaps; without it, the default of each drive.
    pub granularity: Option<u64>,
    /// What they survive; without it, what the one before does, or else they end with the process. One that is lost takes what
    /// changed since the one before with it.
    pub durability: Option<Durability>,
    /// Seconds since 1970.
    pub created_s: u64,
}

impl NewCheckpoint {
    /// One of a drive, now, in memory.
    pub fn named(name: impl Into<String>, drive: impl Into<String>) -> Self {
        // A clock before 1970 is no reason to fail.
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let (name, drives) = (name.into(), vec![drive.into()]);
        Self { name, drives, granularity: None, durability: None, created_s: now.as_secs() }
    }
}

/// The checkpoints of a drive, the oldest first.
///
/// Errors: there is no such drive or node.
pub fn of_drive(graph: &Graph, drive: &str) -> Result<Vec<Checkpoint>> {
    let epoch = |bitmap: Arc<Bitmap>| Some(Checkpoint { epoch: bitmap.name().parse().ok()?, bitmap });
    let mut checkpoints: Vec<_> = graph.bitmaps(drive)?.into_iter().filter_map(epoch).collect();
    checkpoints.sort_by(|a, b| a.epoch.cmp(&b.epoch));
    Ok(checkpoints)
}

/// Adds to a change: a new epoch for each drive, and the end of the one before. It is one moment for all drives. The
/// change was begun before this is called.
///
/// Errors: no name, one that is taken, a drive without name or named twice, or an epoch before that does not record.
pub fn create(graph: &Graph, change: &mut Change, new: &NewCheckpoint) -> Result<()> {
    if new.name.is_empty() {
        return Err(Error::new(Kind::Invalid, "a checkpoint has a name"));
    }
    for (at, drive) in new.drives.iter().enumerate() {
        if new.drives[..at].contains(drive) {
            return Err(Error::new(Kind::Invalid, format_args!("drive '{drive}' is named twice")));
        }
        let there = of_drive(graph, drive)?;
        if there.iter().any(|checkpoint| checkpoint.epoch.checkpoint == new.name) {
            let message = format_args!("'{drive}' has a checkpoint '{}' already", new.name);
            return Err(Error::new(Kind::Exists, message));
        }
        let last = there.last();
        if let Some(last) = last {
            must_record(drive, last)?;
            change.disable_bitmap(drive, last.bitmap.name().as_str())?;
        }
        let after = last.map_or(0, |last| last.epoch.number);
        // The number may be from an image that somebody else has made.
        let number = after.checked_add(1).ok_or_else(|| {
            Error::new(Kind::Invalid, format_args!("'{drive}' has no number left for another checkpoint"))
        })?;
        let epoch = Epoch { number, after, created_s: new.created_s, checkpoint: new.name.clone() };
        let durability =
            new.durability.or_else(|| last.and_then(|last| Some(last.bitmap.ledger()?.durability())));
        let view = if graph.is_drive(drive) { View::Drive } else { View::Node };
        let bitmap = NewBitmap {
            granularity: new.granularity,
            durability,
            view,
            ..NewBitmap::named(epoch.to_string())
        };
        change.add_bitmap(drive, bitmap)?;
    }
    Ok(())
}

/// Adds to a change: a checkpoint of a drive is forgotten, and no other delta changes. What its epoch has goes to the
/// one before; if it is the last, that one records again.
///
/// Errors: there is none of that name; or its bitmap is in use.
pub fn delete(graph: &Graph, change: &mut Change, drive: &str, name: &str) -> Result<()> {
    let there = of_drive(graph, drive)?;
    let at = position(&there, drive, name)?;
    let gone = there[at].bitmap.name();
    let before =
        at.checked_sub(1).map(|at| &there[at]).filter(|before| before.epoch.number == there[at].epoch.after);
    if let Some(before) = before {
        let into = before.bitmap.name();
        if at + 1 == there.len() && there[at].bitmap.is_recording() {
            change.enable_bitmap(drive, into.as_str())?;
        }
        change.merge_bitmaps(drive, into.as_str(), vec![(drive.to_owned(), gone.to_string())])?;
    }
    change.remove_bitmap(drive, gone.as_str())?;
    if let Some(next) = there.get(at + 1).filter(|next| next.epoch.after == there[at].epoch.number) {
        // If the one before is missing, so is what follows it: the gap must stay one.
        let after = if before.is_some() || there[at].epoch.after == 0 {
            before.map_or(0, |before| before.epoch.number)
        } else {
            there[at].epoch.after
        };
        let epoch = Epoch { after, ..next.epoch.clone() };
        change.rename_bitmap(drive, next.bitmap.name().as_str(), &epoch.to_string())?;
    }
    Ok(())
}

/// What changed in a drive between two checkpoints; without a second one, until now.
///
/// Errors: one of them is not there, they come in the other order, or the bitmap of an epoch between them was taken away or
/// lost: then what changed is not known.
pub fn delta(graph: &Graph, drive: &str, from: &str, to: Option<&str>) -> Result<Bits> {
    let there = of_drive(graph, drive)?;
    let epochs = between(&there, drive, from, to)?;
    let finest = epochs.iter().map(|epoch| epoch.bitmap.granularity()).min();
    let Some(granularity) = finest else {
        let first = &there[position(&there, drive, from)?].bitmap;
        return Ok(Bits::new(first.granularity(), first.length()));
    };
    let bits = Bits::new(granularity, epochs[0].bitmap.length());
    for epoch in epochs {
        bits.merge_from(epoch.bitmap.bits())?;
        // While a job reads it what stands still is not all.
        bits.merge_from(epoch.bitmap.recording_bits())?;
    }
    Ok(bits)
}

/// Adds to a change: a bitmap at `target` that has what changed in `drive` between two checkpoints, as [`delta`] says it at
/// the moment of the change. It does not record.
pub fn add_delta(
    graph: &Graph,
    change: &mut Change,
    (drive, from, to): (&str, &str, Option<&str>),
    (target, name): (&str, &str),
) -> Result<()> {
    let there = of_drive(graph, drive)?;
    let epochs = between(&there, drive, from, to)?;
    let granularity = epochs.iter().map(|epoch| epoch.bitmap.granularity().bytes()).min();
    let bitmap = NewBitmap { granularity, recording: false, view: View::Node, ..NewBitmap::named(name) };
    change.add_bitmap(target, bitmap)?;
    let sources = epochs.iter().map(|epoch| (drive.to_owned(), epoch.bitmap.name().to_string())).collect();
    change.merge_bitmaps(target, name, sources)
}

/// The epochs from one checkpoint to another, none missing.
fn between<'a>(
    there: &'a [Checkpoint],
    drive: &str,
    from: &str,
    to: Option<&str>,
) -> Result<&'a [Checkpoint]> {
    let first = position(there, drive, from)?;
    let end = match to {
        Some(to) => position(there, drive, to)?,
        None => there.len(),
    };
    if end < first {
        let message =
            format_args!("checkpoint '{}' of '{drive}' is older than '{from}'", to.unwrap_or_default());
        return Err(Error::new(Kind::Invalid, message));
    }
    // With an end, the link to it counts as well: an epoch between may be missing just before it.
    let links = &there[first..there.len().min(end + 1)];
    if let Some(gap) = links.windows(2).find(|pair| pair[1].epoch.after != pair[0].epoch.number) {
        let message = format_args!(
            "what changed in '{drive}' before checkpoint '{}' is not known: a bitmap was removed there",
            gap[1].epoch.checkpoint
        );
        return Err(Error::new(Kind::Invalid, message));
    }
    let epochs = &there[first..end];
    if let Some(lost) = epochs.iter().find(|epoch| epoch.bitmap.is_inconsistent()) {
        let message = format_args!(
            "what changed in '{drive}' after checkpoint '{}' is lost; adopt its bitmap '{}' as all dirty",
            lost.epoch.checkpoint,
            lost.bitmap.name()
        );
        return Err(Error::new(Kind::Corrupt, message));
    }
    if end == there.len()
        && let Some(last) = epochs.last()
    {
        must_record(drive, last)?;
    }
    Ok(epochs)
}

/// The last epoch records, or what changes in it is lost.
fn must_record(drive: &str, last: &Checkpoint) -> Result<()> {
    if last.bitmap.is_recording() {
        return Ok(());
    }
    let message = format_args!(
        "bitmap '{}' of '{drive}' does not record: what changed after checkpoint '{}' is not known",
        last.bitmap.name(),
        last.epoch.checkpoint
    );
    Err(Error::new(Kind::Invalid, message))
}

fn position(there: &[Checkpoint], drive: &str, name: &str) -> Result<usize> {
    there.iter().position(|checkpoint| checkpoint.epoch.checkpoint == name).ok_or_else(|| {
        let names = there.iter().map(|checkpoint| checkpoint.epoch.checkpoint.as_str());
        let nearest = driveline_graph::nearest(name, names);
        let hint = nearest.map(|name| format!("; did you mean '{name}'?")).unwrap_or_default();
        Error::new(Kind::NotFound, format_args!("'{drive}' has no checkpoint '{name}'{hint}"))
    })
}

//! Between two runs of the program: what a tool sees of an image's bitmaps, wherever they are.
//!
//! ```text
//!   after an orderly end   the image has them
//!   after kill -9          active.qcow2.dlbitmaps has them: looked at there; with the first change they go into the image
//! ```

use super::{
    Stores, Trust, beside,
    find::{InImage, lost, stored_in},
    open::is_past_use,
    owner::Owned,
    place,
    save::ForImage,
    store_error,
};
use driveline_bitmap::{Bitmap, BitmapName, Durability};
use driveline_graph::{BitmapToStore, Error, Graph, Kind, Result};
use driveline_store::{BootId, Inspection, Standing, Store};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

/// A bitmap between two runs of the program.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    /// It, without what keeps it; without valid contents if those are lost.
    pub(crate) bitmap: Arc<Bitmap>,
    /// How far it can be trusted.
    pub(crate) trust: Trust,
    /// What it survives. `None`: the image has it, where that is nobody's question.
    pub(crate) durability: Option<Durability>,
    /// The file that it is in.
    pub(crate) file: PathBuf,
}

/// What an image's bitmaps are.
#[derive(Clone, Debug, Default)]
pub(crate) struct Look {
    /// All of them that can be told.
    pub(crate) seen: Vec<Seen>,
    /// Names of entries in the image that are no bitmap at all, each with the reason: nobody can write them again.
    pub(crate) broken: Vec<(String, String)>,
    /// Files that somebody left beside the image who was killed: of no use once the image has its bitmaps again.
    pub(crate) left: Vec<PathBuf>,
    /// Why one of those cannot be read at all, so that it should be kept for who can.
    pub(crate) damaged: Option<String>,
    /// What else there is to know, in sentences without a capital.
    pub(crate) notes: Vec<String>,
    /// Why the image's own list cannot be read.
    pub(crate) unreadable: Option<String>,
}

impl Stores {
    /// Looks at the bitmaps of an image, and changes nothing.
    ///
    /// Errors: the image cannot be read; a file beside it is none of ours.
    pub(crate) async fn look(&self, node: &str) -> Result<Look> {
        let image = stored_in(&self.graph, node).await?;
        let Some(file) = place::file_of(&self.graph, node) else {
            return Err(Error::new(Kind::Invalid, "it is not in a file").at(node));
        };
        let mut look = Look { unreadable: image.stored.unreadable.clone(), ..Look::default() };
        let path = beside(&file);
        let mut lost_before = None;
        if path.exists() {
            look.left.push(path.clone());
            match inspect(&path, self.boot_id) {
                Ok((at, inspection)) => {
                    look.left.extend((at != path).then(|| at.clone()));
                    lost_before = self.look_beside(node, &image, &at, inspection, &mut look)?;
                }
                Err(error) if is_past_use(&error) => look.damaged = Some(error.to_string()),
                Err(error) => return Err(store_error(error)),
            }
        }
        self.look_inside(node, &image, &file, lost_before.as_deref(), &mut look)?;
        Ok(look)
    }

    /// What the file beside an image has. Returns which of the image's were lost before, if that is known.
    fn look_beside(
        &self,
        node: &str,
        image: &InImage,
        path: &Path,
        inspection: Inspection,
        look: &mut Look,
    ) -> Result<Option<Vec<String>>> {
        let size = self.graph.size_bytes(node)?;
        let owned = inspection.owner.as_deref().and_then(Owned::decode);
        let same_boot = inspection.boot_id == self.boot_id;
        let (clean, heartbeat) = (inspection.clean, inspection.heartbeat);
        let outside = self.changed_outside(node, owned.as_ref(), clean, same_boot, heartbeat);
        look.notes.extend(inspection.damage.map(|damage| format!("{}: {damage}", path.display())));
        for found in inspection.bitmaps {
            if image.bits.iter().any(|(name, _)| *name == *found.record.name) {
                // It was put away into the image; the end of the program came between that and the end of this file.
                continue;
            }
            let record = found.record;
            let bitmap = Bitmap::new(record.name, found.granularity, record.length);
            let bitmap = bitmap.with_view(found.view).with_recording(record.recording);
            found.bits.iter_dirty().for_each(|range| bitmap.mark_unconditionally(range));
            // The program may have been killed while the drive became longer or shorter.
            bitmap.resize(size);
            let trust = match &outside {
                Some(reason) => {
                    bitmap.mark_unconditionally(0..size);
                    Trust::AllDirty { reason: reason.clone() }
                }
                None => found.verdict.into(),
            };
            let (bitmap, durability, file) = (Arc::new(bitmap), Some(found.durability), path.to_owned());
            look.seen.push(Seen { bitmap, trust, durability, file });
        }
        Ok(owned.filter(|_| outside.is_none()).map(|owned| owned.lost))
    }

    /// What the image itself has, besides that.
    fn look_inside(
        &self,
        node: &str,
        image: &InImage,
        file: &Path,
        lost_before: Option<&[String]>,
        look: &mut Look,
    ) -> Result<()> {
        let size = self.graph.size_bytes(node)?;
        for stored in &image.stored.bitmaps {
            let bits = image.bits.iter().find(|(name, _)| *name == stored.name).map(|(_, bits)| bits);
            let beside = look.seen.iter().any(|seen| seen.file != file && seen.bitmap.name() == *stored.name);
            let removed = bits.is_none() && lost_before.is_some_and(|lost| !lost.contains(&stored.name));
            if beside || removed {
                continue;
            }
            let trust = if bits.is_some() { Trust::Exact } else { lost(stored) };
            let twice = look.seen.iter().any(|seen| seen.bitmap.name() == *stored.name);
            let (Ok(name), Some(granularity), false) =
                (BitmapName::new(&stored.name), stored.granularity, twice)
            else {
                let reason = trust.reason().filter(|_| !twice).unwrap_or("another one has its name");
                look.broken.push((stored.name.clone(), reason.to_owned()));
                continue;
            };
            let bitmap = Bitmap::new(name, granularity, size).with_recording(stored.recording);
            let bitmap = match bits {
                Some(bits) => {
                    bits.iter_dirty().for_each(|range| bitmap.mark_unconditionally(range));
                    bitmap
                }
                None => bitmap.with_lost_contents(),
            };
            look.seen.push(Seen { bitmap: Arc::new(bitmap), trust, durability: None, file: file.to_owned() });
        }
        Ok(())
    }
}

/// Makes these the bitmaps of an image that is open read-only, durably. Those whose contents are lost stay as they are.
///
/// Errors: the image has the old ones then, and what lies beside it counts as before.
pub(crate) async fn put(graph: &Graph, node: &str, bitmaps: &[Arc<Bitmap>]) -> Result<()> {
    let for_image = |bitmap: &Arc<Bitmap>| match bitmap.is_inconsistent() {
        true => ForImage::in_use(bitmap),
        false => ForImage::with_bits(bitmap, bitmap.bits().clone()),
    };
    let bitmaps: Vec<ForImage> = bitmaps.iter().map(for_image).collect();
    let mut change = graph.change().await;
    change.set_read_only(node, false)?;
    change.visit(node, move |open, children| {
        Box::pin(async move {
            let bitmaps: Vec<BitmapToStore<'_>> = bitmaps.iter().map(ForImage::borrow).collect();
            let stored = open.store_bitmaps(&children, &bitmaps).await;
            // Becoming writable took the witness away. If nothing was stored, it is as true as it was.
            let witness = stored.is_err() && open.witness().is_some_and(|witness| witness.at_open);
            let told = match open.witness() {
                Some(_) => open.set_witness(&children, witness).await,
                None => Ok(()),
            };
            stored.and(told)
        })
    })?;
    change.commit().await
}

/// Looks at the store that counts where `path` leads: itself, or the one that it moved to. Returns where that is.
///
/// Errors: as [`Store::inspect`].
pub(crate) fn inspect(path: &Path, boot_id: BootId) -> driveline_store::Result<(PathBuf, Inspection)> {
    let found = Store::inspect(path, boot_id)?;
    match &found.standing {
        Standing::Superseded { path: other, .. } if other != path && other.exists() => {
            Ok((other.clone(), Store::inspect(other, boot_id)?))
        }
        Standing::Incoming { from, path: other } if other != path && other.exists() => {
            let original = Store::inspect(other, boot_id)?;
            let by = |by| matches!(original.standing, Standing::Superseded { by: other, .. } if other == by);
            match original.uuid == *from && !by(found.uuid) {
                true => Ok((other.clone(), original)),
                false => Ok((path.to_owned(), found)),
            }
        }
        _ => Ok((path.to_owned(), found)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use driveline_store::{LogOptions, Options};

    #[test]
    fn of_a_store_that_was_moving_the_one_that_counts_is_looked_at() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("a.dlbitmaps"), folder.path().join("b.dlbitmaps"));
        let boot_id = BootId::current().unwrap();
        let options =
            Options { drive_size: 1 << 20, boot_id, owner: b"us".to_vec(), log: LogOptions::default() };
        let store = Store::create(&from, &options).unwrap();
        let counts = |path: &Path| inspect(path, boot_id).unwrap().0;
        let mut copy = store.copy_to(&to).unwrap();
        assert_eq!((counts(&from), counts(&to)), (from.clone(), from.clone()));
        store.supersede(&mut copy).unwrap();
        assert_eq!((counts(&from), counts(&to)), (to.clone(), to.clone()), "even if it ends here");
        copy.activate(&store).unwrap();
        std::fs::remove_file(&from).unwrap();
        assert_eq!(counts(&to), to);
    }
}

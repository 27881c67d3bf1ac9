//! The holder: during a job a drive's bitmaps sit on a do-nothing filter at its root, and afterwards go home.
//!
//! ```text
//!   drive ─▶ limit ─▶ active          drive ─▶ holder ─▶ limit ─▶ active
//!              └ daily                            └ daily
//! ```
//!
//! Guest writes pass the holder and are recorded there. The job's do not: its root is on a node below. So the
//! bitmaps are exact without any logic in the drive, and stay exact while the job takes apart what is below.

use driveline_bitmap::View;
use driveline_graph::{Change, Options, Result};
use std::{collections::BTreeMap, sync::Arc};

/// The filter that does nothing. It is a plugin like any other; the core knows it by name.
pub const HOLDER_DRIVER: &str = "bitmap-holder";

/// Holders in use, by drive. Jobs on one drive share one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Holders(BTreeMap<Arc<str>, Held>);

#[derive(Clone, Debug)]
struct Held {
    node: Arc<str>,
    jobs: usize,
}

/// Which holder a job uses, if any.
#[derive(Clone, Debug)]
pub(crate) struct UsedHolder {
    drive: Arc<str>,
    inserted: Arc<str>,
}

impl UsedHolder {
    /// Its node.
    pub(crate) fn node(&self) -> &Arc<str> {
        &self.inserted
    }
}

impl Holders {
    /// Adds to a change: a holder above the drive's root, with the drive's bitmaps on it. Nothing, if the drive
    /// has no bitmaps of its own, or if they live on a holder for good.
    ///
    /// Whoever makes the change keeps a copy of the holders, and puts it back when the change is not made.
    pub(crate) async fn park(
        &mut self,
        change: &mut Change,
        drive: &str,
        node_name: Option<&str>,
    ) -> Result<Option<UsedHolder>> {
        // Its user may have emptied a holder and taken it out.
        if let Some(held) = self.0.get_mut(drive).filter(|held| change.has_node(&held.node)) {
            held.jobs += 1;
            return Ok(Some(UsedHolder { drive: drive.into(), inserted: held.node.clone() }));
        }
        let layout = change.layout();
        let places = layout.bitmap_places(drive)?;
        let away = |node: &str| layout.node(node).is_ok_and(|node| node.driver_name() != HOLDER_DRIVER);
        let to_park: Vec<_> =
            places.iter().filter(|(node, bitmap)| bitmap.view() == View::Drive && away(node)).collect();
        if to_park.is_empty() {
            return Ok(None);
        }
        let mut definition = Options::new();
        definition.insert("driver".into(), HOLDER_DRIVER.into());
        if let Some(name) = node_name {
            definition.insert("node-name".into(), name.into());
        }
        let holder: Arc<str> = change.insert_filter(definition, drive).await?.name().into();
        for (_, bitmap) in to_park {
            change.park_bitmap(bitmap, &holder)?;
        }
        self.0.insert(drive.into(), Held { node: holder.clone(), jobs: 1 });
        Ok(Some(UsedHolder { drive: drive.into(), inserted: holder }))
    }

    /// Adds to a change: one job less uses the holder; when it was the last, the bitmaps go home and the holder goes.
    ///
    /// A bitmap whose home is still below the drive's root goes there; else it goes to the root. One of the same
    /// name that is there is merged into it.
    pub(crate) fn leave(&mut self, change: &mut Change, used: &UsedHolder) -> Result<()> {
        let own = |held: &&mut Held| held.node == used.inserted;
        let Some(held) = self.0.get_mut(&used.drive).filter(own) else { return Ok(()) };
        held.jobs -= 1;
        if held.jobs > 0 {
            return Ok(());
        }
        self.0.remove(&used.drive);
        if !change.has_node(&used.inserted) {
            return Ok(());
        }
        for (_, bitmap) in change.layout().bitmap_places(&used.inserted)? {
            change.bring_home(&used.inserted, bitmap.name().as_str(), &used.drive)?;
        }
        change.remove_emptied_filter(&used.inserted)
    }
}

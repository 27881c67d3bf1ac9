//! What a bitmap's state allows, by QEMU's rules.

use core::fmt;
use std::path::PathBuf;

use crate::BitmapName;

/// Whose changes a bitmap records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum View {
    /// What the drive's user changed: writes that leave the drive's content as it was are ignored, and an area that
    /// a resize adds counts as changed.
    #[default]
    Drive,
    /// What changed in this node's own content, as in QEMU.
    Node,
}

impl fmt::Display for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            View::Drive => "drive",
            View::Node => "node",
        })
    }
}

/// Where a persistent bitmap's bits live on disk. Independent of the node that the bitmap is attached to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StoreBinding {
    /// In the bitmaps extension of a qcow2 image.
    Qcow2 {
        /// The node of the image.
        node: String,
    },
    /// In a file of its own, for every other format.
    Sidecar {
        /// The file.
        path: PathBuf,
    },
}

/// What one can do to a bitmap, for [`Bitmap::check`](crate::Bitmap::check) and for errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Operation {
    /// Take it away for good.
    Remove,
    /// Make all of it clean.
    Clear,
    /// Record from now on.
    Enable,
    /// Record no more.
    Disable,
    /// Add another bitmap's dirty granules.
    MergeInto,
    /// Add its dirty granules to another bitmap.
    MergeFrom,
    /// Mark what is allocated.
    Populate,
    /// Give it another name.
    Rename,
    /// Keep its bits as they are while a successor records.
    Freeze,
    /// Use it for a while, which makes it busy.
    Use,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Operation::Remove => "remove",
            Operation::Clear => "clear",
            Operation::Enable => "enable",
            Operation::Disable => "disable",
            Operation::MergeInto => "merge into",
            Operation::MergeFrom => "merge from",
            Operation::Populate => "populate",
            Operation::Rename => "rename",
            Operation::Freeze => "freeze",
            Operation::Use => "use",
        })
    }
}

/// What an operation cannot bear. QEMU's DEFAULT is all three, its ALLOW_RO all but `readonly`.
struct Refuses {
    busy: bool,
    readonly: bool,
    inconsistent: bool,
}

impl Operation {
    fn refuses(self) -> Refuses {
        let (busy, readonly, inconsistent) = match self {
            // The only thing left to do with a bitmap whose contents are lost.
            Operation::Remove => (true, true, false),
            Operation::Clear | Operation::MergeInto | Operation::Populate | Operation::Freeze => {
                (true, true, true)
            }
            Operation::Enable | Operation::Disable | Operation::MergeFrom => (true, false, true),
            // A handle outlives a rename, so the users of a busy bitmap do not care.
            Operation::Rename => (false, true, false),
            // Several may read a bitmap at once; only a freeze wants it alone.
            Operation::Use => (false, false, true),
        };
        Refuses { busy, readonly, inconsistent }
    }
}

/// The part of a bitmap that only the control path reads.
#[derive(Debug)]
pub(crate) struct Control {
    pub(crate) name: BitmapName,
    /// Who makes the bitmap busy, by a number that the next one of the same name does not share.
    pub(crate) users: Vec<(u64, String)>,
    /// Who wants it to stay, numbered likewise.
    pub(crate) keepers: Vec<(u64, String)>,
    pub(crate) users_ever: u64,
    pub(crate) readonly: bool,
    pub(crate) inconsistent: bool,
    pub(crate) persistent: bool,
    pub(crate) store: Option<StoreBinding>,
}

impl Control {
    pub(crate) fn check(&self, operation: Operation) -> crate::Result<()> {
        let refuses = operation.refuses();
        let names =
            |who: &[(u64, String)]| who.iter().map(|(_, who)| who.as_str()).collect::<Vec<_>>().join(", ");
        let (found, expected) = if refuses.busy && !self.users.is_empty() {
            (format!("busy (in use by {})", names(&self.users)), "one that nobody uses")
        } else if operation == Operation::Remove && !self.keepers.is_empty() {
            (format!("shown by {}", names(&self.keepers)), "one that nobody looks at")
        } else if refuses.inconsistent && self.inconsistent {
            ("inconsistent (its image was not closed orderly)".to_owned(), "one whose contents are valid")
        } else if refuses.readonly && self.readonly {
            ("readonly (its image is open read-only)".to_owned(), "one that may be changed")
        } else {
            return Ok(());
        };
        let name = self.name.to_string();
        Err(crate::Error::Refused { name, operation, found, expected })
    }

    pub(crate) fn add_user(&mut self, who: &str) -> u64 {
        self.users_ever += 1;
        self.users.push((self.users_ever, who.to_owned()));
        self.users_ever
    }

    pub(crate) fn remove_user(&mut self, user: u64) {
        self.users.retain(|(number, _)| *number != user);
    }

    pub(crate) fn add_keeper(&mut self, who: &str) -> u64 {
        self.users_ever += 1;
        self.keepers.push((self.users_ever, who.to_owned()));
        self.users_ever
    }

    pub(crate) fn remove_keeper(&mut self, keeper: u64) {
        self.keepers.retain(|(number, _)| *number != keeper);
    }
}

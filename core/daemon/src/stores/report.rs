//! What became of a bitmap that was found, for people and for monitors.

use driveline_store::Verdict;
use std::fmt;

/// A bitmap that was found, and how far it can be trusted. It can be used in any case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovered {
    /// The drive, or the node of the image.
    pub owner: String,
    /// The bitmap.
    pub name: String,
    /// How far to trust it.
    pub trust: Trust,
    /// Was there anything to recover, or had it been put away in good order?
    pub crashed: bool,
}

/// How far a bitmap that was found can be trusted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trust {
    /// Dirty is what was written, no more and no less.
    Exact,
    /// Dirty is what was written, and what may have been.
    Superset {
        /// Areas of the drive that were being written when the machine went down.
        extents: u64,
        /// Bytes that became dirty by them.
        bytes: u64,
    },
    /// Everything is dirty.
    AllDirty {
        /// Why.
        reason: String,
    },
    /// Its contents are lost, and nobody said yet what should become of it.
    Lost {
        /// Why.
        reason: String,
    },
}

impl Trust {
    /// Its word in QMP.
    pub fn word(&self) -> &'static str {
        match self {
            Trust::Exact => "exact",
            Trust::Superset { .. } => "superset",
            Trust::AllDirty { .. } => "all-dirty",
            Trust::Lost { .. } => "lost",
        }
    }

    /// The reason, if there is one.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Trust::AllDirty { reason } | Trust::Lost { reason } => Some(reason),
            _ => None,
        }
    }
}

impl From<Verdict> for Trust {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Exact => Trust::Exact,
            Verdict::Superset { extents, bytes } => Trust::Superset { extents, bytes },
            Verdict::AllDirty { reason } => Trust::AllDirty { reason },
        }
    }
}

impl fmt::Display for Recovered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bitmap {}/{}: ", self.owner, self.name)?;
        match &self.trust {
            Trust::Exact => f.write_str("recovered, exact"),
            Trust::Superset { extents, bytes } => write!(
                f,
                "recovered, with at most {bytes} bytes too much ({extents} areas were being written when the machine \
                 went down)"
            ),
            Trust::AllDirty { reason } => write!(f, "all of it counts as dirty: {reason}"),
            Trust::Lost { reason } => {
                write!(f, "its contents are lost: {reason}; adopt it as all dirty, or remove it")
            }
        }
    }
}

//! What becomes of a bitmap that a job copies by.

use serde::{Deserialize, Serialize};

/// What becomes of the bitmap that says what a mirror or backup copies. QEMU's `BitmapSyncMode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BitmapMode {
    /// After a success it says what was written since; after a failure, what it said and that.
    #[default]
    OnSuccess,
    /// It forgets nothing.
    Never,
    /// Whatever happens, it says what the target lacks.
    Always,
}

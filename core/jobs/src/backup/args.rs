//! What a backup is started with.

use crate::{bitmap_mode::BitmapMode, record::OnRestart, state::OnError};
use driveline_graph::{Error, Kind, Result};
use serde::{Deserialize, Serialize};

/// What is copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackupSync {
    /// Everything.
    #[default]
    Full,
    /// What the top image of the drive has allocated.
    Top,
    /// Nothing but what guests overwrite: the job goes on until it is cancelled.
    None,
    /// What is dirty in the bitmap, which forgets it if all goes well.
    Incremental,
    /// What is dirty in the bitmap; `bitmap-mode` says what becomes of that.
    Bitmap,
}

impl BackupSync {
    pub(super) fn is_by_bitmap(self) -> bool {
        matches!(self, BackupSync::Incremental | BackupSync::Bitmap)
    }
}

/// How hard the job works.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Perf {
    /// Copies in flight.
    pub workers_max: i64,
    /// Bytes of one copy; 0: no limit.
    pub chunk_bytes_max: i64,
    /// The smallest cluster.
    pub cluster_bytes_min: u64,
}

impl Default for Perf {
    fn default() -> Self {
        Self { workers_max: 64, chunk_bytes_max: 0, cluster_bytes_min: 0 }
    }
}

impl Perf {
    /// More than so many do not make it faster.
    pub(super) fn in_flight(&self) -> usize {
        self.workers_max.clamp(1, 64) as usize
    }
}

/// What a backup is started with. The fields are QEMU's `blockdev-backup`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BackupArgs {
    /// Its id; without one, the device's name.
    pub job_id: Option<String>,
    /// The drive or node to put away.
    pub device: String,
    /// The node to put it into, as large as the device.
    pub target: String,
    /// What is copied.
    pub sync: BackupSync,
    /// The bitmap of the device that says what to copy, or that is to know what was.
    pub bitmap: Option<String>,
    /// What becomes of it.
    pub bitmap_mode: Option<BitmapMode>,
    /// Copies are compressed.
    pub compress: bool,
    /// What is copied is given up in the device.
    pub discard_source: bool,
    /// Bytes per second; 0: no limit.
    pub speed: u64,
    /// What becomes of errors when reading.
    pub on_source_error: OnError,
    /// What becomes of errors when writing.
    pub on_target_error: OnError,
    /// How hard it works.
    pub perf: Perf,
    /// The name of the filter.
    pub filter_node_name: Option<String>,
    /// Its user finalizes it.
    pub manual_finalize: bool,
    /// Its user dismisses it.
    pub manual_dismiss: bool,
    /// What becomes of it if the program is killed and started again; without it, what the drive says.
    pub on_restart: Option<OnRestart>,
}

impl BackupArgs {
    /// Checks what can be checked without a graph.
    pub(super) fn check(&self) -> Result<()> {
        let invalid = |text: &str| Err(Error::new(Kind::Invalid, text));
        match (self.sync, &self.bitmap, self.bitmap_mode) {
            (BackupSync::Incremental, None, _) => {
                invalid("must provide a valid bitmap name for 'incremental' sync mode")
            }
            (BackupSync::Bitmap, None, _) => {
                invalid("must provide a valid bitmap name for 'bitmap' sync mode")
            }
            (_, None, Some(_)) => invalid("Cannot specify bitmap sync mode without a bitmap"),
            (_, None, None) => Ok(()),
            (BackupSync::Incremental, Some(_), None | Some(BitmapMode::OnSuccess)) => Ok(()),
            (BackupSync::Incremental, ..) => {
                invalid("Bitmap sync mode must be 'on-success' when using sync mode 'incremental'")
            }
            (_, Some(_), None) => invalid("Bitmap sync mode must be given when providing a bitmap"),
            (BackupSync::None, ..) => invalid("sync mode 'none' does not produce meaningful bitmap outputs"),
            (BackupSync::Full | BackupSync::Top, _, Some(BitmapMode::Never)) => {
                let sync = if self.sync == BackupSync::Full { "full" } else { "top" };
                let text = "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode";
                Err(Error::new(Kind::Invalid, format_args!("{text} '{sync}'")))
            }
            _ => Ok(()),
        }?;
        if !(1..=i64::from(i32::MAX)).contains(&self.perf.workers_max) {
            return invalid("max-workers must be between 1 and 2147483647");
        }
        if self.perf.chunk_bytes_max < 0 {
            return invalid("max-chunk must be zero (which means no limit) or positive");
        }
        Ok(())
    }

    /// The mode that counts: `incremental` has but one.
    pub(super) fn mode(&self) -> Option<BitmapMode> {
        if self.sync == BackupSync::Incremental { Some(BitmapMode::OnSuccess) } else { self.bitmap_mode }
    }

    /// The longest piece of data, for clusters of that size.
    pub(super) fn piece_bytes(&self, cluster_bytes: u64) -> Result<u64> {
        let chunk = self.perf.chunk_bytes_max as u64;
        if chunk != 0 && chunk < cluster_bytes {
            let text = "Required max-chunk";
            let message = format_args!("{text} ({chunk}) is less than backup cluster size ({cluster_bytes})");
            return Err(Error::new(Kind::Invalid, message));
        }
        let longest = super::PIECE_BYTES.max(cluster_bytes);
        Ok(if chunk == 0 { longest } else { longest.min(chunk - chunk % cluster_bytes) })
    }
}

//! Long-running work on a storage graph: stream, commit, mirror and backup.
//!
//! A job moves data between the layers of a drive while guests use it. The *drive* does not change by that, so
//! its bitmaps must not either: for the time of a job they are parked on a holder, a filter that does nothing, at
//! the drive's root (`holder.rs`), and the job works on nodes below it. At the end they go home, whatever came of
//! the job.
//!
//! Its nouns:
//! * [`Jobs`]: the list, by id; every verb of QMP is a method of it;
//! * a job: QEMU's state machine ([`JobStatus`], [`Verb`]), an error policy ([`OnError`]), a speed limit;
//! * [`Start`]: a change of the graph in which jobs begin, together with whatever else happens in it;
//! * a group: jobs that end together or not at all (`group.rs`);
//! * a holder: see above;
//! * a [`Journal`]: where jobs are written down, so that [`Start::restart`] lets them go on when the program was killed
//!   (`journal.rs`), with a progress that may be believed then (`safe.rs`).
//!
//! It knows no QMP and no executor: events are values ([`JobEvent`]), and a [`Runtime`] is given to it.
//!
//! ```no_run
//! # async fn example(graph: driveline_graph::Graph, runtime: std::sync::Arc<dyn driveline_jobs::Runtime>) -> driveline_graph::Result<()> {
//! use driveline_jobs::{Jobs, StreamArgs};
//! let jobs = Jobs::new(graph, runtime);
//! let id = jobs.stream(StreamArgs { device: "vda".into(), ..StreamArgs::default() }).await?;
//! let ended = jobs.wait(&id).await?;
//! assert!(ended.error.is_none());
//! # Ok(()) }
//! ```
#![forbid(unsafe_code)]

mod backup;
mod bitmap_mode;
mod chain;
mod commit;
mod copy;
mod event;
mod group;
mod holder;
mod job;
mod journal;
mod limit;
mod manager;
mod mirror;
mod push;
mod record;
mod restart;
mod safe;
mod start;
mod state;
mod stream;
mod task;

pub use backup::{BackupArgs, BackupSync, Perf};
pub use bitmap_mode::BitmapMode;
pub use chain::file_and_format;
pub use commit::CommitArgs;
pub use event::JobEvent;
pub use holder::HOLDER_DRIVER;
pub use job::{JobInfo, JobKind};
pub use journal::{FoundBitmap, FoundJob, Journal, Page};
pub use manager::{Jobs, Runtime};
pub use mirror::{CopyMode, MirrorArgs, MirrorSync};
pub use record::{JobArgs, JobImage, JobRecord, OnRestart, Phase};
pub use restart::{Restarted, undo_half_end};
pub use start::{Completion, Start};
pub use state::{ErrorAction, IoStatus, JobStatus, OnError, Verb};
pub use stream::{Base, StreamArgs};
pub use task::TaskProgress;

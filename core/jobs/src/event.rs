//! What happens to jobs, for those who listen. One event here is one event of QMP.

use crate::{
    job::{JobInfo, JobKind},
    state::{ErrorAction, JobStatus},
};

/// Something that happened to a job.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum JobEvent {
    /// `JOB_STATUS_CHANGE`.
    StatusChange {
        /// The job.
        id: String,
        /// What it is now.
        status: JobStatus,
    },
    /// `BLOCK_JOB_READY`.
    Ready(Box<JobInfo>),
    /// `BLOCK_JOB_PENDING`: it waits for its user to finalize it.
    Pending(Box<JobInfo>),
    /// `BLOCK_JOB_COMPLETED`; with an error if it failed.
    Completed(Box<JobInfo>),
    /// `BLOCK_JOB_CANCELLED`.
    Cancelled(Box<JobInfo>),
    /// `BLOCK_JOB_ERROR`: a read or write of the job failed.
    IoError {
        /// The job.
        id: String,
        /// What it does.
        kind: JobKind,
        /// `read` or `write`.
        operation: &'static str,
        /// What was done about it.
        action: ErrorAction,
    },
}

//! The state machine of jobs: QEMU's, states and verbs alike.
//!
//! Source: QEMU's `job.c`, the tables of transitions and verbs.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Where a job is in its life.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum JobStatus {
    /// Not a job yet.
    Undefined,
    /// Made, not started.
    Created,
    /// At work.
    Running,
    /// At work, but stopped for a while.
    Paused,
    /// All is copied; it follows what changes, and can be completed.
    Ready,
    /// Ready, but stopped for a while.
    Standby,
    /// Its own work is done; it waits for others of its transaction.
    Waiting,
    /// To be finalized, by the user if he wanted that.
    Pending,
    /// On its way out after an error or a cancel.
    Aborting,
    /// Over; its result can be read until it is dismissed.
    Concluded,
    /// Gone.
    Null,
}

/// What a user can do to a job.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verb {
    /// End it without its result.
    Cancel,
    /// Stop it for a while.
    Pause,
    /// Go on.
    Resume,
    /// Change its speed limit.
    SetSpeed,
    /// Change how it works.
    Change,
    /// Bring a ready job to its end.
    Complete,
    /// Make a pending job's result take effect.
    Finalize,
    /// Forget a concluded job.
    Dismiss,
}

impl JobStatus {
    /// The name in QMP.
    pub fn name(self) -> &'static str {
        use JobStatus::*;
        match self {
            Undefined => "undefined",
            Created => "created",
            Running => "running",
            Paused => "paused",
            Ready => "ready",
            Standby => "standby",
            Waiting => "waiting",
            Pending => "pending",
            Aborting => "aborting",
            Concluded => "concluded",
            Null => "null",
        }
    }

    /// May it become that?
    pub fn may_become(self, next: JobStatus) -> bool {
        use JobStatus::*;
        matches!(
            (self, next),
            (Undefined, Created)
                | (Created, Running | Aborting | Null)
                | (Running, Paused | Ready | Waiting | Aborting)
                | (Paused, Running)
                | (Ready, Standby | Waiting | Aborting)
                | (Standby, Ready)
                | (Waiting, Pending | Aborting)
                | (Pending, Aborting | Concluded)
                | (Aborting, Aborting | Concluded)
                | (Concluded, Null)
        )
    }

    /// Is the verb allowed now?
    pub fn allows(self, verb: Verb) -> bool {
        use JobStatus::*;
        match verb {
            Verb::Cancel => matches!(self, Created | Running | Paused | Ready | Standby | Waiting | Pending),
            Verb::Pause | Verb::Resume | Verb::SetSpeed | Verb::Change => {
                matches!(self, Created | Running | Paused | Ready | Standby)
            }
            Verb::Complete => matches!(self, Ready | Standby),
            Verb::Finalize => self == Pending,
            Verb::Dismiss => self == Concluded,
        }
    }
}

impl fmt::Display for JobStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Verb {
    /// The name in QMP.
    pub fn name(self) -> &'static str {
        match self {
            Verb::Cancel => "cancel",
            Verb::Pause => "pause",
            Verb::Resume => "resume",
            Verb::SetSpeed => "set-speed",
            Verb::Change => "change",
            Verb::Complete => "complete",
            Verb::Finalize => "finalize",
            Verb::Dismiss => "dismiss",
        }
    }
}

/// What becomes of a job when a read or write of its fails. QEMU's `BlockdevOnError`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnError {
    /// It fails.
    #[default]
    Report,
    /// It goes on; a stream fails at its end, others try again.
    Ignore,
    /// As `Stop` when space is short, else as `Report`.
    Enospc,
    /// It pauses, and tries again when it is resumed.
    Stop,
    /// As `Enospc`.
    Auto,
}

/// What is done about an error.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ErrorAction {
    /// Nothing; the job goes on.
    Ignore,
    /// The job fails.
    Report,
    /// The job pauses.
    Stop,
}

impl ErrorAction {
    /// The name in QMP.
    pub fn name(self) -> &'static str {
        match self {
            ErrorAction::Ignore => "ignore",
            ErrorAction::Report => "report",
            ErrorAction::Stop => "stop",
        }
    }
}

impl OnError {
    /// What to do about an errno.
    pub fn action(self, errno: i32) -> ErrorAction {
        const ENOSPC: i32 = 28;
        match self {
            OnError::Report => ErrorAction::Report,
            OnError::Ignore => ErrorAction::Ignore,
            OnError::Stop => ErrorAction::Stop,
            OnError::Enospc | OnError::Auto if errno == ENOSPC => ErrorAction::Stop,
            OnError::Enospc | OnError::Auto => ErrorAction::Report,
        }
    }
}

/// The state of a job's device, as QEMU's `BlockDeviceIoStatus`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum IoStatus {
    /// No error that stopped the job.
    #[default]
    Ok,
    /// An error stopped it.
    Failed,
    /// A lack of space stopped it.
    NoSpace,
}

impl IoStatus {
    /// The name in QMP.
    pub fn name(self) -> &'static str {
        match self {
            IoStatus::Ok => "ok",
            IoStatus::Failed => "failed",
            IoStatus::NoSpace => "nospace",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::JobStatus::*;

    #[test]
    fn every_live_state_can_end_and_nothing_leaves_null() {
        let all = [
            Undefined, Created, Running, Paused, Ready, Standby, Waiting, Pending, Aborting, Concluded, Null,
        ];
        for from in all {
            assert!(!Null.may_become(from));
            let mut reached = vec![from];
            let mut at = 0;
            while at < reached.len() {
                for next in all {
                    if reached[at].may_become(next) && !reached.contains(&next) {
                        reached.push(next);
                    }
                }
                at += 1;
            }
            assert!(reached.contains(&Null), "{from} never ends");
        }
    }
}

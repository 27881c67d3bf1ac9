//! What is written down of a job, so that it can go on when the program was killed.

use crate::{backup::BackupArgs, commit::CommitArgs, job::JobKind, mirror::MirrorArgs, stream::StreamArgs};
use driveline_graph::{Error, Kind, Options, Result};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The version of [`JobRecord`] that this program writes, and the only one that it reads.
const VERSION: u32 = 1;

/// What becomes of a job when the program ends in its middle and is started again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnRestart {
    /// It goes on where it was.
    #[default]
    Resume,
    /// It is dropped: its target stays as it is.
    Drop,
}

/// How far a job has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The change of the graph that it begins in was not made yet: nobody was told that there is a job.
    Starting,
    /// It looks for what there is to do. What it has found so far is not all.
    Finding,
    /// It is at work, and its progress says what is left.
    Working,
    /// Its target is equal, and about to take the drive's place: if it has, guests have written there since, and only there; if the
    /// program ended before, they write to the source still.
    #[serde(rename = "pivoted")]
    Pivoting,
    /// Its result is whole. What guests have written since is nobody's business.
    Completed,
    /// It was cancelled, or failed.
    Cancelled,
}

impl Phase {
    /// Of a job that ends so.
    pub(crate) fn at_end(success: bool, pivots: bool) -> Self {
        match (success, pivots) {
            (true, true) => Phase::Pivoting,
            (true, false) => Phase::Completed,
            (false, _) => Phase::Cancelled,
        }
    }
}

/// What a job does, with all that it was started with.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobArgs {
    /// A stream.
    Stream(StreamArgs),
    /// A commit.
    Commit(CommitArgs),
    /// A mirror.
    Mirror(MirrorArgs),
    /// A backup.
    Backup(BackupArgs),
}

impl JobArgs {
    /// What kind of job it is.
    pub fn kind(&self) -> JobKind {
        match self {
            JobArgs::Stream(_) => JobKind::Stream,
            JobArgs::Commit(_) => JobKind::Commit,
            JobArgs::Mirror(_) => JobKind::Mirror,
            JobArgs::Backup(_) => JobKind::Backup,
        }
    }

    /// From now on it may do so many bytes per second.
    pub(crate) fn set_speed(&mut self, bytes_per_second: u64) {
        let speed = match self {
            JobArgs::Stream(args) => &mut args.speed,
            JobArgs::Commit(args) => &mut args.speed,
            JobArgs::Mirror(args) => &mut args.speed,
            JobArgs::Backup(args) => &mut args.speed,
        };
        *speed = bytes_per_second;
    }

    /// The drive or node that it was started on.
    pub fn device(&self) -> &str {
        match self {
            JobArgs::Stream(args) => &args.device,
            JobArgs::Commit(args) => &args.device,
            JobArgs::Mirror(args) => &args.device,
            JobArgs::Backup(args) => &args.device,
        }
    }
}

/// An image that a job works on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobImage {
    /// Its node, as it was called.
    pub node: String,
    /// Its file. Without one it is known by its node alone.
    pub file: Option<PathBuf>,
}

/// A job as it is written down before it changes anything.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct JobRecord {
    version: u32,
    /// Its id.
    pub id: String,
    /// What it does. What its user changed since it began (its speed, a mirror's copy mode) is in here, too.
    pub args: JobArgs,
    /// How far it has come.
    pub phase: Phase,
    /// What becomes of it.
    pub on_restart: OnRestart,
    /// Where its data comes from: the top image of what it works on.
    pub source: JobImage,
    /// Where its data goes to, if that is another image; of a stream, what stays below.
    pub target: Option<JobImage>,
    /// How that image is opened, if nobody else does it.
    pub open_target: Option<Options>,
    /// The target goes when its last user goes.
    #[serde(default)]
    pub target_is_implicit: bool,
    /// Jobs that end together have the same one.
    pub group: Option<String>,
    /// It could not go on, and guests may have written since: its progress says nothing of that.
    #[serde(default)]
    pub unwatched: bool,
    /// Somebody else has changed the target of a mirror, and its user has not said that it is to be copied over.
    #[serde(default)]
    pub foreign_target: bool,
    /// Its user has paused it.
    #[serde(default)]
    pub paused: bool,
}

impl JobRecord {
    pub(crate) fn new(id: &str, args: JobArgs, on_restart: OnRestart, source: JobImage) -> Self {
        Self {
            version: VERSION,
            id: id.to_owned(),
            args,
            phase: Phase::Starting,
            on_restart,
            source,
            target: None,
            open_target: None,
            target_is_implicit: false,
            group: None,
            unwatched: false,
            foreign_target: false,
            paused: false,
        }
    }

    /// As it is kept: JSON.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a record is JSON")
    }

    /// Reads it again.
    ///
    /// Errors: [`Kind::Corrupt`], with what is wrong: it is damaged, or a later version of the program wrote it.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let corrupt = |text: String| Error::new(Kind::Corrupt, format_args!("the record of a job: {text}"));
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let Versioned { version } =
            serde_json::from_slice(bytes).map_err(|error| corrupt(error.to_string()))?;
        if version != VERSION {
            return Err(corrupt(format!("it is of version {version}; expected {VERSION}")));
        }
        serde_json::from_slice(bytes).map_err(|error| corrupt(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_as_it_was_written_and_damage_is_told() {
        let args = StreamArgs { device: "vda".into(), speed: 7, ..StreamArgs::default() };
        let source = JobImage { node: "top".into(), file: Some("/a/top.qcow2".into()) };
        let record = JobRecord::new("job0", JobArgs::Stream(args), OnRestart::Drop, source);
        let bytes = record.encode();
        let again = JobRecord::decode(&bytes).unwrap();
        assert_eq!(again.encode(), bytes);
        assert_eq!((again.on_restart, again.phase), (OnRestart::Drop, Phase::Starting));
        let error = JobRecord::decode(&bytes[..bytes.len() - 1]).unwrap_err().to_string();
        assert!(error.contains("the record of a job: EOF"), "{error}");
        let later = String::from_utf8(bytes).unwrap().replace("\"version\":1", "\"version\":2");
        let error = JobRecord::decode(later.as_bytes()).unwrap_err().to_string();
        assert!(error.contains("it is of version 2; expected 1"), "{error}");
    }
}

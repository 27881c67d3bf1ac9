//! Commands on jobs: starting them, QEMU's two families of verbs (`job-*` by id, `block-job-*` by what it calls a
//! device, which is the id as well), queries and events.

use crate::{
    command::{Done, Nothing},
    error::{Class, Error, Result, without_number},
    events,
    interrupted::OnRestartName,
    monitor::Monitor,
    transaction::{Action, alone},
};
use driveline_graph::BoxFuture;
use driveline_jobs::{Base, CommitArgs, CopyMode, JobEvent, JobInfo, Jobs, OnError, Start, StreamArgs};
use serde::Deserialize;
use serde_json::{Map, Value, json};

/// QAPI's `BlockdevOnError`.
#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum OnErrorName {
    Report,
    Ignore,
    Enospc,
    Stop,
    Auto,
}

impl From<OnErrorName> for OnError {
    fn from(name: OnErrorName) -> Self {
        match name {
            OnErrorName::Report => OnError::Report,
            OnErrorName::Ignore => OnError::Ignore,
            OnErrorName::Enospc => OnError::Enospc,
            OnErrorName::Stop => OnError::Stop,
            OnErrorName::Auto => OnError::Auto,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct BlockStream {
    job_id: Option<String>,
    device: String,
    base: Option<String>,
    base_node: Option<String>,
    backing_file: Option<String>,
    bottom: Option<String>,
    /// The name of a protocol is never written as a format here, so there is nothing to mask.
    #[serde(rename = "backing-mask-protocol")]
    _backing_mask_protocol: Option<bool>,
    speed: Option<i64>,
    on_error: Option<OnErrorName>,
    filter_node_name: Option<String>,
    auto_finalize: Option<bool>,
    auto_dismiss: Option<bool>,
    #[serde(rename = "x-driveline-on-restart")]
    on_restart: Option<OnRestartName>,
}

impl Action for BlockStream {
    fn stage<'a>(&'a mut self, _: &'a Monitor, start: &'a mut Start) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let base = match (self.base.clone(), self.base_node.clone(), self.bottom.clone()) {
                (None, None, None) => None,
                (Some(file), None, None) => Some(Base::File(file)),
                (None, Some(node), None) => Some(Base::Node(node)),
                (None, None, Some(node)) => Some(Base::Bottom(node)),
                (Some(_), Some(_), _) => return Err(both("base", "base-node")),
                (Some(_), None, Some(_)) => return Err(both("base", "bottom")),
                (None, Some(_), Some(_)) => return Err(both("base-node", "bottom")),
            };
            let change = start.change();
            change.node_or_drive(&self.device).map_err(|_| Error::no_node(&self.device))?;
            if let Some(Base::Node(node) | Base::Bottom(node)) = &base {
                change.node_or_drive(node).map_err(|_| Error::no_node(node))?;
            }
            let arguments = StreamArgs {
                job_id: self.job_id.clone(),
                device: self.device.clone(),
                base,
                backing_file: self.backing_file.clone(),
                speed: speed(self.speed.unwrap_or(0))?,
                on_error: self.on_error.unwrap_or(OnErrorName::Report).into(),
                filter_node_name: self.filter_node_name.clone(),
                manual_finalize: self.auto_finalize == Some(false),
                manual_dismiss: self.auto_dismiss == Some(false),
                on_restart: self.on_restart.map(Into::into),
            };
            start.stream(arguments).await?;
            Ok(())
        })
    }
}

pub(crate) async fn block_stream(monitor: &Monitor, stream: BlockStream) -> Result<Done> {
    alone(monitor, stream).await
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct BlockCommit {
    job_id: Option<String>,
    device: String,
    base_node: Option<String>,
    base: Option<String>,
    top_node: Option<String>,
    top: Option<String>,
    backing_file: Option<String>,
    /// The name of a protocol is never written as a format here, so there is nothing to mask.
    #[serde(rename = "backing-mask-protocol")]
    _backing_mask_protocol: Option<bool>,
    speed: Option<i64>,
    on_error: Option<OnErrorName>,
    filter_node_name: Option<String>,
    auto_finalize: Option<bool>,
    auto_dismiss: Option<bool>,
    #[serde(rename = "x-driveline-on-restart")]
    on_restart: Option<OnRestartName>,
}

impl Action for BlockCommit {
    fn stage<'a>(&'a mut self, _: &'a Monitor, start: &'a mut Start) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let change = start.change();
            change.node_or_drive(&self.device).map_err(|_| {
                Error::new(Class::DeviceNotFound, format_args!("Device '{}' not found", self.device))
            })?;
            if self.base.is_some() && self.base_node.is_some() {
                return Err(both("base", "base-node"));
            }
            if self.top.is_some() && self.top_node.is_some() {
                return Err(both("top", "top-node"));
            }
            for node in [&self.top_node, &self.base_node].into_iter().flatten() {
                change.node_or_drive(node).map_err(|_| Error::no_node(node))?;
            }
            let arguments = CommitArgs {
                job_id: self.job_id.clone(),
                device: self.device.clone(),
                top_node: self.top_node.clone(),
                top: self.top.clone(),
                base_node: self.base_node.clone(),
                base: self.base.clone(),
                backing_file: self.backing_file.clone(),
                speed: speed(self.speed.unwrap_or(0))?,
                on_error: self.on_error.unwrap_or(OnErrorName::Report).into(),
                filter_node_name: self.filter_node_name.clone(),
                manual_finalize: self.auto_finalize == Some(false),
                manual_dismiss: self.auto_dismiss == Some(false),
                on_restart: self.on_restart.map(Into::into),
            };
            start.commit(arguments).await?;
            Ok(())
        })
    }
}

pub(crate) async fn block_commit(monitor: &Monitor, commit: BlockCommit) -> Result<Done> {
    alone(monitor, commit).await
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum CopyModeName {
    Background,
    WriteBlocking,
}

impl From<CopyModeName> for CopyMode {
    fn from(name: CopyModeName) -> Self {
        match name {
            CopyModeName::Background => CopyMode::Background,
            CopyModeName::WriteBlocking => CopyMode::WriteBlocking,
        }
    }
}

/// The kinds of jobs, as QAPI's `JobType`.
#[derive(Clone, Copy, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case")]
enum JobTypeName {
    Commit,
    Stream,
    Mirror,
    Backup,
    Create,
    Amend,
    SnapshotLoad,
    SnapshotSave,
    SnapshotDelete,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct BlockJobChange {
    id: String,
    r#type: JobTypeName,
    copy_mode: Option<CopyModeName>,
}

pub(crate) async fn block_job_change(monitor: &Monitor, change: BlockJobChange) -> Result<Done> {
    let mode = match (change.r#type, change.copy_mode) {
        (JobTypeName::Mirror, None) => return Err(Error::generic("Parameter 'copy-mode' is missing")),
        (JobTypeName::Mirror, Some(mode)) => Some(mode),
        (_, Some(_)) => return Err(Error::generic("Parameter 'copy-mode' is unexpected")),
        (_, None) => None,
    };
    let jobs = monitor.jobs();
    let id = block_job(jobs, change.id)?;
    let is_mirror = jobs.get(&id)?.kind == driveline_jobs::JobKind::Mirror;
    match mode.filter(|_| is_mirror) {
        Some(mode) => jobs.set_copy_mode(&id, mode.into()).await?,
        None => return Err(Error::generic("Job type does not support change")),
    }
    Ok(Done {})
}

fn both(one: &str, other: &str) -> Error {
    Error::generic(format_args!("'{one}' and '{other}' cannot be specified at the same time"))
}

pub(crate) fn speed(bytes_per_second: i64) -> Result<u64> {
    u64::try_from(bytes_per_second)
        .map_err(|_| Error::generic("Parameter 'speed' expects a non-negative value"))
}

/// A job, for `job-*`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ById {
    id: String,
}

/// A job, for `block-job-*`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ByDevice {
    device: String,
}

/// A job, for those of `block-job-*` that say `id` all the same.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BlockJobById {
    id: String,
}

/// What names a job, and how its family of commands says that there is none of that name.
pub(crate) trait Named {
    fn find(self, jobs: &Jobs) -> Result<String>;
}

impl Named for ById {
    fn find(self, jobs: &Jobs) -> Result<String> {
        jobs.get(&self.id).map_err(|_| Error::generic("Job not found"))?;
        Ok(self.id)
    }
}

impl Named for ByDevice {
    fn find(self, jobs: &Jobs) -> Result<String> {
        block_job(jobs, self.device)
    }
}

impl Named for BlockJobById {
    fn find(self, jobs: &Jobs) -> Result<String> {
        block_job(jobs, self.id)
    }
}

fn block_job(jobs: &Jobs, id: String) -> Result<String> {
    if jobs.get(&id).is_ok_and(|job| job.kind.is_block_job()) {
        return Ok(id);
    }
    Err(Error::new(Class::DeviceNotActive, format_args!("Block job '{id}' not found")))
}

/// A function for each verb, for either family.
macro_rules! verbs {
    ($($verb:ident)*) => {
        $(pub(crate) async fn $verb<N: Named>(monitor: &Monitor, job: N) -> Result<Done> {
            let jobs = monitor.jobs();
            jobs.$verb(&job.find(jobs)?)?;
            Ok(Done {})
        })*
    };
}

verbs! { pause resume complete finalize dismiss }

/// `job-cancel` always means it.
pub(crate) async fn cancel(monitor: &Monitor, job: ById) -> Result<Done> {
    let jobs = monitor.jobs();
    jobs.cancel(&job.find(jobs)?, true)?;
    Ok(Done {})
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BlockJobCancel {
    device: String,
    force: Option<bool>,
}

pub(crate) async fn block_job_cancel(monitor: &Monitor, cancel: BlockJobCancel) -> Result<Done> {
    let jobs = monitor.jobs();
    let id = block_job(jobs, cancel.device)?;
    jobs.cancel(&id, cancel.force.unwrap_or(false))?;
    Ok(Done {})
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SetSpeed {
    device: String,
    speed: i64,
}

pub(crate) async fn set_speed(monitor: &Monitor, set: SetSpeed) -> Result<Done> {
    let jobs = monitor.jobs();
    let id = block_job(jobs, set.device)?;
    jobs.set_speed(&id, speed(set.speed)?)?;
    Ok(Done {})
}

pub(crate) async fn query_jobs(monitor: &Monitor, _: Nothing) -> Result<Value> {
    let info = |job: JobInfo| {
        let mut info = json!({
            "id": job.id,
            "type": job.kind.name(),
            "status": job.status.name(),
            "current-progress": job.current_progress,
            "total-progress": job.total_progress,
        });
        add_error(&mut info, job.error);
        info
    };
    Ok(monitor.jobs().list().into_iter().map(info).collect())
}

pub(crate) async fn query_block_jobs(monitor: &Monitor, _: Nothing) -> Result<Value> {
    let info = |job: JobInfo| {
        let mut info = json!({
            "type": job.kind.name(),
            "device": job.id,
            "len": job.total_progress,
            "offset": job.current_progress,
            "busy": job.busy,
            "paused": job.paused,
            "speed": job.speed,
            "io-status": job.io_status.name(),
            "ready": job.ready,
            "status": job.status.name(),
            "auto-finalize": job.auto_finalize,
            "auto-dismiss": job.auto_dismiss,
        });
        if let (Some(synced), Some(info)) = (job.actively_synced, info.as_object_mut()) {
            info.insert("actively-synced".into(), synced.into());
        }
        add_error(&mut info, job.error);
        info
    };
    let block_jobs = monitor.jobs().list().into_iter().filter(|job| job.kind.is_block_job());
    Ok(block_jobs.map(info).collect())
}

fn add_error(info: &mut Value, error: Option<String>) {
    if let (Some(error), Some(info)) = (error, info.as_object_mut()) {
        info.insert("error".into(), without_number(&error).into());
    }
}

/// The message about an event of a job.
pub(crate) fn message(event: &JobEvent) -> Option<Value> {
    Some(match event {
        JobEvent::StatusChange { id, status } => {
            events::message("JOB_STATUS_CHANGE", json!({ "id": id, "status": status.name() }))
        }
        JobEvent::Ready(job) => events::message("BLOCK_JOB_READY", progress(job).into()),
        JobEvent::Cancelled(job) => events::message("BLOCK_JOB_CANCELLED", progress(job).into()),
        JobEvent::Completed(job) => {
            let mut data = progress(job).into();
            add_error(&mut data, job.error.clone());
            events::message("BLOCK_JOB_COMPLETED", data)
        }
        JobEvent::Pending(job) => {
            events::message("BLOCK_JOB_PENDING", json!({ "type": job.kind.name(), "id": job.id }))
        }
        JobEvent::IoError { id, operation, action, .. } => {
            let data = json!({ "device": id, "operation": operation, "action": action.name() });
            events::message("BLOCK_JOB_ERROR", data)
        }
        _ => return None,
    })
}

fn progress(job: &JobInfo) -> Map<String, Value> {
    let members = [
        ("type", job.kind.name().into()),
        ("device", job.id.clone().into()),
        ("len", job.total_progress.into()),
        ("offset", job.current_progress.into()),
        ("speed", job.speed.into()),
    ];
    members.into_iter().map(|(name, value): (_, Value)| (name.to_owned(), value)).collect()
}

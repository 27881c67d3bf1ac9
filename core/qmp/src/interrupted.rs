//! Commands on jobs that were interrupted when the program ended the last time.

use crate::{
    command::{Done, Nothing},
    control::InterruptedJob,
    error::Result,
    monitor::Monitor,
};
use driveline_jobs::OnRestart;
use serde::Deserialize;
use serde_json::{Value, json};

/// What becomes of a job when the program is killed and started again.
#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum OnRestartName {
    Resume,
    Drop,
}

impl From<OnRestartName> for OnRestart {
    fn from(name: OnRestartName) -> Self {
        match name {
            OnRestartName::Resume => OnRestart::Resume,
            OnRestartName::Drop => OnRestart::Drop,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ById {
    id: String,
}

pub(crate) async fn query(monitor: &Monitor, _: Nothing) -> Result<Value> {
    Ok(monitor.control().interrupted_jobs().iter().map(shown).collect())
}

pub(crate) async fn resume(monitor: &Monitor, job: ById) -> Result<Done> {
    monitor.control().resume_interrupted(&job.id).await?;
    Ok(Done {})
}

pub(crate) async fn drop_it(monitor: &Monitor, job: ById) -> Result<Done> {
    monitor.control().drop_interrupted(&job.id).await?;
    Ok(Done {})
}

/// A job that was interrupted, for replies and events.
pub(crate) fn shown(job: &InterruptedJob) -> Value {
    let mut value = json!({ "id": job.id, "outcome": job.outcome });
    let more = [
        ("type", job.kind.clone().map(Value::from)),
        ("device", job.device.clone().map(Value::from)),
        ("reason", job.reason.clone().map(Value::from)),
        ("left", job.left.map(Value::from)),
    ];
    for (key, said) in more {
        if let Some(said) = said {
            value[key] = said;
        }
    }
    value
}

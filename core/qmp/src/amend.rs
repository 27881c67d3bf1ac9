//! `x-blockdev-amend`: QEMU changes the encryption of an image with it, and nothing else. No image here is encrypted, so the job
//! has nothing to do, or fails as QEMU's does for such an image.
//!
//! Source: QEMU qapi/block-core.json, `BlockdevAmendOptions`; block/amend.c.

use crate::{
    arguments,
    command::{Done, Nothing},
    error::{Error, Result},
    monitor::Monitor,
};
use driveline_graph::{Graph, Kind, Options};
use driveline_jobs::JobKind;
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct BlockdevAmend {
    job_id: String,
    node_name: String,
    options: Options,
    /// Allows what loses data; nothing here does.
    #[serde(rename = "force")]
    _force: Option<bool>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Qcow2 {
    encrypt: Option<Options>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum KeyState {
    Active,
    Inactive,
}

/// QAPI's `QCryptoBlockAmendOptionsLUKS`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
#[allow(dead_code, reason = "only its form is looked at")]
struct Luks {
    state: KeyState,
    new_secret: Option<String>,
    old_secret: Option<String>,
    keyslot: Option<i64>,
    iter_time: Option<i64>,
    secret: Option<String>,
}

pub(crate) async fn blockdev_amend(monitor: &Monitor, amend: BlockdevAmend) -> Result<Done> {
    let graph = monitor.graph();
    let encrypts = check(graph, &amend.options)?;
    let name = &amend.node_name;
    let view = graph
        .view_node(name)
        .map_err(|_| Error::generic(format_args!("Cannot find device='' nor node-name='{name}'")))?;
    if amend.options["driver"] != view.node.driver_name() {
        return Err(Error::generic("x-blockdev-amend doesn't support changing the block driver"));
    }
    if view.node.driver_name() != "qcow2" {
        return Err(Error::generic("Driver does not support x-blockdev-amend"));
    }
    let task = move |progress: driveline_jobs::TaskProgress| {
        let future: driveline_graph::BoxFuture<'static, driveline_graph::Result<()>> = Box::pin(async move {
            progress.add_done(1);
            let text = "image is not encrypted, can't amend";
            if encrypts { Err(driveline_graph::Error::new(Kind::Invalid, text)) } else { Ok(()) }
        });
        future
    };
    monitor.jobs().run_task(JobKind::Amend, &amend.job_id, task).await?;
    Ok(Done {})
}

/// Are the options of the form that their driver takes? Returns whether they are about encryption.
fn check(graph: &Graph, options: &Options) -> Result<bool> {
    let mut rest = options.clone();
    let driver = word(&mut rest, "options", "driver")?;
    match &*driver {
        "qcow2" => {
            let Qcow2 { encrypt } = arguments::parse(Value::Object(rest), "options")?;
            let Some(mut encrypt) = encrypt else { return Ok(false) };
            const AT: &str = "options.encrypt";
            match &*word(&mut encrypt, AT, "format")? {
                "luks" => arguments::parse::<Luks>(encrypt.into(), AT).map(drop)?,
                "qcow" => arguments::parse::<Nothing>(encrypt.into(), AT).map(drop)?,
                other => {
                    return Err(Error::generic(format_args!(
                        "Parameter 'format' does not accept value '{other}'"
                    )));
                }
            }
            Ok(true)
        }
        "luks" => arguments::parse::<Luks>(rest.into(), "options").map(|_| true),
        _ if graph.driver(&driver).is_ok() => {
            arguments::parse::<Nothing>(rest.into(), "options").map(|_| false)
        }
        _ => Err(Error::generic(format_args!("Parameter 'driver' does not accept value '{driver}'"))),
    }
}

/// Takes the word out that says of what form the others are.
fn word(options: &mut Options, at: &str, key: &str) -> Result<String> {
    match options.shift_remove(key) {
        Some(Value::String(word)) => Ok(word),
        Some(_) => {
            Err(Error::generic(format_args!("Invalid parameter type for '{at}.{key}', expected: string")))
        }
        None => Err(Error::generic(format_args!("Parameter '{at}.{key}' is missing"))),
    }
}

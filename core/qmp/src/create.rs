//! `blockdev-create`: an image is made by its driver, as a job. What is wrong with the form of the arguments is an error of the
//! command; what is wrong with their meaning, or with the world, is the job's, as with QEMU.
//!
//! Beyond QEMU, `raw` can be made in a node. Encrypted images cannot be made.
//!
//! Source: QEMU qapi/block-core.json, `BlockdevCreateOptions`.

use crate::{
    arguments,
    command::Done,
    error::{self, Error, Result},
    monitor::Monitor,
    translate::Translator,
};
use driveline_graph::{Graph, Kind, Options, Preallocation};
use driveline_jobs::JobKind;
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct BlockdevCreate {
    job_id: String,
    options: Options,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
#[allow(dead_code, reason = "only its form is looked at")]
struct File {
    filename: String,
    size: i64,
    preallocation: Option<Preallocation>,
    nocow: Option<bool>,
    extent_size_hint: Option<u64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Version {
    V2,
    V3,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Compression {
    Zlib,
    Zstd,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
#[allow(dead_code, reason = "only its form is looked at")]
struct Qcow2 {
    file: Value,
    data_file: Option<Value>,
    data_file_raw: Option<bool>,
    extended_l2: Option<bool>,
    size: i64,
    version: Option<Version>,
    backing_file: Option<String>,
    backing_fmt: Option<String>,
    encrypt: Option<Options>,
    cluster_size: Option<u64>,
    preallocation: Option<Preallocation>,
    lazy_refcounts: Option<bool>,
    refcount_bits: Option<u64>,
    compression_type: Option<Compression>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
#[allow(dead_code, reason = "only its form is looked at")]
struct Raw {
    file: Value,
    size: u64,
    preallocation: Option<Preallocation>,
}

pub(crate) async fn blockdev_create(monitor: &Monitor, create: BlockdevCreate) -> Result<Done> {
    let graph = monitor.graph();
    let driver = check(graph, &create.options)?;
    let options = translate(graph, create.options)?;
    let making = graph.clone();
    let task = move |progress: driveline_jobs::TaskProgress| {
        let future: driveline_graph::BoxFuture<'static, driveline_graph::Result<()>> = Box::pin(async move {
            progress.set_total(1);
            let made = match missing_node(&making, &options) {
                Some(node) => Err(driveline_graph::Error::new(Kind::NotFound, Error::no_node(&node))),
                None if making.driver(&driver).is_ok_and(|driver| driver.created_in().is_none()) => {
                    let text = format_args!("Driver '{driver}' does not support blockdev-create");
                    Err(driveline_graph::Error::new(Kind::NotSupported, text))
                }
                None => making.create(options).await.map(drop),
            };
            progress.add_done(1);
            made.map_err(|found| driveline_graph::Error::new(found.kind(), error::plain(&found)))
        });
        future
    };
    monitor.jobs().run_task(JobKind::Create, &create.job_id, task).await?;
    Ok(Done {})
}

/// Are the options of the form that their driver takes? Returns its name.
fn check(graph: &Graph, options: &Options) -> Result<String> {
    let driver = match options.get("driver") {
        Some(Value::String(driver)) => driver.clone(),
        Some(_) => {
            let text = "Invalid parameter type for 'options.driver', expected: string";
            return Err(Error::generic(text));
        }
        None => return Err(Error::generic("Parameter 'options.driver' is missing")),
    };
    let mut rest = options.clone();
    rest.shift_remove("driver");
    let rest = Value::Object(rest);
    match &*driver {
        "file" => arguments::parse::<File>(rest, "options").map(drop)?,
        "qcow2" => arguments::parse::<Qcow2>(rest, "options").map(drop)?,
        "raw" => arguments::parse::<Raw>(rest, "options").map(drop)?,
        _ if graph.driver(&driver).is_ok() => {
            arguments::parse::<crate::command::Nothing>(rest, "options").map(drop)?;
        }
        _ => return Err(Error::generic(format_args!("Parameter 'driver' does not accept value '{driver}'"))),
    }
    Ok(driver)
}

const NODES: [&str; 2] = ["file", "data-file"];

/// Nodes that are defined in place are written as QEMU's clients do.
fn translate(graph: &Graph, mut options: Options) -> Result<Options> {
    for key in NODES {
        match options.get_mut(key) {
            Some(Value::Object(definition)) => {
                *definition = Translator::new(graph).node(std::mem::take(definition))?;
            }
            None | Some(Value::String(_)) => {}
            Some(_) => {
                let text = format_args!("Invalid parameter type for 'options.{key}', expected: BlockdevRef");
                return Err(Error::generic(text));
            }
        }
    }
    Ok(options)
}

fn missing_node(graph: &Graph, options: &Options) -> Option<String> {
    let named = NODES.iter().filter_map(|key| options.get(*key).and_then(Value::as_str));
    named.map(str::to_owned).find(|name| graph.node_or_drive(name).is_err())
}

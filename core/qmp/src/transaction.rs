//! `transaction`: actions on bitmaps, all of them or none, as one change of the graph.

use crate::{
    arguments,
    bitmaps::{self, Action, Of},
    command::Done,
    error::{Error, Result},
    monitor::Monitor,
};
use driveline_graph::Change;
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Transaction {
    actions: Vec<Entry>,
    properties: Option<Properties>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    r#type: String,
    data: Value,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Properties {
    completion_mode: Option<CompletionMode>,
}

/// How jobs of a transaction end. None of the actions here starts a job, so both mean the same.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum CompletionMode {
    Individual,
    Grouped,
}

/// Actions of QEMU's that are not about bitmaps.
const OTHERS: [&str; 6] = [
    "blockdev-backup",
    "blockdev-snapshot",
    "blockdev-snapshot-internal-sync",
    "blockdev-snapshot-sync",
    "drive-backup",
    "blockdev-mirror",
];

pub(crate) async fn transaction(monitor: &Monitor, transaction: Transaction) -> Result<Done> {
    if let Some(Properties { completion_mode: Some(mode) }) = &transaction.properties {
        match mode {
            CompletionMode::Individual | CompletionMode::Grouped => {}
        }
    }
    let entries = transaction.actions.into_iter().enumerate();
    let actions: Vec<_> = entries.map(|(at, entry)| action(at, entry)).collect::<Result<_>>()?;
    let graph = monitor.graph();
    let mut change = graph.change().await;
    for action in &actions {
        match action {
            Some(action) => bitmaps::stage(graph, &mut change, &**action)?,
            None => return Err(Error::generic("Transaction aborted using Abort action")),
        }
    }
    change.commit().await?;
    Ok(Done {})
}

type Boxed = Box<dyn Action + Send + Sync>;

/// Reads an action; `None` is QEMU's `abort`, which is there to test transactions.
fn action(at: usize, entry: Entry) -> Result<Option<Boxed>> {
    let place = format!("actions[{at}].data");
    let of = |data, what| Ok(Some(Box::new(Of(arguments::parse(data, &place)?, what)) as Boxed));
    let data = entry.data;
    match &*entry.r#type {
        "abort" => arguments::parse::<crate::command::Nothing>(data, &place).map(|_| None),
        "block-dirty-bitmap-add" => Ok(Some(Box::new(arguments::parse::<bitmaps::Add>(data, &place)?))),
        "block-dirty-bitmap-remove" => of(data, Change::remove_bitmap),
        "block-dirty-bitmap-clear" => of(data, Change::clear_bitmap),
        "block-dirty-bitmap-enable" => of(data, Change::enable_bitmap),
        "block-dirty-bitmap-disable" => of(data, Change::disable_bitmap),
        "block-dirty-bitmap-merge" => Ok(Some(Box::new(arguments::parse::<bitmaps::Merge>(data, &place)?))),
        "x-driveline-block-dirty-bitmap-move" => {
            Ok(Some(Box::new(arguments::parse::<bitmaps::Move>(data, &place)?)))
        }
        "x-driveline-block-dirty-bitmap-rename" => {
            Ok(Some(Box::new(arguments::parse::<bitmaps::Rename>(data, &place)?)))
        }
        "x-driveline-block-dirty-bitmap-populate" => of(data, Change::populate_bitmap),
        "x-driveline-block-dirty-bitmap-adopt" => of(data, Change::adopt_bitmap),
        other if OTHERS.contains(&other) => {
            let text = format_args!("Action '{other}' cannot be part of a transaction in this version");
            Err(Error::generic(text))
        }
        other => {
            let text = format_args!("Parameter 'actions[{at}].type' does not accept value '{other}'");
            Err(Error::generic(text))
        }
    }
}

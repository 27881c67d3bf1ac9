//! `transaction`: actions of every kind, all of them or none, as one change of the graph.
//!
//! An action is a value that was read from its `data` and can put itself into a [`Start`]: the change that all share, in
//! which jobs may begin as well. It sees the graph as the actions before it would have it ([`Start::layout`]). While the
//! change is made all drives that it touches are drained, whatever threads their users are on.
//!
//! # To add an action
//!
//! Implement [`Action`] for a type that can be deserialized, and write one line into the table below: the `type`, and a
//! function from the type of its `data` to the action (`same::<T>` if they are one). A command that does the same alone is
//! [`alone`] with it.
//!
//! # `completion-mode`
//!
//! It says how the jobs of the transaction end: `grouped`, all of them together or none. QEMU refuses `grouped` with actions
//! that start no job, and with some that do. Here those take effect at once in either mode.

use crate::{
    arguments, backup,
    bitmaps::{self, BitmapRef, Of},
    changes, checkpoints,
    command::{Done, Nothing},
    error::{Error, Result},
    exports, jobs, mirror,
    monitor::Monitor,
    nodes, snapshots,
};
use driveline_graph::{BoxFuture, Change};
use driveline_jobs::{Completion, Start};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

/// Something that can be done in a transaction, checked as far as its arguments alone allow.
pub(crate) trait Action: Send + Sync {
    /// Puts it into the change. What it does outside the graph (a file that is made) it must be able to take back.
    fn stage<'a>(&'a mut self, monitor: &'a Monitor, start: &'a mut Start) -> BoxFuture<'a, Result<()>>;

    /// Does it bring nodes? Then [`Control::nodes_added`](crate::Control::nodes_added) is called once for all actions that do,
    /// before [`Action::made`].
    fn adds_nodes(&self) -> bool {
        false
    }

    /// The change was made.
    fn made<'a>(&'a mut self, _monitor: &'a Monitor) -> BoxFuture<'a, ()> {
        Box::pin(async {})
    }

    /// The change was not made: takes back what [`Action::stage`] did outside the graph, as far as it came.
    fn undo<'a>(&'a mut self, _monitor: &'a Monitor) -> BoxFuture<'a, ()> {
        Box::pin(async {})
    }

    /// What the change fails with, in QEMU's words, if it was this action that it failed at.
    fn explain(&self, _monitor: &Monitor, error: driveline_graph::Error) -> Error {
        error.into()
    }
}

/// The table: what can be an action, and how it is read.
macro_rules! actions {
    ($($name:literal => $make:expr,)*) => {
        /// The types of all actions.
        #[allow(dead_code, reason = "the schema is made from it")]
        pub(crate) const NAMES: &[&str] = &[$($name),*];

        fn action(at: usize, entry: Entry) -> Result<Box<dyn Action>> {
            let place = format!("actions[{at}].data");
            match &*entry.r#type {
                $($name => read(entry.data, &place, $make),)*
                other => {
                    let text = format_args!("Parameter 'actions[{at}].type' does not accept value '{other}'");
                    Err(Error::generic(text))
                }
            }
        }
    };
}

actions! {
    "abort" => |_: Nothing| Abort,
    "block-dirty-bitmap-add" => same::<bitmaps::Add>,
    "block-dirty-bitmap-remove" => |bitmap: BitmapRef| Of(bitmap, Change::remove_bitmap),
    "block-dirty-bitmap-clear" => |bitmap: BitmapRef| Of(bitmap, Change::clear_bitmap),
    "block-dirty-bitmap-enable" => |bitmap: BitmapRef| Of(bitmap, Change::enable_bitmap),
    "block-dirty-bitmap-disable" => |bitmap: BitmapRef| Of(bitmap, Change::disable_bitmap),
    "block-dirty-bitmap-merge" => same::<bitmaps::Merge>,
    "x-driveline-block-dirty-bitmap-move" => same::<bitmaps::Move>,
    "x-driveline-block-dirty-bitmap-rename" => same::<bitmaps::Rename>,
    "x-driveline-block-dirty-bitmap-populate" => |bitmap: BitmapRef| Of(bitmap, Change::populate_bitmap),
    "x-driveline-block-dirty-bitmap-adopt" => |bitmap: BitmapRef| Of(bitmap, Change::adopt_bitmap),
    "x-driveline-checkpoint-create" => same::<checkpoints::Create>,
    "x-driveline-checkpoint-delete" => same::<checkpoints::Delete>,
    "blockdev-snapshot" => same::<snapshots::BlockdevSnapshot>,
    "blockdev-snapshot-sync" => same::<snapshots::BlockdevSnapshotSync>,
    "blockdev-snapshot-internal-sync" => same::<snapshots::InternalSnapshot>,
    "blockdev-backup" => same::<backup::BlockdevBackup>,
    "drive-backup" => same::<backup::DriveBackup>,
    "block-stream" => same::<jobs::BlockStream>,
    "block-commit" => same::<jobs::BlockCommit>,
    "blockdev-mirror" => same::<mirror::BlockdevMirror>,
    "drive-mirror" => same::<mirror::DriveMirror>,
    "blockdev-add" => same::<nodes::BlockdevOptions>,
    "blockdev-del" => |node: nodes::NodeName| nodes::BlockdevDel(node),
    "blockdev-reopen" => same::<changes::BlockdevReopen>,
    "blockdev-replace" => same::<changes::BlockdevReplace>,
    "block-export-add" => |add: exports::BlockExportAdd| exports::AddExport::from(add),
    "block-export-del" => |del: exports::BlockExportDel| exports::DelExport(del),
    "x-driveline-blockdev-insert-filter" => same::<nodes::InsertFilter>,
    "x-driveline-blockdev-remove-filter" => |filter: nodes::NodeName| nodes::RemoveFilter(filter),
}

/// For actions that are what is read.
fn same<T>(action: T) -> T {
    action
}

fn read<T, A>(data: Value, place: &str, make: impl FnOnce(T) -> A) -> Result<Box<dyn Action>>
where
    T: DeserializeOwned,
    A: Action + 'static,
{
    Ok(Box::new(make(arguments::parse(data, place)?)))
}

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

/// How jobs of a transaction end.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum CompletionMode {
    Individual,
    Grouped,
}

pub(crate) async fn transaction(monitor: &Monitor, transaction: Transaction) -> Result<Done> {
    let completion = match transaction.properties.and_then(|properties| properties.completion_mode) {
        None | Some(CompletionMode::Individual) => Completion::Individual,
        Some(CompletionMode::Grouped) => Completion::Grouped,
    };
    let entries = transaction.actions.into_iter().enumerate();
    let mut actions: Vec<_> = entries.map(|(at, entry)| action(at, entry)).collect::<Result<_>>()?;
    run(monitor, &mut actions, completion).await?;
    Ok(Done {})
}

/// Does one action alone, as a command.
pub(crate) async fn alone(monitor: &Monitor, action: impl Action + 'static) -> Result<Done> {
    run(monitor, &mut [Box::new(action)], Completion::Individual).await?;
    Ok(Done {})
}

/// Does all actions in one change, or none of them.
pub(crate) async fn run(
    monitor: &Monitor,
    actions: &mut [Box<dyn Action>],
    completion: Completion,
) -> Result<()> {
    let mut start = monitor.jobs().begin().await;
    let mut staged = 0;
    let mut result = Ok(());
    for action in &mut *actions {
        staged += 1;
        result = action.stage(monitor, &mut start).await;
        if result.is_err() {
            break;
        }
    }
    // An action of a change that was made is done, even if a node failed when it was closed afterwards.
    let mut made = false;
    match result {
        // The graph is let go before actions take back what they did outside of it.
        Err(_) => start.give_up().await,
        Ok(()) => {
            let ended = start.make_and_close(completion).await;
            made = ended.is_ok();
            let closed = match ended {
                Ok((ids, closed)) if ids.is_empty() => closed,
                Ok(_) => Ok(()),
                Err(error) => Err(error),
            };
            result = closed.map_err(|error| match &*actions {
                [action] => action.explain(monitor, error),
                _ => error.into(),
            });
        }
    }
    for action in actions[..staged].iter_mut().rev().filter(|_| !made) {
        action.undo(monitor).await;
    }
    if made && actions.iter().any(|action| action.adds_nodes()) {
        monitor.control().nodes_added().await;
    }
    for action in actions.iter_mut().filter(|_| made) {
        action.made(monitor).await;
    }
    result
}

/// QEMU's action that fails, to test transactions with.
struct Abort;

impl Action for Abort {
    fn stage<'a>(&'a mut self, _: &'a Monitor, _: &'a mut Start) -> BoxFuture<'a, Result<()>> {
        Box::pin(async { Err(Error::generic("Transaction aborted using Abort action")) })
    }
}

//! The table of commands: what can be called by which name. Dispatch, `query-commands` and `query-qmp-schema`
//! come from it, so that they cannot say different things.

#[allow(unused_imports, reason = "for replies that are only written")]
use crate::schema::Opaque as _;
use crate::{
    amend, apply, arguments, backup, bitmaps, changes, checkpoints, create, debug,
    error::{Class, Error, Result},
    exports, interrupted,
    jobs::{self, BlockJobById, ByDevice, ById},
    mirror,
    monitor::{self, Monitor},
    nodes,
    objects::commands as objects,
    schema::{self, Readable as _, Signature},
    session, snapshots, stats, stores, transaction,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// No arguments.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Nothing {}

/// Nothing to say but that it is done.
#[derive(Serialize, Deserialize)]
pub(crate) struct Done {}

/// Each command is a function of a monitor and of its arguments, whose type says what they are.
macro_rules! commands {
    ($($name:literal => $function:path,)*) => {
        /// The names of all commands.
        pub(crate) const NAMES: &[&str] = &[$($name),*];

        /// What each of them takes and returns, in the same order.
        pub(crate) fn signatures() -> Vec<Signature> {
            vec![$({
                let probe = schema::probe($function);
                // The reference lets the compiler take `Opaque` where a reply can only be written.
                #[allow(clippy::needless_borrow, reason = "see above")]
                let reply = (&probe).reply();
                Signature { name: $name, arguments: probe.arguments(), reply }
            }),*]
        }

        /// Runs a command. Nothing is changed unless all arguments are right.
        pub(crate) async fn execute(monitor: &Monitor, name: &str, arguments: Value) -> Result<Value> {
            match name {
                // Boxed one by one, or each command's future would be as large as the largest.
                $($name => Box::pin(async move {
                    answer($function(monitor, arguments::parse(arguments, "")?).await?)
                }).await,)*
                _ => Err(not_found(name)),
            }
        }
    };
}

commands! {
    "qmp_capabilities" => session::capabilities,
    "query-version" => query_version,
    "query-commands" => query_commands,
    "query-qmp-schema" => schema::query_qmp_schema,
    "quit" => monitor::quit,

    "query-block" => nodes::query_block,
    "query-blockstats" => stats::query_blockstats,
    "x-debug-query-block-graph" => debug::query_block_graph,
    "query-named-block-nodes" => nodes::query_named_block_nodes,
    "blockdev-add" => nodes::blockdev_add,
    "blockdev-del" => nodes::blockdev_del,
    "block_resize" => nodes::block_resize,
    "blockdev-reopen" => changes::blockdev_reopen,
    "blockdev-replace" => changes::blockdev_replace,
    "blockdev-set-active" => changes::blockdev_set_active,
    "change-backing-file" => changes::change_backing_file,
    "block-set-write-threshold" => changes::block_set_write_threshold,
    "x-blockdev-change" => changes::x_blockdev_change,
    "x-blockdev-set-iothread" => changes::x_blockdev_set_iothread,
    "x-driveline-blockdev-insert-filter" => nodes::insert_filter,
    "x-driveline-blockdev-remove-filter" => nodes::remove_filter,
    "x-driveline-yank" => nodes::yank,

    "blockdev-create" => create::blockdev_create,
    "x-blockdev-amend" => amend::blockdev_amend,
    "blockdev-snapshot" => snapshots::blockdev_snapshot,
    "blockdev-snapshot-sync" => snapshots::blockdev_snapshot_sync,
    "blockdev-snapshot-internal-sync" => snapshots::internal,
    "blockdev-snapshot-delete-internal-sync" => snapshots::delete_internal,

    "block-dirty-bitmap-add" => bitmaps::add,
    "block-dirty-bitmap-remove" => bitmaps::remove,
    "block-dirty-bitmap-clear" => bitmaps::clear,
    "block-dirty-bitmap-enable" => bitmaps::enable,
    "block-dirty-bitmap-disable" => bitmaps::disable,
    "block-dirty-bitmap-merge" => bitmaps::merge,
    "x-debug-block-dirty-bitmap-sha256" => debug::bitmap_sha256,
    "x-driveline-block-dirty-bitmap-move" => bitmaps::move_to,
    "x-driveline-block-dirty-bitmap-rename" => bitmaps::rename,
    "x-driveline-block-dirty-bitmap-populate" => bitmaps::populate,
    "x-driveline-block-dirty-bitmap-adopt" => bitmaps::adopt,
    "x-driveline-block-dirty-bitmap-store" => stores::store,
    "x-driveline-query-recovered-bitmaps" => stores::query_recovered,
    "transaction" => transaction::transaction,

    "query-jobs" => jobs::query_jobs,
    "query-block-jobs" => jobs::query_block_jobs,
    "block-stream" => jobs::block_stream,
    "block-commit" => jobs::block_commit,
    "blockdev-mirror" => mirror::blockdev_mirror,
    "drive-mirror" => mirror::drive_mirror,
    "block-job-change" => jobs::block_job_change,
    "blockdev-backup" => backup::blockdev_backup,
    "drive-backup" => backup::drive_backup,
    "job-pause" => jobs::pause::<ById>,
    "job-resume" => jobs::resume::<ById>,
    "job-cancel" => jobs::cancel,
    "job-complete" => jobs::complete::<ById>,
    "job-finalize" => jobs::finalize::<ById>,
    "job-dismiss" => jobs::dismiss::<ById>,
    "block-job-pause" => jobs::pause::<ByDevice>,
    "block-job-resume" => jobs::resume::<ByDevice>,
    "block-job-cancel" => jobs::block_job_cancel,
    "block-job-complete" => jobs::complete::<ByDevice>,
    "block-job-finalize" => jobs::finalize::<BlockJobById>,
    "block-job-dismiss" => jobs::dismiss::<BlockJobById>,
    "block-job-set-speed" => jobs::set_speed,

    "x-driveline-query-interrupted-jobs" => interrupted::query,
    "x-driveline-interrupted-job-resume" => interrupted::resume,
    "x-driveline-interrupted-job-drop" => interrupted::drop_it,

    "x-driveline-checkpoint-create" => checkpoints::create,
    "x-driveline-checkpoint-release" => checkpoints::release,
    "x-driveline-checkpoint-delete" => checkpoints::delete,
    "x-driveline-checkpoint-delta" => checkpoints::delta,
    "x-driveline-query-checkpoints" => checkpoints::query,

    "x-driveline-apply" => apply::apply,

    "object-add" => objects::object_add,
    "object-del" => objects::object_del,
    "qom-list" => objects::qom_list,
    "qom-get" => objects::qom_get,
    "qom-set" => objects::qom_set,
    "qom-list-types" => objects::qom_list_types,
    "qom-list-properties" => objects::qom_list_properties,

    "query-block-exports" => exports::query_block_exports,
    "block-export-add" => exports::block_export_add,
    "block-export-del" => exports::block_export_del,
    "nbd-server-start" => exports::nbd_server_start,
    "nbd-server-add" => exports::nbd_server_add,
    "nbd-server-remove" => exports::nbd_server_remove,
    "nbd-server-stop" => exports::nbd_server_stop,
}

/// The command that is done at once, whatever waits: what waits may be waiting for what this one ends. None of QEMU's storage
/// daemon is.
pub(crate) const OUT_OF_BAND: &str = "x-driveline-yank";

/// Does a command that came with `exec-oob`.
pub(crate) fn execute_out_of_band(monitor: &Monitor, name: &str, arguments: Value) -> Result<Value> {
    find(name)?;
    if name != OUT_OF_BAND {
        return Err(Error::generic(format_args!("The command {name} does not support OOB")));
    }
    answer(nodes::yank_now(monitor, &arguments::parse(arguments, "")?)?)
}

/// Is there a command of this name?
pub(crate) fn find(name: &str) -> Result<()> {
    if NAMES.contains(&name) { Ok(()) } else { Err(not_found(name)) }
}

fn not_found(name: &str) -> Error {
    Error::new(Class::CommandNotFound, format_args!("The command {name} has not been found"))
}

fn answer(reply: impl Serialize) -> Result<Value> {
    serde_json::to_value(reply).map_err(Error::generic)
}

/// The version of QEMU whose commands these are, because clients compare it, and Driveline's own as the package.
pub(crate) fn version() -> VersionInfo {
    VersionInfo {
        qemu: VersionTriple { major: 10, minor: 0, micro: 2 },
        package: concat!("Driveline ", env!("CARGO_PKG_VERSION")).to_owned(),
    }
}

/// QAPI's `VersionInfo`.
#[derive(Serialize, Deserialize)]
pub(crate) struct VersionInfo {
    qemu: VersionTriple,
    package: String,
}

#[derive(Serialize, Deserialize)]
struct VersionTriple {
    major: u32,
    minor: u32,
    micro: u32,
}

async fn query_version(_: &Monitor, _: Nothing) -> Result<VersionInfo> {
    Ok(version())
}

/// QAPI's `CommandInfo`.
#[derive(Serialize, Deserialize)]
struct CommandInfo {
    name: String,
}

async fn query_commands(_: &Monitor, _: Nothing) -> Result<Vec<CommandInfo>> {
    Ok(NAMES.iter().map(|name| CommandInfo { name: (*name).to_owned() }).collect())
}

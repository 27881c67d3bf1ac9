//! What events carry, and replies that are put together without a type of their own.

use super::{Object, Shape, trace};
use serde::Deserialize;

/// Declares structs of which only the schema is used.
macro_rules! shapes {
    ($($(#[$meta:meta])* struct $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty,)* })*) => {
        $($(#[$meta])*
        #[derive(Deserialize)]
        #[serde(rename_all = "kebab-case")]
        #[allow(dead_code, reason = "only its schema is used")]
        struct $name { $($(#[$field_meta])* $field: $type,)* })*
    };
}

/// Declares enums of which only the words are used.
macro_rules! words {
    ($($(#[$meta:meta])* enum $name:ident { $($word:ident,)* })*) => {
        $($(#[$meta])*
        #[derive(Deserialize)]
        #[serde(rename_all = "kebab-case")]
        #[allow(clippy::enum_variant_names, reason = "the words are QEMU's")]
        enum $name { $($word,)* })*
    };
}

words! {
    /// QAPI's `JobStatus`.
    enum JobStatus {
        Undefined, Created, Running, Paused, Ready, Standby, Waiting, Pending, Aborting, Concluded, Null,
    }

    /// QAPI's `JobType`.
    enum JobType {
        Commit, Stream, Mirror, Backup, Create, Amend, SnapshotLoad, SnapshotSave, SnapshotDelete,
    }

    /// QAPI's `IoOperationType`.
    enum IoOperation { Read, Write, }

    /// QAPI's `BlockErrorAction`.
    enum ErrorAction { Ignore, Report, Stop, }

    /// QAPI's `BlockDeviceIoStatus`.
    enum IoStatus { Ok, Failed, Nospace, }

    /// QAPI's `QuorumOpType`.
    enum QuorumOperation { Read, Write, Flush, }

    /// QAPI's `ShutdownCause`, as far as it happens here.
    enum ShutdownCause { HostError, HostQmpQuit, HostSignal, }

    enum Verdict { Exact, Superset, AllDirty, Lost, }
    enum Outcome { Resumed, Finished, Dropped, Failed, }
}

shapes! {
    struct JobStatusChange { id: String, status: JobStatus, }
    struct BlockJobCompleted {
        r#type: JobType, device: String, len: u64, offset: u64, speed: u64, error: Option<String>,
    }
    struct BlockJobProgress { r#type: JobType, device: String, len: u64, offset: u64, speed: u64, }
    struct BlockJobPending { r#type: JobType, id: String, }
    struct BlockJobError { device: String, operation: IoOperation, action: ErrorAction, }
    struct ExportDeleted { id: String, }
    struct WriteThreshold { node_name: String, amount_exceeded: u64, write_threshold: u64, }
    struct ImageCorrupted {
        device: String, node_name: Option<String>, msg: String, offset: Option<i64>, size: Option<i64>, fatal: bool,
    }
    struct IoError {
        qom_path: String, device: String, node_name: Option<String>, operation: IoOperation, action: ErrorAction,
        nospace: Option<bool>, reason: String,
    }
    struct QuorumFailure { reference: String, sector_num: i64, sectors_count: i64, }
    struct QuorumReportBad {
        r#type: QuorumOperation, error: Option<String>, node_name: String, sector_num: i64, sectors_count: i64,
    }
    struct Shutdown { guest: bool, reason: ShutdownCause, }
    struct NodeFailed { node_name: String, message: String, }
    struct BitmapRecovered {
        node: String, name: String, verdict: Verdict, extents: Option<u64>, bytes: Option<u64>, reason: Option<String>,
    }
    struct ViewLost {
        checkpoint: String, drive: String, node_name: String, export: Option<String>, reason: String,
    }
    struct InterruptedJob {
        id: String, r#type: Option<JobType>, device: Option<String>, outcome: Outcome, reason: Option<String>,
        left: Option<u64>,
    }

    struct JobInfo {
        id: String, r#type: JobType, status: JobStatus, current_progress: u64, total_progress: u64,
        error: Option<String>,
    }
    struct BlockJobInfo {
        r#type: JobType, device: String, len: u64, offset: u64, busy: bool, paused: bool, speed: u64,
        io_status: IoStatus, ready: bool, status: JobStatus, auto_finalize: bool, auto_dismiss: bool,
        error: Option<String>,
    }
    struct MirrorInfo { actively_synced: bool, }
    struct StoreInfo { store: String, file: Option<String>, }
}

/// All events.
pub(super) fn all() -> [(&'static str, Shape); 17] {
    [
        ("JOB_STATUS_CHANGE", trace::<JobStatusChange>()),
        ("BLOCK_JOB_COMPLETED", trace::<BlockJobCompleted>()),
        ("BLOCK_JOB_CANCELLED", trace::<BlockJobProgress>()),
        ("BLOCK_JOB_READY", trace::<BlockJobProgress>()),
        ("BLOCK_JOB_PENDING", trace::<BlockJobPending>()),
        ("BLOCK_JOB_ERROR", trace::<BlockJobError>()),
        ("BLOCK_EXPORT_DELETED", trace::<ExportDeleted>()),
        ("BLOCK_WRITE_THRESHOLD", trace::<WriteThreshold>()),
        ("BLOCK_IMAGE_CORRUPTED", trace::<ImageCorrupted>()),
        ("BLOCK_IO_ERROR", trace::<IoError>()),
        ("QUORUM_FAILURE", trace::<QuorumFailure>()),
        ("QUORUM_REPORT_BAD", trace::<QuorumReportBad>()),
        ("SHUTDOWN", trace::<Shutdown>()),
        ("X_DRIVELINE_BITMAP_RECOVERED", trace::<BitmapRecovered>()),
        ("X_DRIVELINE_CHECKPOINT_VIEW_LOST", trace::<ViewLost>()),
        ("X_DRIVELINE_JOB_INTERRUPTED", trace::<InterruptedJob>()),
        ("X_DRIVELINE_NODE_FAILED", trace::<NodeFailed>()),
    ]
}

/// The reply of a command whose function returns a bare value.
pub(super) fn reply(command: &str) -> Shape {
    match command {
        "query-jobs" => trace::<Vec<JobInfo>>(),
        "query-block-jobs" => Shape::Array(Box::new(block_job())),
        "x-driveline-block-dirty-bitmap-store" => trace::<StoreInfo>(),
        "x-driveline-query-interrupted-jobs" => trace::<Vec<InterruptedJob>>(),
        "x-driveline-query-recovered-bitmaps" => trace::<Vec<BitmapRecovered>>(),
        _ => Shape::Any,
    }
}

/// QAPI's `BlockJobInfo`: more is known of a mirror.
fn block_job() -> Shape {
    match (trace::<BlockJobInfo>(), trace::<MirrorInfo>()) {
        (Shape::Object(job), Shape::Object(mirror)) => {
            let variants = Some(("type".to_owned(), vec![("mirror".to_owned(), mirror)]));
            Shape::Object(Object { variants, ..job })
        }
        _ => Shape::Any,
    }
}

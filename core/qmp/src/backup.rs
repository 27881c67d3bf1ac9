//! `blockdev-backup` and `drive-backup`, as commands and as actions of a transaction.

use crate::{
    checkpoints::refuse_epoch,
    command::Done,
    error::{Error, Result},
    image,
    interrupted::OnRestartName,
    jobs::{OnErrorName, speed},
    monitor::Monitor,
    transaction::{Action, alone},
};
use driveline_graph::{BoxFuture, CreatedImage, Graph, Layout, NewImage};
use driveline_jobs::{BackupArgs, BackupSync, BitmapMode, Perf, Start};
use serde::Deserialize;
use serde_json::json;

/// QAPI's `MirrorSyncMode`.
#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum SyncName {
    Top,
    Full,
    None,
    Incremental,
    Bitmap,
}

/// QAPI's `BitmapSyncMode`.
#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum BitmapModeName {
    OnSuccess,
    Never,
    Always,
}

/// QAPI's `BackupPerf`.
#[derive(Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct BackupPerf {
    use_copy_range: Option<bool>,
    max_workers: Option<i64>,
    max_chunk: Option<i64>,
    min_cluster_size: Option<u64>,
}

/// Writes what both commands have into a struct, with the members that only one has.
macro_rules! backup {
    ($(#[$doc:meta])* $name:ident { $($(#[$meta:meta])* $own:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields, rename_all = "kebab-case")]
        pub(crate) struct $name {
            job_id: Option<String>,
            device: String,
            sync: SyncName,
            speed: Option<i64>,
            bitmap: Option<String>,
            bitmap_mode: Option<BitmapModeName>,
            compress: Option<bool>,
            on_source_error: Option<OnErrorName>,
            on_target_error: Option<OnErrorName>,
            auto_finalize: Option<bool>,
            auto_dismiss: Option<bool>,
            filter_node_name: Option<String>,
            discard_source: Option<bool>,
            x_perf: Option<BackupPerf>,
            target: String,
            #[serde(rename = "x-driveline-on-restart")]
            on_restart: Option<OnRestartName>,
            $($(#[$meta])* $own: $type,)*
        }

        impl $name {
            /// What the job is started with, to that node.
            fn arguments(&self, target: String) -> Result<BackupArgs> {
                let perf = self.x_perf.map(perf).transpose()?.unwrap_or_default();
                let changes = !matches!(self.bitmap_mode, Some(BitmapModeName::Never));
                if let Some(bitmap) = self.bitmap.as_deref().filter(|_| changes) {
                    refuse_epoch(bitmap)?;
                }
                Ok(BackupArgs {
                    job_id: self.job_id.clone(),
                    device: self.device.clone(),
                    target,
                    sync: match self.sync {
                        SyncName::Top => BackupSync::Top,
                        SyncName::Full => BackupSync::Full,
                        SyncName::None => BackupSync::None,
                        SyncName::Incremental => BackupSync::Incremental,
                        SyncName::Bitmap => BackupSync::Bitmap,
                    },
                    bitmap: self.bitmap.clone(),
                    bitmap_mode: self.bitmap_mode.map(|mode| match mode {
                        BitmapModeName::OnSuccess => BitmapMode::OnSuccess,
                        BitmapModeName::Never => BitmapMode::Never,
                        BitmapModeName::Always => BitmapMode::Always,
                    }),
                    compress: self.compress == Some(true),
                    discard_source: self.discard_source == Some(true),
                    speed: speed(self.speed.unwrap_or(0))?,
                    on_source_error: self.on_source_error.unwrap_or(OnErrorName::Report).into(),
                    on_target_error: self.on_target_error.unwrap_or(OnErrorName::Report).into(),
                    perf,
                    filter_node_name: self.filter_node_name.clone(),
                    manual_finalize: self.auto_finalize == Some(false),
                    manual_dismiss: self.auto_dismiss == Some(false),
                    on_restart: self.on_restart.map(Into::into),
                })
            }
        }
    };
}

backup! {
    /// The arguments of `blockdev-backup`.
    BlockdevBackup {}
}

backup! {
    /// The arguments of `drive-backup`.
    DriveBackup {
        format: Option<String>,
        mode: Option<ModeName>,
        /// The file that was made for it.
        #[serde(skip)]
        made: Option<CreatedImage>,
    }
}

/// QAPI's `NewImageMode`.
#[derive(Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum ModeName {
    Existing,
    #[default]
    AbsolutePaths,
}

fn perf(perf: BackupPerf) -> Result<Perf> {
    if perf.use_copy_range == Some(true) {
        return Err(Error::generic("Parameter 'x-perf.use-copy-range' cannot be true in this version"));
    }
    let default = Perf::default();
    Ok(Perf {
        workers_max: perf.max_workers.unwrap_or(default.workers_max),
        chunk_bytes_max: perf.max_chunk.unwrap_or(default.chunk_bytes_max),
        cluster_bytes_min: perf.min_cluster_size.unwrap_or(default.cluster_bytes_min),
    })
}

fn find_node(start: &mut Start, name: &str) -> Result<()> {
    let missing = |_| Error::generic(format_args!("Cannot find device='{name}' nor node-name='{name}'"));
    start.change().node_or_drive(name).map(drop).map_err(missing)
}

/// Whether there is such a bitmap shows only when the change is made: an action before this one may add it.
fn explain(bitmap: &Option<String>, error: driveline_graph::Error) -> Error {
    match bitmap {
        Some(name) if error.kind() == driveline_graph::Kind::NotFound => {
            Error::generic(format_args!("Bitmap '{name}' could not be found"))
        }
        _ => error.into(),
    }
}

impl Action for BlockdevBackup {
    fn stage<'a>(&'a mut self, _: &'a Monitor, start: &'a mut Start) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            find_node(start, &self.device)?;
            find_node(start, &self.target)?;
            let arguments = self.arguments(self.target.clone())?;
            start.backup(arguments).await?;
            Ok(())
        })
    }

    fn explain(&self, _: &Monitor, error: driveline_graph::Error) -> Error {
        explain(&self.bitmap, error)
    }
}

impl Action for DriveBackup {
    fn stage<'a>(&'a mut self, monitor: &'a Monitor, start: &'a mut Start) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            find_node(start, &self.device)?;
            // All that can be wrong with the rest is said before a file is made.
            let mut arguments = self.arguments(String::new())?;
            let layout = start.layout();
            let chain = layout.chain(&self.device)?;
            let mode = self.mode.unwrap_or_default();
            let format = match (&self.format, mode) {
                (Some(format), _) => format.clone(),
                (None, ModeName::AbsolutePaths) => chain[0].driver_name().to_owned(),
                (None, ModeName::Existing) => {
                    let text = "Parameter 'format' is missing: an existing image is not probed";
                    return Err(Error::generic(text));
                }
            };
            let mut node = json!({ "driver": format, "file": { "driver": "file", "path": self.target },
                "discard": image::discard_of(&layout, chain[0].name()) });
            if mode == ModeName::AbsolutePaths {
                self.make(monitor.graph(), &layout, &format).await?;
                let driver = monitor.graph().driver(&format)?;
                if driver.description().children.iter().any(|child| child.name == "backing") {
                    // Whole clusters are written, so nothing is read through it.
                    node["backing"] = serde_json::Value::Null;
                }
            }
            let node = node.as_object().cloned().unwrap_or_default();
            let node = monitor.graph().parse(node, &[])?;
            // It goes with the job, unless somebody looks at it then.
            arguments.target = start.change().add_implicit(node).await?.name().to_owned();
            start.backup(arguments).await?;
            Ok(())
        })
    }

    fn undo<'a>(&'a mut self, _: &'a Monitor) -> BoxFuture<'a, ()> {
        let made = self.made.take();
        Box::pin(async move {
            if let Some(Err(error)) = made.map(CreatedImage::remove) {
                tracing::warn!(target: "driveline::qmp", "after a drive-backup that failed: {error}");
            }
        })
    }

    fn explain(&self, _: &Monitor, error: driveline_graph::Error) -> Error {
        explain(&self.bitmap, error)
    }
}

impl DriveBackup {
    /// Makes the image that is copied to. What a copy leaves out is read from where the source has it.
    async fn make(&mut self, graph: &Graph, layout: &Layout, format: &str) -> Result<()> {
        let chain = layout.chain(&self.device)?;
        let below = match self.sync {
            SyncName::Top => chain.get(1),
            SyncName::None => chain.first(),
            SyncName::Full | SyncName::Incremental | SyncName::Bitmap => None,
        };
        let backing = match below {
            Some(below) => {
                let (file, format) = driveline_jobs::file_and_format(layout, below.name())?;
                Some((file, Some(format)))
            }
            None => None,
        };
        let image = NewImage {
            path: self.target.clone(),
            format: format.to_owned(),
            size_bytes: layout.size_bytes(&self.device)?,
            backing,
        };
        self.made = Some(graph.create_image(&image).await?);
        Ok(())
    }
}

pub(crate) async fn blockdev_backup(monitor: &Monitor, backup: BlockdevBackup) -> Result<Done> {
    alone(monitor, backup).await
}

pub(crate) async fn drive_backup(monitor: &Monitor, backup: DriveBackup) -> Result<Done> {
    alone(monitor, backup).await
}

//! `blockdev-mirror` and `drive-mirror`: a drive's data goes to a node that is there, or to a file that is opened or made
//! for it.
//!
//! | beyond QEMU | what it does |
//! |---|---|
//! | `sync` `incremental` and `bitmap` with `bitmap` and `bitmap-mode` | only what the bitmap says is copied at first; the arguments are those of `blockdev-backup` |
//! | `block-job-change` to `background` | back again: QEMU goes one way |
//!
//! `drive-mirror` with `mode` `existing` needs a `format`: to look into an image for what it is lets a guest decide.

use crate::{
    checkpoints::refuse_epoch,
    command::Done,
    error::{Error, Result},
    image,
    interrupted::OnRestartName,
    jobs::{CopyModeName, OnErrorName, speed},
    monitor::Monitor,
    transaction::{Action, alone},
    translate::Translator,
};
use driveline_graph::{BoxFuture, CreatedImage, NewImage, Options};
use driveline_jobs::{BitmapMode, CopyMode, MirrorArgs, MirrorSync, OnError, Start};
use serde::Deserialize;
use serde_json::json;

/// QAPI's `MirrorSyncMode`.
#[derive(Clone, Copy, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case")]
enum SyncName {
    Top,
    Full,
    None,
    Incremental,
    Bitmap,
}

/// QAPI's `BitmapSyncMode`.
#[derive(Clone, Copy, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case")]
enum BitmapModeName {
    OnSuccess,
    Never,
    Always,
}

#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct BlockdevMirror {
    job_id: Option<String>,
    device: String,
    target: String,
    replaces: Option<String>,
    sync: SyncName,
    bitmap: Option<String>,
    bitmap_mode: Option<BitmapModeName>,
    speed: Option<i64>,
    granularity: Option<u32>,
    buf_size: Option<i64>,
    on_source_error: Option<OnErrorName>,
    on_target_error: Option<OnErrorName>,
    filter_node_name: Option<String>,
    copy_mode: Option<CopyModeName>,
    auto_finalize: Option<bool>,
    auto_dismiss: Option<bool>,
    #[serde(rename = "x-driveline-on-restart")]
    on_restart: Option<OnRestartName>,
}

impl BlockdevMirror {
    fn arguments(&self) -> Result<MirrorArgs> {
        let (sync, bitmap_mode) = self.sync()?;
        if let Some(bitmap) = self.bitmap.as_deref().filter(|_| bitmap_mode != BitmapMode::Never) {
            refuse_epoch(bitmap)?;
        }
        let buffer_bytes = u64::try_from(self.buf_size.unwrap_or(0))
            .map_err(|_| Error::generic("Invalid parameter 'buf-size'"))?;
        let policy = |name: Option<OnErrorName>| name.map_or(OnError::Report, Into::into);
        Ok(MirrorArgs {
            job_id: self.job_id.clone(),
            device: self.device.clone(),
            target: self.target.clone(),
            replaces: self.replaces.clone(),
            sync,
            bitmap: self.bitmap.clone(),
            bitmap_mode,
            speed: speed(self.speed.unwrap_or(0))?,
            granularity: self.granularity.map(u64::from),
            buffer_bytes,
            on_source_error: policy(self.on_source_error),
            on_target_error: policy(self.on_target_error),
            filter_node_name: self.filter_node_name.clone(),
            copy_mode: self.copy_mode.map_or(CopyMode::Background, Into::into),
            manual_finalize: self.auto_finalize == Some(false),
            manual_dismiss: self.auto_dismiss == Some(false),
            on_restart: self.on_restart.map(Into::into),
            ..MirrorArgs::default()
        })
    }

    /// The rules of `bitmap` and `bitmap-mode` are those of a backup.
    ///
    /// Source: QEMU's `blockdev.c`, `do_backup_common`.
    fn sync(&self) -> Result<(MirrorSync, BitmapMode)> {
        let wrong = |text: &str| Err(Error::generic(text));
        let sync = match self.sync {
            SyncName::Full => MirrorSync::Full,
            SyncName::Top => MirrorSync::Top,
            SyncName::None => MirrorSync::None,
            SyncName::Incremental | SyncName::Bitmap => MirrorSync::Bitmap,
        };
        if self.bitmap.is_none() {
            match (self.sync, self.bitmap_mode) {
                (SyncName::Incremental, _) => {
                    return wrong("must provide a valid bitmap name for 'incremental' sync mode");
                }
                (SyncName::Bitmap, _) => {
                    return wrong("must provide a valid bitmap name for 'bitmap' sync mode");
                }
                (_, Some(_)) => return wrong("Cannot specify bitmap sync mode without a bitmap"),
                (_, None) => {}
            }
        }
        let mode = match (self.sync, self.bitmap_mode) {
            (SyncName::Incremental, None | Some(BitmapModeName::OnSuccess)) => BitmapMode::OnSuccess,
            (SyncName::Incremental, Some(_)) => {
                return wrong("Bitmap sync mode must be 'on-success' when using sync mode 'incremental'");
            }
            (SyncName::Bitmap, None) => {
                return wrong("Bitmap sync mode must be given when providing a bitmap");
            }
            (_, Some(BitmapModeName::Never)) => BitmapMode::Never,
            (_, Some(BitmapModeName::Always)) => BitmapMode::Always,
            (_, None | Some(BitmapModeName::OnSuccess)) => BitmapMode::OnSuccess,
        };
        if self.bitmap.is_some() && sync != MirrorSync::Bitmap {
            return wrong("A bitmap says what is mirrored with sync modes 'incremental' and 'bitmap' only");
        }
        Ok((sync, mode))
    }
}

impl Action for BlockdevMirror {
    fn stage<'a>(&'a mut self, _: &'a Monitor, start: &'a mut Start) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            for node in [&self.device, &self.target] {
                start.change().node_or_drive(node).map_err(|_| Error::no_node(node))?;
            }
            if let Some(name) = &self.filter_node_name
                && start.change().node_or_drive(name).is_ok()
            {
                return Err(Error::generic(format_args!("Duplicate nodes with node-name='{name}'")));
            }
            start.mirror(self.arguments()?).await?;
            Ok(())
        })
    }
}

pub(crate) async fn blockdev_mirror(monitor: &Monitor, mirror: BlockdevMirror) -> Result<Done> {
    alone(monitor, mirror).await
}

/// QAPI's `NewImageMode`.
#[derive(Clone, Copy, Default, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case")]
enum ModeName {
    Existing,
    #[default]
    AbsolutePaths,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct DriveMirror {
    job_id: Option<String>,
    device: String,
    target: String,
    format: Option<String>,
    node_name: Option<String>,
    replaces: Option<String>,
    sync: SyncName,
    bitmap: Option<String>,
    bitmap_mode: Option<BitmapModeName>,
    mode: Option<ModeName>,
    speed: Option<i64>,
    granularity: Option<u32>,
    buf_size: Option<i64>,
    on_source_error: Option<OnErrorName>,
    on_target_error: Option<OnErrorName>,
    unmap: Option<bool>,
    copy_mode: Option<CopyModeName>,
    auto_finalize: Option<bool>,
    auto_dismiss: Option<bool>,
    #[serde(rename = "x-driveline-on-restart")]
    on_restart: Option<OnRestartName>,
    /// The file that was made for it.
    #[serde(skip)]
    made: Option<CreatedImage>,
}

impl Action for DriveMirror {
    fn stage<'a>(&'a mut self, monitor: &'a Monitor, start: &'a mut Start) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let layout = start.layout();
            layout.node_or_drive(&self.device).map_err(|_| Error::no_node(&self.device))?;
            // All that can be wrong with the rest is said before a file is made.
            let mut arguments = self.mirror().arguments()?;
            arguments.keep_allocated = self.unmap == Some(false);
            let chain = layout.chain(&self.device)?;
            let mode = self.mode.unwrap_or_default();
            let sync =
                if chain.len() == 1 && self.sync == SyncName::Top { SyncName::Full } else { self.sync };
            let format = match (&self.format, mode) {
                (Some(format), _) => format.clone(),
                (None, ModeName::AbsolutePaths) => chain[0].driver_name().to_owned(),
                (None, ModeName::Existing) => {
                    return Err(Error::generic("Parameter 'format' is missing; mode 'existing' needs it"));
                }
            };
            let mut node = json!({ "driver": format, "file": { "driver": "file", "filename": self.target },
                "discard": image::discard_of(&layout, chain[0].name()) });
            if let Some(name) = &self.node_name {
                if start.change().node_or_drive(name).is_ok() {
                    return Err(Error::generic(format_args!("Duplicate nodes with node-name='{name}'")));
                }
                node["node-name"] = name.as_str().into();
            }
            if mode == ModeName::AbsolutePaths {
                let below = match sync {
                    SyncName::Top => chain.get(1),
                    SyncName::None => chain.first(),
                    SyncName::Full | SyncName::Incremental | SyncName::Bitmap => None,
                };
                let backing = match below {
                    Some(below) => {
                        let (file, format) = driveline_jobs::file_and_format(&layout, below.name())?;
                        Some((file, Some(format)))
                    }
                    None => None,
                };
                let image = NewImage {
                    path: self.target.clone(),
                    format: format.clone(),
                    size_bytes: layout.size_bytes(&self.device)?,
                    backing,
                };
                self.made = Some(monitor.graph().create_image(&image).await?);
                let takes_backing = monitor
                    .graph()
                    .driver(&format)?
                    .description()
                    .children
                    .iter()
                    .any(|c| c.name == "backing");
                if takes_backing {
                    // A mirror of nothing at first is read through to its source, but only once it is in its place.
                    node["backing"] = match (sync, below) {
                        (SyncName::Top, Some(below)) => below.name().into(),
                        _ => serde_json::Value::Null,
                    };
                    if sync == SyncName::None {
                        arguments.target_backing = below.map(|below| below.name().to_owned());
                    }
                }
                arguments.target_is_zero = sync == SyncName::Full && takes_backing;
            }
            let node: Options = node.as_object().cloned().unwrap_or_default();
            let node = Translator::in_change(monitor.graph(), start.change()).node(node)?;
            let beside: Vec<String> = layout.nodes().iter().map(|view| view.node.name().to_owned()).collect();
            let beside: Vec<&str> = beside.iter().map(String::as_str).collect();
            let node = monitor.graph().parse(node, &beside)?;
            let target = start.change().add_implicit(node).await?;
            arguments.target = target.name().to_owned();
            start.mirror(arguments).await?;
            Ok(())
        })
    }

    fn undo<'a>(&'a mut self, _: &'a Monitor) -> BoxFuture<'a, ()> {
        let made = self.made.take();
        Box::pin(async move {
            if let Some(Err(error)) = made.map(CreatedImage::remove) {
                tracing::warn!(target: "driveline::qmp", "after a drive-mirror that failed: {error}");
            }
        })
    }
}

impl DriveMirror {
    fn mirror(&self) -> BlockdevMirror {
        BlockdevMirror {
            job_id: self.job_id.clone(),
            device: self.device.clone(),
            target: self.target.clone(),
            replaces: self.replaces.clone(),
            sync: self.sync,
            bitmap: self.bitmap.clone(),
            bitmap_mode: self.bitmap_mode,
            speed: self.speed,
            granularity: self.granularity,
            buf_size: self.buf_size,
            on_source_error: self.on_source_error,
            on_target_error: self.on_target_error,
            filter_node_name: None,
            copy_mode: self.copy_mode,
            auto_finalize: self.auto_finalize,
            auto_dismiss: self.auto_dismiss,
            on_restart: self.on_restart,
        }
    }
}

pub(crate) async fn drive_mirror(monitor: &Monitor, mirror: DriveMirror) -> Result<Done> {
    alone(monitor, mirror).await
}

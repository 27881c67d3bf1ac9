//! The command line of `driveline ctl`.

use crate::commands::ctl_names as names;
use clap::{Args, Subcommand, ValueEnum};
use clap_complete::engine::ArgValueCompleter as Complete;
use driveline_drivers::Bytes;
use std::path::PathBuf;

use super::PictureFormat;

/// Talking to a running daemon.
#[derive(Args, Debug)]
pub struct Ctl {
    /// The daemon's control socket; without it DRIVELINE_SOCKET, or `qmp.sock` in this directory
    #[arg(long, short, global = true, value_name = "SOCKET")]
    pub socket: Option<PathBuf>,
    /// Take the socket from the `[monitor]` of this file.
    #[arg(long, global = true, value_name = "FILE", conflicts_with = "socket")]
    pub config: Option<PathBuf>,
    /// Print what the daemon answered, as JSON: the members are those of QEMU's QMP.
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the nodes: drivers, sizes, files.
    Nodes,
    /// Draw the graph as it is now.
    Graph {
        /// How to draw it.
        #[arg(long, value_enum, default_value_t)]
        format: PictureFormat,
    },
    /// List the drives, and the nodes that they lead to.
    Drives,
    /// List bitmaps, of all drives and nodes or of one.
    Bitmaps {
        /// A drive or a node.
        #[arg(value_name = "DRIVE", add = Complete::new(names::targets))]
        target: Option<String>,
    },
    /// Change a bitmap.
    #[command(subcommand)]
    Bitmap(Bitmap),
    /// List the jobs, and below them those that were interrupted when the daemon ended the last time.
    Jobs,
    /// List what became of jobs that were interrupted when the daemon ended the last time.
    Interrupted,
    /// Steer a job.
    #[command(subcommand)]
    Job(Job),
    /// Bring all data of a drive into its top image, so that nothing below a base is needed any more.
    Stream {
        /// The drive, or a node.
        #[arg(value_name = "DRIVE", add = Complete::new(names::targets))]
        drive: String,
        /// The node that stays below; without it, none does.
        #[arg(long, value_name = "NODE", add = Complete::new(names::nodes))]
        base: Option<String>,
        /// How the job runs.
        #[command(flatten)]
        run: Run,
    },
    /// Bring the data of a drive's upper images down into a lower one.
    Commit {
        /// The drive, or a node.
        #[arg(value_name = "DRIVE", add = Complete::new(names::targets))]
        drive: String,
        /// The uppermost node whose data moves; without it, the top image. That one stays in use until the end, and takes
        /// part in a last step, `--keep-ready` waits for.
        #[arg(long, value_name = "NODE", add = Complete::new(names::nodes))]
        top: Option<String>,
        /// The node that the data moves into; without it, the lowest.
        #[arg(long, value_name = "NODE", add = Complete::new(names::nodes))]
        base: Option<String>,
        /// Stop before the last step, which `job complete` takes.
        #[arg(long)]
        keep_ready: bool,
        /// How the job runs.
        #[command(flatten)]
        run: Run,
    },
    /// Copy a drive to another image, and follow what its guest writes until the end.
    Mirror {
        /// What is copied, and where to.
        #[command(flatten)]
        copy: Copy,
        /// At the end the drive goes on with the copy. Without it, the job waits for `job complete` (the same) or `job
        /// cancel` (the copy is a consistent one, and the drive stays where it is).
        #[arg(long)]
        pivot: bool,
        /// How the job runs.
        #[command(flatten)]
        run: Run,
    },
    /// Copy a drive as it is now, while its guest goes on writing.
    #[command(after_help = "\
Examples:
  driveline ctl backup vda full.qcow2
  driveline ctl backup vda monday.qcow2 --sync incremental --bitmap daily")]
    Backup {
        /// What is copied, and where to.
        #[command(flatten)]
        copy: Copy,
        /// Compress what is written, where the target can.
        #[arg(long)]
        compress: bool,
        /// How the job runs.
        #[command(flatten)]
        run: Run,
    },
    /// Put a new image on top of a drive: what is below it is not written to any more.
    Snapshot {
        /// The drive, or a node.
        #[arg(value_name = "DRIVE", add = Complete::new(names::targets))]
        drive: String,
        /// The file of the new image. The daemon makes it.
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// The name of its node.
        #[arg(long, value_name = "NAME")]
        node_name: Option<String>,
        /// Its format.
        #[arg(long, value_name = "FORMAT", default_value = "qcow2")]
        format: String,
        /// The file is an image already, without a backing of its own.
        #[arg(long)]
        existing: bool,
    },
    /// Open a filter above a node, or at the root of a drive, under load.
    #[command(after_help = "\
Examples:
  driveline ctl insert throttle --above vda --name slow iops=1000
  driveline ctl insert delay --above active read=5ms")]
    Insert {
        /// The filter.
        #[arg(value_name = "FILTER")]
        filter: String,
        /// The node that it is put above, or the drive.
        #[arg(long, value_name = "NODE", add = Complete::new(names::targets))]
        above: String,
        /// Its own name.
        #[arg(long, value_name = "NAME")]
        name: Option<String>,
        /// Its options: a value that is JSON (5, true, "text") counts as that, anything else as text
        #[arg(value_name = "KEY=VALUE", value_parser = pair)]
        options: Vec<(String, serde_json::Value)>,
    },
    /// Take a filter out, under load.
    Remove {
        /// The filter's node.
        #[arg(value_name = "NODE", add = Complete::new(names::nodes))]
        node: String,
    },
    /// List the checkpoints, of all drives or of one.
    Checkpoints {
        /// The drive, or a node.
        #[arg(value_name = "DRIVE", add = Complete::new(names::targets))]
        drive: Option<String>,
    },
    /// Keep moments of drives by name, look at one, and ask what changed between two.
    #[command(subcommand)]
    Checkpoint(Checkpoint),
    /// List what is served.
    Exports,
    /// Serve a drive or node over NBD, or end that.
    #[command(subcommand)]
    Export(Export),
    /// List what became of bitmaps that were found when the daemon started.
    Recovered,
    /// Say where the persistent bitmaps of a drive are kept, or move them.
    Store {
        /// The drive, or a node.
        #[arg(value_name = "DRIVE", add = Complete::new(names::targets))]
        drive: String,
        /// Move them there first.
        #[arg(long, value_name = "qcow2:NODE|file:PATH")]
        to: Option<String>,
        /// Bring them to stable storage.
        #[arg(long)]
        flush: bool,
    },
    /// Print events as they come, a line each, until Ctrl-C.
    Watch,
    /// Send any command, and print its answer.
    #[command(after_help = "\
Examples:
  driveline ctl qmp query-version
  driveline ctl qmp block_resize '{\"device\": \"vda\", \"size\": 1073741824}'")]
    Qmp {
        /// Its name.
        #[arg(value_name = "COMMAND", add = Complete::new(names::commands))]
        command: String,
        /// Its arguments, a JSON object.
        #[arg(value_name = "JSON", value_parser = object)]
        arguments: Option<serde_json::Value>,
    },
}

/// Changing a bitmap.
#[derive(Debug, Subcommand)]
pub enum Bitmap {
    /// Add one, clean.
    Add {
        /// Whose, and its name.
        #[command(flatten)]
        one: OneBitmap,
        /// How many bytes one bit stands for.
        #[arg(long, value_name = "SIZE")]
        granularity: Option<Bytes>,
        /// It survives the end of the daemon.
        #[arg(long)]
        persistent: bool,
        /// What it survives: volatile, process or power. It is persistent then.
        #[arg(long, value_name = "WHAT")]
        durability: Option<String>,
        /// Do not record until somebody enables it.
        #[arg(long)]
        disabled: bool,
    },
    /// Remove one for good.
    Remove(OneBitmap),
    /// Make one clean.
    Clear(OneBitmap),
    /// Let one record.
    Enable(OneBitmap),
    /// Let one record no more.
    Disable(OneBitmap),
    /// Add to a bitmap what is dirty in others of its drive.
    Merge {
        /// Whose.
        #[arg(value_name = "DRIVE", add = Complete::new(names::targets))]
        drive: String,
        /// The others.
        #[arg(value_name = "BITMAP", required = true, add = Complete::new(names::bitmaps))]
        from: Vec<String>,
        /// The bitmap that takes it.
        #[arg(long, value_name = "BITMAP", add = Complete::new(names::bitmaps))]
        into: String,
    },
    /// Move one to another drive or node.
    Move {
        /// The bitmap.
        #[command(flatten)]
        one: OneBitmap,
        /// Where it goes.
        #[arg(long, value_name = "DRIVE", add = Complete::new(names::targets))]
        to: String,
    },
    /// Give one another name.
    Rename {
        /// The bitmap.
        #[command(flatten)]
        one: OneBitmap,
        /// The new name.
        #[arg(value_name = "NAME")]
        to: String,
    },
    /// Mark what is allocated in the top image.
    Populate(OneBitmap),
    /// Make one whose contents are lost usable, all of it dirty.
    Adopt(OneBitmap),
}

/// A bitmap of a drive or node.
#[derive(Args, Debug)]
pub struct OneBitmap {
    /// The drive, or a node.
    #[arg(value_name = "DRIVE", add = Complete::new(names::targets))]
    pub drive: String,
    /// The bitmap's name.
    #[arg(value_name = "BITMAP", add = Complete::new(names::bitmaps))]
    pub bitmap: String,
}

/// Keeping moments.
#[derive(Debug, Subcommand)]
pub enum Checkpoint {
    /// Keep this moment of several drives, the same for all.
    Create {
        /// Its name.
        #[arg(value_name = "NAME")]
        name: String,
        /// The drives.
        #[arg(value_name = "DRIVE", required = true, add = Complete::new(names::targets))]
        drives: Vec<String>,
        /// It survives the end of the daemon.
        #[arg(long)]
        persistent: bool,
        /// Serve the drives as they are now, on NBD exports NAME-DRIVE, until it is released.
        #[arg(long)]
        view: bool,
        /// Show in the view what changed since that checkpoint.
        #[arg(long, value_name = "CHECKPOINT", requires = "view")]
        base: Option<String>,
        /// Where the view keeps what is written over meanwhile.
        #[arg(long, value_name = "DIRECTORY", requires = "view")]
        scratch: Option<PathBuf>,
    },
    /// List those that are kept, the oldest of a drive first.
    List {
        /// The drive, or a node.
        #[arg(value_name = "DRIVE", add = Complete::new(names::targets))]
        drive: Option<String>,
    },
    /// End the view of one; it stays.
    Release {
        /// Its name.
        #[arg(value_name = "NAME")]
        name: String,
    },
    /// Forget one; what changed between others is still known.
    Delete {
        /// Its name.
        #[arg(value_name = "NAME")]
        name: String,
    },
    /// Print what changed in a drive between two, or since one.
    Delta {
        /// The drive, or a node.
        #[arg(value_name = "DRIVE", add = Complete::new(names::targets))]
        drive: String,
        /// The older one.
        #[arg(value_name = "FROM")]
        from: String,
        /// The newer one; without it, now.
        #[arg(value_name = "TO")]
        to: Option<String>,
    },
}

/// Steering a job.
#[derive(Debug, Subcommand)]
pub enum Job {
    /// Stop it for a while.
    Pause(OneJob),
    /// Go on: with a job that is paused, or try again with one that was interrupted and could not go on.
    Resume(WaitingJob),
    /// Give up a job that was interrupted and could not go on; its target stays as it is.
    Drop(WaitingJob),
    /// End it without its result; a mirror that is ready ends with a consistent copy, unless forced.
    Cancel {
        /// The job.
        #[command(flatten)]
        job: OneJob,
        /// In any case without its result.
        #[arg(long)]
        force: bool,
    },
    /// Take the last step of a job that is ready.
    Complete(OneJob),
    /// Make the result of a job take effect that waits for this.
    Finalize(OneJob),
    /// Forget a job that is over.
    Dismiss(OneJob),
    /// Limit it to so many bytes a second; 0: no limit.
    SetSpeed {
        /// The job.
        #[command(flatten)]
        job: OneJob,
        /// The limit.
        #[arg(value_name = "BYTES")]
        speed: Bytes,
    },
    /// Show its progress until it is over, or ready.
    Wait(OneJob),
}

/// A job.
#[derive(Args, Debug)]
pub struct OneJob {
    /// Its id.
    #[arg(value_name = "JOB", add = Complete::new(names::jobs))]
    pub id: String,
}

/// A job that waits for its user.
#[derive(Args, Debug)]
pub struct WaitingJob {
    /// Its id.
    #[arg(value_name = "JOB", add = Complete::new(names::waiting_jobs))]
    pub id: String,
}

/// How a job runs.
#[derive(Args, Debug)]
pub struct Run {
    /// Its id; without it, the drive's name.
    #[arg(long, value_name = "ID")]
    pub job_id: Option<String>,
    /// At most so many bytes a second.
    #[arg(long, value_name = "BYTES")]
    pub speed: Option<Bytes>,
    /// Return at once, and leave the job running.
    #[arg(long)]
    pub detach: bool,
}

/// A copy of a drive.
#[derive(Args, Debug)]
pub struct Copy {
    /// The drive, or a node.
    #[arg(value_name = "DRIVE", add = Complete::new(names::targets))]
    pub drive: String,
    /// The file of the copy. The daemon makes it.
    #[arg(value_name = "FILE", required_unless_present = "to_node")]
    pub file: Option<PathBuf>,
    /// Copy to a node of the graph instead.
    #[arg(long, value_name = "NODE", conflicts_with = "file", add = Complete::new(names::nodes))]
    pub to_node: Option<String>,
    /// The format of the file.
    #[arg(long, value_name = "FORMAT", default_value = "qcow2")]
    pub format: String,
    /// The file is an image already, of the right size.
    #[arg(long, conflicts_with = "to_node")]
    pub existing: bool,
    /// What is copied.
    #[arg(long, value_enum, default_value_t)]
    pub sync: Sync,
    /// The bitmap that says what, for incremental and bitmap.
    #[arg(long, value_name = "BITMAP", add = Complete::new(names::bitmaps))]
    pub bitmap: Option<String>,
    /// What becomes of it, with `--sync bitmap`: on-success, never or always cleared.
    #[arg(long, value_name = "MODE")]
    pub bitmap_mode: Option<String>,
}

/// What is copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Sync {
    /// All of it.
    #[default]
    Full,
    /// What is in the top image.
    Top,
    /// Only what is written from now on (mirror), or about to be written over (backup).
    None,
    /// What is dirty in a bitmap, which is cleared by success.
    Incremental,
    /// What is dirty in a bitmap.
    Bitmap,
}

impl Sync {
    /// QEMU's word.
    pub fn name(self) -> &'static str {
        match self {
            Sync::Full => "full",
            Sync::Top => "top",
            Sync::None => "none",
            Sync::Incremental => "incremental",
            Sync::Bitmap => "bitmap",
        }
    }
}

/// What is served.
#[derive(Debug, Subcommand)]
pub enum Export {
    /// Serve a drive or node.
    Add {
        /// The drive, or a node.
        #[arg(value_name = "DRIVE", add = Complete::new(names::targets))]
        drive: String,
        /// Its id, and its name for clients.
        #[arg(long, value_name = "NAME")]
        name: Option<String>,
        /// Clients may write.
        #[arg(long)]
        writable: bool,
        /// Clients may look at these bitmaps.
        #[arg(long = "bitmap", value_name = "BITMAP", add = Complete::new(names::bitmaps))]
        bitmaps: Vec<String>,
        /// A text that clients show.
        #[arg(long, value_name = "TEXT")]
        description: Option<String>,
    },
    /// Serve it no more.
    Remove {
        /// Its id.
        #[arg(value_name = "ID", add = Complete::new(names::exports))]
        id: String,
        /// Even while clients are connected.
        #[arg(long)]
        force: bool,
    },
}

fn pair(text: &str) -> Result<(String, serde_json::Value), String> {
    let (key, value) = text.split_once('=').ok_or("expected KEY=VALUE")?;
    let value = serde_json::from_str(value).unwrap_or_else(|_| value.into());
    Ok((key.to_owned(), value))
}

fn object(text: &str) -> Result<serde_json::Value, String> {
    match serde_json::from_str(text) {
        Ok(value @ serde_json::Value::Object(_)) => Ok(value),
        Ok(_) => Err("expected a JSON object".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

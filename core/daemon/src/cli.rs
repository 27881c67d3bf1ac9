//! The command line.

mod bitmap;
pub mod ctl;

pub use self::bitmap::{Bitmap, ExportFormat, Map, One, Shelf};

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Serves graphs of disk images over NBD, with filters as plugins and dirty bitmaps that stay exact.
#[derive(Debug, Parser)]
#[command(name = "driveline", version, max_term_width = 100, arg_required_else_help = true)]
#[command(after_help = "\
Examples:
  driveline demo                         see what it is about, in three seconds
  driveline check vm.toml                every mistake of a file, and what it would do
  driveline run vm.toml                  serve it until Ctrl-C
  driveline graph vm.toml --format svg > vm.svg
  driveline ctl jobs                     talk to the daemon of ./qmp.sock
  driveline bitmap list active.qcow2     what its bitmaps are, between two runs
  DRIVELINE_LOG=info driveline run vm.toml

Exit status: 0 when all went well, 1 when something failed, 2 when the command line makes no sense; check-image has
its own.

Environment:
  DRIVELINE_LOG          what to log, unless --log says it
  DRIVELINE_PLUGIN_PATH  directories with filters, separated by colons
  DRIVELINE_ENGINE       io_uring or epoll, unless the file says it")]
pub struct Cli {
    /// What to log to stderr: error, warn, info, debug, trace, or levels by target
    ///
    /// For example `driveline::nbd=debug,warn`. With `driveline::io=trace` every node tells of every request.
    #[arg(long, global = true, value_name = "FILTER")]
    pub log: Option<String>,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve what a file describes, until SIGINT, SIGTERM or a monitor's quit.
    ///
    /// Prints one line for each export once all of them can be reached: its name, and an address that nbdinfo,
    /// nbdcopy and qemu-img take. Ends in good order: jobs are cancelled, bitmaps go home, clients get
    /// their answers, images are closed. A second signal ends it at once.
    #[command(after_help = "\
Example:
  driveline run vm.toml &
  nbdinfo 'nbd+unix:///vda?socket=vda.sock'")]
    Run(File),
    /// Report every mistake of a file, or what running it would do.
    ///
    /// Images are opened read-only and without locks, nothing is written, nothing is served: a file can be checked
    /// while it is in use.
    Check(File),
    /// Draw the graph that a file describes.
    #[command(after_help = "\
Examples:
  driveline graph vm.toml
  driveline graph vm.toml --format dot | dot -Tpng > vm.png
  driveline graph vm.toml --format svg > vm.svg")]
    Graph {
        /// The file.
        #[command(flatten)]
        file: File,
        /// How to draw it.
        #[arg(long, value_enum, default_value_t)]
        format: PictureFormat,
    },
    /// Show what a drive bitmap records while a guest writes and jobs rearrange the images below.
    ///
    /// Makes a chain of three small images in a temporary folder and serves it over NBD. A writer writes through NBD
    /// while a stream and then a commit run. Fails if the bitmap is not exactly what was written.
    Demo,
    /// Change a running daemon to what a file says, as one, under load.
    ///
    /// What is equal is left alone. Bitmaps that the file does not name are kept. Exports that change or go disconnect their
    /// clients; nothing else is noticed by them. Prints what changes: `+` comes, `-` goes, `~` changes.
    #[command(after_help = "\
Exit status: 0 done, 1 refused, and nothing was changed, 2 the command line makes no sense, 3 no daemon was reached.

Examples:
  driveline apply vm.toml --dry-run
  driveline apply vm.toml")]
    Apply {
        /// The file. Its `[monitor]` says where the daemon is, too.
        #[command(flatten)]
        file: File,
        /// Only say what would be done.
        #[arg(long, short = 'n')]
        dry_run: bool,
        /// Remove bitmaps for good that the file does not name.
        #[arg(long)]
        prune_bitmaps: bool,
        /// The daemon's control socket, if it is not the one of the file.
        #[arg(long, short, value_name = "SOCKET")]
        socket: Option<PathBuf>,
        /// Print it as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Serve what options say that are those of qemu-storage-daemon: see 'storage-daemon --help'.
    ///
    /// The program is the same under a name that ends in 'storage-daemon'.
    #[command(disable_help_flag = true)]
    StorageDaemon {
        /// As qemu-storage-daemon has them.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTION")]
        arguments: Vec<std::ffi::OsString>,
    },
    /// Look at a running daemon, and steer it.
    ///
    /// A daemon with a `[monitor]` listens on a socket, as said there. Jobs are waited for, with a bar on a terminal; Ctrl-C
    /// leaves them running.
    #[command(after_help = "\
Exit status: 0 done, 1 the daemon refused or the job failed, 2 the command line makes no sense, 3 no daemon was reached.

Examples:
  driveline ctl graph
  driveline ctl backup vda full.qcow2
  driveline ctl -s /run/driveline/qmp.sock watch
  driveline ctl jobs --json | jq '.[].id'")]
    Ctl(ctl::Ctl),
    /// Look at the bitmaps of a qcow2 image or of a file of bitmaps, or change them, while nobody serves their drive.
    ///
    /// Bitmaps of a drive are in its top image, if that is a writable qcow2 image, as QEMU keeps them; otherwise in a file
    /// DRIVE.dlbitmaps beside the lowest image. When `run` was killed, they are in a file IMAGE.dlbitmaps beside the
    /// image: they are found there, as far to be trusted as `run` would say, and go home into the image before a change.
    ///
    /// Files that a daemon or QEMU has are left alone. What fails changes nothing. Changes are durable when they end.
    #[command(subcommand)]
    #[command(after_help = "\
Examples:
  driveline bitmap list active.qcow2
  driveline bitmap add active.qcow2 daily
  driveline bitmap merge active.qcow2 monday tuesday --into week
  driveline bitmap move active.qcow2 daily --to vda.dlbitmaps
  driveline map active.qcow2 --bitmap daily --json")]
    Bitmap(Bitmap),
    /// Print which areas of a drive are dirty in a bitmap, while nobody serves it.
    ///
    /// Offsets and lengths are in bytes, in ascending order, each area as long as can be.
    #[command(after_help = "\
Examples:
  driveline map active.qcow2 --bitmap daily
  driveline map vda.dlbitmaps --bitmap daily --json | jq 'map(.length) | add'")]
    Map(Map),
    /// Look for what is wrong with a qcow2 image that is not in use, and repair it.
    ///
    /// A corruption is a place that may be written over, or an entry that makes no sense; a leak is lost space.
    /// Backing files are not looked at.
    #[command(after_help = "\
Exit status, as with 'qemu-img check':
   0  nothing is wrong, or not any more
   1  the image could not be checked as a whole
   2  there are corruptions
   3  there are leaks and nothing else
  63  the file is no qcow2 image

Examples:
  driveline check-image vm.qcow2
  driveline check-image --repair vm.qcow2
  driveline check-image --json vm.qcow2 | jq .corruptions")]
    CheckImage {
        /// Repair leaks only, or all that is wrong; without a value, all
        ///
        /// Entries that make no sense become zeroes. Have a copy of what you cannot lose.
        #[arg(long, value_enum, num_args = 0..=1, require_equals = true, default_missing_value = "all")]
        repair: Option<RepairWhat>,
        /// Print it as JSON.
        #[arg(long)]
        json: bool,
        /// The image.
        #[arg(value_name = "IMAGE")]
        image: PathBuf,
    },
    /// Look after qcow2 images that are not in use.
    #[command(subcommand)]
    Image(Image),
    /// Look at filters.
    #[command(subcommand)]
    Plugin(Plugin),
    /// Print a completion script for a shell. It asks a running daemon for names of nodes, drives, bitmaps and jobs.
    #[command(after_help = "\
Examples:
  source <(driveline completions bash)
  driveline completions fish > ~/.config/fish/completions/driveline.fish")]
    Completions {
        /// Which shell.
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
}

/// A file that describes a graph.
#[derive(Args, Clone, Debug)]
pub struct File {
    /// A TOML file that describes a graph. Paths in it are relative to it.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// How a graph is drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum PictureFormat {
    /// A tree for the terminal.
    #[default]
    Text,
    /// For Graphviz.
    Dot,
    /// A picture for a browser.
    Svg,
}

/// What is repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RepairWhat {
    /// Lost space.
    Leaks,
    /// All that is wrong.
    All,
}

/// Looking after images.
#[derive(Debug, Subcommand)]
pub enum Image {
    /// Snapshots inside an image, as of 'qemu-img snapshot'.
    #[command(subcommand)]
    Snapshot(Snapshot),
}

/// Looking after snapshots inside an image.
#[derive(Debug, Subcommand)]
pub enum Snapshot {
    /// List them: id, name, when each was taken (UTC), and how large the disk was.
    List {
        /// Print them as JSON.
        #[arg(long)]
        json: bool,
        /// The image.
        #[arg(value_name = "IMAGE")]
        image: PathBuf,
    },
    /// Keep the disk as it is now, and print the snapshot's id.
    Create(NamedSnapshot),
    /// Make the disk what it was when a snapshot was taken; what it is now is lost
    ///
    /// Refused while the image has persistent bitmaps: they would not know what changes.
    Apply(NamedSnapshot),
    /// Forget a snapshot.
    Delete(NamedSnapshot),
}

/// A snapshot of an image.
#[derive(Args, Clone, Debug)]
pub struct NamedSnapshot {
    /// The image.
    #[arg(value_name = "IMAGE")]
    pub image: PathBuf,
    /// The snapshot's name; for one that is there, its id will do, and comes first.
    #[arg(value_name = "NAME")]
    pub name: String,
}

/// Looking at filters.
#[derive(Debug, Subcommand)]
pub enum Plugin {
    /// List the filters that are found, and where they are looked for.
    List {
        /// Look here, too: a library, or a directory of them.
        #[arg(value_name = "PATH")]
        path: Vec<PathBuf>,
    },
    /// Load a plugin, and print what its filters say about themselves.
    Inspect {
        /// A shared library.
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// Print it as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Try a plugin in a process of its own, which survives corrupt files, and say whether it can be used.
    Check {
        /// Shared libraries.
        #[arg(value_name = "FILE", required = true)]
        files: Vec<PathBuf>,
    },
    /// What `check` runs as its child.
    #[command(hide = true)]
    Probe {
        /// A shared library.
        file: PathBuf,
    },
}

//! The command line of `driveline bitmap` and `driveline map`.

use clap::{Args, Subcommand, ValueEnum};
use driveline_bitmap::{Durability, Granularity};
use std::path::PathBuf;

/// Looking at bitmaps and changing them, while nobody serves their drive.
#[derive(Debug, Subcommand)]
pub enum Bitmap {
    /// List the bitmaps of a file: what they are, where they are, and how far they can be trusted.
    List {
        /// The file.
        #[command(flatten)]
        shelf: Shelf,
    },
    /// Add a bitmap, clean.
    #[command(after_help = "\
Examples:
  driveline bitmap add active.qcow2 weekly
  driveline bitmap add active.qcow2 weekly --granularity 1MiB --disabled
  driveline bitmap add vda.dlbitmaps weekly --durability power")]
    Add {
        /// The bitmap.
        #[command(flatten)]
        one: One,
        /// How many bytes one bit stands for, a power of two from 512B to 2GiB
        ///
        /// Otherwise the cluster size of the image, but 4KiB at least and 64KiB at most; 64KiB in a file of bitmaps.
        #[arg(long, value_name = "SIZE")]
        granularity: Option<Granularity>,
        /// Do not record until somebody enables it.
        #[arg(long)]
        disabled: bool,
        /// What it survives: volatile, process, or power. Only in a file of bitmaps: an image is told by `run`.
        #[arg(long, value_name = "WHAT", value_parser = durability)]
        durability: Option<Durability>,
    },
    /// Remove a bitmap for good, its contents valid or not.
    Remove {
        /// The bitmap.
        #[command(flatten)]
        one: One,
    },
    /// Make a bitmap clean.
    Clear {
        /// The bitmap.
        #[command(flatten)]
        one: One,
    },
    /// Let a bitmap record, from the next start on.
    Enable {
        /// The bitmap.
        #[command(flatten)]
        one: One,
    },
    /// Let a bitmap record no more; what it has recorded stays.
    Disable {
        /// The bitmap.
        #[command(flatten)]
        one: One,
    },
    /// Make a bitmap whose contents are lost all dirty: it can be used again, and records.
    #[command(after_help = "\
Contents are lost when the image says that they are in use, and nobody uses them: QEMU was killed. A backup by a bitmap
that is all dirty copies everything once, and is right.")]
    Adopt {
        /// The bitmap.
        #[command(flatten)]
        one: One,
    },
    /// Add what is dirty in other bitmaps to one, of this file or of others.
    ///
    /// Granularities may differ, sizes may not. The sources stay as they are.
    #[command(after_help = "\
Examples:
  driveline bitmap merge active.qcow2 monday tuesday --into week
  driveline bitmap merge active.qcow2 old.qcow2:daily vda.dlbitmaps:daily --into daily")]
    Merge {
        /// The file.
        #[command(flatten)]
        shelf: Shelf,
        /// Bitmaps to add: NAME of this file, or FILE:NAME.
        #[arg(value_name = "SOURCE", required = true)]
        sources: Vec<String>,
        /// The bitmap that they are added to.
        #[arg(long, value_name = "NAME")]
        into: String,
    },
    /// Move a bitmap to another file: written there, durably, before it goes here.
    ///
    /// The target is a qcow2 image, or a file of bitmaps; one whose name ends in .dlbitmaps is made if it is not there.
    /// Both must be of a drive of one size. A file that is made knows no images: a change of them from outside goes unnoticed
    /// until their drive was served once.
    #[command(after_help = "\
Example: a drive becomes a raw image, and keeps its bitmap.
  qemu-img convert -O raw active.qcow2 disk.raw
  driveline bitmap move active.qcow2 daily --to vda.dlbitmaps    # for [drive.vda], beside its image")]
    Move {
        /// The bitmap.
        #[command(flatten)]
        one: One,
        /// The file that it moves to.
        #[arg(long, value_name = "FILE")]
        to: PathBuf,
    },
    /// Write the contents of a bitmap into a file.
    #[command(after_help = "\
Formats:
  raw   One bit for each granule of the drive, 1 if it is dirty, and nothing else. Granule N, the bytes from
        N times the granularity on, is bit N % 8 of byte N / 8, where bit 0 is the lowest. Bits beyond the
        last granule are 0. This is also how a qcow2 image holds them.
  json  An object: name, granularity, size, and dirty, an array of objects with offset and length in bytes.

Examples:
  driveline bitmap export active.qcow2 daily --output daily.bits
  driveline bitmap export active.qcow2 daily --output - --format json | jq .dirty")]
    Export {
        /// A qcow2 image, or a file of bitmaps (DRIVE.dlbitmaps).
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// The bitmap.
        #[arg(value_name = "NAME")]
        name: String,
        /// Where to: a new file, a pipe, or - for stdout.
        #[arg(long, value_name = "FILE")]
        output: PathBuf,
        /// What is written.
        #[arg(long, value_enum, default_value_t)]
        format: ExportFormat,
    },
}

/// A file that holds bitmaps.
#[derive(Args, Clone, Debug)]
pub struct Shelf {
    /// A qcow2 image, or a file of bitmaps (DRIVE.dlbitmaps).
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Print the file's bitmaps as JSON, as they are afterwards.
    #[arg(long)]
    pub json: bool,
}

/// A bitmap of a file.
#[derive(Args, Clone, Debug)]
pub struct One {
    /// The file.
    #[command(flatten)]
    pub shelf: Shelf,
    /// The bitmap.
    #[arg(value_name = "NAME")]
    pub name: String,
}

/// The dirty areas of a bitmap.
#[derive(Args, Clone, Debug)]
pub struct Map {
    /// A qcow2 image, or a file of bitmaps (DRIVE.dlbitmaps).
    #[arg(value_name = "IMAGE")]
    pub file: PathBuf,
    /// The bitmap.
    #[arg(long, value_name = "NAME")]
    pub bitmap: String,
    /// Print an array of objects, each with offset and length.
    #[arg(long)]
    pub json: bool,
}

/// How a bitmap is exported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ExportFormat {
    /// One bit for each granule.
    #[default]
    Raw,
    /// Dirty areas, as JSON.
    Json,
}

fn durability(word: &str) -> Result<Durability, String> {
    let all = [Durability::Volatile, Durability::Process, Durability::Power];
    let found = all.into_iter().find(|durability| durability.to_string() == word);
    found.ok_or_else(|| "expected volatile, process, or power".to_owned())
}

#[cfg(test)]
mod tests {
    use crate::cli::{Bitmap, Cli, Command};
    use clap::{CommandFactory, Parser};
    use driveline_bitmap::{Durability, Granularity};

    fn parse(line: &str) -> Result<Bitmap, String> {
        let words = ["driveline", "bitmap"].into_iter().chain(line.split(' '));
        match Cli::try_parse_from(words).map_err(|error| error.to_string())?.command {
            Command::Bitmap(bitmap) => Ok(bitmap),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_command_line_makes_sense_to_clap() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_a_new_bitmap_is_is_read_from_the_command_line() {
        let line = "add vda.dlbitmaps daily --granularity 128k --disabled --durability power --json";
        let Bitmap::Add { one, granularity, disabled, durability } = parse(line).unwrap() else { panic!() };
        assert_eq!((one.shelf.file.to_str(), &*one.name), (Some("vda.dlbitmaps"), "daily"));
        assert_eq!(granularity, Some(Granularity::new(128 << 10).unwrap()));
        assert_eq!((disabled, durability, one.shelf.json), (true, Some(Durability::Power), true));
    }

    #[test]
    fn a_merge_needs_a_source_and_a_target() {
        let line = "merge a.qcow2 one b.qcow2:two --into week";
        let Bitmap::Merge { sources, into, .. } = parse(line).unwrap() else { panic!() };
        assert_eq!((sources, &*into), (vec!["one".to_owned(), "b.qcow2:two".to_owned()], "week"));
        assert!(parse("merge a.qcow2 --into week").unwrap_err().contains("<SOURCE>"));
        assert!(parse("merge a.qcow2 one").unwrap_err().contains("--into <NAME>"));
    }

    #[test]
    fn words_that_are_none_are_refused_with_those_that_are() {
        let wrong = parse("add a.qcow2 daily --granularity 100").unwrap_err();
        assert!(wrong.contains("'100'") && wrong.contains("512B"), "{wrong}");
        let wrong = parse("add a.dlbitmaps daily --durability forever").unwrap_err();
        assert!(wrong.contains("expected volatile, process, or power"), "{wrong}");
    }
}

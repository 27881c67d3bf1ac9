//! The commands of the program. Each prints, and says how it went by an exit code.

mod bitmap;
mod check;
mod completions;
mod ctl;
mod graph;
mod image;
mod plugin;
mod run;

pub use bitmap::{bitmap, map};
pub(crate) use check::harmless;
pub use check::{Failed, check, rehearse};
pub use completions::completions;
pub use ctl::{apply, ctl, names as ctl_names};
pub use driveline_qmp::ApplyWish;
pub use graph::graph;
pub use image::{check_image, image};
pub use plugin::plugin;
pub use run::run;
pub(crate) use run::until_the_end;

pub use crate::demo::demo;

use crate::config::{Config, Mistakes};
use std::{
    io::{self, Write},
    path::Path,
    process::ExitCode,
};

/// Reads a file, or says why it cannot be read.
fn read(file: &Path) -> Result<(Config, Mistakes), ExitCode> {
    Config::read(file).map_err(|error| match error.kind() {
        io::ErrorKind::InvalidData => fail(format_args!(
            "{}: it is no text; expected a TOML file that describes a graph",
            file.display()
        )),
        _ => fail(format_args!("{}: {error}", file.display())),
    })
}

/// Says what went wrong.
pub(crate) fn fail(message: impl std::fmt::Display) -> ExitCode {
    say(message);
    ExitCode::FAILURE
}

/// As [`say`], by another name of the program.
pub(crate) fn say_as(program: &str, message: impl std::fmt::Display) {
    let _ = writeln!(io::stderr(), "{program}: {message}");
}

/// Tells people something. Where that cannot be written (a log on a full disk) it is lost, and nothing else.
pub(crate) fn say(message: impl std::fmt::Display) {
    let _ = writeln!(io::stderr(), "driveline: {message}");
}

/// Prints text. A reader that has gone, as in `| head`, is no failure.
pub(crate) fn print(text: &str) -> ExitCode {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => fail(format_args!("cannot write to stdout: {error}")),
    }
}

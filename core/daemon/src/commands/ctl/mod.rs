//! `driveline ctl`: a running daemon, for people.
//!
//! It is a client of the control socket like any other, and prints what it is told as tables, or as JSON with `--json`: then
//! the members are those of QMP, which do not change.

mod apply;
mod bitmaps;
mod checkpoints;
mod client;
mod exports;
mod graph;
mod jobs;
mod moved;
pub mod names;
mod paths;
mod table;
mod watch;

pub use apply::apply;

use self::client::{Client, Failed, Result, given};
use super::{print, say};
use crate::{
    cli::ctl::{Checkpoint, Command, Ctl},
    config::{Address, Config, Mistakes},
};
use serde_json::{Map, Value, json};
use std::{
    path::{Path, PathBuf, absolute},
    process::ExitCode,
};

/// Nobody answers at the socket.
const UNREACHABLE: u8 = 3;

/// Does one command. Exit status: 0 done, 1 refused or failed, 3 no daemon was reached.
pub fn ctl(ctl: Ctl) -> ExitCode {
    let socket = match place(&ctl) {
        Ok(socket) => socket,
        Err(code) => return code,
    };
    let outcome = Client::connect(&socket).and_then(|client| {
        let mut talk = Talk { client, json: ctl.json, target: None };
        talk.run(ctl.command)
    });
    exit(outcome)
}

/// Says what failed, and how the program ends.
fn exit(outcome: Result<ExitCode>) -> ExitCode {
    outcome.unwrap_or_else(|failed| {
        say(&failed);
        match failed {
            Failed::Refused(_) => ExitCode::FAILURE,
            Failed::Unreachable(_) => ExitCode::from(UNREACHABLE),
        }
    })
}

/// Where the daemon is.
fn place(ctl: &Ctl) -> std::result::Result<PathBuf, ExitCode> {
    let Some(file) = &ctl.config else { return Ok(client::socket(ctl.socket.as_deref())) };
    let (config, mistakes) = super::read(file)?;
    of_config(file, &config, &mistakes)
}

/// The socket that a file names.
fn of_config(file: &Path, config: &Config, mistakes: &Mistakes) -> std::result::Result<PathBuf, ExitCode> {
    match config.monitor.as_ref().map(|monitor| monitor.get_ref()) {
        Some(Address::Unix(path)) => Ok(path.clone()),
        Some(_) => {
            Err(super::fail(format_args!("{}: its monitor is no unix socket; say --socket", file.display())))
        }
        None if !mistakes.is_empty() => {
            mistakes.print();
            Err(ExitCode::FAILURE)
        }
        None => Err(super::fail(format_args!("{}: it has no [monitor]", file.display()))),
    }
}

/// One command's talk with the daemon.
struct Talk {
    client: Client,
    json: bool,
    /// Where a job copies to that was started here.
    target: Option<String>,
}

impl Talk {
    fn run(&mut self, command: Command) -> Result<ExitCode> {
        match command {
            Command::Nodes => self.nodes(),
            Command::Graph { format } => self.graph(format),
            Command::Drives => self.drives(),
            Command::Bitmaps { target } => self.bitmaps(target.as_deref()),
            Command::Bitmap(change) => self.change_bitmap(change),
            Command::Jobs => self.jobs(),
            Command::Interrupted => self.interrupted(),
            Command::Job(verb) => self.steer(verb),
            Command::Stream { drive, base, run } => {
                let arguments = given([("base-node", base.into())]);
                self.start("block-stream", &drive, arguments, &run, jobs::AtReady::Complete)
            }
            Command::Commit { drive, top, base, keep_ready, run } => {
                let arguments = given([("top-node", top.into()), ("base-node", base.into())]);
                let at_ready = if keep_ready { jobs::AtReady::Leave } else { jobs::AtReady::Complete };
                self.start("block-commit", &drive, arguments, &run, at_ready)
            }
            Command::Mirror { copy, pivot, run } => {
                let at_ready = if pivot { jobs::AtReady::Complete } else { jobs::AtReady::Leave };
                self.copy("mirror", copy, Map::new(), &run, at_ready)
            }
            Command::Backup { copy, compress, run } => {
                let mut more = Map::new();
                more.extend(compress.then(|| ("compress".to_owned(), true.into())));
                self.copy("backup", copy, more, &run, jobs::AtReady::Leave)
            }
            Command::Snapshot { drive, file, node_name, format, existing } => {
                let before = self.shows(&drive)?;
                let arguments = given([
                    ("device", drive.as_str().into()),
                    ("snapshot-file", full(&file)),
                    ("snapshot-node-name", node_name.into()),
                    ("format", format.into()),
                    ("mode", if existing { "existing" } else { "absolute-paths" }.into()),
                ]);
                self.simple("blockdev-snapshot-sync", arguments)?;
                self.say_moved(&drive, before)
            }
            Command::Insert { filter, above, name, options } => {
                let mut definition: Map<String, Value> = options.into_iter().collect();
                definition.insert("driver".into(), filter.into());
                definition.extend(name.map(|name| ("node-name".to_owned(), name.into())));
                let arguments = json!({ "options": definition, "above": above });
                let answer = self.client.run("x-driveline-blockdev-insert-filter", arguments)?;
                self.answer(&answer, |answer| format!("{}\n", text(&answer["node-name"])))
            }
            Command::Remove { node } => {
                self.simple("x-driveline-blockdev-remove-filter", json!({ "node-name": node }))
            }
            Command::Checkpoints { drive } => self.checkpoint(Checkpoint::List { drive }),
            Command::Checkpoint(command) => self.checkpoint(command),
            Command::Exports => self.exports(),
            Command::Export(change) => self.change_export(change),
            Command::Recovered => self.recovered(),
            Command::Store { drive, to, flush } => self.store(drive, to, flush),
            Command::Watch => self.watch(),
            Command::Qmp { command, arguments } => {
                let answer = self.client.run(&command, arguments.unwrap_or_else(|| json!({})))?;
                Ok(print(&format!("{answer:#}\n")))
            }
        }
    }

    /// A command whose answer says no more than that it is done.
    fn simple(&mut self, command: &str, arguments: Value) -> Result<ExitCode> {
        let answer = self.client.run(command, arguments)?;
        self.answer(&answer, |_| String::new())
    }

    /// Prints an answer: as JSON, or as it is shown to people.
    fn answer(&self, answer: &Value, shown: impl Fn(&Value) -> String) -> Result<ExitCode> {
        Ok(print(&if self.json { format!("{answer:#}\n") } else { shown(answer) }))
    }
}

/// The daemon may run in another directory.
fn full(path: &Path) -> Value {
    absolute(path).unwrap_or_else(|_| path.to_owned()).to_string_lossy().into()
}

/// The entries of a list.
fn list(answer: &Value) -> &[Value] {
    answer.as_array().map(Vec::as_slice).unwrap_or_default()
}

/// A text, or nothing where there is none.
fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// A number, or 0 where there is none.
fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_default()
}

/// Is it so?
fn is(value: &Value) -> bool {
    value.as_bool().unwrap_or_default()
}

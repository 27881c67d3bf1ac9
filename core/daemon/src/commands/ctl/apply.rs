//! `driveline apply`.

use super::{client::Client, exit, full, list, of_config, text};
use crate::{
    commands::{self, print},
    daemon::graph_for,
};
use driveline_qmp::ApplyWish;
use serde_json::{Value, json};
use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

/// Changes a running daemon to what a file says. Mistakes of the file are shown here, where the file is, with their places.
pub fn apply(file: &Path, wish: ApplyWish, socket: Option<PathBuf>, json: bool) -> ExitCode {
    let (config, mut mistakes) = match commands::read(file) {
        Ok(read) => read,
        Err(code) => return code,
    };
    let graph = graph_for(&config, &mut mistakes);
    config.check(&graph, &mut mistakes);
    if !mistakes.is_empty() {
        mistakes.print();
        return ExitCode::FAILURE;
    }
    let socket = match socket.map_or_else(|| of_config(file, &config, &mistakes), Ok) {
        Ok(socket) => socket,
        Err(code) => return code,
    };
    let arguments =
        json!({ "file": full(file), "dry-run": wish.dry_run, "prune-bitmaps": wish.prune_bitmaps });
    let answer = Client::connect(&socket).and_then(|mut client| client.run("x-driveline-apply", arguments));
    exit(answer.map(|answer| print(&if json { format!("{answer:#}\n") } else { shown(&answer, wish) })))
}

fn shown(answer: &Value, wish: ApplyWish) -> String {
    let lines =
        |key: &str| list(&answer[key]).iter().map(|line| format!("  {}\n", text(line))).collect::<String>();
    let (steps, rest) = (lines("steps"), lines("kept") + &lines("restart"));
    let head = match (steps.is_empty(), wish.dry_run) {
        (true, _) => "nothing to change\n",
        (false, true) => "would change:\n",
        (false, false) => "changed:\n",
    };
    format!("{head}{steps}{rest}")
}

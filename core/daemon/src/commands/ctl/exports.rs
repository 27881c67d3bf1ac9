//! What a running daemon serves.

use super::{Result, Talk, given, is, list, table::Table, text};
use crate::cli::ctl::Export;
use serde_json::{Value, json};
use std::process::ExitCode;

impl Talk {
    pub(super) fn exports(&mut self) -> Result<ExitCode> {
        let answer = self.client.run("query-block-exports", json!({}))?;
        let kept = self.client.run("x-driveline-query-checkpoints", json!({}))?;
        let lost: Vec<&str> = list(&kept)
            .iter()
            .filter(|kept| kept["view"]["state"] == "lost")
            .map(|kept| text(&kept["view"]["export"]))
            .collect();
        self.answer(&answer, |answer| exports(answer, &lost))
    }

    pub(super) fn change_export(&mut self, change: Export) -> Result<ExitCode> {
        match change {
            Export::Add { drive, name, writable, bitmaps, description } => {
                let name = name.unwrap_or_else(|| drive.clone());
                let arguments = given([
                    ("type", "nbd".into()),
                    ("id", name.clone().into()),
                    ("node-name", drive.into()),
                    ("name", name.into()),
                    ("writable", writable.into()),
                    ("bitmaps", if bitmaps.is_empty() { Value::Null } else { bitmaps.into() }),
                    ("description", description.into()),
                ]);
                self.simple("block-export-add", arguments)
            }
            Export::Remove { id, force } => {
                let mode = if force { "hard" } else { "safe" };
                self.simple("block-export-del", json!({ "id": id, "mode": mode }))
            }
        }
    }
}

/// `lost`: views of checkpoints that show nothing any more.
fn exports(answer: &Value, lost: &[&str]) -> String {
    let mut table = Table::new(&["export", "type", "shows", "state"], &[]);
    for export in list(answer) {
        table.row([
            text(&export["id"]).to_owned(),
            text(&export["type"]).to_owned(),
            text(&export["node-name"]).to_owned(),
            match is(&export["shutting-down"]) {
                true => "ending",
                false if lost.contains(&text(&export["id"])) => "lost",
                false => "serving",
            }
            .to_owned(),
        ]);
    }
    table.text("no exports")
}

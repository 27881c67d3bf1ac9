//! Checkpoints of a running daemon.

use super::{
    Result, Talk, full, given, is, list, number, print,
    table::{Table, amount},
    text,
};
use crate::cli::ctl::Checkpoint;
use serde_json::{Value, json};
use std::{fmt::Write, process::ExitCode};

impl Talk {
    pub(super) fn checkpoint(&mut self, command: Checkpoint) -> Result<ExitCode> {
        match command {
            Checkpoint::Create { name, drives, persistent, view, base, scratch } => {
                let scratch = scratch.as_deref().map(full).unwrap_or_default();
                let view = view.then(|| given([("base", base.into()), ("scratch", scratch)]));
                let arguments = given([
                    ("name", name.into()),
                    ("drives", drives.into()),
                    ("persistent", persistent.then_some(true).into()),
                    ("view", view.unwrap_or_default()),
                ]);
                let answer = self.client.run("x-driveline-checkpoint-create", arguments)?;
                self.answer(&answer, views)
            }
            Checkpoint::List { drive } => {
                let arguments = given([("drive", drive.into())]);
                let answer = self.client.run("x-driveline-query-checkpoints", arguments)?;
                self.answer(&answer, checkpoints)
            }
            Checkpoint::Release { name } => {
                self.simple("x-driveline-checkpoint-release", json!({ "name": name }))
            }
            Checkpoint::Delete { name } => {
                self.simple("x-driveline-checkpoint-delete", json!({ "name": name }))
            }
            Checkpoint::Delta { drive, from, to } => self.delta(&drive, &from, to.as_deref()),
        }
    }

    /// All areas, page by page.
    fn delta(&mut self, drive: &str, from: &str, to: Option<&str>) -> Result<ExitCode> {
        let mut areas = Vec::new();
        let mut start = Some(0);
        let mut last = Value::Null;
        while let Some(at) = start {
            let arguments = given([
                ("drive", drive.into()),
                ("from", from.into()),
                ("to", to.into()),
                ("start", at.into()),
            ]);
            let answer = self.client.run("x-driveline-checkpoint-delta", arguments)?;
            areas.extend_from_slice(list(&answer["areas"]));
            start = answer["next"].as_u64();
            last = answer;
        }
        if self.json {
            let whole = json!({ "count": last["count"], "granularity": last["granularity"], "areas": areas });
            return Ok(print(&format!("{whole:#}\n")));
        }
        let mut out = String::new();
        for area in &areas {
            let _ = writeln!(out, "{} {}", number(&area["offset"]), number(&area["length"]));
        }
        let _ = writeln!(out, "{} changed", amount(number(&last["count"])));
        Ok(print(&out))
    }
}

/// The exports of a view, one a line.
fn views(answer: &Value) -> String {
    let line = |view: &Value| format!("{}: {}\n", text(&view["drive"]), text(&view["export"]));
    list(&answer["views"]).iter().map(line).collect()
}

fn checkpoints(answer: &Value) -> String {
    let mut table =
        Table::new(&["drive", "checkpoint", "changed until the next", "state", "view", "which is"], &[2]);
    let mut lost = String::new();
    for kept in list(answer) {
        let view = &kept["view"];
        let name = text(&kept["name"]).escape_debug().to_string();
        if view["state"] == "lost" {
            let _ = writeln!(
                lost,
                "\nThe view of {} at {name} is lost: {}\n`driveline ctl checkpoint release {name}` ends it; the checkpoint stays",
                text(&kept["drive"]),
                text(&view["reason"])
            );
        }
        table.row([
            text(&kept["drive"]).to_owned(),
            name,
            amount(number(&kept["count"])),
            if is(&kept["recording"]) { "recording" } else { "closed" }.to_owned(),
            text(if view["export"].is_null() { &view["node-name"] } else { &view["export"] }).to_owned(),
            text(&view["state"]).to_owned(),
        ]);
    }
    table.text("no checkpoints") + &lost
}

//! `driveline plugin`.

use super::{fail, print};
use crate::{cli::Plugin, drivers};
use driveline_graph::Driver;
use driveline_loader::{PluginReport, Verdict, answer_probe, inspect, probe};
use std::{
    fmt::Write,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Duration,
};

/// A plugin that takes longer to load than this is no good.
const PROBE_LIMIT: Duration = Duration::from_secs(10);

/// Looks at filters.
pub fn plugin(command: Plugin) -> ExitCode {
    match command {
        Plugin::List { path } => list(&path),
        Plugin::Inspect { file, json } => match inspect(&file) {
            Ok(report) if json => match serde_json::to_string_pretty(&report) {
                Ok(text) => print(&format!("{text}\n")),
                Err(error) => fail(error),
            },
            Ok(report) => print(&describe(&report)),
            Err(error) => fail(error),
        },
        Plugin::Check { files } => check(&files),
        Plugin::Probe { file } => answer_probe(&file),
    }
}

fn list(given: &[PathBuf]) -> ExitCode {
    let filters = drivers::load_filters(given);
    let mut out = String::new();
    let rows: Vec<[&str; 3]> = filters
        .drivers
        .iter()
        .map(|driver| [driver.name(), &driver.description().version, &driver.description().summary])
        .collect();
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or_default();
    let widths = [width(0), width(1)];
    for (row, driver) in rows.iter().zip(&filters.drivers) {
        let [name, version, summary] = row;
        let _ = writeln!(out, "{name:0$}  {version:1$}  {summary}", widths[0], widths[1]);
        let _ = writeln!(out, "{:1$}  {2}", "", widths[0], driver.path().display());
    }
    if rows.is_empty() {
        out.push_str("no filters were found\n");
    }
    out.push_str("looked for in:\n");
    for place in
        given.iter().filter(|path| path.is_file()).cloned().chain(drivers::places(&directories(given)))
    {
        let _ = writeln!(out, "  {}", place.display());
    }
    let refused = filters.refused.iter().map(|(path, why)| format!("{}: {why}", path.display()));
    for problem in refused.clone().chain(filters.warnings.iter().cloned()) {
        eprintln!("driveline: {problem}");
    }
    let code = print(&out);
    if refused.count() > 0 { ExitCode::FAILURE } else { code }
}

fn directories(given: &[PathBuf]) -> Vec<PathBuf> {
    given.iter().filter(|path| !path.is_file()).cloned().collect()
}

fn describe(report: &PluginReport) -> String {
    let mut out = format!("{}\n  ABI {}\n", report.path.display(), report.abi_version);
    for filter in &report.filters {
        let list = |names: &[String]| if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        let missing = match filter.default.as_str() {
            "pass" => "what it leaves out goes to its child",
            _ => "what it leaves out is emulated or refused",
        };
        let _ = writeln!(out, "filter {} {}: {}", filter.name, filter.version, filter.summary);
        let _ = writeln!(out, "  options     {}", list(&filter.options));
        let _ = writeln!(out, "  children    {}", list(&filter.children));
        let _ = writeln!(
            out,
            "  operations  {} (of {} known; {missing})",
            list(&filter.operations),
            filter.operations_known
        );
        let _ = writeln!(out, "  effects     {}", list(&filter.effects));
    }
    out
}

fn check(files: &[PathBuf]) -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for file in files {
        match check_one(file) {
            Ok(verdict @ Verdict::Good(_)) => drop(print(&format!("{verdict}\n"))),
            Ok(verdict @ Verdict::Died(_)) => {
                code = fail(format_args!("plugin {}: {verdict}", file.display()))
            }
            Ok(verdict) => code = fail(verdict),
            Err(error) => code = fail(format_args!("plugin {}: cannot be tried: {error}", file.display())),
        }
    }
    code
}

fn check_one(file: &Path) -> std::io::Result<Verdict> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["plugin", "probe"]).arg("--").arg(file);
    probe(command, PROBE_LIMIT)
}

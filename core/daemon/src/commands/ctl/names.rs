//! Names for the shell's completion, asked of the running daemon. Nobody there is no error: there is nothing to offer then.

use super::client::{Client, socket};
use clap_complete::CompletionCandidate;
use serde_json::{Value, json};
use std::{ffi::OsStr, path::Path};

/// Asks, and offers those names that begin as what was typed.
fn offer(typed: &OsStr, query: &str, names: impl Fn(&Value) -> Vec<String>) -> Vec<CompletionCandidate> {
    // What was said on the line is not known here; the environment is.
    let typed = typed.to_string_lossy();
    let words: Vec<String> = std::env::args().collect();
    let said = words.iter().position(|word| word == "--socket" || word == "-s");
    let said = said.and_then(|at| words.get(at + 1)).map(Path::new);
    let Ok(mut client) = Client::connect(&socket(said)) else { return Vec::new() };
    let Ok(answer) = client.run(query, json!({})) else { return Vec::new() };
    let mut names = names(&answer);
    names.sort();
    names.dedup();
    names.into_iter().filter(|name| name.starts_with(&*typed)).map(CompletionCandidate::new).collect()
}

fn each(answer: &Value, member: &str) -> Vec<String> {
    let list = answer.as_array().map(Vec::as_slice).unwrap_or_default();
    list.iter().filter_map(|entry| entry[member].as_str()).map(str::to_owned).collect()
}

/// Nodes.
pub fn nodes(typed: &OsStr) -> Vec<CompletionCandidate> {
    offer(typed, "query-named-block-nodes", |answer| each(answer, "node-name"))
}

/// Drives, and nodes.
pub fn targets(typed: &OsStr) -> Vec<CompletionCandidate> {
    let mut found = offer(typed, "query-block", |answer| each(answer, "device"));
    found.extend(nodes(typed));
    found
}

/// Bitmaps, whoever has them.
pub fn bitmaps(typed: &OsStr) -> Vec<CompletionCandidate> {
    offer(typed, "query-named-block-nodes", |answer| {
        let nodes = answer.as_array().map(Vec::as_slice).unwrap_or_default();
        nodes.iter().flat_map(|node| each(&node["dirty-bitmaps"], "name")).collect()
    })
}

/// Jobs.
pub fn jobs(typed: &OsStr) -> Vec<CompletionCandidate> {
    offer(typed, "query-jobs", |answer| each(answer, "id"))
}

/// Jobs that are there, and those that were interrupted and wait for a decision.
pub fn waiting_jobs(typed: &OsStr) -> Vec<CompletionCandidate> {
    let mut found = offer(typed, "x-driveline-query-interrupted-jobs", |answer| {
        let jobs = answer.as_array().map(Vec::as_slice).unwrap_or_default();
        let waiting = jobs.iter().filter(|job| job["outcome"] == "failed");
        waiting.filter_map(|job| job["id"].as_str()).map(str::to_owned).collect()
    });
    found.extend(jobs(typed));
    found
}

/// Exports.
pub fn exports(typed: &OsStr) -> Vec<CompletionCandidate> {
    offer(typed, "query-block-exports", |answer| each(answer, "id"))
}

/// Commands of the monitor.
pub fn commands(typed: &OsStr) -> Vec<CompletionCandidate> {
    offer(typed, "query-commands", |answer| each(answer, "name"))
}

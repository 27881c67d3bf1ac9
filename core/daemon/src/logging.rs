//! Log lines: which ones, and where they go.

use std::{fs::File, io::IsTerminal, sync::Mutex};
use tracing_subscriber::{EnvFilter, fmt::writer::BoxMakeWriter};

/// The variable that says what is logged, when `--log` does not.
pub const VARIABLE: &str = "DRIVELINE_LOG";

/// What is logged unless something else is asked for.
pub const DEFAULT: &str = "warn";

/// Sends log lines to stderr. `filter` is in the language of `tracing`: `info`, `driveline::nbd=debug,warn`.
///
/// Errors: the filter makes no sense.
pub fn start(filter: Option<&str>) -> Result<(), String> {
    let from_variable = std::env::var(VARIABLE).ok().filter(|value| !value.is_empty());
    let (from, text) = match (filter, &from_variable) {
        (Some(filter), _) => ("--log", filter),
        (None, Some(value)) => (VARIABLE, value.as_str()),
        (None, None) => ("", DEFAULT),
    };
    begin(from, text, None)
}

/// As [`start`] without a filter, and with more directives; and to a file, if there is one.
pub(crate) fn start_with(directives: &[String], file: Option<File>) -> Result<(), String> {
    let from_variable = std::env::var(VARIABLE).ok().filter(|value| !value.is_empty());
    let mut text = from_variable.unwrap_or_else(|| DEFAULT.to_owned());
    for directive in directives {
        text = format!("{text},{directive}");
    }
    begin("--trace", &text, file)
}

fn begin(from: &str, text: &str, file: Option<File>) -> Result<(), String> {
    let filter = EnvFilter::builder().parse(text).map_err(|error| format!("{from}: '{text}': {error}"))?;
    let colours = file.is_none() && std::io::stderr().is_terminal();
    let writer = match file {
        Some(file) => BoxMakeWriter::new(Mutex::new(file)),
        None => BoxMakeWriter::new(std::io::stderr),
    };
    let started = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        // It would say so on stderr, and panic if that cannot be written.
        .log_internal_errors(false)
        .with_ansi(colours)
        .try_init();
    // Somebody who uses this crate as a library may log in a way of their own.
    drop(started);
    Ok(())
}

/// Does the filter ask for the path of every request? That is decided when a graph is made, because it costs something.
pub fn traces_requests() -> bool {
    tracing::enabled!(target: "driveline::io", tracing::Level::TRACE)
}

//! Log lines: which ones, and where they go.

use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;

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
    let filter = EnvFilter::builder().parse(text).map_err(|error| format!("{from}: '{text}': {error}"))?;
    let started = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // It would say so on stderr, and panic if that cannot be written.
        .log_internal_errors(false)
        .with_ansi(std::io::stderr().is_terminal())
        .try_init();
    // Somebody who uses this crate as a library may log in a way of their own.
    drop(started);
    Ok(())
}

/// Does the filter ask for the path of every request? That is decided when a graph is made, because it costs something.
pub fn traces_requests() -> bool {
    tracing::enabled!(target: "driveline::io", tracing::Level::TRACE)
}

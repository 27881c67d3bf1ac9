//! `driveline demo`.
use std::process::ExitCode;
/// Runs it.
pub fn demo() -> ExitCode {
    ExitCode::FAILURE
}

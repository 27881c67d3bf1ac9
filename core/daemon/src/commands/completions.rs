//! `driveline completions`.

use super::{fail, print};
use clap_complete::{Shell, env::Shells};
use std::process::ExitCode;

/// Prints what a shell has to read so that it asks this program for what could come next.
pub fn completions(shell: Shell) -> ExitCode {
    let shells = Shells::builtins();
    let Some(shell) = shells.completer(&shell.to_string()) else {
        return fail(format_args!("there is no completion for {shell}"));
    };
    let mut script = Vec::new();
    match shell.write_registration("COMPLETE", "driveline", "driveline", "driveline", &mut script) {
        Ok(()) => print(&String::from_utf8_lossy(&script)),
        Err(error) => fail(format_args!("the completion script: {error}")),
    }
}

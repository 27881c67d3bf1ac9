//! In the background: `--daemonize`, and the file with the process' number.
//!
//! The engine's threads do not survive a fork, and a fork needs `unsafe`. So the program starts itself again, with a pipe to say
//! when everything is there; what it has to say before goes to the same stderr, and its exit status is passed on.

use crate::commands;
use rustix::fs::FlockOperation;
use std::{
    env,
    fs::File,
    io::{Read, Write},
    os::unix::{fs::MetadataExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

/// Says to the program that it has been started again.
pub(crate) const CHILD: &str = "DRIVELINE_DAEMONIZED";

const READY: &[u8] = b"ready\n";

/// Whether this is the one in the background.
pub(super) fn is_child() -> bool {
    env::var_os(CHILD).is_some_and(|parent| {
        // What it starts itself may inherit the variable, but not the parent.
        let parent = parent.to_str().and_then(|text| text.parse().ok());
        parent.is_some() && parent == rustix::process::getppid().map(|pid| pid.as_raw_pid())
    })
}

/// Starts the program once more, in the background, and waits until it serves or has failed.
pub(super) fn start_again() -> Result<ExitCode, String> {
    let failed = |error: std::io::Error| format!("cannot start in the background: {error}");
    let mut arguments = env::args_os();
    let mut command = Command::new("/proc/self/exe");
    command.arg0(arguments.next().unwrap_or_default()).args(arguments);
    command.env(CHILD, std::process::id().to_string()).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().map_err(failed)?;
    let mut said = Vec::new();
    if let Some(mut pipe) = child.stdout.take() {
        let mut buffer = [0; 64];
        while !said.ends_with(READY) {
            match pipe.read(&mut buffer).map_err(failed)? {
                0 => break,
                count => said.extend_from_slice(&buffer[..count]),
            }
        }
    }
    if said.ends_with(READY) {
        return Ok(ExitCode::SUCCESS);
    }
    commands::print(&String::from_utf8_lossy(&said));
    let status = child.wait().map_err(failed)?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// The program's way to the background.
#[derive(Debug)]
pub(super) struct Background(Option<File>);

impl Background {
    /// Leaves the session of the terminal, if the program is to be in the background.
    ///
    /// Errors: all that can be in the way of [`Background::ready`], which has to do with jobs at work.
    pub(super) fn enter(wanted: bool) -> Result<Self, String> {
        if !(wanted && is_child()) {
            return Ok(Self(None));
        }
        rustix::process::setsid().map_err(|error| format!("cannot leave the session: {error}"))?;
        let null = File::options().read(true).write(true).open("/dev/null");
        Ok(Self(Some(null.map_err(|error| format!("cannot go to the background: /dev/null: {error}"))?)))
    }

    /// Everything is there: whoever waits goes on, and standard streams and the directory are let go. If that cannot be said the program
    /// serves all the same: to end now would end the jobs that go on.
    pub(super) fn ready(self) {
        let Some(null) = self.0 else { return };
        let settle = || -> std::io::Result<()> {
            let mut out = std::io::stdout();
            let said = out.write_all(READY).and_then(|()| out.flush());
            env::set_current_dir("/")?;
            rustix::stdio::dup2_stdin(&null)?;
            rustix::stdio::dup2_stdout(&null)?;
            rustix::stdio::dup2_stderr(&null)?;
            said
        };
        if let Err(error) = settle() {
            tracing::warn!("going to the background: {error}");
        }
    }
}

/// A file with the process' number; it goes with this.
#[derive(Debug)]
pub(super) struct PidFile {
    path: PathBuf,
    file: File,
}

impl PidFile {
    /// Writes it. One that another process still has is left alone: it holds a lock on it.
    pub(super) fn write(path: &Path) -> Result<Self, String> {
        let failed = |what: &str, error: &std::io::Error| {
            format!("cannot create PID file: {what}: {}", crate::exports::reason(error))
        };
        loop {
            let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
            let file =
                file.map_err(|error| failed(&format!("Could not create '{}'", path.display()), &error))?;
            rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive)
                .map_err(|error| failed("Unable to lock it, another process has it", &error.into()))?;
            let file = Self { path: path.to_owned(), file };
            // Somebody may have removed it, and locked another, between the two.
            if !file.is_there() {
                continue;
            }
            let number = format!("{}\n", std::process::id());
            let written = file.file.set_len(0).and_then(|()| (&file.file).write_all(number.as_bytes()));
            written.map_err(|error| failed("Failed to write it", &error))?;
            return Ok(file);
        }
    }

    fn is_there(&self) -> bool {
        let identity = |found: std::fs::Metadata| (found.dev(), found.ino());
        match (self.file.metadata(), std::fs::metadata(&self.path)) {
            (Ok(ours), Ok(there)) => identity(ours) == identity(there),
            _ => false,
        }
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if self.is_there() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

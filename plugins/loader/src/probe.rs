//! Looking at a file in another process.
//!
//! The dynamic linker relocates a file before anyone can look at it, and a corrupt one may kill the process then.
//! So a doubtful file is loaded in a child, and what happens to the child is the verdict.

use crate::{PluginReport, inspect};
use serde::{Deserialize, Serialize};
use std::{
    fmt,
    io::{self, Read},
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Command, ExitCode, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

/// What became of a child that loaded a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is a plugin that can be used.
    Good(PluginReport),
    /// It was refused, for this reason.
    Refused(String),
    /// The child died of it: by a signal, or otherwise before it could answer.
    Died(String),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Good(report) => {
                let names: Vec<_> = report.filters.iter().map(|filter| filter.name.as_str()).collect();
                write!(f, "plugin {}: good, with {}", report.path.display(), names.join(", "))
            }
            Verdict::Refused(reason) => f.write_str(reason),
            Verdict::Died(how) => write!(f, "loading it killed the process that tried: {how}"),
        }
    }
}

/// A line of the child's output that begins so is its answer; a plugin's constructors may print, too.
const ANSWER: &str = "driveline-plugin-probe: ";

#[derive(Serialize, Deserialize)]
enum Answer {
    Good(PluginReport),
    Refused(String),
}

/// The child's part: loads the file and answers on stdout.
pub fn answer_probe(path: &Path) -> ExitCode {
    let answer = match inspect(path) {
        Ok(report) => Answer::Good(report),
        Err(error) => Answer::Refused(error.to_string()),
    };
    println!("\n{ANSWER}{}", serde_json::to_string(&answer).expect("a report can be written"));
    match answer {
        Answer::Good(_) => ExitCode::SUCCESS,
        Answer::Refused(_) => ExitCode::FAILURE,
    }
}

/// Runs `command`, which is to end up in [`answer_probe`], and says what became of it. A child that takes longer than
/// `time_limit` is killed.
pub fn probe(mut command: Command, time_limit: Duration) -> io::Result<Verdict> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (mut stdout, mut stderr) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
    let (send, ended) = mpsc::channel();
    let reader = thread::spawn(move || {
        let mut text = Vec::new();
        let read = stdout.read_to_end(&mut text).map(|_| String::from_utf8_lossy(&text).into_owned());
        let _ = send.send(read);
    });
    let errors = thread::spawn(move || {
        let mut text = Vec::new();
        let _ = stderr.read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    });
    let output = match ended.recv_timeout(time_limit) {
        Ok(output) => output?,
        Err(_) => {
            child.kill()?;
            child.wait()?;
            return Ok(Verdict::Died(format!("it did not come to an end in {time_limit:?}")));
        }
    };
    let status = child.wait()?;
    let _ = reader.join();
    let answer = output.lines().rev().find_map(|line| line.strip_prefix(ANSWER));
    // An answer counts only if the child also ended as it should: a library may kill it on the way out.
    match answer.and_then(|json| serde_json::from_str(json).ok()) {
        Some(Answer::Good(report)) if status.success() => Ok(Verdict::Good(report)),
        Some(Answer::Refused(reason)) if status.code().is_some() => Ok(Verdict::Refused(reason)),
        _ => {
            let errors = errors.join().unwrap_or_default();
            let last = errors.lines().rev().find(|line| !line.trim().is_empty());
            let last = last.map(|line| format!(" ({})", line.trim())).unwrap_or_default();
            Ok(Verdict::Died(format!("{}{last}", words(status))))
        }
    }
}

fn words(status: ExitStatus) -> String {
    match status.signal() {
        Some(signal) => {
            let name = match signal {
                libc::SIGSEGV => "SIGSEGV",
                libc::SIGBUS => "SIGBUS",
                libc::SIGABRT => "SIGABRT",
                libc::SIGILL => "SIGILL",
                libc::SIGFPE => "SIGFPE",
                libc::SIGKILL => "SIGKILL",
                libc::SIGTRAP => "SIGTRAP",
                _ => return format!("signal {signal}"),
            };
            name.to_owned()
        }
        None => format!("exit {}", status.code().unwrap_or_default()),
    }
}

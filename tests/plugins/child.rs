//! This program again, in a child process: for what a process does not survive.

use super::panics;
use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
};

const TASK: &str = "DRIVELINE_TEST_TASK";
const FILE: &str = "DRIVELINE_TEST_FILE";

/// A command that does a task with a file.
pub(crate) fn command(task: &str, file: &Path) -> Command {
    let mut command = Command::new(env::current_exe().expect("the program has a path"));
    command.args(["--exact", "plugins::child::entry", "--ignored", "--nocapture"]);
    command.env(TASK, task).env(FILE, file).env("RUST_BACKTRACE", "0");
    command
}

/// Does a task in a child; how that ended, and what it said.
pub(crate) fn run(task: &str, file: &Path) -> (ExitStatus, String) {
    let output = command(task, file).output().expect("the program can be run");
    let text = [output.stdout, output.stderr].concat();
    (output.status, String::from_utf8_lossy(&text).into_owned())
}

#[test]
#[ignore = "the child's part of other tests"]
fn entry() {
    let Ok(task) = env::var(TASK) else { return };
    let file = PathBuf::from(env::var_os(FILE).expect("a task has a file"));
    match &*task {
        "forget" => panics::forget(&file),
        "probe" => {
            let _ = driveline_loader::answer_probe(&file);
        }
        "search" => println!("{:?}", driveline_loader::search_path(&[file])),
        "hang" => loop {
            std::thread::park();
        },
        other => panic!("there is no task {other}"),
    }
}

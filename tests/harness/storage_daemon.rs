//! A storage daemon by QEMU's command line: QEMU's own, or ours.

use super::{Daemon, Qmp};
use std::{
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

/// A process that does not outlive its test.
pub(crate) struct StorageDaemon {
    child: Child,
    socket: PathBuf,
}

impl StorageDaemon {
    /// QEMU's program.
    pub(crate) fn qemu() -> Command {
        Command::new("qemu-storage-daemon")
    }

    /// Ours, that takes the same.
    pub(crate) fn driveline() -> Command {
        let mut command = Command::new(Daemon::program());
        command.arg("storage-daemon");
        command
    }

    /// Runs it with these arguments and a monitor at `qmp.sock` in the folder.
    pub(crate) fn start(mut program: Command, folder: &Path, arguments: &[&str]) -> Self {
        let (socket, ready) = (folder.join("qmp.sock"), folder.join("ready.pid"));
        let _ = std::fs::remove_file(&ready);
        let chardev = format!("socket,id=c,server=on,wait=off,path={}", socket.display());
        program
            .args(arguments)
            .args(["--chardev", &chardev, "--monitor", "chardev=c", "--pidfile"])
            .arg(&ready);
        let mut child = program.stdin(Stdio::null()).spawn().unwrap();
        // It writes the file when all of it is there. Who comes between its socket and its monitor may never be answered.
        let deadline = Instant::now() + Duration::from_secs(30);
        while !ready.exists() {
            assert_eq!(child.try_wait().unwrap(), None, "it runs");
            assert!(Instant::now() < deadline, "a storage daemon starts");
            std::thread::sleep(Duration::from_millis(2));
        }
        Self { child, socket }
    }

    pub(crate) fn qmp(&self) -> Qmp {
        Qmp::connect(&self.socket)
    }

    /// Ends it without a last word.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits until it has ended by itself, and says how.
    pub(crate) fn wait(mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

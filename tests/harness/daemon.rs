//! The program, run as its users run it.

use super::Qmp;
use std::{
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, OnceLock},
    time::{Duration, Instant},
};

/// What follows the nodes in a configuration: the drive `vda`, writable for guests at `nbd.sock`, and a monitor at `qmp.sock`.
/// `more` is said of the drive.
pub(crate) fn serve(root: &str, more: &str) -> String {
    format!(
        "[drive.vda]\nroot = \"{root}\"\n{more}\n\
         [export.vda]\ntype = \"nbd\"\ndrive = \"vda\"\nsocket = \"nbd.sock\"\nwritable = true\n\
         [monitor]\nqmp = \"qmp.sock\"\n"
    )
}

/// A running `driveline run FILE`.
pub(crate) struct Daemon {
    child: Child,
    /// One line per export, as it was printed.
    pub(crate) exports: Vec<String>,
    directory: PathBuf,
    /// What it wrote to stderr so far, by line.
    log: Arc<Mutex<Vec<String>>>,
}

impl Daemon {
    /// The program, with all shipped filters beside it: built once, by the cargo that runs the tests.
    pub(crate) fn program() -> PathBuf {
        static BUILT: OnceLock<PathBuf> = OnceLock::new();
        BUILT
            .get_or_init(|| {
                let target = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().to_owned();
                let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("Cargo.toml");
                let mut cargo = Command::new(env!("CARGO"));
                // What cargo says of this crate to its tests is nothing for build scripts, which would run again for it: half of
                // everything was built anew each time that somebody built and then tested.
                let of_this_crate =
                    |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
                for (name, _) in
                    std::env::vars_os().filter(|(name, _)| of_this_crate(&name.to_string_lossy()))
                {
                    cargo.env_remove(name);
                }
                cargo.args([
                    "build",
                    "--quiet",
                    "--workspace",
                    "--exclude",
                    "driveline-tests",
                    "--manifest-path",
                ]);
                cargo.arg(manifest).arg("--target-dir").arg(target.parent().unwrap());
                if target.ends_with("release") {
                    cargo.arg("--release");
                }
                assert!(cargo.status().expect("cargo runs").success(), "the program builds");
                target.join("driveline")
            })
            .clone()
    }

    /// Writes the configuration into the directory and runs it; waits until every export is served.
    pub(crate) fn start(directory: &Path, configuration: &str) -> Self {
        let file = directory.join("drive.toml");
        std::fs::write(&file, configuration).unwrap();
        let exports = configuration.matches("[export.").count();
        Self::start_file(&file, exports, &[])
    }

    /// The same with another place for what it writes to stderr.
    pub(crate) fn start_with(directory: &Path, configuration: &str, stderr: Stdio) -> Self {
        let file = directory.join("drive.toml");
        std::fs::write(&file, configuration).unwrap();
        let exports = configuration.matches("[export.").count();
        Self::start_command(&file, exports, &[], stderr)
    }

    pub(crate) fn start_file(file: &Path, exports: usize, environment: &[(&str, &str)]) -> Self {
        Self::start_command(file, exports, environment, Stdio::piped())
    }

    fn start_command(file: &Path, exports: usize, environment: &[(&str, &str)], stderr: Stdio) -> Self {
        let mut command = Command::new(Self::program());
        command.arg("run").arg(file).envs(environment.iter().copied());
        Self::spawn(command, file.parent().unwrap(), exports, stderr)
    }

    fn spawn(mut command: Command, directory: &Path, exports: usize, stderr: Stdio) -> Self {
        command.stdout(Stdio::piped()).stderr(stderr).stdin(Stdio::null());
        let mut child = command.spawn().expect("the program starts");
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let served: Vec<String> = lines.by_ref().take(exports).map_while(Result::ok).collect();
        if served.len() < exports {
            let mut errors = String::new();
            child.stderr.take().map(|mut stderr| stderr.read_to_string(&mut errors).unwrap());
            panic!("the program ended with {:?}:\n{errors}", child.wait());
        }
        // Nobody may block on a full pipe.
        std::thread::spawn(move || {
            lines.map_while(Result::ok).for_each(|line| eprintln!("driveline: {line}"))
        });
        let log: Arc<Mutex<Vec<String>>> = Arc::default();
        if let Some(errors) = child.stderr.take().map(BufReader::new) {
            let lines = log.clone();
            std::thread::spawn(move || {
                errors.lines().map_while(Result::ok).for_each(|line| lines.lock().unwrap().push(line));
            });
        }
        Self { child, exports: served, directory: directory.to_owned(), log }
    }

    /// Runs it as if the machine had been started anew: another boot id, in a mount namespace of its own. `None`: this user may
    /// not make one.
    pub(crate) fn start_after_power_cut(directory: &Path, configuration: &str) -> Option<Self> {
        const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
        let (file, id) = (directory.join("drive.toml"), directory.join("boot_id"));
        std::fs::write(&file, configuration).unwrap();
        std::fs::write(&id, "01234567-89ab-cdef-0123-456789abcdef\n").unwrap();
        let bind = format!("mount --bind '{}' {BOOT_ID}", id.display());
        let may = Command::new("unshare").args(["-m", "sh", "-c", &bind]).output();
        if !may.is_ok_and(|tried| tried.status.success()) {
            return None;
        }
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-c", &format!("{bind} && exec \"$@\""), "sh"]).arg(Self::program());
        command.arg("run").arg(&file);
        Some(Self::spawn(command, directory, configuration.matches("[export.").count(), Stdio::piped()))
    }

    /// Runs it, and kills it after that time, however far it has come.
    pub(crate) fn kill_while_starting(directory: &Path, configuration: &str, after: Duration) {
        let file = directory.join("drive.toml");
        std::fs::write(&file, configuration).unwrap();
        let mut command = Command::new(Self::program());
        command.arg("run").arg(&file).stdout(Stdio::null()).stderr(Stdio::null()).stdin(Stdio::null());
        let mut child = command.spawn().expect("the program starts");
        std::thread::sleep(after);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// What it wrote to stderr, as soon as that is `enough`.
    pub(crate) fn wait_log(&self, enough: impl Fn(&[String]) -> bool) -> Vec<String> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let lines = self.log.lock().unwrap().clone();
            if enough(&lines) {
                return lines;
            }
            assert!(Instant::now() < deadline, "not in the log:\n{}", lines.join("\n"));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Does it run?
    pub(crate) fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// What it holds in memory, in bytes: `VmRSS`.
    pub(crate) fn resident_bytes(&self) -> u64 {
        self.memory("VmRSS:")
    }

    fn memory(&self, key: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(key)).expect("it runs");
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }

    /// The part of it that is no file's: what it has allocated. The code of a debug build is several times what is shipped.
    pub(crate) fn anonymous_bytes(&self) -> u64 {
        self.memory("RssAnon:")
    }

    /// A path in its directory.
    pub(crate) fn path(&self, name: &str) -> String {
        self.directory.join(name).to_str().unwrap().to_owned()
    }

    /// A connection to `qmp.sock` in its directory.
    pub(crate) fn qmp(&self) -> Qmp {
        Qmp::connect(&self.directory.join("qmp.sock"))
    }

    /// Ends it as the kernel does when there is no memory: without a last word. Its locks are gone when this returns.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Ends it as an operator does, and says how it ended.
    pub(crate) fn terminate(self) -> std::process::ExitStatus {
        self.terminate_within(Duration::from_secs(20))
    }

    /// The same, for one who has something to wait for.
    pub(crate) fn terminate_within(mut self, time: Duration) -> std::process::ExitStatus {
        run_kill("-TERM", self.child.id());
        let deadline = Instant::now() + time;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it ends within {time:?} of SIGTERM");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn run_kill(signal: &str, pid: u32) {
    Command::new("kill").args([signal, &pid.to_string()]).status().expect("kill runs");
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // Shown by the tests that fail.
        self.log.lock().unwrap().iter().take(200).for_each(|line| eprintln!("driveline: {line}"));
    }
}

//! Who holds a lock: for the text of an error, found in /proc as far as that may be read.
//!
//! The kernel does not tell the process of an open-file-description lock when asked for the lock, but lists the locks
//! of each open file in `/proc/PID/fdinfo/FD`.

use driveline_engine::file::File;
use std::{
    fs,
    os::fd::{AsRawFd, RawFd},
    path::Path,
};

/// Words for whoever else has a lock on that byte of the file.
pub(super) fn of(file: &File, byte: u64) -> String {
    find(file, byte).unwrap_or_else(|| "another process".to_owned())
}

fn find(file: &File, byte: u64) -> Option<String> {
    let inode = rustix::fs::fstat(file).ok()?.st_ino;
    let own = std::process::id();
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let except = (pid == own).then(|| file.as_raw_fd());
        if !holds(&process.path(), except, inode, byte) {
            continue;
        }
        if pid == own {
            return Some("another node of this process".to_owned());
        }
        let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
        return Some(format!("{} (process {pid})", name.trim()));
    }
    None
}

fn holds(process: &Path, except: Option<RawFd>, inode: u64, byte: u64) -> bool {
    // Processes of other users are not shown, and some end while we look.
    let Ok(files) = fs::read_dir(process.join("fdinfo")) else { return false };
    files.flatten().any(|file| {
        let name = file.file_name();
        let number = name.to_str().and_then(|name| name.parse::<RawFd>().ok());
        number != except
            && fs::read_to_string(file.path())
                .is_ok_and(|text| text.lines().any(|line| is_lock(line, inode, byte)))
    })
}

/// A line such as `lock: 1: OFDLCK ADVISORY READ -1 fe:00:10076181 100 101`: device and inode, first byte, last byte.
fn is_lock(line: &str, inode: u64, byte: u64) -> bool {
    let Some(lock) = line.strip_prefix("lock:") else { return false };
    let mut words = lock.split_whitespace().rev();
    let (Some(end), Some(start), Some(file)) = (words.next(), words.next(), words.next()) else {
        return false;
    };
    let (Ok(start), Some(at)) = (start.parse::<u64>(), file.rsplit(':').next()) else { return false };
    let end = if end == "EOF" { u64::MAX } else { end.parse().unwrap_or(0) };
    at.parse() == Ok(inode) && (start..=end).contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::is_lock;

    #[test]
    fn locks_are_read_as_the_kernel_prints_them() {
        let line = "lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:10076181 100 101";
        assert!(is_lock(line, 10076181, 100) && is_lock(line, 10076181, 101));
        assert!(!is_lock(line, 10076181, 102) && !is_lock(line, 1, 100));
        let all = "lock:\t2: POSIX  ADVISORY  WRITE 4711 fe:00:7 0 EOF";
        assert!(is_lock(all, 7, 203) && !is_lock("pos:\t0", 7, 0));
    }
}

//! What has been learnt about a file: which operations may be tried inline on the I/O thread.

use std::os::fd::OwnedFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// A plain write that took longer did not just copy: it waited for the disk or for memory. Or the thread was preempted, on
/// a busy machine, so one alone means nothing.
const SLOW: Duration = Duration::from_millis(2);
/// Each slow write adds this, each quick one takes 1 away.
const SLOW_POINTS: u32 = 32;
/// With so many points, four slow writes in a short while, writes go elsewhere for [`PAUSE`].
const POINTS_MAX: u32 = 100;
const PAUSE: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(super) struct Ways {
    read_nowait: AtomicBool,
    write_nowait: AtomicBool,
    /// The file's contents never leave memory, so nothing about them can block.
    in_memory: bool,
    write_inline: bool,
    slow_points: AtomicU32,
    /// On [`clock`]: until then plain inline writes are not tried.
    paused_until: AtomicU64,
}

impl Ways {
    pub(super) fn of(fd: &OwnedFd) -> Ways {
        const TMPFS: i64 = 0x0102_1994;
        const RAMFS: i64 = 0x8584_58f6;
        let in_memory = rustix::fs::fstatfs(fd).is_ok_and(|fs| matches!(fs.f_type, TMPFS | RAMFS));
        Ways {
            read_nowait: AtomicBool::new(true),
            write_nowait: AtomicBool::new(true),
            in_memory,
            write_inline: true,
            slow_points: AtomicU32::new(0),
            paused_until: AtomicU64::new(0),
        }
    }

    /// For `O_DIRECT`, where even `RWF_NOWAIT` waits for the device, and for what is no file.
    pub(super) fn never_inline() -> Ways {
        Ways {
            read_nowait: AtomicBool::new(false),
            write_nowait: AtomicBool::new(false),
            in_memory: false,
            write_inline: false,
            slow_points: AtomicU32::new(0),
            paused_until: AtomicU64::new(0),
        }
    }

    pub(super) fn read_nowait(&self) -> bool {
        self.read_nowait.load(Relaxed)
    }

    pub(super) fn refuse_read_nowait(&self) {
        self.read_nowait.store(false, Relaxed);
    }

    pub(super) fn write_nowait(&self) -> bool {
        self.write_nowait.load(Relaxed)
    }

    pub(super) fn refuse_write_nowait(&self) {
        self.write_nowait.store(false, Relaxed);
    }

    pub(super) fn in_memory(&self) -> bool {
        self.in_memory
    }

    /// Whether a plain, blocking write is worth trying inline: it nearly always only copies to the page
    /// cache, and the kernel would hand it to a worker thread otherwise, which costs several times as much.
    pub(super) fn write_inline(&self) -> bool {
        if !self.write_inline {
            return false;
        }
        let until = self.paused_until.load(Relaxed);
        until == 0 || clock(Instant::now()) >= until
    }

    /// Learns from a plain inline write. Several threads may lose each other's points, which does no harm.
    pub(super) fn note_write(&self, begin: Instant) {
        let end = Instant::now();
        let points = self.slow_points.load(Relaxed);
        if end - begin <= SLOW || self.in_memory {
            if points > 0 {
                self.slow_points.store(points - 1, Relaxed);
            }
        } else if points + SLOW_POINTS < POINTS_MAX {
            self.slow_points.store(points + SLOW_POINTS, Relaxed);
        } else {
            // Half of it, so that after the pause a few slow ones suffice.
            self.slow_points.store(POINTS_MAX / 2, Relaxed);
            self.paused_until.store(clock(end + PAUSE), Relaxed);
        }
    }
}

/// Nanoseconds since the first call, and never 0.
fn clock(at: Instant) -> u64 {
    static BEGIN: OnceLock<Instant> = OnceLock::new();
    let begin = *BEGIN.get_or_init(Instant::now);
    at.saturating_duration_since(begin).as_nanos() as u64 + 1
}

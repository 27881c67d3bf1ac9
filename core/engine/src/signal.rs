//! Waiting for signals: the handler notes the signal and writes to an eventfd, which a task waits for.
//!
//! No signal mask is needed, so threads that were started earlier are no trouble.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering::SeqCst};

use crate::driver::Ready;

/// Bit `n`: signal `n` has come and nobody has been told.
static PENDING: AtomicU64 = AtomicU64::new(0);
/// The eventfd of the one [`Signals`] there is, or -1.
static WAKE: AtomicI32 = AtomicI32::new(-1);

/// SIGINT, SIGTERM and SIGHUP, caught for as long as this lives. There is one at a time in a process.
pub struct Signals {
    wake: OwnedFd,
    before: Vec<(i32, libc::sigaction)>,
}

impl Signals {
    /// Catches SIGINT (Ctrl-C), SIGTERM and SIGHUP (the terminal is gone), instead of what they did.
    pub fn terminate() -> io::Result<Signals> {
        Signals::of(&[libc::SIGINT, libc::SIGTERM, libc::SIGHUP])
    }

    /// Catches signals by number (1 to 63).
    ///
    /// Errors: `AlreadyExists` while another `Signals` lives; a number that cannot be caught.
    pub fn of(signals: &[i32]) -> io::Result<Signals> {
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        let wake = rustix::event::eventfd(0, flags)?;
        if WAKE.compare_exchange(-1, wake.as_raw_fd(), SeqCst, SeqCst).is_err() {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "signals are caught elsewhere"));
        }
        PENDING.store(0, SeqCst);
        let mut this = Signals { wake, before: Vec::new() };
        for &signal in signals {
            if !(1..64).contains(&signal) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            // SAFETY: all-zero is a valid sigaction.
            let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
            action.sa_sigaction = handle as extern "C" fn(i32) as usize;
            action.sa_flags = libc::SA_RESTART;
            // SAFETY: as above.
            let mut before: libc::sigaction = unsafe { std::mem::zeroed() };
            // SAFETY: both are on the stack, and `handle` does only what a handler may.
            if unsafe { libc::sigaction(signal, &raw const action, &raw mut before) } != 0 {
                return Err(io::Error::last_os_error());
            }
            if signal == libc::SIGHUP && before.sa_sigaction == libc::SIG_IGN {
                // nohup said so. SAFETY: it is what sigaction gave.
                unsafe { libc::sigaction(signal, &raw const before, std::ptr::null_mut()) };
                continue;
            }
            this.before.push((signal, before));
        }
        Ok(this)
    }

    /// Waits for the next signal. Signals that come before anybody waits are kept, each kind once.
    pub async fn next(&mut self) -> io::Result<i32> {
        loop {
            let pending = PENDING.load(SeqCst);
            if pending != 0 {
                let signal = pending.trailing_zeros();
                PENDING.fetch_and(!(1 << signal), SeqCst);
                return Ok(signal as i32);
            }
            // Empties the counter; a signal between this and the look above has set its bit before it wrote.
            let mut count = [0; 8];
            match rustix::io::read(&self.wake, &mut count) {
                Ok(_) => {}
                Err(rustix::io::Errno::AGAIN) => Ready::new(&self.wake, libc::POLLIN).await?,
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for (signal, before) in &self.before {
            // SAFETY: it is what sigaction gave.
            unsafe { libc::sigaction(*signal, before, std::ptr::null_mut()) };
        }
        WAKE.store(-1, SeqCst);
    }
}

impl std::fmt::Debug for Signals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.before.iter().map(|(signal, _)| signal)).finish()
    }
}

/// Only atomics and `write(2)`, which a signal handler may use; `errno` is left as it was.
extern "C" fn handle(signal: i32) {
    PENDING.fetch_or(1 << signal, SeqCst);
    // SAFETY: errno is this thread's own.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let before = unsafe { *errno };
    let one = 1u64;
    // SAFETY: eight bytes on the stack; a descriptor of -1 is an error that is ignored.
    unsafe { libc::write(WAKE.load(SeqCst), (&raw const one).cast(), 8) };
    // SAFETY: as above.
    unsafe { *errno = before };
}

//! The threads that everything runs on: one executor per I/O thread, over io_uring or epoll.
//!
//! An [`Engine`] owns some threads. Each is an executor of its own with its own io_uring ring: a task stays on the thread that
//! it was given to, and files, sockets and timers of its tasks complete there, without locks. Where the kernel or a container
//! refuses io_uring, or when `DRIVELINE_ENGINE=epoll` says so, the same API runs on epoll and a pool of blocking threads.
//!
//! What it is not: a general runtime. There is no work stealing (a request ends on the thread it began on), no datagrams, no
//! processes. Locks and channels come from crates such as `async-lock`, which work with any waker.
//!
//! Its nouns: a *task* is a future that lives on one engine thread; a [`Handle`] gives work to threads from anywhere; a
//! [`File`](file::File) or [`Stream`](net::Stream) is something whose operations are futures.
//!
//! ```
//! use driveline_engine::net::Stream;
//! use driveline_engine::{Config, Engine, spawn_local};
//!
//! let engine = Engine::start(Config::default())?;
//! let (client, server) = Stream::pair()?;
//! // This task runs on thread 0, and need not be Send.
//! let echo = engine.handle().spawn_on(0, move || async move {
//!     let mut buffer = [0; 5];
//!     server.read_exact(&mut buffer).await?;
//!     spawn_local(async move { server.write_all(&buffer).await }).await.expect("it does not panic")
//! });
//! let answer = engine.block_on(async move {
//!     client.write_all(b"hello").await?;
//!     let mut answer = [0; 5];
//!     client.read_exact(&mut answer).await?;
//!     std::io::Result::Ok(answer)
//! })?;
//! assert_eq!(&answer, b"hello");
//! engine.block_on(echo)??;
//! engine.shutdown();
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # How it decides, and what was measured
//!
//! On two virtual processors (Linux 6.18, ext4), with `cargo run --release -p driveline-engine --example measure`, while
//! other work kept the processors busy: compare within a row, which is from one run, or the range over several.
//!
//! | what | ns |
//! |---|---|
//! | `spawn_local` and join | 150 to 280 |
//! | 4 KiB from the page cache: `File::read_at` / a ring at depth 1 / at depth 32 | 635 / 752 / 626 |
//! | 4 KiB to the page cache: `File::write_at` / a ring at depth 1 / at depth 32 | 2240 / 4110 / 3120 |
//! | wake of a task on another thread: polling before sleep / not | 950 to 1420 / 820 to 26500 |
//! | 28 bytes for 4 KiB over a unix socket, depth 1: polling / not | 3750 to 6700 / 3500 to 62400 |
//! | the same at depth 32, answers batched: io_uring / epoll | 340 to 1130 / 355 to 670 |
//!
//! The spread without polling is probably where the scheduler puts the threads: quick on one processor, slow when one has to
//! be fetched from idleness. Writes of 4 KiB took 8 to 13 µs, whichever way they came, to a file that had been written in
//! one go, and 2 µs to the same file written in pieces: presumably ext4's large folios.
//!
//! * **Reads** are tried inline first. `RWF_NOWAIT` answers from the page cache or says `EAGAIN`; only then the ring has a part
//!   in it. A hit needs no allocation, no second poll and no system call but the one.
//! * **Writes** too, where the file system takes `RWF_NOWAIT`. Most do not, and through a ring the kernel hands those to worker
//!   threads, one at a time for each file. So they are plain inline `pwritev` calls, which copy and return. When several of them take
//!   milliseconds, because the kernel makes writers wait for the disk, writes go through the ring for a while. Direct I/O
//!   always uses the ring.
//! * **Sockets** are tried with `MSG_DONTWAIT`; on `EAGAIN` the task waits for readiness in the ring. A receive *in* the ring
//!   would spare a call for each wait, but lends memory to the kernel, which a safe `read(&mut [u8])` cannot.
//! * **Polling before sleep** spares waking a processor, and costs several times as much as it spares when the peer waits for
//!   that very processor (11 µs a wake instead of 1.6, before this was learnt). No rule guesses that right, so both ways are
//!   measured all the time and the better one is kept; an idle thread never polls.
//! * **Wakes** within a thread touch one queue. Across threads they take a lock that is held for a push, and write to an eventfd
//!   only when the other thread sleeps.
//! * A task that never has to wait yields after 128 operations (fewer when they are large), so that a job in the page
//!   cache does not hold up the sessions on its thread.

mod driver;
mod engine;
mod epoll;
mod executor;
pub mod file;
pub mod inherited;
pub mod net;
mod ops;
mod pool;
mod ring;
pub mod signal;
mod timers;

pub use engine::{Backend, Config, Engine, Handle, current_thread, spawn_local, yield_now};
pub use executor::{JoinError, JoinHandle};
pub use pool::unblock;
pub use timers::{Sleep, now, sleep, sleep_until};

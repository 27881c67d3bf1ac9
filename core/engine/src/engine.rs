//! The engine: starting its threads, handing work to them, ending them.

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Duration;

use parking_lot::Mutex;

use crate::driver::Driver;
use crate::epoll::Epoll;
use crate::executor::{JoinError, JoinHandle, Mail, Shared, Worker, prepare, with_current};
use crate::ring::Ring;
use crate::timers::Sleep;

/// What the threads wait and do file I/O with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backend {
    /// io_uring where the kernel allows it, else the fallback. The environment variable `DRIVELINE_ENGINE` decides when
    /// it is set: `io_uring` or `epoll`.
    #[default]
    Auto,
    /// io_uring or an error.
    IoUring,
    /// epoll, and a pool of blocking threads for files.
    Fallback,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Backend::Auto => "auto",
            Backend::IoUring => "io_uring",
            Backend::Fallback => "epoll",
        })
    }
}

/// How an engine is started.
#[derive(Clone, Debug)]
pub struct Config {
    /// How many I/O threads; at least one. Default: two, or one on a machine with a single processor.
    pub threads: usize,
    /// Which backend; default: [`Backend::Auto`].
    pub backend: Backend,
    /// For how long a thread looks for completions before it sleeps, at most; it stops looking when that does not pay.
    /// Zero: never. Default: 20 µs, and zero on a machine with a single processor.
    pub poll_before_sleep: Duration,
}

impl Default for Config {
    fn default() -> Self {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        Config {
            threads: processors.min(2),
            backend: Backend::Auto,
            poll_before_sleep: Duration::from_micros(if processors > 1 { 20 } else { 0 }),
        }
    }
}

/// I/O threads, each an executor of its own. Dropping it is [`Engine::shutdown`].
#[derive(Debug)]
pub struct Engine {
    inner: Arc<Inner>,
    joins: Mutex<Vec<thread::JoinHandle<()>>>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    threads: Vec<Arc<Shared>>,
    next: AtomicUsize,
    backend: Backend,
}

impl Engine {
    /// Starts the threads.
    ///
    /// Errors: a backend that was asked for by name and is not to be had here; no threads or descriptors left.
    pub fn start(config: Config) -> io::Result<Engine> {
        match choose(config.backend)? {
            Backend::Auto => Engine::start_with(&config, Backend::IoUring).or_else(|error| {
                tracing::info!(target: "driveline::engine", %error, "no io_uring here; epoll is used");
                Engine::start_with(&config, Backend::Fallback)
            }),
            named => Engine::start_with(&config, named),
        }
    }

    fn start_with(config: &Config, backend: Backend) -> io::Result<Engine> {
        let count = config.threads.max(1);
        let threads = (0..count).map(|index| Shared::new(index).map(Arc::new)).collect::<io::Result<_>>()?;
        let inner = Arc::new(Inner { threads, next: AtomicUsize::new(0), backend });
        let engine = Engine { inner: Arc::clone(&inner), joins: Mutex::default() };
        let (report, reports) = mpsc::channel();
        for shared in &inner.threads {
            let (shared, weak, report) = (Arc::clone(shared), Arc::downgrade(&inner), report.clone());
            let name = format!("driveline-io-{}", shared.index);
            let spin = config.poll_before_sleep;
            let join = thread::Builder::new().name(name).spawn(move || {
                // A ring belongs to the thread that builds it.
                let driver = match build(backend, &shared) {
                    Ok(driver) => driver,
                    Err(error) => return drop(report.send(Err(error))),
                };
                let worker = Worker::new(shared, weak, driver, spin);
                drop(report.send(Ok(())));
                drop(report);
                let bomb = AbortOnUnwind;
                worker.run();
                std::mem::forget(bomb);
            })?;
            engine.joins.lock().push(join);
        }
        drop(report);
        // On an error `engine` is dropped, which ends the threads that did start.
        reports.iter().collect::<io::Result<()>>()?;
        tracing::debug!(target: "driveline::engine", %backend, threads = count, "engine started");
        Ok(engine)
    }

    /// A handle to give away.
    pub fn handle(&self) -> Handle {
        Handle { inner: Arc::clone(&self.inner) }
    }

    /// Which backend the threads use; never [`Backend::Auto`].
    pub fn backend(&self) -> Backend {
        self.inner.backend
    }

    /// Runs `future` as a task on the first thread, and waits for it. It may borrow from the caller.
    ///
    /// # Panics
    ///
    /// With the panic of `future`; when called on an engine thread, which would wait for itself; and when the engine is shut
    /// down meanwhile.
    pub fn block_on<F>(&self, future: F) -> F::Output
    where
        F: Future + Send,
        F::Output: Send,
    {
        self.block_on_local(|| future)
    }

    /// As [`Engine::block_on`], for a future that is not `Send`: `make` makes it on the first thread.
    ///
    /// # Panics
    ///
    /// As [`Engine::block_on`].
    pub fn block_on_local<F>(&self, make: impl FnOnce() -> F + Send) -> F::Output
    where
        F: Future,
        F::Output: Send,
    {
        with_current(|worker| {
            assert!(worker.is_none(), "Engine::block_on is called on an engine thread");
        });
        let shared = &self.inner.threads[0];
        // SAFETY: until its first poll the future holds only `make`, which is Send, and the output is Send as well; `wait` below
        // returns only when the task's future is gone.
        let (runnable, join) = unsafe { prepare(Arc::clone(shared), async move { make().await }) };
        shared.post(Mail::Run(runnable));
        match wait(join) {
            Ok(output) => output,
            Err(JoinError::Panicked(payload)) => std::panic::resume_unwind(payload),
            Err(JoinError::Aborted) => panic!("the engine was shut down during block_on"),
        }
    }

    /// Drops all tasks, each on its own thread, and waits until the threads have ended. Handles stay usable: what they spawn is
    /// aborted at once.
    ///
    /// # Panics
    ///
    /// When called on one of its own threads.
    pub fn shutdown(&self) {
        with_current(|worker| {
            let ours = worker.is_some_and(|worker| self.inner.threads.iter().any(|t| t.id == worker.id()));
            assert!(!ours, "an engine is shut down on one of its own threads");
        });
        for shared in &self.inner.threads {
            shared.stop();
        }
        for join in self.joins.lock().drain(..) {
            // A panic was reported where it happened.
            let _ = join.join();
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// Gives work to the threads of an engine, from anywhere. It does not keep them alive.
#[derive(Clone, Debug)]
pub struct Handle {
    inner: Arc<Inner>,
}

impl Handle {
    /// The handle of the engine that the calling thread belongs to.
    pub fn try_current() -> Option<Handle> {
        with_current(|worker| worker?.engine.upgrade()).map(|inner| Handle { inner })
    }

    /// How many threads there are; they are numbered from 0.
    pub fn threads(&self) -> usize {
        self.inner.threads.len()
    }

    /// Which backend the threads use; never [`Backend::Auto`].
    pub fn backend(&self) -> Backend {
        self.inner.backend
    }

    /// Runs a future as a task on a thread of choice; it is made there, and need not be `Send`.
    ///
    /// # Panics
    ///
    /// When there is no such thread.
    pub fn spawn_on<F, T>(&self, thread: usize, make: impl FnOnce() -> F + Send + 'static) -> JoinHandle<T>
    where
        F: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        let shared = &self.inner.threads[thread];
        // SAFETY: until its first poll the future holds only `make`, which is Send; all is 'static.
        let (runnable, join) = unsafe { prepare(Arc::clone(shared), async move { make().await }) };
        self.submit(shared, runnable);
        join
    }

    /// Runs a future as a task on one of the threads, in turns. It stays there.
    pub fn spawn<T: Send + 'static>(
        &self,
        future: impl Future<Output = T> + Send + 'static,
    ) -> JoinHandle<T> {
        let next = self.inner.next.fetch_add(1, Ordering::Relaxed);
        let shared = &self.inner.threads[next % self.inner.threads.len()];
        // SAFETY: `future` is Send and 'static.
        let (runnable, join) = unsafe { prepare(Arc::clone(shared), future) };
        self.submit(shared, runnable);
        join
    }

    fn submit(&self, shared: &Arc<Shared>, runnable: async_task::Runnable) {
        with_current(|worker| match worker {
            Some(worker) if worker.id() == shared.id => worker.push(runnable),
            _ => shared.post(Mail::Run(runnable)),
        });
    }

    /// Waits for `duration`, on whichever engine thread it is polled.
    pub fn sleep(&self, duration: Duration) -> Sleep {
        crate::timers::sleep(duration)
    }
}

/// Runs a future as a task on the current engine thread.
///
/// # Panics
///
/// On a thread that is no engine thread.
pub fn spawn_local<T: 'static>(future: impl Future<Output = T> + 'static) -> JoinHandle<T> {
    with_current(|worker| {
        let worker = worker.expect("spawn_local is called on an engine thread");
        // SAFETY: this is the worker's thread; all is 'static.
        let (runnable, join) = unsafe { prepare(Arc::clone(worker.shared()), future) };
        worker.push(runnable);
        join
    })
}

/// The number of the current engine thread, as [`Handle::spawn_on`] counts them.
pub fn current_thread() -> Option<usize> {
    with_current(|worker| worker.map(|worker| worker.shared().index))
}

/// Lets the other tasks of this thread run first.
pub async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Tasks' panics are caught; one of the loop itself would unwind past memory that the kernel still writes to.
struct AbortOnUnwind;

impl Drop for AbortOnUnwind {
    fn drop(&mut self) {
        eprintln!("driveline-engine: an I/O thread panicked outside of its tasks");
        std::process::abort();
    }
}

/// What is asked for, by the environment too.
fn choose(wanted: Backend) -> io::Result<Backend> {
    if wanted != Backend::Auto {
        return Ok(wanted);
    }
    match std::env::var("DRIVELINE_ENGINE").as_deref() {
        Ok("epoll") => Ok(Backend::Fallback),
        Ok("io_uring") => Ok(Backend::IoUring),
        Ok("" | "auto") | Err(_) => Ok(Backend::Auto),
        Ok(other) => {
            let text = format!("DRIVELINE_ENGINE is \"{other}\"; expected io_uring, epoll or auto");
            Err(io::Error::new(io::ErrorKind::InvalidInput, text))
        }
    }
}

fn build(backend: Backend, shared: &Shared) -> io::Result<Driver> {
    Ok(match backend {
        Backend::IoUring => Driver::Ring(Ring::new(shared.wake_fd())?),
        _ => Driver::Epoll(Epoll::new(shared.wake_fd())?),
    })
}

/// Waits for a task on a thread that is no engine thread.
fn wait<T>(join: JoinHandle<T>) -> Result<T, JoinError> {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut cx = Context::from_waker(&waker);
    let mut join = pin!(join);
    loop {
        match join.as_mut().poll(&mut cx) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}

//! One thread, any number of tasks, and a seed that decides which of them goes on next.

use driveline_graph::BoxFuture;
use driveline_jobs::Runtime;
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use std::{
    collections::BTreeMap,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

/// The scheduler. Cheap to clone.
#[derive(Clone)]
pub struct Sim(Arc<Inner>);

struct Inner {
    rng: Mutex<SmallRng>,
    tasks: Mutex<Vec<Task>>,
    now: Mutex<Duration>,
    timers: Mutex<BTreeMap<(Duration, u64), Waker>>,
    next: Mutex<u64>,
}

struct Task {
    future: BoxFuture<'static, ()>,
    woken: Arc<Flag>,
}

struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, SeqCst);
    }
}

impl Sim {
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Inner {
            rng: Mutex::new(SmallRng::seed_from_u64(seed)),
            tasks: Mutex::default(),
            now: Mutex::default(),
            timers: Mutex::default(),
            next: Mutex::default(),
        }))
    }

    /// A number below `end`.
    pub fn below(&self, end: u64) -> u64 {
        self.0.rng.lock().random_range(0..end)
    }

    pub fn chance(&self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }

    /// Lets others go first, sometimes.
    pub async fn maybe_yield(&self) {
        while self.chance(3) {
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
    }

    pub fn go(&self, future: impl Future<Output = ()> + Send + 'static) {
        let woken = Arc::new(Flag(AtomicBool::new(true)));
        self.0.tasks.lock().push(Task { future: Box::pin(future), woken });
    }

    /// Runs everything until `future` is done. Panics when nothing can go on any more: a deadlock.
    pub fn run<T: Send + 'static>(&self, future: impl Future<Output = T> + Send + 'static) -> T {
        let result = Arc::new(Mutex::new(None));
        let to = result.clone();
        self.go(async move {
            let value = future.await;
            *to.lock() = Some(value);
        });
        loop {
            if let Some(value) = result.lock().take() {
                return value;
            }
            assert!(self.turn(), "deadlock: {} tasks, none of which can go on", self.0.tasks.lock().len());
        }
    }

    /// Polls one task that was woken, or moves the clock.
    fn turn(&self) -> bool {
        let picked = {
            let mut tasks = self.0.tasks.lock();
            let ready: Vec<usize> = (0..tasks.len()).filter(|i| tasks[*i].woken.0.load(SeqCst)).collect();
            if ready.is_empty() {
                None
            } else {
                Some(tasks.swap_remove(ready[self.below(ready.len() as u64) as usize]))
            }
        };
        let Some(mut task) = picked else { return self.advance() };
        task.woken.0.store(false, SeqCst);
        let waker = Waker::from(task.woken.clone());
        if task.future.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
            self.0.tasks.lock().push(task);
        }
        true
    }

    fn advance(&self) -> bool {
        let first = self.0.timers.lock().pop_first();
        let Some(((when, _), waker)) = first else { return false };
        *self.0.now.lock() = when;
        waker.wake();
        true
    }
}

struct Sleep {
    sim: Sim,
    key: (Duration, u64),
}

impl Future for Sleep {
    type Output = ();
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if *self.sim.0.now.lock() >= self.key.0 {
            return Poll::Ready(());
        }
        self.sim.0.timers.lock().insert(self.key, cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.sim.0.timers.lock().remove(&self.key);
    }
}

impl Runtime for Sim {
    fn spawn(&self, future: BoxFuture<'static, ()>) {
        self.go(future);
    }

    fn sleep(&self, time: Duration) -> BoxFuture<'static, ()> {
        let mut next = self.0.next.lock();
        *next += 1;
        let key = (*self.0.now.lock() + time, *next);
        Box::pin(Sleep { sim: self.clone(), key })
    }

    fn now(&self) -> Duration {
        *self.0.now.lock()
    }
}

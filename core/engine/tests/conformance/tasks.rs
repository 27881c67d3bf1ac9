//! Tasks, wakers, timers, ending.

use std::cell::Cell;
use std::future::{Future, pending, poll_fn};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};
use std::thread;
use std::time::{Duration, Instant};

use driveline_engine::{
    Backend, JoinError, current_thread, now, sleep, sleep_until, spawn_local, unblock, yield_now,
};

use crate::engine;

conformance!(
    a_task_runs_where_it_was_put_and_gives_its_result,
    block_on_borrows_from_its_caller,
    aborting_drops_the_future_on_its_own_thread,
    a_panic_surfaces_in_the_handle_and_the_thread_lives_on,
    a_detached_task_runs_on,
    a_storm_of_wakes_across_threads_loses_none,
    timers_fire_in_order_and_not_early,
    a_dropped_sleep_neither_fires_nor_keeps_the_thread_busy,
    a_sleep_moves_between_threads,
    shutdown_drops_waiting_tasks_on_their_threads,
    spawning_after_shutdown_aborts,
    an_idle_engine_burns_no_processor_time,
    blocking_work_runs_elsewhere,
    a_panicking_destructor_does_not_end_the_thread,
);

fn a_task_runs_where_it_was_put_and_gives_its_result(backend: Backend) {
    let engine = engine(backend, 3);
    let handle = engine.handle();
    assert_eq!(handle.threads(), 3);
    assert_eq!(engine.backend(), backend);
    let joins: Vec<_> = (0..3)
        .map(|thread| {
            handle.spawn_on(thread, move || async move {
                // Not Send, across an await.
                let count = Rc::new(Cell::new(0));
                let same = Rc::clone(&count);
                let local = spawn_local(async move {
                    yield_now().await;
                    same.set(same.get() + 1);
                    current_thread()
                });
                assert_eq!(local.await.unwrap(), Some(thread));
                assert_eq!(count.get(), 1);
                thread * 10
            })
        })
        .collect();
    let results = engine.block_on(async {
        let mut results = Vec::new();
        for join in joins {
            results.push(join.await.unwrap());
        }
        results
    });
    assert_eq!(results, [0, 10, 20]);
}

fn block_on_borrows_from_its_caller(backend: Backend) {
    let engine = engine(backend, 1);
    let text = String::from("on the stack");
    let mut count = 0;
    let length = engine.block_on(async {
        yield_now().await;
        count += 1;
        text.len()
    });
    assert_eq!((length, count), (text.len(), 1));
}

/// Tells on which thread it was dropped.
struct Tell(Arc<Mutex<Option<thread::ThreadId>>>);

impl Drop for Tell {
    fn drop(&mut self) {
        *self.0.lock().unwrap() = Some(thread::current().id());
    }
}

fn aborting_drops_the_future_on_its_own_thread(backend: Backend) {
    let engine = engine(backend, 2);
    let handle = engine.handle();
    let dropped = Arc::new(Mutex::new(None));
    let tell = Tell(Arc::clone(&dropped));
    let mut join = handle.spawn_on(1, move || async move {
        let _tell = tell;
        pending::<()>().await;
    });
    let home = engine.block_on(async {
        let home = handle.spawn_on(1, || async { thread::current().id() }).await.unwrap();
        join.abort();
        assert!(matches!((&mut join).await, Err(JoinError::Aborted)));
        home
    });
    assert_eq!(*dropped.lock().unwrap(), Some(home));
    // Too late to abort: the result is there.
    let mut join = handle.spawn(async { 7 });
    while !join.is_finished() {
        thread::yield_now();
    }
    join.abort();
    assert_eq!(engine.block_on(join).unwrap(), 7);
}

fn a_panic_surfaces_in_the_handle_and_the_thread_lives_on(backend: Backend) {
    let engine = engine(backend, 1);
    let join = engine.handle().spawn(async {
        yield_now().await;
        panic!("on purpose");
    });
    let error = engine.block_on(join).unwrap_err();
    assert_eq!(error.panic_message(), Some("on purpose"));
    assert_eq!(engine.block_on(async { 1 }), 1);
}

fn a_detached_task_runs_on(backend: Backend) {
    let engine = engine(backend, 2);
    let done = Arc::new(AtomicBool::new(false));
    let theirs = Arc::clone(&done);
    drop(engine.handle().spawn(async move {
        sleep(Duration::from_millis(1)).await;
        theirs.store(true, SeqCst);
    }));
    let begin = Instant::now();
    while !done.load(SeqCst) {
        assert!(begin.elapsed() < Duration::from_secs(10));
        thread::yield_now();
    }
}

fn a_storm_of_wakes_across_threads_loses_none(backend: Backend) {
    const ROUNDS: usize = 5_000;
    let engine = engine(backend, 2);
    let handle = engine.handle();
    // Two tasks on two threads that wake each other in turns, several pairs at once: every lost wake hangs a pair.
    let pairs: Vec<_> = (0..4)
        .map(|_| {
            let turn = Arc::new(AtomicUsize::new(0));
            let wakers: Arc<[Mutex<Option<Waker>>; 2]> = Arc::new([Mutex::new(None), Mutex::new(None)]);
            [0, 1].map(|me| {
                let (turn, wakers) = (Arc::clone(&turn), Arc::clone(&wakers));
                handle.spawn_on(me, move || async move {
                    for round in 0..ROUNDS {
                        poll_fn(|cx| {
                            *wakers[me].lock().unwrap() = Some(cx.waker().clone());
                            if turn.load(SeqCst) == 2 * round + me { Poll::Ready(()) } else { Poll::Pending }
                        })
                        .await;
                        turn.fetch_add(1, SeqCst);
                        if let Some(waker) = wakers[1 - me].lock().unwrap().take() {
                            waker.wake();
                        }
                    }
                })
            })
        })
        .collect();
    engine.block_on(async {
        for join in pairs.into_iter().flatten() {
            join.await.unwrap();
        }
    });
}

fn timers_fire_in_order_and_not_early(backend: Backend) {
    let engine = engine(backend, 1);
    let order = engine.block_on_local(|| async {
        let order = Rc::new(std::cell::RefCell::new(Vec::new()));
        let begin = now();
        let joins: Vec<_> = [30u64, 10, 20, 5, 10]
            .into_iter()
            .map(|millis| {
                let order = Rc::clone(&order);
                spawn_local(async move {
                    let deadline = begin + Duration::from_millis(millis);
                    sleep_until(deadline).await;
                    assert!(now() >= deadline);
                    order.borrow_mut().push(millis);
                })
            })
            .collect();
        for join in joins {
            join.await.unwrap();
        }
        order.take()
    });
    assert_eq!(order, [5, 10, 10, 20, 30]);
}

fn a_dropped_sleep_neither_fires_nor_keeps_the_thread_busy(backend: Backend) {
    let engine = engine(backend, 1);
    engine.block_on(async {
        for _ in 0..1000 {
            let mut sleep = Box::pin(sleep(Duration::from_secs(1000)));
            poll_fn(|cx| {
                assert!(sleep.as_mut().poll(cx).is_pending());
                Poll::Ready(())
            })
            .await;
        }
        let begin = now();
        sleep(Duration::from_millis(2)).await;
        assert!(begin.elapsed() >= Duration::from_millis(2));
        // A deadline in the past, and one beyond the clock's end.
        sleep(Duration::ZERO).await;
        drop(sleep(Duration::MAX));
    });
}

fn a_sleep_moves_between_threads(backend: Backend) {
    let engine = engine(backend, 2);
    let handle = engine.handle();
    engine.block_on(async {
        let mut moving = Box::pin(sleep(Duration::from_millis(20)));
        poll_fn(|cx| {
            assert!(moving.as_mut().poll(cx).is_pending());
            Poll::Ready(())
        })
        .await;
        handle.spawn_on(1, move || moving).await.unwrap();
    });
}

fn shutdown_drops_waiting_tasks_on_their_threads(backend: Backend) {
    let engine = engine(backend, 2);
    let handle = engine.handle();
    let dropped: Vec<_> = (0..20).map(|_| Arc::new(Mutex::new(None))).collect();
    let mut joins = Vec::new();
    for (index, told) in dropped.iter().enumerate() {
        let tell = Tell(Arc::clone(told));
        joins.push(handle.spawn_on(index % 2, move || async move {
            let _tell = tell;
            if index % 3 == 0 {
                sleep(Duration::from_secs(1000)).await;
            }
            pending::<()>().await;
        }));
    }
    // One never gets to run: the engine ends first, maybe.
    let last = handle.spawn(async {});
    engine.shutdown();
    drop(last);
    for (told, join) in dropped.iter().zip(joins) {
        assert!(join.is_finished());
        let told = told.lock().unwrap().expect("dropped");
        assert_ne!(told, thread::current().id());
    }
}

fn spawning_after_shutdown_aborts(backend: Backend) {
    let first = engine(backend, 1);
    let handle = first.handle();
    drop(first);
    let join = handle.spawn(async { 1 });
    let other = engine(backend, 1);
    assert!(matches!(other.block_on(join), Err(JoinError::Aborted)));
}

fn an_idle_engine_burns_no_processor_time(backend: Backend) {
    // The time of this engine's threads alone, for other tests run beside this one.
    fn used() -> Duration {
        // SAFETY: all-zero is a valid rusage.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: it is on the stack.
        assert_eq!(unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) }, 0);
        let time = |time: libc::timeval| {
            Duration::from_secs(time.tv_sec as u64) + Duration::from_micros(time.tv_usec as u64)
        };
        time(usage.ru_utime) + time(usage.ru_stime)
    }
    let engine = engine(backend, 2);
    let handle = engine.handle();
    let measure = |handle: &driveline_engine::Handle| {
        let joins = [0, 1].map(|thread| handle.spawn_on(thread, || async { used() }));
        engine.block_on(async {
            let mut all = Duration::ZERO;
            for join in joins {
                all += join.await.unwrap();
            }
            all
        })
    };
    // Some life first, so that spinning is on.
    engine.block_on(async {
        for _ in 0..200 {
            unblock(|| ()).await;
        }
    });
    let before = measure(&handle);
    thread::sleep(Duration::from_millis(200));
    let burnt = measure(&handle) - before;
    assert!(burnt < Duration::from_millis(5), "{burnt:?} of processor time in 200 ms of nothing");
}

fn blocking_work_runs_elsewhere(backend: Backend) {
    let engine = engine(backend, 1);
    let here = engine.block_on(async {
        let there = unblock(|| thread::current().id()).await;
        assert_ne!(there, thread::current().id());
        // Many at once, more than there are threads.
        let joins: Vec<_> = (0..200).map(|n| spawn_local(unblock(move || n))).collect();
        let mut sum = 0;
        for join in joins {
            sum += join.await.unwrap();
        }
        sum
    });
    assert_eq!(here, 199 * 100);
}

fn a_panicking_destructor_does_not_end_the_thread(backend: Backend) {
    struct Bad;
    impl Drop for Bad {
        fn drop(&mut self) {
            panic!("in a destructor, on purpose");
        }
    }
    let engine = engine(backend, 1);
    for _ in 0..2 {
        let bad = Bad;
        let mut join = engine.handle().spawn(async move {
            let _bad = bad;
            pending::<()>().await;
        });
        engine.block_on(async {
            yield_now().await;
            join.abort();
            assert!(join.await.is_err());
        });
    }
    // And one is left for the shutdown.
    let bad = Bad;
    engine
        .handle()
        .spawn(async move {
            let _bad = bad;
            pending::<()>().await;
        })
        .detach();
    engine.block_on(yield_now());
}

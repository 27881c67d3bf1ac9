//! Signals are of the whole process, so they have a test program of their own.

use std::time::Duration;

use driveline_engine::signal::Signals;
use driveline_engine::{Backend, Config, Engine, sleep, spawn_local};

#[test]
fn signals_arrive_one_after_the_other() {
    for backend in [Backend::IoUring, Backend::Fallback] {
        let engine = Engine::start(Config { threads: 1, backend, ..Config::default() }).unwrap();
        engine.block_on_local(|| async {
            let mut signals = Signals::terminate().unwrap();
            assert_eq!(Signals::terminate().unwrap_err().kind(), std::io::ErrorKind::AlreadyExists);
            // Before anybody waits, twice of one kind: told once.
            raise(libc::SIGTERM);
            raise(libc::SIGTERM);
            raise(libc::SIGINT);
            let mut two = [signals.next().await.unwrap(), signals.next().await.unwrap()];
            two.sort();
            assert_eq!(two, [libc::SIGINT, libc::SIGTERM]);
            let waiting = spawn_local(async move { signals.next().await });
            sleep(Duration::from_millis(1)).await;
            assert!(!waiting.is_finished());
            raise(libc::SIGINT);
            assert_eq!(waiting.await.unwrap().unwrap(), libc::SIGINT);
            // Freed for the next.
            assert!(Signals::of(&[0]).is_err());
            drop(Signals::of(&[libc::SIGUSR1]).unwrap());
        });
    }
}

fn raise(signal: i32) {
    // SAFETY: the signal is caught.
    assert_eq!(unsafe { libc::kill(libc::getpid(), signal) }, 0);
}

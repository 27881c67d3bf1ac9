//! Counts descriptors and threads of the whole process, so it has a test program of its own.

use driveline_engine::file::{File, OpenOptions};
use driveline_engine::net::{Stream, UnixListener};
use driveline_engine::{Backend, Config, Engine, spawn_local, yield_now};

fn entries(folder: &str) -> usize {
    std::fs::read_dir(folder).unwrap().count()
}

#[test]
fn engines_come_and_go_without_a_trace() {
    let folder = tempfile::tempdir().unwrap();
    let life = |backend| {
        let engine = Engine::start(Config { threads: 2, backend, ..Config::default() }).unwrap();
        engine.block_on_local(|| async {
            let options = OpenOptions { read: true, write: true, create: true, direct: false };
            let file = File::open(folder.path().join("image"), options).await.unwrap();
            file.fsync(false).await.unwrap();
            let listener = UnixListener::bind(folder.path().join("socket")).unwrap();
            let (one, other) = Stream::pair().unwrap();
            // Both still wait when the engine ends.
            spawn_local(async move { listener.accept().await.map(drop) }).detach();
            spawn_local(async move {
                let _other = other;
                one.read(&mut [0]).await
            })
            .detach();
            yield_now().await;
        });
    };
    // The blocking thread and what the test's own harness opens come first.
    life(Backend::IoUring);
    life(Backend::Fallback);
    let (descriptors, threads) = (entries("/proc/self/fd"), entries("/proc/self/task"));
    for _ in 0..50 {
        life(Backend::IoUring);
        life(Backend::Fallback);
    }
    assert!(!folder.path().join("socket").exists());
    // A ring that is closed goes away in the background, its worker threads too; the blocking pool may have one more.
    let begin = std::time::Instant::now();
    while entries("/proc/self/fd") > descriptors || entries("/proc/self/task") > threads + 1 {
        assert!(begin.elapsed().as_secs() < 5, "{descriptors} descriptors and {threads} threads before");
        std::thread::yield_now();
    }
}

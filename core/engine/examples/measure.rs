//! Measures what the crate's documentation claims: `cargo run --release -p driveline-engine --example measure`.
//!
//! It needs some seconds, and a folder with room for 64 MiB (the first argument, else the temporary folder).

use std::cell::Cell;
use std::future::poll_fn;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use driveline_engine::file::{File, OpenOptions};
use driveline_engine::net::Stream;
use driveline_engine::{Backend, Config, Engine, spawn_local};

const BLOCK: usize = 4096;
const FILE: u64 = 64 << 20;

fn main() {
    let folder = std::env::args_os().nth(1).map_or_else(std::env::temp_dir, Into::into);
    let path = folder.join("driveline-measure.tmp");
    prepare(&path).expect("64 MiB can be written");
    for backend in [Backend::IoUring, Backend::Fallback] {
        for poll in [0, 20] {
            let poll_before_sleep = Duration::from_micros(poll);
            let config = Config { threads: 2, backend, poll_before_sleep };
            match Engine::start(config) {
                Ok(engine) => {
                    println!("{backend}, {poll} µs of polling before sleep");
                    measure(&engine, &path, poll == 0);
                }
                Err(error) => println!("{backend}: {error}"),
            }
        }
    }
    println!("the ring alone");
    if let Err(error) = ring_alone(&path) {
        println!("  {error}");
    }
    std::fs::remove_file(&path).expect("the file is still there");
}

/// In pieces, from the end: a file that is written in one go gets folios of megabytes, and ext4 then walks through all blocks of
/// a folio for each write of 4 KiB, which takes 10 µs and hides everything else. Then to the disk, so that nothing is written back
/// while writes are measured.
fn prepare(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::create(path)?;
    for index in (0..FILE / BLOCK as u64).rev() {
        file.write_all_at(&[1; BLOCK], index * BLOCK as u64)?;
    }
    file.sync_all()
}

fn report(what: &str, count: u32, begin: Instant) {
    println!("  {what:<46} {:>9} ns", (begin.elapsed() / count).as_nanos());
}

fn measure(engine: &Engine, path: &Path, first: bool) {
    let path = path.to_owned();
    let handle = engine.handle();
    if first {
        engine.block_on_local(|| async move {
            spawn_and_join().await;
            file_in_the_page_cache(&path).await;
        });
    }
    let begin = Instant::now();
    let rounds = wakes(engine);
    report("wake of a task on the other thread", rounds, begin);
    for depth in [1, 32] {
        let (client, server) = Stream::pair().expect("a pair of sockets");
        let server = handle.spawn_on(1, move || serve(server));
        engine.block_on_local(|| ask(client, depth));
        engine.block_on(server).expect("the server ends well");
    }
}

async fn spawn_and_join() {
    const COUNT: u32 = 1_000_000;
    let begin = Instant::now();
    for _ in 0..COUNT {
        spawn_local(async {}).await.expect("no panic");
    }
    report("spawn_local and join", COUNT, begin);
}

async fn file_in_the_page_cache(path: &Path) {
    const COUNT: u32 = 300_000;
    let options = OpenOptions { read: true, write: true, ..OpenOptions::default() };
    let file = File::open(path, options).await.expect("the file is there");
    let mut block = vec![0u8; BLOCK];
    let part = libc::iovec { iov_base: block.as_mut_ptr().cast(), iov_len: BLOCK };
    let begin = Instant::now();
    for index in 0..COUNT {
        // SAFETY: `block` and `part` outlive the await.
        unsafe { file.read_at(&raw const part, 1, offset(index)) }.await.expect("it reads");
    }
    report("File::read_at, 4 KiB, cached", COUNT, begin);
    for index in 0..COUNT / 4 {
        // SAFETY: as above. Once before it is measured, so that all pages are dirty.
        unsafe { file.write_at(&raw const part, 1, offset(index)) }.await.expect("it writes");
    }
    let begin = Instant::now();
    for index in 0..COUNT / 4 {
        // SAFETY: as above.
        unsafe { file.write_at(&raw const part, 1, offset(index)) }.await.expect("it writes");
    }
    report("File::write_at, 4 KiB, cached", COUNT / 4, begin);
    let begin = Instant::now();
    for index in 0..COUNT / 4 {
        // SAFETY: as above.
        let count = unsafe { libc::pwrite(file.as_raw_fd(), part.iov_base, BLOCK, offset(index) as i64) };
        assert_eq!(count, BLOCK as isize);
    }
    report("pwrite alone, 4 KiB, cached", COUNT / 4, begin);
}

/// Some walk over the file.
fn offset(index: u32) -> u64 {
    u64::from(index) * 0x9e37_79b1 % (FILE / BLOCK as u64) * BLOCK as u64
}

/// Two tasks on two threads wake each other in turns.
fn wakes(engine: &Engine) -> u32 {
    const ROUNDS: usize = 50_000;
    let turn = Arc::new(AtomicUsize::new(0));
    let wakers: Arc<[Mutex<Option<Waker>>; 2]> = Arc::default();
    let joins = [0, 1].map(|me| {
        let (turn, wakers) = (Arc::clone(&turn), Arc::clone(&wakers));
        engine.handle().spawn_on(me, move || async move {
            for round in 0..ROUNDS {
                poll_fn(|cx| {
                    *wakers[me].lock().unwrap() = Some(cx.waker().clone());
                    if turn.load(SeqCst) == 2 * round + me { Poll::Ready(()) } else { Poll::Pending }
                })
                .await;
                turn.fetch_add(1, SeqCst);
                let waker = wakers[1 - me].lock().unwrap().take();
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
        })
    });
    for join in joins {
        engine.block_on(join).expect("no panic");
    }
    2 * ROUNDS as u32
}

const REQUEST: usize = 28;

/// Answers each request of 28 bytes with 4 KiB, as an NBD server does; all that came at once is answered at once.
async fn serve(stream: Stream) {
    let mut requests = vec![0; 64 * REQUEST];
    let answer = vec![0; BLOCK];
    loop {
        let mut count = stream.read(&mut requests).await.expect("the client lives");
        if count == 0 {
            return;
        }
        if count % REQUEST != 0 {
            let rest = REQUEST - count % REQUEST;
            stream.read_exact(&mut requests[count..count + rest]).await.expect("the client lives");
            count += rest;
        }
        let parts = vec![std::io::IoSlice::new(&answer); count / REQUEST];
        stream.write_all_vectored(&parts).await.expect("the client lives");
    }
}

async fn ask(stream: Stream, depth: usize) {
    let count = if depth == 1 { 50_000 } else { 300_000 };
    let (mut reader, mut writer) = stream.into_split();
    let begin = Instant::now();
    let answered = Rc::new(Cell::new(0));
    writer.write_all(&vec![0; depth * REQUEST]).await.expect("the server lives");
    let mut asked = depth;
    let mut buffer = vec![0; depth * BLOCK];
    let mut bytes = 0;
    while answered.get() < count {
        bytes += reader.read(&mut buffer).await.expect("the server lives");
        let whole = bytes / BLOCK;
        let again = (whole - answered.get()).min(count - asked.min(count));
        answered.set(whole);
        if again > 0 {
            asked += again;
            writer.write_all(&vec![0; again * REQUEST]).await.expect("the server lives");
        }
    }
    report(&format!("28 bytes for 4 KiB, unix socket, depth {depth}"), count as u32, begin);
}

/// What files would cost if everything went through io_uring.
fn ring_alone(path: &Path) -> std::io::Result<()> {
    use io_uring::{IoUring, opcode, types};
    const DEPTH: u32 = 32;
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path)?;
    let fd = types::Fd(file.as_raw_fd());
    let mut blocks = vec![0u8; BLOCK * DEPTH as usize];
    let mut ring: IoUring =
        IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(2 * DEPTH)?;
    for (name, write, depth, count) in [
        ("read, 4 KiB, cached, depth 1", false, 1, 200_000),
        ("read, 4 KiB, cached, depth 32", false, DEPTH, 300_000),
        ("write, 4 KiB, cached, depth 1", true, 1, 30_000),
        ("write, 4 KiB, cached, depth 32", true, DEPTH, 60_000),
    ] {
        let begin = Instant::now();
        let mut index = 0;
        while index < count {
            for slot in 0..depth {
                let block = blocks[slot as usize * BLOCK..].as_mut_ptr();
                let entry = if write {
                    opcode::Write::new(fd, block, BLOCK as u32).offset(offset(index)).build()
                } else {
                    opcode::Read::new(fd, block, BLOCK as u32).offset(offset(index)).build()
                };
                // SAFETY: `blocks` outlives the loop, which waits for all.
                unsafe { ring.submission().push(&entry) }.expect("there is room");
                index += 1;
            }
            ring.submit_and_wait(depth as usize)?;
            assert!(ring.completion().all(|entry| entry.result() == BLOCK as i32));
        }
        report(name, count, begin);
    }
    Ok(())
}

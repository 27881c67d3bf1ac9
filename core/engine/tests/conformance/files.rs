//! Files against an oracle in memory, with many operations in flight.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::path::Path;
use std::rc::Rc;
use std::task::Poll;

use driveline_engine::file::{File, LockKind, OpenOptions};
use driveline_engine::{Backend, spawn_local};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::engine;

conformance!(
    random_reads_and_writes_equal_an_oracle,
    random_direct_reads_and_writes_equal_an_oracle,
    dropping_a_read_in_flight_leaves_its_memory_alone,
    lengths_holes_and_punching,
    locks_keep_a_second_writer_out,
    what_is_no_file_is_refused,
    a_job_in_the_page_cache_does_not_starve_others,
    files_work_on_other_threads_too,
    long_transfers_arrive_whole,
    reads_dropped_at_random_disturb_no_others,
);

fn iovec(part: &mut [u8]) -> libc::iovec {
    libc::iovec { iov_base: part.as_mut_ptr().cast(), iov_len: part.len() }
}

async fn read(file: &File, buffer: &mut [u8], mut offset: u64) {
    let mut done = 0;
    while done < buffer.len() {
        // Two parts where there is enough, to read vectored.
        let half = (buffer.len() - done) / 2 / 4096 * 4096;
        let (one, two) = buffer[done..].split_at_mut(half);
        let parts = [iovec(one), iovec(two)];
        // SAFETY: the parts are borrowed until the await is over, or dropped with this future after the read.
        let count = unsafe { file.read_at(parts.as_ptr(), 2, offset) }.await.unwrap();
        assert_ne!(count, 0, "the end came early");
        done += count;
        offset += count as u64;
    }
}

async fn write(file: &File, buffer: &mut [u8], mut offset: u64) {
    let mut done = 0;
    while done < buffer.len() {
        let half = (buffer.len() - done) / 2 / 4096 * 4096;
        let (one, two) = buffer[done..].split_at_mut(half);
        let parts = [iovec(one), iovec(two)];
        // SAFETY: as in `read`.
        let count = unsafe { file.write_at(parts.as_ptr(), 2, offset) }.await.unwrap();
        done += count;
        offset += count as u64;
    }
}

/// Memory for direct I/O.
struct Aligned(Vec<u8>, usize, usize);

impl Aligned {
    fn new(length: usize) -> Aligned {
        let memory = vec![0; length + 4096];
        let skip = memory.as_ptr().align_offset(4096);
        Aligned(memory, skip, length)
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.0[self.1..self.1 + self.2]
    }
}

const RW: OpenOptions = OpenOptions { read: true, write: true, create: true, direct: false };

/// Tasks that each own a slice of the file, so that the oracle needs no order between them.
fn against_an_oracle(backend: Backend, folder: &Path, options: OpenOptions, grain: usize) {
    const TASKS: usize = 16;
    const SLICE: usize = 256 << 10;
    let engine = engine(backend, 1);
    let path = folder.join("image");
    engine.block_on_local(|| async {
        let file = Rc::new(File::open(&path, options).await.unwrap());
        file.set_len((TASKS * SLICE) as u64).unwrap();
        let oracle = Rc::new(RefCell::new(vec![0u8; TASKS * SLICE]));
        let joins: Vec<_> = (0..TASKS)
            .map(|task| {
                let (file, oracle) = (Rc::clone(&file), Rc::clone(&oracle));
                spawn_local(async move {
                    let mut random = SmallRng::seed_from_u64(task as u64);
                    for step in 0..60 {
                        let length = random.random_range(1..=64 * 1024 / grain) * grain;
                        let start = random.random_range(0..=(SLICE - length) / grain) * grain + task * SLICE;
                        let mut buffer = Aligned::new(length);
                        if random.random_bool(0.5) {
                            random.fill(buffer.bytes());
                            write(&file, buffer.bytes(), start as u64).await;
                            oracle.borrow_mut()[start..start + length].copy_from_slice(buffer.bytes());
                        } else {
                            read(&file, buffer.bytes(), start as u64).await;
                            assert!(*buffer.bytes() == oracle.borrow()[start..start + length], "step {step}");
                        }
                        if step % 20 == 7 {
                            file.fsync(step % 40 == 7).await.unwrap();
                        }
                        if step % 16 == 3 {
                            // Out of the page cache, as far as it is clean, so that reads have to wait.
                            rustix::fs::fadvise(&*file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
                        }
                    }
                })
            })
            .collect();
        for join in joins {
            join.await.unwrap();
        }
        assert!(std::fs::read(&path).unwrap() == *oracle.borrow());
        // The end of the file is a read of nothing.
        let mut one = Aligned::new(4096);
        let part = iovec(one.bytes());
        // SAFETY: `one` outlives the await.
        let count = unsafe { file.read_at(&raw const part, 1, (TASKS * SLICE) as u64) }.await.unwrap();
        assert_eq!(count, 0);
    });
}

fn random_reads_and_writes_equal_an_oracle(backend: Backend) {
    let folder = tempfile::tempdir().unwrap();
    against_an_oracle(backend, folder.path(), RW, 1);
    // In memory, where some kernels know no RWF_NOWAIT.
    if let Ok(folder) = tempfile::tempdir_in("/dev/shm") {
        against_an_oracle(backend, folder.path(), RW, 1);
    }
}

fn random_direct_reads_and_writes_equal_an_oracle(backend: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let options = OpenOptions { direct: true, ..RW };
    match File::open_blocking(&folder.path().join("probe"), options) {
        Ok(file) => {
            assert!(file.is_direct());
            assert!(file.alignment().offset <= 4096);
            against_an_oracle(backend, folder.path(), options, 4096);
        }
        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EINVAL), "no O_DIRECT here"),
    }
}

fn dropping_a_read_in_flight_leaves_its_memory_alone(backend: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    std::fs::write(&path, vec![0xaa; 8 << 20]).unwrap();
    let engine = engine(backend, 1);
    engine.block_on_local(|| async {
        let file = File::open(&path, OpenOptions { read: true, ..OpenOptions::default() }).await.unwrap();
        file.fsync(false).await.unwrap();
        let mut waited = 0;
        for round in 0..64u64 {
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
            let mut buffer = vec![0; 128 << 10];
            let part = iovec(&mut buffer);
            // SAFETY: `buffer` outlives the read, which is dropped below.
            let mut reading = Box::pin(unsafe { file.read_at(&raw const part, 1, round * (128 << 10)) });
            let polled = poll_fn(|cx| Poll::Ready(reading.as_mut().poll(cx))).await;
            waited += usize::from(polled.is_pending());
            drop(reading);
            // From here on nobody may write to it any more.
            buffer.fill(0x55);
            driveline_engine::sleep(std::time::Duration::from_micros(200)).await;
            assert!(buffer.iter().all(|byte| *byte == 0x55), "the kernel wrote after the drop");
        }
        // A folder in memory has nothing to wait for.
        const TMPFS: i64 = 0x0102_1994;
        let in_memory = rustix::fs::fstatfs(&file).unwrap().f_type == TMPFS;
        assert!(waited > 0 || in_memory, "no read was ever in flight");
    });
}

fn lengths_holes_and_punching(backend: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(backend, 1);
    engine.block_on_local(|| async {
        let file = File::open(folder.path().join("image"), RW).await.unwrap();
        assert!(file.is_empty().unwrap());
        assert!(!file.is_block_device());
        file.set_len(1 << 20).unwrap();
        assert_eq!(file.seek_data(0).unwrap(), None);
        write(&file, &mut [1; 65536], 128 << 10).await;
        assert_eq!(file.seek_data(0).unwrap(), Some(128 << 10));
        assert_eq!(file.seek_hole(128 << 10).unwrap(), Some(192 << 10));
        assert_eq!(file.seek_hole(1 << 20).unwrap(), None);
        let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        file.fallocate(punch, 128 << 10, 65536).await.unwrap();
        assert_eq!(file.seek_data(0).unwrap(), None);
        assert_eq!(file.len().unwrap(), 1 << 20);
        let error = file.fallocate(-1, 0, 1).await.unwrap_err();
        assert!(error.raw_os_error().is_some());
    });
}

fn locks_keep_a_second_writer_out(backend: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let engine = engine(backend, 1);
    engine.block_on_local(|| async {
        let first = File::open(&path, RW).await.unwrap();
        let second = File::open(&path, RW).await.unwrap();
        assert!(first.try_lock_ofd(100..200, LockKind::Exclusive).unwrap());
        assert!(!second.can_lock_ofd(150..151, LockKind::Shared).unwrap());
        assert!(!second.try_lock_ofd(150..151, LockKind::Shared).unwrap());
        assert!(second.try_lock_ofd(200..201, LockKind::Exclusive).unwrap());
        assert!(first.try_lock_ofd(100..200, LockKind::Shared).unwrap());
        assert!(second.try_lock_ofd(150..151, LockKind::Shared).unwrap());
        first.unlock_ofd(100..200).unwrap();
        assert!(second.try_lock_ofd(100..200, LockKind::Exclusive).unwrap());
        drop(second);
        assert!(first.can_lock_ofd(100..201, LockKind::Exclusive).unwrap());
        assert!(first.try_lock_ofd(5..5, LockKind::Shared).is_err());
    });
}

fn what_is_no_file_is_refused(backend: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(backend, 1);
    engine.block_on_local(|| async {
        let read = OpenOptions { read: true, ..OpenOptions::default() };
        let pipe = folder.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        assert_eq!(File::open(&pipe, read).await.unwrap_err().kind(), std::io::ErrorKind::InvalidInput);
        assert!(File::open(folder.path(), read).await.is_err());
        let missing = File::open(folder.path().join("missing"), read).await;
        assert_eq!(missing.unwrap_err().kind(), std::io::ErrorKind::NotFound);
        let zero = File::open("/dev/zero", read).await.unwrap();
        let mut buffer = [1; 100];
        let part = iovec(&mut buffer);
        // SAFETY: `buffer` outlives the await.
        assert_eq!(unsafe { zero.read_at(&raw const part, 1, 0) }.await.unwrap(), 100);
        assert_eq!(buffer, [0; 100]);
    });
}

fn a_job_in_the_page_cache_does_not_starve_others(backend: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    std::fs::write(&path, vec![1; 1 << 20]).unwrap();
    let engine = engine(backend, 1);
    engine.block_on_local(|| async {
        let file = File::open(&path, OpenOptions { read: true, ..OpenOptions::default() }).await.unwrap();
        let mut job = spawn_local(async move {
            let mut buffer = vec![0; 256 << 10];
            loop {
                read(&file, &mut buffer, 0).await;
            }
        });
        driveline_engine::sleep(std::time::Duration::from_millis(5)).await;
        job.abort();
        assert!(job.await.is_err());
    });
}

/// Without a ring at hand, the blocking pool does what would block.
fn files_work_on_other_threads_too(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    futures::executor::block_on(async {
        let file = File::open(folder.path().join("image"), RW).await.unwrap();
        let mut data = vec![7; 1 << 20];
        write(&file, &mut data, 0).await;
        file.fsync(false).await.unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        data.fill(0);
        read(&file, &mut data, 0).await;
        assert!(data.iter().all(|byte| *byte == 7));
    });
}

fn long_transfers_arrive_whole(backend: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(backend, 1);
    engine.block_on_local(|| async {
        let file = File::open(folder.path().join("image"), RW).await.unwrap();
        let mut data: Vec<u8> = (0..10 << 20).map(|index: u32| (index / 4096 + index) as u8).collect();
        let expected = data.clone();
        write(&file, &mut data, 4096).await;
        data.fill(0);
        read(&file, &mut data, 4096).await;
        assert!(data == expected);
    });
}

fn reads_dropped_at_random_disturb_no_others(backend: Backend) {
    const BLOCK: usize = 64 << 10;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let content: Vec<u8> = (0..8u32 << 20).map(|index| (index / BLOCK as u32 * 3 + index) as u8).collect();
    std::fs::write(&path, &content).unwrap();
    let engine = engine(backend, 1);
    engine.block_on_local(|| async {
        let file = Rc::new(File::open(&path, RW).await.unwrap());
        file.fsync(false).await.unwrap();
        let content = Rc::new(content);
        let joins: Vec<_> = (0..16)
            .map(|task| {
                let (file, content) = (Rc::clone(&file), Rc::clone(&content));
                spawn_local(async move {
                    let mut random = SmallRng::seed_from_u64(task);
                    let mut buffer = vec![0; BLOCK];
                    for _ in 0..50 {
                        rustix::fs::fadvise(&*file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
                        let start = random.random_range(0..content.len() - BLOCK);
                        let part = iovec(&mut buffer);
                        // SAFETY: `buffer` outlives the read, which ends or is dropped first.
                        let mut reading = Box::pin(unsafe { file.read_at(&raw const part, 1, start as u64) });
                        let polled = poll_fn(|cx| Poll::Ready(reading.as_mut().poll(cx))).await;
                        if random.random_bool(0.5) {
                            for _ in 0..random.random_range(0..3) {
                                driveline_engine::yield_now().await;
                            }
                            drop(reading);
                            buffer.fill(0x55);
                            driveline_engine::yield_now().await;
                            assert!(buffer.iter().all(|byte| *byte == 0x55));
                            continue;
                        }
                        let count = match polled {
                            Poll::Ready(result) => result.unwrap(),
                            Poll::Pending => reading.await.unwrap(),
                        };
                        assert!(count > 0 && buffer[..count] == content[start..start + count]);
                    }
                })
            })
            .collect();
        for join in joins {
            join.await.unwrap();
        }
    });
}
